"""Programming-error curves: the standard deviation of a cell's conductance as a function of its target.

Symbols: ``g_uS`` target conductance in microsiemens; ``sigma(g)`` standard deviation in microsiemens.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, check_fraction, check_positive


class Curve(ABC):
    """sigma(G), programming error in uS against target conductance in uS."""

    @abstractmethod
    def sigma(self, g_uS: Tensor) -> Tensor:
        """Standard deviation in uS, shape of ``g_uS``, never negative."""


@dataclass(frozen=True)
class Constant(Curve):
    """State-independent error."""

    sigma_uS: float
    """Standard deviation, uS, >= 0; usually a fraction of the window G_max - G_min."""

    def __post_init__(self) -> None:
        check_positive(self.sigma_uS, "sigma_uS", zero=True)

    def sigma(self, g_uS: Tensor) -> Tensor:
        return torch.full_like(g_uS, self.sigma_uS)


@dataclass(frozen=True)
class Proportional(Curve):
    """Error proportional to the conductance itself."""

    fraction: float
    """sigma / G, dimensionless, in [0, 1); 5 % is 0.05."""

    def __post_init__(self) -> None:
        check_fraction(self.fraction, "fraction")

    def sigma(self, g_uS: Tensor) -> Tensor:
        return self.fraction * g_uS


@dataclass(frozen=True)
class Polynomial(Curve):
    """sigma = sum_i c_i (G / per_uS)^i, a published fit; negative values of the fit are cut at 0."""

    coefficients_uS: tuple[float, ...]
    """c_0, c_1, ... in uS."""
    per_uS: float = 1.0
    """Conductance by which G is divided first, uS, > 0; G_max where a source fits against g = G / G_max."""

    def __post_init__(self) -> None:
        check_positive(self.per_uS, "per_uS")
        if not self.coefficients_uS or not np.isfinite(self.coefficients_uS).all():
            raise CrossbarError(f"coefficients_uS = {self.coefficients_uS} must be one or more finite numbers")

    def sigma(self, g_uS: Tensor) -> Tensor:
        g, total = g_uS / self.per_uS, torch.zeros_like(g_uS)
        for coefficient in reversed(self.coefficients_uS):
            total = total * g + coefficient
        return total.clamp_min(0.0)


@dataclass(frozen=True)
class Table(Curve):
    """One's own measured sigma(G): linear between the points, constant outside them."""

    g_uS: tuple[float, ...]
    """Conductances of the points, uS, strictly ascending, >= 0."""
    sigma_uS: tuple[float, ...]
    """Standard deviations at the points, uS, >= 0, as many as ``g_uS``."""

    def __post_init__(self) -> None:
        g, s = np.asarray(self.g_uS, float), np.asarray(self.sigma_uS, float)
        if g.size == 0 or g.shape != s.shape:
            raise CrossbarError(f"a sigma table needs as many sigma_uS ({s.size}) as g_uS ({g.size}), at least one")
        if not (np.isfinite(g).all() and np.isfinite(s).all()) or (g < 0).any() or (s < 0).any():
            raise CrossbarError("a sigma table holds a negative or non-finite entry; conductance and sigma are >= 0 uS")
        if (np.diff(g) <= 0).any():
            row = int(np.argmax(np.diff(g) <= 0)) + 1
            raise CrossbarError(f"g_uS must ascend strictly; entry {row} ({g[row]:g} uS) does not: sort the table")

    def sigma(self, g_uS: Tensor) -> Tensor:
        found = np.interp(g_uS.numpy(), self.g_uS, self.sigma_uS)
        return torch.from_numpy(np.asarray(found)).to(g_uS.dtype)


def read_table(path: str | Path) -> Table:
    """The sigma(G) table of a CSV file with the header ``g_uS,sigma_uS``; lines that start with # are comments.

    Errors: another header, a field that is no number, negative or unsorted entries; each names file and line.
    """
    lines = [(n, text) for n, text in enumerate(Path(path).read_text().splitlines(), 1) if _is_data(text)]
    rows = list(csv.reader(text for _, text in lines))
    if not rows or [field.strip() for field in rows[0]] != ["g_uS", "sigma_uS"]:
        raise CrossbarError(f"{path}: the first line must be 'g_uS,sigma_uS'")
    try:
        points = [_point(path, n, row) for (n, _), row in zip(lines[1:], rows[1:], strict=True)]
        return Table(tuple(g for g, _ in points), tuple(s for _, s in points))
    except CrossbarError as error:
        raise CrossbarError(error.args[0] if str(path) in str(error) else f"{path}: {error}") from None


def _is_data(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _point(path: str | Path, line: int, row: list[str]) -> tuple[float, float]:
    try:
        g, sigma = row
        return float(g), float(sigma)
    except ValueError:
        raise CrossbarError(f"{path}:{line}: expected two numbers, found {','.join(row)!r}") from None
