"""Converted reading in C: torch's bits on every geometry, batch and thread count; said once where it is missing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    Convolution,
    Drive,
    Mapping,
    SimEngine,
    arrays,
    native,
)
from hq_lib.crossbar.profiles import IDEAL, PCM_JOSHI
from hq_lib.deploy.c.runtime import CompilerError

NOISY = replace(PCM_JOSHI, read=ConstantRead(0.01))
CIRCUITS = {
    "analog": (Mapping(), Drive(), Adc(8)),
    "small tiles, gain, offset": (
        Mapping(tile_rows=50),
        Drive("serial", 3),
        Adc(7, gain_sigma=0.05, offset_sigma_lsb=1),
    ),
    "serial": (Mapping(cell_bits=2, subtract="digital"), Drive("serial"), Adc(8, "whole")),
}
GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "dilation": 2, "padding": 2},
    {"kernel": 1},
    {"kernel": 5, "stride": (2, 1)},
]


def answers(circuit, geometry, parts=1):
    """(readings, saturation, whether C read them) of one convolution, in so many calls."""
    random = torch.Generator().manual_seed(0)
    geometry = dict(geometry)
    k = geometry.pop("kernel", 3)
    w = torch.randint(-127, 128, (24, 20, k, k), generator=random)
    x = torch.randint(0, 256, (3, 20, 9, 8), generator=random).to(torch.uint8)
    engine = SimEngine(circuit)
    conv = Convolution(engine, w, 1.0, "a", **geometry)
    group = conv.groups[0]
    if circuit.adc.range == "calibrated":
        engine.calibrate_adc(group, conv.rows(x)[0])
    y = torch.cat([conv.measure(part)[0] for part in x.chunk(parts)])
    layer = engine.layer(group)
    return y, (layer.n_saturated, layer.n_conversions), layer.native


@pytest.mark.parametrize("cells", [IDEAL, PCM_JOSHI, NOISY], ids=lambda cells: cells.name + str(cells.read is not None))
@pytest.mark.parametrize("name", CIRCUITS)
def test_c_and_torch_give_the_same_bits_and_count_the_same(name, cells, monkeypatch):
    circuit = Circuit(cells, *CIRCUITS[name], path="converted")
    found = [answers(circuit, geometry) for geometry in GEOMETRIES]
    if not found[0][2]:
        pytest.skip("no C compiler: there is nothing to compare torch with")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        in_parts = answers(circuit, GEOMETRIES[0], parts=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(in_parts[0], found[0][0])
    for module in (arrays, native):
        monkeypatch.setattr(module, "library", lambda: None)
    for geometry, (y, counts, _) in zip(GEOMETRIES, found, strict=True):
        again, same_counts, in_c = answers(circuit, geometry)
        assert not in_c
        assert torch.equal(again, y)
        assert same_counts == counts


def test_what_is_read_is_near_the_exact_product():
    """Independent of either: the integer product, within half a step for each conversion."""
    w, x = np.random.default_rng(0).integers(-7, 8, (100, 9)), np.random.default_rng(1).integers(0, 256, (40, 100))
    engine = SimEngine(Circuit(IDEAL, Mapping(tile_rows=32), adc=Adc(12, "max")))
    handle = engine.load(w, 1.0, "a", w_bits=4)
    step = engine.layer(handle).adc_step.numpy()
    error = np.abs(engine.measure(handle, x).numpy() - x @ w)
    assert (error <= 4 * step / 2 * (1 + 1e-5)).all()
    assert error.max() > 0


def test_inputs_of_either_sign_and_of_sixteen_bits_are_exact():
    for bits, signed, drive in ((8, True, Drive("serial")), (8, True, Drive()), (16, False, Drive("serial"))):
        half = 2 ** (bits - 1)
        random = np.random.default_rng(bits)
        x = random.integers(-half if signed else 0, half if signed else 2 * half, (30, 20))
        w = random.integers(-1, 2, (20, 5))
        engine = SimEngine(Circuit(IDEAL, drive=drive, adc=Adc(13, "whole"), path="converted"))
        handle = engine.load(w, 1.0, "a", w_bits=2, x_bits=bits, x_signed=signed)
        np.testing.assert_array_equal(engine.mvm(handle, x), x @ w)


def test_a_machine_without_a_compiler_is_told_once(monkeypatch):
    def missing(*_, **__):
        raise CompilerError("no C compiler (cc): install gcc")

    monkeypatch.setattr(native, "compiled", missing)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install gcc"):
            assert native.library() is None
        assert native.library() is None
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize(
    "shape", [(2, 16, 4, 4), (3, 19, 3, 5), (1, 3, 9, 7), (2, 8, 1, 1), (1, 24, 2, 3), (0, 8, 4, 4)]
)
def test_images_become_float32_with_channels_side_by_side(shape, monkeypatch):
    """Against NumPy's transposition: whole and broken blocks of eight, contiguous or not, in C and in torch."""
    random = torch.Generator().manual_seed(0)
    wide = torch.randint(0, 256, (shape[0], 2 * shape[1], *shape[2:]), generator=random)
    for images in (wide[:, : shape[1]].to(torch.uint8), wide.to(torch.uint8)[:, ::2], wide[:, 1::2] - 128):
        wanted = images.numpy().transpose(0, 2, 3, 1).astype(np.float32)
        for library in (native.library, lambda: None):
            monkeypatch.setattr(native, "library", library)
            made = native.channels_last(images)
            assert made.dtype is torch.float32
            assert made.is_contiguous(memory_format=torch.channels_last)
            np.testing.assert_array_equal(made.numpy().transpose(0, 2, 3, 1), wanted)


@pytest.mark.parametrize("cells", [PCM_JOSHI, NOISY], ids=["quiet", "noisy"])
def test_one_product_has_the_same_bits_in_c_and_torch(cells, monkeypatch):
    random = torch.Generator().manual_seed(0)
    w = torch.randint(-127, 128, (24, 20, 3, 3), generator=random)
    x = torch.randint(0, 256, (20, 20, 9, 7), generator=random).to(torch.uint8)
    found = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        engine = SimEngine(Circuit(cells))
        conv = Convolution(engine, w, 1.0, "a", padding=1)
        assert engine.layer(conv.groups[0]).path == "collapsed"
        found.append(conv(x))
    assert torch.equal(*found)


def test_not_a_number_is_seen_wherever_it_stands():
    for n in (1, 8, 19):
        for place in {0, n // 2, n - 1}:
            raw = torch.arange(n, dtype=torch.float32) + 0.5
            assert native.rounded(raw, out := torch.empty(n, dtype=torch.float64))
            assert torch.equal(out, raw.double().round())
            for bad in (float("nan"), float("inf")):
                raw[place] = bad
                assert not native.rounded(raw, out)
