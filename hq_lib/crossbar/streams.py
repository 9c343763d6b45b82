"""Random streams: one per purpose, so no draw depends on batch size, thread count or what other layers drew.

Programming, drift, faults and converter errors are drawn once from torch generators. Read noise is drawn for every
multiplication and has a faster sampler of its own, `Normals`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor

_LANES = 1 << 14
_LEVELS = 1 << 16


def stream(seed: int, *names: object) -> Generator:
    """A CPU generator that depends only on ``seed`` and ``names`` (layer, purpose, tile...), through SHA-256."""
    key = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


class Normals:
    """An endless sequence of standard normals; drawing it in one piece or in many gives the same numbers.

    16384 xorshift64 generators (Marsaglia 2003, shifts 13, 7, 17) step side by side; each 16 bits pick one of 65,536
    equally likely quantiles of the normal distribution, scaled to unit variance exactly. About four times faster than
    a Box-Muller transform. Departure from a true normal: |z| stays below 4.3, which cuts 2e-5 of the draws.

    Args:
        generator: seeds the lanes.
    """

    _table: Tensor | None = None

    def __init__(self, generator: Generator) -> None:
        self._state = torch.randint(1, 2**62, (_LANES,), generator=generator)
        self._shifted = torch.empty_like(self._state)
        self._rest = torch.empty(0)
        if Normals._table is None:
            Normals._table = _quantiles()

    def draw(self, n_rows: int, n_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n_rows, n_columns) of the sequence, row by row."""
        total, done = n_rows * n_columns, min(self._rest.numel(), n_rows * n_columns)
        flat = torch.empty(done + -(-(total - done) // (4 * _LANES)) * 4 * _LANES)
        flat[:done] = self._rest[:done]
        self._rest = self._rest[done:]
        for start in range(done, flat.numel(), 4 * _LANES):
            self._fill_(flat[start : start + 4 * _LANES])
        if flat.numel() > total:
            self._rest = flat[total:].clone()
        return flat[:total].view(n_rows, n_columns).to(dtype)

    def _fill_(self, out: Tensor) -> None:
        """Nothing; one step of all lanes gives the 4 normals per lane that go to ``out``."""
        state, shifted = self._state, self._shifted
        torch.bitwise_left_shift(state, 13, out=shifted)
        state.bitwise_xor_(shifted)
        torch.bitwise_right_shift(state, 7, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2**57 - 1))  # a logical shift of a signed integer
        torch.bitwise_left_shift(state, 17, out=shifted)
        state.bitwise_xor_(shifted)
        assert Normals._table is not None
        torch.index_select(Normals._table, 0, state.view(torch.int16).to(torch.int32).add_(_LEVELS // 2), out=out)


def _quantiles() -> Tensor:
    """float32 (65536,): normal quantiles at the middles of equal probabilities, mean 0 and variance 1."""
    p = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    z = torch.special.ndtri(p)
    return (z / z.square().mean().sqrt()).to(torch.float32)
