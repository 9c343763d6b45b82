"""A small bench in memory and an engine on it, for the tests of drivers."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from hq_lib.crossbar import Drive, FakeDriver, HardwareEngine, Limits, Mapping, Patience

RNG = np.random.default_rng(0)
W, X = RNG.integers(-127, 128, (20, 3)), RNG.integers(0, 256, (10, 20))
LIMITS: dict[str, Any] = {
    "n_tiles": 64,
    "rows": 16,
    "columns": 8,
    "level_max": 15,
    "code_max": 3,
    "count_max": 10**6,
    "rows_per_read": 4,
    "counts_per_unit": 2.0,
}
SLICED = Mapping(cell_bits=2, subtract="digital", scale="none", tile_rows=16, tile_cols=8)
QUICK = Patience(3, 0.0)


class Flaky(FakeDriver):
    """A bench whose reads may also lose their connection ("drop"), or answer "nan" or another "shape"."""

    def __init__(self, limits: Limits, failures: Iterable[str]) -> None:
        self.failures = list(failures)
        super().__init__(limits, timeouts=[failure == "timeout" for failure in self.failures])

    def read(self, tile: int, codes: np.ndarray) -> np.ndarray:
        happens = self.failures.pop(0) if self.failures else "ok"
        counts = super().read(tile, codes)
        if happens == "drop":
            raise ConnectionError("the fake bench was told to drop the connection")
        if happens == "nan":
            counts[0, 0] = np.nan
        return counts[:, :-1] if happens == "shape" else counts


def fake(failures=(), **change) -> FakeDriver:
    return Flaky(Limits(**(LIMITS | change)), failures)


def engine_on(driver, **more) -> HardwareEngine:
    return HardwareEngine(driver, **({"mapping": SLICED, "drive": Drive("serial", 2), "patience": QUICK} | more))
