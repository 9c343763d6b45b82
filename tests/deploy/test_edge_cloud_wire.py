"""The wire: grids, bytes there and back, hostile bytes refused by field, and the pictures it is compared with."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from hq_lib import data
from hq_lib.deploy.edge_cloud import (
    CODINGS,
    HEADER_BYTES,
    PacketError,
    Wire,
    WireError,
    fit_wire,
    float_wire,
    from_jpeg,
    pack,
    pixel_wire,
    to_jpeg,
    unpack,
)
from hq_lib.integer import TensorSpec
from hq_lib.integer.execute import real_values

RNG = np.random.default_rng(0)
ONE = np.ones(1, np.float32)


def wire(bits, shape=(3, 4, 5), cut="a"):
    return Wire(cut, shape, bits, ONE * 0.5, ONE * 0)


def codes_of(bits, shape, n=2):
    return RNG.integers(0, 2**bits, (n, *shape), dtype=np.uint8)


# --- grids -----------------------------------------------------------------------------------------------------------


def test_hand_computed_codes():
    w = Wire("a", (2, 1), 2, np.array([0.5, 1.0], np.float32), np.array([0.0, -1.0], np.float32))
    x = np.array([[[0.7], [-0.4]], [[9.0], [-9.0]]], np.float32)  # (image, channel, 1)
    np.testing.assert_array_equal(w.encode(x)[..., 0], [[1, 1], [3, 0]])
    np.testing.assert_array_equal(w.decode(w.encode(x))[..., 0], [[0.5, 0.0], [1.5, -1.0]])


def test_a_fitted_wire_is_no_worse_than_any_step_of_a_fine_scan():
    x = torch.from_numpy(RNG.gamma(1.0, 1.0, (64, 2, 6, 6)).astype(np.float32)) * torch.tensor([1.0, 7.0]).view(2, 1, 1)
    for bits in (1, 2, 3):
        fitted = fit_wire(x, "a", bits=bits)
        assert fitted.scale.shape == (2,)
        for c in range(2):
            part = x[:, c].numpy()
            mine = fitted.decode(fitted.encode(x.numpy()))[:, c]
            scan = [
                np.clip(np.rint(part / s), 0, 2**bits - 1) * s for s in np.linspace(0.02, 1, 200) * part.max() / bits
            ]
            least = min(np.square(part - y).mean() for y in scan)
            assert np.square(part - mine).mean() < 1.02 * least


def test_channels_of_unequal_size_want_a_scale_each():
    x = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 100.0]).view(3, 1, 1)

    def error(w):
        return np.square((w.decode(w.encode(x.numpy())) - x.numpy())[:, 0]).mean()

    assert error(fit_wire(x, "a", bits=2)) < 0.1 * error(fit_wire(x, "a", bits=2, per_channel=False))


def test_channels_last_and_signed_tensors_are_fitted_alike():
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    a, b = fit_wire(x, "a", bits=4), fit_wire(x.contiguous(memory_format=torch.channels_last), "a", bits=4)
    np.testing.assert_array_equal(a.scale, b.scale)
    assert a.digest == b.digest
    assert (a.low < 0).all()
    assert np.abs(a.decode(a.encode(x.numpy())) - x.numpy()).mean() < 0.3 * a.scale.max()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_an_integer_edge_looks_its_codes_up(bits, per_channel):
    spec = TensorSpec("t", (4, 3, 3), "uint8", 8, 0, 255, np.float32(0.013), 3)
    x_int = RNG.integers(0, 256, (50, 4, 3, 3), dtype=np.uint8)
    real = real_values(spec, x_int)
    w = fit_wire(torch.from_numpy(real), "t", bits=bits, per_channel=per_channel)
    np.testing.assert_array_equal(w.encode_integers(x_int, spec), w.encode(real))


def test_8_bits_on_the_edges_own_grid_lose_nothing():
    spec = TensorSpec("t", (4, 3, 3), "uint8", 8, 0, 255, np.float32(0.013), 0)
    x_int = RNG.integers(0, 256, (5, 4, 3, 3), dtype=np.uint8)
    w = Wire("t", spec.shape, 8, ONE * np.float32(spec.scale), ONE * 0)
    np.testing.assert_array_equal(w.encode_integers(x_int, spec), x_int)
    np.testing.assert_array_equal(w.decode(x_int), real_values(spec, x_int))


def test_bad_wires_are_refused():
    for bits in (0, 9, 16, -1, 2.0, True, "8"):
        with pytest.raises(WireError, match="bits on the wire"):
            wire(bits)
    with pytest.raises(WireError, match="one per channel"):
        Wire("a", (3, 4), 2, np.ones(2, np.float32), np.zeros(2, np.float32))
    with pytest.raises(WireError, match="finite and > 0"):
        Wire("a", (3, 4), 2, ONE * 0, ONE)
    with pytest.raises(WireError, match="float_wire"):
        fit_wire(torch.rand(2, 3, 4), "a", bits=32)
    with pytest.raises(ValueError, match="NaN"):
        fit_wire(torch.full((2, 3, 4), torch.nan), "a", bits=2)


def test_bad_tensors_are_refused():
    w = wire(2)
    with pytest.raises(WireError, match=r"carries tensors \(B, 3, 4, 5\)"):
        w.encode(np.zeros((1, 3, 4), np.float32))
    with pytest.raises(WireError, match="1 values are NaN"):
        w.encode(np.where(np.arange(60).reshape(1, 3, 4, 5) == 7, np.nan, 0))
    with pytest.raises(WireError, match="does not fit 2 bits"):
        pack(w, np.full((1, 3, 4, 5), 4, np.uint8))
    with pytest.raises(WireError, match="not float32"):
        pack(w, np.zeros((1, 3, 4, 5), np.float32))
    with pytest.raises(WireError, match="choose one of packed, deflate"):
        pack(w, np.zeros((1, 3, 4, 5), np.uint8), coding="zip")


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bits_lie_in_the_payload_as_documented():
    w = Wire("a", (5,), 2, ONE, ONE * 0)
    (packet,) = pack(w, np.array([[3, 0, 2, 1, 3]], np.uint8))
    assert packet[HEADER_BYTES:] == bytes([0b11_00_10_01, 0b11_000000])
    assert packet[:5] == b"HQ\x01\x02\x00"
    assert struct.unpack("<I", packet[5:9]) == (5,)
    assert struct.unpack("<I", packet[13:17]) == (zlib.crc32(packet[:13] + packet[17:]),)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_packing_and_unpacking_give_the_codes_back(drawn):
    bits = drawn.draw(st.integers(1, 8))
    shape = tuple(drawn.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    n = drawn.draw(st.integers(0, 3))
    codes = drawn.draw(arrays.arrays(np.uint8, (n, *shape), elements=st.integers(0, 2**bits - 1)))
    w = wire(bits, shape)
    for coding in CODINGS:
        packets = pack(w, codes, coding=coding)
        back = unpack(w, packets)
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, codes)
    assert all(len(p) == HEADER_BYTES + -(-codes[0].size * bits // 8) for p in pack(w, codes))


@settings(deadline=None, max_examples=50)
@given(arrays.arrays(np.float32, (2, 3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_floats_pass_unchanged(x):
    w = float_wire((3, 4), "a")
    for coding in CODINGS:
        back = w.decode(unpack(w, pack(w, w.encode(x), coding=coding)))
        np.testing.assert_array_equal(back.view(np.uint32), x.view(np.uint32))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_changed_byte_passes(drawn):
    w = wire(drawn.draw(st.sampled_from([1, 3, 8, 32])))
    codes = w.encode(np.random.default_rng(1).uniform(0, 2, (1, *w.shape)).astype(np.float32))
    packet = bytearray(pack(w, codes, coding=drawn.draw(st.sampled_from(CODINGS)))[0])
    place = drawn.draw(st.integers(0, len(packet) - 1))
    packet[place] ^= drawn.draw(st.integers(1, 255))
    with pytest.raises(PacketError, match=r"packet 0 for wire 'a', field \w+: "):
        unpack(w, [bytes(packet)])


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_refused_or_read_never_worse(content, with_magic):
    w = wire(1, (3,))
    with pytest.raises(PacketError, match="field"):
        unpack(w, [b"HQ\x01\x01" + content if with_magic else content])


def forged(w, payload, **fields):
    """A packet with a right CRC and chosen fields."""
    known = {"magic": b"HQ", "version": 1, "bits": w.bits, "coding": 0, "n_values": w.n_values, "wire": w.digest}
    head = struct.pack("<2sBBBII", *(known | fields).values())
    return head + struct.pack("<I", zlib.crc32(head + payload)) + payload


def deflated(content):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


GOOD = bytes(15)  # 3 x 4 x 5 values of 2 bits
HOSTILE = {
    "magic": ({"magic": b"PK"}, GOOD, "field magic: b'PK'"),
    "version": ({"version": 2}, GOOD, "field version: 2, this reader knows 1"),
    "bits": ({"bits": 4}, GOOD, "field bits: 4, the wire has 2"),
    "coding": ({"coding": 7}, GOOD, "field coding: 7"),
    "huge": ({"n_values": 2**32 - 1}, GOOD, "field n_values: 4,294,967,295, the wire carries 60"),
    "other wire": ({"wire": 1}, GOOD, "field wire: another cut, shape or grid"),
    "short": ({}, GOOD[:-1], "field payload: 14 bytes, not 15"),
    "long": ({}, GOOD + b"\0", "field payload: 16 bytes, not 15"),
    "empty": ({}, b"", "field payload: 0 bytes"),
    "no deflate": ({"coding": 1}, b"\xff" * 9, "field payload: no DEFLATE stream"),
    "cut deflate": ({"coding": 1}, deflated(bytes(range(15)))[:-3], "field payload: its DEFLATE stream is cut short"),
    "bytes behind": ({"coding": 1}, deflated(GOOD) + b"!", "field payload: its DEFLATE stream is cut short or has"),
    "bomb": ({"coding": 1}, deflated(bytes(10_000_000)), "field payload: 16 bytes, not 15"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_packets_with_a_right_crc_are_refused_by_field(case):
    fields, payload, message = HOSTILE[case]
    w = wire(2)
    good = forged(w, GOOD)
    np.testing.assert_array_equal(unpack(w, [good]), np.zeros((1, *w.shape)))
    with pytest.raises(PacketError, match=f"packet 1 for wire 'a', {message}"):
        unpack(w, [good, forged(w, payload, **fields)])


def test_filled_up_bits_must_be_zero_and_floats_finite():
    w = Wire("a", (3,), 2, ONE, ONE * 0)
    with pytest.raises(PacketError, match="field payload: its last 2 bits must be 0"):
        unpack(w, [forged(w, b"\x01")])
    w = float_wire((1,), "a")
    with pytest.raises(PacketError, match="field payload: it holds NaN or infinity"):
        unpack(w, [forged(w, struct.pack("<f", float("nan")))])
    with pytest.raises(PacketError, match="field header: 3 bytes"):
        unpack(w, [b"HQ\x01"])


def test_another_grid_is_another_wire():
    a, b = wire(2), Wire("a", (3, 4, 5), 2, ONE * 0.25, ONE * 0)
    with pytest.raises(PacketError, match="field wire"):
        unpack(b, pack(a, codes_of(2, a.shape)))


# --- pictures --------------------------------------------------------------------------------------------------------


def pictures(n=6, channels=3):
    digits = data.load("digits", "test", n=20)
    return digits.images[:n, :channels].contiguous()


def test_8_bit_pixels_lose_nothing_and_1_bit_is_black_and_white():
    spec = data.SPECS["cifar10"]
    images = torch.from_numpy(RNG.integers(0, 256, (2, *spec.in_shape), dtype=np.uint8))
    x = data.normalize(images, spec).contiguous().numpy()
    whole = pixel_wire(spec, bits=8)
    np.testing.assert_array_equal(whole.encode(x), images.numpy())
    np.testing.assert_allclose(whole.decode(whole.encode(x)), x, atol=1e-6)
    two = pixel_wire(spec, bits=1)
    np.testing.assert_array_equal(two.encode(x), (images.numpy() > 127).astype(np.uint8))
    assert two.n_payload_bytes == 384
    with pytest.raises(WireError, match="pixels have 8 bits"):
        pixel_wire(spec, bits=32)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_without_tables_is_the_same_picture_as_with_them(channels):
    images = pictures(channels=channels)
    streams = to_jpeg(images, quality=80)
    back = from_jpeg(streams, images, quality=80)
    assert back.shape == images.shape
    for image, mine, stream in zip(images, back, streams, strict=True):
        whole = io.BytesIO()
        pixels = image.permute(1, 2, 0).squeeze(-1).numpy() if channels == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(whole, "JPEG", quality=80)
        np.testing.assert_array_equal(np.asarray(Image.open(whole)).reshape(32, 32, channels), mine.permute(1, 2, 0))
        assert len(stream) < len(whole.getvalue()) - 200


def test_bad_pictures_are_refused():
    images = pictures()
    with pytest.raises(WireError, match="quality 0"):
        to_jpeg(images, quality=0)
    with pytest.raises(WireError, match="uint8 images"):
        to_jpeg(images.float(), quality=80)
    stream = to_jpeg(images[:1], quality=80)
    with pytest.raises(WireError, match="stream 1 is no JPEG"):
        from_jpeg([*stream, b"nonsense"], images, quality=80)
    with pytest.raises(WireError, match=r"stream 0 holds an image \(3, 32, 32\)"):
        from_jpeg(stream, images[:, :, :16, :16], quality=80)
