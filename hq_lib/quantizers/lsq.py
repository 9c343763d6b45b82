"""LSQ (Esser et al. 2020, arXiv:1902.08153) and LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576): the step is learned."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from hq_lib.quantizers.affine import (
    FINEST_SCALE,
    MIN_SCALE,
    affine_from_range,
    integer_range,
    mean_abs,
    usable,
)
from hq_lib.quantizers.base import Quantizer, Role, Tag, positive, scale_gradient
from hq_lib.quantizers.ranges import IDLE_CLIP, LEAST_ERROR, best_shrink, three_sigma, widest_range
from hq_lib.quantizers.straight_through import Slope
from hq_lib.results.hints import check_known

INITS = ("paper", LEAST_ERROR)
"""Where a step starts; see ``LSQ``."""


class LSQ(Quantizer):
    """Weights or activations on a zero-centred grid with a learned step s.

        x_hat = s round(clip(x / s, qmin, qmax))                                    eq. 1 and 2
        signed: qmin = -2^(b-1), qmax = 2^(b-1) - 1;  unsigned: 0, 2^b - 1;  signed 1 bit: {-s, +s}

    Gradient: dx = 1 where qmin <= x/s < qmax, else 0 (eq. 5); ds = round(x/s) - x/s inside, qmin below, qmax above
    (eq. 3), times g = 1 / sqrt(n qmax), n the weights per step or the features of one sample (section 2.2).

    s starts at 2 E|x| / sqrt(qmax) (section 2.1), from the weight or the first training batch; 1 signed bit at E|x|.
    All zero: s as for |x| = IDLE_CLIP, the outputs stay 0; 1-bit weights, which have no 0, get +-2 MIN_SCALE. A step
    that crosses 0 counts as |s|.
    Departures: per-channel steps (``axis=0``), the paper has one per layer; with ``init="least_error"`` s starts where
    the squared error is least: after a ReLU the published start clips too much at 2 bits, and what follows explodes.
    """

    method = "lsq"
    slope = Slope.LSQ
    tags: ClassVar[dict[str, Tag]] = {"step_size": Tag(lr_factor=1.0, decay=False)}
    zero: Tensor

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None, role: Role, init: str = "paper") -> None:
        """``axis``: None for one step per tensor, 0 for one per channel. ``init``: "paper" or "least_error"."""
        super().__init__(bits, signed=signed, axis=axis, role=role)
        check_known(init, INITS, f"init of {self.method}")
        self.init = init
        self.use_integers(*integer_range(bits, signed=signed))
        self.step_size = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def _scale(self) -> Tensor:
        return positive(self.step_size, floor=FINEST_SCALE)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        return self._scale(), self.zero

    def _quantize(self, x: Tensor) -> Tensor:
        g = self.gradient_factor(x, self.qmax)
        return self._snap(x, *(scale_gradient(learned, g) for learned in self._scale_and_zero()))

    def _fit(self, x: Tensor) -> None:
        size = mean_abs(x if self.signed else x.clamp(min=0.0), axis=self.axis)
        idle = 2.0 * MIN_SCALE if self.binary and self.role == "weight" else IDLE_CLIP
        size = torch.where(size > 0, size, torch.full_like(size, idle))
        start = size * (1.0 if self.binary else 2.0 / math.sqrt(self.qmax))
        if self.init == LEAST_ERROR and not self.binary:
            low, high = widest_range(x, signed=self.signed, axis=self.axis)
            widest = usable(torch.maximum(high / self.qmax, low / min(self.qmin, -1)))
            zero = widest.new_tensor(float(-self.qmin))
            n_steps = self.qmax - self.qmin
            _, start = best_shrink(x, widest, widest, lambda _, s: (s, zero), n_steps=n_steps, axis=self.axis)
        self.step_size.data = start


class LSQPlusWeight(LSQ):
    """LSQ weights that start at s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1) (LSQ+, eq. 9); no offset.

    Signed 1 bit starts at E|w|. Otherwise as LSQ.
    """

    method = "lsq_plus"

    def __init__(self, bits: int, *, signed: bool = True, axis: int | None = None) -> None:
        """``axis``: None for one step per tensor, 0 for one per channel."""
        super().__init__(bits, signed=signed, axis=axis, role="weight")

    def _fit(self, x: Tensor) -> None:
        super()._fit(x)
        if not self.binary:
            self.step_size.data = three_sigma(x, axis=self.axis) / (self.qmax + int(self.signed))


class LSQPlusAct(LSQ):
    """Activations with a learned step and, where signed, a learned offset beta in real units.

        x_hat = s round(clip((x - beta) / s, 0, 2^b - 1)) + beta                     LSQ+ eq. 1, unsigned integers

    with beta = -s z and z = round(-beta / s) an integer, so that real 0 is exact and the grid runs on integers
    (departure: the paper leaves beta real). Gradient: ds as LSQ, d beta = 1 where clipped and 0 inside (eq. 5 and 6),
    both times LSQ's g.
    Signed 1 bit may have 0 half-way between its two levels. Unsigned data have beta = 0. Both start where the squared
    error of the first batch is least.
    """

    method = "lsq_plus"
    slope = Slope.LSQ_PLUS
    tags: ClassVar[dict[str, Tag]] = {**LSQ.tags, "beta": Tag(lr_factor=1.0, decay=False)}

    def __init__(self, bits: int, *, signed: bool, axis: int | None = None) -> None:
        """``axis``: None; one grid per tensor."""
        super().__init__(bits, signed=signed, axis=axis, role="act")
        if axis is not None:
            raise ValueError(f"lsq_plus activations have one grid per tensor: axis must be None, not {axis}")
        self.n_steps = 2**bits - 1
        step = 2 if self.binary else 1
        self.use_integers(0, self.n_steps * step, step)
        self.beta = nn.Parameter(torch.tensor(0.0), requires_grad=signed)
        self._held: Tensor | None = None

    def hold_zero_point(self, on: bool) -> None:
        """Keep the zero point of now while the step is learned (True), and leave it where it is afterwards (False)."""
        with torch.no_grad():
            if on:
                self._held = self._scale_and_zero()[1].clone()
            elif self._held is not None:
                self.beta.data, self._held = -self._scale() * self._held, None

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        scale = self._scale()
        if self._held is not None:
            return scale, self._held
        position = -self.beta / scale  # not detached: eq. 5 needs the path through z
        return scale, torch.round(position).clamp(0, self.qmax).detach() + (position - position.detach())

    def _fit(self, x: Tensor) -> None:
        low, high = widest_range(x, signed=self.signed)
        if self.binary:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        delta, zero = self._levels(*best_shrink(x, low, high, self._levels, n_steps=self.n_steps))
        self.step_size.copy_(delta / self.step)
        self.beta.copy_(0.0 - delta * zero)

    def _levels(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_from_range(low, high, n_steps=self.n_steps, half_steps=self.binary)
