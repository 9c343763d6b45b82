"""Min-max quantizers trained straight through: the plain baseline ("STE") of every table; the same with ACIQ's range.

The range follows the data and gets no gradient; the input's gradient is 1 wherever rounding did not clip.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hq_lib.quantizers.aciq.ranges import clip_range
from hq_lib.quantizers.affine import (
    MIN_SCALE,
    Grid,
    affine_from_range,
    integer_range,
    mean_abs,
    min_max,
    next_power_of_two,
    refuse_nan,
    symmetric_from_range,
)
from hq_lib.quantizers.base import Quantizer
from hq_lib.quantizers.ranges import widest_range
from hq_lib.quantizers.straight_through import Slope, staircase


class FollowingQuantizer(Quantizer):
    """Abstract weight quantizer whose grid is computed anew from each tensor, and remembered for ``grid()``."""

    scale: Tensor
    zero_point: Tensor
    ends: Tensor

    def __init__(self, bits: int, *, signed: bool = True, axis: int | None = 0, narrow: bool = True) -> None:
        """``axis``: 0 per output channel, None per tensor. ``narrow``: signed grids leave -2^(b-1) unused."""
        super().__init__(bits, signed=signed, axis=axis, role="weight")
        self.qmin, self.qmax, self.step = integer_range(bits, signed=signed, narrow=narrow)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0.0))
        self.register_buffer("ends", torch.tensor((float(self.qmin), float(self.qmax))), persistent=False)

    def _scale_and_zero(self, w: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _follow(self, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale, zero_point = self._scale_and_zero(w.detach().to(self.scale.dtype))
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        return scale, zero_point

    def _fit(self, x: Tensor) -> None:
        self.scale, self.zero_point = self._scale_and_zero(x)

    def _grid(self) -> Grid:
        return Grid(self.scale, self.zero_point, self.qmin, self.qmax, self.step)


def binary_ste(w: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale`` where w >= 0 and ``-scale`` elsewhere (NaN stays NaN); the gradient passes unchanged.

    w_hat = sign(w) E|w|, DoReFa-Net (1606.06160) eq. 7 with scale = E|w|; sign(0) is +1. The sum that carries the
    gradient is zero to the last bit, so the values are exact.
    """
    hard = torch.where(w >= 0, scale, -scale).to(w.dtype) + 0.0 * w.detach()
    return hard + (w - w.detach())


class MinMaxWeight(FollowingQuantizer):
    """Weights on the grid of their own current range, straight through.

    Signed (default): s = max|w| / (2^(b-1) - 1), z = 0. Unsigned: s = (max - min) / (2^b - 1) with an integer zero
    point and 0 in the range. Signed 1 bit: sign(w) E|w|, gradient 1 everywhere. The gradient is 1 on every weight,
    since none is clipped. An all-zero channel gets s = MIN_SCALE and stays 0 (1 bit: +MIN_SCALE).
    """

    method = "minmax"

    def __init__(
        self, bits: int, *, signed: bool = True, axis: int | None = 0, narrow: bool = True, power_of_two: bool = False
    ) -> None:
        """``power_of_two``: s is the next power of two up, so that hardware shifts. Else as FollowingQuantizer."""
        super().__init__(bits, signed=signed, axis=axis, narrow=narrow)
        self.power_of_two = power_of_two

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return min_max(w, axis=self.axis)

    def _scale_and_zero(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.step == 2:
            scale, zero_point = mean_abs(w, axis=self.axis).clamp(min=MIN_SCALE), w.new_zeros(())
            return (next_power_of_two(scale) if self.power_of_two else scale), zero_point
        low, high = self._range(w)
        if self.signed:
            scale = symmetric_from_range(torch.maximum(-low, high), qmax=self.qmax)
            return (next_power_of_two(scale) if self.power_of_two else scale), w.new_zeros(())
        return affine_from_range(low, high, qmin=self.qmin, qmax=self.qmax, power_of_two=self.power_of_two)

    def _quantize(self, x: Tensor) -> Tensor:
        scale, zero_point = self._follow(x)
        if self.step == 2:
            return binary_ste(x, scale)
        return staircase(x, scale, zero_point, self.ends, slope=Slope.ROUND)

    def _to_int(self, x: Tensor) -> Tensor:
        self._follow(x)
        if self.step == 2:
            return binary_to_int(x)
        return super()._to_int(x)


def binary_to_int(w: Tensor) -> Tensor:
    """Return int32 +1 where w >= 0, -1 where w < 0; ValueError for NaN."""
    refuse_nan(w)
    return torch.where(w >= 0, 1, -1).to(torch.int32)


class MinMaxAct(Quantizer):
    """Activations on the running min-max range, straight through.

        low, high <- (1 - m) (low, high) + m (min x, max x)      in training, from the first batch's range on

    Unsigned: [0, high], z = 0. Signed: integers 0 ... 2^b - 1 with an integer zero point and 0 in the range; signed
    1 bit is {-E|x|, +E|x|}. The batch is counted before it is quantized; eval mode, or ``observing = False``, keeps
    the range. dx = 1 unless the rounded value was clipped.
    """

    method = "minmax"
    low: Tensor
    high: Tensor
    ends: Tensor
    momentum_default: ClassVar[float] = 0.1

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        axis: int | None = None,
        momentum: float = momentum_default,
        power_of_two: bool = False,
    ) -> None:
        """``momentum`` m in (0, 1]: weight of the newest batch (QDrop's EMA observer has 0.1). ``power_of_two``: s is
        the next power of two up, so that hardware shifts."""
        super().__init__(bits, signed=signed, axis=axis, role="act")
        self.power_of_two = power_of_two
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum is {momentum}: the weight of the newest batch lies in (0, 1]")
        self.momentum, self.observing = momentum, True
        self.binary = signed and bits == 1
        self.qmin, self.qmax, self.step = (-1, 1, 2) if self.binary else (0, 2**bits - 1, 1)
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(1.0))
        ends = (-0.5, 0.5) if self.binary else (0.0, float(self.qmax))
        self.register_buffer("ends", torch.tensor(ends), persistent=False)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            high = mean_abs(x, axis=self.axis)
            return -high, high
        if self.signed:
            return min_max(x, axis=self.axis)
        high = min_max(x, axis=self.axis)[1] if self.axis is not None else x.amax()
        return torch.zeros_like(high), high

    def _fit(self, x: Tensor) -> None:
        self.low, self.high = widest_range(x, signed=self.signed, axis=self.axis)
        if self.binary:
            self.low, self.high = self._range(x)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = self._range(x.detach())
        self.low.lerp_(low.to(self.low.dtype), self.momentum)
        self.high.lerp_(high.to(self.high.dtype), self.momentum)

    def _grid(self) -> Grid:
        if self.binary:
            scale = self.high.clamp(min=MIN_SCALE)
            scale = next_power_of_two(scale) if self.power_of_two else scale
            return Grid(scale, torch.zeros_like(scale), -1, 1, 2)
        scale, zero_point = affine_from_range(
            self.low, self.high, qmin=0, qmax=self.qmax, power_of_two=self.power_of_two
        )
        return Grid(scale, zero_point, 0, self.qmax)

    def _quantize(self, x: Tensor) -> Tensor:
        if self.training and self.observing:
            self._observe(x)
        grid = self._grid()
        return staircase(x, grid.scale * grid.step, grid.zero_point, self.ends, odd=self.binary, slope=Slope.ROUND)


class AciqWeight(MinMaxWeight):
    """Min-max weights whose range is ACIQ's analytic clip (Banner et al., arXiv:1810.05723) in place of the extremes.

    The likelier of Laplace and Gauss, per channel; below 3 bits the optimum of the restricted grid. Otherwise, and at
    1 bit, as MinMaxWeight; clipped weights get no gradient. Not idempotent: the clip follows the tensor's statistics.
    """

    method = "aciq"

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        grid = "restricted" if self.signed and self.bits < 3 else None
        found = clip_range(w, bits=self.bits, axis=self.axis, grid=grid)
        return _shaped(found.low, w, self.axis), _shaped(found.high, w, self.axis)


class AciqAct(MinMaxAct):
    """Min-max activations whose range is ACIQ's analytic clip; after a ReLU its "theory" variant (``clip_range``)."""

    method = "aciq"

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            return super()._range(x)
        how = {} if self.signed else {"relu": "theory", "grid": "relu_endpoint" if self.bits < 3 else None}
        found = clip_range(x, bits=self.bits, axis=self.axis, **how)  # type: ignore[arg-type]
        return _shaped(found.low, x, self.axis), _shaped(found.high, x, self.axis)

    def _fit(self, x: Tensor) -> None:
        self.low, self.high = self._range(x)


def _shaped(end: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Return the () or (C,) end of a range so that it broadcasts against ``like``."""
    return end if axis is None else end.reshape([-1 if d == axis % like.ndim else 1 for d in range(like.ndim)])
