"""Quantizers whose grid is given: tensors rounded to nearest on it, up or down as AdaRound learns, or integers as such.

Symbols (Nagel et al. 2020, AdaRound, arXiv:2004.10568): ``v`` the rounding logits V, ``h`` = h(V) in [0, 1] the share
of a step by which a weight is rounded up from its floor, ``zeta`` and ``gamma`` the ends of the stretched sigmoid.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from hq_lib.quantizers.affine import Grid
from hq_lib.quantizers.base import Quantizer, Role, Tag, as_bytes
from hq_lib.quantizers.straight_through import flat, unflat

ZETA, GAMMA = 1.1, -0.1  # AdaRound, section 3.2
DECIDED = (0.01, 0.99)
"""h below the first or above the second counts as decided."""


class FixedGrid(Quantizer):
    """Tensors rounded to nearest on a fixed grid, x_hat = s (clip(round(x / s) + z, qmin, qmax) - z), any step.

    Weights that post-training quantization gave their ranges, and activations of a frozen network. Gradient: 1 inside
    the grid, 0 on clipped values; the grid is a constant.
    """

    method = "grid"
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, grid: Grid, *, bits: int, axis: int | None = 0, role: Role = "weight", signed: bool = True
    ) -> None:
        """``grid``: its scale broadcastable to the tensor; ``axis``: its channel axis."""
        super().__init__(bits, signed=signed, axis=axis, role=role)
        self.use_integers(*grid[2:])
        self.spec = as_bytes(f"{bytes(self.spec.tolist()).decode()}, {self.qmin}..{self.qmax} by {self.step}")
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().clone())
        self.mark_fitted()

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def _fit(self, x: Tensor) -> None:
        raise RuntimeError(f"{self}: its grid is given; ptq.fit_weights and ptq.fit_acts choose others")


class FrozenWeight(FixedGrid):
    """A weight that is given as integers, w_hat = s (x_int - z), and belongs to one tensor: it cannot be trained."""

    method = "frozen"
    x_int: Tensor

    def __init__(self, x_int: Tensor, grid: Grid, *, bits: int, axis: int | None = 0) -> None:
        """``x_int``: (*shape), integers on ``grid``."""
        super().__init__(grid, bits=bits, axis=axis)
        self.register_buffer("x_int", x_int.to(torch.int32))

    def _quantize(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(f"{self}: integers cannot be trained; load the trainable form, or call eval()")
        x_int = unflat(flat(self.x_int, self.x_int), self.x_int)  # one input channel has two orders: the staircase's
        return (self.scale * (x_int - self.zero_point)).to(x.dtype)

    def _to_int(self, x: Tensor) -> Tensor:
        return self.x_int


class AdaRound(FixedGrid):
    """One weight tensor whose elements are each rounded down or up by a learned choice.

        soft:  w_hat = s (clip(floor(w / s) + h(V) + z, qmin, qmax) - z)                     eq. 22
               h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)                          eq. 23
        hard:  h(V) becomes 1 where V >= 0, else 0

    V starts where h(V) is the fraction of w / s, so that the soft weight begins as the float weight (where that is not
    clipped) and the hard one as rounding to nearest (a fraction of exactly 1/2 rounds up). It belongs to the tensor it
    was made from: ``forward`` and ``to_int`` read only its shape. An all-zero weight stays zero, all decided.

    Gradient: v gets s times the slope of h where nothing is clipped; w gets none.
    """

    method = "adaround"
    tags: ClassVar[dict[str, Tag]] = {"v": Tag(lr_factor=1.0, decay=False)}
    floor: Tensor

    def __init__(self, w: Tensor, grid: Grid, *, bits: int, axis: int | None = 0) -> None:
        """``w``: (*shape), real units, finite; ``grid``: step 1. Hard until ``soft`` is set."""
        super().__init__(grid, bits=bits, axis=axis)
        if grid.step != 1:
            raise ValueError("a grid without a level at 0 (signed 1 bit) has no floor and ceil to choose from")
        steps = w.detach().float() / self.scale
        if not torch.isfinite(steps).all():
            raise ValueError(f"{self}: the weight holds NaN or Inf; look at the checkpoint")
        self.register_buffer("floor", torch.floor(steps))
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (steps - self.floor - GAMMA) - 1.0))  # h's inverse
        self.soft = False
        """True while the rounding is learned; not part of the state dict."""

    def h(self) -> Tensor:
        """Return h(V), eq. 23, the shape of the weight, in [0, 1]; flat where clipped."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)

    def undecided(self) -> int:
        """Return how many h lie between ``DECIDED``; waits for the device."""
        h = self.h().detach()
        return int(((h > DECIDED[0]) & (h < DECIDED[1])).sum())

    def regulariser(self, beta: float) -> Tensor:
        """Return sum(1 - |2 h(V) - 1|^beta), (), eq. 24: 0 once every rounding is decided.

        d/dh = -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1).
        """
        return (1.0 - (2.0 * self.h() - 1.0).abs().pow(beta)).sum()

    def _levels(self) -> Tensor:
        up = self.h() if self.soft else (self.v.detach() >= 0).to(self.floor.dtype)
        return torch.clamp(self.floor + up + self.zero_point, self.qmin, self.qmax)

    def _check(self, x: Tensor) -> None:
        if x.shape != self.floor.shape:
            raise ValueError(f"{self} was made for a weight of shape {tuple(self.floor.shape)}, not {tuple(x.shape)}")

    def _quantize(self, x: Tensor) -> Tensor:
        self._check(x)
        return (self.scale * (self._levels() - self.zero_point)).to(x.dtype)

    def _to_int(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.soft:
            raise RuntimeError(f"{self} is still soft: its weights are not on the grid; set soft = False")
        return self._levels().to(torch.int32)
