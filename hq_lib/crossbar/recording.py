"""Recording and replaying: a network's multiplications kept on disk as they happen, and answered again without a bench.

The recorder writes after every few rows, so a bench that fails in mid-run loses nothing; started again on the same
folder it answers what it already has and asks the bench only for the rest. Replay looks inputs up row by row; a row
measured several times gives its measurements in the order in which they were made, so read noise is faithful too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, TraceError, check_choice
from hq_lib.crossbar.description import difference
from hq_lib.crossbar.engine import Engine, Handle, exact_mvm
from hq_lib.crossbar.operands import Operand
from hq_lib.crossbar.simulator import SimEngine
from hq_lib.crossbar.streams import stream
from hq_lib.crossbar.trace import Call, Trace


class Answers:
    """Recorded rows, looked up by layer and content; each measurement is given out once.

    Args:
        trace: what was recorded.
    """

    def __init__(self, trace: Trace) -> None:
        self._found: dict[tuple[str, bytes], list[np.ndarray]] = {}
        for call in trace.calls:
            for key, y in zip(_keys(call.x), call.y, strict=True):
                self._found.setdefault((call.layer, key), []).append(y)
        self._used: dict[tuple[str, bytes], int] = {}

    def take(self, layer: str, rows: np.ndarray) -> list[np.ndarray | None]:
        """Per row its next measurement, or None where there is none (left)."""
        return [self._next((layer, key)) for key in _keys(rows)]

    def rewind(self) -> None:
        """Nothing; every measurement can be given out again."""
        self._used.clear()

    def n_measured(self, layer: str, row: np.ndarray) -> int:
        """How often ``row`` (1, K) of ``layer`` was measured."""
        return len(self._found.get((layer, _keys(row)[0]), []))

    def _next(self, key: tuple[str, bytes]) -> np.ndarray | None:
        index = self._used.get(key, 0)
        measured = self._found.get(key, [])
        if index >= len(measured):
            return None
        self._used[key] = index + 1
        return measured[index]


class RecordEngine(Engine):
    """Another engine, with everything it answers kept in a folder of small traces ("part_000000.npz", ...).

    Args:
        inner: does the work; its own corrections are part of what is recorded.
        folder: where the parts go. Parts already there are used first: that resumes an interrupted run. They must be
            of an engine with this description, its time and its bench's conditions apart.
        rows_per_part: rows of one layer that are recorded of each call, drawn at random; None: all. A sample is enough
            for figures and calibration, not for replay or resuming.
        flush_bytes: how much may wait in memory before it is written.
        seed: of the sampling.
    """

    def __init__(
        self,
        inner: Engine,
        folder: str | Path,
        *,
        rows_per_part: int | None = None,
        flush_bytes: int = 1 << 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rows_per_part is not None and rows_per_part < 1:
            raise CrossbarError(f"rows_per_part = {rows_per_part} must be 1 or more, or None for all rows")
        self.inner, self.folder, self.rows_per_part = inner, Path(folder), rows_per_part
        self._flush_bytes, self._seed = flush_bytes, seed
        self._description = inner.describe()  # now, because a bench that has failed cannot be asked
        self.folder.mkdir(parents=True, exist_ok=True)
        self._past = load_parts(self.folder)
        other = difference(self._past.engine, self._description) if self._past.engine else ""
        if other:
            raise TraceError(f"{self.folder} records another engine: {other}; use an empty folder")
        self._answers = Answers(self._past)
        self._inner_handles: dict[str, Handle] = {}
        self._waiting: list[Call] = []
        self._samplers: dict[str, torch.Generator] = {}

    @property
    def time_s(self) -> float:
        return self.inner.time_s

    def describe(self) -> dict[str, Any]:
        return dict(self._description)

    def flush(self) -> None:
        """Nothing; everything recorded so far is on disk afterwards."""
        if self._waiting:
            used = {call.layer for call in self._waiting}
            layers = {name: handle for name, handle in self._handles.items() if name in used}
            Trace(self._description, layers, self._waiting).save(_next_part(self.folder))
            self._waiting = []

    def trace(self) -> Trace:
        """Everything recorded in the folder, now and before."""
        self.flush()
        return load_parts(self.folder)

    def close(self) -> None:
        self.flush()
        self.inner.close()

    def _program(self, handle: Handle) -> None:
        past = self._past.layers.get(handle.name)
        if past is not None and past.digest != handle.digest:
            raise TraceError(f"{self.folder} records other weights for {handle.name!r}; use an empty folder")
        self._inner_handles[handle.name] = self.inner.load(
            handle.w_int,
            handle.w_scale,
            handle.name,
            w_bits=handle.w_bits,
            x_bits=handle.x_bits,
            x_signed=handle.x_signed,
        )

    def _rows_at_once(self, handle: Handle) -> int:
        return self.inner._rows_at_once(self._inner_handles[handle.name])

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        rows = x.rows()
        found = self._answers.take(handle.name, rows.numpy())
        missing = [i for i, y in enumerate(found) if y is None]
        y = torch.empty(len(rows), handle.w_int.shape[1], dtype=torch.float64)
        for i, known in enumerate(found):
            if known is not None:
                y[i] = torch.from_numpy(known)
        for part in torch.tensor(missing, dtype=torch.int64).split(max(1, self._rows_at_once(handle))):
            y[part] = self._ask(handle, rows[part])
        return y

    def _ask(self, handle: Handle, rows: Tensor) -> Tensor:
        """The inner engine's answer, recorded; if it fails, what is waiting is written first."""
        try:
            t_s = self.inner.time_s
            y = self.inner.mvm(self._inner_handles[handle.name], rows)
        except BaseException:
            self.flush()
            raise
        kept = self._sample(handle.name, len(rows))
        ideal = exact_mvm(handle, rows[kept]).to(torch.int64)
        self._waiting.append(Call(handle.name, rows[kept].numpy(), y[kept].numpy(), ideal.numpy(), t_s))
        if sum(call.x.nbytes + 2 * call.y.nbytes for call in self._waiting) >= self._flush_bytes:
            self.flush()
        return y

    def _sample(self, name: str, n_rows: int) -> Tensor:
        if self.rows_per_part is None or n_rows <= self.rows_per_part:
            return torch.arange(n_rows)
        sampler = self._samplers.setdefault(name, stream(self._seed, name, "record"))
        return torch.randperm(n_rows, generator=sampler)[: self.rows_per_part].sort().values


def simulated(engine: Engine, handle: Handle) -> tuple[SimEngine, Handle] | None:
    """The simulator that answers for ``handle`` of ``engine``, itself or behind a recorder, with its own handle."""
    while isinstance(engine, RecordEngine):
        engine, handle = engine.inner, engine._inner_handles[handle.name]
    return (engine, handle) if isinstance(engine, SimEngine) else None


class ReplayEngine(Engine):
    """The recorded answers of a trace; what was not measured is an error, never a guess.

    Args:
        trace: a `Trace`, or the path of one.
    """

    def __init__(self, trace: Trace | str | Path) -> None:
        super().__init__()
        self.trace = trace if isinstance(trace, Trace) else Trace.load(trace)
        self._answers = Answers(self.trace)

    def describe(self) -> dict[str, Any]:
        return {"engine": "replay"} | {f"recorded.{key}": value for key, value in self.trace.engine.items()}

    def rewind(self) -> None:
        """Nothing; the trace is played from its beginning again."""
        self._answers.rewind()

    def _program(self, handle: Handle) -> None:
        check_choice(handle.name, self.trace.layers, "the trace's layer")
        if self.trace.layers[handle.name].digest != handle.digest:
            raise TraceError(f"layer {handle.name!r} has other weights or bits in the trace: it is of another network")

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        rows = x.rows().numpy()
        answers = self._answers.take(handle.name, rows)
        for i, y in enumerate(answers):
            if y is None:
                n = self._answers.n_measured(handle.name, rows[i : i + 1])
                raise TraceError(
                    f"{handle.name}: row {i} was measured {n} times in the trace, not {n + 1} times; "
                    "record it, or rewind() to play the trace again"
                )
        return torch.from_numpy(np.stack([y for y in answers if y is not None]))


def load_parts(folder: str | Path) -> Trace:
    """All parts of a recorder's folder as one trace; empty if there are none."""
    return Trace.join(Trace.load(part) for part in sorted(Path(folder).glob("part_*.npz")))


def _next_part(folder: Path) -> Path:
    numbers = [int(part.stem.removeprefix("part_")) for part in folder.glob("part_*.npz")]
    return folder / f"part_{max(numbers, default=-1) + 1:06d}.npz"


def _keys(rows: np.ndarray) -> list[bytes]:
    """One key per row of (B, K) integers, equal for equal numbers whatever their dtype."""
    return [row.tobytes() for row in np.ascontiguousarray(rows, np.int32)]
