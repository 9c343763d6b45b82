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

from __future__ import annotations

from collections.abc import Mapping as Maps
from dataclasses import dataclass, field, replace
from numbers import Integral

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from hq_lib.crossbar.checks import CrossbarError, check_bit_width, check_choice, check_fraction


@dataclass(frozen=True)
class Mapping:
    """How weights become conductances. Defaults: pair, analog subtraction, scale per column, 128 x 128 tiles."""

    scheme: str = "pair"
    """"pair": two cells per weight, G+ - G-. "offset": one unsigned cell per slice, offset taken off afterwards."""
    scale: str = "column"
    """What fills the window: the largest weight of each "column", of the "layer", or "none" (the declared bits)."""
    cell_bits: int | None = None
    """Bits c per cell, 1..8; weights are cut into slices. None: continuous cells, one slice, no level rounding."""
    subtract: str = "analog"
    """"analog": G- (or a reference column) is subtracted before the converter. "digital": after it."""
    tile_rows: int = 128
    """Rows R of one array, 1..4096 (64 to 512 in practice); longer columns are split and added digitally."""
    tile_cols: int = 128
    """Columns of one array, >= 2; matters for wire resistance and cell counts only."""

    def __post_init__(self) -> None:
        check_choice(self.scheme, ("pair", "offset"), "scheme")
        check_choice(self.scale, ("column", "layer", "none"), "scale")
        check_choice(self.subtract, ("analog", "digital"), "subtract")
        if self.cell_bits is not None:
            check_bit_width(self.cell_bits, "cell_bits", high=8)
        whole = all(isinstance(size, Integral) for size in (self.tile_rows, self.tile_cols))
        if not (whole and 1 <= self.tile_rows <= 4096 and self.tile_cols >= 2):
            raise CrossbarError(f"a tile of {self.tile_rows} x {self.tile_cols} is not possible; use 64..512 rows")

    def encode(self, w_int: Tensor, w_bits: int) -> Plan:
        """The plan of cell levels for ``w_int`` (K, N), integers of ``w_bits`` bits."""
        encode = _encode_pair if self.scheme == "pair" else _encode_offset
        return encode(self, w_int.to(torch.int64), w_bits)


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
    def fractions(self) -> Tensor:
        """float64 (K, C, P): where in the window each cell should sit, 0 = G_min, 1 = G_max."""
        return self.levels / self.span[None, :, None]

    @property
    def signed(self) -> bool:
        """Whether a converter sees currents of both signs (analog subtraction)."""
        return self.mapping.subtract == "analog"

    def rows(self, rows: slice | Tensor) -> Plan:
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

    def plane_variance(self, variance: Tensor) -> Tensor:
        """(K, N, Q) variance in squared weight steps, from cell ``variance`` (K, C, P) in squared fractions.

        The reference column's share is returned by `reference_variance`, because all outputs of a tile share it.
        """
        steps = variance[:, : self.n_outputs] * self.span[None, : self.n_outputs, None] ** 2
        if self.mapping.scheme == "pair" and self.signed:
            return steps[..., 0::2] + steps[..., 1::2]
        return steps

    def reference_variance(self, variance: Tensor) -> Tensor | None:
        """(K, Q) variance of the reference column in squared fractions, or None where there is none."""
        return variance[:, self.n_outputs] if self.levels.shape[1] > self.n_outputs else None

    def combine(self, planes: Tensor) -> Tensor:
        """(..., N) weights, or outputs before the digital offset, from read ``planes`` (..., N, Q)."""
        return (planes.to(torch.float64) @ self.weight) / self.gain

    def decode(self, fractions: Tensor | None = None) -> Tensor:
        """float64 (K, N) weights that the cells hold; exactly the encoded integers for the planned fractions."""
        cells = self.fractions if fractions is None else fractions
        return self.combine(self.planes(cells)) - self.offset / self.gain


def _encode_pair(mapping: Mapping, w: Tensor, w_bits: int) -> Plan:
    peak, n = _peaks(mapping, w, w_bits), w.shape[1]
    gain = torch.ones(n, dtype=torch.int64)
    if mapping.cell_bits is None:
        levels, span, factors = torch.stack([w.clamp_min(0), (-w).clamp_min(0)], -1), peak, [1.0]
    else:
        n_slices = _slices(max(w_bits - 1, int(w.abs().max()).bit_length(), 1), mapping.cell_bits)
        if mapping.scale != "none":
            gain = ((2 ** (mapping.cell_bits * n_slices) - 1) // peak).clamp_min(1)
        positive, negative = (_digits((v * gain).clamp_min(0), mapping.cell_bits, n_slices) for v in (w, -w))
        levels = torch.stack([positive, negative], -1).flatten(2)
        span = torch.full((n,), 2**mapping.cell_bits - 1)
        factors = [2.0 ** (mapping.cell_bits * s) for s in range(n_slices)]
    if mapping.subtract == "digital":
        factors = [sign * factor for factor in factors for sign in (1.0, -1.0)]
    return _plan(mapping, levels, span, gain, torch.zeros(n), factors)


def _encode_offset(mapping: Mapping, w: Tensor, w_bits: int) -> Plan:
    peak, n = _peaks(mapping, w, w_bits), w.shape[1]
    gain = torch.ones(n, dtype=torch.int64)
    if mapping.cell_bits is None:
        offset, span, factors = peak, 2 * peak, [1.0]
        levels = (w + offset)[..., None]
        reference = torch.ones(w.shape[0], 1, 1), torch.tensor([2])  # mid conductance
    else:
        n_slices = _slices(max(w_bits, 2), mapping.cell_bits)
        half = 2 ** (mapping.cell_bits * n_slices - 1)
        if mapping.scale != "none":
            gain = ((half - 1) // peak).clamp_min(1)
        offset = torch.full((n,), half)
        levels = _digits(w * gain + offset, mapping.cell_bits, n_slices)
        span = torch.full((n,), 2**mapping.cell_bits - 1)
        factors = [2.0 ** (mapping.cell_bits * s) for s in range(n_slices)]
        column = torch.full((w.shape[0], 1), half)
        reference = _digits(column, mapping.cell_bits, n_slices), span[:1]
    if mapping.subtract == "analog":
        levels, span = torch.cat([levels, reference[0].to(levels.dtype)], 1), torch.cat([span, reference[1]])
        offset = torch.zeros(n)
    return _plan(mapping, levels, span, gain, offset, factors)


def _plan(mapping: Mapping, levels: Tensor, span: Tensor, gain: Tensor, offset: Tensor, factors: list[float]) -> Plan:
    f64 = torch.float64
    return Plan(mapping, levels.to(f64), span.to(f64), gain.to(f64), offset.to(f64), torch.tensor(factors, dtype=f64))


def _peaks(mapping: Mapping, w: Tensor, w_bits: int) -> Tensor:
    """int64 (N,): the weight magnitude that fills the window, >= 1."""
    if mapping.scale == "none":
        return torch.full((w.shape[1],), 2 ** (w_bits - 1)).clamp_min(1)
    column = w.abs().amax(0)
    return (column if mapping.scale == "column" else column.max().expand_as(column)).clamp_min(1)


def _slices(bits: int, cell_bits: int) -> int:
    return -(-bits // cell_bits)


def _digits(value: Tensor, cell_bits: int, n_slices: int) -> Tensor:
    """int64 (..., n_slices): base-2^cell_bits digits of non-negative ``value``, lowest first."""
    shifts = torch.arange(n_slices) * cell_bits
    return (value[..., None] >> shifts) & (2**cell_bits - 1)


OK, STUCK_LOW, STUCK_HIGH = 0, 1, 2


@dataclass(frozen=True)
class Faults:
    """Which cells do not obey programming; drift does not move them."""

    low_fraction: float = 0.0
    """Share of cells stuck at G_min, in [0, 1); 0.001 in MNSIM's default, 0.0175 on a 4-Mb test chip (often quoted)."""
    high_fraction: float = 0.0
    """Share of cells stuck at G_max, in [0, 1); 0.001 in MNSIM's default, 0.0904 on a 4-Mb test chip (often quoted)."""
    maps: Maps[str, np.ndarray] = field(default_factory=dict)
    """Measured maps by layer name, uint8 (rows, columns, planes) as `Cells.codes`; they replace the random draw."""

    def __post_init__(self) -> None:
        check_fraction(self.low_fraction, "low_fraction")
        check_fraction(self.high_fraction, "high_fraction")
        check_fraction(self.low_fraction + self.high_fraction, "low_fraction + high_fraction")
        for name, codes in self.maps.items():
            if codes.dtype != np.uint8 or codes.ndim != 3 or (codes > STUCK_HIGH).any():
                raise CrossbarError(f"fault map {name!r} must be uint8 (rows, columns, planes) of codes 0, 1, 2")

    def codes(self, name: str, shape: tuple[int, int, int], generator: Generator) -> Tensor:
        """uint8 codes of layer ``name``, ``shape`` = (rows, columns, planes): its map if there is one, else a draw."""
        if name in self.maps:
            if self.maps[name].shape != shape:
                raise CrossbarError(f"fault map {name!r} is {self.maps[name].shape}, the layer's cells are {shape}")
            return torch.from_numpy(self.maps[name].copy())
        draw = torch.rand(shape, generator=generator, dtype=torch.float64)
        stuck = (draw < self.low_fraction + self.high_fraction).to(torch.uint8) * STUCK_HIGH
        return torch.where(draw < self.low_fraction, STUCK_LOW, stuck).to(torch.uint8)


CHOICES = ("none", "partner", "rows", "both")


def partner_levels(plan: Plan, codes: Tensor) -> Tensor:
    """float64 (K, C, P) levels: those of ``plan`` where cells work, re-encoded around stuck ones elsewhere.

    With G+ stuck at level v and a wanted difference w, the partner gets clip(v - w, 0, span); likewise for G-.
    """
    _require_pair(plan)
    factors = _slice_factors(plan)
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
    _require_pair(plan)
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
    factors = _slice_factors(plan)
    wanted = (plan.levels[..., 0::2] - plan.levels[..., 1::2]) @ factors
    for p in torch.nonzero((codes != OK).flatten(1).any(1)).flatten().tolist():
        here = codes[p].expand_as(plan.levels)
        levels = partner_levels(plan, here) if partner else plan.levels
        stuck = plan.span[:, None] * (here == STUCK_HIGH)
        got = torch.where(here == OK, levels, stuck)
        error = (got[..., 0::2] - got[..., 1::2]) @ factors - wanted
        cost[p] = (error / plan.gain).square().sum(1)
    return cost


def _slice_factors(plan: Plan) -> Tensor:
    """float64 (S,): the factor of each slice, without signs."""
    return plan.weight.abs()[:: 1 if plan.signed else 2]


def _require_pair(plan: Plan) -> None:
    if plan.mapping.scheme != "pair":
        raise CrossbarError("fault-aware remapping works on pairs; use Mapping(scheme='pair') or remap='none'")
