"""The crossbar study: what it measures, that it resumes, that its tables and figures say what its rows say."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from integer_nets import float_net, noise_set, quantized
from matplotlib.collections import LineCollection

from hq_lib import data, graph
from hq_lib.crossbar import Adc, Circuit, EngineNetwork, IdealEngine, Mapping, SimEngine
from hq_lib.crossbar.calibration import norm_moments
from hq_lib.crossbar.profiles import IDEAL, PCM_NANDAKUMAR, RRAM_WAN_1S
from hq_lib.integer import lower
from hq_lib.integer import run as run_integers
from hq_lib.results import paths
from hq_lib.studies.bench import TRAINED
from hq_lib.studies.crossbar import figures, study, tables
from hq_lib.studies.crossbar.points import (
    ALL_OF_IT,
    CORRECTIONS,
    DAY_S,
    ONE_SCALE,
    PLANS,
    STUDIES,
    Place,
    by_rule,
    network_path,
    places,
)
from hq_lib.studies.study import StudyError, profile_rows

SMALL = ["no_error", "recovery", "budget", "sigma", "adc", "stuck", "drift"]


@pytest.fixture
def small(out_dir, monkeypatch):
    """A small network of the tests on random images in place of ResNet-20; layer names of its own."""
    model, random = lower(quantized("residual", "w8a8")), torch.Generator().manual_seed(0)
    test = noise_set(random, 20, "test")
    logits = EngineNetwork(model, IdealEngine()).run(data.normalize(test.images, test.spec))
    found = study.Integers(model, norm_moments(float_net("residual")), test, noise_set(random, 60, "train"), logits)
    monkeypatch.setattr(study, "open_integers", lambda *_: found)
    monkeypatch.setattr(study, "N_ROWS", 100)
    for module in (study, tables):
        monkeypatch.setattr(module, "LAYER", "conv1")
    return found


def run(studies, **more):
    return study.STUDY.run("smoke", studies=studies, n_calib=10, **more)


@pytest.mark.parametrize("profile", PLANS)
def test_every_profile_measures_every_study_and_correction(profile):
    todo = study.points(PLANS[profile])
    assert {p.what[0].study for p in todo} == set(STUDIES)
    assert {p.what[1] for p in todo} == set(CORRECTIONS)
    keys = [json.dumps(p.key, sort_keys=True) for p in todo]
    assert len(set(keys)) == len(keys)


def _run(plan):
    return study.Run("crossbar", "full", plan)


def test_full_meets_the_promised_protocol():
    plan = PLANS["full"]
    assert plan.n_test >= 1000
    assert plan.n_draws >= 3
    assert min(plan.times_s) == 20
    assert max(plan.times_s) == pytest.approx(10 * 365.25 * 86400, rel=0.001)
    assert {name.split("_")[2] for name in plan.networks} == {"w8a8", "w4a4", "w2a2"}


def test_percent_becomes_a_fraction_once():
    for place in places(study.STUDY.plan("full", studies=["sigma"])):
        error = place.circuit.device.error
        assert error is not None
        assert float(error.sigma(torch.tensor(25.0).double())) / 25 == pytest.approx(place.x / 100)
    for place in places(study.STUDY.plan("full", studies=["stuck"])):
        faults = place.circuit.faults
        assert faults.low_fraction + faults.high_fraction == pytest.approx(place.x / 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"studies": ["drfit"]}, r"'drfit'.*drift"),
     ({"networks": ["resnet20_pact_w4a4"]}, "resnet20_pact_w4a4_s0"),
     ({"networks": ["resnet20_float_s0"]}, "resnet20_float_s0.* float .*hq quantize")],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_nearest(changes, message):
    with pytest.raises(StudyError, match=message):
        places(study.STUDY.plan("smoke", **changes))


def test_committed_points_are_not_measured_again(monkeypatch):
    """Rows older than correlations, temperature and the two rules of read noise keep their identity."""
    monkeypatch.delenv("HQ_OUT", raising=False)
    old = ["no_error", "recovery", "budget", "sigma", "adc", "stuck", "drift"]
    places_left = [point.what[0] for point in study.STUDY.todo("full", studies=old)]
    reads = [place.circuit.device.read for place in places_left if place.effect != ONE_SCALE]
    assert all(read and read.per == "readout" for read in reads)
    assert study.COSTS.todo("full") == []


def test_rows_tell_the_two_rules_of_read_noise_apart():
    old, new = (study.circuit_settings(Circuit(by_rule(rule))) for rule in ("product", "readout"))
    assert by_rule("readout") == PCM_NANDAKUMAR
    assert set(new) - set(old) == {"device.read.per"}
    rows = pd.DataFrame({"switches": [json.dumps(old), json.dumps(new), "{}"]})
    assert tables.unpacked(rows)["rule"].tolist() == ["product", "readout", ""]


def test_a_run_resumes_and_measures_nothing_twice(small, monkeypatch):
    first = run(["no_error", "stuck"])
    monkeypatch.setattr(study, "EngineNetwork", lambda *_: pytest.fail("measured again"))
    assert run(["no_error", "stuck"]).equals(first)
    exact = tables.unpacked(first, "study", "correction").query("study == 'no_error' and correction == 'none'")
    assert set(exact.loc[exact["metric"] == "logit_error", "value"]) == {0.0}


def test_corrections_do_not_leak_into_each_other(small):
    plan = study.STUDY.plan("smoke", studies=["drift"], n_calib=10)
    todo = [point for point in study.points(plan) if point.what[0].t_s > 20]
    bench = study.open_arrays(_run(plan), todo[0].bench)
    assert bench is not None
    together = {p.what[1]: list(study.measure(_run(plan), bench, p)) for p in todo[:4]}
    alone = study.open_arrays(_run(plan), todo[1].bench)
    assert alone is not None
    assert list(study.measure(_run(plan), alone, todo[1])) == together[todo[1].what[1]]


def test_fitted_ranges_are_those_of_the_time_of_reading_whatever_was_measured_before(small):
    """Logits under each correction, alone on fresh arrays, after all others, and for "none" by hand."""
    plan, place = PLANS["smoke"], Place("budget", "all of it", 0, ALL_OF_IT, ("none", "column", "bn"), DAY_S)
    x = data.normalize(small.test.images, small.test.spec)

    def logits(bench, kind):
        study.correct(plan, bench, kind, 0, fitted=True)
        return bench.network.run(x)

    used = study.open_arrays(_run(plan), (place, 0))
    for kind in ("column", "bn", "none"):
        fresh = study.open_arrays(_run(plan), (place, 0))
        np.testing.assert_array_equal(logits(used, kind), logits(fresh, kind))
    aged = EngineNetwork(small.model, SimEngine(ALL_OF_IT))
    aged.set_time(DAY_S)
    aged.calibrate(small.calibration(plan.n_calib, 0), kind=None)
    np.testing.assert_array_equal(logits(used, "none"), aged.run(x))


def test_settings_name_the_device_and_what_differs():
    assert {key.split(".")[0] for key in study.circuit_settings(Circuit())} == {"device"}
    found = study.circuit_settings(ALL_OF_IT)
    assert found["adc.bits"] == 8
    assert found["faults.low_fraction"] == 0.001
    assert "seed" not in found
    json.dumps(found)


def test_tables_and_figures_follow_from_the_rows(small):
    rows, products = run(SMALL), study.PRODUCTS.run("smoke", n_calib=10)
    table = tables.budget_table(rows).set_index("effect")
    assert table.index[0] == tables.EXACT
    assert table.loc[tables.EXACT, "logit error"] == "0.000"
    assert set(table.loc["wires, 1 ohm per cell, 25 uS"]) == {"n/r"}
    exact = tables.exact_pct(rows)
    means = tables.means(rows, "drift")
    assert set(means.columns) == {20.0, 86400.0}
    assert len(means) == 8
    figures.fig_crossbar_accuracy(tables.accuracies(rows, "sigma", "adc", "stuck"), exact_pct=exact)
    drifted = tables.drift_points(rows)
    assert {"PCM", "RRAM"} == set(drifted["effect"])
    drawn = figures.fig_drift(drifted, exact_pct=exact, no_error=tables.no_error_pct(rows))
    for ax in drawn.axes:  # no level runs on into the labels at the ends of lines
        lines = [line for line in ax.collections if isinstance(line, LineCollection)]
        levels = [line.get_segments()[0] for line in lines if list(line.get_linewidth()) == [0.8]]
        assert levels
        assert max(ends[:, 0].max() for ends in levels) == pytest.approx(drifted["x"].max())
    assert len(drawn.axes) == 2
    figures.fig_mvm_scatter(tables.scatter_pairs(profile_rows(study.PAIRS, "smoke")))
    errors = tables.layer_errors(products)
    figures.fig_mvm_calibration(errors)
    by_panel: Any = errors.groupby(["panel", "correction"])["relative_error"].mean()
    for panel in study.panels(PLANS["smoke"]):
        assert by_panel[panel, "column"] < by_panel[panel, "none"]
    assert tables.products_table(products).loc[("PCM, 1 day", "none"), "slope"] < 0.8


def test_a_device_of_one_s_own_is_a_line_of_the_same_figures(small):
    """The shipped table, measured after a second and a day: it stands beside the built-in devices everywhere."""
    own = {"devices": [str(paths.ROOT / "data" / "devices" / "example.csv")]}
    rows = run(["no_error", "recovery", "budget", "drift"], **own)
    products = study.PRODUCTS.run("smoke", n_calib=10, **own)
    assert tables.budget_table(rows).iloc[-1]["effect"] == "programming, example"
    drifted = tables.drift_points(rows)
    assert set(drifted.loc[drifted["effect"] == "example", "x"]) == {1.0, 86400.0}
    drawn = figures.fig_drift(drifted, exact_pct=tables.exact_pct(rows), no_error=tables.no_error_pct(rows))
    assert "plus signs: example" in drawn.axes[0].get_xlabel()
    assert set(tables.layer_errors(products)["panel"]) == set(study.panels(PLANS["smoke"])) | {"example"}
    error = tables.products_table(products)["relative_error"]
    assert 0 < error["example", "column"] < error["example", "none"]


def test_devices_are_told_by_their_window_and_error():
    """Wan's fit by hand: 0.348 uS idle and 1.098 uS full, of a window of 40 uS."""
    table = tables.device_table([RRAM_WAN_1S, PCM_NANDAKUMAR, IDEAL]).set_index("device")
    assert table.loc["rram", ["idle, %", "full, %"]].tolist() == [0.87, pytest.approx(2.74, abs=0.01)]
    assert table.loc["pcm_drift", ["with time", "read noise"]].tolist() == ["drifts", "once a readout"]
    assert table.loc["ideal", ["half way, %", "with time", "read noise"]].tolist() == [0.0, "-", "-"]


def test_costs_are_the_sums_over_layers(small):
    rows = study.COSTS.run("smoke")
    cost = study.total_cost(EngineNetwork(small.model, IdealEngine()), Circuit(adc=Adc(8)))
    conversions = sum(
        int(np.prod(small.model.tensors[op.output].shape)) * -(-op.weight[0].size // 128) for op in small.model.layers()
    )
    assert cost["n_conversions"] == conversions
    assert cost["n_cells"] == 2 * sum(op.weight.size for op in small.model.layers())
    table = tables.cost_table(rows).set_index("circuit")
    assert table.loc["analog input, pair, 128 rows", "conversions per image"] == f"{conversions:,}"


def test_slices_and_noise_aware_rows_become_tables(small):
    rows = run(["slices", "noise_aware", "no_error"], n_draws=2, networks=[], cell_bits=[1, 2, 4])
    table = tables.slices_table(rows)
    cells = [int(text.replace(",", "")) for text in table["cells"]]
    assert cells[0] == pytest.approx(7 / 4 * cells[1])  # seven bits of magnitude: seven slices of one bit, four of two
    assert cells[1] == 2 * cells[2]
    gains = tables.gain_of_noise(rows)
    assert set(gains["5 % in training", "count"]) == {2}
    through = gains["5 % through converters", "count"]
    assert set(through[through > 0].index.get_level_values("reading")) == {"6-bit converters"}
    drawn = figures.fig_noise_aware(tables.noise_aware_points(rows), exact_pct=tables.exact_pct(rows))
    assert [ax.get_title("left") for ax in drawn.axes[::2]] == [
        "ideal reading, correction: none",
        "6-bit converters, correction: none",
    ]


@pytest.mark.parametrize("name", TRAINED)
def test_shipped_trained_networks_on_perfect_cells_are_their_integers(name, cifar10_train):
    """W8A8, W4A4 and W2A2 from training: no converter, no error, so every logit is the integer network's."""
    model = lower(graph.load(network_path(name)))
    x = data.normalize(cifar10_train.images[:4], cifar10_train.spec)
    for circuit in (Circuit(IDEAL), Circuit(IDEAL, Mapping(cell_bits=2, subtract="digital"))):
        logits = EngineNetwork(model, SimEngine(circuit)).run(x)
        np.testing.assert_array_equal(logits, run_integers(model, x))


def test_two_networks_of_one_method_and_width_have_lines_of_their_own(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    rows = study.STUDY.rows("full")
    mine = rows.loc[(rows["method"] == "pact") & (rows["w_bits"] == 4) & rows["switches"].str.contains("_s0")]
    named = mine["switches"].str.replace("resnet20_pact_w4a4_s0", "mine")
    both = pd.concat([rows, mine.assign(value=mine["value"] / 2, switches=named)], ignore_index=True)
    for table in (tables.trained_table, tables.slices_table):
        before, after = table(rows), table(both)
        assert "network" not in before
        assert len(after) > len(before)
        kept = after.loc[after["network"] != "mine"].drop(columns="network")
        pd.testing.assert_frame_equal(kept.reset_index(drop=True), before)
    halved = after.query("network == 'mine'").set_index("bits of a cell")["acc, none"]
    whole = after.query("network == 'resnet20_pact_w4a4_s0'").set_index("bits of a cell")["acc, none"]
    assert halved.to_numpy() == pytest.approx(whole.to_numpy() / 2, abs=0.11)  # both are rounded to a tenth


def test_what_was_not_run_is_no_table(out_dir):
    rows = profile_rows("crossbar", "smoke")
    for table in (tables.trained_table(rows), tables.slices_table(rows), tables.gain_of_noise(rows)):
        assert table.empty


def test_a_frozen_network_file_goes_onto_arrays_as_the_trainable_one(tmp_path, cifar10_train):
    """Two bits from training, frozen to integers on their grids, as ``networks=[path]`` takes it."""
    trainable = network_path("resnet20_dsq_w2a2_s0")
    frozen = graph.save(graph.load(trainable), tmp_path / "frozen.safetensors", form="frozen")
    assert network_path(str(frozen)) == frozen
    x = data.normalize(cifar10_train.images[:2], cifar10_train.spec)
    first, second = (
        EngineNetwork(lower(graph.load(path)), SimEngine(Circuit(RRAM_WAN_1S, seed=1))).run(x)
        for path in (trainable, frozen)
    )
    np.testing.assert_array_equal(first, second)
    place = places(study.STUDY.plan("smoke", studies=["trained"], networks=[str(frozen)]))[0]
    named = study._named(place.net, place.circuit)
    assert (named["method"], named["w_bits"], named["switches"]["network"]) == ("dsq", 2, "frozen")


@pytest.mark.parametrize("draw", [figures.fig_mvm_scatter, figures.fig_mvm_calibration, figures.fig_drift])
def test_figures_refuse_rows_they_cannot_draw(draw):
    more = {"exact_pct": 90.0, "no_error": {}} if draw is figures.fig_drift else {}
    with pytest.raises(ValueError, match="needs the columns"):
        draw(pd.DataFrame({"panel": ["a"]}), **more)
