"""Recording and replaying: multiplications kept on disk as they happen, and answered again without a bench.

The recorder writes every few seconds: a bench that fails in mid-run loses nothing, a process that is killed little.
Started again on the same folder it answers what it already has and asks the bench only for the rest. Replay looks
inputs up row by row; a row measured several times gives its measurements in the order in which they were made, so read
noise is faithful too.
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from hq_lib.crossbar.checks import BenchError, CrossbarError, TraceError, difference
from hq_lib.crossbar.engine import Engine
from hq_lib.crossbar.operands import Handle, Operand, exact_mvm
from hq_lib.crossbar.simulator import SimEngine
from hq_lib.crossbar.trace import Call, Trace, load_parts
from hq_lib.results.hints import check_known

FLUSH_BYTES = 1 << 20
FLUSH_S = 5.0
"""How much may wait in memory, bytes, and for how long, before it is written with the next answer."""


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
