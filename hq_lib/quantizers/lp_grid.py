"""The L_p-optimal grid of a tensor (BRECQ, QDrop: p = 2.4), found exactly in a fraction of the literal loop's time.

The literal loop quantizes the whole tensor for each candidate: 100 times in the 1-D search, 100 * 2^bits in the 2-D.
Here candidates are ranked by proved lower bounds on a histogram, visited best first, and the search stops when no bound
is below the best error measured on the values themselves: same optimum, few passes.

A candidate is (step, k_min): the levels are step * k for k_min <= k <= k_min + n_codes - 1, so all candidates of one
step share the same infinite grid {step * k} and differ only in the window of codes that clips it. Hence

    E(step, k_min) = R(window) + U(high end) + L(low end)

with R the rounding error inside the window (one prefix sum per step serves every k_min) and U, L the clipping errors.
Symbols: C channels, K bins, S steps, Z windows per step, p >= 1 the exponent.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hq_lib.quantizers.affine import Grid, usable
from hq_lib.quantizers.ranges import Scheme, grid_ends, per_channel, rows


class Bins(NamedTuple):
    """A tensor's values grouped per channel into bins, ascending; a bin of one value is exact."""

    mean: Tensor
    """(C, K) float64, real units: mean of each bin's values, ascending along K."""
    count: Tensor
    """(C, K) float64: number of values in each bin."""
    spread: Tensor
    """(C, 1) float64, real units: no value lies farther than this from its bin's mean; 0 = every bin is exact."""


def power(distance: Tensor, p: float) -> Tensor:
    """distance**p for distance >= 0 in float64, four times faster than ``torch.pow``.

    Distances under 1e-100 count as 1e-100: log(0) is slow, and half of a ReLU output stands exactly on level 0.
    """
    return distance * distance if p == 2.0 else distance.clamp(min=1e-100).log_().mul_(p).exp_()


def make_bins(rows: Tensor, n_bins: int) -> Bins:
    """The (C, n) values as bins: themselves, sorted, where n <= n_bins; else ``n_bins`` bins of equal width."""
    if rows.shape[1] <= n_bins:
        mean = rows.double().sort(dim=1).values.contiguous()
        return Bins(mean, torch.ones_like(mean), mean.new_zeros(len(mean), 1))
    low, high = (end.double().unsqueeze(1) for end in torch.aminmax(rows, dim=1))
    width = ((high - low) / n_bins).clamp(min=1e-30)
    count, total = (rows.new_zeros(len(rows) * n_bins, dtype=torch.float64) for _ in range(2))
    first = torch.arange(len(rows), device=rows.device).unsqueeze(1) * n_bins
    start, per_unit = low.to(rows.dtype), (1 / width).to(rows.dtype)
    for chunk in rows.split(max(1, 2**18 // len(rows)), dim=1):
        index = (((chunk - start) * per_unit).long().clamp_(0, n_bins - 1) + first).flatten()
        count += torch.bincount(index, minlength=len(count))
        total += torch.bincount(index, weights=chunk.double().flatten(), minlength=len(count))
    count, total = count.view(len(rows), n_bins), total.view(len(rows), n_bins)
    centre = low + width * (torch.arange(n_bins, device=rows.device) + 0.5)
    return Bins(torch.where(count > 0, total / count.clamp(min=1), centre), count, width * 1.02)  # float32 edges wander


def merge_bins(bins: Bins, factor: int) -> Bins:
    """The same values in bins ``factor`` times as wide: a cheaper, looser bound."""
    mean, count = (t.unflatten(1, (-1, factor)) for t in (bins.mean, bins.count))
    merged, total = count.sum(2), (mean * count).sum(2)
    return Bins(torch.where(merged > 0, total / merged.clamp(min=1), mean.mean(2)), merged, bins.spread * factor)


def grid_error(
    x: Tensor, count: Tensor, step: Tensor, k_min: Tensor, *, n_codes: int, p: float, spread: Tensor
) -> Tensor:
    """Summed count * |x - nearest level|^p: exact for spread 0, else a lower bound of the bins' error.

        E = sum_x n(x) |x - step * clip(round(x / step), k_min, k_min + n_codes - 1)|^p

    Lower bound: |x - level|^p is convex except at the mid points between levels, so a bin that holds no mid point obeys
    Jensen's inequality at its mean; distance to a grid is 1-Lipschitz, so any other bin loses at most ``spread``.
    ``x``, ``count`` (C, 1, K), float64; ``step``, ``k_min`` (C, B, 1); ``spread`` (C, 1, 1) -> (C, B), real units to p.
    """
    inner = torch.round(x / step)
    code = torch.minimum(torch.maximum(inner, k_min), k_min + (n_codes - 1))
    distance = _less_spread((x - code * step).abs_(), step, spread, code == inner)
    return (power(distance, p) * count).sum(-1)


def _less_spread(distance: Tensor, step: Tensor, spread: Tensor, inside: Tensor | bool) -> Tensor:
    """``distance``, less ``spread`` where a bin ``inside`` the window may hold a mid point between levels."""
    if not bool((spread > 0).any()):
        return distance
    doubtful = inside & (distance > step / 2 - spread)
    return torch.where(doubtful, (distance - spread).clamp_(min=0), distance)


def value_error(values: Tensor, step: float, k_min: float, *, n_codes: int, p: float) -> Tensor:
    """() float64: summed |x - x_hat|^p of one grid on the values (n,) themselves, in slices that stay in the cache."""
    total = values.new_zeros((), dtype=torch.float64)
    for part in values.split(2**15):
        x = part.double()
        code = torch.round(x / step).clamp_(k_min, k_min + n_codes - 1)
        total += power((x - code.mul_(step)).abs_(), p).sum()  # float64 values are the caller's own
    return total


def window_bounds(bins: Bins, steps: Tensor, k_min: Tensor, *, n_codes: int, p: float) -> Tensor:
    """Lower bounds of the error of every (step, window): prefix sums only, no pass over values per window.

    R from one prefix sum per step. U and L from the first three moments m_0, m_1, m_2 of the clipped excess:
    m_p >= m_2 (m_2 / m_1)^(p-2) for p >= 2 (Lyapunov), m_p >= m_1 (m_1 / m_0)^(p-1) for 1 <= p < 2 (Jensen).
    R is left out where U + L alone exceeds the largest error that one of a few grids can have (8 bits: 4 steps of 5).
    ``steps`` (C, S) float64, > 0; ``k_min`` broadcastable to (C, S, Z), integer-valued -> (C, S, Z), real units to p.
    """
    moments = torch.stack([bins.count * bins.mean**r for r in range(3)])
    below = torch.nn.functional.pad(moments.cumsum(-1), (1, 0))
    above = torch.nn.functional.pad(moments.flip(-1).cumsum(-1).flip(-1), (0, 1))
    first = steps.unsqueeze(2) * k_min
    last = steps.unsqueeze(2) * (k_min + (n_codes - 1))
    at_first, at_last = (  # (C, S, Z)
        torch.searchsorted(bins.mean, end.flatten(1), right=right).view_as(end)
        for end, right in ((first, False), (last, True))
    )
    bounds = _tail_bound(below, at_first, first, p) + _tail_bound(above, at_last, last, p)
    tried = torch.arange(steps.shape[1] - 1, -1, -N_APART, device=steps.device)
    likely = k_min.expand(bounds.shape)[:, tried].gather(2, bounds[:, tried].argmin(2, keepdim=True))
    largest = _largest_error(bins, steps[:, tried].unsqueeze(2), likely, n_codes=n_codes, p=p).amin(1, keepdim=True)
    for i in (bounds.amin(2) <= largest * (1 + 1e-9)).any(0).nonzero().flatten().tolist():
        inside = _rounding_prefix(bins, steps[:, i : i + 1], p)
        bounds[:, i] += (inside.gather(1, at_last[:, i]) - inside.gather(1, at_first[:, i])).clamp_(min=0)
    return bounds


def _largest_error(bins: Bins, step: Tensor, k_min: Tensor, *, n_codes: int, p: float) -> Tensor:
    """(C, B): no values of such bins have a larger error on the grids of ``step`` and ``k_min``, (C, B, 1) each."""
    x = bins.mean.unsqueeze(1)
    distance = (x - torch.clamp(torch.round(x / step), k_min, k_min + (n_codes - 1)) * step).abs_()
    return (power(distance + bins.spread.unsqueeze(1), p) * bins.count.unsqueeze(1)).sum(-1)


def _rounding_prefix(bins: Bins, step: Tensor, p: float) -> Tensor:
    """(C, K+1): lower bound of the rounding error of the first j bins on the infinite grid {step * k}."""
    distance = _less_spread((bins.mean - torch.round(bins.mean / step) * step).abs_(), step, bins.spread, True)
    return torch.nn.functional.pad((power(distance, p) * bins.count).cumsum(-1), (1, 0))


def _tail_bound(sums: Tensor, index: Tensor, end: Tensor, p: float) -> Tensor:
    """Lower bound of sum |x - end|^p beyond ``index`` (C, S, Z), from the raw moments ``sums`` of the bins there.

    Cancellation is charged against the bound.
    """
    n, first, second = sums.gather(2, index.flatten(1).expand(3, -1, -1)).view(3, *index.shape)
    size = second + end * end * n
    m_1 = (first - end * n).abs_()
    m_2 = (second - 2 * end * first + end * end * n - 1e-12 * size).clamp_(min=0)
    if p < 2:
        mean = (m_1 - 1e-12 * (first.abs() + end.abs() * n)).clamp_(min=0) / n.clamp(min=1)
        return n * power(mean, p)
    return torch.where(m_2 > 0, m_2 * torch.pow(m_2 / m_1.clamp(min=1e-300), p - 2), m_2)


P_DEFAULT, N_STEPS = 2.4, 100  # BRECQ and QDrop, official code; QDrop, MSEObserver
N_BINS_EXACT, N_BINS_FAST = 2**16, 2**14
N_APART = 12  # one step in so many is tried, for an error that the optimum cannot exceed
_BATCH_CELLS = 2**18  # candidates x bins refined per round and channel
_MAX_CELLS = 2**22  # bounds (channels x candidates) held at once
_SLACK = 1e-9  # relative; covers float64 summation order


class _Candidates(NamedTuple):
    steps: Tensor  # (C, S)
    k_min: Tensor  # (C, S, Z)
    n_codes: int
    p: float

    def chunk(self, part: slice) -> "_Candidates":
        return self._replace(steps=self.steps[part], k_min=self.k_min[part])


@torch.no_grad()
def lp_search(
    x: Tensor, *, bits: int, scheme: Scheme = "affine", p: float = P_DEFAULT, axis: int | None = None,
    exact: bool = True,
) -> Grid:  # fmt: skip
    """The grid that minimises mean |x - x_hat|^p among the published candidates.

    Candidates are QDrop's (arXiv:2203.05740, MSEObserver): steps i/100 of the full range, i = 1..100. Symmetric schemes
    and one-sided data: one zero point (0, or the top code for x <= 0). Two-sided affine: every integer zero point, so
    100 * 2^bits candidates. (BRECQ's, a part of these, shrinks both ends together.)

    Args:
        x:      (*shape), real units: a weight, or a layer's activations on the whole calibration batch.
        bits:   1..16 (at 8 bits two-sided: 25,600 candidates).
        p:      >= 1; 2 is the mean squared error, 2.4 the published default.
        axis:   channel axis of a per-channel search; None = per tensor. Which signs occur is decided once for all.
        exact:  True: the literal loop's optimum (ties, to 1e-12, go to the first in (step, zero point) order). False:
                values stand at the mean of their bin (16,384): one pass over x, typically within 0.5 % of the optimum.

    Its parts are () or broadcast to ``x`` per channel. No gradient. ``ValueError`` for NaN, Inf or no values.
    """
    values = rows(x, axis)
    if p < 1:
        raise ValueError(f"p={p!r}: the L_p search needs p >= 1 (2.4 is the published default)")
    candidates = _candidates(values, bits, scheme, p)
    n_cells = candidates.steps.shape[1] * max(candidates.k_min.shape[-1], values.shape[1] // 4 + 1)
    size = max(1, _MAX_CELLS // n_cells)
    parts = [slice(c, c + size) for c in range(0, len(values), size)]
    found = [_search(values[part], candidates.chunk(part), exact) for part in parts]
    step, k_min = (torch.cat(column).to(values.dtype) for column in zip(*found, strict=True))
    qmin, qmax = grid_ends(bits, scheme)
    return Grid(per_channel(step, x, axis), per_channel(qmin - k_min, x, axis), qmin, qmax)


def _candidates(values: Tensor, bits: int, scheme: Scheme, p: float) -> _Candidates:
    """The published candidate set as steps (C, S) and lowest codes k_min = qmin - zero_point."""
    qmin, qmax = grid_ends(bits, scheme)
    low, high = (end.double().unsqueeze(1) for end in torch.aminmax(values, dim=1))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    has_negative, has_positive = bool((low < 0).any()), bool((high > 0).any())
    n, symmetric = qmax - qmin, scheme != "affine"
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    fractions = torch.arange(1, N_STEPS + 1, dtype=torch.float64, device=values.device) / N_STEPS
    steps = usable(fractions * width / n)
    if symmetric or not (has_negative and has_positive):
        k_min = torch.tensor([-n if has_negative and not symmetric else qmin], device=values.device)
    else:
        k_min = -torch.arange(n + 1, device=values.device)
    return _Candidates(steps, k_min.double().expand(*steps.shape, -1), n + 1, p)


def _search(values: Tensor, candidates: _Candidates, exact: bool) -> tuple[Tensor, Tensor]:
    """(step, k_min) of the optimum, each (C,)."""
    n_channels = len(values)
    bins = make_bins(values, N_BINS_EXACT if exact else N_BINS_FAST)
    binned = bool((bins.spread > 0).any())
    if not exact:
        bins = bins._replace(spread=torch.zeros_like(bins.spread))
    coarse = merge_bins(bins, N_BINS_EXACT // N_BINS_FAST) if exact and binned else bins
    bound = window_bounds(coarse, candidates.steps, candidates.k_min, n_codes=candidates.n_codes, p=candidates.p)
    n_batch = max(4, min(32, _BATCH_CELLS // bins.mean.shape[1]))
    error = _best_first(bound.flatten(1), partial(_refined, bins, candidates), n_batch)
    if exact and binned:
        each = [(candidates.chunk(slice(c, c + 1)), Bins(*(t[c : c + 1] for t in bins))) for c in range(n_channels)]
        error = torch.stack([_on_values(values[c], bound[c].flatten(), error[c], *own) for c, own in enumerate(each)])
    best = error.amin(1, keepdim=True)
    index = (error <= best * (1 + 1e-12)).int().argmax(1, keepdim=True)
    step, k_min = _gather(candidates, index, torch.arange(n_channels, device=values.device))
    return step.squeeze(1), k_min.squeeze(1)


def _gather(candidates: _Candidates, index: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """(step, k_min), each (rows, B), of flat candidate indices; row r belongs to channel ``channels[r]``."""
    n_windows, row = candidates.k_min.shape[-1], channels.unsqueeze(1)
    at_step, at_window = index // n_windows, index % n_windows
    return candidates.steps[row, at_step], candidates.k_min[row, at_step, at_window]


def _refined(bins: Bins, candidates: _Candidates, index: Tensor, channels: Tensor) -> Tensor:
    """(rows, B): the error on the bins of the candidates ``index`` (rows, B) of ``channels`` (rows,)."""
    step, k_min = (t.unsqueeze(-1) for t in _gather(candidates, index, channels))
    x, count, spread = (part[channels].unsqueeze(1) for part in bins)
    return grid_error(x, count, step, k_min, n_codes=candidates.n_codes, p=candidates.p, spread=spread)


def _best_first(
    bound: Tensor, refine: Callable[[Tensor, Tensor], Tensor], n_batch: int, limit: float | None = None
) -> Tensor:
    """(C, M) errors of every candidate that can still win, or whose bound is at most ``limit``; infinity elsewhere."""
    open_bound, error = bound.clone(), torch.full_like(bound, torch.inf)
    n_batch = min(n_batch, bound.shape[1])
    while True:
        best = error.amin(1) if limit is None else torch.full_like(error[:, 0], limit)
        nearest, index = open_bound.topk(n_batch, dim=1, largest=False)
        channels = ((nearest[:, 0] * (1 - _SLACK) <= best) & torch.isfinite(nearest[:, 0])).nonzero().flatten()
        if len(channels) == 0:
            return error
        index = index[channels]
        error[channels.unsqueeze(1), index] = refine(index, channels)
        open_bound[channels.unsqueeze(1), index] = torch.inf


def _on_values(values: Tensor, bound: Tensor, binned: Tensor, candidates: _Candidates, bins: Bins) -> Tensor:
    """(M,) errors measured on one channel's values for every candidate that its bounds cannot rule out."""
    error = torch.full_like(bound, torch.inf)

    def measure(index: int) -> None:
        at = torch.tensor([[index]], device=bound.device)
        step, k_min = (float(t) for t in _gather(candidates, at, at.new_zeros(1)))
        error[index] = value_error(values, step, k_min, n_codes=candidates.n_codes, p=candidates.p)

    measure(int(binned.argmin()))
    rest = torch.where(torch.isfinite(binned), torch.inf, bound)
    more = _best_first(rest.unsqueeze(0), partial(_refined, bins, candidates), 4, limit=float(error.min()))[0]
    lower = torch.minimum(binned, more)
    for index in lower.argsort().tolist():
        if float(lower[index]) * (1 - _SLACK) > float(error.min()):
            break
        if torch.isinf(error[index]):
            measure(index)
    return error
