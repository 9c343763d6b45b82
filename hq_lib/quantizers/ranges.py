"""First guesses: real ranges from one batch or one weight, from which the learned quantizers start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hq_lib.quantizers.affine import Grid, channel_dims, max_abs, min_max, snap_to_levels

N_SAMPLE = 2**16
"""Elements an activation range is estimated from; more do not move it by a grid step."""
N_CANDIDATES = 80
"""Shrink factors tried by the search, 1 down to 1/80 (BRECQ's count)."""
IDLE_CLIP = 1.0
"""Clip, in real units, of a tensor that was all zero when it was fitted: any clip represents it exactly."""


def sample(x: Tensor, *, n: int = N_SAMPLE) -> Tensor:
    """Return about ``n`` (n/2 to 2n) evenly spaced elements of ``x`` as (m,); all of them if there are no more."""
    flat = x.reshape(-1)
    stride = max(1, flat.numel() // n) | 1  # odd, so that it never runs down one column of an image
    return flat[::stride]


def percentile_clip(x: Tensor, *, signed: bool, percent: float = 99.9) -> Tensor:
    """Return the clip below which ``percent`` % of ``x`` (of ``|x|`` if ``signed``) lie: (), real units, > 0.

    Estimated on an evenly spaced sample. An unsigned ``x`` counts as rectified; all zero gives IDLE_CLIP.
    """
    sizes = sample(x.abs() if signed else x.clamp(min=0.0))
    clip = torch.quantile(sizes.float(), percent / 100.0)
    clip = torch.where(clip > 0, clip, sizes.max())
    return torch.where(clip > 0, clip, torch.full_like(clip, IDLE_CLIP))


def least_error_clip(x: Tensor, grid: Grid) -> Tensor:
    """Return the clip (), real units, > 0, at which ``x`` on a zero-centred grid has the least squared error.

    ``grid`` gives qmin, qmax and step; its scale is free. Unsigned data are rectified; all zero gives IDLE_CLIP.
    """
    data = sample(x if grid.qmin < 0 else x.clamp(min=0.0))
    clip = torch.where(data.abs().max() > 0, data.abs().max(), torch.full_like(data[0], IDLE_CLIP))
    n_steps, zero = (grid.qmax - grid.qmin) // grid.step, data.new_tensor(-grid.qmin / grid.step)

    def on_clip(values: Tensor, _: Tensor, high: Tensor) -> Tensor:
        return snap_to_levels(values, high / grid.qmax * grid.step, zero, n_steps=n_steps)

    return best_shrink(data, -clip, clip, on_clip)[1]


def widest_range(x: Tensor, *, signed: bool, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (low, high) with low <= 0 <= high that hold all of ``x``; unsigned data are rectified first.

    All-zero data (or an all-zero channel) give the range of IDLE_CLIP: (0, 1), or (-1, 1) if ``signed``.
    """
    low, high = min_max(x if signed else x.clamp(min=0.0), axis=axis)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    idle = (low == high).to(low.dtype) * IDLE_CLIP
    return low - idle * float(signed), high + idle


def best_shrink(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    quantize: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(f low, f high)`` with the shrink factor f in (0, 1] that gives the smallest mean squared error.

    Args:
        x: (*shape), real units. low, high: ends of the full range, ``()`` or per channel of ``axis``.
        quantize: maps (x, low, high) to x on the grid with these ends.
        axis: channel axis, each channel with its own f; None searches one f on an evenly spaced sample.
    """
    data = sample(x) if axis is None else x
    best = torch.ones_like(low)
    least = torch.full_like(low, float("inf"))
    for k in range(N_CANDIDATES):
        factor = 1.0 - k / N_CANDIDATES
        squared = (quantize(data, factor * low, factor * high) - data).square()
        error = squared.mean() if axis is None else squared.mean(channel_dims(data, axis), keepdim=True)
        best = torch.where(error < least, torch.full_like(best, factor), best)
        least = torch.minimum(error, least)
    return best * low, best * high


def three_sigma(x: Tensor, *, axis: int | None = None) -> Tensor:
    """Return max(|mu - 3 sigma|, |mu + 3 sigma|), real units, > 0: LSQ+'s first guess of a weight's range (eq. 9).

    The largest magnitude caps it; all-zero channels give IDLE_CLIP.
    """
    dims = channel_dims(x, axis)
    mean, std = x.mean(dims, keepdim=axis is not None), x.std(dims, keepdim=axis is not None, correction=0)
    clip = torch.minimum(mean.abs() + 3.0 * std, max_abs(x, axis=axis))
    return torch.where(clip > 0, clip, torch.full_like(clip, IDLE_CLIP))
