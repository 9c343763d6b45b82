"""Recording and replaying: multiplications kept on disk as they happen, and answered again without a bench.

The recorder writes every few seconds: a bench that fails in mid-run loses nothing, a process that is killed little.
Started again on the same folder it answers what it already has and asks the bench only for the rest. Replay looks
inputs up row by row; a row measured several times gives its measurements in the order in which they were made, so read
noise is faithful too.

A trace is one sealed `.safetensors` file. Schema 2:

    layers/<i>/w        (K, N) int32 weights              layers/<i>/w_scale   () or (N,) float64, real units per step
    calls/<i>/x         (B, K) integer inputs             calls/<i>/y          (B, N) float64, measured
    calls/<i>/y_ideal   (B, N) int64, exact products      (accumulator units; y after the inner engine's correction)

Its record lists layers, calls (layer, seconds after programming, degrees Celsius, writes and saturated counts of a
bench, a digest of fitted converters), engine and units, and with it stands the SHA-256 of all: a changed number
anywhere is refused. That guards against damage, not against a forger.
"""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import BenchError, CrossbarError, TraceError, difference
from hq_lib.crossbar.engine import Engine
from hq_lib.crossbar.operands import Handle, Operand, exact_mvm, make_handle
from hq_lib.crossbar.simulator import SimEngine
from hq_lib.models import CheckpointError, read_checkpoint, write_checkpoint
from hq_lib.results.hints import check_known

SCHEMA = 2
FLUSH_BYTES = 1 << 20
FLUSH_S = 5.0
"""How much may wait in memory, bytes, and for how long, before it is written with the next answer."""
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


class RecordEngine(Engine):
    """Another engine, with everything it answers kept in a folder of small traces ("part_000000.safetensors", ...).

    Args:
        inner: does the work; its own corrections are part of what is recorded.
        folder: where the parts go. Parts already there are used first: that resumes an interrupted run. They must be
            of an engine with this description, its time and its bench's conditions apart. What simulated cells gave
            at another time or temperature, or through converters of other fitted ranges, is not used; a bench's cells
            age by themselves, so all that it gave is.

    After a call that fails everything on record is answered from the start again, as if the recorder were opened anew:
    what is repeated, from the first call or from this one, is not measured twice.
    """

    def __init__(self, inner: Engine, folder: str | Path) -> None:
        super().__init__()
        self.inner, self.folder = inner, Path(folder)
        self._description = inner.describe()  # now, because a bench that has failed cannot be asked
        self.folder.mkdir(parents=True, exist_ok=True)
        self._past = self._own(load_parts(self.folder))
        if self._past.n_rows and (arrays := simulated(self)):
            arrays.go_on(self._past.n_rows)
        self.n_recorded = self.n_measured = 0
        """Rows answered from the record, after a call that fails of this engine's own too, and by the inner engine."""
        self._n_writes: dict[str, int] = {}  # of what the folder held at the start
        for call in self._past.calls:
            self._n_writes[call.layer] = max(call.n_writes, self._n_writes.get(call.layer, 0))
        self._past_at: dict[tuple[float | str, ...], Trace] = {}
        self._waiting: list[Call] = []
        self._flushed_s, self._alone = time.monotonic(), bool(self._past.engine)

    def _own(self, trace: Trace) -> Trace:
        """``trace`` itself, of this folder. Errors: it is of another engine."""
        if trace.engine and (other := difference(trace.engine, self._description)):
            raise TraceError(f"{self.folder} records another engine: {other}; use an empty folder")
        return trace

    @property
    def time_s(self) -> float:
        return self.inner.time_s

    def describe(self) -> dict[str, Any]:
        with suppress(BenchError, CrossbarError):  # a bench that has failed is described as it was
            self._description = self.inner.describe()
        return dict(self._description)

    def flush(self) -> None:
        """Nothing; everything recorded so far is on disk afterwards."""
        if self._waiting:
            used = {call.layer for call in self._waiting}
            layers = {name: handle for name, handle in self._handles.items() if name in used}
            with filelock.FileLock(self.folder / ".lock"):  # another process may record here
                if not self._alone:  # the folder was empty when this recorder was opened: it need not be now
                    self._own(load_parts(self.folder))
                    self._alone = True
                past = [int(part.stem.removeprefix("part_")) for part in self.folder.glob("part_*.safetensors")]
                part = self.folder / f"part_{max(past, default=-1) + 1:06d}.safetensors"
                Trace(self.describe(), layers, self._waiting).save(part)
            self._waiting = []
        self._flushed_s = time.monotonic()

    def trace(self) -> Trace:
        """Everything recorded in the folder, now and before."""
        self.flush()
        return load_parts(self.folder)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.inner.close()

    def _program(self, handle: Handle) -> None:
        past = self._past.layers.get(handle.name)
        if past is not None and past.digest != handle.digest:
            raise TraceError(f"{self.folder} records other weights for {handle.name!r}; use an empty folder")
        self.inner.add(handle)

    def _rows_at_once(self, handle: Handle) -> int:
        return self.inner._rows_at_once(handle)

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        rows = x.rows()
        y = torch.empty(len(rows), handle.w_int.shape[1], dtype=torch.float64)
        arrays = simulated(self)
        celsius = arrays.celsius if arrays else 25.0
        steps = arrays.layer(handle).fitted if arrays else ""
        past = self._past_of(arrays.time_s, celsius, steps) if arrays else self._past
        missing = torch.tensor(list(past.take(handle.name, rows, y)), dtype=torch.int64)
        self.n_recorded += len(rows) - len(missing)
        for part in missing.split(max(1, self._rows_at_once(handle))) if len(missing) else ():
            asked = rows[part]
            n_before = self.inner.tally(handle)[1]
            try:
                t_s, answered = self.inner.time_s, self.inner.mvm(handle, asked)
            except BaseException:
                self.flush()
                self._past, self._past_at = load_parts(self.folder), {}
                raise
            self.n_measured += len(part)
            y[part], ideal = answered, exact_mvm(handle, asked).to(torch.int64)
            n_writes, n_saturated = self.inner.tally(handle)
            counts = (self._n_writes.get(handle.name, 0) + n_writes, n_saturated - n_before)
            call = Call(handle.name, asked.numpy(), answered.numpy(), ideal.numpy(), t_s, celsius, *counts, steps)
            self._waiting.append(call)
            n_bytes = sum(call.x.nbytes + 2 * call.y.nbytes for call in self._waiting)
            if n_bytes >= FLUSH_BYTES or time.monotonic() - self._flushed_s >= FLUSH_S:
                self.flush()
        return y

    def _past_of(self, *now: float | str) -> Trace:
        """What is on record of this time, temperature and range of converters."""
        if now not in self._past_at:
            calls = [call for call in self._past.calls if (call.t_s, call.celsius, call.steps) == now]
            self._past_at[now] = Trace(self._past.engine, self._past.layers, calls)
        return self._past_at[now]


def simulated(engine: Engine) -> SimEngine | None:
    """The simulator that answers for ``engine``, itself or behind a recorder."""
    inner = engine.inner if isinstance(engine, RecordEngine) else engine
    return inner if isinstance(inner, SimEngine) else None


class ReplayEngine(Engine):
    """The recorded answers of a trace; what was not measured is an error, never a guess.

    Args:
        trace: a `Trace`, or the path of one.
    """

    def __init__(self, trace: Trace | str | Path) -> None:
        super().__init__()
        self.trace = trace if isinstance(trace, Trace) else Trace.load(trace)

    def describe(self) -> dict[str, Any]:
        return {"engine": "replay"} | {f"recorded.{key}": value for key, value in self.trace.engine.items()}

    def _program(self, handle: Handle) -> None:
        check_known(handle.name, self.trace.layers, "the trace's layer", error=CrossbarError)
        if self.trace.layers[handle.name].digest != handle.digest:
            raise TraceError(f"layer {handle.name!r} has other weights or bits in the trace: it is of another network")

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        y = torch.empty(x.n_rows, handle.w_int.shape[1], dtype=torch.float64)
        for i, n in self.trace.take(handle.name, x.rows(), y).items():
            raise TraceError(
                f"{handle.name}: row {i} was measured {n} times in the trace, not {n + 1} times; "
                "record it, or rewind the trace to play it again"
            )
        return y


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
