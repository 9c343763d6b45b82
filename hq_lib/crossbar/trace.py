"""Traces: recorded multiplications of a network, one file that says what it holds and whether it is undamaged.

`.npz` with a `.json` neighbour. Schema 1:

    layers/<i>/w        (K, N) int32 weights              layers/<i>/w_scale   () or (N,) float64, real units per step
    calls/<i>/x         (B, K) integer inputs             calls/<i>/y          (B, N) float64, measured
    calls/<i>/y_ideal   (B, N) int64, exact products      (accumulator units; y after the inner engine's correction)

The JSON text lists layers, calls (layer, seconds after programming), engine, units and the SHA-256 of every array, and
ends with its own: a changed number anywhere is refused. That guards against damage, not against a forger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from hq_lib.crossbar.checks import CrossbarError, TraceError
from hq_lib.crossbar.engine import Handle, make_handle
from hq_lib.results import atomic

SCHEMA = 1
UNITS = {"x": "input steps", "y": "accumulator steps", "t_s": "seconds after programming"}


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded multiplication of one layer."""

    layer: str
    """Layer name."""
    x: np.ndarray
    """(B, K) integers."""
    y: np.ndarray
    """(B, N) float64, measured."""
    y_ideal: np.ndarray
    """(B, N) int64, exact."""
    t_s: float
    """Seconds after programming."""


@dataclass(eq=False)
class Trace:
    """Layers, and the calls made to them in order."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Description of the engine that was recorded."""
    layers: dict[str, Handle] = field(default_factory=dict)
    """Recorded layers by name."""
    calls: list[Call] = field(default_factory=list)
    """Recorded calls, oldest first."""

    @property
    def n_rows(self) -> int:
        """Recorded rows."""
        return sum(len(call.x) for call in self.calls)

    def save(self, path: str | Path) -> None:
        """Nothing; writes ``path`` (.npz, with .json beside it), whole or not at all."""
        _check_suffix(path)
        arrays, text = self._packed()
        buffer = BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        atomic.write_text(Path(path).with_suffix(".json"), text)  # first: an archive without it would be damaged
        atomic.write_bytes(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """The trace stored at ``path``. Errors (`TraceError`): another schema, changed or missing arrays."""
        try:
            _check_suffix(path)
            arrays, text = _read_npz(Path(path))
            record = json.loads(text)
        except (OSError, ValueError, KeyError) as error:
            raise (
                error
                if isinstance(error, (FileNotFoundError, CrossbarError))
                else TraceError(f"{path}: unreadable trace ({error})")
            ) from error
        _verify(path, record, arrays)
        return cls._unpacked(record, arrays)

    @classmethod
    def join(cls, parts: Iterable[Trace]) -> Trace:
        """One trace of all ``parts`` in their order; parts whose layers contradict each other are refused."""
        whole = cls()
        for part in parts:
            whole.engine = whole.engine or part.engine
            for name, handle in part.layers.items():
                if whole.layers.setdefault(name, handle).digest != handle.digest:
                    raise TraceError(f"layer {name!r} has different weights in two parts of one trace")
            whole.calls += part.calls
        return whole

    def _packed(self) -> tuple[dict[str, np.ndarray], str]:
        arrays: dict[str, np.ndarray] = {}
        for i, handle in enumerate(self.layers.values()):
            arrays[f"layers/{i}/w"], arrays[f"layers/{i}/w_scale"] = handle.w_int.numpy(), handle.w_scale.numpy()
        for i, call in enumerate(self.calls):
            arrays |= {f"calls/{i}/x": call.x, f"calls/{i}/y": call.y, f"calls/{i}/y_ideal": call.y_ideal}
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "units": UNITS,
            "engine": self.engine,
            "layers": [
                {"name": h.name, "w_bits": h.w_bits, "x_bits": h.x_bits, "x_signed": h.x_signed, "weights": h.digest}
                for h in self.layers.values()
            ],
            "calls": [{"layer": call.layer, "t_s": call.t_s} for call in self.calls],
            "sha256": {name: _digest(array) for name, array in arrays.items()},
        }
        record["record_sha256"] = _record_digest(record)
        return arrays, json.dumps(record, indent=1) + "\n"

    @classmethod
    def _unpacked(cls, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trace:
        layers: dict[str, Handle] = {}
        for i, layer in enumerate(record["layers"]):
            layers[layer["name"]] = make_handle(
                arrays[f"layers/{i}/w"],
                arrays[f"layers/{i}/w_scale"],
                layer["name"],
                w_bits=layer["w_bits"],
                x_bits=layer["x_bits"],
                x_signed=layer["x_signed"],
            )
        calls = []
        for i, call in enumerate(record["calls"]):
            x, y, y_ideal = (arrays[f"calls/{i}/{part}"] for part in ("x", "y", "y_ideal"))
            calls.append(Call(call["layer"], x, y, y_ideal, call["t_s"]))
        return cls(record["engine"], layers, calls)


def _verify(path: str | Path, record: Any, arrays: dict[str, np.ndarray]) -> None:
    """Nothing, or an error that names what is wrong with a stored trace."""
    if not isinstance(record, dict):
        raise TraceError(f"{path}: unreadable trace (its description is {record!r:.40})")
    if record.get("schema") != SCHEMA:
        raise TraceError(f"{path}: trace schema {record.get('schema')!r}, this version reads {SCHEMA}")
    if record.get("record_sha256") != _record_digest(record):
        raise TraceError(f"{path}: the description was changed after recording; record again")
    if set(record["sha256"]) != set(arrays):
        odd = sorted(set(record["sha256"]) ^ set(arrays))
        raise TraceError(f"{path}: arrays are missing or foreign: {', '.join(odd[:5])}")
    for name, array in arrays.items():
        if _digest(array) != record["sha256"][name]:
            raise TraceError(f"{path}: array {name} was changed after recording; record again")


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _record_digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix != ".npz":
        raise TraceError(f"{path}: a trace is stored as .npz")


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], str]:
    content = path.read_bytes()
    try:
        with np.load(BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged archive fails in zipfile, zlib or NumPy, each in its own way
        raise TraceError(f"{path}: damaged archive ({error})") from error
    return arrays, path.with_suffix(".json").read_text(encoding="utf-8")
