"""Correction: gain and offset per output column, fitted between what was measured and what was wanted.

    y = gain drift raw + offset;    a_j = cov(raw, z) / (var(raw) - noise / m),   b_j = mean(z) - a_j mean(raw)

The noise term removes the shrinking of slopes by read noise (errors in variables); it needs repeated measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, check_choice

_RIDGE = 1e-9  # of the ideal variance: a dead column gets gain 0 instead of an infinite one


@dataclass(frozen=True, eq=False)
class Correction:
    """Digital correction of one layer's outputs."""

    KINDS: ClassVar[tuple[str, ...]] = ("zero", "gain", "column_gain", "column")

    gain: Tensor
    """float64 (N,), dimensionless; 0 for a column that carries no signal."""
    offset: Tensor
    """float64 (N,), accumulator units."""
    drift: Tensor
    """float64 (N,), dimensionless: reading at the reference time over reading now."""
    kind: str = "identity"
    """What was fitted: one of KINDS, or "identity"."""
    n_rows: int = 0
    """Calibration rows."""
    rmse_before: float = float("nan")
    """Root mean square error on the calibration rows without correction, accumulator units (LSB)."""
    rmse_after: float = float("nan")
    """The same with it."""

    @classmethod
    def identity(cls, n_outputs: int) -> Correction:
        """The correction that changes nothing."""
        one = torch.ones(n_outputs, dtype=torch.float64)
        return cls(one, torch.zeros_like(one), one)

    @classmethod
    def fit(cls, runs: Tensor, wanted: Tensor, *, kind: str = "column") -> Correction:
        """The least-squares correction from ``runs`` (repeats, m, N) measured to ``wanted`` (m, N).

        Errors: fewer than two rows for "column", shapes that do not match, values that are not finite.
        """
        check_choice(kind, cls.KINDS, "correction kind")
        if runs.shape[1:] != wanted.shape or runs.ndim != 3 or len(wanted) < (2 if kind == "column" else 1):
            raise CrossbarError(f"measured {tuple(runs.shape[1:])} and wanted {tuple(wanted.shape)} rows do not fit")
        if not bool(torch.isfinite(runs.sum()) & torch.isfinite(wanted.sum())):
            raise CrossbarError("calibration rows hold NaN or infinity")
        y = runs.mean(0)
        gain, offset = _FITS[kind](y, wanted, _noise(runs))
        made = cls(gain, offset, torch.ones_like(gain), kind, len(wanted), _rmse(y, wanted))
        return replace(made, rmse_after=_rmse(made.apply(y), wanted))

    @property
    def is_identity(self) -> bool:
        """Whether nothing would change."""
        return self.kind == "identity" and bool((self.drift == 1).all())

    def apply(self, raw: Tensor) -> Tensor:
        """Corrected readings, shape and dtype of ``raw`` (..., N); ``raw`` itself for the identity."""
        if self.is_identity:
            return raw
        return torch.addcmul(self.offset.to(raw.dtype), raw, (self.gain * self.drift).to(raw.dtype))

    def with_drift(self, factor: Tensor) -> Correction:
        """The same gain and offset after readings were multiplied by ``factor`` (N,) or ()."""
        return replace(self, drift=factor.to(torch.float64).expand_as(self.gain).clone())


def _noise(runs: Tensor) -> Tensor | float:
    """(N,) variance of the averaged reading's noise, or 0 with a single run."""
    return runs.var(0, correction=1).mean(0) / len(runs) if len(runs) > 1 else 0.0


def _rmse(y: Tensor, wanted: Tensor) -> float:
    return float((y - wanted).square().mean().sqrt())


def _fit_zero(y: Tensor, z: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    return torch.ones(y.shape[1], dtype=y.dtype), (z - y).mean(0)


def _fit_gain(y: Tensor, z: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    power = (y.square().mean(0) - noise).clamp_min(0).sum() + _RIDGE * z.square().mean() + 1e-30
    return ((y * z).mean(0).sum() / power).expand(y.shape[1]).clone(), torch.zeros(y.shape[1], dtype=y.dtype)


def _fit_column_gain(y: Tensor, z: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    power = (y.square().mean(0) - noise).clamp_min(0) + _RIDGE * z.square().mean(0) + 1e-30
    return (y * z).mean(0) / power, torch.zeros(y.shape[1], dtype=y.dtype)


def _fit_column(y: Tensor, z: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    y_mean, z_mean = y.mean(0), z.mean(0)
    covariance = ((y - y_mean) * (z - z_mean)).mean(0)
    variance = (y - y_mean).square().mean(0)
    clean = torch.maximum(variance - noise, 0.05 * variance)  # few repeats may overestimate the noise
    gain = covariance / (clean + _RIDGE * (z - z_mean).square().mean(0) + 1e-30)
    return gain, z_mean - gain * y_mean


_FITS = {"zero": _fit_zero, "gain": _fit_gain, "column_gain": _fit_column_gain, "column": _fit_column}
