"""An engine on a bench.

Weights become whole cell levels of the bench's tiles, inputs become codes, and counts become accumulator units again;
subtraction, shifts and offsets are digital. Nothing beyond the bench's limits is ever sent.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import BenchError, Count, CrossbarError, NotNegative, Settings, difference, flatten
from hq_lib.crossbar.circuit import Drive
from hq_lib.crossbar.drivers import MAX_BYTES, Driver
from hq_lib.crossbar.engine import Engine
from hq_lib.crossbar.mapping import STUCK_HIGH, STUCK_LOW, Mapping, Plan
from hq_lib.crossbar.operands import Handle, Operand

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Patience(Settings):
    """How failures of the bench are met."""

    attempts: Count = 3
    """Times that a call is made before giving up, >= 1."""
    pause_s: NotNegative = 0.1
    """Seconds between attempts, doubled each time, >= 0."""

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

    rows: slice
    """Of the weight matrix."""
    columns: slice
    """Flattened."""
    levels: np.ndarray
    n_writes: int = 0


@dataclass(frozen=True, eq=False)
class _Placed:
    """One layer as the bench holds it."""

    plan: Plan
    steps: Tensor
    """float64 (C,), cell levels per weight step."""
    blocks: list[_Block]


class HardwareEngine(Engine):
    """Multiplication on a bench. What does not fit on its tiles at once is written tile by tile, in order, when it is
    read: `programming` says how often and how long. Where writing is not exact, cells that are `written_again` are not
    those that a correction was fitted on.

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
        if self.limits.columns < 2:
            raise CrossbarError(
                "a bench with tiles of one column is not served: let its program join neighbouring tiles to one of two "
                "columns or more"
            )
        self.mapping = mapping or Mapping(
            subtract="digital", tile_rows=min(self.limits.rows, 4096), tile_cols=self.limits.columns
        )
        self.drive, self._sliced = drive or Drive("serial"), mapping is None
        if self.mapping.subtract != "digital":
            raise CrossbarError("a bench is read column by column: use Mapping(subtract='digital')")
        if self.drive.accumulate:
            raise CrossbarError("a bench converts every step of its inputs: use Drive('serial', accumulate=False)")
        if self.drive.managed:
            raise CrossbarError("inputs of a bench are driven as they are: use Drive(managed=False)")
        if self.mapping.tile_rows > self.limits.rows or self.mapping.tile_cols > self.limits.columns:
            raise CrossbarError(
                f"a tile of {self.mapping.tile_rows} x {self.mapping.tile_cols} is larger than the bench's "
                f"{self.limits.rows} x {self.limits.columns}; lower Mapping.tile_rows or tile_cols"
            )
        self._t_s, self._in_doubt = -math.inf, False
        self._placed: dict[str, _Placed] = {}
        self._held: list[_Block | None] = [None] * self.limits.n_tiles
        self._next = self._n_writes = self._n_saturated = 0
        self._write_s = 0.0

    @property
    def time_s(self) -> float:
        return float(self._conditions().get("time_s", 0.0))

    def describe(self) -> dict[str, Any]:
        environment = self._conditions()
        return (
            {"engine": "hardware", "driver": type(self.driver).__name__}
            | flatten("bench", self.limits)
            | flatten("mapping", self.mapping)
            | flatten("drive", self.drive)
            | {f"env.{k}": v for k, v in environment.items()}
        )

    def _conditions(self) -> dict[str, float]:
        """The bench's conditions now."""
        return self._unbroken(self._insist(self.driver.environment, "asking the bench for its conditions"))

    def _unbroken(self, conditions: dict[str, float]) -> dict[str, float]:
        """``conditions`` themselves. Errors: the time went back though nothing was written, so the bench began anew."""
        before, self._t_s = self._t_s, conditions.get("time_s", -math.inf)
        if self._t_s < before:
            self._held = [None] * self.limits.n_tiles
            raise BenchError(
                f"the bench began anew, its cells are lost: its time went back from {before:g} s to {self._t_s:g} s; "
                "the same command again (the same call) writes them again and goes on"
            )
        return conditions

    def _insist(self, call: Callable[[], Answer], what: str) -> Answer:
        """As `Patience.insist`; after a failure the bench is first asked whether it is still the one it was."""

        def sure() -> Answer:
            if self._in_doubt:
                if (now := self.driver.limits()) != self.limits:
                    other = difference(flatten("bench", self.limits), flatten("bench", now))
                    raise BenchError(f"another bench answers: {other}; start again, in an empty folder")
                self._unbroken(self.driver.environment())
            self._in_doubt = True
            answer = call()
            self._in_doubt = False
            return answer

        return self.patience.insist(sure, what)

    def programming(self) -> dict[str, float]:
        """What loading has cost: tiles_needed by all layers, n_tiles of the bench, n_writes so far, write_s seconds;
        and n_saturated, the counts so far at the end of the bench's range, which may stand for larger ones."""
        needed = sum(len(placed.blocks) for placed in self._placed.values())
        counts = {"tiles_needed": needed, "n_tiles": self.limits.n_tiles, "n_writes": self._n_writes}
        return {**counts, "n_saturated": self._n_saturated, "write_s": self._write_s}

    def tally(self, handle: Handle) -> tuple[int, int]:
        return sum(block.n_writes for block in self._placed[handle.name].blocks), self._n_saturated

    def mapping_of(self, handle: Handle) -> Mapping:
        """How the weights of ``handle`` lie on the bench's cells, for a simulation of it: sliced as here, and with
        columns that fill as much of a cell's levels as here."""
        return replace(self._placed[self._known(handle).name].plan.mapping, cell_levels=self.limits.level_max)

    def fault_map(self, handle: Handle) -> np.ndarray:
        """uint8 (K, C, P): the cells under ``handle`` that stay low or high whatever is written, for `Faults` of a
        simulation with `mapping_of` this layer.

        Each tile is written with nothing and with full cells and read row by row, less what it answers to no codes at
        all; its levels are written again. Low and high meet half way of the tile's median cell, so that gain and offset
        of the bench need not be trimmed.

        Errors: a layer that shares tiles with others, since its weights have no cells of their own; a tile of which
        half of the cells do not move.
        """
        placed = self._placed[self._known(handle).name]
        if not self._fits():
            raise CrossbarError(
                f"{handle.name} has no tiles of its own: the layers loaded need more than the bench has"
            )
        found = np.zeros((placed.plan.levels.shape[0], placed.plan.levels[0].numel()), np.uint8)
        for block in placed.blocks:
            tile = self._tile(block)
            nothing, full = (self._cell_by_cell(tile, block.levels.shape, n) for n in (0, self.limits.level_max))
            self._fill(tile, block)
            half = float(np.median(full - nothing)) / 2
            if half < 0.05 * self.limits.level_max * self.limits.code_max * self.limits.counts_per_unit / 2:
                raise CrossbarError(
                    f"{handle.name}: half of the cells of tile {tile} do not move between nothing and full"
                )
            found[block.rows, block.columns][nothing > half] = STUCK_HIGH
            found[block.rows, block.columns][full < half] = STUCK_LOW
        return found.reshape(placed.plan.levels.shape)

    def _cell_by_cell(self, tile: int, shape: tuple[int, ...], level: int) -> np.ndarray:
        """float64 ``shape``: counts of each cell of a tile at ``level``, driven alone, less those of no cell driven."""
        levels = np.full(shape, level, np.int64)
        self._write(tile, levels)
        codes, counts = np.eye(shape[0], dtype=np.int64) * self.limits.code_max, []
        for rows in np.array_split(codes, -(-shape[0] // max(self._per_read - 1, 1))):
            parts = np.array_split(np.concatenate([0 * codes[:1], rows]), 1 if self._per_read > 1 else 2)
            read = np.concatenate([self._read(tile, part, levels) for part in parts])
            counts.append(read[1:] - read[0])
        return np.concatenate(counts)

    def close(self) -> None:
        self.driver.close()

    def _program(self, handle: Handle) -> None:
        if handle.x_signed and self.drive.mode == "analog":
            raise CrossbarError(f"{handle.name}: the bench takes codes >= 0; drive signed inputs with Drive('serial')")
        peak = self.drive.peak(handle.x_bits, handle.x_signed)
        if peak > self.limits.code_max:
            bits = min((self.limits.code_max + 1).bit_length() - 1, 8)
            raise CrossbarError(
                f"{handle.name}: inputs need codes up to {peak}, the bench takes {self.limits.code_max}; use "
                f"Drive('serial', {bits}), or in hq crossbar a network with activations of at most {bits} bits"
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
        steps = (self.limits.level_max / plan.span + 1e-9).floor()  # levels per weight step: whole
        levels = (plan.levels * steps[:, None]).to(torch.int64).flatten(1).numpy()
        blocks = [_Block(*tile, levels[tile]) for tile in self.mapping.tiles(levels.shape)]
        self._placed[handle.name] = _Placed(plan, steps, blocks)
        for block in blocks:
            self.limits.refuse(0, block.levels, "levels")
            if self._fits():
                self._tile(block)

    def _fits(self) -> bool:
        """Whether every loaded layer has tiles of its own."""
        return sum(len(placed.blocks) for placed in self._placed.values()) <= self.limits.n_tiles

    def _tile(self, block: _Block) -> int:
        """The tile that holds ``block``, written now if none does: one that holds nothing, else the next in order."""
        if block in self._held:
            return self._held.index(block)
        if None in self._held:
            tile = self._held.index(None)
        else:
            tile, self._next = self._next, (self._next + 1) % self.limits.n_tiles
        self._fill(tile, block)
        return tile

    def _fill(self, tile: int, block: _Block) -> None:
        self._write(tile, block.levels)
        self._held[tile] = block
        block.n_writes += 1

    @property
    def _per_read(self) -> int:
        """Input vectors per read: as many as the bench takes and a message to it holds."""
        return max(1, min(self.limits.rows_per_read, MAX_BYTES // (8 * max(self.limits.rows, self.limits.columns))))

    def _rows_at_once(self, handle: Handle) -> int:
        return self._per_read if self._fits() else super()._rows_at_once(handle)

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        """float64 (B, N): tile by tile, all rows of a tile before the next is written.

        Errors: the bench began anew meanwhile, so that some of it may be of blank cells.
        """
        placed, rows = self._placed[handle.name], x.rows()
        plan, shape = placed.plan, placed.plan.levels.shape
        parts = list(rows.split(self._per_read)) if len(rows) else []
        total = torch.zeros(len(rows), shape[1] * shape[2], dtype=torch.float64)
        for block in placed.blocks:
            tile = self._tile(block)
            for part, out in zip(parts, total.split(self._per_read), strict=bool(parts)):
                for step in self.drive.steps(handle.x_bits, handle.x_signed):
                    codes = step.digits(part).to(torch.int64).numpy()[:, block.rows]
                    out[:, block.columns] += step.factor * torch.from_numpy(self._read(tile, codes, block.levels))
        self._conditions()
        units = total.view(-1, shape[1], shape[2]) / (self.limits.counts_per_unit * placed.steps[:, None])
        outputs = plan.combine(units)
        return outputs - rows.sum(1, dtype=torch.int64)[:, None] * plan.offset / plan.gain

    def _write(self, tile: int, levels: np.ndarray) -> None:
        self._conditions()  # of what was read so far: after a write time may begin anew
        self._held[tile], started = None, time.perf_counter()  # whatever becomes of it, what was there is gone
        self._insist(lambda: self.driver.write(tile, levels), f"writing tile {tile}")
        self._t_s = -math.inf  # time may count from a write on
        self._conditions()
        self._n_writes, self._write_s = self._n_writes + 1, self._write_s + time.perf_counter() - started

    def _read(self, tile: int, codes: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """float64 (B, columns) counts of a tile with ``levels``, checked; bad answers are asked for again. Saturated
        ones are counted, at the low end those that should lie above it: nothing may be 0 of an unsigned converter."""
        self.limits.refuse(tile, codes, "codes")
        (low, high), shape = self.limits.counts, (len(codes), levels.shape[1])

        def once() -> np.ndarray:
            answer = self.driver.read(tile, codes)
            try:
                counts = np.array(answer, np.float64)
            except (TypeError, ValueError) as error:
                raise _BadAnswer(f"tile {tile} answered no array of numbers ({error})") from error
            if counts.shape != shape:
                raise _BadAnswer(f"tile {tile} answered shape {counts.shape}, expected {shape}")
            if not np.isfinite(counts).all():
                raise _BadAnswer(f"tile {tile} answered NaN or infinity")
            if counts.size and (counts.min() < low or counts.max() > high):
                raise _BadAnswer(f"tile {tile} answered a count beyond {low}..{high}")
            return counts

        counts = self._insist(once, f"reading tile {tile}")
        above = self.limits.counts_per_unit * (codes @ levels) >= low + 1
        self._n_saturated += int((counts >= high).sum() + (above & (counts <= low)).sum())
        return counts


class _BadAnswer(Exception):
    """The bench answered, but not with usable counts."""
