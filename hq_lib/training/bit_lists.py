"""Seed 001's layer-by-layer configurations as data: bits of each layer's input and weights, and a recipe for each.

Order of the entries: stem, blocks, header, classifier (``BitPolicy.from_lists``); 32 = float. From the source of
louvinci/PACT-Quantization; ResNet-20's lists speak of its blocks alone.
"""

import difflib
from collections.abc import Sequence

from torch import nn

from hq_lib.graph import BitPolicy
from hq_lib.training.qat_recipes import METHODS, QatRecipe, qat_recipe

Lists = tuple[tuple[int, ...], tuple[int, ...]]

_TOYNET_ACTS = (32, *(8,) * 10, 32, 32)
BIT_LISTS: dict[str, dict[str, Lists]] = {
    "toynet": {
        "cfg-1": (_TOYNET_ACTS, (32, *(8,) * 10, 16, 16)),
        "cfg-1*": ((32, *(8,) * 11, 16), (8,) * 13),
        "cfg-2": (_TOYNET_ACTS, (32, 8, *(6,) * 6, *(8,) * 3, 16, 16)),
        "cfg-3": ((32, 8, *(6,) * 9, 32, 32), (32, 8, *(6,) * 9, 16, 16)),
    },
    "mobilenetv2_seed": {"cfg-1*": ((32, *(8,) * 18, 16), (8,) * 20)},
    "resnet20": {"cfg-1": ((8,) * 9, (8,) * 9)},
}
"""Network -> configuration -> (layer_abit, layer_wbit). cfg-1*: image in float, the classifier's input 16 bits, all
else 8."""


def find_lists(model: str, name: str) -> Lists:
    """(layer_abit, layer_wbit) of a configuration; ``ValueError`` names the nearest where there is none."""
    if model not in BIT_LISTS:
        raise ValueError(f"no bit lists for {model!r}: there are some for {', '.join(BIT_LISTS)}")
    known = BIT_LISTS[model]
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{model} has no bit lists {name!r}: choose one of {', '.join(known)}{hint}")
    return known[name]


def least_bits(model: str, name: str) -> tuple[int, int]:
    """(weight bits, activation bits), the fewest that any layer of a configuration has."""
    acts, weights = find_lists(model, name)
    return min(weights), min(acts)


def widths(model: str, lists: Sequence[str], bits: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """(configuration, fewest bits) of each of ``lists`` that ``model`` has; ("", pair) for ``bits`` without lists.

    ``ValueError`` for a configuration that no network has, or a network that has none.
    """
    if not lists:
        return [("", pair) for pair in bits]
    somewhere = {name for known in BIT_LISTS.values() for name in known}
    asked = [name for name in lists if name not in somewhere or name in BIT_LISTS.get(model, lists)]
    return [(name, least_bits(model, name)) for name in asked]


def list_recipe(net: nn.Module, model: str, name: str, method: str, profile: str, *, seed: int = 0) -> QatRecipe:
    """The recipe of a method with seed 001's bits for each layer of ``net``, trained as its fewest bits ask for.

    Sums are quantized once after the addition (placement "academic"), batch norms are kept; the seed also quantizes the
    shortcut's output before the sum.

    Raises:
        ValueError: an unknown network, configuration, method or profile, or a method with options of its own.
    """
    layer_abit, layer_wbit = find_lists(model, name)
    recipe = qat_recipe(method, *least_bits(model, name), profile, seed=seed)
    weight, act = METHODS[method]
    if not (isinstance(weight, str) and isinstance(act, str)):
        raise ValueError(f"method {method!r} has options, which bit lists do not carry: take a plain one, as lsq_paper")
    policy = BitPolicy.from_lists(net, layer_abit, layer_wbit, weight=weight, act=act, placement="academic")
    return QatRecipe(policy, recipe.config, recipe.n_train)
