"""Bit policies of the seeds: the hybrid QAT/PTQ rule (000) and the per-layer bit lists (001)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from hq_lib.graph.blocks import owner_of, scopes_with_joins
from hq_lib.graph.ops import kinds
from hq_lib.graph.placement import Site, find_sites
from hq_lib.graph.policy import BitPolicy, HybridRule
from hq_lib.graph.spec import HYBRID, PolicyError
from hq_lib.tracing import trace


def hybrid(
    w_bits: int | Mapping[str, int],
    a_bits: int | Mapping[str, int],
    *,
    qat: str | tuple[str, str] = "dsq",
    ptq: str | tuple[str, str] = "minmax",
    boundary: int = 4,
    first_last_bits: int | None = None,
    **settings: Any,
) -> BitPolicy:
    """Return the policy that trains tensors below ``boundary`` bits and calibrates the others (seed 000).

    The method follows from the bits of each tensor, so every later change of bits (a role, an override) keeps to the
    rule. The first convolution and the classifier take part, unless ``first_last_bits`` says otherwise.

    Args:
        w_bits:          weights, one number, or patterns -> bits with "*" as the default (1..16, 32 = float).
        a_bits:          activations, likewise.
        qat, ptq:        the two methods; a pair means (weight, activation).
        boundary:        bits from which on the tensor is left to PTQ (the seed's text: 4; its last configuration: 5).
        first_last_bits: see ``BitPolicy``; here None, so that the rule covers these layers too.
        settings:        any other field of ``BitPolicy``.

    Raises:
        PolicyError: a mapping without "*", bits or methods that do not exist.
    """
    rule = HybridRule(_pair(qat), _pair(ptq), boundary)
    overrides: dict[str, dict[str, Any]] = {}
    defaults = {kind: _default(bits, kind, overrides) for kind, bits in (("weight", w_bits), ("act", a_bits))}
    for pattern, entry in settings.pop("overrides", {}).items():
        entry = entry if isinstance(entry, Mapping) else {"both": entry}
        overrides[pattern] = {**overrides.get(pattern, {}), **entry}
    specs = {kind: {"method": HYBRID, "bits": bits} for kind, bits in defaults.items()}
    return BitPolicy(**specs, overrides=overrides, first_last_bits=first_last_bits, hybrid_rule=rule, **settings)


def _pair(method: str | tuple[str, str]) -> tuple[str, str]:
    return (method, method) if isinstance(method, str) else (method[0], method[1])


def _default(bits: int | Mapping[str, int], kind: str, overrides: dict[str, dict[str, Any]]) -> int:
    if not isinstance(bits, Mapping):
        return bits
    if "*" not in bits:
        raise PolicyError(f"hybrid {kind} bits: the mapping needs a default under '*'")
    for pattern, value in bits.items():
        if pattern != "*":
            overrides.setdefault(pattern, {})[kind] = value
    return bits["*"]


def from_lists(
    net: nn.Module,
    layer_abit: Sequence[int],
    layer_wbit: Sequence[int],
    *,
    weight: str = "dorefa_hw",
    act: str = "mpact",
    **settings: Any,
) -> BitPolicy:
    """Return seed 001's bit lists as a policy for ``net``.

    Entry i speaks of layer i in the order stem, blocks, header, classifier: ``layer_wbit[i]`` of its weights,
    ``layer_abit[i]`` of its *input* (entry 0: the image). Tensors inside block i, its shortcut's output included, use
    entry i; its output uses the entry of the layer that reads it, so pools use the classifier's. A list with the
    blocks alone (ResNet-20's 9) leaves stem and activations around it in float and the classifier's weights at 16,
    as the seed hard-coded. 32 = float.

    Args:
        net:        the float net: 13 entries for ToyNet, 20 for MobileNetV2, 9 or 11 for ResNet-20.
        layer_abit: bits of each layer's input.
        layer_wbit: bits of each layer's weights.
        weight:     method of all weights.
        act:        method of all activations but the image.
        settings:   ``placement``, ``bn``: as in ``BitPolicy``.

    Raises:
        PolicyError: the lists' length fits neither the layers nor the blocks of ``net``.
    """
    gm = trace(net)
    groups = _groups(gm)
    a_bits, w_bits = _padded(layer_abit, layer_wbit, groups)
    sites = find_sites(gm, placement=settings.get("placement", "deploy"))
    overrides: dict[str, dict[str, int]] = {}
    for layer, group in groups.items():
        overrides.setdefault(layer, {})["weight"] = w_bits[group]
    for site, place in _entries(gm, [s for s in sites if s.role != "image"], groups).items():
        overrides.setdefault(site, {})["act"] = a_bits[place]
    settings |= {"weight": f"{weight}:8", "act": f"{act}:8", "first_last_bits": None, "input_bits": a_bits[0]}
    return BitPolicy(overrides=overrides, **settings)


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


def _padded(a: Sequence[int], w: Sequence[int], groups: Mapping[str, int]) -> tuple[list[int], list[int]]:
    n_layers = max(groups.values()) + 1
    if len(a) != len(w):
        raise PolicyError(f"layer_abit has {len(a)} entries and layer_wbit {len(w)}: one of each per layer is needed")
    if len(a) == n_layers:
        return list(a), list(w)
    if len(a) == n_layers - 2:
        return [32, *a, 32], [32, *w, 16]
    raise PolicyError(
        f"layer_abit and layer_wbit have {len(a)} entries; this net has {n_layers} layers (stem, blocks, header, "
        f"classifier), so {n_layers} are needed, or {n_layers - 2} for the blocks alone"
    )


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
