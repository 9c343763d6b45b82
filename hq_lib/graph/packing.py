"""Integers of 1 to 16 bits, one behind the other without gaps, lowest bit first."""

import numpy as np

CHUNK = 2**20
"""Integers packed at a time: a multiple of 8, so that each chunk ends with a byte; 16 MiB of bits in memory."""


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Return integers (n,) in [0, 2^bits) as uint8 (ceil(n bits / 8),)."""
    parts = [_bit_rows(values[i : i + CHUNK].astype("<u2"))[:, :bits] for i in range(0, len(values), CHUNK)]
    return np.concatenate([np.zeros(0, np.uint8), *(np.packbits(part, bitorder="little") for part in parts)])


def _bit_rows(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(values.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")


def unpack(raw: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Return the ``n`` integers, int32 (n,), of what ``pack`` made; ``ValueError`` where ``raw`` has another length."""
    if raw.dtype != np.uint8 or raw.shape != (-(-n * bits // 8),):
        raise ValueError(f"{n} integers of {bits} bits take {-(-n * bits // 8)} bytes, not {raw.shape} {raw.dtype}")
    parts = []
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        some = raw[start * bits // 8 : -(-(start + count) * bits // 8)]
        rows = np.zeros((count, 16), np.uint8)
        rows[:, :bits] = np.unpackbits(some, count=count * bits, bitorder="little").reshape(count, bits)
        parts.append(np.packbits(rows, axis=1, bitorder="little").view("<u2").reshape(-1))
    return np.concatenate([np.zeros(0, "<u2"), *parts]).astype(np.int32)
