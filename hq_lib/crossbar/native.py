"""The compiled library (``src``): converted reading in one pass that gathers, sums, rounds, clips, counts and combines.

It is compiled when first needed, as the C runtime is. Without a compiler torch does the same, to the same bits and
slower; that is said once. Random streams: one per purpose, so no draw depends on batch size, thread count or what other
layers drew. Programming, drift, faults and converter errors are drawn once from torch generators; read noise is drawn
for every multiplication and has a faster sampler of its own, `Normals`.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional

from hq_lib.crossbar.operands import Operand, Patches, Rows, Stencil, Step
from hq_lib.deploy.c.build import CompilerError, compiled

SOURCES = Path(__file__).resolve().parent / "src"
LANES = 16
_CHUNK = 1 << 20  # numbers of noise that are held at once


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


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None, said once, where there is no C compiler."""
    try:
        path = compiled("libhqx.so", SOURCES)
    except CompilerError as error:
        warnings.warn(f"crossbars are read by torch, to the same bits but many times slower: {error}", stacklevel=2)
        return None
    found = ctypes.CDLL(str(path))
    found.hqx_read.restype = c_int64
    found.hqx_read.argtypes = [
        POINTER(_Shape), c_void_p, c_int64, c_int64, POINTER(_Tile), POINTER(_Step), c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    found.hqx_normals.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    found.hqx_normals.restype = None
    found.hqx_round.argtypes = [c_void_p, c_int64, c_void_p]
    return found


def rounded(raw: Tensor, out: Tensor) -> bool:
    """Whether all of ``raw`` is finite; fills ``out``, float64 of its shape, with it, rounded to whole numbers."""
    found = library() if raw.dtype is torch.float32 and raw.is_contiguous() and out.is_contiguous() else None
    if found is not None:
        return bool(found.hqx_round(raw.data_ptr(), raw.numel(), out.data_ptr()))
    out.copy_(raw).round_()
    return bool(torch.isfinite(out.sum()))


@dataclass(frozen=True, eq=False)
class GridTile:
    """One row of arrays with its cells on whole numbers: codes = (digits @ cells) factor + shift + noise."""

    start: int
    """First logical row."""
    cells: Tensor
    """(R, M) whole numbers of at most 15 bits and a sign, any dtype."""
    factor: Tensor
    """float32 (M,): codes per whole number."""
    shift: Tensor | None
    """float32 (M,), converter offsets in codes, or None."""
    spread: Tensor | None
    """float32 (M,), noise in codes per root of the sum of squared digits, or None."""


class NativeReader:
    """`GridTile`s read by the library.

    Args:
        tiles, steps: what is read, and with which digits of the inputs.
        coefficient: float64 (Q, N), outputs per code.
        low, high: codes.
    """

    def __init__(
        self, tiles: Sequence[GridTile], steps: Sequence[Step], coefficient: Tensor, low: int, high: int
    ) -> None:
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
            return found.hqx_read(
                shape, images.data_ptr(), first + start, size, self._tiles, self._steps, at,
                self._coefficient.data_ptr(), y[start:].data_ptr(),
            )  # fmt: skip

        starts = range(0, n, share)
        if len(starts) == 1:
            counts = [part(0)]
        else:
            with ThreadPoolExecutor(len(starts)) as pool:
                counts = list(pool.map(part, starts))
        if min(counts) < 0:
            raise MemoryError("reading a crossbar layer found no memory")
        return sum(counts)

    def _shape(self, x: Operand) -> tuple[_Shape, Tensor]:
        """Geometry, and the padded images as int16 (unsigned 16-bit inputs wrap; their digits do not)."""
        if isinstance(x, Patches):
            (py, px), window = x.window.padding, x.window
            images = functional.pad(x.values.to(torch.int16), (px, px, py, py)).contiguous()
        else:
            assert isinstance(x, Rows)
            window, images = Stencil((1, 1)), x.values.to(torch.int16).contiguous()[:, :, None, None]
        out = Stencil(window.kernel, window.stride, (0, 0), window.dilation).out_size(*images.shape[2:])
        geometry = (*images.shape[1:], *window.kernel, *window.stride, *window.dilation, *out)
        n_planes, n_outputs = self._coefficient.shape
        sizes = (len(self._tiles), len(self._steps), n_planes * n_outputs, n_outputs, int(self._one_bit))
        return _Shape(*geometry, *sizes, *self._codes), images

    def _packed(self, tile: GridTile) -> _Tile:
        n_rows, n_columns = tile.cells.shape
        n_fours, n_blocks = 4 * -(-n_rows // 16), -(-n_columns // LANES)
        cells = functional.pad(tile.cells.to(torch.int32), (0, n_blocks * LANES - n_columns, 0, 4 * n_fours - n_rows))
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


_LANES = 1 << 12
_PER_LANE = 4  # numbers per step of a lane
_POINTS_BITS = 12


def stream(seed: int, *names: object) -> Generator:
    """A CPU generator that depends only on ``seed`` and ``names`` (layer, purpose, tile...), through SHA-256."""
    key = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


class Normals:
    """An endless sequence of standard normals; drawing it in one piece or in many gives the same numbers.

    4,096 xorshift64 generators (Marsaglia 2003, shifts 13, 7, 17) step side by side. Of each step four times 12 bits
    pick points a, b, c, d of 4,096 equally likely quantiles of a normal distribution of variance 1/2, which give the
    numbers a + b, a - b, c + d, c - d: sum and difference of two independent normals are independent normals. Several
    times faster than a Box-Muller transform. Departures from true normals: |z| stays below 5.2 and the fourth moment is
    3 within 1 %.

    Args:
        generator: seeds the lanes.
    """

    _points: Tensor | None = None

    def __init__(self, generator: Generator) -> None:
        self._state = torch.randint(1, 2**62, (_LANES,), generator=generator)
        self._block, self._left = torch.empty(_PER_LANE * _LANES), 0
        if Normals._points is None:
            Normals._points = _normal_points()

    def draw(self, n_rows: int, n_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n_rows, n_columns) of the sequence, row by row; a new tensor."""
        return self.draw_(torch.empty(n_rows, n_columns)).to(dtype)

    def draw_(self, out: Tensor) -> Tensor:
        """``out``, contiguous float32, filled with the sequence's next numbers."""
        flat, done, size = out.view(-1), 0, len(self._block)
        while done < len(flat):
            if not self._left and len(flat) - done >= size:
                self._fill_(flat[done : done + size])
                done += size
                continue
            if not self._left:
                self._fill_(self._block)
                self._left = size
            first, taken = size - self._left, min(self._left, len(flat) - done)
            flat[done : done + taken] = self._block[first : first + taken]
            done, self._left = done + taken, self._left - taken
        return out

    def _fill_(self, out: Tensor) -> None:
        """Nothing; one step of all lanes fills ``out``, float32 (16384,)."""
        state = self._state
        assert Normals._points is not None
        if (found := library()) is not None:
            found.hqx_normals(state.data_ptr(), _LANES, Normals._points.data_ptr(), out.data_ptr())
            return
        state ^= state << 13
        state ^= (state >> 7) & (2**57 - 1)  # a logical shift of a signed integer
        state ^= state << 17
        a, b, c, d = (Normals._points[(state >> shift) & (2**_POINTS_BITS - 1)] for shift in (16, 28, 40, 52))
        out.copy_(torch.stack([a + b, a - b, c + d, c - d], 1).flatten())


def _normal_points() -> Tensor:
    """float32 (4096,): the quantiles (i + 1/2) / 4096 of a normal distribution, scaled to the variance 1/2."""
    n = 2**_POINTS_BITS
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return (z / (2 * z.square().mean()).sqrt()).to(torch.float32)
