"""Execution: one loop for converted reading, over input steps and tiles; without a converter it collapses to a matmul.

    collapsed   y = x @ W_eff                                              no converter, or a provably lossless one
    analog      y = sum_t  ADC(x_t @ D_t)                                  all input bits in one step
    serial      y = sum_b factor_b sum_t sum_q factor_q ADC(x_bt @ D_tq)   one step per input digit b

Converter steps are divided into the matrices beforehand, so a product is already in codes. Currents are float32; codes
are integers and sum exactly while below 2^24, otherwise (and for whole-number matrices that need it) float64 is used.
Where nothing but gains, offsets and state-independent noise stands between cells and codes, cells are whole numbers of
15 bits and a sign of their column's largest (`on_whole_grid`), so that sums are exact in any order, and C reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from hq_lib.crossbar.circuit import Adc
from hq_lib.crossbar.native import GridTile, NativeReader, Normals, library
from hq_lib.crossbar.operands import Operand, Rows, Step

_FLOAT64_BITS = 52  # of a sum; what inputs and their number leave is kept per entry
_LEAST_GRID_BITS = 20


class Variance:
    """Read variance of a matrix of cells, and what it makes of driven inputs.

    Where all cells of a column have the same variance (state-independent noise), the output's spread is
    sqrt(sum x^2) times a row of numbers, and the second product is one column instead of a matrix.

    Args:
        matrix: (K, M), squared output units per squared input step.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        equal = len(matrix) > 0 and bool((matrix == matrix[:1]).all())
        self._row = matrix[0].sqrt() if equal else None

    @property
    def row(self) -> Tensor | None:
        """(M,) standard deviations where all cells of a column have the same, else None."""
        return self._row

    @property
    def n_columns(self) -> int:
        """Columns M."""
        return self.matrix.shape[1]

    def scale_(self, normals: Tensor, times: Callable[[Tensor], Tensor]) -> Tensor:
        """``normals`` (rows, M), multiplied in place by the standard deviations of the outputs.

        Args:
            times: multiplies the squares of the driven inputs by a (K, .) matrix.
        """
        if self._row is None:
            return normals.mul_(times(self.matrix).sqrt_())
        return normals.mul_(times(self.matrix.new_ones(len(self.matrix), 1)).sqrt_()).mul_(self._row)


@dataclass(frozen=True, eq=False)
class Tile:
    """The part of a layer that sits in one row of arrays."""

    start: int
    """First logical row it holds."""
    matrix: Tensor
    """(R, Q N), converter codes per input step; plane-major columns."""
    shift: Tensor | None
    """(Q N,), converter offsets in codes, or None."""
    variance: Variance | None
    """(R, Q N [+ Q]), squared codes per squared input step; the last Q columns are the reference column's, in
    squared fractions of its window."""
    reference: Tensor | None = None
    """(Q, N), codes per fraction of the reference column's noise, or None."""
    _ready: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def currents(self, driven: Operand) -> Tensor:
        """(rows, Q N) noiseless currents of driven inputs, in codes."""
        product = self._times(driven, "matrix", self.matrix)
        return product if self.shift is None else product.add_(self.shift)

    def add_noise_(self, codes: Tensor, power: Callable[[], Operand], normals: Callable[[], Normals]) -> None:
        """Nothing; adds one draw of read noise to ``codes`` (rows, Q N).

        Args:
            power: gives the squares of the driven inputs; ``normals`` the sequence to draw from.
        """
        if self.variance is None:
            return
        drawn = normals().draw(power().n_rows, self.variance.n_columns, self.matrix.dtype)
        noise = self.variance.scale_(drawn, lambda matrix: self._times(power(), "variance", matrix))
        codes += noise[:, : codes.shape[1]]
        if self.reference is not None:
            codes -= (noise[:, codes.shape[1] :, None] * self.reference).flatten(1)

    def _times(self, driven: Operand, name: str, matrix: Tensor) -> Tensor:
        key = (name, *driven.layout)
        if key not in self._ready:
            self._ready[key] = driven.prepare(matrix, self.start)
        return driven.times(self._ready[key], self.start, len(matrix))


@dataclass(frozen=True, eq=False)
class Reader:
    """Everything needed to read a layer through converters."""

    tiles: list[Tile]
    """Row tiles, top to bottom."""
    steps: list[Step]
    """Input steps."""
    coefficient: Tensor
    """float64 (Q, N), accumulator units per code."""
    offset: Tensor
    """float64 (N,), taken off once per unit of sum(x)."""
    adc: Adc | None
    """The converter; None reads the currents as they are."""
    signed: bool
    """Whether currents have both signs."""
    drive: Callable[[Tensor], Tensor]
    """What a row is driven with for digits of a step."""
    grid: tuple[GridTile, ...] | None = None
    """The same tiles with cells on whole numbers, where that is how they are read."""
    power: Callable[[Tensor], Tensor] | None = None
    """What multiplies read variances for integer inputs; None: the squares of what is driven."""
    gain: Callable[[Operand], Tensor | None] = lambda x: None
    """Powers of two by which rows of inputs are driven, see `Drive.gain`."""

    @property
    def n_conversions(self) -> int:
        """Conversions per row of inputs."""
        return len(self.tiles) * len(self.steps) * self.coefficient.numel() if self.adc else 0

    @property
    def native(self) -> bool:
        """Whether the library reads."""
        return self._native is not None

    @cached_property
    def _native(self) -> NativeReader | None:
        """The compiled reading of `grid`, where there is a compiler."""
        if self.grid is None or self.adc is None or library() is None:
            return None
        return NativeReader(self.grid, self.steps, self.coefficient, *self.adc.codes(self.signed))

    def read(self, x: Operand, noise: Callable[[int, int], Normals]) -> tuple[Tensor, int]:
        """((rows, N) outputs, number of saturated conversions) for integer inputs ``x``.

        Args:
            noise: gives the normals of (step, tile); each is consumed in row order only.
        """
        if self._native is not None:
            y, n_saturated = self._native.read(x, lambda b, t, out: noise(b, t).draw_(out))
        else:
            total, n_saturated = self._totals(x, noise)
            planes = total.view(len(total), *self.coefficient.shape).unbind(1)
            y = planes[0] * self.coefficient[0]
            for plane, coefficient in zip(planes[1:], self.coefficient[1:], strict=True):
                y += plane * coefficient
        if bool((self.offset != 0).any()):
            ones = torch.ones(x.n_columns, 1, dtype=torch.float64)
            y -= x.product(ones) * self.offset
        return y, n_saturated

    def _totals(self, x: Operand, noise: Callable[[int, int], Normals]) -> tuple[Tensor, int]:
        """(codes (rows, Q N) summed over steps and tiles, number of saturated conversions), by torch."""
        dtype, n_saturated = self.tiles[0].matrix.dtype, 0
        if (gain := self.gain(x)) is not None:
            gain = gain.to(dtype)
            x = Rows(x.rows().to(dtype) * gain)
        total = torch.zeros(x.n_rows, self.coefficient.numel(), dtype=self._sum_dtype(dtype))
        for b, step in enumerate(self.steps):
            driven = x.map(lambda v, step=step: self.drive(step.digits(v).to(dtype)))
            power = cache(lambda d=driven, step=step: self._power(x, d, step))
            for t, tile in enumerate(self.tiles):
                codes = self._grid_codes(x, step, t) if self.grid else tile.currents(driven)
                tile.add_noise_(codes, power, lambda b=b, t=t: noise(b, t))
                if self.adc is not None:
                    n_saturated += self.adc.convert_(codes, self.signed)
                total.add_(codes if gain is None else codes / gain, alpha=step.factor)
        return total, n_saturated

    def _power(self, x: Operand, driven: Operand, step: Step) -> Operand:
        """The squares by which read variances are multiplied, for inputs ``x`` that drive ``driven``."""
        if self.power is not None:
            return x.map(lambda v: self.power(v).to(self.tiles[0].matrix.dtype))  # type: ignore[misc]
        return driven if step.mask == 1 else driven.map(torch.square)

    def _grid_codes(self, x: Operand, step: Step, t: int) -> Tensor:
        """float32 (rows, Q N): what the library computes of tile ``t`` before noise, in its order of operations."""
        assert self.grid is not None
        tile, driven = self.grid[t], x.map(lambda v: step.digits(v).to(torch.float64))
        sums = driven.times(tile.cells.to(torch.float64), tile.start, len(tile.cells))  # exact
        codes = sums.to(torch.float32).mul_(tile.factor)
        return codes if tile.shift is None else codes.add_(tile.shift)

    def _sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.adc is None:
            return torch.float64
        largest = max(abs(code) for code in self.adc.codes(self.signed))
        bound = largest * len(self.tiles) * sum(abs(step.factor) for step in self.steps)
        return dtype if bound < 2**24 else torch.float64


def on_exact_grid(matrix: Tensor, largest: float) -> Tensor:
    """``matrix`` (K, M) on the finest grid on which float64 sums with whole-number inputs up to ``largest`` are exact,
    hence the same for any order of summation, batch size and thread count; never coarser than 2^-20 of its top."""
    top = float(matrix.abs().max()) if matrix.numel() else 0.0
    if top == 0.0:
        return matrix
    bits = max(_FLOAT64_BITS - math.ceil(math.log2(max(largest, 1.0) * len(matrix))), _LEAST_GRID_BITS)
    unit = 2.0 ** (math.frexp(top)[1] - bits)
    return (matrix / unit).round_() * unit


def on_whole_grid(matrix: Tensor, largest: float, most: int) -> tuple[Tensor, Tensor] | None:
    """(whole numbers (K, M), units (M,)) whose product is ``matrix``, or nearest to it; None where that cannot be.

    Whole numbers keep the unit 1; others get ``most`` steps to their column's largest, and fewer where sums with inputs
    up to ``largest`` would leave 31 bits.
    """
    top = matrix.abs().amax(0).clamp_min(1e-30)
    unit = torch.ones_like(top) if is_whole(matrix) else top / most
    room = 2.0**31 - 1 - largest * len(matrix)  # rounding may add half a step to every cell
    unit = torch.maximum(unit, matrix.abs().sum(0) * largest / room)
    cells = (matrix / unit).round_()
    exact = not is_whole(matrix) or torch.equal(cells * unit, matrix)
    return (cells, unit) if room > 0 and exact and float(cells.abs().max()) <= most else None


def made_whole(planes: Tensor) -> Tensor:
    """``planes`` with entries within 1e-9 of a whole number made whole: undoes the round trip through siemens."""
    whole = planes.round()
    return torch.where((planes - whole).abs() < 1e-9, whole, planes)


def is_whole(values: Tensor) -> bool:
    """Whether every entry is a whole number."""
    return bool((values == values.round()).all())
