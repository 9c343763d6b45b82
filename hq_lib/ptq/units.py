"""The regions of a quantized graph that are reconstructed one at a time, and the switch between its two nets."""

from dataclasses import replace

from torch import fx, nn

from hq_lib.graph import Block, extract_block, kinds, set_quantization

_TAIL = ("norm", "relu", "clip", "act", "quantizer")


Unit = tuple[Block, Block | None]
"""What is reconstructed, and what leads there from the input of the block it is in; None where that is its own."""


def units(qnet: fx.GraphModule, block: Block, *, unit: str) -> list[Unit]:
    """Return what is reconstructed inside ``block``: the block itself, or each layer with its activation function.

    A layer's region ends with the batch norm, activation function and quantizer that alone read it: an add ends it.
    """
    if unit == "block":
        return [(block, None)]
    kind_of = {node: kind for node, kind in kinds(qnet).items() if node.name in block.nodes}
    first_calls = {str(node.target): node for node, kind in reversed(kind_of.items()) if kind == "layer"}
    return [_layer_unit(block, name, first_calls[name], kind_of) for name in block.layers]


def _layer_unit(block: Block, name: str, node: fx.Node, kind_of: dict[fx.Node, str]) -> Unit:
    source, chain = node.all_input_nodes[0].name, [node]
    while len(chain[-1].users) == 1 and kind_of.get(user := next(iter(chain[-1].users))) in _TAIL:
        chain.append(user)
    inside = tuple(n.name for n in chain)
    region = Block(name, source, inside[-1], inside, (name,), False)
    if source == block.input:
        return region, None
    before = block.nodes[: block.nodes.index(source) + 1]
    return (region, replace(block, name=f"lead of {name}", output=source, nodes=before))


def cut(qnet: fx.GraphModule, region: Block) -> fx.GraphModule:
    """Return ``region`` as a graph in eval mode that shares ``qnet``'s layers and quantizers, without idle nodes."""
    graph = extract_block(qnet, region)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph.eval()


def as_float(net: nn.Module) -> set_quantization:
    """Switch every quantizer of ``net`` off inside: it computes what its float net computes."""
    return set_quantization(net, weights=False, acts=False)
