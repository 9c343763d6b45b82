"""Memory cells: programming error, drift and read noise of one conductance, in microsiemens and seconds.

Order of effects on a cell: target -> programming error -> drift to time t -> stuck cell -> read noise, drawn once for
all products of a read-out (accumulated 1/f noise) or anew for every product.
Symbols: G conductance (uS), g = G / G_max, sigma(G) its standard deviation (uS), nu drift exponent, t seconds since
programming.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from hq_lib.crossbar.checks import FRACTION, OPTION, Bound, CrossbarError, Fraction, NotNegative, Positive, Settings


class Curve(Settings, ABC):
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

    sigma_uS: NotNegative
    """Standard deviation, uS, >= 0; usually a fraction of the window G_max - G_min."""

    def sigma(self, g_uS: Tensor) -> Tensor:
        return torch.full_like(g_uS, self.sigma_uS)


@dataclass(frozen=True)
class Proportional(Curve):
    """Error proportional to the conductance itself."""

    fraction: Fraction
    """sigma / G, dimensionless, in [0, 1); 5 % is 0.05."""

    def sigma(self, g_uS: Tensor) -> Tensor:
        return self.fraction * g_uS


@dataclass(frozen=True)
class Polynomial(Curve):
    """sigma = sum_i c_i (G / per_uS)^i, a published fit; negative values of the fit are cut at 0."""

    coefficients_uS: tuple[float, ...]
    """c_0, c_1, ... in uS."""
    per_uS: Positive = 1.0
    """Conductance by which G is divided first, uS, > 0; G_max where a source fits against g = G / G_max."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.coefficients_uS or not np.isfinite(self.coefficients_uS).all():
            raise CrossbarError(f"coefficients_uS = {self.coefficients_uS} must be one or more finite numbers")

    def sigma(self, g_uS: Tensor) -> Tensor:
        g, total = g_uS / self.per_uS, torch.zeros_like(g_uS)
        for coefficient in reversed(self.coefficients_uS):
            total = total * g + coefficient
        return total.clamp_min(0.0)


_TINY_G = 1e-6  # g below this is taken as this: logarithms and negative powers stay finite, the clamps decide anyway


@dataclass(frozen=True)
class LogClamp:
    """clamp(slope * ln g + level; low, high): the published form of drift statistics against g = G / G_max."""

    slope: float
    """Change per natural-log unit of g, dimensionless."""
    level: float
    """Value at g = 1, dimensionless."""
    low: float
    """Smallest value, dimensionless, >= 0."""
    high: float
    """Largest value, dimensionless, >= low."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise CrossbarError(f"drift statistics need 0 <= low <= high, not {self.low}, {self.high}")

    def at(self, g: Tensor) -> Tensor:
        """Value at relative conductance ``g`` in [0, 1]."""
        return (self.slope * torch.log(g.clamp_min(_TINY_G)) + self.level).clamp(self.low, self.high)


@dataclass(frozen=True)
class Drift(Settings):
    """Power-law drift G(t) = G(t0) (t / t0)^(-nu), nu = |N(mu(g), s(g))| drawn once per cell."""

    mu: LogClamp
    """Mean exponent against g."""
    spread: LogClamp
    """Standard deviation of the exponent between cells, against g."""
    t0_s: Positive
    """Time at which G(t0) is what was programmed, seconds, > 0."""


class ReadNoise(Settings, ABC):
    """Gaussian noise of a cell's conductance when it is read."""

    per: str
    """How long one draw lasts: a "readout" (all products at one time since programming) or a "product"."""

    @abstractmethod
    def std(self, g_uS: Tensor, *, g_max_uS: float, t_s: float, g0_uS: Tensor | None = None) -> Tensor:
        """Standard deviation in uS, shape of ``g_uS``, at ``t_s`` seconds after programming.

        Args:
            g0_uS: what was programmed, before any drift, uS; None: ``g_uS``.
        """


@dataclass(frozen=True)
class ConstantRead(ReadNoise):
    """The same read noise for every cell, fresh at every product."""

    per: ClassVar[str] = "product"

    fraction: Fraction
    """Standard deviation as a fraction of G_max, in [0, 1); 0.01 is what aihwkit suggests for RRAM."""

    def std(self, g_uS: Tensor, *, g_max_uS: float, t_s: float, g0_uS: Tensor | None = None) -> Tensor:
        return torch.full_like(g_uS, self.fraction * g_max_uS)


@dataclass(frozen=True)
class FlickerRead(ReadNoise):
    """1/f noise: sigma = G(t) q(g0) sqrt(ln((t + t_r) / (2 t_r))), q(g0) = min(q_scale g0^q_power, q_max), of what was
    programmed, g0 = G(t0) / G_max: drift makes a cell smaller, not relatively noisier (as in aihwkit).

    It is the noise accumulated since programming, slow beside a product: the source (aihwkit's PCM model) draws it
    once for each time at which cells are read. Draws at different times are independent, as there; real 1/f noise is
    correlated between them."""

    q_scale: float
    """q at g = 1, dimensionless, >= 0."""
    q_power: float
    """Exponent of g, dimensionless, usually negative."""
    q_max: float
    """Upper end of q, dimensionless."""
    t_read_s: float
    """Duration t_r of a read, seconds, > 0."""
    per: Literal["readout", "product"] = "readout"
    """ "readout": as the source draws it. "product": fresh at every product, the same variance without its memory."""

    def std(self, g_uS: Tensor, *, g_max_uS: float, t_s: float, g0_uS: Tensor | None = None) -> Tensor:
        g0 = ((g_uS if g0_uS is None else g0_uS) / g_max_uS).clamp_min(_TINY_G)
        q = (self.q_scale * g0**self.q_power).clamp_max(self.q_max)
        decades = max(math.log((t_s + self.t_read_s) / (2 * self.t_read_s)), 0.0)
        return g_uS * q * math.sqrt(decades)


@dataclass(frozen=True)
class Device(Settings):
    """One kind of memory cell: its window, and how far a cell strays from its target."""

    MADE_BY: ClassVar[str] = "device('rram') gives a published one"

    name: str
    """Short name that result rows carry."""
    source: str
    """Where the numbers come from: paper or tool, and time after programming."""
    g_min_uS: NotNegative
    """Lowest target, microsiemens, >= 0; an idle cell sits here."""
    g_max_uS: Positive
    """Highest target, microsiemens, > g_min_uS."""
    error: Curve | None = None
    """Programming error sigma(G), uS; None: programmed exactly."""
    drift: Drift | None = None
    """Power-law drift; None: time changes nothing but flicker noise."""
    read: ReadNoise | None = None
    """Read noise; None: reads are noiseless."""
    clip_at_zero: bool = True
    """True: a negative draw becomes 0 uS (physical; shifts the mean of cells near 0). False: the bare Gaussian."""
    column_correlation: Fraction = field(default=0.0, metadata=OPTION)
    """Correlation of the programming errors (in their sigmas) of any two cells of one column of an array, [0, 1)."""
    row_correlation: Fraction = field(default=0.0, metadata=OPTION)
    """The same of one row. The sum of both must be below 1."""
    temperature_per_K: Annotated[float, Bound(">= -inf")] = field(default=0.0, metadata=OPTION)
    """Relative change of every conductance per kelvin above 25 C: G (1 + temperature_per_K (T - 25))."""
    iv_cubic: Annotated[float, Bound("> -0.3333333333333333")] = field(default=0.0, metadata=OPTION)
    """a of I = G V (1 + a (V / V_max)^2) / (1 + a), > -1/3 (monotone): full drive gives the ohmic current. With one-bit
    inputs nothing changes; with pulse widths for inputs leave it 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.g_max_uS > self.g_min_uS:
            raise CrossbarError(f"g_max_uS = {self.g_max_uS} must exceed g_min_uS = {self.g_min_uS}")
        FRACTION.check(self.column_correlation + self.row_correlation, "column_correlation + row_correlation")

    @property
    def window_uS(self) -> float:
        """G_max - G_min, uS."""
        return self.g_max_uS - self.g_min_uS

    @property
    def ages(self) -> bool:
        """Whether anything depends on the time since programming."""
        tabled = self.error is not None and len(self.error.times_s) > 1
        return self.drift is not None or isinstance(self.read, FlickerRead) or tabled

    @property
    def t0_s(self) -> float:
        """Reference time of the programmed state, seconds (1 for devices without a model of time)."""
        return self.drift.t0_s if self.drift else self.error.times_s[0] if self.error else 1.0

    def program(self, target_uS: Tensor, xi: Tensor) -> Tensor:
        """Programmed conductance G_T + sigma(G_T) xi, uS, shape of ``target_uS``, from standard normals ``xi``."""
        return self.at(target_uS, xi, None, self.t0_s)

    def exponents(self, target_uS: Tensor, generator: Generator) -> Tensor | None:
        """Drift exponents |N(mu(g), s(g))| per cell, dimensionless, or None for a device without drift."""
        if self.drift is None:
            return None
        g = target_uS / self.g_max_uS
        xi = torch.randn(target_uS.shape, generator=generator, dtype=target_uS.dtype)
        return (self.drift.mu.at(g) + self.drift.spread.at(g) * xi).abs_()

    def at(self, target_uS: Tensor, xi: Tensor, nu: Tensor | None, t_s: float) -> Tensor:
        """Conductance at ``t_s`` >= t0 seconds, uS: (G_T + sigma(G_T) xi) (t / t0)^(-nu), or as `Measured` has it.

        Args:
            target_uS, xi: targets, and the standard normals of their programming errors.
            nu: drift exponents; None: no drift.
        """
        if not self.t0_s <= t_s < math.inf:
            raise CrossbarError(f"t_s = {t_s} is not a time from {self.name}'s reference {self.t0_s} s on")
        g_uS = target_uS.clone() if self.error is None else self.error.state(target_uS, xi, t_s)
        g_uS = g_uS.clamp_min_(0.0) if self.clip_at_zero else g_uS
        return g_uS if nu is None else g_uS * torch.exp(-nu * math.log(t_s / self.t0_s))

    def warmth(self, celsius: float) -> float:
        """The factor of every conductance at ``celsius``, 1 at 25 C, > 0."""
        factor = 1 + self.temperature_per_K * (celsius - 25.0)
        if celsius != 25.0 and (self.temperature_per_K == 0 or not 0 < factor < float("inf")):
            raise CrossbarError(
                f"{self.name} at {celsius} C: temperature_per_K = {self.temperature_per_K} changes nothing or leaves "
                "no conductance; state a coefficient with replace(device, temperature_per_K=...)"
            )
        return factor

    def read_std(self, g_uS: Tensor, t_s: float, *, per: str, g0_uS: Tensor | None = None) -> Tensor | None:
        """Standard deviation, uS, shape of ``g_uS``, of the noise drawn ``per`` "readout" or "product"; None: there is
        none of that kind. ``g0_uS``: see `ReadNoise.std`."""
        if self.read is None or self.read.per != per:
            return None
        return self.read.std(g_uS, g_max_uS=self.g_max_uS, t_s=t_s, g0_uS=g0_uS)

    def read_out(self, g_uS: Tensor, g0_uS: Tensor, t_s: float, generator: Generator) -> Tensor:
        """``g_uS`` with the noise of one read-out at ``t_s``, uS; itself where noise is none or fresh at every product.

        A negative draw becomes 0 uS where ``clip_at_zero``, as in the source of `FlickerRead`.
        """
        std = self.read_std(g_uS, t_s, per="readout", g0_uS=g0_uS)
        if std is None:
            return g_uS
        noisy = g_uS + std * torch.randn(g_uS.shape, generator=generator, dtype=g_uS.dtype)
        return noisy.clamp_min_(0.0) if self.clip_at_zero else noisy
