"""Blocks of a network: regions of its graph between single-tensor cut points; seed 001's bit lists speak of them.

A cut point is a node whose output is the only tensor alive: all that follows depends on what came before through this
one tensor alone. Between two neighbouring cut points lies the least region that can be computed, and reconstructed
(BRECQ, arXiv:2102.05426, section 3.2), by itself. Regions are joined into blocks by three rules: batch norms,
activation functions and their quantizers belong to what they follow; pools, reshapes and dropout to what they precede;
regions inside one module of a class that adds or concatenates (a BasicBlock, an inverted residual, with stride or
without) are one block. No class is known by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from hq_lib.graph.modes import module_path
from hq_lib.graph.operations import kinds
from hq_lib.graph.placement import find_sites
from hq_lib.graph.spec import PolicyError, QuantizeError
from hq_lib.graph.tracing import trace

Owners = dict[fx.Node, str | None]


@dataclass(frozen=True)
class Block:
    """A region of a graph with one tensor in and one out; names only, so that it also fits a copy of the graph."""

    name: str
    """dotted path of the block's module, or of its first layer"""

    input: str
    """name of the node whose value enters (it belongs to the block before, or is the image)"""

    output: str
    """name of the node whose value leaves"""

    nodes: tuple[str, ...]
    """names of all nodes, in execution order"""

    layers: tuple[str, ...]
    """dotted paths of the conv, transposed conv and linear layers, in execution order"""

    residual: bool
    """whether branches meet inside (an add, a product of two tensors, or a concatenation)"""


def blocks(net: nn.Module) -> list[Block]:
    """Return the blocks of ``net`` in execution order: together they are the whole network, each feeding the next.

    Args:
        net: float or quantized; a module that is no graph yet is traced. A quantized net has the blocks of its float
            net, by name and layers, with the activation quantizers inside.

    Raises:
        QuantizeError: a net with several inputs or outputs, or without any layer.
    """
    gm = net if isinstance(net, fx.GraphModule) else trace(net)
    kind_of = kinds(gm)
    image = [node for node, kind in kind_of.items() if kind == "input"]
    n_outputs = len(next(reversed(kind_of)).all_input_nodes)
    if len(image) != 1 or n_outputs != 1 or "layer" not in kind_of.values():
        raise QuantizeError(
            f"blocks need one input tensor, one output tensor and at least one layer; this net has {len(image)} inputs "
            f"and {n_outputs} outputs"
        )
    owner_of = _owners(gm)
    joined = _join(_regions(kind_of), kind_of, owner_of)
    inputs = [image[0], *(region[-1] for region in joined[:-1])]
    found = []
    for region, before in zip(joined, inputs, strict=True):
        layers = [node for node in region if kind_of[node] == "layer"]
        names = tuple(str(node.target) for node in layers)
        name = next((owner for node in layers if (owner := owner_of[node])), names[0])
        residual = any(kind_of[node] in ("add", "mul", "concat") for node in region)
        found.append(Block(name, before.name, region[-1].name, tuple(node.name for node in region), names, residual))
    return found


def extract_block(gm: fx.GraphModule, block: Block) -> fx.GraphModule:
    """Return ``block`` as a graph of one input and one output; its layers and quantizers are ``gm``'s own, not copies.

    Training the extracted block therefore trains ``gm``.

    Raises:
        QuantizeError: names the node of ``gm`` that the block lacks or that enters it from elsewhere.
    """
    by_name = {node.name: node for node in gm.graph.nodes}
    if missing := [name for name in (block.input, *block.nodes) if name not in by_name]:
        raise QuantizeError(f"block {block.name!r} is not of this graph: it has no node {missing[0]!r}")
    graph = fx.Graph()
    copies = {by_name[block.input]: graph.placeholder("x")}
    nodes = [by_name[name] for name in block.nodes]
    constants = [n for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and n not in nodes]
    for node in [*dict.fromkeys(constants), *nodes]:
        if strange := [n.name for n in node.all_input_nodes if n not in copies]:
            raise QuantizeError(
                f"block {block.name!r} cannot be cut out: node {node.name!r} reads {strange[0]!r} from before it "
                f"(a shape taken from another tensor? use flatten, or -1 for the batch)"
            )
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[by_name[block.output]])
    return fx.GraphModule(gm, graph, class_name="Block")


def _regions(kind_of: dict[fx.Node, str]) -> list[list[fx.Node]]:
    """Return the nodes after the image, split behind every node whose output is the only live tensor."""
    tensors = [node for node, kind in kind_of.items() if kind not in ("shape", "param", "output")]
    position = {node: i for i, node in enumerate(kind_of)}
    last_read = {node: max((position[user] for user in node.users), default=-1) for node in tensors}
    regions: list[list[fx.Node]] = [[]]
    live: set[fx.Node] = set()
    for i, (node, kind) in enumerate(kind_of.items()):
        if kind == "output":
            break
        if kind != "input":
            regions[-1].append(node)
        live = {n for n in live if last_read[n] > i} | ({node} if last_read.get(node, -1) > i else set())
        if live == {node} and regions[-1]:
            regions.append([])
    return regions[:-1] if not regions[-1] else regions


def _join(regions: list[list[fx.Node]], kind_of: dict[fx.Node, str], owner_of: Owners) -> list[list[fx.Node]]:
    joined: list[list[fx.Node]] = []
    ahead: list[fx.Node] = []  # pools and reshapes that wait for the layer they precede
    last_owner: str | None = None
    for region in regions:
        compute = [node for node in region if kind_of[node] not in ("shape", "param")]
        several = {owner_of[node] for node in compute}
        owner = several.pop() if len(several) == 1 else None
        region_kinds = {kind_of[node] for node in compute}
        follows = not ahead and region_kinds <= {"norm", "relu", "clip", "act", "quantizer", "other", "mul"}
        if joined and (follows or (owner is not None and owner == last_owner)):
            joined[-1] += ahead + region
            ahead = []
        elif "layer" in region_kinds:
            joined.append(ahead + region)
            ahead, last_owner = [], owner
        else:
            ahead += region
    joined[-1] += ahead
    return joined


def _owners(gm: fx.GraphModule) -> Owners:
    """Return for each node the outermost module it was made in whose class somewhere adds or concatenates.

    That is the path of a residual block, whatever its class; None outside of such.
    """
    kind_of = kinds(gm)
    joining = {
        path[-1][1]
        for node, kind in kind_of.items()
        if kind in ("add", "concat") and (path := module_path(node)) and path[-1][1] != torch.typename(nn.Sequential)
    }
    return {node: next((path for path, kind in module_path(node) if kind in joining), None) for node in kind_of}


def list_bits(
    net: nn.Module, layer_abit: Sequence[int], layer_wbit: Sequence[int], *, placement: str
) -> tuple[int, dict[str, dict[str, int]]]:
    """Return (bits of the image, ``BitPolicy.overrides``) of seed 001's lists; see ``BitPolicy.from_lists``."""
    gm = trace(net)
    kind_of, owner_of = kinds(gm), _owners(gm)
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
