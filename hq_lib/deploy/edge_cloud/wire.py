"""The wire and its packets: which real value each code stands for, agreed by both ends before the first image, and one
image's codes as bytes, and back; what arrives is checked before anything is believed.

    code = clip(rint((x - low) / scale), 0, 2^b - 1)                      sent
    x_hat = low + scale code                                              read by the cloud half

Nagel et al. (2021), arXiv:2106.08295, eq. 4 and 6, with ``low = -scale zero_point``. Scales cost nothing per image, so
there is one per channel as a rule. An integer edge needs no arithmetic for it: codes are looked up.

    offset  bytes  field
         0      2  magic     "HQ"
         2      1  version   1
         3      1  bits      of a code
         4      1  coding    0 packed, 1 deflate
         5      4  n_values  numbers in the payload, little-endian as all that follows
         9      4  wire      CRC-32 of what both ends agreed on (``Wire.digest``)
        13      4  crc       CRC-32 of the fields before it and of the payload
        17         payload   codes in row-major order, most significant bit first, the last byte filled with zeros;
                             32 bits: float32. Deflate: the same bytes as a raw DEFLATE stream (RFC 1951)

The CRC guards against a noisy link, not against a forger; sizes are bounded by the wire, whatever a packet claims.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from hq_lib.integer import TensorSpec
from hq_lib.integer.execute import levels, real_values
from hq_lib.quantizers.lp_grid import lp_search
from hq_lib.results.bits import bits_of, integers_of

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
        table = self._codes(levels(spec), self.low[:, None], self.scale[:, None])
        return table[self._spread(np.arange(len(table))), x_int]

    def _codes(self, x: np.ndarray, low: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip(np.rint((x - low) / scale), 0, 2**self.bits - 1).astype(np.uint8)

    def _need_shape(self, x: np.ndarray) -> None:
        if x.shape[1:] != self.shape:
            raise WireError(f"wire {self.cut!r} carries tensors (B, {', '.join(map(str, self.shape))}), not {x.shape}")

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """(n,) shaped to meet (B, C, ...)."""
        return values.reshape(-1, *[1] * (len(self.shape) - 1))


def fit_wire(x: Tensor, cut: str, *, bits: int, per_channel: bool = True) -> Wire:
    """The wire whose grid has the least mean squared error on ``x``, of 100 steps and every zero point.

    The search stands values at the means of 16,384 bins: its error is typically within half a per cent of the least.

    Args:
        x:           (N, *shape) float32: the tensor at the cut on training images, never on test images.
        cut:         name of the cut.
        bits:        1..8 (32 needs no fit: ``float_wire``).
        per_channel: one scale per channel instead of one in all.

    Raises:
        WireError: bits out of range. ValueError: NaN or infinity in ``x``.
    """
    check_wire_bits(bits)
    if bits == FLOAT_BITS:
        raise WireError(f"wire {cut!r}: 32 bits are sent as they are, use float_wire")
    axis = 1 if per_channel and x.ndim > 1 else None
    grid = lp_search(x.contiguous(), bits=bits, p=2.0, axis=axis, exact=False)
    scale = grid.scale.reshape(-1).float().numpy()
    return Wire(cut, tuple(x.shape[1:]), bits, scale, -scale * grid.zero_point.reshape(-1).float().numpy())


def float_wire(shape: tuple[int, ...], cut: str) -> Wire:
    """The wire that sends ``shape`` as float32 values: what leaves the edge is what enters the cloud."""
    return Wire(cut, tuple(shape), FLOAT_BITS, np.ones(1, np.float32), np.zeros(1, np.float32))


def check_wire_bits(bits: int) -> None:
    """Nothing, or ``WireError`` for bits that no wire has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= MAX_BITS or bits == FLOAT_BITS):
        raise WireError(f"{bits!r} bits on the wire: give an int from 1 to {MAX_BITS}, or {FLOAT_BITS} for float")


MAGIC, VERSION = b"HQ", 1
CODINGS = ("packed", "deflate")
_FIELDS, _CRC = struct.Struct("<2sBBBII"), struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
_LEVEL, _RAW = 6, -15  # half the time of level 9 for one per cent more bytes; no zlib header and no second checksum


class PacketError(ValueError):
    """Bytes that are no packet of this wire; the message names the packet and the field."""


def pack(wire: Wire, codes: np.ndarray, *, coding: str = "packed") -> list[bytes]:
    """One packet per image.

    Args:
        wire:   what both ends agreed on.
        codes:  (B, *wire.shape) from ``wire.encode``: uint8 below 2^bits, or float32 at 32 bits.
        coding: "packed", or "deflate": the packed bytes, compressed without loss.

    Raises:
        WireError: codes of another shape or dtype, or codes that need more bits.
    """
    if coding not in CODINGS:
        raise WireError(f"coding {coding!r}: choose one of {', '.join(CODINGS)}")
    wanted = np.float32 if wire.bits == FLOAT_BITS else np.uint8
    if codes.shape[1:] != wire.shape or codes.dtype != wanted:
        raise WireError(
            f"wire {wire.cut!r} packs {np.dtype(wanted)} (B, *{wire.shape}), not {codes.dtype} {codes.shape}"
        )
    if wire.bits < MAX_BITS and codes.size and int(codes.max()) >> wire.bits:
        raise WireError(f"wire {wire.cut!r}: code {int(codes.max())} does not fit {wire.bits} bits")
    payloads = [row.tobytes() for row in _to_bytes(codes.reshape(len(codes), wire.n_values), wire.bits)]
    if coding == "deflate":
        payloads = [zlib.compress(payload, _LEVEL, _RAW) for payload in payloads]
    fields = _FIELDS.pack(MAGIC, VERSION, wire.bits, CODINGS.index(coding), wire.n_values, wire.digest)
    crc = zlib.crc32(fields)
    return [fields + _CRC.pack(zlib.crc32(payload, crc)) + payload for payload in payloads]


def unpack(wire: Wire, packets: Sequence[bytes]) -> np.ndarray:
    """The codes in ``packets``: (len(packets), *wire.shape), uint8, or float32 at 32 bits.

    Raises:
        PacketError: names the first bad packet and its field.
    """
    payloads = []
    for i, packet in enumerate(packets):
        try:
            payloads.append(_payload(wire, bytes(packet)))
        except PacketError as error:
            raise PacketError(f"packet {i} for wire {wire.cut!r}, {error}") from None
    rows = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), wire.n_payload_bytes)
    return _from_bytes(rows, wire.n_values, wire.bits).reshape(len(payloads), *wire.shape)


def _payload(wire: Wire, packet: bytes) -> bytes:
    """The packed bytes of one image, every field of ``packet`` checked."""
    _need(len(packet) >= HEADER_BYTES, "header", f"{len(packet)} bytes, a header alone has {HEADER_BYTES}")
    fields, payload = packet[: _FIELDS.size], packet[HEADER_BYTES:]
    magic, version, bits, coding, n_values, digest = _FIELDS.unpack(fields)
    _need(magic == MAGIC, "magic", f"{magic!r}, not {MAGIC!r}: these bytes are no packet")
    _need(version == VERSION, "version", f"{version}, this reader knows {VERSION}")
    _need(bits == wire.bits, "bits", f"{bits}, the wire has {wire.bits}")
    _need(coding < len(CODINGS), "coding", f"{coding}, known are 0 to {len(CODINGS) - 1}")
    _need(n_values == wire.n_values, "n_values", f"{n_values:,}, the wire carries {wire.n_values:,}")
    _need(digest == wire.digest, "wire", "another cut, shape or grid was agreed on by its sender")
    crc = _CRC.unpack(packet[_FIELDS.size : HEADER_BYTES])[0]
    _need(crc == zlib.crc32(payload, zlib.crc32(fields)), "crc", "the bytes changed on the way: send it again")
    payload = _inflated(payload, wire.n_payload_bytes) if coding else payload
    _need(len(payload) == wire.n_payload_bytes, "payload", f"{len(payload):,} bytes, not {wire.n_payload_bytes:,}")
    spare = 8 * len(payload) - wire.n_values * wire.bits
    _need(not payload or not payload[-1] & (2**spare - 1), "payload", f"its last {spare} bits must be 0")
    finite = wire.bits != FLOAT_BITS or bool(np.isfinite(np.frombuffer(payload, "<f4")).all())
    _need(finite, "payload", "it holds NaN or infinity")
    return payload


def _need(truth: bool, field: str, message: str) -> None:
    if not truth:
        raise PacketError(f"field {field}: {message}")


def _inflated(payload: bytes, n_bytes: int) -> bytes:
    """At most ``n_bytes`` + 1 bytes of the stream, so that a hostile one cannot fill the memory."""
    reader = zlib.decompressobj(_RAW)
    try:
        content = reader.decompress(payload, n_bytes + 1)
    except zlib.error as error:
        raise PacketError(f"field payload: no DEFLATE stream ({error})") from None
    whole = reader.eof and not reader.unused_data
    _need(whole or len(content) > n_bytes, "payload", "its DEFLATE stream is cut short or has bytes behind it")
    return content


def _to_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(B, n) codes as (B, ceil(n bits / 8)) uint8."""
    if bits == FLOAT_BITS:
        return codes.astype("<f4").view(np.uint8)
    return np.packbits(bits_of(codes, bits)[:, :, ::-1].reshape(len(codes), codes.shape[1] * bits), axis=1)


def _from_bytes(rows: np.ndarray, n_values: int, bits: int) -> np.ndarray:
    """(B, n_values) codes of packed ``rows`` (B, n_bytes)."""
    if bits == FLOAT_BITS:
        return np.ascontiguousarray(rows).view("<f4").astype(np.float32)
    ones = np.unpackbits(rows, axis=1, count=n_values * bits).reshape(len(rows), n_values, bits)
    return integers_of(ones[:, :, ::-1], signed=False).astype(np.uint8)
