"""Mapping: integer weights to cell levels and back, and around cells that are stuck.

Symbols: w integer weight (K, N), f_j integer gain of column j, d cell level in units of one weight step, D_j level at
G_max ("span"), c cell bits, s slice, O offset. Conductance of a cell: G = G_min + (d / D_j) (G_max - G_min).

    pair:    f_j w = sum_s 2^(c s) (d+_s - d-_s)            one of the two cells stays at G_min
    offset:  f_j w = sum_s 2^(c s) d_s - O_j                unsigned cells, zero weight at mid level

A fault map holds one code per cell: ``OK`` works, ``STUCK_LOW`` stays at G_min, ``STUCK_HIGH`` stays at G_max. Known
before programming, faults of pairs are mapped around without any cost at run time. Partner: every weight is encoded
again around its stuck cells, from the highest slice down; in a pair with one stuck cell the other is set to the best
remaining difference, and what a slice cannot give, the slices below it try to. Rows: within a tile any logical row may
use any physical row; the assignment of least squared weight error is found by the Hungarian method.
"""

from collections.abc import Mapping as Maps
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from hq_lib.crossbar.checks import FRACTION, OPTION, Bound, CellBits, Count, CrossbarError, Fraction, Settings


@dataclass(frozen=True)
class Mapping(Settings):
    """How weights become conductances. Defaults: pair, analog subtraction, scale per column, 128 x 128 tiles."""

    scheme: Literal["pair", "offset"] = "pair"
    """"pair": two cells per weight, G+ - G-. "offset": one unsigned cell per slice, offset taken off afterwards."""
    scale: Literal["column", "layer", "none"] = "column"
    """What fills the window: the largest weight of each "column", of the "layer", or "none" (the declared bits)."""
    cell_bits: CellBits | None = None
    """Bits c per cell, 1..8; weights are cut into slices. None: continuous cells, one slice, no level rounding."""
    subtract: Literal["analog", "digital"] = "analog"
    """"analog": G- (or a reference column) is subtracted before the converter. "digital": after it; what all cells
    conduct at G_min is taken to be gone before it all the same, so that converters need no range for it."""
    tile_rows: Annotated[int, Bound(">= 1 and <= 4096", whole=True)] = 128
    """Rows R of one array, 1..4096 (64 to 512 in practice); longer columns are split and added digitally."""
    tile_cols: Annotated[int, Bound(">= 2", whole=True)] = 128
    """Columns of one array, >= 2; matters for wire resistance and cell counts only."""
    cell_levels: Count | None = field(default=None, metadata=OPTION)
    """Levels of a cell above its lowest, as a bench's ``level_max``: a weight step takes a whole number of them, which
    rarely fill the window; a cell stuck high does. None: the largest weight fills it."""

    def tiles(self, shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
        """Rows and columns of each array that cells of ``shape`` fill, row of arrays by row of arrays."""
        starts = product(range(0, shape[0], self.tile_rows), range(0, shape[1], self.tile_cols))
        return [(slice(r, r + self.tile_rows), slice(c, c + self.tile_cols)) for r, c in starts]

    def encode(self, w_int: Tensor, w_bits: int) -> "Plan":
        """The plan of cell levels for ``w_int`` (K, N), integers of ``w_bits`` bits."""
        w, n, c, pair = w_int.to(torch.int64), w_int.shape[1], self.cell_bits, self.scheme == "pair"
        peak = w.abs().amax(0)  # the magnitude that fills the window
        if self.scale != "column":
            peak = torch.full((n,), 2 ** (w_bits - 1) if self.scale == "none" else int(peak.max()))
        peak, gain, n_slices, middle = peak.clamp_min(1), torch.ones(n, dtype=torch.int64), 1, 1
        if c is None:
            span, offset = (peak, 0 * peak) if pair else (2 * peak, peak)
        else:
            n_slices = -(-(max(w_bits - 1, int(w.abs().max()).bit_length(), 1) if pair else max(w_bits, 2)) // c)
            middle = 2 ** (c * n_slices - 1)
            if self.scale != "none":
                gain = (((2 * middle if pair else middle) - 1) // peak).clamp_min(1)
            span, offset = torch.full((n,), 2**c - 1), torch.full((n,), 0 if pair else middle)

        def cells(*parts: Tensor) -> Tensor:
            """(K, ., P) levels: base-2^c digits of non-negative ``parts``, lowest first, or the parts themselves."""
            shifts = torch.arange(n_slices) * (c or 0)
            digits = [part[..., None] >> shifts & (2**c - 1) if c else part[..., None] for part in parts]
            return torch.stack(digits, -1).flatten(2)

        signs = (1.0, -1.0) if pair and self.subtract == "digital" else (1.0,)
        factors = torch.tensor([sign * 2.0 ** ((c or 0) * s) for s in range(n_slices) for sign in signs])
        levels = cells((w * gain).clamp_min(0), (-w * gain).clamp_min(0)) if pair else cells(w * gain + offset)
        if not pair and self.subtract == "analog":  # the reference column sits at mid conductance
            if self.cell_levels:
                raise CrossbarError("a reference column needs a full window: use subtract='digital' with cell_levels")
            levels = torch.cat([levels, cells(torch.full((len(w), 1), middle))], 1)
            span, offset = torch.cat([span, span[:1] if c else torch.tensor([2])]), 0 * offset
        if self.cell_levels:
            if int(span.max()) > self.cell_levels:
                raise CrossbarError(
                    f"weights take levels up to {span.max()}, cells have {self.cell_levels}: slice them, "
                    f"cell_bits={(self.cell_levels + 1).bit_length() - 1}"
                )
            span = self.cell_levels / (self.cell_levels // span).to(torch.float64)
        return Plan(self, *(part.to(torch.float64) for part in (levels, span, gain, offset, factors)))


@dataclass(frozen=True)
class Plan:
    """Cell levels of one layer and how readings become weights again. P planes hold the slices and signs."""

    mapping: Mapping
    """The mapping that made it."""
    levels: Tensor
    """float64 (K, C, P), in weight steps, 0..span; C = N, or N + 1 with a reference column at the end."""
    span: Tensor
    """float64 (C,), weight steps at G_max."""
    gain: Tensor
    """float64 (N,), integers f_j >= 1: outputs are divided by it."""
    offset: Tensor
    """float64 (N,), O_j: sum(x) O_j is taken off digitally; zero unless "offset" with digital subtraction."""
    weight: Tensor
    """float64 (Q,), recombination factor of each read plane: +-2^(c s)."""

    @property
    def n_outputs(self) -> int:
        """Output columns N."""
        return self.gain.numel()

    @property
    def signed(self) -> bool:
        """Whether a converter sees currents of both signs (analog subtraction)."""
        return self.mapping.subtract == "analog"

    @property
    def slices(self) -> Tensor:
        """float64 (S,): the factor of each slice, without signs."""
        return self.weight.abs()[:: 1 if self.signed else 2]

    def rows(self, rows: slice | Tensor) -> "Plan":
        """The plan of some of its rows, or of its rows in another order."""
        return replace(self, levels=self.levels[rows])

    def planes(self, fractions: Tensor) -> Tensor:
        """(K, N, Q) levels in weight steps as the converters see them, from cell ``fractions`` (K, C, P)."""
        n, steps = self.n_outputs, fractions[:, : self.n_outputs] * self.span[None, : self.n_outputs, None]
        if self.mapping.scheme == "pair":
            return steps[..., 0::2] - steps[..., 1::2] if self.signed else steps
        if self.signed:  # reference column: its fraction, in each output column's own steps
            return steps - fractions[:, n:] * self.span[None, :n, None]
        return steps

    def plane_variance(self, variance: Tensor) -> tuple[Tensor, Tensor | None]:
        """((K, N, Q) variance in squared weight steps, (K, Q) of the reference column in squared fractions, or None).

        From cell ``variance`` (K, C, P) in squared fractions. All outputs of a tile share the reference column's.
        """
        n = self.n_outputs
        steps = variance[:, :n] * self.span[None, :n, None] ** 2
        if self.mapping.scheme == "pair" and self.signed:
            steps = steps[..., 0::2] + steps[..., 1::2]
        return steps, variance[:, n] if self.levels.shape[1] > n else None

    def combine(self, planes: Tensor) -> Tensor:
        """(..., N) weights, or outputs before the digital offset, from read ``planes`` (..., N, Q)."""
        return (planes.to(torch.float64) @ self.weight) / self.gain

    def decode(self, planes: Tensor) -> Tensor:
        """float64 (K, N) weights that the cells of ``planes`` (K, N, Q) hold; the encoded integers if exact."""
        return self.combine(planes) - self.offset / self.gain


OK, STUCK_LOW, STUCK_HIGH = 0, 1, 2


@dataclass(frozen=True)
class Faults(Settings):
    """Which cells do not obey programming; drift does not move them."""

    low_fraction: Fraction = 0.0
    """Share of cells stuck at G_min, in [0, 1); 0.001 in MNSIM's default, 0.0175 on a 4-Mb test chip (often quoted)."""
    high_fraction: Fraction = 0.0
    """Share of cells stuck at G_max, in [0, 1); 0.001 in MNSIM's default, 0.0904 on a 4-Mb test chip (often quoted)."""
    maps: Maps[str, np.ndarray] = field(default_factory=dict)
    """Measured maps by layer name, uint8 (rows, columns, planes) as `Cells.codes`; they replace the random draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        FRACTION.check(self.low_fraction + self.high_fraction, "low_fraction + high_fraction")
        for name, codes in self.maps.items():
            if codes.dtype != np.uint8 or codes.ndim != 3 or (codes > STUCK_HIGH).any():
                raise CrossbarError(f"fault map {name!r} must be uint8 (rows, columns, planes) of codes 0, 1, 2")

    def codes(self, name: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """uint8 codes of layer ``name``, ``shape`` = (rows, columns, planes): its map if there is one, else a draw."""
        if name in self.maps:
            if self.maps[name].shape != shape:
                raise CrossbarError(f"fault map {name!r} is {self.maps[name].shape}, the layer's cells are {shape}")
            return torch.from_numpy(self.maps[name].copy())
        draw = torch.rand(shape, generator=generator, dtype=torch.float64)
        stuck = (draw < self.low_fraction + self.high_fraction).to(torch.uint8) * STUCK_HIGH
        return torch.where(draw < self.low_fraction, STUCK_LOW, stuck).to(torch.uint8)


def partner_levels(plan: Plan, codes: Tensor) -> Tensor:
    """float64 (K, C, P) levels: those of ``plan`` where cells work, re-encoded around stuck ones elsewhere.

    With G+ stuck at level v and a wanted difference w, the partner gets clip(v - w, 0, span); likewise for G-.
    """
    factors = plan.slices
    rest = (plan.levels[..., 0::2] - plan.levels[..., 1::2]) @ factors  # (K, N), what is still to be given
    levels, span = plan.levels.clone(), plan.span
    for s in range(len(factors) - 1, -1, -1):
        wanted = rest / factors[s]
        wanted = wanted.trunc() if plan.mapping.cell_bits is not None else wanted
        plus, minus = _pair_around(wanted, span, codes[..., 2 * s], codes[..., 2 * s + 1])
        levels[..., 2 * s], levels[..., 2 * s + 1] = plus, minus
        rest = rest - (plus - minus) * factors[s]
    return levels


def _pair_around(wanted: Tensor, span: Tensor, code_plus: Tensor, code_minus: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (plus, minus) whose difference is nearest to ``wanted`` (K, N) given the fault codes of both cells."""
    wanted = torch.minimum(torch.maximum(wanted, -span), span)
    plus, minus = wanted.clamp_min(0.0), (-wanted).clamp_min(0.0)
    v_plus, v_minus = span * (code_plus == STUCK_HIGH), span * (code_minus == STUCK_HIGH)
    free_plus = torch.where(code_minus == OK, plus, torch.minimum((v_minus + wanted).clamp_min(0.0), span))
    free_minus = torch.where(code_plus == OK, minus, torch.minimum((v_plus - wanted).clamp_min(0.0), span))
    return torch.where(code_plus == OK, free_plus, v_plus), torch.where(code_minus == OK, free_minus, v_minus)


def row_order(plan: Plan, codes: Tensor, *, partner: bool) -> Tensor:
    """int64 (K,): the logical row that each physical row should hold; rows never leave their tile.

    Args:
        plan: levels in logical order.
        codes: (K, C, P) fault codes in physical order.
        partner: whether weights will be re-encoded around faults (then the remaining error counts).
    """
    order = torch.arange(plan.levels.shape[0])
    for start in range(0, len(order), plan.mapping.tile_rows):
        rows = slice(start, start + plan.mapping.tile_rows)
        if bool((codes[rows] != OK).any()):
            _, logical = linear_sum_assignment(_row_costs(plan.rows(rows), codes[rows], partner).numpy())
            order[rows] = start + torch.from_numpy(logical)
    return order


def _row_costs(plan: Plan, codes: Tensor, partner: bool) -> Tensor:
    """float64 (physical, logical): squared weight error if that logical row sits on that physical row."""
    cost = torch.zeros(len(codes), len(codes), dtype=torch.float64)
    factors = plan.slices
    wanted = (plan.levels[..., 0::2] - plan.levels[..., 1::2]) @ factors
    for p in torch.nonzero((codes != OK).flatten(1).any(1)).flatten().tolist():
        here = codes[p].expand_as(plan.levels)
        levels = partner_levels(plan, here) if partner else plan.levels
        stuck = plan.span[:, None] * (here == STUCK_HIGH)
        got = torch.where(here == OK, levels, stuck)
        error = (got[..., 0::2] - got[..., 1::2]) @ factors - wanted
        cost[p] = (error / plan.gain).square().sum(1)
    return cost
