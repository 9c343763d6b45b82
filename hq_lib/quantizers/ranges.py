"""Ranges of tensors, the affine grids they imply, and the first guesses from which the learned quantizers start.

Symbols: ``low <= 0 <= high`` real ends of a range, ``scale`` real units per step, ``zero_point`` grid index of real 0,
``qmin/qmax`` grid ends; per tensor ``()``, or per channel of ``axis`` in a shape that broadcasts to the tensor. Paper:
Nagel et al. (2021), arXiv:2106.08295, 2.2.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hq_lib.quantizers.affine import (
    Grid,
    affine_from_range,
    channel_dims,
    check_bits,
    check_finite,
    max_abs,
    snap_to_levels,
    usable,
)
from hq_lib.results.hints import check_known

Scheme = Literal["affine", "symmetric", "symmetric_restricted"]
N_SAMPLE = 2**16
"""Elements an activation range is estimated from; more do not move it by a grid step."""
N_CANDIDATES = 80
"""Shrink factors tried by the search, 1 down to 1/80 (BRECQ's count)."""
IDLE_CLIP = 1.0
"""Clip, in real units, of a tensor that was all zero when it was fitted: any clip represents it exactly."""


class Range(NamedTuple):
    """The real interval that a grid has to cover; ``low <= 0 <= high`` so that real 0 stays exactly representable."""

    low: Tensor
    """real units, <= 0."""
    high: Tensor
    """real units, >= 0."""


def rows(x: Tensor, axis: int | None = None) -> Tensor:
    """``x`` as detached (C, n): one row per channel along ``axis``, one row in all where ``axis`` is None.

    Half precision becomes float32; float32 and float64 stay.

    Raises:
        ValueError: empty or integer tensor, NaN or Inf in it (named with its count).
    """
    x = x.detach()
    if not x.is_floating_point():
        raise ValueError(f"a range needs real values, got {x.dtype}: dequantize or call .float() first")
    check_finite(x, "range")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def per_channel(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value per row of ``rows(x, axis)``, (C,), in a shape that broadcasts to ``x``; ``()`` where axis is None."""
    if axis is None:
        return values.squeeze(0)
    return values.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def minmax_range(x: Tensor, *, axis: int | None = None) -> Range:
    """The smallest interval that holds every value and 0.

    Args:
        x:    (*shape), real units.
        axis: channel axis of a per-channel range; None = one range for the tensor.

    Returns:
        ``Range``. No gradient. ``ValueError`` for NaN, Inf or an empty tensor.
    """
    low, high = (per_channel(end, x, axis) for end in torch.aminmax(rows(x, axis), dim=1))
    return Range(low.clamp(max=0.0), high.clamp(min=0.0))


def percentile_range(x: Tensor, percent: float = 99.99, *, axis: int | None = None) -> Range:
    """The interval that holds ``percent`` of the values, by nearest rank (an order statistic, exact for any size).

    One-sided data (all >= 0 or all <= 0) is cut at its far end, signed data at the percentile of |x| on both sides.

    Args:
        x:       (*shape), real units; any number of elements (``torch.quantile`` stops at 2^24).
        percent: (0, 100], per cent of the values that stay inside.

    Returns:
        ``Range``. No gradient.
    """
    if not 0.0 < percent <= 100.0:
        raise ValueError(f"percent={percent!r}: give a percentage in (0, 100], such as 99.99")
    low, high = minmax_range(x, axis=axis)
    values = rows(x, axis)
    n = values.shape[1]
    rank = min(max(math.ceil(percent / 100.0 * n - 1e-9), 1), n)  # numpy's inverted_cdf
    clip = per_channel(values.abs().kthvalue(rank, dim=1).values, x, axis)
    return Range(torch.maximum(low, -clip), torch.minimum(high, clip))


def grid_ends(bits: int, scheme: Scheme) -> tuple[int, int]:
    """(qmin, qmax) of a grid: affine 0..2^b-1, symmetric -2^(b-1)..2^(b-1)-1, restricted +-(2^(b-1)-1).

    The restricted grid has no step at 1 bit; that is a ``ValueError`` (use the binary quantizer, sign times mean |w|).
    """
    check_known(scheme, get_args(Scheme), "grid scheme")
    check_bits(f"a grid of scheme {scheme!r}", bits)
    if scheme == "affine":
        return 0, 2**bits - 1
    if scheme == "symmetric_restricted" and bits == 1:
        raise ValueError("bits=1: the symmetric restricted grid is {0} alone; use a binary quantizer or 'symmetric'")
    half = 2 ** (bits - 1)
    return (-half if scheme == "symmetric" else 1 - half), half - 1


def grid_from_range(value_range: Range, *, bits: int, scheme: Scheme = "affine") -> Grid:
    """The grid that covers a range; real 0 is always one of its levels.

        affine:      s = (high - low) / (2^b - 1),  z = clip(round(-low / s), 0, 2^b - 1)     Nagel eq. 4-7
        symmetric:   s = max(|low|, |high|) / ((2^b - 1) / 2),  z = 0                          QDrop's convention
        restricted:  s = max(|low|, |high|) / (2^(b-1) - 1),  z = 0                            integer friendly

    A ReLU output needs no scheme of its own: low = 0 gives z = 0 and s = high / (2^b - 1) under ``affine``.
    """
    qmin, qmax = grid_ends(bits, scheme)
    low, high = value_range
    if scheme == "affine":
        return Grid(*affine_from_range(low, high, n_steps=qmax), qmin, qmax)
    scale = usable(torch.maximum(-low, high) / ((qmax - qmin) / 2))
    return Grid(scale, torch.zeros_like(scale), qmin, qmax)


def widest_range(x: Tensor, *, signed: bool, axis: int | None = None) -> Range:
    """Return (low, high) with low <= 0 <= high that hold all of ``x``; unsigned data are rectified first.

    All-zero data (or an all-zero channel) give the range of IDLE_CLIP: (0, 1), or (-1, 1) if ``signed``.
    """
    low, high = minmax_range(x if signed else x.clamp(min=0.0), axis=axis)
    idle = (low == high).to(low.dtype) * IDLE_CLIP
    return Range(low - idle * float(signed), high + idle)


def sample(x: Tensor, *, n: int = N_SAMPLE) -> Tensor:
    """Return about ``n`` (n/2 to 2n) evenly spaced elements of ``x`` as (m,); all of them if there are no more."""
    flat = x.reshape(-1)
    stride = max(1, flat.numel() // n) | 1  # odd, so that it never runs down one column of an image
    return flat[::stride]


def best_shrink(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    levels: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    n_steps: int,
    axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(f low, f high)`` with the shrink factor f in (0, 1] that gives the smallest mean squared error.

    Args:
        x: (*shape), real units. low, high: ends of the full range, ``()`` or per channel of ``axis``.
        levels: maps (low, high) to (delta, zero), the grid delta * (k - zero), k = 0 ... n_steps, with these ends.
        axis: channel axis, each channel with its own f; None searches one f on an evenly spaced sample.
    """
    data = sample(x) if axis is None else x
    best = torch.ones_like(low)
    least = torch.full_like(low, float("inf"))
    for k in range(N_CANDIDATES):
        factor = 1.0 - k / N_CANDIDATES
        squared = (snap_to_levels(data, *levels(factor * low, factor * high), n_steps=n_steps) - data).square()
        error = squared.mean() if axis is None else squared.mean(channel_dims(data, axis), keepdim=True)
        best = torch.where(error < least, torch.full_like(best, factor), best)
        least = torch.minimum(error, least)
    return best * low, best * high


LEAST_ERROR = "least_error"
"""What a quantizer's option says for a first grid of the least squared error on the data that it meets first."""


def least_error_clip(x: Tensor, grid: Grid) -> Tensor:
    """Return the clip (), real units, > 0, at which ``x`` on a zero-centred grid has the least squared error.

    ``grid`` gives qmin, qmax and step; its scale is free. Unsigned data are rectified; all zero gives IDLE_CLIP.
    """
    data = sample(x if grid.qmin < 0 else x.clamp(min=0.0))
    clip = torch.where(data.abs().max() > 0, data.abs().max(), torch.full_like(data[0], IDLE_CLIP))
    n_steps, zero = (grid.qmax - grid.qmin) // grid.step, data.new_tensor(-grid.qmin / grid.step)
    return best_shrink(data, clip, clip, lambda _, c: (c / grid.qmax * grid.step, zero), n_steps=n_steps)[1]


def three_sigma(x: Tensor, *, axis: int | None = None) -> Tensor:
    """Return max(|mu - 3 sigma|, |mu + 3 sigma|), real units, > 0: LSQ+'s first guess of a weight's range (eq. 9).

    The largest magnitude caps it; all-zero channels give IDLE_CLIP.
    """
    dims = channel_dims(x, axis)
    mean, std = x.mean(dims, keepdim=axis is not None), x.std(dims, keepdim=axis is not None, correction=0)
    clip = torch.minimum(mean.abs() + 3.0 * std, max_abs(x, axis=axis))
    return torch.where(clip > 0, clip, torch.full_like(clip, IDLE_CLIP))
