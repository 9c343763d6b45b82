"""Integers as their bits, and packed: one behind the other without gaps, lowest bit first."""

import numpy as np

CHUNK = 2**20
"""Integers packed at a time: a multiple of 8, so that each chunk ends with a byte; some 100 MiB in memory."""


def bits_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Return the lowest ``bits`` of integers (...), two's complement: uint8 (..., bits), the lowest first."""
    return (values[..., None] >> np.arange(bits) & 1).astype(np.uint8)


def integers_of(ones: np.ndarray, *, signed: bool) -> np.ndarray:
    """Return the int64 (...) integers whose bits (..., bits) are ``ones``, the lowest first."""
    weights = np.int64(1) << np.arange(ones.shape[-1], dtype=np.int64)
    weights[-1] *= -1 if signed else 1  # two's complement
    return ones @ weights


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Return integers (n,) of ``bits``, signed or not, as uint8 (ceil(n bits / 8),)."""
    parts = [bits_of(values[i : i + CHUNK], bits) for i in range(0, len(values), CHUNK)]
    return np.concatenate([np.zeros(0, np.uint8), *(np.packbits(part, bitorder="little") for part in parts)])


def unpack(raw: np.ndarray, bits: int, n: int, *, signed: bool = False) -> np.ndarray:
    """Return the ``n`` integers, int64 (n,), of what ``pack`` made; ``ValueError`` where ``raw`` has another length."""
    if raw.dtype != np.uint8 or raw.shape != (-(-n * bits // 8),):
        raise ValueError(f"{n} integers of {bits} bits take {-(-n * bits // 8)} bytes, not {raw.shape} {raw.dtype}")
    parts = [np.zeros(0, np.int64)]
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        some = raw[start * bits // 8 : -(-(start + count) * bits // 8)]
        ones = np.unpackbits(some, count=count * bits, bitorder="little").reshape(count, bits)
        parts.append(integers_of(ones, signed=signed))
    return np.concatenate(parts)
