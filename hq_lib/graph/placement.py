"""Where activation quantizers sit, and what the graph alone says about each tensor they quantize.

    deploy    after the image, after each layer with its batch norm and ReLU or clip, after each add or product with
              its ReLU or clip, after average pools: every tensor that feeds an add is on a grid. Any other activation
              function has a quantizer before it and one after it: on integers it is a table from grid to grid.
              ONNX and accelerators execute this form.
    academic  as deploy, but an add is float: a layer whose output only feeds adds, and that as it is (the last
              convolution of a block, the downsampling convolution), has no quantizer of its own; one sits after the add
              with its activation function (BRECQ, QDrop). Lowered as one fused conv-add with a single rounding.

A batch norm behind a ReLU or clip is no part of the layer before it: that has a quantizer, and the norm one of its own.
Max-pools, reshapes, ReLUs of quantized tensors and concatenations add no quantizer: the grid passes through. The
quantized tensors that a concatenation joins share one quantizer, and so do a quantized tensor and what is clipped from
it (its ends must be levels). Masks and indices (booleans, integers) have none. The network's output stays in float,
but where the network reads it too: then it is returned on its grid.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import fx, nn

from hq_lib.graph.layers import QUANTIZER_SUFFIX
from hq_lib.graph.modes import module_path
from hq_lib.graph.operations import kinds, nonnegative, op_name
from hq_lib.graph.spec import PolicyError, QuantizeError, Spec

_SOURCES = {"input", "layer", "norm", "clip", "act", "add", "mul", "avgpool", "other"}
_FOLLOWERS = {"input": set[str](), "layer": {"norm", "relu", "clip"}}
_THROUGH = {"pass", "concat", "relu"}


@dataclass(frozen=True)
class Site:
    """One activation to be quantized: a tensor of the graph, its name for the policy, and its part in the network."""

    name: str
    """dotted name: of the layer or pool that makes it, of the block and operation ("layer1.0.add"), or "input" """

    node: str
    """fx node whose output is quantized: the last of layer -> batch norm -> ReLU or clip"""

    role: str
    """"image", "stem" (output of the first), "last" (input of one that feeds an output), "pool", "pool_last", "" """

    signed: bool
    """False where the graph proves the tensor >= 0 (after ReLU, ReLU6, sigmoid, or sums and means of such)"""

    group: str
    """node of the first member of a concatenation's shared grid; the site's own node where nothing is shared"""

    shape: tuple[int, ...] = ()
    """of one image's tensor, without the batch; () before the graph has seen an example"""

    @property
    def quantizer(self) -> str:
        """Name of the module that quantizes it."""
        return f"{self.group}{QUANTIZER_SUFFIX}"


def find_sites(gm: fx.GraphModule, *, placement: str = "deploy", in_float: Collection[str] = ()) -> list[Site]:
    """Return the activations of the float graph ``gm`` that get a quantizer, in execution order.

    Args:
        gm:        a traced float network; shapes are filled in if ``tracing.propagate`` has run.
        placement: "deploy" or "academic", see the module docstring.
        in_float:  names of those that a policy leaves in float, which share no grid.
    """
    kind_of = kinds(gm)
    tails = _tails(kind_of)
    if placement == "academic":
        told = {n: "same" if kind == "pass" and op_name(n, gm) == "identity" else kind for n, kind in kind_of.items()}
        only_added = [tail for tail in tails.values() if _readers(tail, told, {"same"}) - {"shape"} == {"add"}]
        tails = {s: tail for s, tail in tails.items() if kind_of[s] != "layer" or tail not in only_added}
    names, signs = _names(tails, kind_of), nonnegative(gm, kind_of)
    roles = _roles(tails, kind_of, through_pools=placement == "academic")
    groups = _groups(tails.values(), kind_of, {tail for source, tail in tails.items() if names[source] in in_float})
    signed = {tail: not signs[tail] for tail in tails.values()}
    shared = {groups[tail] for tail, is_signed in signed.items() if is_signed}
    return [
        Site(
            name=names[source],
            node=tail.name,
            role=roles.get(tail, ""),
            signed=groups[tail] in shared,
            group=groups[tail].name,
            shape=tuple(tail.meta["shape"][1:]) if "shape" in tail.meta else (),
        )
        for source, tail in tails.items()
    ]


def share_bits(sites: Iterable[Site], specs: dict[str, Spec], origins: Mapping[str, str]) -> None:
    """Give the tensors that share a grid one spec, in place: the one with the most bits among them.

    Args:
        origins: tensor -> key of the override that speaks of it.

    Raises:
        PolicyError: names the override of one of them that would give way to another.
    """
    by_group: dict[str, list[str]] = {}
    for site in sites:
        by_group.setdefault(site.group, []).append(f"act {site.name}")
    for tensors in by_group.values():
        widest = max(tensors, key=lambda tensor: (specs[tensor].bits, tensor in origins))
        if lost := [tensor for tensor in tensors if tensor in origins and specs[tensor] != specs[widest]]:
            names = [tensor.removeprefix("act ") for tensor in (lost[0], widest)]
            raise PolicyError(
                f"{origins[lost[0]]}: {names[0]!r} would have {specs[lost[0]]}, and shares its grid (joined, or one "
                f"clipped from the other) with {names[1]!r} of {specs[widest]}: give both the same, or one float"
            )
        specs.update(dict.fromkeys(tensors, specs[widest]))


def _tails(kind_of: dict[fx.Node, str]) -> dict[fx.Node, fx.Node]:
    """Return for each operation that makes new values the last node of its chain (batch norm, ReLU or clip)."""
    tails: dict[fx.Node, fx.Node] = {}
    absorbed: set[fx.Node] = set()
    for node, kind in kind_of.items():
        if kind not in _SOURCES or node in absorbed:
            continue
        chain = [node]
        followers = _FOLLOWERS.get(kind, {"relu", "clip"})
        while len(chain[-1].users) == 1 and kind_of[user := next(iter(chain[-1].users))] in followers:
            chain.append(user)
            followers = followers if kind_of[user] == "norm" else {"relu", "clip"}
        absorbed.update(chain)
        several = "shape" in next(iter(kind_of)).meta and "shape" not in chain[-1].meta  # tensors, each on its own grid
        real = chain[-1].meta.get("dtype", torch.float32).is_floating_point  # masks and indices are none
        if real and _readers(chain[-1], kind_of, _THROUGH) - {"output", "shape"} and not several:
            tails[node] = chain[-1]
    return tails


def _readers(node: fx.Node, kind_of: dict[fx.Node, str], through: set[str]) -> set[str]:
    """Return the kinds of the operations that read ``node``, seen through those of the kinds ``through``."""
    found: set[str] = set()
    for user in node.users:
        found |= _readers(user, kind_of, through) if kind_of[user] in through else {kind_of[user]}
    return found


def _names(tails: Iterable[fx.Node], kind_of: dict[fx.Node, str]) -> dict[fx.Node, str]:
    names: dict[fx.Node, str] = {}
    for node in tails:
        base = _base_name(node, kind_of[node])
        again = (f"{base}_{n}" for n in itertools.count(1))
        names[node] = next(name for name in itertools.chain([base], again) if name not in names.values())
    return names


def _base_name(node: fx.Node, kind: str) -> str:
    if kind == "input" or node.op == "call_module":
        return "input" if kind == "input" else str(node.target)
    spelled = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    operation = spelled.strip("_")
    if kind in ("add", "mul"):
        operation = "sub" if "sub" in spelled else kind
    path = module_path(node)
    return f"{path[-1][0]}.{operation}" if path else operation


def _roles(tails: dict[fx.Node, fx.Node], kind_of: dict[fx.Node, str], *, through_pools: bool) -> dict[fx.Node, str]:
    layers = [node for node, kind in kind_of.items() if kind == "layer"]
    if not layers:
        raise QuantizeError("the network has no conv2d, linear or convtranspose2d layer: nothing to quantize")
    roles = {tail: "pool" for source, tail in tails.items() if kind_of[source] == "avgpool"}
    if layers[0] in tails:
        roles[tails[layers[0]]] = "stem"
    sites = set(tails.values())
    for last in last_layers(kind_of):
        node: fx.Node | None = last.all_input_nodes[0]
        while node is not None:
            if node in sites:
                roles[node] = "pool_last" if roles.get(node) in ("pool", "pool_last") else "last"
                if not (through_pools and roles[node] == "pool_last"):
                    break
            through = kind_of[node] in (*_THROUGH, "avgpool") and node.all_input_nodes
            node = node.all_input_nodes[0] if through else None
    return roles | {tail: "image" for tail in sites if kind_of[tail] == "input"}


def last_layers(kind_of: dict[fx.Node, str]) -> list[fx.Node]:
    """Return the layers that feed an output, in execution order: the last one of each of its tensors.

    Seen through whatever is no layer; where tensors are added or multiplied, through the one that is made last.
    """
    order = list(kind_of)
    found: set[fx.Node] = set()
    waiting = list(order[-1].all_input_nodes)
    while waiting:
        node = waiting.pop()
        if kind_of[node] == "layer":
            found.add(node)
            continue
        tensors = [n for n in node.all_input_nodes if kind_of[n] not in ("shape", "param")]
        if kind_of[node] in ("add", "mul"):
            tensors = [max(tensors, key=order.index)]
        waiting += tensors
    return sorted(found, key=order.index)


def layer_types(gm: fx.GraphModule) -> dict[str, frozenset[str]]:
    """Return for each layer by name, in execution order, which of ``spec.LAYER_TYPES`` it is."""
    kind_of = kinds(gm)
    layers = [node for node, kind in kind_of.items() if kind == "layer"]
    last = {str(node.target) for node in last_layers(kind_of)}
    types: dict[str, frozenset[str]] = {}
    for node in layers:
        layer: Any = gm.get_submodule(str(node.target))
        depthwise = getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels
        said = {"first": node is layers[0], "last": str(node.target) in last, "depthwise": depthwise}
        said["linear"] = isinstance(layer, nn.Linear)
        before = types.get(str(node.target), frozenset())
        types[str(node.target)] = before | {name for name, holds in said.items() if holds}
    return types


def _groups(tails: Iterable[fx.Node], kind_of: dict[fx.Node, str], in_float: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return for each quantized tensor the first of those that share one grid with it: joined, or clipped from it."""
    order = list(tails)
    shared = DisjointSet(order)
    for node, kind in kind_of.items():
        if kind == "concat" or (kind == "clip" and node in order):
            sharing = {*_grid_sources(node, order, kind_of), *([node] if kind == "clip" else [])} - in_float
            for tail in sharing:
                shared.merge(next(iter(sharing)), tail)
    first: dict[fx.Node, fx.Node] = {}
    return {tail: first.setdefault(shared[tail], tail) for tail in order}


def _grid_sources(node: fx.Node, sites: Iterable[fx.Node], kind_of: dict[fx.Node, str]) -> set[fx.Node]:
    """Return the quantized tensors whose grids reach ``node`` unchanged."""
    found: set[fx.Node] = set()
    for source in node.all_input_nodes:
        if source in sites:
            found.add(source)
        elif kind_of[source] in _THROUGH:
            found |= _grid_sources(source, sites, kind_of)
    return found
