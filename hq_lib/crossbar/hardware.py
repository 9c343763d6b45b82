"""A bench: the little that its driver must offer, an engine on it, and a bench in memory that can be broken at will.

A bench is a set of tiles of rows x columns cells. It takes whole-number cell levels and input codes and returns counts:

    count[b, j] = counts_per_unit sum_i code[b, i] level[i, j]  + its own errors

Weights become whole cell levels of the bench's tiles, inputs become codes, and counts become accumulator units again;
subtraction, shifts and offsets are digital. Nothing beyond the bench's limits is ever sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import BenchError, CrossbarError, check_positive, flatten
from hq_lib.crossbar.engine import Engine, Handle
from hq_lib.crossbar.mapping import STUCK_HIGH, STUCK_LOW, Mapping, Plan
from hq_lib.crossbar.operands import Drive, Operand


@dataclass(frozen=True)
class Limits:
    """What a bench can take and give."""

    n_tiles: int
    """Tiles, >= 1."""
    rows: int
    """Rows of a tile."""
    columns: int
    """Columns of a tile."""
    level_max: int
    """Largest cell level; levels are 0..level_max."""
    code_max: int
    """Largest input code; codes are 0..code_max."""
    count_max: int
    """Largest count; counts are -count_max..count_max."""
    rows_per_read: int
    """Input vectors per read, >= 1."""
    counts_per_unit: float
    """Nominal counts per code times level, > 0."""

    def __post_init__(self) -> None:
        for name in ("n_tiles", "rows", "columns", "level_max", "code_max", "count_max", "rows_per_read"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise CrossbarError(
                    f"a bench with {name} = {value!r} cannot be used: whole numbers from 1 on are needed"
                )
        if not isinstance(self.counts_per_unit, Real):
            raise CrossbarError(f"a bench with counts_per_unit = {self.counts_per_unit!r} cannot be used")
        check_positive(float(self.counts_per_unit), "counts_per_unit")


class Driver(Protocol):
    """A bench. Every call returns or raises within the driver's own time limit: ``TimeoutError`` and
    ``ConnectionError`` (both may be retried), or `CrossbarError` for what the bench refuses."""

    def limits(self) -> Limits:
        """What the bench can take and give."""
        ...

    def write(self, tile: int, levels: np.ndarray) -> None:
        """Programs ``levels`` (rows, columns) integers into ``tile``; repeating it does no harm."""
        ...

    def read(self, tile: int, codes: np.ndarray) -> np.ndarray:
        """(B, columns) counts of ``tile`` for input ``codes`` (B, rows)."""
        ...

    def environment(self) -> dict[str, float]:
        """Present conditions: "time_s" since programming, "temperature_C", and whatever else the bench knows."""
        ...

    def close(self) -> None:
        """Gives the bench back."""
        ...


def refuse_levels(limits: Limits, tile: int, levels: np.ndarray) -> None:
    """Nothing, or an error if ``tile`` or ``levels`` are beyond the bench."""
    _refuse_tile(limits, tile)
    if levels.ndim != 2 or levels.shape[0] > limits.rows or levels.shape[1] > limits.columns:
        raise CrossbarError(
            f"a tile of {levels.shape} is larger than the bench's {limits.rows} x {limits.columns}; "
            "lower Mapping.tile_rows or tile_cols"
        )
    _refuse_integers(levels, limits.level_max, "levels")


def refuse_codes(limits: Limits, tile: int, codes: np.ndarray) -> None:
    """Nothing, or an error if ``tile`` or ``codes`` are beyond the bench."""
    _refuse_tile(limits, tile)
    if codes.ndim != 2 or codes.shape[1] > limits.rows or len(codes) > limits.rows_per_read:
        raise CrossbarError(f"codes {codes.shape} exceed {limits.rows_per_read} reads of {limits.rows} rows")
    _refuse_integers(codes, limits.code_max, "codes")


def _refuse_tile(limits: Limits, tile: int) -> None:
    if not 0 <= tile < limits.n_tiles:
        raise CrossbarError(f"tile {tile} does not exist; the bench has {limits.n_tiles}")


def _refuse_integers(values: np.ndarray, largest: int, what: str) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise CrossbarError(f"{what} must be integers, not {values.dtype}")
    if values.size and (values.min() < 0 or values.max() > largest):
        raise CrossbarError(f"{what} span {values.min()}..{values.max()}, the bench takes 0..{largest}")


class FakeDriver:
    """A bench in memory, exact but for the errors it is given; follows `Driver`.

    Args:
        limits: its size.
        gain, offset: of every column, dimensionless and counts.
        noise: standard deviation of every count, counts.
        failures: what happens to the next reads, one word each: "ok", "timeout", "drop", "nan" or "shape".
        stuck: {tile: uint8 (rows, columns) of the codes of `Faults`}; what these cells are written with is lost.
        seed: of the noise.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        gain: float = 1.0,
        offset: float = 0.0,
        noise: float = 0.0,
        failures: Iterable[str] = (),
        stuck: Stuck | None = None,
        seed: int = 0,
    ) -> None:
        self._limits, self.gain, self.offset, self.noise = limits, gain, offset, noise
        self.failures, self.n_reads, self.stuck = list(failures), 0, stuck or {}
        self._levels: dict[int, np.ndarray] = {}
        self._random = np.random.default_rng(seed)

    def limits(self) -> Limits:
        return self._limits

    def write(self, tile: int, levels: np.ndarray) -> None:
        refuse_levels(self._limits, tile, levels)
        codes = self.stuck.get(tile, np.zeros(levels.shape, np.uint8))[: levels.shape[0], : levels.shape[1]]
        high = np.where(codes == STUCK_HIGH, self._limits.level_max, levels.astype(np.int64))
        self._levels[tile] = np.where(codes == STUCK_LOW, 0, high)

    def read(self, tile: int, codes: np.ndarray) -> np.ndarray:
        self.n_reads += 1
        happens = self.failures.pop(0) if self.failures else "ok"
        if happens == "timeout":
            raise TimeoutError("the fake bench was told to time out")
        if happens == "drop":
            raise ConnectionError("the fake bench was told to drop the connection")
        refuse_codes(self._limits, tile, codes)
        if tile not in self._levels:
            raise CrossbarError(f"tile {tile} was never written")
        exact = codes.astype(np.int64) @ self._levels[tile][: codes.shape[1]]
        counts = self._limits.counts_per_unit * self.gain * exact + self.offset
        counts = np.rint(counts + self.noise * self._random.standard_normal(counts.shape))
        counts = counts.clip(-self._limits.count_max, self._limits.count_max)
        if happens == "nan":
            counts[0, 0] = np.nan
        return counts[:, :-1] if happens == "shape" else counts

    def environment(self) -> dict[str, float]:
        return {"time_s": float(self.n_reads), "temperature_C": 25.0}

    def close(self) -> None:
        self._levels.clear()


Answer = TypeVar("Answer")
Stuck = dict[int, np.ndarray]


@dataclass(frozen=True)
class Patience:
    """How failures of the bench are met."""

    attempts: int = 3
    """Times that a call is made before giving up, >= 1."""
    pause_s: float = 0.1
    """Seconds between attempts, doubled each time, >= 0."""

    def __post_init__(self) -> None:
        check_positive(self.pause_s, "pause_s", zero=True)
        if self.attempts < 1:
            raise CrossbarError(f"attempts = {self.attempts} must be 1 or more")

    def insist(self, call: Callable[[], Answer], what: str) -> Answer:
        """The answer of ``call``, asked again after time-outs, lost connections and bad answers; then `BenchError`."""
        last: Exception | None = None
        for attempt in range(self.attempts):
            try:
                return call()
            except (TimeoutError, ConnectionError, _BadAnswer) as error:
                last = error
                if attempt + 1 < self.attempts:
                    time.sleep(self.pause_s * 2**attempt)
        raise BenchError(f"{what} failed {self.attempts} times; last: {type(last).__name__}: {last}") from last


@dataclass(eq=False)
class _Block:
    """The part of a layer that fills one tile."""

    layer: str
    rows: slice
    """Of the weight matrix."""
    columns: slice
    """Flattened."""
    levels: np.ndarray


@dataclass(frozen=True, eq=False)
class _Placed:
    """One layer as the bench holds it."""

    plan: Plan
    steps: Tensor
    """float64 (C,), cell levels per weight step."""
    blocks: list[_Block]


class HardwareEngine(Engine):
    """Multiplication on a bench. What does not fit on its tiles at once is written tile by tile, in order, when it is
    read: `programming` says how often and how long.

    Args:
        driver: the bench.
        mapping: pair or offset with ``subtract="digital"``; its tiles must fit on the bench. None: pairs on whole
            tiles, and layers whose weights take more levels than a cell has in slices of as many bits as it holds.
        drive: its largest digit must not exceed the bench's largest code.
        patience: what to do when the bench fails.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        mapping: Mapping | None = None,
        drive: Drive | None = None,
        patience: Patience | None = None,
    ) -> None:
        super().__init__()
        self.driver, self.patience = driver, patience or Patience()
        self.limits = self.patience.insist(driver.limits, "asking the bench for its limits")
        self.mapping = mapping or Mapping(
            subtract="digital", tile_rows=self.limits.rows, tile_cols=max(self.limits.columns, 2)
        )
        self.drive, self._sliced = drive or Drive("serial"), mapping is None
        if self.mapping.subtract != "digital":
            raise CrossbarError("a bench is read column by column: use Mapping(subtract='digital')")
        if self.drive.accumulate:
            raise CrossbarError("a bench converts every step of its inputs: use Drive('serial', accumulate=False)")
        if self.mapping.tile_rows > self.limits.rows or self.mapping.tile_cols > self.limits.columns:
            raise CrossbarError(
                f"a tile of {self.mapping.tile_rows} x {self.mapping.tile_cols} is larger than the bench's "
                f"{self.limits.rows} x {self.limits.columns}; lower Mapping.tile_rows or tile_cols"
            )
        self._placed: dict[str, _Placed] = {}
        self._tile_of: dict[int, int] = {}
        self._held: list[_Block | None] = [None] * self.limits.n_tiles
        self._next = self._n_writes = 0
        self._write_s = 0.0

    @property
    def time_s(self) -> float:
        return float(self.patience.insist(self.driver.environment, "asking the bench for the time").get("time_s", 0.0))

    def describe(self) -> dict[str, Any]:
        environment = self.patience.insist(self.driver.environment, "asking the bench for its conditions")
        return (
            {"engine": "hardware", "driver": type(self.driver).__name__}
            | flatten("bench", self.limits)
            | flatten("mapping", self.mapping)
            | flatten("drive", self.drive)
            | {f"env.{k}": v for k, v in environment.items()}
        )

    def programming(self) -> dict[str, float]:
        """What loading has cost: tiles_needed by all layers, n_tiles of the bench, n_writes so far, write_s seconds."""
        needed = sum(len(placed.blocks) for placed in self._placed.values())
        counts = {"tiles_needed": needed, "n_tiles": self.limits.n_tiles, "n_writes": self._n_writes}
        return {**counts, "write_s": self._write_s}

    def fault_map(self, handle: Handle) -> np.ndarray:
        """uint8 (K, C, P): the cells under ``handle`` that stay low or high whatever is written, for `Faults`.

        Each tile is written with nothing and with full cells and read row by row; its levels are written again.

        Errors: a layer that shares tiles with others, since its weights have no cells of their own.
        """
        placed = self._placed[handle.name]
        if not self._fits():
            raise CrossbarError(
                f"{handle.name} has no tiles of its own: the layers loaded need more than the bench has"
            )
        found = np.zeros((placed.plan.levels.shape[0], placed.plan.levels[0].numel()), np.uint8)
        half = self.limits.level_max * self.limits.code_max * self.limits.counts_per_unit / 2
        for block in placed.blocks:
            tile, shape = self._tile(block), block.levels.shape
            for level, code, wrong in ((0, STUCK_HIGH, np.greater), (self.limits.level_max, STUCK_LOW, np.less)):
                self._write(tile, np.full(shape, level, np.int64))
                rows = np.array_split(np.eye(shape[0], dtype=np.int64) * self.limits.code_max,
                                      -(-shape[0] // self.limits.rows_per_read))  # fmt: skip
                counts = np.concatenate([self._read(tile, part, shape[1]) for part in rows])
                found[block.rows, block.columns][wrong(counts, half)] = code
            self._write(tile, block.levels)
        return found.reshape(placed.plan.levels.shape)

    def close(self) -> None:
        self.driver.close()

    def _program(self, handle: Handle) -> None:
        if handle.x_signed and self.drive.mode == "analog":
            raise CrossbarError(f"{handle.name}: the bench takes codes >= 0; drive signed inputs with Drive('serial')")
        peak = self.drive.peak(handle.x_bits, handle.x_signed)
        if peak > self.limits.code_max:
            raise CrossbarError(
                f"{handle.name}: inputs need codes up to {peak}, the bench takes "
                f"{self.limits.code_max}; use Drive('serial', step_bits=...)"
            )
        plan = self.mapping.encode(handle.w_int, handle.w_bits)
        bits = (self.limits.level_max + 1).bit_length() - 1
        if float(plan.span.max()) > self.limits.level_max and self._sliced:
            plan = replace(self.mapping, cell_bits=min(bits, 8)).encode(handle.w_int, handle.w_bits)
        if float(plan.span.max()) > self.limits.level_max:
            raise CrossbarError(
                f"{handle.name}: its weights take levels up to {float(plan.span.max()):.0f}, the bench's cells have "
                f"{self.limits.level_max}; slice them: Mapping(cell_bits={bits}, subtract='digital', ...)"
            )
        steps = (self.limits.level_max / plan.span).floor()  # levels per weight step: whole, so that weights stay exact
        levels = (plan.levels * steps[:, None]).to(torch.int64).flatten(1).numpy()
        blocks = [
            _Block(handle.name, rows, columns, levels[rows, columns])
            for r in range(0, levels.shape[0], self.mapping.tile_rows)
            for c in range(0, levels.shape[1], self.mapping.tile_cols)
            for rows, columns in [(slice(r, r + self.mapping.tile_rows), slice(c, c + self.mapping.tile_cols))]
        ]
        self._placed[handle.name] = _Placed(plan, steps, blocks)
        for block in blocks:
            refuse_levels(self.limits, 0, block.levels)
            if self._fits():
                self._tile(block)

    def _fits(self) -> bool:
        """Whether every loaded layer has tiles of its own."""
        return sum(len(placed.blocks) for placed in self._placed.values()) <= self.limits.n_tiles

    def _tile(self, block: _Block) -> int:
        """The tile that holds ``block``, written now if none does: the next one in order."""
        tile = self._tile_of.get(id(block))
        if tile is not None and self._held[tile] is block:
            return tile
        tile, self._next = self._next, (self._next + 1) % self.limits.n_tiles
        self._held[tile] = None  # until it is written
        self._write(tile, block.levels)
        self._held[tile], self._tile_of[id(block)] = block, tile
        return tile

    def _rows_at_once(self, handle: Handle) -> int:
        return self.limits.rows_per_read if self._fits() else super()._rows_at_once(handle)

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        """float64 (B, N): tile by tile, all rows of a tile before the next is written."""
        placed, rows = self._placed[handle.name], x.rows()
        plan, shape = placed.plan, placed.plan.levels.shape
        parts = list(rows.split(self.limits.rows_per_read)) if len(rows) else []
        total = torch.zeros(len(rows), shape[1] * shape[2], dtype=torch.float64)
        for block in placed.blocks:
            tile, width = self._tile(block), block.levels.shape[1]
            for part, out in zip(parts, total.split(self.limits.rows_per_read), strict=bool(parts)):
                for step in self.drive.steps(handle.x_bits, handle.x_signed):
                    codes = step.digits(part).to(torch.int64).numpy()[:, block.rows]
                    out[:, block.columns] += step.factor * torch.from_numpy(self._read(tile, codes, width))
        units = total.view(-1, shape[1], shape[2]) / (self.limits.counts_per_unit * placed.steps[:, None])
        outputs = plan.combine(units)
        return outputs - rows.sum(1, dtype=torch.int64)[:, None] * plan.offset / plan.gain

    def _write(self, tile: int, levels: np.ndarray) -> None:
        started = time.perf_counter()
        self.patience.insist(lambda: self.driver.write(tile, levels), f"writing tile {tile}")
        self._n_writes, self._write_s = self._n_writes + 1, self._write_s + time.perf_counter() - started

    def _read(self, tile: int, codes: np.ndarray, width: int) -> np.ndarray:
        """float64 (B, width) counts, checked; unusable answers are asked for again."""
        refuse_codes(self.limits, tile, codes)

        def once() -> np.ndarray:
            counts = _as_counts(self.driver.read(tile, codes), tile)
            if counts.shape != (len(codes), width):
                raise _BadAnswer(f"tile {tile} answered shape {counts.shape}, expected {(len(codes), width)}")
            if not np.isfinite(counts).all():
                raise _BadAnswer(f"tile {tile} answered NaN or infinity")
            if np.abs(counts).max(initial=0) > self.limits.count_max:
                raise _BadAnswer(f"tile {tile} answered a count beyond {self.limits.count_max}")
            return counts

        return self.patience.insist(once, f"reading tile {tile}")


def _as_counts(answer: Any, tile: int) -> np.ndarray:
    try:
        return np.array(answer, np.float64)
    except (TypeError, ValueError) as error:
        raise _BadAnswer(f"tile {tile} answered no array of numbers ({error})") from error


class _BadAnswer(Exception):
    """The bench answered, but not with usable counts."""
