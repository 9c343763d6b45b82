"""Engines: whatever multiplies integer inputs by loaded integer weights, in accumulator units.

Every engine takes integers and returns integer-valued float64, so any two are comparable number by number. What an
engine measures passes one digital correction per column before it is rounded, fitted between raw and wanted z:

    y = gain drift raw + offset;    a_j = cov(raw, z) / (var(raw) - noise / m),   b_j = mean(z) - a_j mean(raw)

The noise term removes the shrinking of slopes by read noise (errors in variables); it needs repeated measurements.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, Numbers, as_integers, as_tensor, check_range
from hq_lib.crossbar.native import rounded
from hq_lib.crossbar.operands import Handle, Operand, exact_dtype, exact_mvm, make_handle
from hq_lib.results.hints import check_known

Answers = TypeVar("Answers", np.ndarray, Tensor)
_RIDGE = 1e-9  # of the ideal variance: a dead column gets gain 0 instead of an infinite one


@dataclass(frozen=True, eq=False)
class Correction:
    """Digital correction of one layer's outputs."""

    KINDS: ClassVar[tuple[str, ...]] = ("gain", "column")

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
    t_s: float = 0.0
    """Time of the engine at which it was fitted, seconds."""

    @classmethod
    def identity(cls, n_outputs: int) -> "Correction":
        """The correction that changes nothing."""
        one = torch.ones(n_outputs, dtype=torch.float64)
        return cls(one, torch.zeros_like(one), one)

    @classmethod
    def fit(cls, runs: Tensor, wanted: Tensor, *, kind: str = "column") -> "Correction":
        """The least-squares correction from ``runs`` (repeats, m, N) measured to ``wanted`` (m, N).

        Errors: fewer than two rows for "column", shapes that do not match, values that are not finite.
        """
        check_known(kind, cls.KINDS, "correction kind", error=CrossbarError)
        if runs.shape[1:] != wanted.shape or runs.ndim != 3 or len(wanted) < (2 if kind == "column" else 1):
            raise CrossbarError(f"measured {tuple(runs.shape[1:])} and wanted {tuple(wanted.shape)} rows do not fit")
        if not bool(torch.isfinite(runs.sum()) & torch.isfinite(wanted.sum())):
            raise CrossbarError("calibration rows hold NaN or infinity")
        y, z, noise = runs.mean(0), wanted, torch.zeros(wanted.shape[1], dtype=runs.dtype)
        if len(runs) > 1:  # variance of the averaged reading
            noise = runs.var(0, correction=1).mean(0) / len(runs)
        y_mean, z_mean = (y.mean(0), z.mean(0)) if kind == "column" else (torch.zeros_like(noise),) * 2
        power, product = (y - y_mean).square().mean(0), ((y - y_mean) * (z - z_mean)).mean(0)
        # few repeats may overestimate the noise
        clean = torch.maximum(power - noise, (0.05 if kind == "column" else 0.0) * power)
        ideal = (z - z_mean).square().mean(0)
        if kind == "gain":
            clean, product, ideal = clean.sum(), product.sum(), z.square().mean()
        gain = torch.ones_like(noise) * (product / (clean + _RIDGE * ideal + 1e-30))
        offset = z_mean - gain * y_mean
        made = cls(gain, offset, torch.ones_like(gain), kind, len(wanted), _rmse(y, z))
        return replace(made, rmse_after=_rmse(made.apply(y), z))

    def apply(self, raw: Tensor) -> Tensor:
        """Corrected readings, shape and dtype of ``raw`` (..., N); ``raw`` itself for the identity."""
        if self.kind == "identity" and bool((self.drift == 1).all()):
            return raw
        return torch.addcmul(self.offset.to(raw.dtype), raw, (self.gain * self.drift).to(raw.dtype))


def need_rows(name: str, n_rows: int, kind: str | None) -> None:
    """Nothing, or an error: ``n_rows`` of layer ``name`` are too few to fit a correction of this ``kind`` on."""
    if kind == "column" and n_rows < 3:
        raise CrossbarError(f"{name}: gain and offset need 3 calibration rows, not {n_rows}: more images")


def _rmse(y: Tensor, wanted: Tensor) -> float:
    return float((y - wanted).square().mean().sqrt())


class Engine(ABC):
    """Loads integer weights and multiplies integer inputs by them. Abstract: see the engines beside it."""

    def __init__(self) -> None:
        self._handles: dict[str, Handle] = {}
        self._corrections: dict[str, Correction] = {}

    def load(
        self, w_int: Numbers, w_scale: object, name: str, *, w_bits: int = 8, x_bits: int = 8, x_signed: bool = False
    ) -> Handle:
        """The handle of weights ``w_int`` (K, N), programmed under ``name``.

        Args:
            w_int: (K, N) integers within ``w_bits``.
            w_scale: real units per weight step, one number or (N,); for reports only.
            name: layer name; a second load under one name is refused.
            w_bits, x_bits: declared bits, 1..16; ``x_signed``: whether inputs are two's complement.
        """
        return self.add(make_handle(w_int, w_scale, name, w_bits=w_bits, x_bits=x_bits, x_signed=x_signed))

    def add(self, handle: Handle) -> Handle:
        """``handle`` itself, of another engine or a trace, now programmed into this engine too."""
        if handle.name in self._handles:
            raise CrossbarError(f"layer {handle.name!r} is already loaded; give every layer of an engine its own name")
        self._program(handle)
        self._handles[handle.name], self._corrections[handle.name] = handle, Correction.identity(handle.w_int.shape[1])
        return handle

    def mvm(self, handle: Handle, x: Answers | Operand) -> Answers:
        """float64 (B, N), integer-valued: the engine's answer to ``x @ w_int``, corrected and rounded.

        Args:
            handle: from this engine's `load`.
            x: (B, K) integers within the declared bits; NumPy in, NumPy out; torch in, torch out, on the same device.
                Or an `Operand`, the patches of images: a tensor with one row per patch.
        """
        y = self._in_parts(handle, x, self.finish)
        if isinstance(x, Operand):
            return y  # type: ignore[return-value]
        return y.to(x.device) if isinstance(x, Tensor) else y.numpy()  # type: ignore[return-value]

    def measure(self, handle: Handle, x: Numbers | Operand) -> Tensor:
        """float64 (rows, N): what the engine reads for ``x``, before correction and rounding."""
        return self._in_parts(handle, x, lambda _, raw, out: out.copy_(raw))

    def _in_parts(
        self, handle: Handle, x: Numbers | Operand, keep: Callable[[Handle, Tensor, Tensor], object]
    ) -> Tensor:
        """float64 (rows, N): what ``keep`` makes of what is measured, a bounded number of rows at a time."""
        inputs = self._checked(handle, x)
        y, done = torch.empty(inputs.n_rows, handle.w_int.shape[1], dtype=torch.float64), 0
        for part in inputs.split(max(1, self._rows_at_once(handle))):
            raw = self._measure(handle, part)
            if raw.shape != (part.n_rows, y.shape[1]):
                raise CrossbarError(f"{handle.name}: the engine answered {tuple(raw.shape)} to {part.n_rows} rows")
            keep(handle, raw, y[done : done + part.n_rows])
            done += part.n_rows
        return y

    def _rows_at_once(self, handle: Handle) -> int:
        """Rows of inputs per call of `_measure`: 64 MiB if they are written out as int64."""
        return (64 << 20) // (8 * sum(handle.w_int.shape))

    def finish(self, handle: Handle, raw: Tensor, out: Tensor) -> Tensor:
        """``out``, float64 (rows, N), filled with ``raw``, corrected and rounded to whole numbers."""
        if not rounded(self._corrections[handle.name].apply(raw), out):
            raise CrossbarError(f"{handle.name}: the engine returned NaN or infinity")
        return out

    def calibrate(
        self, handle: Handle, x: Numbers, y_ideal: Numbers | None = None, *, kind: str = "column", repeats: int = 1
    ) -> Correction:
        """The correction fitted on inputs ``x`` (m, K), now in force for ``handle``.

        Args:
            y_ideal: (m, N) wanted outputs; None: ``x @ w_int`` exactly. In a closed loop these are the ideal network's
                accumulators while ``x`` are the inputs that the calibrated upstream layers really deliver.
            kind: "gain" (one factor for all columns), or "column" (gain and offset of each).
            repeats: measurements of each row, averaged; two or more also remove read noise from the slope.

        Errors: fewer than three rows for "column": a line meets two exactly, noise and all.
        """
        need_rows(handle.name, len(x), kind)
        wanted = exact_mvm(handle, as_tensor(x)) if y_ideal is None else as_tensor(y_ideal)
        runs = torch.stack([self.measure(handle, x).to(torch.float64) for _ in range(max(repeats, 1))])
        found = Correction.fit(runs, wanted.to(torch.float64), kind=kind)
        self._corrections[handle.name] = replace(found, t_s=self.time_s)
        return self._corrections[handle.name]

    def correction(self, handle: Handle) -> Correction:
        """The correction in force for ``handle``; the identity unless calibrated."""
        return self._corrections[handle.name]

    def set_correction(self, handle: Handle, correction: Correction) -> None:
        """Nothing; puts ``correction`` in force for ``handle``."""
        if correction.gain.numel() != handle.w_int.shape[1]:
            raise CrossbarError(f"{handle.name}: a correction of {correction.gain.numel()} columns does not fit")
        self._corrections[handle.name] = correction

    @property
    def handles(self) -> list[str]:
        """Names of the loaded matrices."""
        return list(self._handles)

    @property
    def time_s(self) -> float:
        """Seconds since programming at which the engine answers; 0 where time has no meaning."""
        return 0.0

    def tally(self, handle: Handle) -> tuple[int, int]:
        """(writes of the tiles that hold ``handle``, counts of all layers at the end of the range) so far, of a bench;
        0 where there is none."""
        return 0, 0

    def effective_weight(self, handle: Handle) -> Tensor | None:
        """(K, N) weights if the engine is one linear map ``x @ w``, read noise apart, else None."""
        return None

    def add_noise_(self, handle: Handle, x: Operand, raw: Tensor) -> Tensor:
        """``raw`` (rows, N) of a linear engine with the read noise of inputs ``x`` added in place."""
        return raw

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Flat dictionary of everything that defines the answers, for result rows."""

    def close(self) -> None:  # noqa: B027  (only engines that hold a connection or a file have something to close)
        """Nothing; gives back connections and files."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _program(self, handle: Handle) -> None:
        """Load the checked weights of ``handle``."""

    @abstractmethod
    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        """(rows, N) raw answers to checked integer inputs."""

    def _known(self, handle: Handle) -> Handle:
        """``handle`` itself; an error if it is not of this engine."""
        if self._handles.get(handle.name) is not handle:
            raise CrossbarError(f"layer {handle.name!r} was not loaded into this engine; loaded: {list(self._handles)}")
        return handle

    def _checked(self, handle: Handle, x: Numbers | Operand) -> Operand:
        self._known(handle)
        what = f"inputs of {handle.name}"
        operand = x if isinstance(x, Operand) else Operand(as_tensor(x))
        values = as_integers(operand.values, what, 4 if operand.window else 2)
        operand = operand if values is operand.values else replace(operand, values=values)
        if operand.n_columns != handle.w_int.shape[0]:
            raise CrossbarError(f"{what} have {operand.n_columns} columns, weights {handle.w_int.shape[0]} rows")
        check_range(operand.values, *handle.x_range, what)
        return operand


class IdealEngine(Engine):
    """The exact integer product, the oracle of all others: float64 sums of integers below 2^53 are exact."""

    def describe(self) -> dict[str, Any]:
        return {"engine": "ideal"}

    def effective_weight(self, handle: Handle) -> Tensor:
        return handle.w_int.to(exact_dtype(handle.w_int, handle))

    def _program(self, handle: Handle) -> None:
        pass

    def _rows_at_once(self, handle: Handle) -> int:
        return (1 << 20) // (4 * handle.w_int.shape[1])

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        return x.product(self.effective_weight(handle))
