"""Real scales as ``m 2^-shift``: with an 8-bit m, and records with a narrow m."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hq_lib.deploy.fpga.layers import MAX_SHIFT, FpgaiError, need
from hq_lib.integer import record as r
from hq_lib.integer.check import check
from hq_lib.integer.record import IntegerModel, Op, Requant

_TOP = 2**8


def nearest_multiplier(scale: float) -> tuple[int, int]:
    """Return (m, shift), m in [128, 255], with the smallest relative error |m 2^-shift - scale| / scale < 0.4 %.

        m = rint(scale 2^shift),  shift the largest with m <= 255         (ALGORITHMS 10.4)

    A mantissa in [128, 256) is at most half a step off: 0.5 / 128 = 0.39 %.

    Args:
        scale: real units per step, in [2^-24, 255].

    Raises:
        FpgaiError: a scale that no m in [128, 255] and shift in 0..31 is near to.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise FpgaiError(f"scale {scale!r} is not a finite number above 0")
    _, exponent = math.frexp(scale)  # scale in [2^(exponent - 1), 2^exponent)
    shift = 8 - exponent
    m = round(math.ldexp(scale, shift))
    if m == _TOP:  # 255.5 and above: 255 of this shift or 128 of the next
        m, shift = min(((255, shift), (128, shift - 1)), key=lambda pair: relative_error(scale, *pair))
    if not 0 <= shift <= MAX_SHIFT:
        raise FpgaiError(f"scale {scale:.3g} is outside [2^-24, 255], the reach of 8-bit multipliers and shifts 0..31")
    return m, shift


def relative_error(scale: float, multiplier: int, shift: int) -> float:
    """Return |m 2^-shift - scale| / scale, a fraction."""
    return abs(math.ldexp(multiplier, -shift) - scale) / scale


def narrowed(model: IntegerModel, bits: int) -> tuple[IntegerModel, float]:
    """Return ``model`` with multipliers of at most ``bits`` bits, for one DSP slice each, and their largest error.

        M' = round(M / 2^d), S' = S - d,   d the least with M' < 2^bits, for both multipliers of a sum

    The error is |M' 2^-S' - M 2^-S| / (M 2^-S), a fraction: at most 2^-bits where a multiplier stands alone; the
    smaller one of two that share a shift keeps fewer bits. The logits are another network's, by about that much.

    Args:
        model: a record with the "fixed" requantizer.
        bits:  8..31.

    Raises:
        FpgaiError: a "float32" record, other bits, or a multiplier that cannot shrink (its shift is too small).
    """
    need(model.requantizer == "fixed", "narrow multipliers are integers: lower with requantizer='fixed'")
    need(type(bits) is int and 8 <= bits <= 31, f"{bits!r:.40} bits of multipliers: 8 to 31")
    errors = [0.0]
    ops = tuple(_narrow_op(op, bits, errors) for op in model.ops)
    return check(replace(model, ops=ops)), max(errors)


def _narrow_op(op: Op, bits: int, errors: list[float]) -> Op:
    requants = r.requants_of(op)
    if not requants:
        return op
    narrow = _narrow(requants, bits, errors, op.name)
    if isinstance(op, r.Add):
        return replace(op, requants=narrow)
    if isinstance(op, r.Layer) and op.residual is not None:
        return replace(op, requant=narrow[0], residual=replace(op.residual, requant=narrow[1]))
    return replace(op, requant=narrow[0])  # type: ignore[call-arg]


def _narrow(requants: Sequence[Requant], bits: int, errors: list[float], name: str) -> tuple[Requant, ...]:
    wide = np.stack([requant.fixed for requant in requants]).astype(np.int64)
    drop = np.zeros(wide.shape[1], np.int64)
    while ((narrow := _rounded(wide, drop)) >= 2**bits).any():
        drop += (narrow >= 2**bits).any(0)
    shift = requants[0].shift.astype(np.int64) - drop
    need(bool((shift >= 1).all()), f"{name!r}: its multiplier is too large for {bits} bits and a right shift")
    exact = wide.astype(np.float64)
    errors.append(float((np.abs(np.ldexp(narrow, drop) - exact) / np.maximum(exact, 1)).max()))
    return tuple(
        replace(requant, fixed=m.astype(np.int32), shift=shift.astype(np.uint8))
        for requant, m in zip(requants, narrow, strict=True)
    )


def _rounded(wide: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """Return wide / 2^drop, half up."""
    return (wide + np.where(drop > 0, 1 << np.maximum(drop - 1, 0), 0)) >> drop
