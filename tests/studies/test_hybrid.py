"""Notebook 06's studies: the rule's cells, what a training hands over, KL by hand, tables and figures from rows."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from hq_lib import models
from hq_lib.graph import act_quantizers, set_quantization, weight_layers
from hq_lib.results import figures, store
from hq_lib.studies.bench import Bench
from hq_lib.studies.hybrid import cells as hybrid_cells
from hq_lib.studies.hybrid import study, tables
from hq_lib.studies.hybrid.cells import Cell
from hq_lib.studies.hybrid.figures import fig_assignment, fig_hybrid_bits, fig_layer_sensitivity, fig_pareto
from hq_lib.studies.study import Run, StudyError
from hq_lib.training import predict

# --- the hybrid rule -------------------------------------------------------------------------------------------------


def test_a_training_run_depends_on_the_trained_bits_alone():
    assert Cell(2, 8, 4).shared == Cell(2, 6, 4).shared == Cell(2, 32, 4)
    assert Cell(3, 2, 4).shared == Cell(3, 2, 4)
    assert not Cell(4, 8, 4).is_trained
    assert Cell(4, 4, 5).shared == Cell(4, 4, 5)
    assert Cell(2, 2, 0).shared == Cell(32, 32, 0)


def test_the_plan_of_cells():
    found = hybrid_cells.cells((2, 4, 8), trained_at_the_boundary=True)
    assert sum(cell.boundary == 0 for cell in found) == 9
    hybrid = [cell for cell in found if cell.boundary == 4]
    assert len(hybrid) == 5
    assert len({cell.training for cell in hybrid}) == 3
    names = [cell.training for cell in hybrid]
    assert names == sorted(names, key=names.index)  # cells of one run adjoin
    assert found[-1] == Cell(4, 4, 5)


@pytest.fixture(scope="module")
def stage(digits):
    torch.manual_seed(3)
    net = models.build("resnet20").eval()
    return Bench(
        net,
        {"model": "resnet20"},
        digits.subset(range(200)),
        digits.subset(range(200, 260)),
        digits.subset(range(260, 320)),
    )


@pytest.fixture(scope="module")
def trained(stage, tmp_path_factory):
    return hybrid_cells.train(Cell(2, 8, 4), stage, tmp_path_factory.mktemp("run"), n_calib=16, n_train=128).eval()


def test_what_is_trained_is_taken_over_and_the_rest_is_calibrated(stage, trained):
    cell = Cell(2, 8, 4)
    qnet = hybrid_cells.finished(cell, stage, 16, trained)
    for name, layer in weight_layers(qnet).items():
        theirs = weight_layers(trained)[name]
        assert torch.equal(layer.weight, theirs.weight)
        if layer.weight_quantizer.bits == 2:
            assert layer.weight_quantizer.method == "dsq"
            assert torch.equal(layer.weight_quantizer(layer.weight), theirs.weight_quantizer(theirs.weight))
    bits = [quantizer.bits for quantizer in act_quantizers(qnet).values()]
    assert set(bits) == {8}
    assert all(quantizer.initialised for quantizer in act_quantizers(qnet).values())


def test_with_the_calibrated_part_off_the_cell_is_the_trained_net(stage, trained):
    cell = Cell(2, 8, 4)
    qnet = cell.quantized(stage, stage.calibration(2, 0)).eval()
    hybrid_cells.take_over(qnet, trained)
    for net in (qnet, trained):
        set_quantization(net, weights=False, acts=False, only=hybrid_cells.is_late(net))
    torch.testing.assert_close(predict(qnet, stage.val), predict(trained, stage.val))


def test_a_net_of_other_bits_cannot_be_taken_over(stage, trained):
    for other in (Cell(3, 8, 4), Cell(2, 2, 4)):
        with pytest.raises(RuntimeError, match="does not fit"):
            hybrid_cells.take_over(other.quantized(stage, stage.calibration(2, 0)), trained)


def map_rows():
    switch = '{{"boundary":{},"lr":0.01}}'.format
    cells = [(2, 2, 0, 15.0), (2, 4, 0, 40.0), (4, 2, 0, 50.0), (4, 4, 0, 89.0),
             (2, 2, 4, 80.0), (2, 4, 4, 85.0), (4, 2, 4, 49.0), (4, 4, 5, 89.5)]  # fmt: skip
    return pd.DataFrame([{"w_bits": w, "a_bits": a, "switches": switch(at), "value": v} for w, a, at, v in cells])


def test_the_map_takes_calibration_where_nothing_is_trained():
    table = tables.map_table(map_rows()).set_index(["w_bits", "a_bits"])
    assert table.loc[(2, 2)].to_dict() == {"calibrated": 15.0, "hybrid": 80.0}
    assert table.loc[(4, 4)].to_dict() == {"calibrated": 89.0, "hybrid": 89.0}


def test_a_map_of_many_bits_claims_nothing_of_a_training():
    low, high = map_rows(), map_rows().query("w_bits == 4 and a_bits == 4 and value == 89")
    assert tables.map_claim(tables.map_table(low)).startswith("Training the tensors below four bits")
    assert "trains nothing" in tables.map_claim(tables.map_table(high))


def test_the_gains_of_a_map_end_with_what_was_trained_at_the_boundary():
    found = tables.map_gains(map_rows())
    assert found["gain"].tolist() == [-1.0, 45.0, 65.0, 0.5]  # W4A2, W2A4, W2A2; last W4A4, trained as briefly
    assert len(tables.map_gains(map_rows().iloc[:-1])) == 3


# --- sensitivities and assignments -----------------------------------------------------------------------------------


def test_differences_by_hand():
    truth = torch.log(torch.tensor([[0.5, 0.5], [0.8, 0.2]]))
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.8, 0.2]])) + 3.0  # a shift of all logits changes nothing
    found = study.differences(logits, truth, torch.tensor([0, 0]))
    kl = 0.5 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert found["kl"] == pytest.approx(kl, rel=1e-6)
    assert found["loss_rise"] == pytest.approx(0.5 * math.log(0.5 / 0.25), rel=1e-6)
    assert found["acc_drop_pp"] == pytest.approx(50.0)


def test_the_factor_of_a_bit():
    kl = {2: 1.6, 3: 0.4, 4: 0.1, 8: 0.1 / 4**4}
    known = pd.DataFrame([{"kind": "weight", "name": "a", "bits": b, "kl": v} for b, v in kl.items()])
    found = tables.slopes(known)
    assert found["bits"].tolist() == [2, 3, 4]
    np.testing.assert_allclose(found["factor"], 4.0)


def points():
    rows = []
    for budget, search, bits, seed, acc, kl in (
        ("size", "uniform", 3, 0, 85.0, 0.20), ("size", "uniform", 3, 1, 86.0, 0.19),
        ("size", "optimal", 3, 0, 88.0, 0.09), ("size", "optimal", 3, 1, 89.0, 0.08),
        ("size", "at_random", 3, 0, 40.0, 2.0), ("size", "uniform", 5, 0, 91.0, 0.01),
        ("bop", "uniform", 3, 0, 80.0, 0.30), ("bop", "optimal", 3, 0, 87.0, 0.1), ("bop", "ends_8", 3, 0, 84.0, 0.2),
        ("bop", "greedy", 3, 0, np.nan, np.nan), ("size", "greedy", 3, 0, np.nan, np.nan),
    ):  # fmt: skip
        rows.append({
            "budget": budget, "search": search, "equivalent": float(bits), "seed": seed, "acc_pct": acc, "kl": kl,
            "predicted_kl": 0.1 if np.isnan(kl) else 0.8 * kl, "size_KiB": 33.0 * bits, "bops": 4e7 * bits**2,
        })  # fmt: skip
    return pd.DataFrame(rows)


def test_gains_pair_equal_budgets():
    table = tables.gains(points()).set_index(["budget", "equivalent", "search"])
    assert table.loc[("size", 3.0, "uniform")].to_dict() == pytest.approx(
        {"mean": 85.5, "sd": math.sqrt(0.5), "n": 2, "gain": 3.0}
    )
    assert table.loc[("bop", 3.0, "uniform"), "gain"] == pytest.approx(7.0)
    assert np.isnan(table.loc[("size", 5.0, "uniform"), "gain"])  # no optimum at that budget
    assert ("bop", 3.0, "greedy") not in table.index


def test_additivity_is_stated_on_both_sides_of_its_limit():
    found = tables.additivity(points())
    assert found["nets"].sum() == 2 * 9
    assert found[["median", "least", "largest"]].to_numpy() == pytest.approx(1.25)
    assert found["Spearman"].to_numpy() == pytest.approx(1.0)
    same = points().assign(kl=0.2, predicted_kl=0.2)
    assert tables.additivity(same)["Spearman"].isna().all()  # without a warning


def test_searches_keep_their_budgets_and_name_every_tensor():
    names = study.tensors()
    assert len(names) == 42
    assert set(study.ENDS) <= set(names)
    plan = study.PLANS["full"]
    rng = np.random.default_rng(0)
    losses = {t: {b: float(rng.lognormal()) * 4.0**-b for b in plan.bits} for t in names}
    wanted = [p for p in study.search_points(plan) if p["search"] and p["seed"] == 0]
    for point in wanted:
        how = {name: point[name] for name in ("search", "budget", "equivalent", "seed")}
        found, cost = study.searched(losses, **how), study._costs()[point["budget"]]
        if point["search"] != "ends_8":
            assert found.cost <= cost.everywhere(point["equivalent"]) * (1 + 1e-6)
        assert len(found.bits) == (22 if point["budget"] == "size" else 42)
    assert {p["search"] for p in wanted} == {"optimal", "greedy", "uniform", "ends_8", "at_random"}
    assert study.averages(dict.fromkeys(names, 3)) == pytest.approx({"w_bits": 3.0, "a_bits": 3.0})


@pytest.mark.parametrize("others", [False, True])
def test_a_search_without_sensitivities_of_its_network_says_what_to_run(others, out_dir):
    """Those of an earlier float network are none: they would search for the bits of a network that is not there."""
    run = Run("bit_allocation", "smoke", study.PLANS["smoke"])
    for point in study.sensitivity_points(run.plan) if others else []:
        row = {**point.key, "dataset": "cifar10", "metric": "kl", "value": 1.0}
        row["switches"] = {**row["switches"], "net": "0123abcd"}
        store.append(study.SENSITIVITY, [row], profile="smoke")
    with pytest.raises(StudyError, match="hq study layer_sensitivity --profile smoke"):
        next(study.measure_search(run, None, study.search_points(run.plan)[-1]))


def test_what_the_reference_has_is_not_measured_again(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    assert [s.name for s in study.STUDIES if s.todo("full")] == []


# --- figures ---------------------------------------------------------------------------------------------------------


def sensitivities():
    return pd.DataFrame([
        {"kind": kind, "name": f"layer{i}", "bits": b, "kl": (i + 1) * 4.0**-b if b < 8 else 0.0}
        for kind in ("weight", "act") for i in range(4) for b in (2, 4, 8)
    ])  # fmt: skip


FIGURES = {
    "fig_hybrid_bits": lambda: fig_hybrid_bits(tables.map_table(map_rows()), boundary=4),
    "fig_layer_sensitivity": lambda: fig_layer_sensitivity(sensitivities()),
    "fig_pareto": lambda: fig_pareto(points().dropna(subset=["acc_pct"]), float_acc_pct=91.3),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_byte_stable(name):
    assert figures.rendered(FIGURES[name](), "png") == figures.rendered(FIGURES[name](), "png")


def test_the_map_shows_accuracy_and_gain_with_many_bits_first():
    left, right, *_ = FIGURES["fig_hybrid_bits"]().axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["4", "2"]
    assert [t.get_text() for t in left.texts] == ["89.0", "49.0", "85.0", "80.0"]
    assert [t.get_text() for t in right.texts] == ["0.0", "-1.0", "45.0", "65.0"]
    step = left.get_lines()[0]
    np.testing.assert_array_equal(step.get_xydata(), [[-0.5, 0.5], [0.5, 0.5], [0.5, -0.5]])


def test_sensitivities_are_drawn_in_the_order_given():
    weights, acts = FIGURES["fig_layer_sensitivity"]().axes
    assert [t.get_text() for t in weights.get_xticklabels()] == [f"layer{i}" for i in range(4)]
    np.testing.assert_allclose(acts.get_lines()[0].get_ydata(), [(i + 1) / 16 for i in range(4)])
    np.testing.assert_allclose(acts.get_lines()[2].get_ydata(), 4.0**-4)  # zeros stand at the foot


def test_nets_below_the_window_stand_on_its_foot_with_their_accuracy():
    size, _, additivity, _ = FIGURES["fig_pareto"]().axes
    assert "40" in [t.get_text() for t in size.texts]
    assert size.get_ylim()[0] > 78
    assert additivity.get_xscale() == "log"


def test_accuracies_of_neighbours_on_the_foot_are_printed_apart():
    nets = points().dropna(subset=["acc_pct"])
    near = nets.loc[nets["acc_pct"] == 40].assign(search="ends_8", acc_pct=30.0, size_KiB=lambda f: f["size_KiB"] + 0.1)
    size = fig_pareto(pd.concat([nets, near]), float_acc_pct=91.3).axes[0]
    upper, lower = (next(t for t in size.texts if t.get_text() == text).get_window_extent() for text in ("30", "40"))
    assert not upper.overlaps(lower)


def test_an_assignment_is_drawn_weight_by_weight():
    ax = fig_assignment({"weight conv1": 8, "weight layer1.0.conv1": 3}).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [8, 3]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["conv1", "layer1.0.conv1"]
    known = pd.DataFrame({"tensor": ["weight b", "weight b", "act a"], "bits": [2, 4, 2], "kl": [0.5, 0.1, 0.2]})
    assert tables.losses(known) == {"weight b": {2: 0.5, 4: 0.1}, "act a": {2: 0.2}}


def test_figures_name_what_is_missing():
    with pytest.raises(ValueError, match=r"fig_hybrid_bits.*missing: hybrid"):
        fig_hybrid_bits(pd.DataFrame({"w_bits": [2], "a_bits": [2], "calibrated": [1.0]}), boundary=4)
    with pytest.raises(ValueError, match=r"missing: kl"):
        fig_layer_sensitivity(sensitivities().drop(columns="kl"))
    with pytest.raises(ValueError, match=r"cannot draw greedy"):
        fig_pareto(points().fillna(1.0))
