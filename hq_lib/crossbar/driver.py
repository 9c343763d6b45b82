"""Drivers: the little that a bench must offer, and a bench in memory that the tests can break at will.

A bench is a set of tiles of rows x columns cells. It takes whole-number cell levels and input codes and returns counts:

    count[b, j] = counts_per_unit sum_i code[b, i] level[i, j]  + its own errors
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import numpy as np

from hq_lib.crossbar.checks import CrossbarError, check_positive


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
        seed: int = 0,
    ) -> None:
        self._limits, self.gain, self.offset, self.noise = limits, gain, offset, noise
        self.failures, self.n_reads = list(failures), 0
        self._levels: dict[int, np.ndarray] = {}
        self._random = np.random.default_rng(seed)

    def limits(self) -> Limits:
        return self._limits

    def write(self, tile: int, levels: np.ndarray) -> None:
        refuse_levels(self._limits, tile, levels)
        self._levels[tile] = levels.astype(np.int64)

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
