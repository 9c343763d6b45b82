"""Stuck cells: rates, maps drawn or measured, and their files.

A map holds one code per cell: ``OK`` works, ``STUCK_LOW`` stays at G_min, ``STUCK_HIGH`` stays at G_max.
"""

from __future__ import annotations

from collections.abc import Mapping as Maps
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from hq_lib.crossbar.checks import CrossbarError, check_fraction
from hq_lib.results import atomic

OK, STUCK_LOW, STUCK_HIGH = 0, 1, 2


@dataclass(frozen=True)
class Faults:
    """Which cells do not obey programming; drift does not move them."""

    low_fraction: float = 0.0
    """Share of cells stuck at G_min, in [0, 1); 0.001 in MNSIM's default, 0.0175 on a 4-Mb test chip (often quoted)."""
    high_fraction: float = 0.0
    """Share of cells stuck at G_max, in [0, 1); 0.001 in MNSIM's default, 0.0904 on a 4-Mb test chip (often quoted)."""
    maps: Maps[str, np.ndarray] = field(default_factory=dict)
    """Measured maps by layer name, uint8 (rows, columns, planes) as `Cells.codes`; they replace the random draw."""

    def __post_init__(self) -> None:
        check_fraction(self.low_fraction, "low_fraction")
        check_fraction(self.high_fraction, "high_fraction")
        check_fraction(self.low_fraction + self.high_fraction, "low_fraction + high_fraction")
        for name, codes in self.maps.items():
            if codes.dtype != np.uint8 or codes.ndim != 3 or (codes > STUCK_HIGH).any():
                raise CrossbarError(f"fault map {name!r} must be uint8 (rows, columns, planes) of codes 0, 1, 2")

    def codes(self, name: str, shape: tuple[int, int, int], generator: Generator) -> Tensor:
        """uint8 codes of layer ``name``, ``shape`` = (rows, columns, planes): its map if there is one, else a draw."""
        if name in self.maps:
            if self.maps[name].shape != shape:
                raise CrossbarError(f"fault map {name!r} is {self.maps[name].shape}, the layer's cells are {shape}")
            return torch.from_numpy(self.maps[name].copy())
        draw = torch.rand(shape, generator=generator, dtype=torch.float64)
        stuck = (draw < self.low_fraction + self.high_fraction).to(torch.uint8) * STUCK_HIGH
        return torch.where(draw < self.low_fraction, STUCK_LOW, stuck).to(torch.uint8)


def save_maps(path: str | Path, maps: Maps[str, np.ndarray]) -> None:
    """Nothing; writes the fault maps of named layers to one ``.npz`` file."""
    buffer = BytesIO()
    np.savez_compressed(buffer, **{name: np.asarray(m, np.uint8) for name, m in maps.items()})  # type: ignore[arg-type]
    atomic.write_bytes(Path(path), buffer.getvalue())


def load_maps(path: str | Path) -> Faults:
    """The faults of a file written by `save_maps`. Errors (`CrossbarError`): a damaged file, or none of these."""
    content = Path(path).read_bytes()
    try:
        with np.load(BytesIO(content), allow_pickle=False) as stored:
            maps = {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged archive fails in zipfile, zlib or NumPy, each in its own way
        raise CrossbarError(f"{path}: no fault maps as save_maps writes them ({type(error).__name__})") from error
    return Faults(maps=maps)
