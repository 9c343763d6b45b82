"""Training recipes as data: which configuration each network is trained with, by profile.

``full`` is the length that a reference run has (the record of each shipped checkpoint repeats what made it, which may
be an earlier recipe); ``quick`` and ``smoke`` are the same recipe cut short, on fewer images, to show the pipeline at
work rather than to reach an accuracy.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hq_lib.results.hints import check_known
from hq_lib.results.paths import check_profile
from hq_lib.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How one network is trained in float."""

    dataset: str
    """Name of the data set."""
    config: TrainConfig
    """The ``full`` configuration of seed 0."""
    later_epochs: int | None = None
    """Epochs of the other seeds, which only say how far results spread; None = as seed 0."""
    split: str = "train"
    """What ``full`` trains on: "train", or "trainval", all images, as the published runs do. Nothing is then left to
    validate on, and the last epoch is kept."""
    quick_epochs: int = 2
    """Epochs in the quick profile."""
    quick_images: int = 5_000
    """Training images in the quick profile (class-balanced)."""
    network: str | None = None
    """Name of the network, as ``models.build`` takes it; None = the recipe's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network, as ``models.build`` takes them."""


RESNET = TrainConfig(epochs=200, lr=0.1, warmup_epochs=2, precision="auto", compile="auto")
MOBILE = dataclasses.replace(RESNET, epochs=60)
VGG = dataclasses.replace(RESNET, epochs=30, lr=0.05)
LENET = TrainConfig(epochs=40, lr=0.05, warmup_epochs=1, pad=2, precision="auto", compile="auto")

RECIPES = {
    "resnet20": Recipe("cifar10", RESNET, later_epochs=100, split="trainval"),
    "toynet": Recipe("cifar10", dataclasses.replace(RESNET, epochs=120), later_epochs=60, split="trainval"),
    "mobilenetv2": Recipe("cifar10", MOBILE, split="trainval"),
    "mobilenetv2_seed": Recipe("cifar10", MOBILE, split="trainval"),
    "vgg11": Recipe("cifar10", VGG, split="trainval", options={"width": 0.5, "hidden": 512}),
    "vgg_small": Recipe("cifar10", dataclasses.replace(RESNET, epochs=80)),
    "lenet": Recipe("fashion_mnist", LENET),
    "lenet_relu1": Recipe("fashion_mnist", LENET, network="lenet", options={"relu1": True}),
    "lenet_mnist": Recipe("mnist", dataclasses.replace(LENET, epochs=20), network="lenet"),
}
"""SGD with Nesterov momentum, cosine from 0.1 to 0 after two epochs of warm-up, weight decay 5e-4, crops and flips.

Departs from the published runs: ResNet-20 of He et al. 2016 has steps, 164 epochs and decay 1e-4; the group's
repository (seed 001) leaves its schedules open.
"""


def recipe(model: str, profile: str, *, seed: int = 0) -> tuple[str, TrainConfig, int | None]:
    """(data set, configuration, number of training images or None for all) of a network in a profile.

    Args:
        model:   a key of ``RECIPES``.
        profile: ``full`` is the recipe itself.
        seed:    goes into the configuration.

    An unknown network or profile raises ``ValueError`` naming the nearest valid one.
    """
    check_profile(profile)
    chosen = find(model)
    if profile == "full":
        epochs = chosen.config.epochs if seed == 0 else chosen.later_epochs or chosen.config.epochs
        return chosen.dataset, dataclasses.replace(chosen.config, seed=seed, epochs=epochs), None
    epochs, n = (chosen.quick_epochs, chosen.quick_images) if profile == "quick" else (1, 256)
    return chosen.dataset, dataclasses.replace(chosen.config, seed=seed, epochs=epochs, warmup_epochs=0), n


def find(model: str) -> Recipe:
    """The recipe of a network; an unknown one raises ``ValueError`` naming the nearest one that has a recipe."""
    check_known(model, RECIPES, "network with a recipe")
    return RECIPES[model]
