"""From real multipliers to the numbers that executors hold: float32, and 31-bit integer with a right shift.

    m = M 2^-S,   M = rint(m 2^S) in [2^30, 2^31),   S in 1..62        ALGORITHMS 10.1; Jacob et al. 2018, eq. 5 and 6

where two terms share one sum the larger has M in [2^29, 2^30), so that the sum of both and the rounding fits int64.
"""

import numpy as np

from hq_lib.integer.record import Requant

MAX_SHIFT = 62
_TOP_ALONE, _TOP_SHARED = 30, 29


class RecordError(ValueError):
    """An integer record that cannot be made, or a file that holds none; the message names the operation or file."""


def single(multiplier: np.ndarray, exact: np.ndarray) -> Requant:
    """Return the ``Requant`` of one rescaled accumulator.

    Args:
        multiplier: (n,) the float32 form, rounded as the executors' text says.
        exact:      (n,) float64, the same ratio unrounded: what the fixed form approximates, relative error <= 2^-31.

    Raises:
        RecordError: a multiplier that is negative, not finite, or >= 2^30.
    """
    shift = _shift(exact, _TOP_ALONE)
    return _requant(multiplier, exact, shift)


def pair(multipliers: tuple[np.ndarray, np.ndarray], exact: tuple[np.ndarray, np.ndarray]) -> tuple[Requant, Requant]:
    """Return the ``Requant`` of two terms of one sum, with one shift per channel; see ``single``."""
    shift = _shift(np.maximum(*exact), _TOP_SHARED)
    return _requant(multipliers[0], exact[0], shift), _requant(multipliers[1], exact[1], shift)


def _shift(exact: np.ndarray, top: int) -> np.ndarray:
    if not np.all(np.isfinite(exact)) or np.any(exact < 0):
        raise RecordError(f"a multiplier is negative or not finite: {exact!r:.200}")
    _, exponent = np.frexp(exact)  # exact in [2^(exponent - 1), 2^exponent)
    shift = top + 1 - exponent.astype(np.int64)
    shift = np.where(np.rint(np.ldexp(exact, np.minimum(shift, MAX_SHIFT))) >= 2.0 ** (top + 1), shift - 1, shift)
    shift = np.where(exact == 0, 1, np.minimum(shift, MAX_SHIFT))
    if np.any(shift < 1):
        raise RecordError(f"a multiplier of {exact.max():.3g} is too large for {top + 1} bits and a right shift")
    return shift


def _requant(multiplier: np.ndarray, exact: np.ndarray, shift: np.ndarray) -> Requant:
    fixed = np.rint(np.ldexp(exact, shift)).astype(np.int32)
    return Requant(
        np.asarray(multiplier, np.float32).reshape(-1), fixed.reshape(-1), shift.astype(np.uint8).reshape(-1)
    )
