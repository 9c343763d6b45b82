"""Operands: what drives the rows of an array, all bits at once or a few at a time, as plain rows or patches of images.

x = sum_b factor_b digit_b,   digit_b = (x >> shift_b) & mask_b     two's complement: the sign bit's factor is < 0
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar.checks import OPTION, CrossbarError, check_bit_width, check_choice


@dataclass(frozen=True)
class Step:
    """One input step: which bits of x it drives, and the digital factor of what is read."""

    shift: int
    """Lowest bit of the digit."""
    mask: int
    """Largest digit, 2^v - 1; 0 means the whole integer, sign included."""
    factor: float
    """Digital factor, +-2^shift."""

    def digits(self, x: Tensor) -> Tensor:
        """Integer tensor of ``x``'s shape: the digit of this step."""
        if not self.mask:
            return x
        return (x >> self.shift).bitwise_and_(self.mask) if self.shift else x & self.mask


@dataclass(frozen=True)
class Drive:
    """Input scheme of the rows."""

    mode: str = "analog"
    """"analog": one step with a multi-bit level or pulse width. "serial": ``step_bits`` bits at a time, ADC each."""
    step_bits: int = 1
    """Bits v per step of the serial mode, 1..8."""
    accumulate: bool = field(default=False, metadata=OPTION)
    """Serial mode: add the steps' currents by their weights in analog and convert the sum once, not every step."""
    managed: bool = field(default=False, metadata=OPTION)
    """Analog mode: drive each row of inputs by the power of two that brings its largest to the top of the range, and
    divide it out digitally: aihwkit's noise management. It sets small inputs against offsets and steps of converters.
    """

    def __post_init__(self) -> None:
        check_choice(self.mode, ("analog", "serial"), "Drive.mode")
        check_bit_width(self.step_bits, "Drive.step_bits", high=8)
        if (self.accumulate and self.mode == "analog") or (self.managed and self.mode == "serial"):
            raise CrossbarError("Drive.accumulate is for mode 'serial', Drive.managed for mode 'analog'")

    @property
    def at_once(self) -> bool:
        """Whether converters see whole inputs, not one step of them."""
        return self.mode == "analog" or self.accumulate

    def steps(self, x_bits: int, x_signed: bool) -> list[Step]:
        """The steps that are converted; a sign bit is a step of its own in serial mode."""
        return [Step(0, 0, 1.0)] if self.at_once else self.pulses(x_bits, x_signed)

    def pulses(self, x_bits: int, x_signed: bool) -> list[Step]:
        """The steps that carry integers of ``x_bits`` bits to the rows."""
        if self.mode == "analog":
            return [Step(0, 0, 1.0)]
        steps, low, plain = [], 0, x_bits - x_signed
        while low < plain:
            width = min(self.step_bits, plain - low)
            steps.append(Step(low, 2**width - 1, 2.0**low))
            low += width
        return [*steps, Step(plain, 1, -(2.0**plain))] if x_signed else steps

    def peak(self, x_bits: int, x_signed: bool) -> int:
        """Largest |digit| that any converted step can carry."""
        if self.at_once:
            return 2 ** (x_bits - 1) if x_signed else 2**x_bits - 1
        return max(step.mask for step in self.steps(x_bits, x_signed))

    def gain(self, rows: Tensor, x_bits: int, x_signed: bool) -> Tensor | None:
        """(n, 1) powers of two >= 1 by which ``rows`` (n, K) are driven; None where they are driven as they are."""
        if not self.managed:
            return None
        largest = rows.abs().amax(1, keepdim=True).to(torch.float64).clamp_min(1.0)
        return torch.exp2(torch.log2(self.peak(x_bits, x_signed) / largest).floor())

    def power(self, x: Tensor, x_bits: int, x_signed: bool) -> Tensor:
        """float32, shape of ``x``: sum_b factor_b^2 digit_b^2, by which a cell's read variance reaches the output."""
        if self.mode == "analog":
            return x.to(torch.float32).square_()
        total = torch.zeros(x.shape, dtype=torch.float32)
        for step in self.pulses(x_bits, x_signed):
            total += step.digits(x).to(torch.float32).square_() * step.factor**2
        return total


class Operand(ABC):
    """Inputs (n_rows, K) of a multiplication, in one of two layouts."""

    values: Tensor
    """The numbers themselves, in the operand's own layout."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Rows of the multiplication."""

    @property
    @abstractmethod
    def n_columns(self) -> int:
        """Length K of a row."""

    @property
    @abstractmethod
    def layout(self) -> tuple[int, ...]:
        """Equal for operands that use the same `prepare`d matrices."""

    @abstractmethod
    def rows(self) -> Tensor:
        """(n_rows, K), the rows written out."""

    @abstractmethod
    def split(self, n_rows: int) -> list[Operand]:
        """Consecutive parts of about ``n_rows`` rows."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Operand:
        """The operand of ``function`` of every number; ``function`` must map the padding's zero to zero."""

    @abstractmethod
    def prepare(self, matrix: Tensor, start: int) -> Tensor:
        """``matrix`` (R, M), meant for columns start..start+R of the rows, as `times` wants it."""

    @abstractmethod
    def times(self, prepared: Tensor, start: int, n_tile: int) -> Tensor:
        """(n_rows, M): columns start..start+n_tile of the rows times a `prepare`d matrix; a new contiguous tensor."""

    def product(self, matrix: Tensor) -> Tensor:
        """(n_rows, M): the whole rows times ``matrix`` (K, M), in the matrix's dtype."""
        driven = self.map(lambda values: values.to(matrix.dtype))
        return driven.times(driven.prepare(matrix, 0), 0, self.n_columns)


@dataclass(frozen=True, eq=False)
class Rows(Operand):
    """Plain rows."""

    values: Tensor
    """(n_rows, K)."""

    @property
    def n_rows(self) -> int:
        return self.values.shape[0]

    @property
    def n_columns(self) -> int:
        return self.values.shape[1]

    @property
    def layout(self) -> tuple[int, ...]:
        return ()

    def rows(self) -> Tensor:
        return self.values

    def split(self, n_rows: int) -> list[Operand]:
        return [Rows(part) for part in self.values.split(n_rows)] if self.n_rows else []

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(function(self.values))

    def prepare(self, matrix: Tensor, start: int) -> Tensor:
        return matrix

    def times(self, prepared: Tensor, start: int, n_tile: int) -> Tensor:
        return self.values[:, start : start + n_tile] @ prepared


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
        reach = [
            size + 2 * p - d * (k - 1) - 1
            for size, p, d, k in zip((height, width), self.padding, self.dilation, self.kernel, strict=True)
        ]
        return reach[0] // self.stride[0] + 1, reach[1] // self.stride[1] + 1


@dataclass(frozen=True, eq=False)
class Patches(Operand):
    """Images whose windows are the rows, ordered (image, row, column); a row is ordered (channel, row, column)."""

    values: Tensor
    """(B, C, H, W)."""
    window: Stencil
    """Geometry; its padding stands for zeros."""

    @property
    def n_rows(self) -> int:
        return self.values.shape[0] * self._n_windows

    @property
    def n_columns(self) -> int:
        return self.values.shape[1] * math.prod(self.window.kernel)

    @property
    def layout(self) -> tuple[int, ...]:
        return (self.values.shape[1], *self.window.kernel)

    @property
    def _n_windows(self) -> int:
        return math.prod(self.window.out_size(*self.values.shape[2:]))

    def rows(self) -> Tensor:
        (py, px), (kh, kw) = self.window.padding, self.window.kernel
        x = functional.pad(self.values, (px, px, py, py)).contiguous()
        (sy, sx), (dy, dx) = self.window.stride, self.window.dilation
        height, width = self.window.out_size(*self.values.shape[2:])
        b, c, y, z = x.stride()
        size = (x.shape[0], height, width, x.shape[1], kh, kw)
        return x.as_strided(size, (b, sy * y, sx * z, c, dy * y, dx * z)).reshape(self.n_rows, self.n_columns)

    def split(self, n_rows: int) -> list[Operand]:
        if not self.n_rows:
            return []
        return [Patches(part, self.window) for part in self.values.split(max(1, n_rows // self._n_windows))]

    def map(self, function: Callable[[Tensor], Tensor]) -> Patches:
        mapped = function(self.values.contiguous(memory_format=torch.channels_last))
        if mapped.dtype.is_floating_point:
            mapped = mapped.contiguous(memory_format=torch.channels_last)
        return replace(self, values=mapped)

    def prepare(self, matrix: Tensor, start: int) -> Tensor:
        if matrix.dtype is torch.float64:  # no fast convolution in float64
            return matrix
        first, last = self._channels(start, len(matrix))
        taps = math.prod(self.window.kernel)
        kernel = matrix.new_zeros(matrix.shape[1], (last - first) * taps)
        kernel[:, start - first * taps : start - first * taps + len(matrix)] = matrix.T
        shaped = kernel.view(matrix.shape[1], last - first, *self.window.kernel)
        return shaped.contiguous(memory_format=torch.channels_last)

    def times(self, prepared: Tensor, start: int, n_tile: int) -> Tensor:
        if prepared.dtype is torch.float64:
            return self.rows()[:, start : start + n_tile] @ prepared
        first, last = self._channels(start, n_tile)
        with torch.backends.nnpack.flags(enabled=False):  # its Winograd transform would round whole numbers
            y = functional.conv2d(
                self.values[:, first:last],
                prepared,
                stride=self.window.stride,
                padding=self.window.padding,
                dilation=self.window.dilation,
            )
        return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])

    def _channels(self, start: int, n_tile: int) -> tuple[int, int]:
        """Channels (first, one past the last) to which columns start..start+n_tile of a row belong."""
        taps = math.prod(self.window.kernel)
        return start // taps, -(-(start + n_tile) // taps)


def as_operand(x: Tensor | Operand, what: str) -> Operand:
    """``x`` itself, or the rows of a (B, K) integer tensor; anything else is refused."""
    operand = x if isinstance(x, Operand) else Rows(x)
    values = operand.values
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise CrossbarError(f"{what} must hold integers, not {values.dtype}; round and cast it first")
    if isinstance(operand, Rows) and values.ndim != 2:
        raise CrossbarError(f"{what} must be (B, K) rows, not shape {tuple(values.shape)}")
    return operand.map(lambda v: v.to(torch.uint8)) if values.dtype is torch.bool else operand
