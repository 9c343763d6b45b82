"""Where a network can be cut in two, and its two halves: as float graphs, or the first one as an integer record.

A cut lies between two blocks (``graph.blocks``): there one tensor is all that later layers read, so it is all that has
to be sent. Cut 0, ``image``, lies before the first layer: nothing runs on the edge and the image itself is sent.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from hq_lib.graph import Block, QuantizeError, blocks, extract_block
from hq_lib.graph.tracing import eval_mode, trace
from hq_lib.integer import IntegerModel, check
from hq_lib.integer.lowering import tensor_names

IMAGE = "image"


@dataclass(frozen=True)
class Cut:
    """A place where one tensor joins the two halves of a network."""

    index: int
    """How many blocks run on the edge; 0 = none."""
    name: str
    """Dotted path of the last block on the edge; ``image`` where there is none."""
    node: str
    """Name of the float graph's node whose value is sent."""
    shape: tuple[int, ...]
    """Shape of that value for one image."""
    layers: tuple[str, ...]
    """Dotted paths of the layers on the edge, in execution order."""

    @property
    def n_values(self) -> int:
        """Numbers sent per image."""
        return int(np.prod(self.shape))


def find_cuts(net: nn.Module, example: Tensor) -> list[Cut]:
    """The cuts of ``net`` in execution order: before the first block, and after every block but the last.

    Args:
        net:     float network, any that ``graph.blocks`` accepts; it is not changed.
        example: (B, C, H, W), one image is enough; gives the shapes.

    Raises:
        QuantizeError: the net has several inputs or outputs, or no layer.
    """
    gm = trace(net)
    found, value, layers = blocks(gm), example, ()
    cuts = [Cut(0, IMAGE, found[0].input, tuple(example.shape[1:]), ())]
    with eval_mode(gm), torch.no_grad():
        for index, block in enumerate(found[:-1], start=1):
            value, layers = extract_block(gm, block)(value), (*layers, *block.layers)
            cuts.append(Cut(index, block.name, block.output, tuple(value.shape[1:]), layers))
    return cuts


def split_at(net: nn.Module, cut: Cut) -> tuple[nn.Module, nn.Module]:
    """The two halves of ``net``, (edge, cloud), as graphs: cloud(edge(x)) is net(x), bit for bit.

    They share ``net``'s layers: what puts ``net`` in eval mode, or trains it, does so to its halves. A wire delivers
    contiguous tensors; PyTorch sums channels-last ones in another order, so give ``net`` contiguous images to compare.

    Raises:
        QuantizeError: ``cut`` is not one of this network.
    """
    gm = trace(net)
    found = blocks(gm)
    node = found[cut.index - 1].output if 0 < cut.index < len(found) else found[0].input
    if cut.index not in range(len(found)) or node != cut.node:
        raise QuantizeError(f"cut {cut.index} ({cut.name!r}) is not of this network: find_cuts it again")
    edge = extract_block(gm, _joined(found[: cut.index])) if cut.index else nn.Identity()
    return edge, extract_block(gm, _joined(found[cut.index :]))


def _joined(parts: list[Block]) -> Block:
    """Several neighbouring blocks as one."""
    first, last = parts[0], parts[-1]
    nodes = tuple(node for part in parts for node in part.nodes)
    return replace(first, output=last.output, nodes=nodes, layers=tuple(l for part in parts for l in part.layers))


def integer_edge(qnet: fx.GraphModule, record: IntegerModel, cut: Cut) -> IntegerModel:
    """The edge half of an integer network: the operations up to the cut; its output is the tensor that is sent.

    Args:
        qnet:   the quantized graph; ``record`` was lowered from it.
        record: the whole network in integers.
        cut:    from ``find_cuts`` of the float network; not the image.

    Raises:
        QuantizeError: no layer lies before the cut, or the tensor there has no quantizer, so that it is no integers.
    """
    outputs = {block.name: block.output for block in blocks(qnet)}
    tensor = tensor_names(qnet).get(outputs.get(cut.name, ""), "")
    if tensor not in record.tensors:
        known = ", ".join(name for name, node in outputs.items() if tensor_names(qnet).get(node) in record.tensors)
        raise QuantizeError(f"after {cut.name!r} there is no tensor of integers in this record; there is after {known}")
    needed = {tensor}
    for op in reversed(record.ops):
        needed |= set(op.inputs) if op.output in needed else set()
    ops = tuple(op for op in record.ops if op.output in needed)
    tensors = {name: spec for name, spec in record.tensors.items() if name in needed}
    return check(replace(record, ops=ops, tensors=tensors, output=tensor))
