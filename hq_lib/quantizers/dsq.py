"""DSQ (Gong et al. 2019, arXiv:1908.05033): a hard staircase forward, the slope of a soft one backward.

With Delta = (u - l) / N, N = 2^b - 1, t = (x - l) / Delta, i = floor(t), f = t - i - 1/2 (all in steps):

    phi = tanh(c f) / tanh(c / 2)                          eq. 4 and 5, with c = k Delta
    soft = l + Delta (i + (phi + 1) / 2),   hard = l + Delta (i + (sgn(phi) + 1) / 2)          eq. 6 and 7
    dsq_alpha = 1 - tanh(c / 2),  so  c = ln(2 / dsq_alpha - 1)          eq. 8 and 9; 0 is hard, 0.5 nearly linear
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hq_lib.quantizers.affine import MIN_SCALE, affine_from_range, max_abs
from hq_lib.quantizers.base import Quantizer, Role, Tag, scale_gradient
from hq_lib.quantizers.ranges import best_shrink, widest_range
from hq_lib.quantizers.straight_through import Fused, forward_kernel, sum_to

ALPHA_MIN, ALPHA_MAX = 1e-3, 0.5
"""Open ends of the learned dsq_alpha; the paper has 0 and 0.5, and 0 would make the slope infinite."""
HALF_STEP_BITS = 4
"""Up to these bits weights may put real 0 half-way between levels (their storage still fits int8)."""


def dsq_slope(dsq_alpha: Tensor) -> Tensor:
    """Return c = ln(2 / alpha - 1), the slope parameter in steps, for ``dsq_alpha`` in (0, 1) (eq. 9, c = k Delta)."""
    return torch.log(2.0 / dsq_alpha - 1.0)


def dsq_soft(x: Tensor, low: Tensor, high: Tensor, dsq_alpha: Tensor, *, bits: int) -> Tensor:
    """Return the soft staircase: (*shape), real units, differentiable by autograd in all four tensors (eq. 6).

    ``low`` < ``high`` in real units and ``dsq_alpha`` in (0, 1) broadcast against ``x``. Outside, x is clipped.
    The reference of ``dsq_quantize``'s gradient and the curve of fig_dsq_curve; training does not call it.
    """
    n = 2**bits - 1
    delta, c = (high - low) / n, dsq_slope(dsq_alpha)
    cell = torch.floor((x - low) / delta).detach().clamp(0, n - 1)
    phi = torch.tanh(c * ((x - low) / delta - cell - 0.5)) / torch.tanh(c / 2.0)
    soft = low + delta * (cell + (phi + 1.0) / 2.0)
    return torch.where(x < low, low, torch.where(x > high, high, soft))


def _backward(
    grad: Tensor, x: Tensor, delta: Tensor, zero: Tensor, c: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and, summed, of low, high and c (ALGORITHMS section 4, in closed form)."""
    tanh_half = torch.tanh(c / 2.0)
    per_delta, per_n, per_tanh = 1.0 / delta, 1.0 / n, 1.0 / tanh_half  # a division costs more than all the rest
    position = x * per_delta + zero
    t = torch.minimum(torch.clamp(position, min=0.0), n)
    cell = torch.minimum(torch.floor(t), n - 1.0)
    f = t - cell - 0.5
    tanh_f = 1.0 - 2.0 / (torch.exp((2.0 * c) * f) + 1.0)  # tanh(c f), at half the price of torch.tanh
    sech2_f = 1.0 - tanh_f * tanh_f
    slope = torch.where(position == t, sech2_f * (0.5 * c * per_tanh), 0.0)
    grad_x, d_high = grad * slope, (cell + 0.5 + tanh_f * (0.5 * per_tanh) - slope * t) * per_n
    grad_high = sum_to(grad * d_high, delta)
    grad_low = sum_to(grad - grad_x, delta) - grad_high
    d_c = f * sech2_f * per_tanh - tanh_f * (0.5 * (1.0 - tanh_half * tanh_half) * per_tanh * per_tanh)
    return grad_x, grad_low, grad_high, (grad * (0.5 * delta * d_c)).sum()


def _reflected(size: Tensor) -> Tensor:
    """Return |size|; its slope at 0 is 1, so that a bound that starts there can leave (``abs`` has slope 0)."""
    return torch.where(size >= 0, size, -size)


backward_kernel = Fused(_backward, n_elementwise=2, apart=True)


class _HardForwardSoftBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, c: Tensor, delta: Tensor, zero: Tensor, n: Tensor, odd: bool
    ) -> Tensor:
        ctx.save_for_backward(x, delta, zero, c, n)
        return forward_kernel(x, delta, -zero, n - zero, odd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_kernel(grad, *ctx.saved_tensors), None, None, None, None


def dsq_quantize(x: Tensor, low: Tensor, high: Tensor, dsq_alpha: Tensor, *, bits: int) -> Tensor:
    """Return ``x`` on the hard grid ``low + i (high - low) / N``, i = 0 ... N (eq. 7): (*shape), real units.

    Gradient: that of ``dsq_soft`` in x, low, high and dsq_alpha, in closed form; the sign is straight-through.
    ``low`` < ``high`` (same shape, ``()`` or per channel) in real units; ``dsq_alpha`` (), in (0, 1).
    """
    n = x.new_tensor(float(2**bits - 1))
    delta = ((high - low) / n).detach()
    zero = (-low / delta).detach()
    return _HardForwardSoftBackward.apply(x, low, high, dsq_slope(dsq_alpha), delta, zero, n, True)


class DSQ(Quantizer):
    """Weights or activations through DSQ, with learned bounds and a learned dsq_alpha per layer.

    Gradient: as ``dsq_quantize``; the bounds' and dsq_alpha's times ``gradient_factor`` with N, as LSQ's step.

    Departures: (1) the bounds are kept at low <= 0 <= high by reflection and moved, straight-through, by at most half
    a step (quarter with half steps) so that real 0 is a level: zero padding stays exact and the grid runs on integers.
    Weights up to HALF_STEP_BITS bits may instead have 0 half-way between levels, as the paper's symmetric grids do
    (then Grid.step = 2). (2) unsigned data have low = 0, fixed. (3) the bounds start where the squared error is least.
    (4) dsq_alpha = 0.001 + 0.499 sigmoid(raw), from 0.2. 1 bit has two levels, N = 1. All-zero weights stay 0, or
    where 0 is half-way between levels within 2 MIN_SCALE of it.
    """

    method = "dsq"
    tags: ClassVar[dict[str, Tag]] = {
        "low": Tag(lr_factor=1.0, decay=False),
        "high": Tag(lr_factor=1.0, decay=False),
        "dsq_alpha_raw": Tag(lr_factor=1.0, decay=False),
    }

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None, role: Role, dsq_alpha: float = 0.2) -> None:
        """``dsq_alpha``: first value, in (0.001, 0.5). ``axis``: 0 for bounds per channel (dsq_alpha stays one)."""
        super().__init__(bits, signed=signed, axis=axis, role=role)
        if not ALPHA_MIN < dsq_alpha < ALPHA_MAX:
            raise ValueError(f"dsq: dsq_alpha is {dsq_alpha}; it lies strictly between {ALPHA_MIN} and {ALPHA_MAX}")
        share = (dsq_alpha - ALPHA_MIN) / (ALPHA_MAX - ALPHA_MIN)
        self.half_steps = signed and (bits == 1 or (role == "weight" and bits <= HALF_STEP_BITS))
        self.n_steps, step = 2**bits - 1, 2 if self.half_steps else 1
        self.use_integers(0, step * self.n_steps, step)
        self.low = nn.Parameter(torch.tensor(-1.0 if signed else 0.0), requires_grad=signed)
        self.high = nn.Parameter(torch.tensor(1.0))
        self.dsq_alpha_raw = nn.Parameter(torch.tensor(math.log(share / (1.0 - share))))

    def dsq_alpha(self) -> Tensor:
        """Return the characteristic dsq_alpha: (), in (0.001, 0.5), differentiable; 0 is a hard staircase."""
        return ALPHA_MIN + (ALPHA_MAX - ALPHA_MIN) * torch.sigmoid(self.dsq_alpha_raw)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the learned (low, high), low <= 0 <= high, real units, before real 0 is put on the grid."""
        return -_reflected(-self.low), _reflected(self.high)

    def _levels(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_from_range(low, high, n_steps=self.n_steps, half_steps=self.half_steps)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        delta, zero = self._levels(*self.bounds())
        return delta / self.step, zero * self.step

    def _quantize(self, x: Tensor) -> Tensor:
        g = self.gradient_factor(x, self.n_steps)
        low, high = (scale_gradient(bound, g) for bound in self.bounds())
        c = dsq_slope(scale_gradient(self.dsq_alpha(), g))
        delta, zero = self._levels(low.detach(), high.detach())
        return _HardForwardSoftBackward.apply(x, low, high, c, delta, zero, self.ends[1], self.half_steps)

    def _fit(self, x: Tensor) -> None:
        low, high = widest_range(x, signed=self.signed, axis=self.axis)
        if self.binary:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        low, high = best_shrink(x, low, high, self._levels, n_steps=self.n_steps, axis=self.axis)
        if self.half_steps and self.role == "weight":  # no level at 0: a channel of zeros stays as small as can be
            idle = max_abs(x, axis=self.axis) == 0
            low, high = low.masked_fill(idle, -MIN_SCALE), high.masked_fill(idle, MIN_SCALE)
        self.low.data, self.high.data = low, high
