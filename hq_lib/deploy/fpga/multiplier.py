"""Real scales as ``m 2^-shift`` with an 8-bit m: the rule of this library, and seed 002's for comparison."""

from __future__ import annotations

import math

from hq_lib.deploy.fpga.layers import MAX_SHIFT, FpgaiError

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


def seed_multiplier(scale: float) -> tuple[int, int]:
    """Return seed 002's (m, shift): the least *absolute* |scale 2^i - m|, m in 1..256, i in 0..31, first of ties.

    The distance shrinks with m, so that many scales end as 1: relative errors reach 21 %. Kept to measure against.
    """
    pairs = [(round(math.ldexp(scale, i)), i) for i in range(MAX_SHIFT + 1)]
    allowed = [(m, i) for m, i in pairs if 1 <= m <= _TOP]
    if not allowed:
        raise FpgaiError(f"scale {scale!r} has no multiplier in 1..256 by the seed's rule")
    return min(allowed, key=lambda pair: abs(math.ldexp(scale, pair[1]) - pair[0]))


def relative_error(scale: float, multiplier: int, shift: int) -> float:
    """Return |m 2^-shift - scale| / scale, a fraction."""
    return abs(math.ldexp(multiplier, -shift) - scale) / scale
