"""The L_p error of many affine grids at once: directly, and as a cheap lower bound over thousands of grids.

A candidate is (step, k_min): the levels are step * k for k_min <= k <= k_min + n_codes - 1, so all candidates of one
step share the same infinite grid {step * k} and differ only in the window of codes that clips it. Hence

    E(step, k_min) = R(window) + U(high end) + L(low end)

with R the rounding error inside the window (one prefix sum per step serves every k_min) and U, L the clipping errors.
The lower bounds here are proved, not heuristic; ``lp_grid`` uses them to find the exact optimum without trying all.

Symbols: C channels, K bins, S steps, Z windows per step, p >= 1 the exponent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

N_APART = 12
"""One step in so many is tried, for an error that the optimum cannot exceed."""


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
    merged = count.sum(2)
    total = (mean * count).sum(2)
    return Bins(torch.where(merged > 0, total / merged.clamp(min=1), mean.mean(2)), merged, bins.spread * factor)


def grid_error(
    x: Tensor, count: Tensor, step: Tensor, k_min: Tensor, *, n_codes: int, p: float, spread: Tensor
) -> Tensor:
    """Summed count * |x - nearest level|^p: exact for spread 0, else a lower bound of the bins' error.

        E = sum_x n(x) |x - step * clip(round(x / step), k_min, k_min + n_codes - 1)|^p

    Lower bound: |x - level|^p is convex except at the mid points between levels, so a bin that holds no mid point obeys
    Jensen's inequality at its mean; distance to a grid is 1-Lipschitz, so any other bin loses at most ``spread``.

    Args:
        x, count: (C, 1, K), float64; step, k_min: (C, B, 1); spread: (C, 1, 1).

    Returns:
        (C, B), real units to the p.
    """
    inner = torch.round(x / step)
    code = torch.minimum(torch.maximum(inner, k_min), k_min + (n_codes - 1))
    distance = (x - code * step).abs_()
    if bool((spread > 0).any()):
        doubtful = (code == inner) & (distance > step / 2 - spread)
        distance = torch.where(doubtful, (distance - spread).clamp_(min=0), distance)
    return (power(distance, p) * count).sum(-1)


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
    R is left out where U + L alone is more than the largest error that one of a few grids can have: at 8 bits that is
    four steps of five.

    Args:
        steps: (C, S) float64, > 0; k_min: broadcastable to (C, S, Z), integer-valued float64.

    Returns:
        (C, S, Z), real units to the p.
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
    bounds = _tail_bound(*_pick(below, at_first), first, p) + _tail_bound(*_pick(above, at_last), last, p)
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
    distance = (bins.mean - torch.round(bins.mean / step) * step).abs_()
    if bool((bins.spread > 0).any()):
        doubtful = distance > step / 2 - bins.spread
        distance = torch.where(doubtful, (distance - bins.spread).clamp_(min=0), distance)
    return torch.nn.functional.pad((power(distance, p) * bins.count).cumsum(-1), (1, 0))


def _pick(sums: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three moment sums (C, S, Z) of the bins beyond each index."""
    n, first, second = sums.gather(2, index.flatten(1).expand(3, -1, -1)).view(3, *index.shape)
    return n, first, second


def _tail_bound(n: Tensor, first: Tensor, second: Tensor, end: Tensor, p: float) -> Tensor:
    """Lower bound of sum |x - end|^p over a tail, from its raw moments; cancellation is charged against the bound."""
    size = second + end * end * n
    m_1 = (first - end * n).abs_()
    m_2 = (second - 2 * end * first + end * end * n - 1e-12 * size).clamp_(min=0)
    if p < 2:
        mean = (m_1 - 1e-12 * (first.abs() + end.abs() * n)).clamp_(min=0) / n.clamp(min=1)
        return n * power(mean, p)
    return torch.where(m_2 > 0, m_2 * torch.pow(m_2 / m_1.clamp(min=1e-300), p - 2), m_2)
