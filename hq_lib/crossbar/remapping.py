"""Remapping around known stuck cells, without any cost at run time.

Partner: where one cell of a pair is stuck, its partner is programmed to the best remaining difference.
Rows: within a tile any logical row may use any physical row; the assignment of least squared weight error is found by
the Hungarian method. Both need the fault map before programming.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError
from hq_lib.crossbar.faults import OK, STUCK_HIGH
from hq_lib.crossbar.mapping import Plan

CHOICES = ("none", "partner", "rows", "both")


def partner_levels(plan: Plan, codes: Tensor) -> Tensor:
    """float64 (K, C, P) levels: those of ``plan``, with healthy partners of stuck cells moved to compensate.

    For a stuck level v of G+ the partner gets clip(v - w, 0, span); for one of G-, clip(v + w, 0, span).
    """
    _require_pair(plan)
    levels, span = plan.levels.clone(), plan.span[None, :, None]
    weight = levels[..., 0::2] - levels[..., 1::2]
    for own, other, sign in ((0, 1, -1.0), (1, 0, 1.0)):
        stuck = (codes[..., own::2] != OK) & (codes[..., other::2] == OK)
        value = span * (codes[..., own::2] == STUCK_HIGH)
        wanted = torch.minimum((value + sign * weight).clamp_min(0.0), span)
        levels[..., other::2] = torch.where(stuck, wanted, levels[..., other::2])
    return levels


def row_order(plan: Plan, codes: Tensor, *, partner: bool) -> Tensor:
    """int64 (K,): the logical row that each physical row should hold; rows never leave their tile.

    Args:
        plan: levels in logical order.
        codes: (K, C, P) fault codes in physical order.
        partner: whether partner cells will compensate (then the remaining error counts).
    """
    _require_pair(plan)
    order = torch.arange(plan.levels.shape[0])
    for start in range(0, len(order), plan.mapping.tile_rows):
        rows = slice(start, start + plan.mapping.tile_rows)
        if bool((codes[rows] != OK).any()):
            _, logical = linear_sum_assignment(_row_costs(plan, rows, codes[rows], partner).numpy())
            order[rows] = start + torch.from_numpy(logical)
    return order


def _row_costs(plan: Plan, rows: slice, codes: Tensor, partner: bool) -> Tensor:
    """float64 (physical, logical): squared weight error if that logical row sits on that physical row."""
    levels, span = plan.levels[rows], plan.span[None, :, None]
    plus, minus = levels[..., 0::2], levels[..., 1::2]
    slice_factor = plan.weight.abs()[:: 1 if plan.signed else 2]
    cost = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            here = (codes[..., 0::2] == a) & (codes[..., 1::2] == b)
            if (a, b) == (OK, OK) or not bool(here.any()):
                continue
            error = _weight_error(plus, minus, span, a, b, partner) * slice_factor / plan.gain[:, None]
            cost += here.flatten(1).to(torch.float64) @ error.square().flatten(1).T
    return cost


def _weight_error(plus: Tensor, minus: Tensor, span: Tensor, a: int, b: int, partner: bool) -> Tensor:
    """Error of each pair's difference, in weight steps, if its cells had fault codes ``a`` and ``b``."""
    weight = plus - minus
    got_plus = plus if a == OK else span * float(a == STUCK_HIGH)
    got_minus = minus if b == OK else span * float(b == STUCK_HIGH)
    if partner and a != OK and b == OK:
        got_minus = torch.minimum((got_plus - weight).clamp_min(0.0), span)
    if partner and a == OK and b != OK:
        got_plus = torch.minimum((got_minus + weight).clamp_min(0.0), span)
    return got_plus - got_minus - weight


def _require_pair(plan: Plan) -> None:
    if plan.mapping.scheme != "pair":
        raise CrossbarError("fault-aware remapping works on pairs; use Mapping(scheme='pair') or remap='none'")
