"""Operands: loaded weights, and the inputs they multiply, as plain rows or as patches of images."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar import checks
from hq_lib.crossbar.checks import CrossbarError, Numbers, as_integers, check_range
from hq_lib.crossbar.native import channels_last
from hq_lib.integer.arithmetic import n_windows


@dataclass(frozen=True, eq=False)
class Handle:
    """A loaded weight matrix."""

    name: str
    """Layer name, unique in its engine; random streams and records are keyed by it."""
    w_int: Tensor
    """int32 (K, N) weights."""
    w_scale: Tensor
    """float64 () or (N,): real units per weight step; carried along for reports, never used in the arithmetic."""
    w_bits: int
    """Declared weight bits: -2^(b-1)..2^(b-1)-1, and -1..1 for one bit."""
    x_bits: int
    """Declared input bits."""
    x_signed: bool
    """Inputs lie in -2^(b-1)..2^(b-1)-1 (True) or 0..2^b-1 (False)."""

    @property
    def x_range(self) -> tuple[int, int]:
        """(smallest, largest) input."""
        half = 2 ** (self.x_bits - 1)
        return (-half, half - 1) if self.x_signed else (0, 2 * half - 1)

    @property
    def digest(self) -> str:
        """SHA-256 of weights and declared bits: equal for equal layers, whatever their name."""
        text = f"{tuple(self.w_int.shape)} {self.w_bits} {self.x_bits} {self.x_signed} "
        return hashlib.sha256(text.encode() + self.w_int.contiguous().numpy().tobytes()).hexdigest()


def make_handle(w_int: Numbers, w_scale: object, name: str, *, w_bits: int, x_bits: int, x_signed: bool) -> Handle:
    """The checked, not yet programmed handle of a layer; see `Engine.load`."""
    w = as_integers(w_int, f"weights of {name}")
    if w.numel() == 0:
        raise CrossbarError(f"weights of {name} are empty: {tuple(w.shape)}")
    half = 2 ** (checks.BITS.check(w_bits, f"w_bits of {name}") - 1)
    (checks.SIGNED_BITS if x_signed else checks.BITS).check(x_bits, f"x_bits of {name}")
    check_range(w, -half, max(half - 1, 1), f"weights of {name}")
    scale = w_scale.detach().cpu() if isinstance(w_scale, Tensor) else torch.from_numpy(np.array(w_scale, np.float64))
    scale = scale.to(torch.float64)
    if scale.numel() not in (1, w.shape[1]) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CrossbarError(f"w_scale of {name} must be one positive number or {w.shape[1]} of them")
    return Handle(name, w.to(torch.int32).contiguous(), scale, w_bits, x_bits, bool(x_signed))


def exact_mvm(handle: Handle, x: Tensor) -> Tensor:
    """float64 (B, N): ``x @ w_int`` exactly, in float32 where that is provably exact and in float64 elsewhere."""
    dtype = exact_dtype(handle.w_int, handle)
    return (x.to(dtype) @ handle.w_int.to(dtype)).to(torch.float64)


def exact_dtype(weights: Tensor, handle: Handle) -> torch.dtype:
    """float32 if no partial sum of whole-number ``weights`` (K, N) can reach 2^24 for legal inputs, else float64."""
    largest = max(abs(limit) for limit in handle.x_range)
    bound = float(weights.to(torch.float64).abs().sum(0).max()) * largest
    return torch.float32 if bound < 2**24 else torch.float64


@dataclass(frozen=True)
class Stencil:
    """Geometry of a convolution."""

    kernel: tuple[int, int]
    """Taps, rows and columns."""
    stride: tuple[int, int] = (1, 1)
    """Step of the window, rows and columns."""
    padding: tuple[int, int] = (0, 0)
    """Zeros on both sides, rows and columns."""
    dilation: tuple[int, int] = (1, 1)
    """Spacing of taps, rows and columns."""

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Windows that fit in an image of ``height`` x ``width`` places."""
        down, across = zip(self.kernel, self.stride, self.dilation, strict=True)
        return n_windows(height + 2 * self.padding[0], *down), n_windows(width + 2 * self.padding[1], *across)

    def convolved(self, images: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
        """(B, M, H', W') convolution of float32 ``images``."""
        with torch.backends.nnpack.flags(enabled=False):  # its Winograd transform would round whole numbers
            return functional.conv2d(images, kernel, None, self.stride, self.padding, self.dilation, groups)


@dataclass(frozen=True, eq=False)
class Operand:
    """Inputs (n_rows, K) of a multiplication.

    With a window the rows are its places, ordered (image, row, column); a row is ordered (channel, row, column).
    """

    values: Tensor
    """(n_rows, K), or images (B, C, H, W) where there is a window."""
    window: Stencil | None = None
    """Geometry of the patches; its padding stands for zeros."""

    @cached_property
    def n_rows(self) -> int:
        """Rows of the multiplication."""
        return self.values.shape[0] * self.size[0] * self.size[1]

    @property
    def n_columns(self) -> int:
        """Length K of a row."""
        return self.values.shape[1] * self._taps

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a window's places in one image; (1, 1) without a window."""
        return self.window.out_size(*self.values.shape[2:]) if self.window else (1, 1)

    @property
    def layout(self) -> tuple[int, ...]:
        """Equal for operands that use the same `prepare`d matrices."""
        return (self.values.shape[1], *self.window.kernel) if self.window else ()

    @property
    def _taps(self) -> int:
        return math.prod(self.window.kernel) if self.window else 1

    def rows(self) -> Tensor:
        """(n_rows, K), the rows written out."""
        if self.window is None:
            return self.values
        (py, px), (kh, kw) = self.window.padding, self.window.kernel
        x = functional.pad(self.values, (px, px, py, py)).contiguous()
        (sy, sx), (dy, dx) = self.window.stride, self.window.dilation
        b, c, y, z = x.stride()
        size = (x.shape[0], *self.size, x.shape[1], kh, kw)
        return x.as_strided(size, (b, sy * y, sx * z, c, dy * y, dx * z)).reshape(self.n_rows, self.n_columns)

    def split(self, n_rows: int) -> "list[Operand]":
        """Consecutive parts of about ``n_rows`` rows."""
        if 0 < self.n_rows <= n_rows:
            return [self]
        parts = self.values.split(max(1, n_rows // math.prod(self.size))) if self.n_rows else ()
        return [replace(self, values=part) for part in parts]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Operand":
        """The operand of ``function`` of every number; ``function`` must map the padding's zero to zero."""
        if self.window is None:
            return Operand(function(self.values))
        mapped = function(self.values.contiguous(memory_format=torch.channels_last))
        if mapped.dtype.is_floating_point:
            mapped = mapped.contiguous(memory_format=torch.channels_last)
        return replace(self, values=mapped)

    def floats(self, dtype: torch.dtype) -> "Operand":
        """The operand of its integers as ``dtype``, laid out as `times` wants it."""
        if self.window is None or dtype is not torch.float32:
            return self.map(lambda values: values.to(dtype))
        return replace(self, values=channels_last(self.values))

    def prepare(self, matrix: Tensor, start: int) -> Tensor:
        """``matrix`` (R, M), meant for columns start..start+R of the rows, as `times` wants it."""
        if self.window is None or matrix.dtype is torch.float64:  # no fast convolution in float64
            return matrix
        first, last = self._channels(start, len(matrix))
        kernel = matrix.new_zeros(matrix.shape[1], (last - first) * self._taps)
        kernel[:, start - first * self._taps : start - first * self._taps + len(matrix)] = matrix.T
        shaped = kernel.view(matrix.shape[1], last - first, *self.window.kernel)
        return shaped.contiguous(memory_format=torch.channels_last)

    def times(self, prepared: Tensor, start: int, n_tile: int) -> Tensor:
        """(n_rows, M): columns start..start+n_tile of the rows times a `prepare`d matrix; a new contiguous tensor."""
        if self.window is None or prepared.dtype is torch.float64:
            return self.rows()[:, start : start + n_tile] @ prepared
        first, last = self._channels(start, n_tile)
        y = self.window.convolved(self.values[:, first:last], prepared)
        return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])

    def product(self, matrix: Tensor) -> Tensor:
        """(n_rows, M): the whole rows times ``matrix`` (K, M), in the matrix's dtype."""
        driven = self.floats(matrix.dtype)
        return driven.times(driven.prepare(matrix, 0), 0, self.n_columns)

    def _channels(self, start: int, n_tile: int) -> tuple[int, int]:
        """Channels (first, one past the last) to which columns start..start+n_tile of a row belong."""
        return start // self._taps, -(-(start + n_tile) // self._taps)
