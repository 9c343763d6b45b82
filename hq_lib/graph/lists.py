"""Seed 001's bit lists: which entry speaks of which layer and activation of a network."""

from collections.abc import Sequence

from torch import fx, nn

from hq_lib.graph.blocks import owners
from hq_lib.graph.ops import kinds
from hq_lib.graph.placement import find_sites
from hq_lib.graph.spec import PolicyError
from hq_lib.graph.tracing import trace


def list_bits(
    net: nn.Module, layer_abit: Sequence[int], layer_wbit: Sequence[int], *, placement: str
) -> tuple[int, dict[str, dict[str, int]]]:
    """Return (bits of the image, ``BitPolicy.overrides``) of seed 001's lists; see ``BitPolicy.from_lists``."""
    gm = trace(net)
    kind_of, owner_of = kinds(gm), owners(gm)
    places: dict[str | None, int] = {}  # one per block (a module that adds), one per other layer
    groups: dict[str, int] = {}
    for node, kind in kind_of.items():
        if kind == "layer":
            groups[str(node.target)] = places.setdefault(owner_of[node] or str(node.target), len(places))
    a_bits = _padded("layer_abit", layer_abit, len(places), last=32)
    w_bits = _padded("layer_wbit", layer_wbit, len(places), last=16)
    overrides = {layer: {"weight": w_bits[group]} for layer, group in groups.items()}
    read: dict[fx.Node, set[int]] = {}  # places of the layers that read a node, directly or through what is no layer
    for node in reversed(list(kind_of)):
        by_user = ({groups[str(user.target)]} if kind_of[user] == "layer" else read[user] for user in node.users)
        read[node] = set[int]().union(*by_user)
    nodes = {node.name: node for node in gm.graph.nodes}
    for site in find_sites(gm, placement=placement):
        node, owner = nodes[site.node], owner_of[nodes[site.node]]
        own = places.get(owner, groups.get(site.name, -1))  # its block's, or the next reader's where it leaves one
        leaves = owner is None or any(owner_of[user] != owner for user in node.users)
        place = min((place for place in read[node] if place > own), default=own) if leaves else own
        if site.role != "image":
            overrides.setdefault(site.name, {})["act"] = a_bits[place]
    return a_bits[0], overrides


def _padded(name: str, bits: Sequence[int], n_layers: int, *, last: int) -> list[int]:
    """Return ``bits`` as they are, or between a stem in float and a classifier of ``last`` bits, as the seed has it."""
    if len(bits) == n_layers - 2:
        return [32, *bits, last]
    if len(bits) != n_layers:
        raise PolicyError(
            f"{name} has {len(bits)} entries; this net has {n_layers} layers (stem, blocks, header, classifier), so "
            f"{n_layers} are needed, or {n_layers - 2} for the blocks alone"
        )
    return list(bits)
