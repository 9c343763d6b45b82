"""The bench run: rehearsed, recorded, interrupted, resumed and replayed, with the same logits."""

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from integer_nets import noise_set, quantized

from hq_lib.crossbar import BenchError, CrossbarError, FakeDriver, HardwareEngine, Limits, TraceError, bench
from hq_lib.crossbar.bench import Plan, drive_of
from hq_lib.integer import lower


@pytest.fixture(scope="module")
def small():
    """(model, test, train): a small network of the tests, on random images."""
    random = torch.Generator().manual_seed(0)
    test = noise_set(random, 8, "test")
    return lower(quantized("residual", "w8a8")), test, noise_set(random, 20, "train")


def run(plan, small):
    return bench.run(plan, *small)


def plan(folder, engine="rehearsal", **more):
    return Plan(engine, folder, **({"layers": ("fc", "conv2"), "n_test": 6, "n_calib": 5} | more))


def test_a_rehearsal_is_calibrated_and_replays_to_the_same_logits(small, tmp_path):
    done = run(plan(tmp_path), small)
    assert (done.layers["rmse_after_lsb"] < 0.9 * done.layers["rmse_before_lsb"]).all()
    assert list(done.layers["layer"]) == ["conv2", "fc"]
    assert 0 < done.summary["logit_error"] < 0.2
    again = run(plan(tmp_path, "replay"), small)
    np.testing.assert_array_equal(again.logits, done.logits)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["acc_pct"] == again.summary["acc_pct"]
    assert stored["n_rows"] == done.summary["n_rows"] > 6 * 9
    assert stored["engine"]["bench.rows"] == 128


def test_a_bench_that_fails_is_resumed_by_the_same_plan(small, tmp_path, monkeypatch):
    whole = run(plan(tmp_path / "whole"), small)
    broken = [False] * 2 + [True] * 99

    class Failing(FakeDriver):
        def __init__(self, *given, **more):
            super().__init__(*given, **more, timeouts=list(broken))

    monkeypatch.setattr(bench, "FakeDriver", Failing)
    with pytest.raises(BenchError, match="failed 3 times"):
        run(plan(tmp_path / "cut"), small)
    assert not (tmp_path / "cut" / "summary.json").exists()
    broken.clear()
    resumed = run(plan(tmp_path / "cut"), small)
    assert resumed.summary["n_rows"] == whole.summary["n_rows"]
    assert whole.summary["written_again"] == []
    assert not whole.layers["written_again"].any()
    assert resumed.summary["written_again"] == ["conv2"]  # of which the first reads were on record
    assert resumed.layers.set_index("layer")["written_again"].to_dict() == {"conv2": True, "fc": False}
    parts = sorted((tmp_path / "cut").glob("part_*"))
    repeated, replayed = (run(plan(tmp_path / "cut", engine), small) for engine in ("rehearsal", "replay"))
    assert repeated.summary["written_again"] == replayed.summary["written_again"] == ["conv2"]
    pd.testing.assert_frame_equal(repeated.layers, resumed.layers)
    pd.testing.assert_frame_equal(replayed.layers, resumed.layers)
    n_rows = whole.summary["n_rows"]
    assert (whole.summary["n_recorded"], whole.summary["n_measured"]) == (0, n_rows)
    assert 0 < resumed.summary["n_recorded"] == n_rows - resumed.summary["n_measured"] < n_rows
    assert (repeated.summary["n_recorded"], repeated.summary["n_measured"]) == (n_rows, 0)
    assert sorted((tmp_path / "cut").glob("part_*")) == parts, "nothing was measured, nothing is kept"


def test_counts_at_the_end_of_the_range_are_told_whenever_a_run_is_told(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "REHEARSAL", dataclasses.replace(bench.REHEARSAL, count_max=200))
    told = [run(plan(tmp_path, engine), small) for engine in ("rehearsal", "rehearsal", "replay")]
    first, again, replayed = (done.summary["n_saturated"] for done in told)
    assert first == again == replayed > 0


def test_a_record_is_gone_on_with_by_the_array_that_made_it_alone(small, tmp_path, monkeypatch):
    for identity, refused in (("chip 7", ""), ("chip 7", ""), ("chip 8", "identity was 'chip 7', here it is 'chip 8'")):
        monkeypatch.setattr(bench, "REHEARSAL", dataclasses.replace(bench.REHEARSAL, identity=identity))
        with pytest.raises(TraceError, match=f"{refused}; use an empty folder") if refused else nullcontext():
            run(plan(tmp_path), small)
    assert "identity" not in " ".join(HardwareEngine(FakeDriver(Limits(1, 1, 2, 1, 1, 1, 1, 1.0))).describe())
    with pytest.raises(CrossbarError, match="identity"):
        dataclasses.replace(bench.REHEARSAL, identity=7)


def test_a_run_names_the_layers_that_share_tiles(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "REHEARSAL", dataclasses.replace(bench.REHEARSAL, n_tiles=1))
    assert run(plan(tmp_path), small).summary["written_again"] == ["conv2", "fc"]


def test_too_few_images_to_calibrate_the_last_layer_are_refused_before_the_first_is_measured(small, tmp_path):
    with pytest.raises(CrossbarError, match="fc: gain and offset need 3 calibration rows, not 2"):
        run(plan(tmp_path, n_calib=2), small)
    assert not list(tmp_path.glob("part_*"))
    run(plan(tmp_path, n_calib=1, layers=("conv2",)), small)  # whose images have rows enough


def test_what_was_not_recorded_cannot_be_replayed(small, tmp_path):
    with pytest.raises(CrossbarError, match="holds no recorded run"):
        run(plan(tmp_path, "replay"), small)
    run(plan(tmp_path, "sim", n_test=2, record=True), small)
    with pytest.raises(TraceError, match="measured 0 times"):
        run(plan(tmp_path, "replay", n_test=4), small)
    with pytest.raises(TraceError, match="another engine"):
        run(plan(tmp_path, "sim", device="pcm", record=True), small)


def test_a_simulation_is_recorded_where_that_is_asked_for_and_comes_to_the_same(small, tmp_path):
    bare, kept = (run(plan(tmp_path / str(on), "sim", device="ideal", record=on), small) for on in (False, True))
    np.testing.assert_array_equal(bare.logits, kept.logits)
    assert (bare.summary["n_rows"], len(list((tmp_path / "False").iterdir()))) == (0, 2)
    assert kept.summary["n_rows"] > 6 * 9
    with pytest.raises(CrossbarError, match="holds the record of another run"):
        run(plan(tmp_path / "True", "sim", device="ideal"), small)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"engine": "hw"}, "engine 'hw': choose one of sim"), ({"n_test": 0}, "n_test"),
     ({"n_calib": -1}, "n_calib"), ({"engine": "tcp"}, "port")],
)  # fmt: skip
def test_plans_that_cannot_be_are_refused(tmp_path, change, message):
    with pytest.raises(CrossbarError, match=message):
        plan(tmp_path, **change)


@pytest.mark.parametrize(("code_max", "mode", "bits"), [(255, "analog", 1), (254, "serial", 7), (1, "serial", 1)])
def test_inputs_are_cut_to_what_the_bench_takes(code_max, mode, bits):
    found = drive_of(Limits(1, 1, 1, 1, code_max, 1, 1, 1.0))
    assert (found.mode, found.step_bits) == (mode, bits)
