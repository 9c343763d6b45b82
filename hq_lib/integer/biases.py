"""``round_biases``: let the fake-quantized network have the biases that the integer one can hold."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx

from hq_lib.data import DataSpec
from hq_lib.graph import kinds, op_name
from hq_lib.integer.geometry import LowerError
from hq_lib.integer.lowering import SAME, lower
from hq_lib.integer.products import norm_gain


@torch.no_grad()
def round_biases(qnet: fx.GraphModule, *, images: DataSpec | None = None) -> dict[str, float]:
    """Round the biases of ``qnet`` in place to those of ``lower(qnet)``; returns the largest change of each layer.

    An integer layer adds ``round(b / (s_x s_w))`` to its accumulator (Jacob et al. 2018, arXiv:1712.05877, section
    2.4), at most half an accumulator step away from b. In a 4-bit ResNet-20 this moves some 0.03 % of a layer's outputs
    by one step, and such steps grow on their way through the network. Behind this call the fake-quantized network makes
    the same steps: what still differs is float32 arithmetic on values half-way between two steps. The integer network
    made from ``qnet`` stays the same. Batch norms behind a layer are part of its bias: the last one's shift is rounded.

    Args:
        qnet:   quantized, its grids fitted, in any batch-norm mode.
        images: as in ``lower``, for a network whose image has no quantizer.

    Returns:
        Layer -> largest |change| of its bias (or of its norm's shift), real units; layers without one are left out.

    Raises:
        LowerError: ``qnet`` cannot be lowered, or a layer runs twice on different grids.
    """
    steps = {op.name: op.acc_scale.astype(np.float64) for op in lower(qnet, images=images).layers()}
    changes: dict[str, float] = {}
    for name, bias in _biases(qnet).items():
        if bias.holder is not None:
            rounded = np.rint(bias.value / steps[name]) * steps[name] - bias.rest
            values = torch.from_numpy(rounded).to(bias.holder)
            changes[name] = float((values - bias.holder).abs().max())
            bias.holder.copy_(values)
    return changes


class _Bias(NamedTuple):
    """What a layer, with the batch norms behind it, adds to its products."""

    layer: str
    """its name in the record"""
    value: np.ndarray
    """float64 (C,), real units"""
    holder: Tensor | None
    """the tensor of the network that shifts the value; None: there is none"""
    rest: np.ndarray | float
    """value - holder"""


def _biases(qnet: fx.GraphModule) -> dict[str, _Bias]:
    found: dict[fx.Node, _Bias] = {}
    seen: set[str] = set()
    for node, kind in kinds(qnet).items():
        source = next(iter(node.all_input_nodes), None)
        if kind in ("layer", "norm"):
            name, module = str(node.target), cast(Any, qnet.get_submodule(str(node.target)))
            before = found.get(source) if kind == "norm" and source is not None else None
            if name in seen or (before is not None and source is not None and len(source.users) > 1):
                raise LowerError(f"layer {before.layer if before else name!r} runs more than once, or is read with and "
                                 "without its batch norm: give each use a layer of its own")  # fmt: skip
            seen.add(name)
            own = 0.0 if module.bias is None else module.bias.double().cpu().numpy()
            gain, shift = norm_gain(module) if kind == "norm" else (1.0, np.atleast_1d(own))
            value = shift + gain * before.value if before else shift
            found[node] = _Bias(before.layer if before else name, value, module.bias, value - own)
        elif source in found and op_name(node, qnet) in SAME:
            found[node] = found[source]
    return {bias.layer: bias for bias in found.values()}  # of a layer and its norms, the last
