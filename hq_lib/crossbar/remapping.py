"""Remapping around known stuck cells, without any cost at run time.

Partner: every weight is encoded again around its stuck cells, from the highest slice down. In a pair with one stuck
cell the other is set to the best remaining difference; what a slice cannot give, the slices below it try to.
Rows: within a tile any logical row may use any physical row; the assignment of least squared weight error is found by
the Hungarian method. Both need the fault map before programming, and pairs.
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
    """float64 (K, C, P) levels: those of ``plan`` where cells work, re-encoded around stuck ones elsewhere.

    With G+ stuck at level v and a wanted difference w, the partner gets clip(v - w, 0, span); likewise for G-.
    """
    _require_pair(plan)
    factors = _slice_factors(plan)
    rest = (plan.levels[..., 0::2] - plan.levels[..., 1::2]) @ factors  # (K, N), what is still to be given
    levels, span = plan.levels.clone(), plan.span
    for s in range(len(factors) - 1, -1, -1):
        wanted = rest / factors[s]
        wanted = wanted.trunc() if plan.mapping.cell_bits is not None else wanted
        plus, minus = _pair_around(wanted, span, codes[..., 2 * s], codes[..., 2 * s + 1])
        levels[..., 2 * s], levels[..., 2 * s + 1] = plus, minus
        rest = rest - (plus - minus) * factors[s]
    return levels


def _pair_around(wanted: Tensor, span: Tensor, code_plus: Tensor, code_minus: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (plus, minus) whose difference is nearest to ``wanted`` (K, N) given the fault codes of both cells."""
    wanted = torch.minimum(torch.maximum(wanted, -span), span)
    plus, minus = wanted.clamp_min(0.0), (-wanted).clamp_min(0.0)
    v_plus, v_minus = span * (code_plus == STUCK_HIGH), span * (code_minus == STUCK_HIGH)
    free_plus = torch.where(code_minus == OK, plus, torch.minimum((v_minus + wanted).clamp_min(0.0), span))
    free_minus = torch.where(code_plus == OK, minus, torch.minimum((v_plus - wanted).clamp_min(0.0), span))
    return torch.where(code_plus == OK, free_plus, v_plus), torch.where(code_minus == OK, free_minus, v_minus)


def row_order(plan: Plan, codes: Tensor, *, partner: bool) -> Tensor:
    """int64 (K,): the logical row that each physical row should hold; rows never leave their tile.

    Args:
        plan: levels in logical order.
        codes: (K, C, P) fault codes in physical order.
        partner: whether weights will be re-encoded around faults (then the remaining error counts).
    """
    _require_pair(plan)
    order = torch.arange(plan.levels.shape[0])
    for start in range(0, len(order), plan.mapping.tile_rows):
        rows = slice(start, start + plan.mapping.tile_rows)
        if bool((codes[rows] != OK).any()):
            _, logical = linear_sum_assignment(_row_costs(plan.rows(rows), codes[rows], partner).numpy())
            order[rows] = start + torch.from_numpy(logical)
    return order


def _row_costs(plan: Plan, codes: Tensor, partner: bool) -> Tensor:
    """float64 (physical, logical): squared weight error if that logical row sits on that physical row."""
    cost = torch.zeros(len(codes), len(codes), dtype=torch.float64)
    factors = _slice_factors(plan)
    wanted = (plan.levels[..., 0::2] - plan.levels[..., 1::2]) @ factors
    for p in torch.nonzero((codes != OK).flatten(1).any(1)).flatten().tolist():
        here = codes[p].expand_as(plan.levels)
        levels = partner_levels(plan, here) if partner else plan.levels
        stuck = plan.span[:, None] * (here == STUCK_HIGH)
        got = torch.where(here == OK, levels, stuck)
        error = (got[..., 0::2] - got[..., 1::2]) @ factors - wanted
        cost[p] = (error / plan.gain).square().sum(1)
    return cost


def _slice_factors(plan: Plan) -> Tensor:
    """float64 (S,): the factor of each slice, without signs."""
    return plan.weight.abs()[:: 1 if plan.signed else 2]


def _require_pair(plan: Plan) -> None:
    if plan.mapping.scheme != "pair":
        raise CrossbarError("fault-aware remapping works on pairs; use Mapping(scheme='pair') or remap='none'")
