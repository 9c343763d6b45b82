"""Ranges of tensors and the affine grids they imply: min-max, percentile, and how a range becomes (scale, zero_point).

Symbols: ``low <= 0 <= high`` real ends of a range, ``scale`` real units per step, ``zero_point`` grid index of real 0,
``qmin/qmax`` grid ends; per tensor ``()`` or per channel ``(C,)``. Paper: Nagel et al. (2021), arXiv:2106.08295, 2.2.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hq_lib.quantizers.affine import MIN_SCALE, Grid, affine_from_range, check_bits
from hq_lib.results.hints import nearest

Scheme = Literal["affine", "symmetric", "symmetric_restricted"]


class Range(NamedTuple):
    """The real interval that a grid has to cover; ``low <= 0 <= high`` so that real 0 stays exactly representable."""

    low: Tensor
    """() or (C,), real units, <= 0."""
    high: Tensor
    """() or (C,), real units, >= 0."""


def check_scheme(scheme: str) -> None:
    """Nothing, where the scheme exists; else ``ValueError`` that names the nearest one."""
    valid = get_args(Scheme)
    if scheme not in valid:
        raise ValueError(f"unknown grid scheme {scheme!r}: there are {', '.join(valid)}{nearest(scheme, valid)}")


def grid_ends(bits: int, scheme: Scheme) -> tuple[int, int]:
    """(qmin, qmax) of a grid: affine 0..2^b-1, symmetric -2^(b-1)..2^(b-1)-1, restricted +-(2^(b-1)-1).

    The restricted grid has no step at 1 bit; that is a ``ValueError`` (use the binary quantizer, sign times mean |w|).
    """
    check_scheme(scheme)
    check_bits(f"a grid of scheme {scheme!r}", bits)
    if scheme == "affine":
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    if scheme == "symmetric":
        return -half, half - 1
    if bits == 1:
        raise ValueError("bits=1: the symmetric restricted grid is {0} alone; use a binary quantizer or 'symmetric'")
    return 1 - half, half - 1


def rows(x: Tensor, axis: int | None = None) -> Tensor:
    """``x`` as detached (C, n): one row per channel along ``axis``, one row in all where ``axis`` is None.

    Half precision becomes float32; float32 and float64 stay.

    Raises:
        ValueError: empty or integer tensor, NaN or infinity in it (named with its count).
    """
    x = x.detach()
    if not x.is_floating_point():
        raise ValueError(f"a range needs real values, got {x.dtype}: dequantize or call .float() first")
    if x.numel() == 0:
        raise ValueError(f"a range needs at least one value, got a tensor of shape {tuple(x.shape)}")
    if not torch.isfinite(torch.stack(torch.aminmax(x))).all():
        n_bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{n_bad} of {x.numel()} values are NaN or infinite: no range covers them; find their layer")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def as_range(low: Tensor, high: Tensor, axis: int | None) -> Range:
    """The (C,) ends pulled apart to contain 0, as () where ``axis`` is None."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    return Range(low.squeeze(0), high.squeeze(0)) if axis is None else Range(low, high)


def minmax_range(x: Tensor, *, axis: int | None = None) -> Range:
    """The smallest interval that holds every value and 0.

    Args:
        x:    (*shape), real units.
        axis: channel axis of a per-channel range; None = one range for the tensor.

    Returns:
        ``Range`` of () or (C,). No gradient. ``ValueError`` for NaN, infinity or an empty tensor.
    """
    low, high = torch.aminmax(rows(x, axis), dim=1)
    return as_range(low, high, axis)


def percentile_range(x: Tensor, percent: float = 99.99, *, axis: int | None = None) -> Range:
    """The interval that holds ``percent`` of the values, by nearest rank (an order statistic, exact for any size).

    One-sided data (all >= 0 or all <= 0) is cut at its far end, signed data at the percentile of |x| on both sides.

    Args:
        x:       (*shape), real units; any number of elements (``torch.quantile`` stops at 2^24).
        percent: (0, 100], per cent of the values that stay inside.

    Returns:
        ``Range`` of () or (C,). No gradient.
    """
    if not 0.0 < percent <= 100.0:
        raise ValueError(f"percent={percent!r}: give a percentage in (0, 100], such as 99.99")
    values = rows(x, axis)
    low, high = values.amin(1), values.amax(1)
    n = values.shape[1]
    rank = min(max(math.ceil(percent / 100.0 * n - 1e-9), 1), n)  # numpy's inverted_cdf
    clip = values.abs().kthvalue(rank, dim=1).values
    return as_range(torch.maximum(low, -clip), torch.minimum(high, clip), axis)


def grid_from_range(value_range: Range, *, bits: int, scheme: Scheme = "affine") -> Grid:
    """The grid that covers a range; real 0 is always one of its levels.

        affine:      s = (high - low) / (2^b - 1),  z = clip(round(-low / s), 0, 2^b - 1)     Nagel eq. 4-7
        symmetric:   s = max(|low|, |high|) / ((2^b - 1) / 2),  z = 0                          QDrop's convention
        restricted:  s = max(|low|, |high|) / (2^(b-1) - 1),  z = 0                            integer friendly

    A ReLU output needs no scheme of its own: low = 0 gives z = 0 and s = high / (2^b - 1) under ``affine``.
    """
    qmin, qmax = grid_ends(bits, scheme)
    if scheme == "affine":
        return Grid(*affine_from_range(value_range.low, value_range.high, qmin=qmin, qmax=qmax), qmin, qmax)
    low, high = value_range.low.clamp(max=0.0), value_range.high.clamp(min=0.0)
    scale = (torch.maximum(-low, high) / ((qmax - qmin) / 2)).clamp(min=MIN_SCALE)
    return Grid(scale, torch.zeros_like(scale), qmin, qmax)
