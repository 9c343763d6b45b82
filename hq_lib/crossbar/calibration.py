"""Calibration of a network's layers: residuals and drift compensation.

Open loop: every layer is fitted on the ideal network's inputs. Closed loop: on the inputs that the already calibrated
layers before it really deliver, against the ideal network's accumulators for the same images; it also takes out what
upstream layers left over. Drift compensation scales readings back to what the same probe inputs gave at the reference
time, once per layer read and kept:

    factor = mean |reading at t0| / mean |reading now|        per column, or one per layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, Numbers, as_tensor, check_choice
from hq_lib.crossbar.engine import Engine
from hq_lib.crossbar.operands import Handle, exact_mvm

Sample = tuple[Numbers, Numbers | None]
"""(inputs (m, K), wanted outputs (m, N) or None for the exact product of those inputs)"""


def residuals(engine: Engine, samples: Mapping[Handle, Sample]) -> pd.DataFrame:
    """One row per layer on held-out ``samples``: errors before and after its correction, in accumulator units (LSB).

    Columns: layer, kind, n_rows, rmse_raw_lsb, rmse_lsb, relative_error (rmse over the root mean square of what was
    wanted), slope and r2 of measured against wanted.
    """
    lines = []
    for handle, (x, wanted) in samples.items():
        z = exact_mvm(handle, as_tensor(x)) if wanted is None else as_tensor(wanted).to(torch.float64)
        raw, correction = engine.measure(handle, x), engine.correction(handle)
        y = correction.apply(raw)
        error, centred = y - z, z - z.mean()
        power = float(centred.square().sum()) or float("nan")
        rmse = float(error.square().mean().sqrt())
        lines.append({
            "layer": handle.name, "kind": correction.kind, "n_rows": len(z),
            "rmse_raw_lsb": float((raw - z).square().mean().sqrt()), "rmse_lsb": rmse,
            "relative_error": rmse / float(z.square().mean().sqrt().clamp_min(1e-30)),
            "slope": float((centred * y).sum()) / power, "r2": 1 - float(error.square().sum()) / power,
        })  # fmt: skip
    return pd.DataFrame(lines)


_RANGE = (0.1, 100.0)  # a factor outside it means a dead column, not drift


@dataclass(frozen=True, eq=False)
class Reference:
    """What a layer read for its probe rows at the reference time."""

    probes: Tensor
    """(m, K) integer inputs."""
    size: Tensor
    """float64 (N,), mean |reading| per column, accumulator units."""


def take_reference(engine: Engine, handle: Handle, probes: Numbers) -> Reference:
    """The reference of ``handle`` for ``probes`` (m, K) at the engine's present time."""
    rows = as_tensor(probes)
    if len(rows) < 1 or not bool((rows != 0).any()):
        raise CrossbarError(f"{handle.name}: probe rows must exist and not all be zero")
    return Reference(rows, engine.measure(handle, rows).abs().mean(0))


def compensate_drift(engine: Engine, handle: Handle, reference: Reference, *, per: str = "column") -> Tensor:
    """float64 (N,): the factors now in force for ``handle``, from reading the probes again.

    Args:
        per: "column" (one factor per output) or "layer" (one for all). Dead columns keep the factor 1.
    """
    check_choice(per, ("column", "layer"), "per")
    now = engine.measure(handle, reference.probes).abs().mean(0)
    if per == "layer":
        then_all, now_all = reference.size.sum(), now.sum()
        factor = (then_all / now_all.clamp_min(1e-30)).expand_as(now)
    else:
        factor = reference.size / now.clamp_min(1e-30)
    factor = torch.where((reference.size > 0) & (now > 0), factor.clamp(*_RANGE), 1.0)
    engine.set_correction(handle, replace(engine.correction(handle), drift=factor))
    return factor
