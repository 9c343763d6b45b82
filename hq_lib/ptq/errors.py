"""How the error of a quantized network grows from block to block."""

import torch
from torch import Tensor, fx

from hq_lib.graph import blocks
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.ptq.units import as_float, cut


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
