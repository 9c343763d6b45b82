"""``round_biases``: let the fake-quantized network have the biases that the integer one can hold."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx, nn

from hq_lib.graph import weight_layers
from hq_lib.integer.geometry import LowerError
from hq_lib.integer.lowering import lower


@torch.no_grad()
def round_biases(qnet: fx.GraphModule) -> dict[str, float]:
    """Round the biases of ``qnet`` in place to those of ``lower(qnet)``; returns the largest change of each layer.

    An integer layer adds ``round(b / (s_x s_w))`` to its accumulator (Jacob et al. 2018, arXiv:1712.05877, section
    2.4), at most half an accumulator step away from b. In a 4-bit ResNet-20 this moves some 0.03 % of a layer's outputs
    by one step, and such steps grow on their way through the network. Behind this call the fake-quantized network makes
    the same steps: what still differs is float32 arithmetic on values half-way between two steps. The integer network
    made from ``qnet`` stays the same.

    Args:
        qnet: quantized, its grids fitted, each batch norm folded or absent.

    Returns:
        Layer -> largest |change| of its bias, real units; layers without a bias are left out.

    Raises:
        LowerError: ``qnet`` cannot be lowered, a layer runs twice on different grids, or a batch norm behind a layer
                    was not folded (its shift is part of the integer bias).
    """
    imodel, layers = lower(qnet), weight_layers(qnet)
    if norms := [name for name, m in qnet.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        raise LowerError(f"batch norm {norms[0]!r} is not folded: make the network with bn='fold', then round biases")
    changes: dict[str, float] = {}
    for op in imodel.layers():
        layer = layers.get(op.name)
        if layer is None:
            raise LowerError(f"layer {op.name!r} runs more than once: give each call a layer of its own")
        if layer.bias is None:
            continue
        rounded = torch.from_numpy(op.bias * op.acc_scale.astype(np.float64)).to(layer.bias)
        changes[op.name] = float((rounded - layer.bias).abs().max())
        layer.bias.copy_(rounded)
    return changes
