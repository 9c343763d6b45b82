"""Training recipes as data: which configuration each network is trained with, and how each bit width is fine-tuned.

``full`` is the length that a reference run has (each row and the record of each checkpoint repeat what made it, which
may be an earlier recipe); ``quick`` and ``smoke`` are the same recipe cut short, on fewer images, to show the pipeline
at work rather than to reach an accuracy. Quantization-aware runs start from the shipped float network.

Seed 001's layer-by-layer configurations (``BIT_LISTS``) are data too: bits of each layer's input and weights, in the
order stem, blocks, header, classifier (``BitPolicy.from_lists``); 32 = float. From the source of
louvinci/PACT-Quantization; ResNet-20's lists speak of its blocks alone. cfg-2* is named there and never measured: its
lists here are ours, cfg-2's six bits for the weights of the middle stages, all else as in cfg-1*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hq_lib.graph import BitPolicy
from hq_lib.graph.spec import Spec, make_quantizer, parse_spec
from hq_lib.quantizers.base import Quantizer
from hq_lib.quantizers.pact import FixedMPACT
from hq_lib.quantizers.ranges import LEAST_ERROR
from hq_lib.results.hints import check_known
from hq_lib.results.paths import check_profile
from hq_lib.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How one network is trained in float."""

    dataset: str
    """Name of the data set."""
    config: TrainConfig
    """The ``full`` configuration."""
    later_epochs: int | None = None
    """Epochs of the study's other seeds, which only say how far results spread; None = as seed 0."""
    split: str = "train"
    """What ``full`` trains on: "train", or "trainval", all images, as the published runs do. Nothing is then left to
    validate on, and the last epoch is kept."""
    network: str | None = None
    """Name of the network, as ``models.build`` takes it; None = the recipe's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network, as ``models.build`` takes them."""


RESNET = TrainConfig(epochs=200, lr=0.1, warmup_epochs=2, precision="auto", compile="auto")
MOBILE = replace(RESNET, epochs=60)
VGG = replace(RESNET, epochs=30, lr=0.05)
LENET = TrainConfig(epochs=40, lr=0.05, warmup_epochs=1, pad=2, precision="auto", compile="auto")

RECIPES = {
    "resnet20": Recipe("cifar10", RESNET, later_epochs=100, split="trainval"),
    "toynet": Recipe("cifar10", replace(RESNET, epochs=120), later_epochs=60, split="trainval"),
    "mobilenetv2": Recipe("cifar10", MOBILE, split="trainval"),
    "mobilenetv2_seed": Recipe("cifar10", MOBILE, split="trainval"),
    "vgg11": Recipe("cifar10", VGG, split="trainval", options={"width": 0.5, "hidden": 512}),
    "vgg_small": Recipe("cifar10", replace(RESNET, epochs=80)),
    "lenet": Recipe("fashion_mnist", LENET),
    "lenet_relu1": Recipe("fashion_mnist", LENET, network="lenet", options={"relu1": True}),
    "lenet_mnist": Recipe("mnist", replace(LENET, epochs=20), network="lenet"),
}
"""SGD with Nesterov momentum, cosine from 0.1 to 0 after two epochs of warm-up, weight decay 5e-4, crops and flips.

Departs from the published runs: ResNet-20 of He et al. 2016 has steps, 164 epochs and decay 1e-4; the group's
repository (seed 001) leaves its schedules open.
"""


SHORT = {"quick": (2, 5_000), "smoke": (1, 256)}
"""Profile -> (epochs, class-balanced training images) of float training."""


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
        return chosen.dataset, replace(chosen.config, seed=seed), None
    epochs, n = SHORT[profile]
    return chosen.dataset, replace(chosen.config, seed=seed, epochs=epochs, warmup_epochs=0), n


def find(model: str) -> Recipe:
    """The recipe of a network; an unknown one raises ``ValueError`` naming the nearest one that has a recipe."""
    check_known(model, RECIPES, "network with a recipe")
    return RECIPES[model]


FITTED_STEP = {"method": "lsq", "init": LEAST_ERROR}
FITTED_CLIP = {"method": "dorefa", "clip": LEAST_ERROR}
METHODS: dict[str, tuple[Any, Any]] = {
    "ste": ("minmax", "minmax"),
    "dorefa": ("dorefa", FITTED_CLIP),
    "dorefa_paper": ("dorefa", "dorefa"),
    "dorefa_hw": ("dorefa_hw", FITTED_CLIP),
    "pact": ("dorefa", "pact"),
    "mpact": ("dorefa_hw", "mpact"),
    "mpact_fixed": ("dorefa_hw", {"method": "mpact", "clip": FixedMPACT.published}),
    "lsq": (FITTED_STEP, FITTED_STEP),
    "lsq_paper": ("lsq", "lsq"),
    "lsq_plus": ("lsq_plus", "lsq_plus"),
    "dsq": ("dsq", "dsq"),
}
"""Name in rows -> (weight quantizer, activation quantizer): a method's name, or a mapping with its options.

PACT takes DoReFa's weights, as its paper does. "mpact" learns its clips, "mpact_fixed" keeps seed 001's of MobileNetV2.
"dorefa" and "dorefa_hw" fit each activation's clip to the first batch and keep it; "dorefa_paper" clips at 1, from
where a float net with ReLUs hardly learns. "lsq" starts its steps at the least squared error; "lsq_paper" at the
published 2 E|x| / sqrt(qmax), which clips a rectified activation hard at 2 bits.
"""

FINE_TUNE = TrainConfig(epochs=20, lr=0.02, weight_decay=1e-4, precision="auto", compile="auto")
LOW = replace(FINE_TUNE, lr=0.04, warmup_epochs=1.0)
EIGHT = replace(FINE_TUNE, epochs=5, lr=2e-3, precision="float32")  # bfloat16 is no finer than 8 bits
BY_BITS = {
    1: replace(LOW, epochs=100, lr=0.05, warmup_epochs=2.0, weight_decay=1e-5),
    2: replace(LOW, epochs=60, weight_decay=5e-5),
    3: replace(LOW, epochs=30),
    4: FINE_TUNE,
    6: replace(EIGHT, epochs=10, lr=5e-3),
    8: EIGHT,
}
"""Lowest bits of a policy -> its ``full`` configuration; between two keys the lower one holds.

The coarser the grid, the further the weights must move from the float net's: rate and epochs grow as bits fall, while
the decay shrinks, as LSQ's does (Esser et al. 2020, section 3), for a coarse net underfits. Departs from the papers:
PACT (Choi et al. 2018) trains 200 epochs from scratch with steps and decay 2e-4, LSQ 90 epochs, DSQ is silent; here
every method has the same epochs from the same float net, so that a table compares methods and not schedules.
"""

FOLDED = 1 / 40
"""Share of a rate that a network gets whose batch norms are folded beforehand: without norms nothing takes back a step
that was too long. Of ResNet-20 with weights of 2 bits the rates 0.04, 0.01 and 0.003 end at chance or NaN, 0.001
learns."""

CUT = {"quick": (1, 1_280), "smoke": (1, 128)}
"""The same of fine-tuning."""


@dataclass(frozen=True)
class QatRecipe:
    """How one network is fine-tuned through its quantizers."""

    policy: BitPolicy
    """Which tensor is quantized how."""
    config: TrainConfig
    """How it is trained."""
    n_train: int | None
    """Training images, class-balanced; None = all of the training split."""


def qat_recipe(method: str, w_bits: int, a_bits: int, profile: str, *, seed: int = 0) -> QatRecipe:
    """The recipe of a method at given bits, the same for every network.

    First and last layer have 8 bits, the image has 8, sums are quantized once after the addition (placement
    "academic": shortcuts read quantized tensors, as in QDrop's code and unlike LSQ's), batch norms are kept.

    Raises:
        ValueError: an unknown method or profile (the nearest name is given), or bits that the method cannot do.
    """
    check_profile(profile)
    check_known(method, METHODS, "QAT method")
    weight = parse_spec(METHODS[method][0], "policy.weight", base=Spec(bits=w_bits))
    act = parse_spec(METHODS[method][1], "policy.act", base=Spec(bits=a_bits))
    policy = BitPolicy(weight, act, first_last_bits=8, input_bits=8, placement="academic", bn="keep")
    lowest = min(w_bits, a_bits)
    if max(w_bits, a_bits) == 32:
        lowest = max(lowest, 2)  # one bit of one of them alone is about as hard as two of both
    config = BY_BITS[max((bits for bits in BY_BITS if bits <= lowest), default=min(BY_BITS))]
    if profile == "full":
        return QatRecipe(policy, replace(config, seed=seed), None)
    epochs, n_train = CUT[profile]
    return QatRecipe(policy, replace(config, epochs=epochs, warmup_epochs=0.0, seed=seed), n_train)


def act_of(method: str, bits: int, *, signed: bool) -> Quantizer | None:
    """The activation quantizer that ``method`` (a key of ``METHODS``) stands for; None for 32 bits.

    An unknown method raises ``ValueError`` naming the nearest.
    """
    check_known(method, METHODS, "QAT method")
    return make_quantizer(parse_spec(METHODS[method][1], method, base=Spec(bits=bits)), "act", method, signed=signed)


Lists = tuple[tuple[int, ...], tuple[int, ...]]

_TOYNET_ACTS = (32, *(8,) * 10, 32, 32)
BIT_LISTS: dict[str, dict[str, Lists]] = {
    "toynet": {
        "cfg-1": (_TOYNET_ACTS, (32, *(8,) * 10, 16, 16)),
        "cfg-1*": ((32, *(8,) * 11, 16), (8,) * 13),
        "cfg-2": (_TOYNET_ACTS, (32, 8, *(6,) * 6, *(8,) * 3, 16, 16)),
        "cfg-2*": ((32, *(8,) * 11, 16), (8, 8, *(6,) * 6, *(8,) * 5)),
        "cfg-3": ((32, 8, *(6,) * 9, 32, 32), (32, 8, *(6,) * 9, 16, 16)),
    },
    "mobilenetv2_seed": {
        "cfg-1*": ((32, *(8,) * 18, 16), (8,) * 20),
        "cfg-2*": ((32, *(8,) * 18, 16), (8, 8, *(6,) * 9, *(8,) * 9)),
    },
    "resnet20": {"cfg-1": ((8,) * 9, (8,) * 9), "cfg-2*": ((8,) * 9, (8, 8, 8, 6, 6, 6, 8, 8, 8))},
}
"""Network -> configuration -> (layer_abit, layer_wbit). cfg-1*: image in float, the classifier's input 16 bits, all
else 8."""


def find_lists(model: str, name: str) -> Lists:
    """(layer_abit, layer_wbit) of a configuration; ``ValueError`` names the nearest where there is none."""
    check_known(model, BIT_LISTS, "network with bit lists")
    check_known(name, BIT_LISTS[model], f"configuration of {model}")
    return BIT_LISTS[model][name]


def widths(model: str, lists: Sequence[str]) -> list[tuple[str, tuple[int, int]]]:
    """(configuration, fewest bits) of each of ``lists`` that ``model`` has.

    ``ValueError`` for a configuration that no network has, or a network that has none.
    """
    somewhere = {name for known in BIT_LISTS.values() for name in known}
    asked = [name for name in lists if name not in somewhere or name in BIT_LISTS.get(model, lists)]
    return [(name, least_bits(find_lists(model, name))) for name in asked]


def least_bits(lists: Lists) -> tuple[int, int]:
    """(weight bits, activation bits), the fewest that any layer of a configuration has."""
    acts, weights = lists
    return min(weights), min(acts)


def list_recipe(net: nn.Module, lists: Lists, method: str, profile: str, *, seed: int = 0) -> QatRecipe:
    """The recipe of a method with (layer_abit, layer_wbit) of ``net``, trained as its fewest bits ask for.

    Sums are quantized once after the addition (placement "academic"), batch norms are kept; the seed also quantizes the
    shortcut's output before the sum.

    Raises:
        ValueError: lists of a length that fits neither layers nor blocks, an unknown method or profile.
    """
    recipe = qat_recipe(method, *least_bits(lists), profile, seed=seed)
    weight, act = METHODS[method]
    policy = BitPolicy.from_lists(net, *lists, weight=weight, act=act, placement="academic")
    return replace(recipe, policy=policy)
