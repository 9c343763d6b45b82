"""Seed 001's layer-by-layer configurations as data: bits of each layer's input and weights, and a recipe for each.

Order of the entries: stem, blocks, header, classifier (``BitPolicy.from_lists``); 32 = float. From the source of
louvinci/PACT-Quantization; ResNet-20's lists speak of its blocks alone. cfg-2* is named there and never measured: its
lists here are ours, cfg-2's six bits for the weights of the middle stages, all else as in cfg-1*.
"""

from collections.abc import Sequence

from torch import nn

from hq_lib.graph import BitPolicy
from hq_lib.results.hints import check_known
from hq_lib.training.qat_recipes import METHODS, QatRecipe, qat_recipe

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


def widths(model: str, lists: Sequence[str], bits: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """(configuration, fewest bits) of each of ``lists`` that ``model`` has; ("", pair) for ``bits`` without lists.

    ``ValueError`` for a configuration that no network has, or a network that has none.
    """
    if not lists:
        return [("", pair) for pair in bits]
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
    return QatRecipe(policy, recipe.config, recipe.n_train)
