"""Min-max quantizers trained straight through: the plain baseline ("STE") of every table; the same with ACIQ's range.

The range follows the data and gets no gradient; the input's gradient is 1 wherever rounding did not clip.
"""

import torch
from torch import Tensor

from hq_lib.quantizers.aciq import advised_range
from hq_lib.quantizers.affine import (
    affine_from_range,
    channel_dims,
    integer_range,
    mean_abs,
    min_max,
    quantize_to_int,
    refuse_nan,
    usable,
)
from hq_lib.quantizers.base import Quantizer
from hq_lib.quantizers.ranges import widest_range

MOMENTUM = 0.1
"""Weight of the newest batch in a running range (QDrop's EMA observer has it too)."""


class FollowingQuantizer(Quantizer):
    """Abstract weight quantizer whose grid is computed anew from each tensor, and remembered for ``grid()``."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, *, signed: bool = True, axis: int | None = 0) -> None:
        """``axis``: 0 per output channel, None per tensor. Signed grids leave -2^(b-1) unused."""
        super().__init__(bits, signed=signed, axis=axis, role="weight")
        self.use_integers(*integer_range(bits, signed=signed, narrow=True))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0.0))

    def _found(self, w: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _follow(self, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale, zero_point = self._found(w.detach().to(self.scale.dtype))
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        return scale, zero_point

    def _fit(self, x: Tensor) -> None:
        self.scale, self.zero_point = self._found(x)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def _quantize(self, x: Tensor) -> Tensor:
        scale, zero_point = self._follow(x)
        return binary_ste(x, scale) if self.binary else self._snap(x, scale, zero_point)

    def _to_int(self, x: Tensor) -> Tensor:
        self._follow(x)
        refuse_nan(x)
        return (torch.where(x >= 0, 1, -1) if self.binary else self._index(x)).to(torch.int32)

    def _index(self, w: Tensor) -> Tensor:
        return quantize_to_int(w, self._grid())


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

    def __init__(self, bits: int, *, signed: bool = True, axis: int | None = 0, power_of_two: bool = False) -> None:
        """``power_of_two``: s is the next power of two up, so that hardware shifts. Else as FollowingQuantizer."""
        super().__init__(bits, signed=signed, axis=axis)
        self.power_of_two = power_of_two

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return min_max(w, axis=self.axis)

    def _found(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            scale = mean_abs(w, axis=self.axis)
        else:
            low, high = self._range(w)
            if not self.signed:
                return affine_from_range(low, high, n_steps=self.qmax, power_of_two=self.power_of_two)
            scale = torch.maximum(-low, high) / self.qmax
        return usable(scale, power_of_two=self.power_of_two), w.new_zeros(())


class MinMaxAct(Quantizer):
    """Activations on the running min-max range, straight through.

        low, high <- (1 - m) (low, high) + m (min x, max x)      in training, from the first batch's range on

    with m = ``MOMENTUM``. Unsigned: [0, high], z = 0. Signed: integers 0 ... 2^b - 1 with an integer zero point and 0
    in the range; signed 1 bit is {-E|x|, +E|x|}. The batch is counted before it is quantized; of several tensors on one
    grid x is all of them, counted once the last is quantized. Eval mode, or ``observing = False``, keeps the range.
    dx = 1 unless the rounded value was clipped.
    """

    method = "minmax"
    low: Tensor
    high: Tensor

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None, power_of_two: bool = False) -> None:
        """``power_of_two``: s is the next power of two up, so that hardware shifts."""
        super().__init__(bits, signed=signed, axis=axis, role="act")
        self.power_of_two, self.observing = power_of_two, True
        self.use_integers(*((-1, 1, 2) if self.binary else (0, 2**bits - 1, 1)))
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(1.0))
        self._seen: list[Tensor] = []  # of this pass, where there are several places

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            high = mean_abs(x, axis=self.axis)
            return -high, high
        if self.signed:
            return min_max(x, axis=self.axis)
        high = x.amax(channel_dims(x, self.axis), keepdim=self.axis is not None)
        return torch.zeros_like(high), high

    def _fit(self, x: Tensor) -> None:
        self.low, self.high = self._range(x) if self.binary else widest_range(x, signed=self.signed, axis=self.axis)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        if self.binary:
            scale = usable(self.high, power_of_two=self.power_of_two)
            return scale, torch.zeros_like(scale)
        return affine_from_range(self.low, self.high, n_steps=self.qmax, power_of_two=self.power_of_two)

    def _quantize(self, x: Tensor) -> Tensor:
        observing = self.training and self.observing
        if observing and self.places == 1:
            self._count(x.detach())
        x_hat = super()._quantize(x)
        if observing and self.places > 1:
            self._seen = [*self._seen, x.detach().flatten() if self.axis is None else x.detach()]
            if len(self._seen) == self.places:
                self._count(torch.cat(self._seen))
                self._seen = []
        return x_hat

    def train(self, mode: bool = True) -> "MinMaxAct":
        """Also forgets what a pass that broke off has left."""
        self._seen = []
        return super().train(mode)

    @torch.no_grad()
    def _count(self, x: Tensor) -> None:
        low, high = self._range(x)
        self.low.lerp_(low.to(self.low.dtype), MOMENTUM)
        self.high.lerp_(high.to(self.high.dtype), MOMENTUM)


class AciqWeight(MinMaxWeight):
    """Min-max weights whose range is ACIQ's analytic clip (Banner et al., arXiv:1810.05723) in place of the extremes.

    The likelier of Laplace and Gauss, per channel; below 3 bits the optimum of the restricted grid. Otherwise, and at
    1 bit, as MinMaxWeight; clipped weights get no gradient. Not idempotent: the clip follows the tensor's statistics.
    """

    method = "aciq"

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return advised_range(w, bits=self.bits, signed=True, axis=self.axis, restricted=self.signed)


class AciqAct(MinMaxAct):
    """Min-max activations whose range is ACIQ's analytic clip; after a ReLU its "theory" variant (``clip_range``)."""

    method = "aciq"

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            return super()._range(x)
        return advised_range(x, bits=self.bits, signed=self.signed, axis=self.axis)

    def _fit(self, x: Tensor) -> None:
        self.low, self.high = self._range(x)
