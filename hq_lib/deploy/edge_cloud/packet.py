"""Packets: one image's codes as bytes, and back; what arrives is checked before anything is believed.

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

import numpy as np

from hq_lib.deploy.edge_cloud.wire import FLOAT_BITS, MAX_BITS, Wire, WireError
from hq_lib.results.bits import bits_of, integers_of

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
