"""Activation quantizers that clip to [0, alpha], or to [-alpha, alpha] where the data are signed."""

from typing import ClassVar

import torch
from torch import Tensor

from hq_lib.quantizers.affine import MIN_SCALE, integer_range
from hq_lib.quantizers.base import Quantizer, positive
from hq_lib.quantizers.straight_through import Slope


class ClipQuantizer(Quantizer):
    """Abstract activation quantizer on a zero-centred grid with ends given by one clip ``alpha`` in real units.

    unsigned: x_hat = alpha / N round(clip(x, 0, alpha) N / alpha),        N = 2^b - 1
    signed:   x_hat = alpha / n round(clip(x, -alpha, alpha) n / alpha),   n = 2^(b-1) - 1;  1 bit {-alpha, alpha}
    """

    slope = Slope.CLIP
    zero: Tensor

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None) -> None:
        """``axis`` must be None: one clip per tensor."""
        if axis is not None:
            raise ValueError(f"{self.method} activations have one clip per tensor: axis must be None, not {axis}")
        super().__init__(bits, signed=signed, axis=None, role="act")
        self.use_integers(*integer_range(bits, signed=signed, narrow=True))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def clip(self) -> Tensor:
        """Return the clip in use: (), real units, > 0, differentiable if it is learned."""
        raise NotImplementedError

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        return positive(self.clip() / self.qmax, floor=MIN_SCALE), self.zero


class FixedClip(ClipQuantizer):
    """A clip that is set, not learned. Gradient: dx = 1 for low <= x < high, 0 outside. Ready without data."""

    published: ClassVar[float]
    """The clip where none is given."""
    value: Tensor

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None, clip: float | None = None) -> None:
        """``clip``: real units, > 0; raises ValueError otherwise."""
        super().__init__(bits, signed=signed, axis=axis)
        clip = self.published if clip is None else clip
        if not 0.0 < clip < float("inf"):
            raise ValueError(f"{self.method}: clip is {clip}; give a finite size > 0 in activation units")
        self.register_buffer("value", torch.tensor(float(clip)))
        self.mark_fitted()

    def clip(self) -> Tensor:
        """Return the fixed clip: (), real units."""
        return self.value

    def _fit(self, x: Tensor) -> None:
        """Data do not move a fixed clip."""
