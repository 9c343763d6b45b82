"""Ranges over several batches: an explicit, immutable state and pure update functions.

No module, no hidden buffer: nothing here can be left in training mode or change during an evaluation. The L_p search
has no running form on purpose: merged per-batch optima are a union of ranges, no optimum. Calibrate it in one batch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hq_lib.quantizers.observers.ranges import Range, minmax_range


@dataclass(frozen=True)
class RangeState:
    """What an observer has seen so far."""

    low: Tensor
    """() or (C,), real units, <= 0."""
    high: Tensor
    """() or (C,), real units, >= 0."""
    n_batches: int
    """How many batches have been merged."""

    @property
    def range(self) -> Range:
        """The range as the grid functions take it."""
        return Range(self.low, self.high)


def update_minmax(state: RangeState | None, x: Tensor, *, axis: int | None = None) -> RangeState:
    """The running union of batch ranges; ``state=None`` starts. Equals min-max of all batches concatenated."""
    low, high = minmax_range(x, axis=axis)
    if state is None:
        return RangeState(low, high, 1)
    _check_shape(state, low)
    return RangeState(torch.minimum(state.low, low), torch.maximum(state.high, high), state.n_batches + 1)


def update_mean(state: RangeState | None, x: Tensor, *, axis: int | None = None) -> RangeState:
    """The mean of the batches' minima and maxima so far (QDrop's AvgMinMax); ``state=None`` starts."""
    n = 0 if state is None else state.n_batches
    merged = update_ema(state, x, axis=axis, keep=n / (n + 1))
    return replace(merged, n_batches=n + 1)


def update_ema(state: RangeState | None, x: Tensor, *, axis: int | None = None, keep: float = 0.9) -> RangeState:
    """The exponential moving average of the batches' ranges; ``state=None`` starts at the first batch.

        m <- keep * m + (1 - keep) * m_batch         keep = 0.9 in QDrop, 0.99 in PyTorch

    Args:
        x:    (*shape), real units, one batch.
        keep: [0, 1), weight of the past.
    """
    if not 0.0 <= keep < 1.0:
        raise ValueError(f"keep={keep!r}: the weight of the past lies in [0, 1); 1 would never learn")
    low, high = minmax_range(x, axis=axis)
    if state is None:
        return RangeState(low, high, 1)
    _check_shape(state, low)
    return RangeState(torch.lerp(low, state.low, keep), torch.lerp(high, state.high, keep), state.n_batches + 1)


def _check_shape(state: RangeState, low: Tensor) -> None:
    if state.low.shape != low.shape:
        shapes = f"{tuple(state.low.shape)} and the batch gives {tuple(low.shape)}"
        raise ValueError(f"the state holds ranges of shape {shapes}: keep one axis and one layer per state")
