"""The one differentiable staircase under every straight-through quantizer, with closed-form gradients.

    x_hat = delta * snap(clip(x / delta, low, high)),    low = qmin - zero, high = qmax - zero, in steps of ``delta``

It saves the input only (usually the ReLU's output, which autograd holds anyway) and recomputes masks in the backward
pass: two streams in, one out, and the parameter gradients as sums of the same pass.
"""

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hq_lib.quantizers.affine import snap
from hq_lib.quantizers.fusion import Fused


class Slope(Enum):
    """What the backward pass gives to the input and to ``delta``; a member per published rule."""

    ROUND = "round first: dx = 1 where the rounded value was not clipped; delta is a constant"
    CLIP = "clip first: dx = 1 where low <= x / delta < high; delta is a constant"
    PACT = "dx as CLIP; d delta = low or high where clipped, nothing inside (PACT's straight-through)"
    LSQ = "dx as CLIP; d delta = low or high where clipped, round(v) - v inside (LSQ, eq. 3)"
    LSQ_PLUS = "as LSQ, and the zero gets -delta where clipped (LSQ+, eq. 5)"


def _offset(low: Tensor, odd: bool) -> Tensor | float:
    return low - torch.floor(low) if odd else 0.0


def _forward(x: Tensor, delta: Tensor, low: Tensor, high: Tensor, odd: bool) -> Tensor:
    clipped = torch.clamp(x / delta, low, high)
    return delta * (snap(clipped, _offset(low, odd)) if odd else torch.round(clipped))


def sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` summed to the shape of ``like``: the gradient of what was broadcast."""
    return values.sum() if like.ndim == 0 else values.sum_to_size(like.shape)


def _mask_backward(
    grad: Tensor, x: Tensor, delta: Tensor, low: Tensor, high: Tensor, odd: bool, rounded: bool
) -> Tensor:
    v = x / delta
    if rounded:
        v = snap(v, _offset(low, odd))
        return torch.where((v >= low) & (v <= high), grad, 0.0)
    return torch.where((v >= low) & (v < high), grad, 0.0)


def _clip_backward(grad: Tensor, x: Tensor, delta: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    v = x / delta
    below, above = v < low, v >= high
    grad_delta = sum_to(grad * torch.where(below, low, torch.where(above, high, 0.0)), delta)
    return torch.where((v >= low) & (v < high), grad, 0.0), grad_delta


def _step_backward(
    grad: Tensor, x: Tensor, delta: Tensor, low: Tensor, high: Tensor, odd: bool
) -> tuple[Tensor, Tensor, Tensor]:
    v = x / delta
    inside = (v >= low) & (v < high)
    level = snap(torch.clamp(v, low, high), _offset(low, odd))
    grad_x = torch.where(inside, grad, 0.0)
    grad_delta = sum_to(grad * (level - torch.where(inside, v, 0.0)), delta)
    return grad_x, grad_delta, -delta * sum_to(grad - grad_x, delta)


forward_kernel = Fused(_forward, n_elementwise=1, apart=False)
mask_kernel = Fused(_mask_backward, n_elementwise=2, apart=True)
clip_kernel = Fused(_clip_backward, n_elementwise=2, apart=True)
step_kernel = Fused(_step_backward, n_elementwise=2, apart=True)


class _Staircase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, zero: Tensor, ends: Tensor, odd: bool, slope: Slope) -> Tensor:
        low, high = ends[0] - zero, ends[1] - zero
        ctx.save_for_backward(x, delta, low, high)
        ctx.odd, ctx.slope = odd, slope
        return forward_kernel(x, delta, low, high, odd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, low, high = ctx.saved_tensors
        if ctx.slope in (Slope.ROUND, Slope.CLIP):
            grad_x = mask_kernel(grad, x, delta, low, high, ctx.odd, ctx.slope is Slope.ROUND)
            return grad_x, None, None, None, None, None
        if ctx.slope is Slope.PACT:
            return *clip_kernel(grad, x, delta, low, high), None, None, None, None
        grad_x, grad_delta, grad_zero = step_kernel(grad, x, delta, low, high, ctx.odd)
        return grad_x, grad_delta, grad_zero if ctx.slope is Slope.LSQ_PLUS else None, None, None, None


def staircase(x: Tensor, delta: Tensor, zero: Tensor, ends: Tensor, *, odd: bool = False, slope: Slope) -> Tensor:
    """Snap ``x`` to the levels ``delta * (k - zero)``, k = ends[0] ... ends[1], and return it in real units.

    Args:
        x: (*shape), real units, float32 or float64.
        delta: real units between neighbouring levels, > 0, ``()`` or broadcastable to ``x``.
        zero: position of real 0 in steps, of ``delta``'s shape or ``()``; integer, or half-integer with ``odd``.
        ends: (2,), the first and the last k, integers (or, with ``odd``, half-integers).
        odd: True where ``ends - zero`` may be no integers, that is real 0 is no level.
        slope: which gradient the backward pass gives (see Slope).

    Returns:
        (*shape), ``x``'s dtype and memory order. NaN stays NaN and passes no gradient; +-Inf is clipped.
    """
    return _Staircase.apply(x, delta, zero, ends, odd, slope)
