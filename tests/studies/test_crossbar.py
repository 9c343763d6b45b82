"""The crossbar study: what it measures, that it resumes, that its tables and figures say what its rows say."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from integer_nets import float_net, noise_set, quantized

from hq_lib import data
from hq_lib.crossbar import Circuit, EngineNetwork, IdealEngine
from hq_lib.crossbar.norms import norm_moments
from hq_lib.integer import lower
from hq_lib.results import store
from hq_lib.studies.crossbar import mvm as crossbar_mvm
from hq_lib.studies.crossbar import points as crossbar_points
from hq_lib.studies.crossbar import study
from hq_lib.studies.crossbar import tables as crossbar_report
from hq_lib.studies.crossbar.figures import fig_crossbar_accuracy, fig_drift, fig_mvm_calibration, fig_mvm_scatter
from hq_lib.studies.crossbar.points import CORRECTIONS, SIZES, STUDIES, Point, points


@pytest.fixture
def small(out_dir, monkeypatch):
    """A small network of the tests on random images in place of ResNet-20; layer names of its own."""
    model, random = lower(quantized("residual", "w8a8")), torch.Generator().manual_seed(0)

    test = noise_set(random, 20, "test")
    logits = EngineNetwork(model, IdealEngine()).run(data.normalize(test.images, test.spec))
    bench = study.CrossbarBench(
        model,
        norm_moments(float_net("residual")),
        test,
        noise_set(random, 60, "train"),
        logits,
        replace(SIZES["smoke"], n_calib=10),
    )
    for module in (study, crossbar_mvm):
        monkeypatch.setattr(module, "crossbar_bench", lambda *_, **__: bench)
    monkeypatch.setattr(crossbar_mvm, "LAYER", "conv1")
    monkeypatch.setattr(crossbar_mvm, "N_ROWS", 100)
    monkeypatch.setattr(crossbar_report, "LAYER", "conv1")
    return bench


@pytest.mark.parametrize("profile", SIZES)
def test_every_profile_measures_every_study_and_correction(profile):
    todo = points(profile)
    assert [p.study for p in todo] == sorted((p.study for p in todo), key=STUDIES.index)
    assert {p.study for p in todo} == set(STUDIES)
    assert {kind for p in todo for kind in p.corrections} == set(CORRECTIONS)
    places = [(p.study, p.effect, p.x, p.bits, kind) for p in todo for kind in p.corrections]
    assert len(set(places)) == len(places)


def test_full_meets_the_promised_protocol():
    size = SIZES["full"]
    assert size.n_test >= 1000
    assert size.n_draws >= 3
    assert min(size.times_s) == 20
    assert max(size.times_s) == pytest.approx(10 * 365.25 * 86400, rel=0.001)


def test_percent_becomes_a_fraction_once():
    for point in points("full", ("sigma",)):
        error = point.circuit.device.error
        assert error is not None
        at_top = float(error.sigma(torch.tensor(25.0).double())) / 25
        assert at_top == pytest.approx(point.x / 100)
    for point in points("full", ("stuck",)):
        assert point.circuit.faults.low_fraction + point.circuit.faults.high_fraction == pytest.approx(point.x / 100)


def test_unknown_studies_are_named():
    with pytest.raises(ValueError, match=r"'drfit'.*drift"):
        points("smoke", ("drfit",))


def test_a_run_resumes_and_measures_nothing_twice(small, monkeypatch):
    first = study.run("smoke", studies=["no_error", "stuck"])
    monkeypatch.setattr(study, "programmed", lambda *_: pytest.fail("measured again"))
    assert study.run("smoke", studies=["no_error", "stuck"]).equals(first)
    exact = study.study_rows("smoke", "no_error").query("metric == 'logit_error' and correction == 'none'")
    assert set(exact["value"]) == {0.0}


def test_one_missing_correction_is_measured_alone(small, monkeypatch):
    point = Point("stuck", "no fault map", 1.0, Circuit(), ("none", "column"))
    rows = study.measure(small, point, 0, "smoke")
    store.append(study.STUDY, [row for row in rows if row["switches"]["correction"] == "none"], profile="smoke")
    again = study.measure(small, point, 0, "smoke")
    assert {row["switches"]["correction"] for row in again} == {"column"}
    assert [row["value"] for row in again] == [r["value"] for r in rows if r["switches"]["correction"] == "column"]


def test_corrections_do_not_leak_into_each_other(small):
    point = points("smoke", ("drift",))[1]
    alone = study.measure(small, replace(point, corrections=("global",)), 0, "smoke")
    together = study.measure(small, point, 0, "smoke")
    assert [r["value"] for r in together if r["switches"]["correction"] == "global"] == [r["value"] for r in alone]


def test_settings_name_the_device_and_what_differs():
    assert {key.split(".")[0] for key in study.circuit_settings(Circuit())} == {"device"}
    found = study.circuit_settings(crossbar_points.ALL_OF_IT)
    assert found["adc.bits"] == 8
    assert found["faults.low_fraction"] == 0.001
    assert "seed" not in found
    json.dumps(found)


def test_tables_and_sentences_follow_from_the_rows(small):
    study.run("smoke")
    crossbar_mvm.run("smoke")
    table = crossbar_report.budget_table("smoke").set_index("effect")
    assert table.index[0] == crossbar_report.EXACT
    assert table.loc[crossbar_report.EXACT, "logit error"] == "0.000"
    assert set(table.loc["wires, 1 ohm per cell, 25 uS"]) == {"n/r"}
    lines = crossbar_report.findings("smoke")
    assert any("within 3 points" in line for line in lines)
    exact = crossbar_report.exact_pct("smoke")
    points = crossbar_report.accuracy_rows("smoke", "sigma", "adc", "stuck")
    fig_crossbar_accuracy(points, exact_pct=exact)
    drifted = crossbar_report.drift_points("smoke")
    assert {"PCM", "RRAM"} == set(drifted["effect"])
    fig_drift(drifted, exact_pct=exact, no_error=crossbar_report.no_error_pct("smoke"))
    fig_mvm_scatter(crossbar_report.scatter_pairs("smoke"))
    fig_mvm_calibration(crossbar_report.layer_errors("smoke"))
    assert "profile smoke" in crossbar_report.caption("x", "smoke", points)


def test_calibration_lowers_the_error_of_dot_products(small):
    crossbar_mvm.run("smoke")
    table: Any = crossbar_report.layer_errors("smoke").groupby(["panel", "correction"])["relative_error"].mean()
    for panel in crossbar_mvm.PANELS:
        assert table[panel.label, "column"] < table[panel.label, "none"]


def test_costs_are_the_sums_over_layers(small):
    crossbar_mvm.run("smoke")
    cost = crossbar_mvm.total_cost(EngineNetwork(small.model, IdealEngine()), Circuit(adc=crossbar_mvm.Adc(8)))
    conversions = sum(
        int(np.prod(small.model.tensors[op.output].shape)) * -(-op.weight[0].size // 128) for op in small.model.layers()
    )
    assert cost["n_conversions"] == (conversions, "count")
    assert cost["n_cells"] == (2 * sum(op.weight.size for op in small.model.layers()), "count")
    table = crossbar_report.cost_table("smoke").set_index("circuit")
    assert table.loc["analog input, pair, 128 rows", "conversions per image"] == f"{conversions:,}"


@pytest.mark.parametrize("draw", [fig_mvm_scatter, fig_mvm_calibration])
def test_figures_refuse_rows_they_cannot_draw(draw):
    with pytest.raises(ValueError, match="needs the columns"):
        draw(pd.DataFrame({"panel": ["a"]}))
