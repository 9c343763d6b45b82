"""Weights on a grid that post-training quantization chose: rounded to nearest, or up or down as AdaRound learns.

Symbols (Nagel et al. 2020, AdaRound, arXiv:2004.10568): ``v`` the rounding logits V, ``h`` = h(V) in [0, 1] the share
of a step by which a weight is rounded up from its floor, ``zeta`` and ``gamma`` the ends of the stretched sigmoid.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from hq_lib.graph import QuantizedWeight, QuantizeError
from hq_lib.quantizers import Grid, Quantizer, Tag, fake_quantize

ZETA, GAMMA = 1.1, -0.1  # AdaRound, section 3.2
DECIDED = (0.01, 0.99)
"""h below the first or above the second counts as decided."""
ON_GRID = ("grid", "adaround", "minmax", "lsq", "lsq_plus")
"""Methods whose grid is in the weight's own units, so that floor and ceil of the weight are its levels."""


class GridWeight(Quantizer):
    """Weights rounded to nearest on a fixed grid, x_hat = s (clip(round(w / s) + z, qmin, qmax) - z).

    Gradient: 1 on weights inside the grid, 0 on clipped ones; the grid is a constant.
    """

    method = "grid"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, *, bits: int, axis: int | None = 0) -> None:
        """``grid``: as ``Grid`` has it, step 1, its scale broadcastable to the weight; ``axis``: its channel axis."""
        super().__init__(bits, signed=True, axis=axis, role="weight")
        if grid.step != 1:
            raise ValueError("a grid without a level at 0 (signed 1 bit) has no floor and ceil to choose from")
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().clone().expand_as(grid.scale).contiguous())
        self.mark_fitted()

    def _quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, qmin=self.qmin, qmax=self.qmax)

    def _grid(self) -> Grid:
        return Grid(self.scale, self.zero_point, self.qmin, self.qmax)

    def _fit(self, x: Tensor) -> None:
        raise RuntimeError(f"{self}: its grid is given; ptq.fit_weights chooses another")


class AdaRound(GridWeight):
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
        steps = w.detach().float() / self.scale
        if not torch.isfinite(steps).all():
            raise ValueError(f"{self}: the weight holds NaN or Inf; look at the checkpoint")
        self.register_buffer("floor", torch.floor(steps))
        self.v = nn.Parameter(logits_of(steps - self.floor))
        self.soft = False
        """True while the rounding is learned; not part of the state dict."""

    def h(self) -> Tensor:
        """Return h(V), the shape of the weight, in [0, 1]."""
        return rectified_sigmoid(self.v)

    def undecided(self) -> int:
        """Return how many h lie between ``DECIDED``; waits for the device."""
        h = self.h().detach()
        return int(((h > DECIDED[0]) & (h < DECIDED[1])).sum())

    def regulariser(self, beta: float) -> Tensor:
        """Return sum(1 - |2 h(V) - 1|^beta), (), eq. 24: 0 once every rounding is decided."""
        return rounding_penalty(self.h(), beta)

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


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), AdaRound eq. 23; flat where clipped."""
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def logits_of(h: Tensor) -> Tensor:
    """Return V with h(V) = ``h`` in [0, 1], ``rectified_sigmoid``'s inverse: -ln((zeta - gamma)/(h - gamma) - 1)."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Return sum(1 - |2 h - 1|^beta), (), AdaRound eq. 24. d/dh = -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1)."""
    return (1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum()


def fixed_grid(layer: QuantizedWeight, name: str) -> tuple[Grid, Quantizer]:
    """Return the grid that ``layer``'s weight is on, and its quantizer.

    Raises:
        QuantizeError: names the layer whose method has no grid in the weight's own units (DoReFa's tanh, DSQ's ends),
                       or no level at 0 (1 bit).
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    if quantizer.method not in ON_GRID:
        raise QuantizeError(
            f"layer {name!r}: rounding cannot be learned on the grid of {quantizer.method!r}; make the policy with "
            f"weight='minmax:{quantizer.bits}' and choose the ranges with ptq.fit_weights"
        )
    quantizer.make_ready(layer.weight)
    if isinstance(quantizer, GridWeight):
        return quantizer.grid(), quantizer
    grid = quantizer.integers(layer.weight)[1]
    if grid.step != 1:
        raise QuantizeError(
            f"layer {name!r}: {quantizer.method}:1 has no level at 0, so no floor and ceil to choose from; use 2 bits "
            f"or more, or leave the rounding alone (learn_rounding=False)"
        )
    return grid, quantizer


def take_place(layer: QuantizedWeight, new: Quantizer) -> None:
    """Make ``new`` the weight quantizer of ``layer``, with the switch, mode and owner of the one before."""
    old = layer.weight_quantizer
    assert isinstance(old, Quantizer)
    new.enabled, new.owner = old.enabled, old.owner
    layer.weight_quantizer = new.train(old.training)


def install(layer: QuantizedWeight, name: str) -> AdaRound:
    """Return the ``AdaRound`` that now quantizes ``layer`` on the grid it had (the one it has, if it has one)."""
    grid, old = fixed_grid(layer, name)
    if isinstance(old, AdaRound):
        return old
    new = AdaRound(layer.weight, grid, bits=old.bits, axis=old.axis)
    take_place(layer, new)
    return new
