"""Calibration of a network's layers: converter ranges, residuals, drift compensation, saved and loaded.

Open loop: every layer is fitted on the ideal network's inputs. Closed loop: on the inputs that the already calibrated
layers before it really deliver, against the ideal network's accumulators for the same images; it also takes out what
upstream layers left over. Drift compensation scales readings back to what the same probe inputs gave at the reference
time, once per layer read and kept:

    factor = mean |reading at t0| / mean |reading now|        per column, or one per layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, Numbers, as_tensor, check_choice, difference
from hq_lib.crossbar.engine import Correction, Engine
from hq_lib.crossbar.operands import Handle, exact_mvm
from hq_lib.crossbar.recording import read_sealed, simulated, write_sealed

SCHEMA = 2
Sample = tuple[Numbers, Numbers | None]
"""(inputs (m, K), wanted outputs (m, N) or None for the exact product of those inputs)"""


def fit_range(engine: Engine, handle: Handle, x: Numbers) -> None:
    """Nothing; fits the converters behind ``handle`` to rows ``x`` (m, K), if they are simulated and "calibrated"."""
    found = simulated(engine)
    if found and found.circuit.adc and found.circuit.adc.range == "calibrated":
        found.calibrate_adc(handle, x)


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


def save_calibration(path: str | Path, engine: Engine) -> None:
    """Nothing; writes corrections and converter steps of all loaded layers to ``path`` (.safetensors).

    Its record names engine, and layers with the hash of their weights; the file is sealed with its own.
    """
    state: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    simulator = simulated(engine)
    for name, handle in engine.handles.items():
        found = engine.correction(handle)
        errors = {part: getattr(found, part) for part in ("rmse_before", "rmse_after")}
        errors = {part: None if value != value else value for part, value in errors.items()}  # JSON has no NaN
        layers[name] = {"weights": handle.digest, "kind": found.kind, "n_rows": found.n_rows, **errors}
        state |= {f"{name}/{part}": getattr(found, part) for part in ("gain", "offset", "drift")}
        step = simulator.layer(handle).adc_step if simulator else None
        if step is not None:
            state[f"{name}/adc_step"] = step
    write_sealed(path, state, {"schema": SCHEMA, "engine": engine.describe(), "layers": layers})


def load_calibration(path: str | Path, engine: Engine) -> list[str]:
    """Names of the layers that are calibrated now, as saved by `save_calibration`.

    Errors: another schema, a damaged file, a layer that is not loaded or whose weights differ, an engine with other
    settings (its cells have other errors); its time may differ.
    """
    state, record = read_sealed(path, SCHEMA)
    handles = engine.handles
    for name, layer in record["layers"].items():
        if name not in handles or handles[name].digest != layer["weights"]:
            state_of = "has other weights" if name in handles else "is not loaded"
            raise CrossbarError(f"{path}: layer {name!r} {state_of}; this calibration belongs to another network")
    if other := difference(record["engine"], engine.describe()):
        raise CrossbarError(f"{path}: it was fitted on another engine: {other}; calibrate this one")
    for name, layer in record["layers"].items():
        handle = handles[name]
        if (simulator := simulated(engine)) and f"{name}/adc_step" in state:
            simulator.layer(handle).set_adc_step(state[f"{name}/adc_step"])
        gain, offset, drift = (state[f"{name}/{part}"] for part in ("gain", "offset", "drift"))
        errors = (float("nan") if layer[part] is None else layer[part] for part in ("rmse_before", "rmse_after"))
        engine.set_correction(handle, Correction(gain, offset, drift, layer["kind"], layer["n_rows"], *errors))
    return list(record["layers"])


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


def take_reference(engine: Engine, handle: Handle, probes: Numbers) -> Reference:
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
