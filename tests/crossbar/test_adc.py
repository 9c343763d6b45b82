"""Converters: exact where they must be, within half a step elsewhere, monotone, and honest about saturation."""

import math

import numpy as np
import pytest
import torch

from hq_lib import crossbar
from hq_lib.crossbar import Adc, Circuit, CrossbarError, Drive, Mapping, SimEngine
from hq_lib.crossbar.profiles import IDEAL, PCM_JOSHI

RNG = np.random.default_rng(0)
W, X = RNG.integers(-127, 128, (200, 6)), RNG.integers(0, 256, (64, 200))


def engine_and_handle(adc: Adc, **more):
    engine = SimEngine(Circuit(**({"device": IDEAL, "adc": adc, "path": "converted"} | more)))
    return engine, engine.load(W, 1.0, "a")


def test_lossless_size_is_that_of_the_formula():
    """R = 128 rows, 2-bit cells, 1-bit inputs: 385 levels need 9 bits (CROSSBAR model 1.2)."""
    mapping = Mapping(cell_bits=2, subtract="digital", scale="none")
    nine, eight = (engine_and_handle(Adc(bits, "whole"), mapping=mapping, drive=Drive("serial")) for bits in (9, 8))
    np.testing.assert_array_equal(nine[0].mvm(nine[1], X), X @ W)
    assert nine[0].layer(nine[1]).adc_step.unique().tolist() == [1]
    assert eight[0].layer(eight[1]).adc_step.unique().tolist() == [2]


def test_one_bit_less_errs_by_at_most_half_a_step_times_the_recombination_weight():
    mapping = Mapping(cell_bits=2, subtract="digital", scale="none")
    engine, handle = engine_and_handle(Adc(8, "whole"), mapping=mapping, drive=Drive("serial"))
    plan, n_tiles = engine.layer(handle).plan, 2
    factors = sum(step.factor for step in Drive("serial").steps(8, False))
    bound = 0.5 * 2 * n_tiles * factors * float(plan.weight.abs().sum())
    error = np.abs(engine.mvm(handle, X) - X @ W)
    assert 0 < error.max() <= bound


def test_an_exact_range_is_exact_or_refused_with_the_bits_that_it_needs():
    mapping = Mapping(cell_bits=2, subtract="digital", scale="none")
    for bits in range(2, 17):
        for drive in (Drive("serial"), Drive("serial", 3), Drive()):
            needed = math.ceil(math.log2(128 * 3 * drive.peak(8, False) + 1))
            if bits < needed:
                with pytest.raises(CrossbarError, match=f"a: .*takes {needed} bits.*'whole'"):
                    engine_and_handle(Adc(bits, "exact"), mapping=mapping, drive=drive)
            else:
                engine, handle = engine_and_handle(Adc(bits, "exact"), mapping=mapping, drive=drive)
                np.testing.assert_array_equal(engine.mvm(handle, X), X @ W)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inl", [0.0, 0.7])
def test_codes_are_monotone_and_bounded(signed, inl):
    adc = Adc(5, "max", inl_lsb=inl)
    low, high = adc.codes(signed)
    codes = torch.linspace(low - 5, high + 5, 4001)
    n_saturated = adc.convert_(codes, signed)
    assert bool((codes.diff() >= 0).all())
    assert (codes.min(), codes.max()) == (low, high)
    assert n_saturated > 0
    assert set(codes.tolist()) == set(range(low, high + 1))


def test_nonlinearity_has_its_peak_and_its_zeros():
    adc = Adc(12, "max", inl_lsb=3.0)
    low, high = adc.codes(True)
    ideal = torch.linspace(low, high, 5001, dtype=torch.float64)
    bent = ideal.clone()
    adc.convert_(bent, True)
    assert float((bent - ideal).abs().max()) == pytest.approx(3.0, abs=0.6)
    assert float((bent - ideal)[[0, 2500, -1]].abs().max()) <= 1.0


def test_max_range_that_is_no_whole_number_of_units_errs_where_exact_does_not():
    """A finer converter over the full scale is worse than an exact one: finding 8."""
    mapping = Mapping(cell_bits=2, subtract="digital", scale="none")
    exact = engine_and_handle(Adc(9, "exact"), mapping=mapping, drive=Drive("serial"))
    full = engine_and_handle(Adc(10, "max"), mapping=mapping, drive=Drive("serial"))
    assert np.array_equal(exact[0].mvm(exact[1], X), X @ W)
    error = full[0].mvm(full[1], X) - X @ W
    assert 0.001 < np.sqrt((error**2).mean() / ((X @ W) ** 2).mean()) < 0.05


@pytest.mark.parametrize("cell_bits", [None, 2])
@pytest.mark.parametrize(("k", "value"), [(1, 127), (1, -127), (3, -128), (3, 127)])
def test_a_reference_column_takes_its_current_off_the_range(cell_bits, k, value):
    """|I| <= R max(middle, span - middle) x, for each slice."""
    mapping, w = Mapping("offset", cell_bits=cell_bits, scale="none", tile_rows=k), np.full((k, 2), value)
    x = np.array([[255] * k, [0] * k])
    engine = SimEngine(Circuit(IDEAL, mapping, adc=Adc(16, "max"), path="converted"))
    handle = engine.load(w, 1.0, "a")
    layer = engine.layer(handle)
    currents = np.einsum("bk,knq->qnb", x, layer.planes.numpy())
    reachable = k * 255 * np.array([[128.0]] if cell_bits is None else [[3.0], [3.0], [3.0], [2.0]])
    np.testing.assert_allclose(layer.adc_step.numpy() * (2**15 - 1), np.broadcast_to(reachable, layer.adc_step.shape))
    assert (np.abs(currents).max(-1) <= reachable + 1e-6).all()
    engine.mvm(handle, x)
    assert layer.n_saturated == 0


def test_an_exact_converter_is_not_refused_for_currents_that_cannot_be():
    engine = SimEngine(Circuit(IDEAL, Mapping("offset"), adc=Adc(16, "exact")))
    handle = engine.load(np.full((1, 1), 127), 1.0, "a")
    assert engine.mvm(handle, np.array([[255]])).item() == 127 * 255


@pytest.mark.parametrize("coverage", [0.9999, None])
def test_calibrated_range_beats_the_full_range(coverage):
    full, fitted = engine_and_handle(Adc(8, "max")), engine_and_handle(Adc(8, "calibrated", coverage=coverage))
    fitted[0].calibrate_adc(fitted[1], X[:32])
    rms = [np.sqrt(((engine.mvm(handle, X[32:]) - X[32:] @ W) ** 2).mean()) for engine, handle in (full, fitted)]
    assert rms[1] < 0.3 * rms[0]


def test_calibrated_slices_keep_powers_of_two():
    mapping = Mapping(cell_bits=2, subtract="digital")
    engine, handle = engine_and_handle(Adc(6), mapping=mapping, drive=Drive("serial"))
    step = engine.calibrate_adc(handle, X)
    ratios = torch.log2(step[:, 0] / step[:, 0].min())
    torch.testing.assert_close(ratios, ratios.round(), rtol=0, atol=1e-9)


def test_a_slice_without_current_does_not_coarsen_the_others():
    """Weights of three bits declared as eight leave the upper slices idle: the lowest has the range it has alone."""
    w = np.random.default_rng(1).integers(-3, 4, (64, 6))
    w[0] = 3
    steps = {}
    for w_bits in (3, 8):
        engine = SimEngine(Circuit(IDEAL, Mapping(cell_bits=2, scale="none"), adc=Adc(6)))
        handle = engine.load(w, 1.0, "a", w_bits=w_bits)
        steps[w_bits] = engine.calibrate_adc(handle, X[:, :64])
    assert steps[8].shape[0] == 4
    torch.testing.assert_close(steps[8], steps[3].expand(4, -1))
    engine = SimEngine(Circuit(IDEAL, adc=Adc(6)))
    assert bool((engine.calibrate_adc(engine.load(0 * w, 1.0, "a"), X[:, :64]) > 0).all())


def test_saturation_is_counted():
    engine, handle = engine_and_handle(Adc(8, coverage=0.5))
    engine.calibrate_adc(handle, X)
    engine.mvm(handle, X)
    saturated, conversions = engine.layer(handle).n_saturated, engine.layer(handle).n_conversions
    assert conversions == 2 * 64 * 6  # tiles, rows, columns
    assert 0.3 < saturated / conversions < 0.6
    engine, handle = engine_and_handle(Adc(8, "max"))
    assert engine.layer(handle).n_saturated == engine.layer(handle).n_conversions == 0


def test_converter_gain_and_offset_are_what_they_say():
    engine, handle = engine_and_handle(Adc(14, "max", offset_sigma_lsb=3.0))
    tiles = engine.layer(handle).tiles
    offset = torch.stack([tile.shift for tile in tiles])
    assert 1 < float(offset.std()) < 6
    zero = engine.measure(handle, np.zeros((1, 200), int))
    want = (offset.round() * engine.layer(handle).adc_step).sum(0)
    torch.testing.assert_close(zero[0], want.to(torch.float64), rtol=0, atol=1e-3)
    gained, handle = engine_and_handle(Adc(16, "max", gain_sigma=0.05))
    slope = (gained.mvm(handle, X) * (X @ W)).sum(0) / ((X @ W) ** 2).sum(0)
    assert 0.01 < np.std(slope - 1) < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adc(0), "Adc.bits = 0 .*does not mean 'ideal'"),
        (lambda: Adc(17), "Adc.bits = 17 must be .* <= 16"),
        (lambda: Adc(8, "full"), "Adc.range"),
        (lambda: Adc(gain_sigma=5), "gain_sigma = 5 .*5 % is 0.05"),
        (lambda: Adc(coverage=99.99), "99 % is 0.99"),
        (lambda: Adc(inl_lsb=-1), ">= 0"),
        (lambda: engine_and_handle(Adc(1, "max")), "signed converter = 1 must be .* >= 2"),
    ],
)
def test_bad_converters_are_refused(make, message):
    with pytest.raises(CrossbarError, match=message):
        make()


def test_the_example_of_the_package_runs():
    lines = [line.strip() for line in crossbar.__doc__.splitlines() if line.startswith("    ")]
    random = np.random.default_rng(0)
    names = vars(crossbar) | {"w_int": random.integers(-127, 128, (20, 6)), "w_scale": 0.1}
    names |= {name: random.integers(0, 256, (50, 20)) for name in ("x_some", "x_int")}
    exec("\n".join(lines), names)
    assert names["y"].shape == (50, 6)


def test_uncalibrated_range_says_what_to_do():
    engine, handle = engine_and_handle(Adc(), device=PCM_JOSHI)
    with pytest.raises(CrossbarError, match="needs calibrate_adc"):
        engine.mvm(handle, X)
    bare = SimEngine()
    handle = bare.load(W, 1.0, "a")
    with pytest.raises(CrossbarError, match="no converter to calibrate"):
        bare.calibrate_adc(handle, X)
