"""Traces: every multiplication that a bench or a simulation was asked for, with what it answered.

A trace is one sealed `.safetensors` file. Schema 2:

    layers/<i>/w        (K, N) int32 weights              layers/<i>/w_scale   () or (N,) float64, real units per step
    calls/<i>/x         (B, K) integer inputs             calls/<i>/y          (B, N) float64, measured
    calls/<i>/y_ideal   (B, N) int64, exact products      (accumulator units; y after the inner engine's correction)

Its record lists layers, calls (layer, seconds after programming, degrees Celsius, writes and saturated counts of a
bench, a digest of fitted converters), engine and units, and with it stands the SHA-256 of all: a changed number
anywhere is refused. That guards against damage, not against a forger.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import TraceError, difference
from hq_lib.crossbar.operands import Handle, make_handle
from hq_lib.models import CheckpointError, read_checkpoint, write_checkpoint

SCHEMA = 2
UNITS = {"x": "input steps", "y": "accumulator steps", "t_s": "seconds after programming"}
_OF_A_CALL = ("layer", "t_s", "celsius", "n_writes", "n_saturated", "steps")


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
    celsius: float = 25.0
    """Temperature of simulated cells; a bench's is in its description."""
    n_writes: int = 0
    """Writes so far of the bench's tiles that hold the layer, over all parts of a record: after others cells differ."""
    n_saturated: int = 0
    """Counts among it at the end of a bench's range."""
    steps: str = ""
    """Digest of the fitted steps of simulated converters; "" where none are fitted."""


@dataclass(eq=False)
class Trace:
    """Layers, and the calls made to them in order."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Description of the engine that was recorded."""
    layers: dict[str, Handle] = field(default_factory=dict)
    """Recorded layers by name."""
    calls: list[Call] = field(default_factory=list)
    """Recorded calls, oldest first."""
    _used: Counter[tuple[str, bytes]] = field(default_factory=Counter)

    @property
    def n_rows(self) -> int:
        """Recorded rows."""
        return sum(len(call.x) for call in self.calls)

    @property
    def n_saturated(self) -> int:
        """Counts at the end of a bench's range, which may stand for larger ones."""
        return sum(call.n_saturated for call in self.calls)

    @property
    def written_again(self) -> list[str]:
        """Layers of which some rows were measured before and others after their tiles were written again."""
        written = {(call.layer, call.n_writes) for call in self.calls}
        return sorted(name for name, n in Counter(name for name, _ in written).items() if n > 1)

    def take(self, layer: str, rows: Tensor, y: Tensor) -> dict[int, int]:
        """{row: times it was measured} of the ``rows`` (B, K) of ``layer`` that have no measurement (left).

        Each other row of ``y`` (B, N) is filled with its next measurement; each is given out once.
        """
        missing: dict[int, int] = {}
        for i, key in enumerate(_keys(layer, rows.numpy())):
            measured, n = self._measured.get(key, []), self._used[key]
            if n == len(measured):
                missing[i] = n
            else:
                y[i], self._used[key] = torch.from_numpy(measured[n]), n + 1
        return missing

    @cached_property
    def _measured(self) -> dict[tuple[str, bytes], list[np.ndarray]]:
        """Measurements by layer and row, in the order in which they were made."""
        found: dict[tuple[str, bytes], list[np.ndarray]] = {}
        for call in self.calls:
            for key, y in zip(_keys(call.layer, call.x), call.y, strict=True):
                found.setdefault(key, []).append(y)
        return found

    def rewind(self) -> None:
        """Nothing; every measurement can be given out again."""
        self._used.clear()

    def save(self, path: str | Path) -> None:
        """Nothing; writes ``path`` (.safetensors), whole or not at all."""
        state: dict[str, Tensor] = {}
        for i, handle in enumerate(self.layers.values()):
            state |= {f"layers/{i}/w": handle.w_int, f"layers/{i}/w_scale": handle.w_scale}
        for i, call in enumerate(self.calls):
            state |= {f"calls/{i}/{part}": torch.from_numpy(getattr(call, part)) for part in ("x", "y", "y_ideal")}
        record = {
            "schema": SCHEMA,
            "units": UNITS,
            "engine": self.engine,
            "layers": [
                {"name": h.name, "w_bits": h.w_bits, "x_bits": h.x_bits, "x_signed": h.x_signed, "weights": h.digest}
                for h in self.layers.values()
            ],
            "calls": [{part: getattr(call, part) for part in _OF_A_CALL} for call in self.calls],
        }
        write_checkpoint(path, state, record)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """The trace stored at ``path``. Errors (`TraceError`): absent, changed in anything, or of another schema."""
        layers: dict[str, Handle] = {}
        try:
            state, record = read_checkpoint(path)
            if record.get("schema") != SCHEMA:
                raise TraceError(f"{path}: schema {record.get('schema')!r:.40}, this version reads {SCHEMA}")
            for i, layer in enumerate(record["layers"]):
                bits = {key: layer[key] for key in ("w_bits", "x_bits", "x_signed")}
                w, scale = state[f"layers/{i}/w"], state[f"layers/{i}/w_scale"]
                layers[layer["name"]] = make_handle(w, scale, layer["name"], **bits)
            calls = []
            for i, call in enumerate(record["calls"]):
                x, y, y_ideal = (state[f"calls/{i}/{part}"].numpy() for part in ("x", "y", "y_ideal"))
                told = {part: call[part] for part in _OF_A_CALL if part in call}  # older traces know less
                calls.append(Call(x=x, y=y, y_ideal=y_ideal, **told))
            return cls(record["engine"], layers, calls)
        except CheckpointError as error:
            raise TraceError(str(error)) from None
        except (LookupError, TypeError, AttributeError) as error:
            raise TraceError(f"{path}: its record is of another form ({type(error).__name__}: {error})") from error


def load_parts(folder: str | Path) -> Trace:
    """All parts of a recorder's folder as one trace, empty if there are none.

    Errors: parts of different engines or of layers that contradict each other.
    """
    if older := sorted(Path(folder).glob("part_*.npz")):
        raise TraceError(f"{older[0]}: a trace of schema 1, this version reads {SCHEMA}; use an empty folder")
    whole = Trace()
    for path in sorted(Path(folder).glob("part_*.safetensors")):
        part = Trace.load(path)
        whole.engine = whole.engine or part.engine
        if other := difference(whole.engine, part.engine):
            raise TraceError(f"{path} is of another engine than the parts before: {other}; move the parts of one away")
        for name, handle in part.layers.items():
            if whole.layers.setdefault(name, handle).digest != handle.digest:
                raise TraceError(f"layer {name!r} has different weights in two parts of one trace")
        whole.calls += part.calls
    return whole


def _keys(layer: str, rows: np.ndarray) -> list[tuple[str, bytes]]:
    """One key per row of (B, K) integers, equal for equal numbers whatever their dtype."""
    return [(layer, row.tobytes()) for row in np.ascontiguousarray(rows, np.int32)]
