"""Drift compensation: scale readings back to what the same probe inputs gave at the reference time.

    factor = mean |reading at t0| / mean |reading now|        per column, or one per layer

One reference per layer, read once at t0 and kept with the calibration; a readout now costs the same probe rows again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, as_tensor, check_choice
from hq_lib.crossbar.engine import Engine, Handle

_RANGE = (0.1, 100.0)  # a factor outside it means a dead column, not drift


@dataclass(frozen=True, eq=False)
class Reference:
    """What a layer read for its probe rows at the reference time."""

    probes: Tensor
    """(m, K) integer inputs."""
    size: Tensor
    """float64 (N,), mean |reading| per column, accumulator units."""
    t_s: float
    """Seconds after programming at which it was read."""


def take_reference(engine: Engine, handle: Handle, probes: np.ndarray | Tensor) -> Reference:
    """The reference of ``handle`` for ``probes`` (m, K) at the engine's present time."""
    rows = as_tensor(probes)
    if len(rows) < 1 or not bool((rows != 0).any()):
        raise CrossbarError(f"{handle.name}: probe rows must exist and not all be zero")
    return Reference(rows, engine.measure(handle, rows).abs().mean(0), engine.time_s)


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
    engine.set_correction(handle, engine.correction(handle).with_drift(factor))
    return factor
