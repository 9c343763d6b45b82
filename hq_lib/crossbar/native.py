"""The compiled library (``src``): converted reading in one pass that gathers, sums, rounds, clips, counts and combines;
for layers that are one product, one pass before it (`channels_last`) and one after it (`rounded`).

It is compiled when first needed, as the C runtime is. Without a compiler torch does the same, to the same bits and
slower; that is said once. Random streams: one per purpose, so no draw depends on batch size, thread count or what other
layers drew. Programming, drift, faults and converter errors are drawn once from torch generators; read noise is drawn
for every multiplication and has a faster sampler of its own, `Normals`.
"""

import ctypes
import hashlib
import warnings
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

from hq_lib.deploy.c.runtime import CompilerError, compiled

SOURCES = Path(__file__).resolve().parent / "src"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None, said once, where there is no C compiler."""
    try:
        path = compiled("libhqx.so", ("read.c",), "-shared", folder=SOURCES)
    except CompilerError as error:
        warnings.warn(f"crossbars are read by torch, to the same bits but many times slower: {error}", stacklevel=2)
        return None
    found = ctypes.CDLL(str(path))
    found.hqx_read.restype = c_int64
    found.hqx_read.argtypes = [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 5]
    found.hqx_normals.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    found.hqx_normals.restype = None
    found.hqx_round.argtypes = [c_void_p, c_int64, c_void_p]
    found.hqx_channels_last.argtypes = [c_void_p, *[c_int64] * 3, c_void_p]
    found.hqx_channels_last.restype = None
    return found


def rounded(raw: Tensor, out: Tensor) -> bool:
    """Whether all of ``raw`` is finite; fills ``out``, float64 of its shape, with it, rounded to whole numbers."""
    found = library() if raw.dtype is torch.float32 and raw.is_contiguous() and out.is_contiguous() else None
    if found is not None:
        return bool(found.hqx_round(raw.data_ptr(), raw.numel(), out.data_ptr()))
    out.copy_(raw).round_()
    return bool(torch.isfinite(out.sum()))


def channels_last(images: Tensor) -> Tensor:
    """float32 (B, C, H, W) of integer ``images``, the channels of a place side by side, as convolutions are fastest."""
    found = library() if images.dtype is torch.uint8 and images.is_contiguous() else None
    if found is None:
        return images.contiguous(memory_format=torch.channels_last).to(torch.float32)
    out = torch.empty(images.shape, memory_format=torch.channels_last)
    n_images, n_channels, height, width = images.shape
    found.hqx_channels_last(images.data_ptr(), n_images, n_channels, height * width, out.data_ptr())
    return out


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
