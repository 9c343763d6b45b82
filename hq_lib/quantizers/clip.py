"""Activation quantizers that clip to [0, alpha], or to [-alpha, alpha] where the data are signed."""

from __future__ import annotations

import torch
from torch import Tensor

from hq_lib.quantizers.affine import MIN_SCALE, Grid, integer_range
from hq_lib.quantizers.base import Quantizer, positive
from hq_lib.quantizers.straight_through import Slope, staircase


class ClipQuantizer(Quantizer):
    """Abstract activation quantizer on a zero-centred grid with ends given by one clip ``alpha`` in real units.

    unsigned: x_hat = alpha / N round(clip(x, 0, alpha) N / alpha),        N = 2^b - 1
    signed:   x_hat = alpha / n round(clip(x, -alpha, alpha) n / alpha),   n = 2^(b-1) - 1;  1 bit {-alpha, alpha}
    """

    slope: Slope = Slope.CLIP
    ends: Tensor
    zero: Tensor

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None) -> None:
        """``axis`` must be None: one clip per tensor."""
        if axis is not None:
            raise ValueError(f"{self.method} activations have one clip per tensor: axis must be None, not {axis}")
        super().__init__(bits, signed=signed, axis=None, role="act")
        self.qmin, self.qmax, self.step = integer_range(bits, signed=signed, narrow=True)
        ends = (self.qmin / self.step, self.qmax / self.step)
        self.register_buffer("ends", torch.tensor(ends), persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def clip(self) -> Tensor:
        """Return the clip in use: (), real units, > 0, differentiable if it is learned."""
        raise NotImplementedError

    def _scale(self) -> Tensor:
        return positive(self.clip() / self.qmax, floor=MIN_SCALE)

    def _grid(self) -> Grid:
        return Grid(self._scale(), self.zero, self.qmin, self.qmax, self.step)

    def _quantize(self, x: Tensor) -> Tensor:
        delta = self._scale() * self.step
        return staircase(x, delta, self.zero, self.ends, odd=self.step == 2, slope=self.slope)


class FixedClip(ClipQuantizer):
    """A clip that is set, not learned. Gradient: dx = 1 for low <= x < high, 0 outside. Ready without data."""

    value: Tensor

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None, clip: float) -> None:
        """``clip``: real units, > 0; raises ValueError otherwise."""
        super().__init__(bits, signed=signed, axis=axis)
        if not 0.0 < clip < float("inf"):
            raise ValueError(f"{self.method}: clip is {clip}; give a finite size > 0 in activation units")
        self.register_buffer("value", torch.tensor(float(clip)))
        self.initialised.fill_(True)
        self._ready = True

    def clip(self) -> Tensor:
        """Return the fixed clip: (), real units."""
        return self.value

    def _fit(self, x: Tensor) -> None:
        """Data do not move a fixed clip."""
