"""Activations that are clipped: PACT (Choi et al. 2018, arXiv:1805.06085), seed 001's modified PACT, fixed clips."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hq_lib.quantizers.affine import MIN_SCALE, integer_range
from hq_lib.quantizers.base import Quantizer, Tag, positive
from hq_lib.quantizers.ranges import LEAST_ERROR, least_error_clip
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
    """A clip that is set, not learned. Gradient: dx = 1 for low <= x < high, 0 outside."""

    published: ClassVar[float]
    """The clip where none is given."""
    value: Tensor

    def __init__(
        self, bits: int, *, signed: bool, axis: int | None = None, clip: float | Literal["least_error"] | None = None
    ) -> None:
        """``clip``: real units, > 0, ready without data; or "least_error", fitted to the first batch and kept.

        Raises ValueError for any other.
        """
        super().__init__(bits, signed=signed, axis=axis)
        self.fits = clip == LEAST_ERROR
        clip = self.published if clip is None else 1.0 if clip == LEAST_ERROR else clip
        if isinstance(clip, str) or not 0.0 < clip < float("inf"):
            raise ValueError(
                f"{self.method}: clip is {clip!r}; give a finite size > 0 in activation units, or {LEAST_ERROR!r}"
            )
        self.register_buffer("value", torch.tensor(float(clip)))
        if not self.fits:
            self.mark_fitted()

    def clip(self) -> Tensor:
        """Return the fixed clip: (), real units."""
        return self.value

    def _fit(self, x: Tensor) -> None:
        if self.fits:
            self.value.copy_(least_error_clip(x, self._grid()))


class PACT(ClipQuantizer):
    """Activations with a learned clip alpha.

        y = clip(x, 0, alpha),   y_hat = round(y (2^k - 1) / alpha) alpha / (2^k - 1)          eq. 1 and 2

    Gradient (eq. 3): dx = 1 for 0 <= x < alpha, else 0; d alpha = sum of the gradients where x >= alpha. Inside the
    clip alpha gets nothing: the rounding is ignored.

    Departures: alpha is fitted to the first batch (the paper starts at 10; see ``init``); a negative
    alpha counts as |alpha|; signed data are clipped to [-alpha, alpha] with d alpha = sum above - sum below, as the
    paper's clip at 0 would act as a ReLU. The paper decays alpha like a weight: that is its tag, with a learning rate
    of a tenth, since its gradient is a sum over all features.
    """

    method = "pact"
    slope = Slope.PACT
    tags: ClassVar[dict[str, Tag]] = {"alpha": Tag(lr_factor=0.1, decay=True)}

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None, init: float | None = None) -> None:
        """``init``: first alpha in real units (the paper's 10, for training from scratch), no data needed.

        None fits alpha to the first batch, at the smallest squared error.
        """
        super().__init__(bits, signed=signed, axis=axis)
        if init is not None and not 0.0 < abs(init) < float("inf"):
            raise ValueError(
                f"{self.method}: init is {init}; the first clip is a finite size in activation units, not 0"
            )
        self.init = init
        self.alpha = nn.Parameter(torch.tensor(1.0 if init is None else float(init)))
        if init is not None:
            self.mark_fitted()

    def clip(self) -> Tensor:
        """Return |alpha|: (), real units."""
        return self.alpha.abs()

    def _fit(self, x: Tensor) -> None:
        self.alpha.copy_(least_error_clip(x, self._grid()))


class MPACT(PACT):
    """Modified PACT of seed 001, its learned form: a signed symmetric clip [-alpha, alpha], wherever it stands.

    2^(b-1) - 1 levels on each side, so linear outputs keep their negative part. After a ReLU half of the range is
    idle, as in the seed. Gradient: dx = 1 inside, d alpha = sum where x >= alpha minus sum where x < -alpha. Decayed
    like PACT's (the seed adds 0.0002 alpha^2 to the loss besides).
    """

    method = "mpact"

    def __init__(self, bits: int, *, signed: bool = True, axis: int | None = None, init: float | None = None) -> None:
        """``init``: as PACT (the seed starts at 10). ``signed``: the grid is, whatever the data are."""
        super().__init__(bits, signed=True, axis=axis, init=init)


class FixedMPACT(FixedClip):
    """Modified PACT of seed 001, its fixed form: scale by S, truncate, round, scale back, S fixed.

        x_hat = S quantize_k(clip(x, 0, S) / S);   signed: [-S, S], 2^(k-1) - 1 levels on each side

    The seed's values of S: 2, 4, 6 (MobileNetV2) and 10 (ToyNet), in real units. Gradient: 1 in the clip, 0 outside.
    """

    method = "mpact"
    published = 6.0
