"""What a bench is: its limits, the little that its driver must offer, and a bench in memory that can be broken at will.

A bench is a set of tiles of rows x columns cells. It takes whole-number cell levels and input codes and returns counts:

    count[b, j] = counts_per_unit sum_i code[b, i] level[i, j]  + its own errors
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hq_lib.crossbar.checks import Count, CrossbarError, Positive, Settings
from hq_lib.crossbar.mapping import STUCK_HIGH, STUCK_LOW


@dataclass(frozen=True)
class Limits(Settings):
    """What a bench can take and give."""

    n_tiles: Count
    """Tiles, >= 1."""
    rows: Count
    """Rows of a tile."""
    columns: Count
    """Columns of a tile."""
    level_max: Count
    """Largest cell level; levels are 0..level_max."""
    code_max: Count
    """Largest input code; codes are 0..code_max."""
    count_max: Count
    """Largest count; counts are -count_max..count_max."""
    rows_per_read: Count
    """Input vectors per read, >= 1."""
    counts_per_unit: Positive
    """Nominal counts per code times level, > 0."""

    def refuse(self, tile: int, values: np.ndarray, what: str) -> None:
        """Nothing, or an error if ``tile`` or its ``values``, "levels" or "codes", are beyond the bench."""
        size, largest = (self.rows, self.columns), self.level_max
        if what == "codes":
            size, largest = (self.rows_per_read, self.rows), self.code_max
        if not 0 <= tile < self.n_tiles:
            raise CrossbarError(f"tile {tile} does not exist; the bench has {self.n_tiles}")
        if values.ndim != 2 or values.shape[0] > size[0] or values.shape[1] > size[1]:
            raise CrossbarError(f"{what} of {values.shape} are larger than the bench's {size[0]} x {size[1]}")
        if not np.issubdtype(values.dtype, np.integer):
            raise CrossbarError(f"{what} must be integers, not {values.dtype}")
        if values.size and (values.min() < 0 or values.max() > largest):
            raise CrossbarError(f"{what} span {values.min()}..{values.max()}, the bench takes 0..{largest}")


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
        stuck: dict[int, np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        self._limits, self.gain, self.offset, self.noise = limits, gain, offset, noise
        self.failures, self.n_reads, self.stuck = list(failures), 0, stuck or {}
        self._levels: dict[int, np.ndarray] = {}
        self._random = np.random.default_rng(seed)

    def limits(self) -> Limits:
        return self._limits

    def write(self, tile: int, levels: np.ndarray) -> None:
        self._limits.refuse(tile, levels, "levels")
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
        self._limits.refuse(tile, codes, "codes")
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
