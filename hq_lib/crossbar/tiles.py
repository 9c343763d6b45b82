"""Tiles: the part of a layer that sits in one row of arrays, and the grids on which its sums are exact.

Where nothing but gains, offsets and state-independent noise stands between cells and codes, cells are whole numbers of
15 bits and a sign of their column's largest (`on_whole_grid`), so that sums are exact in any order, and C reads them.
Elsewhere converter steps are divided into the matrix beforehand, so that a product is already in codes.
"""

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar.circuit import Step
from hq_lib.crossbar.native import Normals, library
from hq_lib.crossbar.operands import Operand, Stencil

LANES = 16
_CHUNK = 1 << 20  # numbers of noise that are held at once
_FLOAT64_BITS = 52  # of a sum; what inputs and their number leave is kept per entry
_LEAST_GRID_BITS = 20


@dataclass(frozen=True, eq=False)
class Tile:
    """A matrix of cells and what its reading adds: code = (x @ matrix) factor + shift + noise."""

    start: int
    """First logical row it holds."""
    matrix: Tensor
    """(R, Q N), output units (converter codes) per input step, plane-major columns; with ``factor`` whole numbers."""
    factor: Tensor | None = None
    """float32 (Q N,): codes per whole number of the matrix; None: 1."""
    shift: Tensor | None = None
    """(Q N,), converter offsets in codes, or None."""
    variance: Tensor | None = None
    """(R, Q N [+ Q]), squared codes per squared input step; the last Q columns are the reference column's, in
    squared fractions of its window."""
    spread: Tensor | None = None
    """(Q N [+ Q],), roots of the variances where all cells of a column have the same: then the second product, that of
    squared inputs, is one column instead of a matrix. None: they differ."""
    reference: Tensor | None = None
    """(Q, N), codes per fraction of the reference column's noise, or None."""
    _ready: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def currents(self, driven: Operand) -> Tensor:
        """(rows, Q N) noiseless currents of driven inputs, in codes."""
        product = self._times(driven, "matrix", self.matrix)
        if self.factor is not None:
            product = product.to(torch.float32).mul_(self.factor)
        return product if self.shift is None else product.add_(self.shift)

    def add_noise_(self, codes: Tensor, power: Callable[[], Operand], normals: Callable[[], Normals]) -> Tensor:
        """``codes`` (rows, Q N), with one draw of read noise added.

        Args:
            power: gives the squares of the driven inputs; ``normals`` the sequence to draw from.
        """
        if self.variance is None:
            return codes
        squares = power()
        noise = normals().draw(squares.n_rows, self.variance.shape[1], self.variance.dtype)
        if self.spread is None:
            noise.mul_(self._times(squares, "variance", self.variance).sqrt_())
        else:
            ones = self.variance.new_ones(len(self.variance), 1)
            noise.mul_(self._times(squares, "ones", ones).sqrt_()).mul_(self.spread)
        codes += noise[:, : codes.shape[1]]
        if self.reference is not None:
            codes -= (noise[:, codes.shape[1] :, None] * self.reference).flatten(1)
        return codes

    def _times(self, driven: Operand, name: str, matrix: Tensor) -> Tensor:
        key = (name, *driven.layout)
        if key not in self._ready:
            self._ready[key] = driven.prepare(matrix, self.start)
        driven = driven.map(lambda v: v.to(matrix.dtype)) if driven.values.dtype is not matrix.dtype else driven
        return driven.times(self._ready[key], self.start, matrix.shape[0])


def spread_of(variance: Tensor) -> Tensor | None:
    """(M,) standard deviations where all cells of a column of ``variance`` (K, M) have the same, else None."""
    return variance[0].sqrt() if bool((variance == variance[:1]).all()) else None


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


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in (
            "channels", "height", "width", "kernel_y", "kernel_x", "stride_y", "stride_x", "dilation_y", "dilation_x",
            "out_y", "out_x", "n_tiles", "n_steps", "n_columns", "n_outputs", "one_bit",
        )),
        ("low", c_float), ("high", c_float),
    ]  # fmt: skip


class _Tile(ctypes.Structure):
    _fields_ = [
        ("start", c_int64), ("n_rows", c_int64), ("cells", c_void_p), ("factor", c_void_p), ("shift", c_void_p),
        ("spread", c_void_p),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [("shift", c_int64), ("mask", c_int64), ("factor", c_float)]


class NativeReader:
    """Tiles with cells on whole numbers, read by the library.

    Args:
        tiles, steps: what is read, and with which digits of the inputs.
        coefficient: float64 (Q, N), outputs per code.
        low, high: codes.
    """

    def __init__(self, tiles: list[Tile], steps: list[Step], coefficient: Tensor, low: int, high: int) -> None:
        self._steps = (_Step * len(steps))(*(_Step(step.shift, step.mask, step.factor) for step in steps))
        self._one_bit = all(step.mask == 1 for step in steps)
        self._coefficient, self._codes, self._noisy = coefficient.contiguous(), (low, high), tiles[0].spread is not None
        self._kept: list[Tensor] = []  # what C points at
        self._tiles = (_Tile * len(tiles))(*(self._packed(tile) for tile in tiles))

    def read(self, x: Operand, fill: Callable[[int, int, Tensor], object]) -> tuple[Tensor, int]:
        """(float64 (rows, N) outputs before the digital offset, number of saturated conversions) for integers ``x``.

        Args:
            fill: puts the next numbers of the sequence of (step, tile) into a (rows, columns) tensor.
        """
        shape, images = self._shape(x)
        n_columns, n_arrays = shape.n_columns, shape.n_steps * shape.n_tiles
        y = torch.empty(x.n_rows, shape.n_outputs, dtype=torch.float64)
        chunk = max(32, _CHUNK // (n_columns * n_arrays)) if self._noisy else max(x.n_rows, 1)
        room, n_saturated = torch.empty(n_arrays if self._noisy else 0, chunk, n_columns), 0
        for first in range(0, x.n_rows, chunk):
            n, drawn = min(chunk, x.n_rows - first), None
            if self._noisy:
                drawn = [array[:n] for array in room]
                for i, array in enumerate(drawn):
                    fill(i // shape.n_tiles, i % shape.n_tiles, array)
            n_saturated += self._call(shape, images, first, n, drawn, y[first : first + n])
        return y, n_saturated

    def _call(self, shape: _Shape, images: Tensor, first: int, n: int, drawn: list[Tensor] | None, y: Tensor) -> int:
        """Saturations of rows first..first+n, shared out among torch's threads; fills ``y``."""
        found = library()
        assert found is not None
        share = -(-n // torch.get_num_threads())

        def part(start: int) -> int:
            size = min(share, n - start)
            at = None if drawn is None else (c_void_p * len(drawn))(*(z[start:].data_ptr() for z in drawn))
            places = self._tiles, self._steps, at, self._coefficient.data_ptr(), y[start:].data_ptr()
            return found.hqx_read(ctypes.byref(shape), images.data_ptr(), first + start, size, *places)

        starts = range(0, n, share)
        with ThreadPoolExecutor(len(starts)) as pool:
            counts = list(pool.map(part, starts) if len(starts) > 1 else map(part, starts))
        if min(counts) < 0:
            raise MemoryError("reading a crossbar layer found no memory")
        return sum(counts)

    def _shape(self, x: Operand) -> tuple[_Shape, Tensor]:
        """Geometry, and the padded images as int16 (unsigned 16-bit inputs wrap; their digits do not)."""
        window = x.window or Stencil((1, 1))
        values = x.values if x.window else x.values[:, :, None, None]
        (py, px), out = window.padding, window.out_size(*values.shape[2:])
        images = functional.pad(values.to(torch.int16), (px, px, py, py)).contiguous()
        geometry = (*images.shape[1:], *window.kernel, *window.stride, *window.dilation, *out)
        n_planes, n_outputs = self._coefficient.shape
        sizes = (len(self._tiles), len(self._steps), n_planes * n_outputs, n_outputs, int(self._one_bit))
        return _Shape(*geometry, *sizes, *self._codes), images

    def _packed(self, tile: Tile) -> _Tile:
        n_rows, n_columns = tile.matrix.shape
        n_fours, n_blocks = 4 * -(-n_rows // 16), -(-n_columns // LANES)
        cells = functional.pad(tile.matrix.to(torch.int32), (0, n_blocks * LANES - n_columns, 0, 4 * n_fours - n_rows))
        cells = cells.view(n_fours, 4, n_blocks, LANES)
        if self._one_bit:
            subsets = (torch.arange(16)[:, None] >> torch.arange(4) & 1).to(torch.int32)
            packed = torch.einsum("sr,frbl->bfsl", subsets, cells).contiguous()
        else:
            pairs = cells.view(2 * n_fours, 2, n_blocks, LANES)
            packed = pairs.permute(2, 0, 3, 1).to(torch.int16).contiguous()
        columns = [self._column(part, n_blocks * LANES) for part in (tile.factor, tile.shift, tile.spread)]
        self._kept.append(packed)
        return _Tile(tile.start, n_rows, packed.data_ptr(), *columns)

    def _column(self, values: Tensor | None, width: int) -> int | None:
        if values is None:
            return None
        self._kept.append(functional.pad(values.to(torch.float32), (0, width - values.numel())).contiguous())
        return self._kept[-1].data_ptr()
