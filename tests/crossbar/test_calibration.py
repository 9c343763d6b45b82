"""Calibration: known errors go to round-off, held-out errors fall, dead columns stay finite, faults are mended."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hq_lib.crossbar import (
    Circuit,
    ConstantRead,
    Correction,
    CrossbarError,
    Device,
    Drive,
    Engine,
    Faults,
    IdealEngine,
    Mapping,
    SimEngine,
    count,
    residuals,
)
from hq_lib.crossbar.calibration import compensate, references
from hq_lib.crossbar.mapping import OK, STUCK_HIGH, STUCK_LOW, partner_levels, row_order
from hq_lib.crossbar.profiles import IDEAL, PCM_JOSHI, PCM_NANDAKUMAR, RRAM_WAN_1S

RNG = np.random.default_rng(0)
W, X = RNG.integers(-127, 128, (90, 6)), RNG.integers(0, 256, (400, 90))
FIT, TEST = X[:200], X[200:]


class Skewed(IdealEngine):
    """The exact product with a gain and offset per column, and a dead last column."""

    gain, offset = torch.tensor([0.8, 1.3, 1.0, -0.5, 2.0, 0.0]), torch.tensor([1e4, -50.0, 0.0, 3.0, 7e3, 40.0])

    def _measure(self, handle, x):
        return super()._measure(handle, x).double() * self.gain + self.offset


def loaded(engine: Engine, name: str = "a", w=W):
    return engine, engine.load(w, 1.0, name)


def as_network(engine: Engine, handle, probes) -> Any:
    """One matrix as a network of its own, of which ``probes`` are the sampled inputs."""
    samples = {handle.name: [torch.from_numpy(probes)]}
    return SimpleNamespace(groups=lambda: [(engine, handle)], samples=lambda images, n_rows: samples)


def rms(engine, handle, x=TEST):
    return float(np.sqrt(((engine.mvm(handle, x) - x @ handle.w_int.numpy()) ** 2).mean()))


def test_pure_gain_and_offset_are_removed_to_round_off():
    engine, handle = loaded(Skewed())
    found = engine.calibrate(handle, FIT)
    np.testing.assert_array_equal(engine.mvm(handle, TEST)[:, :5], (TEST @ W)[:, :5])
    torch.testing.assert_close(found.gain[:5], 1 / Skewed.gain[:5].double(), rtol=1e-6, atol=0)


def test_a_dead_column_stays_finite_and_answers_its_mean():
    engine, handle = loaded(Skewed())
    engine.calibrate(handle, FIT)
    dead = engine.mvm(handle, TEST)[:, 5]
    np.testing.assert_allclose(dead, (FIT @ W)[:, 5].mean(), atol=1)
    for kind in Correction.KINDS:
        assert np.isfinite(engine.mvm(handle, TEST)).all(), kind
        engine.calibrate(handle, FIT, kind=kind)


@pytest.mark.parametrize(("kind", "removed"), [("gain", "gain"), ("column", "gain"), ("column", "offset")])
def test_each_kind_removes_its_own_error(kind, removed):
    class One(Skewed):
        gain = torch.tensor([1.25] * 6) if removed == "gain" else torch.ones(6)
        offset = Skewed.offset if removed == "offset" else torch.zeros(6)

    engine, handle = loaded(One())
    engine.calibrate(handle, FIT, kind=kind)
    np.testing.assert_array_equal(engine.mvm(handle, TEST), TEST @ W)


@pytest.mark.parametrize("device", [PCM_JOSHI, RRAM_WAN_1S, PCM_NANDAKUMAR], ids=lambda d: d.name)
def test_held_out_error_falls_with_each_richer_correction(device):
    engine, handle = loaded(SimEngine(Circuit(device)))
    errors = [rms(engine, handle)]
    for kind in ("gain", "column"):
        engine.calibrate(handle, FIT, kind=kind)
        errors.append(rms(engine, handle))
    assert all(after <= before * 1.05 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_repeats_remove_the_shrinking_of_slopes():
    noisy = Device("n", "t", 0.0, 25.0, read=ConstantRead(0.05))
    engine, handle = loaded(SimEngine(Circuit(noisy)))
    shrunk = engine.calibrate(handle, FIT).gain
    repaired = engine.calibrate(handle, FIT, repeats=8).gain
    assert float(shrunk.mean()) < 0.99
    assert float(repaired.mean()) == pytest.approx(1.0, abs=0.01)


def test_closed_loop_fits_what_upstream_really_delivers():
    """Layer two sees distorted inputs; fitted on them against the ideal accumulators it takes the distortion out."""
    w2 = RNG.integers(-127, 128, (6, 4))

    def second_input(y):
        return np.clip(np.rint(y / 4000 + 128), 0, 255).astype(int)

    ideal_x2 = second_input(X @ W)
    ideal_y2 = ideal_x2 @ w2
    errors = {}
    for loop in ("open", "closed"):
        engine = Skewed()
        first = engine.load(W, 1.0, "one")
        second = engine.load(np.c_[w2, w2[:, :2]], 1.0, "two")
        wanted = np.c_[ideal_y2, ideal_y2[:, :2]]

        def sample(handle, engine=engine, first=first, loop=loop, wanted=wanted):
            if handle.name == "one":
                return FIT, None
            return (second_input(engine.mvm(first, FIT)), wanted[:200]) if loop == "closed" else (ideal_x2[:200], None)

        for handle in (first, second):
            engine.calibrate(handle, *sample(handle))
        y = engine.mvm(second, second_input(engine.mvm(first, TEST)))
        errors[loop] = np.abs(y - wanted[200:])[:, :4].mean()
    assert errors["closed"] < errors["open"]


def test_report_tells_before_and_after():
    engine, handle = loaded(Skewed())
    before = residuals(engine, {handle: TEST})
    engine.calibrate(handle, FIT)
    after = residuals(engine, {handle: TEST}).iloc[0]
    assert before.rmse_lsb[0] == before.rmse_raw_lsb[0] == after.rmse_raw_lsb
    assert after.rmse_lsb < before.rmse_lsb[0]
    assert (after.layer, after.kind, after.n_rows) == ("a", "column", 200)
    assert after.r2 > before.r2[0]


@pytest.mark.parametrize("per", ["column", "layer"])
def test_drift_is_compensated(per):
    device = Device("d", "t", 0.0, 25.0, drift=PCM_NANDAKUMAR.drift)
    engine, handle = loaded(SimEngine(Circuit(device)))
    engine.calibrate(handle, FIT)
    network = as_network(engine, handle, FIT[:50])
    found, fresh = references(network, X), rms(engine, handle)
    engine.set_time(86_400.0)
    drifted = rms(engine, handle)
    assert bool((compensate(network, found, per=per)["a"] > 1.2).all())
    assert fresh < rms(engine, handle) < 0.5 * drifted
    engine.set_time(20.0)
    torch.testing.assert_close(compensate(network, found, per=per)["a"], torch.ones(6, dtype=torch.float64))


def test_probes_must_carry_signal():
    engine, handle = loaded(SimEngine())
    with pytest.raises(CrossbarError, match="probe rows"):
        references(as_network(engine, handle, np.zeros((5, 90), int)), X)


def test_drift_is_not_corrected_twice():
    """A fit has taken out the drift up to its time: compensation goes on from references of then, and from no older."""
    engine, handle = loaded(SimEngine(Circuit(replace(PCM_NANDAKUMAR, read=None))))
    network = as_network(engine, handle, FIT)
    old = references(network, X)
    engine.calibrate(handle, FIT)
    engine.set_time(3600.0)
    compensate(network, old)  # fitted at the time of the references
    engine.set_time(86_400.0)
    engine.calibrate(handle, FIT)
    with pytest.raises(CrossbarError, match=r"a: fitted at 86400 s, its reference is of 20 s: .*references again"):
        compensate(network, old)
    fresh, fitted = references(network, X), rms(engine, handle)
    compensate(network, fresh)
    assert rms(engine, handle) == fitted
    engine.set_time(1e7)
    assert rms(engine, handle) > 2 * fitted
    compensate(network, fresh)
    assert rms(engine, handle) < 2 * fitted


@pytest.mark.parametrize(
    ("kind", "rows", "wanted", "message"),
    [
        ("columns", FIT, None, "did you mean .column."),
        ("column", FIT[:2], None, "3 calibration rows, not 2"),
        ("column", FIT, np.zeros((3, 6)), "do not fit"),
        ("column", FIT, np.full((200, 6), np.nan), "NaN"),
    ],
)
def test_bad_calibration_data_is_refused(kind, rows, wanted, message):
    engine, handle = loaded(Skewed())
    with pytest.raises(CrossbarError, match=message):
        engine.calibrate(handle, rows, wanted, kind=kind)


def test_nan_from_an_engine_is_refused():
    class Broken(IdealEngine):
        def _measure(self, handle, x):
            return super()._measure(handle, x) * float("nan")

    engine, handle = loaded(Broken())
    with pytest.raises(CrossbarError, match="NaN"):
        engine.mvm(handle, TEST)


def test_partner_by_hand():
    plan = Mapping(scale="layer").encode(torch.tensor([[60], [-60], [100]]), 8)
    codes = torch.zeros(3, 1, 2, dtype=torch.uint8)
    codes[0, 0, 0] = STUCK_HIGH  # G+ stuck at 100: partner goes to 40
    codes[1, 0, 0] = STUCK_HIGH  # 100 - 160: partner can only reach 100
    codes[2, 0, 1] = STUCK_LOW  # already where it should be
    assert partner_levels(plan, codes)[:, 0].tolist() == [[100, 40], [100, 100], [100, 0]]


def test_rows_move_away_from_faults_within_their_tile_only():
    w = torch.tensor([[100], [0], [7], [50]])
    plan = Mapping(tile_rows=2).encode(w, 8)
    codes = torch.zeros(4, 1, 2, dtype=torch.uint8)
    codes[0, 0, 0] = STUCK_LOW  # would lose 100; row 1 holds 0 and does not care
    codes[3, 0, 0] = STUCK_LOW  # 7 is cheaper to lose than 50
    assert row_order(plan, codes, partner=False).tolist() == [1, 0, 3, 2]
    assert row_order(plan, codes * OK, partner=False).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mapping", [Mapping(tile_rows=64), Mapping(tile_rows=64, cell_bits=2, subtract="digital")])
def test_remapping_mends_stuck_cells(mapping):
    errors = {}
    for remap in ("none", "partner", "rows", "both"):
        engine, handle = loaded(SimEngine(Circuit(IDEAL, mapping, faults=Faults(0.02, 0.02), remap=remap)))
        errors[remap] = rms(engine, handle)
    assert errors["partner"] < 0.7 * errors["none"]
    assert errors["rows"] < 0.7 * errors["none"]
    assert errors["both"] < min(errors["partner"], errors["rows"])


def test_remapping_without_faults_changes_nothing():
    answers = [
        engine.mvm(handle, TEST)
        for engine, handle in (loaded(SimEngine(Circuit(IDEAL, remap=remap))) for remap in ("none", "both"))
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    with pytest.raises(CrossbarError, match="works on pairs"):
        loaded(SimEngine(Circuit(IDEAL, Mapping("offset"), remap="both")))


def test_counts_of_the_specification():
    """K = 144 on 128 rows: 2 tiles; bit-serial 4 slices x 2 signs: 64 times the conversions of the analog way."""
    handle = IdealEngine().load(np.full((144, 16), 127), 1.0, "a")
    analog = count(handle, Circuit())
    serial = count(handle, Circuit(mapping=Mapping(cell_bits=2, subtract="digital"), drive=Drive("serial")))
    assert analog.conversions_per_mvm == 2 * 16
    assert serial.conversions_per_mvm == 64 * analog.conversions_per_mvm
    assert (analog.n_cells, analog.n_arrays) == (144 * 32, 2)
    assert analog.energy_pJ(adc_pJ=1.6) == pytest.approx(32 * 1.6 + 144 * 32 * 10 * 0.04 * 10 * 1e-3)
