"""Benches: exact through an ideal bench, patient with a flaky one, and never sent what they cannot take."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benches import LIMITS, QUICK, RNG, SLICED, W, X, engine_on, fake

from hq_lib.crossbar import (
    BenchError,
    BenchServer,
    Circuit,
    Convolution,
    CrossbarError,
    Drive,
    FakeDriver,
    Faults,
    HardwareEngine,
    IdealEngine,
    Limits,
    Mapping,
    Patience,
    RecordEngine,
    SimEngine,
    TcpDriver,
    bench,
)
from hq_lib.crossbar.profiles import IDEAL
from hq_lib.crossbar.trace import load_parts


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", ["pair", "offset"])
def test_an_ideal_bench_multiplies_exactly(scheme, signed):
    mapping = Mapping(scheme, "none", 2, "digital", 16, 8)
    engine = engine_on(fake(), mapping=mapping)
    handle = engine.load(W, 1.0, "a", x_signed=signed)
    x = X - 128 if signed else X
    np.testing.assert_array_equal(engine.mvm(handle, x), x @ W)


@pytest.mark.parametrize("level_max", [7, 15, 127, 200, 255])
def test_weights_are_exact_on_any_number_of_levels_or_refused_with_the_slices_that_fit(level_max):
    """Levels are whole multiples of a weight step; nothing is rounded to the bench's levels."""
    whole = Mapping(subtract="digital", tile_rows=16, tile_cols=8)
    slices = Mapping(cell_bits=(level_max + 1).bit_length() - 1, subtract="digital", tile_rows=16, tile_cols=8)
    if level_max < np.abs(W).max():
        with pytest.raises(CrossbarError, match=rf"a: .*levels up to \d+.*cell_bits={slices.cell_bits}"):
            engine_on(fake(level_max=level_max), mapping=whole).load(W, 1.0, "a")
    else:
        engine = engine_on(fake(level_max=level_max), mapping=whole)
        np.testing.assert_array_equal(engine.measure(engine.load(W, 1.0, "a"), X), X @ W)
    engine = engine_on(fake(level_max=level_max), mapping=slices)
    np.testing.assert_array_equal(engine.mvm(engine.load(W, 1.0, "a"), X), X @ W)


def test_convolutions_on_a_bench_are_read_a_few_rows_at_a_time_and_resumed(tmp_path):
    w, x = RNG.integers(-127, 128, (3, 2, 3, 3)), RNG.integers(0, 256, (2, 2, 5, 5))
    want = Convolution(IdealEngine(), w, 1.0, "c", padding=1)(x)
    broken = fake(["ok"] * 200 + ["timeout"] * 99)
    conv = Convolution(RecordEngine(engine_on(broken), tmp_path), w, 1.0, "c", padding=1)
    with pytest.raises(BenchError):
        conv(x)
    kept = load_parts(tmp_path).n_rows
    # 4 input steps on 2 x 3 tiles: 8 reads of up to 4 rows are whole; 7 make the first image's 25 rows, 1 is the next's
    assert kept == 25 + 4
    fresh = fake()
    conv = Convolution(RecordEngine(engine_on(fresh), tmp_path), w, 1.0, "c", padding=1)
    np.testing.assert_array_equal(conv(x), want)


def test_gain_and_offset_of_a_bench_are_calibrated_away():
    driver = fake()
    driver.gain, driver.offset = 0.9, 4.0
    engine = engine_on(driver)
    handle = engine.load(W, 1.0, "a")
    before = np.abs(engine.mvm(handle, X) - X @ W).max()
    engine.calibrate(handle, RNG.integers(0, 256, (100, 20)))
    assert np.abs(engine.mvm(handle, X) - X @ W).max() < 0.2 * before


@pytest.mark.parametrize("failure", ["timeout", "drop", "nan", "shape"])
def test_flaky_reads_are_repeated(failure):
    engine = engine_on(fake([failure, "ok", failure, failure]))
    np.testing.assert_array_equal(engine.mvm(engine.load(W, 1.0, "a"), X), X @ W)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("timeout", "TimeoutError"),
        ("drop", "ConnectionError"),
        ("nan", "NaN"),
        ("shape", r"shape \(4, 7\), expected \(4, 8\)"),
    ],
)
def test_a_bench_that_keeps_failing_is_an_error_that_names_the_tile(failure, message):
    driver = fake([failure] * 99)
    engine = engine_on(driver)
    handle = engine.load(W, 1.0, "a")
    with pytest.raises(BenchError, match=f"reading tile 0 failed 3 times.*{message}"):
        engine.mvm(handle, X)
    assert driver.n_reads == 3


def test_counts_beyond_the_declared_range_are_refused():
    class Loud(FakeDriver):
        def read(self, tile, codes):
            return super().read(tile, codes) + 1e9

    engine = engine_on(Loud(Limits(**LIMITS)))
    handle = engine.load(W, 1.0, "a")
    with pytest.raises(BenchError, match="count beyond"):
        engine.mvm(handle, X)
    unsigned = replace(Limits(**LIMITS), count_min=-10)
    low = FakeDriver(unsigned, offset=-1e5)
    low.write(0, np.ones((2, 3), int))
    np.testing.assert_array_equal(low.read(0, np.ones((1, 2), int)), np.full((1, 3), -10))
    low.read = lambda tile, codes: np.full((len(codes), 8), -11)
    engine = engine_on(low)
    handle = engine.load(W, 1.0, "a")
    with pytest.raises(BenchError, match=r"count beyond -10\.\.1000000"):
        engine.mvm(handle, X)


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 330.0), (0.45, 0.0), (1.6, -400.0)])
@pytest.mark.parametrize("rows_per_read", [1, 2, 7, 256])
def test_gain_and_offset_of_a_bench_are_no_stuck_cells(gain, offset, rows_per_read):
    limits, stuck = replace(bench.REHEARSAL, rows_per_read=rows_per_read), np.zeros((128, 128), np.uint8)
    stuck[3, 2], stuck[5, 4] = 1, 2
    driver = FakeDriver(limits, gain=gain, offset=offset, noise=5.0, stuck={0: stuck})
    engine = HardwareEngine(driver, drive=Drive(), patience=QUICK)
    handle = engine.load(W, 1.0, "a")
    written = driver._levels[0]
    np.testing.assert_array_equal(engine.fault_map(handle).reshape(20, -1), stuck[:20, :6])
    np.testing.assert_array_equal(driver._levels[0], written)


def test_a_fault_map_that_is_interrupted_leaves_no_pattern_behind():
    """Weights that lay under the pattern are written again, into their own tile, before anything is read."""
    driver = FakeDriver(replace(bench.REHEARSAL, n_tiles=2, counts_per_unit=1.0))
    engine = HardwareEngine(driver, drive=Drive(), patience=QUICK)
    first, second = engine.load(W, 1.0, "a"), engine.load(-W, 1.0, "b")
    driver.timeouts = [False] + [True] * 3
    with pytest.raises(BenchError):
        engine.fault_map(first)
    np.testing.assert_array_equal(engine.mvm(first, X), X @ W)
    np.testing.assert_array_equal(engine.mvm(second, X), X @ -W)
    assert (engine.tally(first)[0], engine.tally(second)[0]) == (2, 1)  # writes of their tile, one each


def test_a_tile_that_does_not_move_has_no_fault_map():
    engine = HardwareEngine(FakeDriver(bench.REHEARSAL, gain=0.0, noise=5.0), drive=Drive(), patience=QUICK)
    with pytest.raises(CrossbarError, match="a: half of the cells of tile 0 do not move"):
        engine.fault_map(engine.load(W, 1.0, "a"))


def test_counts_at_the_end_of_the_range_are_counted():
    """A clipping converter answers count_max itself; how often, the exact products say."""
    limits = replace(Limits(**LIMITS), level_max=255, code_max=255, rows=20, count_max=2 * 40_000)
    engine = HardwareEngine(FakeDriver(limits), drive=Drive(), patience=QUICK)
    engine.mvm(engine.load(W, 1.0, "a"), X)
    steps = 255 // np.abs(W).max(0)  # levels per weight step
    parts = np.concatenate([X @ W.clip(0) * steps, X @ (-W).clip(0) * steps])
    assert engine.programming()["n_saturated"] == (parts >= 40_000).sum() > 0


def test_an_unsigned_converter_that_cuts_below_zero_is_told_and_its_plain_zeros_are_not():
    limits = replace(Limits(**LIMITS), level_max=255, code_max=255, rows=20, count_min=0)
    x = np.concatenate([X, 0 * X])
    for offset in (0.0, -300_000.0):
        engine = HardwareEngine(FakeDriver(limits, offset=offset), drive=Drive(), patience=QUICK)
        engine.mvm(engine.load(W, 1.0, "a"), x)
        steps = 255 // np.abs(W).max(0)
        exact = np.concatenate([x @ W.clip(0) * steps, x @ (-W).clip(0) * steps])
        cut = ((exact > 0) & (2 * exact + offset <= 0)).sum()
        assert engine.programming()["n_saturated"] == cut
        assert (cut > 0) == (offset < 0)


class Restarting(FakeDriver):
    """A bench that begins anew at its ``at``-th read, blank and with other limits if ``then`` has them; ``quietly``
    it answers that read from blank cells."""

    def __init__(self, limits, at, then=None, *, quietly=False):
        super().__init__(limits)
        self.at, self.then, self.uptime, self.quietly = at, then, 100.0, quietly

    def environment(self):
        self.uptime += 1.0
        return {"time_s": self.uptime}

    def read(self, tile, codes):
        if self.n_reads + 1 == self.at:
            self.at, self.uptime, self._limits = 0, 0.0, self.then or self._limits
            self._levels = {tile: 0 * levels for tile, levels in self._levels.items()}
            if not self.quietly:
                raise ConnectionError("the bench began anew")
        return super().read(tile, codes)


def test_a_bench_that_began_anew_is_noticed_and_written_again_on_the_next_call():
    engine = engine_on(Restarting(Limits(**LIMITS), at=5))
    handle = engine.load(W, 1.0, "a")
    with pytest.raises(BenchError, match=r"began anew, its cells are lost: .* from 1\d\d s to 1 s"):
        engine.mvm(handle, X)
    n_tiles = engine.programming()["tiles_needed"]
    np.testing.assert_array_equal(engine.mvm(handle, X), X @ W)
    assert engine.tally(handle)[0] == 2 * n_tiles


@pytest.mark.parametrize("n_tiles", [64, 2])
@pytest.mark.parametrize("at", [1, 2, 9, 19])
def test_what_a_bench_that_began_anew_without_a_failed_call_answered_is_not_kept(at, n_tiles, tmp_path):
    """On all tiles at once, and on too few, where a write between two tiles begins time anew."""
    driver = Restarting(Limits(**LIMITS | {"n_tiles": n_tiles}), at, quietly=True)
    with RecordEngine(engine_on(driver), tmp_path) as engine:
        handle = engine.load(W, 1.0, "a")
        with pytest.raises(BenchError, match="began anew"):
            engine.mvm(handle, X)
        np.testing.assert_array_equal(engine.mvm(handle, X), X @ W)
    trace = load_parts(tmp_path)
    assert trace.n_rows == len(X)
    for call in trace.calls:
        np.testing.assert_array_equal(call.y, call.y_ideal)


def test_a_bench_that_began_anew_between_two_layers_is_noticed_before_the_second_is_written():
    driver = Restarting(Limits(**LIMITS), at=0)
    engine = engine_on(driver)
    first = engine.load(W, 1.0, "a")
    driver.uptime, driver._levels = 0.0, {tile: 0 * levels for tile, levels in driver._levels.items()}
    with pytest.raises(BenchError, match="began anew"):
        engine.load(-W, 1.0, "b")
    second = engine.load(-W, 1.0, "b")
    np.testing.assert_array_equal(engine.mvm(first, X), X @ W)
    np.testing.assert_array_equal(engine.mvm(second, X), X @ -W)


def test_another_bench_that_answers_after_a_failure_is_refused_by_what_differs():
    engine = engine_on(Restarting(Limits(**LIMITS), at=5, then=Limits(**LIMITS, identity="chip 8")))
    handle = engine.load(W, 1.0, "a")
    for _ in range(2):
        with pytest.raises(BenchError, match=r"another bench answers: bench.identity was not set, here it is 'chip 8'"):
            engine.mvm(handle, X)


@pytest.mark.parametrize(
    ("limits", "more", "message"),
    [
        ({"rows": 8}, {}, "16 x 8 is larger than the bench's 8 x 8"),
        ({"columns": 4}, {}, "larger than the bench"),
        (
            {"code_max": 2},
            {},
            r"codes up to 3, the bench takes 2; use Drive\('serial', 1\), or in hq crossbar .* 1 bits",
        ),
        ({"columns": 1}, {"mapping": None}, "one column is not served: let its program join neighbouring tiles"),
        ({}, {"mapping": Mapping(tile_rows=16, tile_cols=8)}, "subtract='digital'"),
        ({}, {"drive": Drive(managed=True)}, "driven as they are"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(limits, more, message):
    driver = fake(**limits)
    with pytest.raises(CrossbarError, match=message):
        engine_on(driver, **more).load(W, 1.0, "a")
    assert not driver._levels


def test_signed_inputs_need_steps():
    with pytest.raises(CrossbarError, match="codes >= 0"):
        engine_on(fake(code_max=255), drive=Drive()).load(W, 1.0, "a", x_signed=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.write(0, np.full((16, 8), 16)), r"levels span 16..16, the bench takes 0..15"),
        (lambda d: d.write(0, np.full((16, 8), -1)), "levels span"),
        (lambda d: d.write(0, np.ones((17, 8), int)), "larger than"),
        (lambda d: d.write(64, np.ones((2, 2), int)), "tile 64 does not exist"),
        (lambda d: d.write(0, np.ones((2, 2))), "integers"),
        (lambda d: d.read(0, np.full((1, 16), 4)), "codes span"),
        (lambda d: d.read(0, np.ones((5, 16), int)), "larger than"),
    ],
)
def test_the_bench_itself_refuses_what_is_out_of_range(call, message):
    driver = fake()
    driver.write(0, np.ones((16, 8), int))
    with pytest.raises(CrossbarError, match=message):
        call(driver)
    with BenchServer(driver) as server:
        remote = TcpDriver(*server.address)
        with pytest.raises(CrossbarError, match=message):
            call(remote)
        remote.close()


@pytest.mark.parametrize("answer", [None, "counts", [[1.0], [2.0, 3.0]], object()])
def test_answers_that_are_no_numbers_are_bad_answers(answer):
    class Odd(FakeDriver):
        def read(self, tile, codes):
            return answer

    engine = engine_on(Odd(Limits(**LIMITS)))
    handle = engine.load(W, 1.0, "a")
    with pytest.raises(BenchError, match=r"reading tile 0 failed 3 times.*answered"):
        engine.mvm(handle, X)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tiles": 0},
        {"level_max": 0},
        {"counts_per_unit": 0.0},
        {"rows_per_read": 0},
        {"rows": 16.5},
        {"count_min": 1},
        {"columns": "8"},
        {"counts_per_unit": "2"},
    ],
)
def test_an_impossible_bench_is_refused(change):
    with pytest.raises(CrossbarError):
        Limits(**(LIMITS | change))
    with pytest.raises(CrossbarError):
        Patience(0)


def test_layers_larger_than_the_bench_are_written_tile_by_tile_in_order():
    driver = fake(n_tiles=2)
    engine = engine_on(driver)
    first, second = engine.load(W, 1.0, "a"), engine.load(-W, 1.0, "b")
    assert engine.programming()["n_writes"] == 0  # six tiles each, two are there: nothing is written ahead
    np.testing.assert_array_equal(engine.mvm(first, X), X @ W)
    np.testing.assert_array_equal(engine.mvm(second, X), X @ -W)
    cost = engine.programming()
    assert (cost["tiles_needed"], cost["n_tiles"], cost["n_writes"]) == (12, 2, 12)  # each once for all ten rows
    assert cost["write_s"] > 0
    with pytest.raises(CrossbarError, match="no tiles of its own"):
        engine.fault_map(first)
    assert (engine.tally(first)[0], engine.tally(second)[0]) == (6, 6)
    engine.mvm(first, X)
    assert (engine.tally(first)[0], engine.tally(second)[0]) == (12, 6)
    roomy = engine_on(fake())
    roomy.mvm(roomy.load(W, 1.0, "a"), X)
    assert roomy.programming()["n_writes"] == roomy.programming()["tiles_needed"] == 6


def test_a_bench_of_more_rows_than_a_tile_may_have_is_used_as_far_as_that():
    engine = HardwareEngine(fake(rows=5000, level_max=255), drive=Drive("serial", 2), patience=QUICK)
    w = RNG.integers(-3, 4, (4100, 2))
    x = RNG.integers(0, 256, (3, 4100))
    np.testing.assert_array_equal(engine.mvm(engine.load(w, 1.0, "a"), x), x @ w)


def test_a_bench_whose_cells_hold_too_few_levels_slices_by_itself():
    for level_max in (1, 3, 100):
        engine = HardwareEngine(fake(level_max=level_max), drive=Drive("serial", 2), patience=QUICK)
        np.testing.assert_array_equal(engine.mvm(engine.load(W, 1.0, "a"), X), X @ W)


def test_the_fault_map_of_a_bench_predicts_what_it_answers():
    """Stuck cells are found by writing and reading, and a simulation with that map gives the bench's very products."""
    stuck = {tile: RNG.choice([0, 1, 2], (16, 8), p=[0.9, 0.05, 0.05]).astype(np.uint8) for tile in range(64)}
    driver = FakeDriver(replace(Limits(**LIMITS), level_max=3), stuck=stuck, noise=0.5)
    engine = HardwareEngine(driver, mapping=SLICED, drive=Drive("serial", 2), patience=QUICK)
    handle = engine.load(W, 1.0, "a")
    found = engine.fault_map(handle)
    tile = np.concatenate([stuck[0], stuck[1], stuck[2], stuck[3], stuck[4], stuck[5]])
    assert 0 < (found == 1).sum() < (tile == 1).sum() + 1
    assert 0 < (found == 2).sum() < (tile == 2).sum() + 1
    with pytest.raises(CrossbarError, match="'a' was not loaded into this engine"):
        engine_on(fake()).fault_map(handle)
    driver.noise = 0.0
    twin = SimEngine(Circuit(IDEAL, SLICED, faults=Faults(maps={"a": found})))
    np.testing.assert_array_equal(engine.mvm(handle, X), twin.mvm(twin.load(W, 1.0, "a"), X))


@pytest.mark.parametrize(("level_max", "peak"), [(255, 127), (255, 90), (10, 127), (15, 7), (15, 8)])
@pytest.mark.parametrize("scheme", ["pair", "offset"])
def test_a_cell_stuck_high_holds_all_levels_where_the_weights_of_its_column_do_not(level_max, peak, scheme):
    """255 levels over a peak of 90 are 2 a step, 180 in all: a cell stuck at 255 is then 127.5 steps of weight."""
    w = RNG.integers(-peak, peak + 1, (20, 3))
    w[0] = peak
    limits = replace(Limits(**LIMITS), level_max=level_max, code_max=255, counts_per_unit=1.0)
    stuck = {tile: RNG.choice([0, 1, 2], (16, 8), p=[0.9, 0.05, 0.05]).astype(np.uint8) for tile in range(64)}
    bits = None if level_max > 2 * peak else (level_max + 1).bit_length() - 1
    mapping = Mapping(scheme, cell_bits=bits, subtract="digital", tile_rows=16, tile_cols=8)
    engine = HardwareEngine(FakeDriver(limits, stuck=stuck), mapping=mapping, drive=Drive(), patience=QUICK)
    handle = engine.load(w, 1.0, "a")
    faults = Faults(maps={"a": engine.fault_map(handle)})
    assert (faults.maps["a"] == 2).any()
    twin = SimEngine(Circuit(IDEAL, engine.mapping_of(handle), faults=faults))
    np.testing.assert_array_equal(engine.mvm(handle, X), twin.mvm(twin.load(w, 1.0, "a"), X))
    assert engine.mapping_of(handle).cell_levels == level_max


def test_weights_of_more_levels_than_a_simulated_cell_has_are_refused_with_the_slices_that_fit():
    with pytest.raises(CrossbarError, match="levels up to 127, cells have 15: slice them, cell_bits=4"):
        Mapping(cell_levels=15).encode(torch.tensor([[127]]), 8)
    with pytest.raises(CrossbarError, match="subtract='digital' with cell_levels"):
        Mapping("offset", cell_levels=255).encode(torch.tensor([[127]]), 8)
