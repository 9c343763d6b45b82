"""Training recipes as data: which configuration each network is trained with, by profile.

``full`` is what made the shipped checkpoints (each run record repeats it); ``quick`` and ``smoke`` are the same
recipe cut short, on fewer images, to show the pipeline at work rather than to reach an accuracy.
"""

import dataclasses
import difflib
from dataclasses import dataclass

from hq_lib.paths import check_profile
from hq_lib.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How one network is trained in float."""

    dataset: str
    """Name of the data set."""
    config: TrainConfig
    """The ``full`` configuration."""
    quick_epochs: int = 2
    """Epochs in the quick profile."""
    quick_images: int = 10_000
    """Training images in the quick profile (class-balanced)."""


RESNET = TrainConfig(epochs=80, lr=0.1, warmup_epochs=2, precision="bfloat16")
MOBILE = TrainConfig(epochs=60, lr=0.1, warmup_epochs=2, weight_decay=1e-4, precision="bfloat16")
LENET = TrainConfig(epochs=40, lr=0.05, warmup_epochs=1, pad=2, label_smoothing=0.0)

RECIPES = {
    "resnet20": Recipe("cifar10", RESNET),
    "toynet": Recipe("cifar10", dataclasses.replace(MOBILE, weight_decay=5e-4)),
    "mobilenetv2": Recipe("cifar10", MOBILE),
    "mobilenetv2_seed": Recipe("cifar10", MOBILE),
    "vgg11": Recipe("cifar10", RESNET),
    "vgg_small": Recipe("cifar10", RESNET),
    "lenet": Recipe("fashion_mnist", LENET),
}


def recipe(model: str, profile: str, *, seed: int = 0) -> tuple[str, TrainConfig, int | None]:
    """(data set, configuration, number of training images or None for all) of a network in a profile.

    An unknown network or profile raises ``ValueError`` naming the nearest valid one.
    """
    check_profile(profile)
    if model not in RECIPES:
        near = difflib.get_close_matches(str(model), RECIPES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no recipe for {model!r}: choose one of {', '.join(RECIPES)}{hint}")
    chosen = RECIPES[model]
    if profile == "full":
        return chosen.dataset, dataclasses.replace(chosen.config, seed=seed), None
    epochs, n = (chosen.quick_epochs, chosen.quick_images) if profile == "quick" else (1, 500)
    return chosen.dataset, dataclasses.replace(chosen.config, seed=seed, epochs=epochs, warmup_epochs=0), n
