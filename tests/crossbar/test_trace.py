"""Recording and replay: the same answers without the engine, damage refused, nothing lost when a bench fails."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
from integer_nets import images, quantized

from hq_lib import models
from hq_lib.crossbar import (
    Adc,
    BenchError,
    Circuit,
    ConstantRead,
    Convolution,
    Correction,
    Device,
    EngineNetwork,
    FakeDriver,
    HardwareEngine,
    IdealEngine,
    Limits,
    Patience,
    RecordEngine,
    ReplayEngine,
    SimEngine,
    Trace,
    TraceError,
    device,
    recording,
)
from hq_lib.crossbar.checks import difference
from hq_lib.crossbar.recording import simulated
from hq_lib.crossbar.trace import load_parts
from hq_lib.integer import lower

RNG = np.random.default_rng(0)
W, X = RNG.integers(-127, 128, (20, 3)), RNG.integers(0, 256, (30, 20))
NOISY = Circuit(Device("n", "t", 0.0, 25.0, read=ConstantRead(0.03)))


@pytest.fixture
def recorded(tmp_path):
    engine = RecordEngine(SimEngine(NOISY), tmp_path / "parts")
    handle = engine.load(W, 0.5, "a")
    answers = [engine.mvm(handle, X), engine.mvm(handle, X[:10])]
    engine.calibrate(handle, X)
    answers.append(engine.mvm(handle, X[5:]))
    trace = engine.trace()
    trace.save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors", answers


def test_replay_gives_the_same_answers_noise_and_calibration_included(recorded):
    path, answers = recorded
    assert not np.array_equal(answers[0][:10], answers[1]), "noise differs between measurements"
    engine = ReplayEngine(path)
    handle = engine.load(W, 0.5, "a")
    for _ in range(2):
        np.testing.assert_array_equal(engine.mvm(handle, X), answers[0])
        np.testing.assert_array_equal(engine.mvm(handle, X[:10]), answers[1])
        engine.calibrate(handle, X)
        np.testing.assert_array_equal(engine.mvm(handle, X[5:]), answers[2])
        engine.trace.rewind()
        engine.set_correction(handle, Correction.identity(3))
    assert engine.describe()["recorded.device.name"] == "n"


def test_a_trace_holds_inputs_weights_ideal_measured_and_time(recorded):
    trace = Trace.load(recorded[0])
    np.testing.assert_array_equal(trace.layers["a"].w_int.numpy(), W)
    np.testing.assert_array_equal(trace.calls[0].x, X)
    np.testing.assert_array_equal(trace.calls[0].y_ideal, X @ W)
    np.testing.assert_array_equal(trace.calls[0].y, recorded[1][0])
    assert trace.calls[0].t_s == 1.0
    assert trace.n_rows == 30 + 10 + 30 + 25


def test_replay_fails_loudly_on_what_was_not_measured(recorded):
    engine = ReplayEngine(recorded[0])
    handle = engine.load(W, 0.5, "a")
    with pytest.raises(TraceError, match="measured 0 times"):
        engine.mvm(handle, X + (X < 255))
    for _ in range(4):
        engine.mvm(handle, X[:1]) if _ < 3 else None
    with pytest.raises(TraceError, match="measured 3 times in the trace, not 4"):
        engine.mvm(handle, X[:1])


@pytest.mark.parametrize(
    ("w", "name", "bits", "message"),
    [(-W, "a", 8, "other weights"), (W, "a", 7, "outside"), (W, "aa", 8, "did you mean 'a'")],
)
def test_a_trace_of_another_network_is_refused(recorded, w, name, bits, message):
    with pytest.raises(ValueError, match=message):
        ReplayEngine(recorded[0]).load(w, 0.5, name, w_bits=bits)


def test_any_tampering_is_refused(recorded):
    path, _ = recorded
    content, state = path.read_bytes(), safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as opened:
        record = opened.metadata()
    for name in state:
        changed = {key: value.clone() for key, value in state.items()}
        changed[name].view(-1)[0] += 1
        safetensors.torch.save_file(changed, path, record)
        with pytest.raises(TraceError, match="does not match its SHA-256"):
            Trace.load(path)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "calls/0/y"}, path, record)
    with pytest.raises(TraceError, match="does not match its SHA-256"):
        Trace.load(path)
    for spoilt in (content.replace(b'\\"t_s\\": 1.0', b'\\"t_s\\": 2.0', 1), content[:200], b""):
        assert spoilt != content
        path.write_bytes(spoilt)
        with pytest.raises(TraceError, match="damaged"):
            Trace.load(path)
    models.write_checkpoint(path, state, {"schema": 3})
    with pytest.raises(TraceError, match="schema 3"):
        Trace.load(path)
    path.write_bytes(content)
    assert Trace.load(path).n_rows == 95


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(TraceError, match="missing"):
        Trace.load(tmp_path / "none.safetensors")
    with pytest.raises(models.CheckpointError, match=r"\.safetensors"):
        Trace().save(tmp_path / "trace.csv")
    (tmp_path / "part_000000.npz").write_bytes(b"")
    with pytest.raises(TraceError, match="schema 1"):
        load_parts(tmp_path)


def bench():
    limits = Limits(
        n_tiles=4,
        rows=16,
        columns=8,
        level_max=127,
        code_max=255,
        count_max=10**8,
        rows_per_read=4,
        counts_per_unit=1.0,
    )
    driver = FakeDriver(limits, noise=50.0)
    return HardwareEngine(driver, patience=Patience(2, 0.0)), driver


def test_a_bench_that_fails_in_mid_run_loses_nothing_and_the_run_resumes(tmp_path):
    engine, driver = bench()
    engine.drive = engine.drive.__class__("analog")
    driver.timeouts = [False] * 9 + [True] * 100  # 4 reads per 4 rows: two chunks are safe, the third fails
    recorder = RecordEngine(engine, tmp_path)
    handle = recorder.load(W, 1.0, "a")
    with pytest.raises(BenchError, match="failed 2 times"):
        recorder.mvm(handle, X)
    kept = load_parts(tmp_path)
    assert kept.n_rows == 8 * (9 // (2 * len(engine._placed["a"].blocks))) or kept.n_rows % 4 == 0
    assert kept.n_rows > 0
    fresh, driver = bench()
    fresh.drive = fresh.drive.__class__("analog")
    resumed = RecordEngine(fresh, tmp_path)
    y = resumed.mvm(resumed.load(W, 1.0, "a"), X)
    np.testing.assert_array_equal(y[: kept.n_rows], np.concatenate([call.y for call in kept.calls]))
    assert driver.n_reads == len(fresh._placed["a"].blocks) * -(-(30 - kept.n_rows) // 4)
    assert resumed.trace().n_rows == 30


def test_a_folder_of_other_weights_is_refused(tmp_path):
    first = RecordEngine(IdealEngine(), tmp_path)
    first.mvm(first.load(W, 1.0, "a"), X)
    first.close()
    with pytest.raises(TraceError, match="use an empty folder"):
        RecordEngine(IdealEngine(), tmp_path).load(-W, 1.0, "a")


def test_a_folder_of_another_engine_is_refused_but_not_of_another_time(tmp_path):
    with RecordEngine(SimEngine(Circuit(device("pcm_drift"))), tmp_path) as first:
        first.mvm(first.load(W, 1.0, "a"), X)
    later = SimEngine(Circuit(device("pcm_drift")))
    later.set_time(86_400.0)
    RecordEngine(later, tmp_path)
    for other in (SimEngine(Circuit(device("pcm_drift"), seed=1)), SimEngine(), IdealEngine()):
        with pytest.raises(TraceError, match=r"here it is .* use an empty folder"):
            RecordEngine(other, tmp_path)


def test_two_recorders_opened_on_one_empty_folder_are_not_mixed(tmp_path):
    one, other = (RecordEngine(engine, tmp_path) for engine in (SimEngine(NOISY), IdealEngine()))
    for recorder in (one, other):
        recorder.mvm(recorder.load(W, 1.0, "a"), X)
    one.close()
    with pytest.raises(TraceError, match=r"records another engine: .* use an empty folder"):
        other.close()
    assert one.trace().n_rows == len(X)
    Trace({"engine": "ideal"}).save(tmp_path / "part_000001.safetensors")  # as an older version left it
    with pytest.raises(TraceError, match=r"part_000001.* is of another engine than the parts before"):
        load_parts(tmp_path)


def test_what_converters_of_another_fitted_range_gave_is_not_answered(tmp_path):
    answers = []
    for rows in (X[:2] // 8, X, X):
        with RecordEngine(SimEngine(Circuit(device("ideal"), adc=Adc(8))), tmp_path) as engine:
            handle = engine.load(W, 1.0, "a")
            engine.inner.calibrate_adc(handle, rows)
            answers.append((engine.mvm(handle, X), engine.n_recorded))
    bare = SimEngine(Circuit(device("ideal"), adc=Adc(8)))
    handle = bare.load(W, 1.0, "a")
    bare.calibrate_adc(handle, X)
    want = bare.mvm(handle, X)
    assert [n for _, n in answers] == [0, 0, len(X)]
    assert not np.array_equal(answers[0][0], want)
    np.testing.assert_array_equal(answers[1][0], want)
    np.testing.assert_array_equal(answers[2][0], want)


def test_what_waits_is_on_disk_with_the_next_answer_after_a_few_seconds(tmp_path, monkeypatch):
    recorder = RecordEngine(IdealEngine(), tmp_path)
    handle = recorder.load(W, 1.0, "a")
    recorder.mvm(handle, X)
    assert load_parts(tmp_path).n_rows == 0
    now = recording.time.monotonic()
    monkeypatch.setattr(recording.time, "monotonic", lambda: now + recording.FLUSH_S)
    recorder.mvm(handle, X ^ 1)
    assert load_parts(tmp_path).n_rows == 2 * len(X)  # whatever becomes of the process


def test_a_call_that_is_repeated_after_a_failure_measures_nothing_twice_and_replays(tmp_path):
    engine, driver = bench()
    engine.drive = engine.drive.__class__("analog")
    recorder = RecordEngine(engine, tmp_path)
    handle = recorder.load(W, 1.0, "a")
    first = recorder.mvm(handle, X[:8])
    driver.timeouts = [False] * 9 + [True] * 2
    with pytest.raises(BenchError):
        recorder.mvm(handle, X[8:])
    rest = recorder.mvm(handle, X[8:])
    trace = recorder.trace()
    assert trace.n_rows == recorder.n_measured == len(X)
    assert recorder.n_recorded == 16  # of the call that failed: four parts of four rows, before its tenth read
    replay = ReplayEngine(trace)
    same = replay.load(W, 1.0, "a")
    np.testing.assert_array_equal(replay.mvm(same, X), np.concatenate([first, rest]))


def test_killed_while_a_part_is_written_the_folder_still_opens(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with RecordEngine(IdealEngine(), tmp_path) as first:
        first.mvm(first.load(W, 1.0, "a"), X)
    second = RecordEngine(IdealEngine(), tmp_path)
    second.mvm(second.load(W, 1.0, "a"), X + (X < 255))
    monkeypatch.setattr("hq_lib.results.atomic.os.replace", killed)
    with pytest.raises(Killed):
        second.flush()
    monkeypatch.undo()
    assert load_parts(tmp_path).n_rows == len(X)
    with RecordEngine(IdealEngine(), tmp_path) as third:
        third.mvm(third.load(W, 1.0, "a"), X + (X < 255))
    assert load_parts(tmp_path).n_rows == 2 * len(X)


def test_convolutions_are_recorded_and_replayed(tmp_path):
    w, x = RNG.integers(-8, 8, (4, 2, 3, 3)), RNG.integers(0, 256, (2, 2, 6, 6))
    recorder = RecordEngine(SimEngine(NOISY), tmp_path / "parts")
    y = Convolution(recorder, w, 1.0, "c", padding=1)(x)
    recorder.close()
    replay = Convolution(ReplayEngine(recorder.trace()), w, 1.0, "c", padding=1)
    np.testing.assert_array_equal(replay(x), y)


def test_a_recorded_simulation_is_calibrated_and_aged_as_a_bare_one(tmp_path):
    model, x = lower(quantized("residual", "w8a8")), images(3).numpy()

    bare, inner = (SimEngine(Circuit(device("pcm_drift"), adc=Adc(8))) for _ in range(2))
    networks, logits = [EngineNetwork(model, engine) for engine in (bare, RecordEngine(inner, tmp_path))], []
    for network in networks:
        network.calibrate(images(16), kind=None)  # gains would be fitted to the whole numbers that are recorded
        network.set_time(1e6)
        logits.append(network.run(x))
    np.testing.assert_array_equal(*logits)
    for (_, handle), (recorder, same) in zip(*(network.groups() for network in networks), strict=True):
        assert simulated(recorder) is inner
        np.testing.assert_array_equal(inner.layer(same).adc_step, bare.layer(handle).adc_step)


@pytest.mark.parametrize("later", ["set_time", "set_temperature"])
def test_what_cells_gave_at_another_time_or_temperature_is_not_what_they_give_now(tmp_path, later):
    aging = Circuit(replace(device("pcm_drift"), read=None, temperature_per_K=0.002))
    for moved in (False, True, True):
        with RecordEngine(SimEngine(aging), tmp_path) as engine:
            bare = SimEngine(aging)
            if moved:
                getattr(engine.inner, later)(80.0)
                getattr(bare, later)(80.0)
            y = engine.mvm(engine.load(W, 0.5, "a"), X)
            np.testing.assert_array_equal(y, bare.mvm(bare.load(W, 0.5, "a"), X))
    assert load_parts(tmp_path).n_rows == 2 * len(X)  # the third run finds what the second measured


def test_rows_that_a_resumed_simulation_adds_have_noise_of_their_own(tmp_path):
    other, noises = X ^ 1, []
    for rows in (X, other):
        with RecordEngine(SimEngine(NOISY), tmp_path) as engine:
            handle = engine.load(W, 0.5, "a")
            noises.append((engine.mvm(handle, rows) - rows @ W) / np.sqrt(np.square(rows).sum(1, keepdims=True)))
    assert abs(np.corrcoef(*(noise.ravel() for noise in noises))[0, 1]) < 5 / np.sqrt(noises[0].size)


def test_a_part_says_the_conditions_under_which_it_was_measured(tmp_path):
    engine = RecordEngine(SimEngine(Circuit(device("pcm_drift"))), tmp_path)
    handle = engine.load(W, 0.5, "a")
    engine.inner.set_time(100.0)
    engine.mvm(handle, X)
    assert engine.trace().engine["t_s"] == engine.describe()["t_s"] == 100.0


def test_the_record_is_readable_by_others(recorded):
    with safetensors.safe_open(recorded[0], "pt") as opened:
        record = json.loads(opened.metadata()["hq_record"][64:])
    assert record["layers"][0]["name"] == "a"
    assert record["units"]["t_s"] == "seconds after programming"


def test_a_setting_that_only_one_side_has_is_told_from_one_that_is_none():
    assert difference({"adc": None}, {"adc": None, "t_s": 3.0}) == ""
    assert difference({}, {"adc": None}) == "adc was not set, here it is None"
    assert difference({"adc": 8}, {}) == "adc was 8, here it is not set"
