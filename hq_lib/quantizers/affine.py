"""Pure functions between real tensors, integers, and the affine grid that joins them.

Symbols (Nagel et al. 2021, arXiv:2106.08295, section 2.2.1): ``scale`` s, real units per integer; ``zero_point`` z, the
integer of real 0; ``x_int`` integers in ``[qmin, qmax]``; ``x_hat = s * (x_int - z)``. Signed 1 bit means ``{-s, +s}``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_SCALE = 1e-8
"""Scale in real units of an all-zero tensor, which stays all zero on every grid that has a zero; see ``usable``."""
FINEST_SCALE = 1e-18
"""Smallest scale of any tensor: products of two such are normal float32 numbers still."""
MIN_BITS, MAX_BITS = 1, 16


class Grid(NamedTuple):
    """The exact levels of one quantized tensor: ``scale * (x_int - zero_point)``, x_int = qmin, qmin + step, ..., qmax.

    ``scale`` is positive and broadcasts against the tensor: ``()`` per tensor, ``(C, 1, ...)`` per channel.
    ``zero_point`` is integer-valued float32, of ``scale``'s shape or ``()``. ``step`` is 2 on grids whose real 0 lies
    half-way between levels (DoReFa's, any signed 1 bit): there every second integer is unused, otherwise 1.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    step: int = 1


def is_width(bits: object) -> bool:
    """Whether ``bits`` is a number of bits that a grid can have: an int from 1 to 16."""
    return isinstance(bits, int) and not isinstance(bits, bool) and MIN_BITS <= bits <= MAX_BITS


def check_bits(method: str, bits: int) -> int:
    """Return ``bits`` if ``method`` can do them (1 to 16, an int), else raise ValueError naming both."""
    if not is_width(bits):
        raise ValueError(f"{method} cannot do {bits!r} bits: give an int from {MIN_BITS} to {MAX_BITS} (32: float)")
    return bits


def check_finite(x: Tensor, what: str) -> None:
    """Raise ValueError if ``x`` is empty or holds NaN or Inf; ``what`` names its owner. Waits for the device."""
    if x.numel() == 0:
        raise ValueError(f"{what}: cannot fit a grid to an empty tensor of shape {tuple(x.shape)}")
    n_bad = int((~torch.isfinite(x)).sum())
    if n_bad:
        raise ValueError(
            f"{what}: {n_bad} of {x.numel()} values are NaN or Inf; a grid needs finite data, "
            "so look at the layer before this one (learning rate, overflow) and fit again"
        )


def refuse_nan(x: Tensor) -> None:
    """Raise ValueError if ``x`` holds NaN, which has no integer. Waits for the device."""
    if torch.isnan(x).any():
        raise ValueError("cannot turn NaN into an integer; check the tensor before it is quantized")


def integer_range(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int, int]:
    """Return ``(qmin, qmax, step)`` of a ``bits``-bit integer grid with zero point 0.

    Unsigned: (0, 2^b - 1, 1). Signed: (-2^(b-1), 2^(b-1) - 1, 1), or with ``narrow`` the symmetric
    (-(2^(b-1) - 1), 2^(b-1) - 1, 1). Signed 1 bit is always (-1, 1, 2): the two levels -scale and +scale.
    """
    if not signed:
        return 0, 2**bits - 1, 1
    if bits == 1:
        return -1, 1, 2
    qmax = 2 ** (bits - 1) - 1
    return -qmax - (not narrow), qmax, 1


def affine_from_range(
    low: Tensor, high: Tensor, *, n_steps: int, half_steps: bool = False, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``(scale, zero)`` of the levels s * (k - zero), k = 0 ... n_steps, that cover ``[low, high]`` and hold 0.

        s = (max(high, 0) - min(low, 0)) / n_steps,   zero = clip(-round(min(low, 0) / s), 0, n_steps)

    (ALGORITHMS: asymmetric row; Jacob et al. 2018, eq. 1.) ``low``, ``high``: real units, any equal shape; results
    have that shape. The range is widened to hold 0, and s is ``usable``; with ``power_of_two`` the next one up.
    ``half_steps`` rounds zero to multiples of 1/2, so that real 0 may lie half-way between two levels. The range moves
    by at most half a step (a quarter with ``half_steps``).
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = usable((high - low) / n_steps, power_of_two=power_of_two)
    per_step = 2.0 if half_steps else 1.0
    return scale, (0.0 - torch.round(low / scale * per_step) / per_step).clamp(0, n_steps)


def usable(scale: Tensor, *, power_of_two: bool = False) -> Tensor:
    """Return ``scale`` (any shape), at least 2^-10 of the largest in it or MIN_SCALE, whichever is less.

    All zero: MIN_SCALE. Never below FINEST_SCALE; with ``power_of_two`` the next power of two up.
    """
    largest = scale.detach().amax()
    floor = torch.where(largest > 0, (largest / 2**10).clamp(FINEST_SCALE, MIN_SCALE), MIN_SCALE)
    scale = scale.clamp(min=floor)
    return next_power_of_two(scale) if power_of_two else scale


def next_power_of_two(scale: Tensor) -> Tensor:
    """Return the least power of two that is no smaller than ``scale`` (> 0), exactly: a shift in place of a product."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def channel_dims(x: Tensor, axis: int | None) -> tuple[int, ...]:
    """Return the dimensions of ``x`` that share one scale: all of them, or all but ``axis``."""
    return tuple(d for d in range(x.ndim) if axis is None or d != axis % x.ndim)


def min_max(x: Tensor, *, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of ``x``: ``()`` each, or per channel of ``axis`` (broadcastable)."""
    keep = axis is not None
    dims = channel_dims(x, axis)
    return x.amin(dims, keepdim=keep), x.amax(dims, keepdim=keep)


def max_abs(x: Tensor, *, axis: int | None = None) -> Tensor:
    """Return the largest magnitude in ``x``: ``()``, or per channel of ``axis`` in a shape that broadcasts to ``x``."""
    return x.abs().amax(channel_dims(x, axis), keepdim=axis is not None)


def mean_abs(x: Tensor, *, axis: int | None = None) -> Tensor:
    """Return the mean magnitude of ``x``: ``()``, or per channel of ``axis`` in a shape that broadcasts to ``x``."""
    return x.abs().mean(channel_dims(x, axis), keepdim=axis is not None)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the backward pass is the identity (straight-through). The sum is exact in floating point."""
    return x + (torch.round(x) - x).detach()


def snap(v: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Round ``v`` (in steps) to the nearest of ``{..., offset - 1, offset, offset + 1, ...}``, ties to even indices."""
    return torch.round(v - offset) + offset


def snap_to_levels(x: Tensor, delta: Tensor, zero: Tensor, *, n_steps: int) -> Tensor:
    """Return ``x`` (*shape) at the nearest of the levels delta * (k - zero), k = 0 ... n_steps; for fits."""
    low = -zero
    return delta * snap(torch.clamp(x / delta, low, n_steps - zero), low - torch.floor(low))


def quantize_to_int(x: Tensor, grid: Grid) -> Tensor:
    """Return the int32 integers of ``x`` on ``grid``: clip(round_half_even(x / s) + z, qmin, qmax), for any step.

    ``x``: (*shape), real units. NaN has no integer: it raises ValueError.
    """
    refuse_nan(x)
    low, high = (grid.qmin - grid.zero_point) / grid.step, (grid.qmax - grid.zero_point) / grid.step
    steps = snap(torch.clamp(x.detach() / (grid.scale * grid.step), low, high), low - torch.floor(low))
    return (steps * grid.step + grid.zero_point).to(torch.int32)


def dequantize(x_int: Tensor, grid: Grid) -> Tensor:
    """Return the real values ``scale * (x_int - zero_point)``, float32, of integers ``x_int`` (*shape) on ``grid``."""
    return grid.scale * (x_int.to(grid.scale.dtype) - grid.zero_point)
