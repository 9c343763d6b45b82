"""Engines: every path equals integer matmul on ideal parts, and answers depend on the seed alone."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    CrossbarError,
    Device,
    Drive,
    IdealEngine,
    Mapping,
    SimEngine,
)
from hq_lib.crossbar.profiles import IDEAL, PCM_JOSHI
from hq_lib.crossbar.tiles import on_exact_grid

FINITE_RATIO = Device("finite", "test", 1.3, 31.0)
NOISY = Device("noisy", "test", 0.0, 25.0, PCM_JOSHI.error, read=ConstantRead(0.01))


def integers(seed: int, k: int, n: int, *, w_bits: int, x_bits: int, x_signed: bool, rows: int = 11):
    random, half = np.random.default_rng(seed), 2 ** (w_bits - 1)
    low, high = (-(2 ** (x_bits - 1)), 2 ** (x_bits - 1)) if x_signed else (0, 2**x_bits)
    return random.integers(-half, max(half, 2), (k, n)), random.integers(low, high, (rows, k))


SCHEMES = list(
    itertools.product(("pair", "offset"), ("column", "layer", "none"), (None, 1, 2, 3, 8), ("analog", "digital"))
)


@pytest.mark.parametrize(("scheme", "scale", "cell_bits", "subtract"), SCHEMES)
@pytest.mark.parametrize("drive", [Drive(), Drive("serial", 1), Drive("serial", 3)], ids=["analog", "bits1", "bits3"])
def test_ideal_parts_equal_integer_matmul(scheme, scale, cell_bits, subtract, drive):
    mapping = Mapping(scheme, scale, cell_bits, subtract, tile_rows=8)
    for case, (k, n, w_bits, x_bits, x_signed) in enumerate(
        [(1, 1, 1, 1, False), (8, 3, 4, 3, True), (21, 2, 5, 4, False)]
    ):
        w, x = integers(case, k, n, w_bits=w_bits, x_bits=x_bits, x_signed=x_signed)
        for adc, path, device in [
            (None, "auto", IDEAL),
            (None, "converted", FINITE_RATIO),
            (Adc(16, "exact"), "auto", FINITE_RATIO),
            (Adc(16, "exact"), "converted", IDEAL),
        ]:
            engine = SimEngine(Circuit(device, mapping, drive, adc, path=path))
            handle = engine.load(w, 1.0, "a", w_bits=w_bits, x_bits=x_bits, x_signed=x_signed)
            step_is_one = adc is None or bool((engine.layer(handle).adc_step == 1).all())
            assert step_is_one, "these cases are meant to be lossless"
            np.testing.assert_array_equal(engine.mvm(handle, x), x @ w)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 40),
    n=st.integers(1, 7),
    w_bits=st.integers(1, 8),
    x_bits=st.integers(2, 8),
    signed=st.booleans(),
    rows=st.integers(1, 17),
    seed=st.integers(0, 99),
)
def test_bit_serial_slices_equal_integer_matmul_for_any_bits(k, n, w_bits, x_bits, signed, rows, seed):
    w, x = integers(seed, k, n, w_bits=w_bits, x_bits=x_bits, x_signed=signed)
    circuit = Circuit(
        IDEAL,
        Mapping(cell_bits=2, subtract="digital", tile_rows=rows),
        Drive("serial"),
        Adc(9, "exact"),
        path="converted",
    )
    engine = SimEngine(circuit)
    handle = engine.load(w, 1.0, "a", w_bits=w_bits, x_bits=x_bits, x_signed=signed)
    np.testing.assert_array_equal(engine.mvm(handle, x), x @ w)


@pytest.mark.parametrize(
    "engine",
    [IdealEngine(), SimEngine(Circuit(IDEAL)), SimEngine(Circuit(IDEAL, Mapping(tile_rows=512), path="converted"))],
    ids=["ideal", "collapsed", "converted"],
)
def test_sums_beyond_float32_are_still_exact(engine):
    w, x = np.full((700, 2), 127), np.full((3, 700), 255)
    w[0, 1], x[1, 5] = 126, 254
    y = engine.mvm(engine.load(w, 1.0, "big"), x)
    assert y.max() > 2**24
    np.testing.assert_array_equal(y, x @ w)


@pytest.mark.parametrize("w", [np.zeros((9, 4), int), np.full((9, 4), -128), np.full((9, 4), 127)])
def test_extreme_weights(w):
    x = np.random.default_rng(0).integers(0, 256, (5, 9))
    for mapping in (Mapping(), Mapping("offset"), Mapping(cell_bits=2), Mapping("offset", cell_bits=3)):
        engine = SimEngine(Circuit(IDEAL, mapping, adc=Adc(16, "exact"), drive=Drive("serial")))
        np.testing.assert_array_equal(engine.mvm(engine.load(w, 1.0, "a"), x), x @ w)


def test_three_paths_agree_with_noisy_cells_and_no_converter():
    w, x = integers(3, 50, 6, w_bits=8, x_bits=8, x_signed=False, rows=40)
    mapping = Mapping(cell_bits=2, subtract="digital", tile_rows=16)
    answers = [
        SimEngine(Circuit(PCM_JOSHI, mapping, drive, path=path, precision="float64", seed=5))
        for drive, path in [(Drive(), "collapsed"), (Drive(), "converted"), (Drive("serial"), "converted")]
    ]
    raw = [engine.measure(engine.load(w, 1.0, "a"), x) for engine in answers]
    error = (raw[0] - torch.from_numpy(x @ w)).abs().max()
    assert error > 100, "the cells must be noisy for this to mean anything"
    for other in raw[1:]:
        torch.testing.assert_close(other, raw[0], rtol=0, atol=1e-3)


def test_path_is_chosen_by_what_could_be_lost():
    w, _ = integers(0, 20, 3, w_bits=8, x_bits=8, x_signed=False)
    serial = Drive("serial")
    sliced = Mapping(cell_bits=2)
    for circuit, path in [
        (Circuit(PCM_JOSHI), "collapsed"),
        (Circuit(IDEAL, adc=Adc(8, "whole")), "analog"),
        (Circuit(IDEAL, sliced, serial, Adc(9, "exact")), "collapsed"),
        (Circuit(IDEAL, sliced, serial, Adc(9, "max")), "serial"),
        (Circuit(PCM_JOSHI, sliced, serial, Adc(9, "exact")), "serial"),
        (Circuit(IDEAL, sliced, serial, Adc(9, "exact", gain_sigma=0.01)), "serial"),
    ]:
        engine = SimEngine(circuit)
        assert engine.layer(engine.load(w, 1.0, "a")).path == path, circuit
    engine = SimEngine(Circuit(PCM_JOSHI, adc=Adc(), path="collapsed"))
    handle = engine.load(w, 1.0, "a")
    with pytest.raises(CrossbarError, match="converters may lose"):
        engine.mvm(handle, np.zeros((1, w.shape[0]), int))


@pytest.mark.parametrize(
    "circuit",
    [
        Circuit(NOISY, precision="float64", seed=3),
        Circuit(NOISY, Mapping(tile_rows=16), adc=Adc(8, "max"), precision="float64", seed=3),
        Circuit(NOISY, Mapping("offset", tile_rows=16), adc=Adc(8, "max"), precision="float64", seed=3),
        Circuit(
            NOISY,
            Mapping(cell_bits=2, subtract="digital", tile_rows=16),
            Drive("serial"),
            Adc(6, "whole"),
            precision="float64",
            seed=3,
        ),
    ],
    ids=["collapsed", "analog", "offset", "serial"],
)
def test_same_seed_same_answer_for_any_batch_size_and_thread_count(circuit):
    w, x = integers(1, 45, 5, w_bits=8, x_bits=8, x_signed=False, rows=700)
    whole = SimEngine(circuit)
    want = whole.mvm(whole.load(w, 1.0, "a"), x)
    other, threads = SimEngine(circuit), torch.get_num_threads()
    other.load(w[:3], 1.0, "an unrelated layer")
    handle = other.load(w, 1.0, "a")
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        parts = [other.mvm(handle, part) for part in np.split(x, [1, 18, 400])]
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(np.concatenate(parts), want)
    assert not np.array_equal(whole.mvm(whole._handles["a"], x), want), "read noise must be fresh at each call"


def test_grid_sums_are_the_exact_rational_sums():
    """Whole-number inputs times grid entries, against Python's unbounded integers."""
    random = np.random.default_rng(0)
    matrix = on_exact_grid(torch.from_numpy(random.standard_normal((576, 1)) * 100), 255.0)
    x = random.integers(0, 256, (20, 576))
    exact = [sum(int(v) * Fraction(float(m)) for v, m in zip(row, matrix[:, 0], strict=True)) for row in x]
    assert [Fraction(float(y)) for y in torch.from_numpy(x).double() @ matrix] == exact
    assert float((matrix.frac() != 0).double().mean()) > 0.9


def test_float32_answers_hardly_depend_on_the_batch_size():
    w, x = integers(1, 300, 16, w_bits=8, x_bits=8, x_signed=False, rows=500)
    engine = SimEngine(Circuit(PCM_JOSHI, seed=3))
    handle = engine.load(w, 1.0, "a")
    whole = engine.mvm(handle, x)
    parts = np.concatenate([engine.mvm(handle, part) for part in np.split(x, [3, 50])])
    assert np.abs(whole - parts).max() <= 1
    assert (whole != parts).mean() < 0.02


def test_seeds_and_layer_names_make_different_cells():
    w, _ = integers(1, 30, 4, w_bits=8, x_bits=8, x_signed=False)
    engine = SimEngine(Circuit(PCM_JOSHI, seed=0))
    first, second = engine.load(w, 1.0, "a"), engine.load(w, 1.0, "b")
    again = SimEngine(Circuit(PCM_JOSHI, seed=1))
    maps = [
        engine.layer(first).cells.g0_uS,
        engine.layer(second).cells.g0_uS,
        again.layer(again.load(w, 1.0, "a")).cells.g0_uS,
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(maps, 2))


def test_integers_of_either_library_give_the_same_and_return_the_same_kind():
    w, x = integers(2, 6, 3, w_bits=4, x_bits=4, x_signed=False)
    engine = IdealEngine()
    handle = engine.load(torch.from_numpy(w), np.array([0.1, 0.2, 0.3]), "a")
    assert isinstance(engine.mvm(handle, x), np.ndarray)
    assert isinstance(engine.mvm(handle, torch.from_numpy(x)), torch.Tensor)
    assert engine.mvm(handle, x[:0]).shape == (0, 3)
    np.testing.assert_array_equal(engine.mvm(handle, x.astype(np.uint8)), x @ w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_int": np.full((4, 2), 128)}, "outside the declared -128..127"),
        ({"w_int": np.full((4, 2), 2), "w_bits": 2}, "outside the declared -2..1"),
        ({"w_int": np.ones((4, 2))}, "must hold integers"),
        ({"w_int": np.ones(4, int)}, "2 axes"),
        ({"w_int": [[1, 2], [3, 4]]}, "NumPy array or a torch tensor is needed, not list"),
        ({"w_int": np.ones((0, 2), int)}, "empty"),
        ({"w_bits": 0}, "does not mean 'ideal'"),
        ({"x_bits": 0}, "does not mean 'ideal'"),
        ({"w_bits": 17}, "w_bits of a = 17 .* <= 16"),
        ({"w_bits": 2.5}, "whole number"),
        ({"x_bits": 1, "x_signed": True}, "x_bits of a = 1 .* >= 2"),
        ({"w_scale": -1.0}, "positive"),
        ({"w_scale": [1.0, 2.0, 3.0]}, "positive"),
    ],
)
def test_bad_weights_are_refused(change, message):
    settings_ = {"w_int": np.ones((4, 2), int), "w_scale": 1.0, "name": "a"} | change
    with pytest.raises(CrossbarError, match=message):
        IdealEngine().load(**settings_)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((2, 4), 256), r"outside the declared 0\.\.255"),
        (np.full((2, 4), -1), "outside the declared"),
        (np.ones((2, 4)), "must hold integers"),
        (np.ones((2, 5), int), "5 columns, weights 4 rows"),
        (np.ones(4, int), "axes"),
        ([[1, 1, 1, 1]], "NumPy array or a torch tensor is needed, not list"),
    ],
)
def test_bad_inputs_are_refused(x, message):
    for engine in (IdealEngine(), SimEngine()):
        handle = engine.load(np.ones((4, 2), int), 1.0, "a")
        with pytest.raises(CrossbarError, match=message):
            engine.mvm(handle, x)


def test_handles_belong_to_their_engine_and_names_are_unique():
    one, other = IdealEngine(), SimEngine()
    handle = one.load(np.ones((4, 2), int), 1.0, "a")
    with pytest.raises(CrossbarError, match="already loaded"):
        one.load(np.ones((4, 2), int), 1.0, "a")
    with pytest.raises(CrossbarError, match="was not loaded into this engine"):
        other.mvm(handle, np.ones((1, 4), int))


def test_description_is_flat_and_names_the_source():
    text = SimEngine(Circuit(NOISY, adc=Adc())).describe()
    assert text["device.name"] == "noisy"
    assert text["device.source"] == "test"
    assert text["adc.bits"] == 8
    assert text["wires"] is None
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in text.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Circuit(remap="row"), "choose one of .*rows"),
        (lambda: Circuit(path="fast"), "path"),
        (lambda: Mapping("pairs"), "choose one of .*pair"),
        (lambda: Mapping(cell_bits=0), "does not mean 'ideal'"),
        (lambda: Mapping(tile_rows=0), "tile_rows = 0 must be a whole number >= 1 and <= 4096"),
        (lambda: Mapping(tile_rows=64.0), "tile_rows = 64.0 must be a whole number"),
        (lambda: Circuit("rram"), r"device = 'rram' must be of type Device: device\('rram'\)"),
        (lambda: Circuit(mapping="pair"), "Circuit.mapping = 'pair' must be of type Mapping"),
        (lambda: Circuit(adc=8), "Circuit.adc = 8 must be of type Adc"),
        (lambda: Circuit(faults=0.01), "type Faults"),
        (lambda: Circuit(seed=None), "whole number"),
        (lambda: Drive("bits"), "Drive.mode"),
        (lambda: Drive("serial", 0), "ideal"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(CrossbarError, match=message):
        make()


def test_read_only_reversed_and_uint16_arrays_are_taken():
    w, x = integers(2, 6, 3, w_bits=4, x_bits=4, x_signed=False)
    engine = IdealEngine()
    frozen = w.copy()
    frozen.flags.writeable = False
    handle = engine.load(frozen, torch.tensor([0.1, 0.2, 0.3]), "a")
    np.testing.assert_array_equal(engine.mvm(handle, x[:, ::-1]), x[:, ::-1] @ w)
    np.testing.assert_array_equal(engine.mvm(handle, x.astype(np.uint16)), x @ w)
