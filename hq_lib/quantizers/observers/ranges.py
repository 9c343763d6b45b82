"""Ranges of tensors and the affine grids they imply: min-max, percentile, and how a range becomes (scale, zero_point).

Symbols: ``low <= 0 <= high`` real ends of a range, ``scale`` real units per step, ``zero_point`` grid index of real 0,
``qmin/qmax`` grid ends; per tensor ``()`` or per channel ``(C,)``. Paper: Nagel et al. (2021), arXiv:2106.08295, 2.2.
"""

import difflib
import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scheme = Literal["affine", "symmetric", "symmetric_restricted"]
MIN_SCALE = 1e-8  # a channel of zeros still gets a usable step
MAX_BITS = 16


class Range(NamedTuple):
    """The real interval that a grid has to cover; ``low <= 0 <= high`` so that real 0 stays exactly representable."""

    low: Tensor
    """() or (C,), real units, <= 0."""
    high: Tensor
    """() or (C,), real units, >= 0."""


class QParams(NamedTuple):
    """An affine grid: x_hat = scale * (x_int - zero_point), qmin <= x_int <= qmax."""

    scale: Tensor
    """() or (C,), real units per step, > 0, dtype of the range."""
    zero_point: Tensor
    """() or (C,), integer-valued float in [qmin, qmax]."""
    qmin: int
    """Lowest grid index."""
    qmax: int
    """Highest grid index."""

    def broadcast(self, n_dims: int, axis: int) -> "QParams":
        """The same grid with scale and zero_point as (1, ..., C, ..., 1), to meet a tensor of ``n_dims``."""
        shape = [1] * n_dims
        shape[axis] = -1
        return self._replace(scale=self.scale.reshape(shape), zero_point=self.zero_point.reshape(shape))


def check_scheme(scheme: str) -> None:
    """Nothing, where the scheme exists; else ``ValueError`` that names the nearest one."""
    valid = get_args(Scheme)
    if scheme not in valid:
        near = difflib.get_close_matches(str(scheme), valid, n=1, cutoff=0.0)
        raise ValueError(f"unknown grid scheme {scheme!r}: did you mean {near[0]!r}? Schemes: {', '.join(valid)}")


def grid_ends(bits: int, scheme: Scheme) -> tuple[int, int]:
    """(qmin, qmax) of a grid: affine 0..2^b-1, symmetric -2^(b-1)..2^(b-1)-1, restricted +-(2^(b-1)-1).

    The restricted grid has no step at 1 bit; that is a ``ValueError`` (use the binary quantizer, sign times mean |w|).
    """
    check_scheme(scheme)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits!r}: a grid needs an integer from 1 to {MAX_BITS}")
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


def percentile_range(x: Tensor, percent: float = 99.99, *, axis: int | None = None, two_ended: bool = False) -> Range:
    """The interval that holds ``percent`` of the values, by nearest rank (an order statistic, exact for any size).

    One-sided data (all >= 0 or all <= 0) is cut at its far end. Signed data is cut at the percentile of |x| on both
    sides, or, with ``two_ended``, at the (100-percent)/2 and (100+percent)/2 percentiles of x.

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
    if two_ended and bool((low < 0).any()) and bool((high > 0).any()):
        tail = (100.0 - percent) / 2.0
        return as_range(_rank(values, tail), _rank(values, 100.0 - tail), axis)
    clip = _rank(values.abs(), percent)
    return as_range(torch.maximum(low, -clip), torch.minimum(high, clip), axis)


def _rank(values: Tensor, percent: float) -> Tensor:
    """Per row, the smallest value that at least ``percent`` of the row does not exceed (numpy's inverted_cdf)."""
    n = values.shape[1]
    return values.kthvalue(min(max(math.ceil(percent / 100.0 * n - 1e-9), 1), n), dim=1).values


def range_qparams(value_range: Range, *, bits: int, scheme: Scheme = "affine") -> QParams:
    """The grid that covers a range; real 0 is always one of its levels.

        affine:      s = (high - low) / (2^b - 1),  z = clip(round(-low / s), 0, 2^b - 1)     Nagel eq. 4-7
        symmetric:   s = max(|low|, |high|) / ((2^b - 1) / 2),  z = 0                          QDrop's convention
        restricted:  s = max(|low|, |high|) / (2^(b-1) - 1),  z = 0                            integer friendly

    A ReLU output needs no scheme of its own: low = 0 gives z = 0 and s = high / (2^b - 1) under ``affine``.
    """
    qmin, qmax = grid_ends(bits, scheme)
    low, high = value_range.low.clamp(max=0.0), value_range.high.clamp(min=0.0)
    if scheme == "affine":
        scale = ((high - low) / (qmax - qmin)).clamp(min=MIN_SCALE)
        return QParams(scale, torch.clamp(torch.round(-low / scale), qmin, qmax), qmin, qmax)
    scale = (torch.maximum(-low, high) / ((qmax - qmin) / 2)).clamp(min=MIN_SCALE)
    return QParams(scale, torch.zeros_like(scale), qmin, qmax)
