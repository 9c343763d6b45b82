"""Calibration of a whole network's layers: in order, with a report, saved and loaded.

Open loop: every layer is fitted on the ideal network's inputs. Closed loop: on the inputs that the already calibrated
layers before it really deliver, against the ideal network's accumulators for the same images; it also takes out what
upstream layers left over. The caller runs the network; here only rows of integers pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, as_tensor
from hq_lib.crossbar.correction import Correction
from hq_lib.crossbar.description import difference
from hq_lib.crossbar.engine import Engine, Handle, exact_mvm
from hq_lib.crossbar.recording import simulated
from hq_lib.results import atomic

SCHEMA = 1
Sample = tuple[np.ndarray | Tensor, np.ndarray | Tensor | None]
"""(inputs (m, K), wanted outputs (m, N) or None for the exact product of those inputs)"""


def calibrate_layers(
    engine: Engine,
    handles: Sequence[Handle],
    sample: Callable[[Handle], Sample],
    *,
    kind: str = "column",
    repeats: int = 1,
    adc: bool = True,
) -> dict[str, Correction]:
    """{layer: correction now in force}, fitted layer after layer.

    Args:
        handles: layers in the order of the network.
        sample: called once per layer just before it is fitted, when all layers before it are calibrated. Open loop:
            return recorded ideal inputs and None. Closed loop: run the network on the engine up to this layer and
            return its present inputs with the ideal network's accumulators.
        kind, repeats: see `Engine.calibrate`.
        adc: fit converter ranges first, where they are of the "calibrated" kind.
    """
    for handle in handles:
        x, wanted = sample(handle)
        if adc:
            fit_range(engine, handle, x)
        engine.calibrate(handle, x, wanted, kind=kind, repeats=repeats)
    return {handle.name: engine.correction(handle) for handle in handles}


def fit_range(engine: Engine, handle: Handle, x: np.ndarray | Tensor) -> None:
    """Nothing; fits the converters behind ``handle`` to rows ``x`` (m, K), if they are simulated and "calibrated"."""
    found = simulated(engine, handle)
    if found and found[0].circuit.adc and found[0].circuit.adc.range == "calibrated":
        found[0].calibrate_adc(found[1], x)


def residuals(engine: Engine, samples: Mapping[Handle, Sample]) -> pd.DataFrame:
    """One row per layer on held-out ``samples``: errors before and after its correction, in accumulator units (LSB).

    Columns: layer, kind, n_rows, rmse_raw_lsb, rmse_lsb, bias_lsb, worst_column_rmse_lsb, relative_error (rmse over the
    root mean square of what was wanted), slope and r2 of measured against wanted.
    """
    return pd.DataFrame([_residual(engine, handle, *sample) for handle, sample in samples.items()])


def _residual(
    engine: Engine, handle: Handle, x: np.ndarray | Tensor, wanted: np.ndarray | Tensor | None
) -> dict[str, Any]:
    z = exact_mvm(handle, as_tensor(x)) if wanted is None else as_tensor(wanted).to(torch.float64)
    raw = engine.measure(handle, x)
    y = engine.correction(handle).apply(raw)
    error, centred = y - z, z - z.mean()
    power = float(centred.square().sum())
    return {
        "layer": handle.name,
        "kind": engine.correction(handle).kind,
        "n_rows": len(z),
        "rmse_raw_lsb": float((raw - z).square().mean().sqrt()),
        "rmse_lsb": float(error.square().mean().sqrt()),
        "bias_lsb": float(error.mean()),
        "worst_column_rmse_lsb": float(error.square().mean(0).sqrt().max()),
        "relative_error": float(error.square().mean().sqrt() / z.square().mean().sqrt().clamp_min(1e-30)),
        "slope": float((centred * y).sum()) / power if power else float("nan"),
        "r2": 1 - float(error.square().sum()) / power if power else float("nan"),
    }


def save_calibration(path: str | Path, engine: Engine) -> None:
    """Nothing; writes corrections and converter steps of all loaded layers to ``path`` (.npz) and its .json neighbour.

    The JSON names engine, layers with the hash of their weights, and the hash of the arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, handle in engine.handles.items():
        found = engine.correction(handle)
        layers[name] = {"weights": handle.digest, "kind": found.kind, "n_rows": found.n_rows}
        layers[name] |= {part: _finite(getattr(found, part)) for part in ("rmse_before", "rmse_after")}
        arrays |= {f"{name}/{part}": getattr(found, part).numpy() for part in ("gain", "offset", "drift")}
        simulator = simulated(engine, handle)
        step = simulator[0].layer(simulator[1]).adc_step if simulator else None
        if step is not None:
            arrays[f"{name}/adc_step"] = step.numpy()
    buffer = BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    record = {"schema": SCHEMA, "engine": engine.describe(), "layers": layers, "sha256": digest}
    atomic.write_bytes(Path(path), buffer.getvalue())
    atomic.write_text(Path(path).with_suffix(".json"), json.dumps(record, indent=1) + "\n")


def load_calibration(path: str | Path, engine: Engine) -> list[str]:
    """Names of the layers that are calibrated now, as saved by `save_calibration`.

    Errors: another schema, damaged arrays, a layer that is not loaded or whose weights differ, an engine with other
    settings (its cells have other errors); its time may differ.
    """
    content, record = Path(path).read_bytes(), _read_record(Path(path))
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise CrossbarError(f"{path}: the arrays are not those the .json describes; calibrate again")
    handles = engine.handles
    for name, layer in record["layers"].items():
        if name not in handles or handles[name].digest != layer["weights"]:
            state = "has other weights" if name in handles else "is not loaded"
            raise CrossbarError(f"{path}: layer {name!r} {state}; this calibration belongs to another network")
    if other := difference(record["engine"], engine.describe()):
        raise CrossbarError(f"{path}: it was fitted on another engine: {other}; calibrate this one")
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        for name, layer in record["layers"].items():
            _restore(engine, handles[name], layer, {key: torch.from_numpy(arrays[key]) for key in arrays.files})
    return list(record["layers"])


def _read_record(path: Path) -> dict[str, Any]:
    """The description beside the arrays at ``path``."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CrossbarError(f"{path}: its .json is unreadable ({error}); calibrate again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else record
        raise CrossbarError(f"{path}: calibration schema {found!r:.40}, this version reads {SCHEMA}")
    kinds = {"sha256": str, "engine": dict, "layers": dict}
    if any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise CrossbarError(f"{path}: its .json lacks one of {', '.join(kinds)}; calibrate again")
    return record


def _restore(engine: Engine, handle: Handle, layer: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    gain, offset, drift = (arrays[f"{handle.name}/{part}"] for part in ("gain", "offset", "drift"))
    simulator = simulated(engine, handle)
    if simulator and f"{handle.name}/adc_step" in arrays:
        simulator[0].layer(simulator[1]).set_adc_step(arrays[f"{handle.name}/adc_step"])
    engine.set_correction(
        handle,
        Correction(
            gain,
            offset,
            drift,
            layer["kind"],
            layer["n_rows"],
            *(float("nan") if layer[part] is None else layer[part] for part in ("rmse_before", "rmse_after")),
        ),
    )


def _finite(value: float) -> float | None:
    """``value``, or None for NaN, which JSON has no word for."""
    return value if value == value else None
