"""Seed 001's bit lists: which entry speaks of which layer and activation of a network."""

from collections.abc import Mapping, Sequence

from torch import fx, nn

from hq_lib.graph.blocks import owner_of, scopes_with_joins
from hq_lib.graph.ops import kinds
from hq_lib.graph.placement import Site, find_sites
from hq_lib.graph.spec import PolicyError
from hq_lib.graph.tracing import trace


def list_bits(
    net: nn.Module, layer_abit: Sequence[int], layer_wbit: Sequence[int], *, placement: str
) -> tuple[int, dict[str, dict[str, int]]]:
    """Return (bits of the image, ``BitPolicy.overrides``) of seed 001's lists; see ``BitPolicy.from_lists``."""
    gm = trace(net)
    groups = _groups(gm)
    n_layers = max(groups.values()) + 1
    a_bits = _padded("layer_abit", layer_abit, n_layers, last=32)
    w_bits = _padded("layer_wbit", layer_wbit, n_layers, last=16)
    overrides: dict[str, dict[str, int]] = {}
    for layer, group in groups.items():
        overrides.setdefault(layer, {})["weight"] = w_bits[group]
    sites = [site for site in find_sites(gm, placement=placement) if site.role != "image"]
    for site, place in _entries(gm, sites, groups).items():
        overrides.setdefault(site, {})["act"] = a_bits[place]
    return a_bits[0], overrides


def _groups(gm: fx.GraphModule) -> dict[str, int]:
    """Return for each layer its place in the lists: one place per block (a module that adds), one per other layer."""
    scopes = scopes_with_joins(gm)
    places: dict[str, int] = {}
    groups: dict[str, int] = {}
    for node, kind in kinds(gm).items():
        if kind == "layer":
            owner = owner_of(node, scopes) or str(node.target)
            groups[str(node.target)] = places.setdefault(owner, len(places))
    return groups


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


def _places_read(gm: fx.GraphModule, groups: Mapping[str, int]) -> dict[fx.Node, set[int]]:
    """Return for each node the places of the layers that read it, directly or through what is not a layer."""
    kind_of = kinds(gm)
    read: dict[fx.Node, set[int]] = {}
    for node in reversed(list(kind_of)):
        read[node] = set()
        for user in node.users:
            read[node] |= {groups[str(user.target)]} if kind_of[user] == "layer" else read[user]
    return read


def _entries(gm: fx.GraphModule, sites: Sequence[Site], groups: Mapping[str, int]) -> dict[str, int]:
    """Return for each activation its index in ``layer_abit``: its block's, or the next reader's where it leaves one."""
    scopes, read = scopes_with_joins(gm), _places_read(gm, groups)
    nodes = {node.name: node for node in gm.graph.nodes}
    entries = {}
    for site in sites:
        node = nodes[site.node]
        owner = owner_of(node, scopes)
        inside = [place for layer, place in groups.items() if owner and layer.startswith(f"{owner}.")]
        own = inside[0] if inside else groups.get(site.name, -1)
        leaves = owner is None or any(owner_of(user, scopes) != owner for user in node.users)
        later = [place for place in read[node] if place > own]
        entries[site.name] = min(later, default=own) if leaves else own
    return entries
