"""The regions of a quantized graph that are reconstructed one at a time, and how the error grows along them."""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from hq_lib.graph import Block, QuantizeError, blocks, extract_block, kinds, set_quantization, weight_layers
from hq_lib.graph.state import put
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.quantizers import AdaRound, Quantizer

ON_GRID = ("grid", "adaround", "minmax", "aciq", "lsq", "lsq_plus")
"""Methods whose grid is in the weight's own units, so that floor and ceil of the weight are its levels."""
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


def install(body: nn.Module, name: str) -> None:
    """Let an ``AdaRound`` quantize the layer ``name`` of ``body`` on the grid it has, unless one does, or it is float.

    Raises:
        QuantizeError: names the layer whose method has no grid in the weight's own units (DoReFa's tanh, DSQ's ends),
                       or no level at 0 (1 bit).
    """
    layer = weight_layers(body)[name]
    old = layer.weight_quantizer
    if not isinstance(old, Quantizer) or isinstance(old, AdaRound):
        return
    grid = old.integers(layer.weight)[1]
    if old.method not in ON_GRID or grid.step != 1:
        raise QuantizeError(
            f"layer {name!r}: {old.method}:{old.bits} has no level at 0, or none at floor and ceil of its weight: make "
            f"the policy with weight='minmax' of 2 bits or more, or leave the rounding alone (learn_rounding=False)"
        )
    put(body, name, AdaRound(layer.weight, grid, bits=old.bits, axis=old.axis))


@torch.no_grad()
def block_errors(qnet: fx.GraphModule, reference: fx.GraphModule, images: Tensor) -> list[tuple[str, float]]:
    """Return (dotted name, relative squared error behind it) of each block of ``qnet``, in execution order.

    sum (x_q - x_fp)^2 / sum x_fp^2 at its output, everything before it quantized; 0 where nothing is.

    Args:
        qnet:      quantized, its quantizers as they are switched.
        reference: a net with the same blocks whose float values are the truth: ``qnet`` itself, or its untouched copy
                   where a method has changed biases.
        images:    (N, C, H, W), normalised; one batch.

    Raises:
        ValueError: the two have other blocks.
    """
    ours, theirs = blocks(qnet), blocks(reference)
    if [block.name for block in ours] != [block.name for block in theirs]:
        raise ValueError("the two nets have other blocks: make both from one float net with one policy")
    found, x_q = [], images.to(device_of(qnet))
    x_fp = x_q
    with eval_mode(qnet), eval_mode(reference):
        for block, like in zip(ours, theirs, strict=True):
            x_q, graph = cut(qnet, block)(x_q), cut(reference, like)
            with as_float(graph):
                x_fp = graph(x_fp)
            error = (x_q - x_fp).double().square().sum() / x_fp.double().square().sum().clamp(min=1e-30)
            found.append((block.name, float(error)))
    return found
