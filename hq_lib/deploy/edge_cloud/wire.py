"""The wire's quantizer: which real value each code stands for, agreed by both ends before the first image.

    code = clip(rint((x - low) / scale), 0, 2^b - 1)                      sent
    x_hat = low + scale code                                              read by the cloud half

Nagel et al. (2021), arXiv:2106.08295, eq. 4 and 6, with ``low = -scale zero_point``. Scales cost nothing per image, so
there is one per channel as a rule. An integer edge needs no arithmetic for it: codes are looked up.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from hq_lib.integer import TensorSpec
from hq_lib.integer.execute import real_values
from hq_lib.quantizers.lp_grid import lp_search

FLOAT_BITS = 32
MAX_BITS = 8


class WireError(ValueError):
    """A wire that cannot be made, or a tensor that it cannot carry; says which and what to give instead."""


@dataclass(frozen=True, eq=False)
class Wire:
    """How one tensor is sent: its shape, its bits and its grid. 32 bits send float32 values as they are."""

    cut: str
    """Name of the cut."""
    shape: tuple[int, ...]
    """Shape of the tensor for one image; channels first."""
    bits: int
    """1..8, or 32."""
    scale: np.ndarray
    """float32 (1,) or (C,), > 0: real units per code."""
    low: np.ndarray
    """float32, shape of ``scale``: real value of code 0."""

    def __post_init__(self) -> None:
        check_wire_bits(self.bits)
        if self.scale.shape != self.low.shape or self.scale.shape not in ((1,), self.shape[:1]):
            raise WireError(f"wire {self.cut!r}: scale {self.scale.shape} and low {self.low.shape} must be both (1,) or"
                            f" {self.shape[:1]}, one per channel")  # fmt: skip
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all() and np.isfinite(self.low).all()):
            raise WireError(f"wire {self.cut!r}: scales must be finite and > 0, lows finite")

    @property
    def n_values(self) -> int:
        """Numbers sent per image."""
        return int(np.prod(self.shape))

    @property
    def n_payload_bytes(self) -> int:
        """Bytes of one image's codes, bit-packed: ceil(n_values bits / 8)."""
        return -(-self.n_values * self.bits // 8)

    @cached_property
    def digest(self) -> int:
        """CRC-32 of everything agreed: a packet that carries another one is of another wire."""
        text = f"{self.cut} {self.shape} {self.bits} "
        return zlib.crc32(text.encode() + self.scale.astype("<f4").tobytes() + self.low.astype("<f4").tobytes())

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The codes of real values ``x`` (B, *shape) float32: uint8, same shape; 32 bits: ``x`` itself.

        Raises:
            WireError: another shape, or values that are not finite.
        """
        x = np.asarray(x, dtype=np.float32)
        self._need_shape(x)
        if not np.isfinite(x).all():
            raise WireError(f"wire {self.cut!r}: {int((~np.isfinite(x)).sum())} values are NaN or infinite")
        if self.bits == FLOAT_BITS:
            return x
        return self._codes(x, self._spread(self.low), self._spread(self.scale))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The real values of ``codes`` (B, *shape): float32, same shape."""
        if self.bits == FLOAT_BITS:
            return codes
        return self._spread(self.low) + self._spread(self.scale) * codes.astype(np.float32)

    def encode_integers(self, x_int: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """The codes of integers ``x_int`` (B, *shape) of tensor ``spec``: equal to ``encode`` of their real values.

        Nothing is computed but a table with the code of every integer that the tensor can hold, (C or 1, qmax + 1).
        """
        if self.bits == FLOAT_BITS:
            return self.encode(real_values(spec, x_int))
        self._need_shape(x_int)
        levels = real_values(spec, np.arange(spec.qmax + 1))
        table = self._codes(levels, self.low[:, None], self.scale[:, None])
        return table[self._spread(np.arange(len(table))), x_int]

    def _codes(self, x: np.ndarray, low: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip(np.rint((x - low) / scale), 0, 2**self.bits - 1).astype(np.uint8)

    def _need_shape(self, x: np.ndarray) -> None:
        if x.shape[1:] != self.shape:
            raise WireError(f"wire {self.cut!r} carries tensors (B, {', '.join(map(str, self.shape))}), not {x.shape}")

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """(n,) shaped to meet (B, C, ...)."""
        return values.reshape(-1, *[1] * (len(self.shape) - 1))


def fit_wire(x: Tensor, cut: str, *, bits: int, per_channel: bool = True, p: float = 2.0) -> Wire:
    """The wire whose grid has the least mean |x - x_hat|^p on ``x``, of 100 steps and every zero point.

    The search stands values at the means of 16,384 bins: its error is typically within half a per cent of the least.

    Args:
        x:           (N, *shape) float32: the tensor at the cut on training images, never on test images.
        cut:         name of the cut.
        bits:        1..8 (32 needs no fit: ``float_wire``).
        per_channel: one scale per channel instead of one in all.
        p:           2 is the mean squared error.

    Raises:
        WireError: bits out of range. ValueError: NaN or infinity in ``x``.
    """
    check_wire_bits(bits)
    if bits == FLOAT_BITS:
        raise WireError(f"wire {cut!r}: 32 bits are sent as they are, use float_wire")
    axis = 1 if per_channel and x.ndim > 1 else None
    grid = lp_search(x.contiguous(), bits=bits, p=p, axis=axis, exact=False).grid
    scale = grid.scale.reshape(-1).float().numpy()
    return Wire(cut, tuple(x.shape[1:]), bits, scale, -scale * grid.zero_point.reshape(-1).float().numpy())


def float_wire(shape: tuple[int, ...], cut: str) -> Wire:
    """The wire that sends ``shape`` as float32 values: what leaves the edge is what enters the cloud."""
    return Wire(cut, tuple(shape), FLOAT_BITS, np.ones(1, np.float32), np.zeros(1, np.float32))


def check_wire_bits(bits: int) -> None:
    """Nothing, or ``WireError`` for bits that no wire has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= MAX_BITS or bits == FLOAT_BITS):
        raise WireError(f"{bits!r} bits on the wire: give an int from 1 to {MAX_BITS}, or {FLOAT_BITS} for float")
