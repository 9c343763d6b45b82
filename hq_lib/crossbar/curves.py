"""Programming-error curves: the standard deviation of a cell's conductance as a function of its target.

Symbols: ``g_uS`` target conductance in microsiemens; ``sigma(g)`` standard deviation in microsiemens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, check_fraction, check_positive


class Curve(ABC):
    """sigma(G), programming error in uS against target conductance in uS."""

    @property
    def times_s(self) -> tuple[float, ...]:
        """Times since programming, seconds, between which the curve knows the cells; one where time changes nothing."""
        return (1.0,)

    def state(self, target_uS: Tensor, xi: Tensor, t_s: float) -> Tensor:
        """Conductance in uS of cells aimed at ``target_uS``, ``t_s`` seconds later, with standard normals ``xi``."""
        return target_uS + self.sigma(target_uS) * xi

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
