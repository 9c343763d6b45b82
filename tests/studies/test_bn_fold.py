"""The folding study: it measures what was folded, names what it has not, and its tables come from rows alone."""

import json

import pandas as pd
import pytest
import torch
from graph_nets import Tiny, trained_like
from torch import nn

from hq_lib import data
from hq_lib.deploy.c import CompilerError
from hq_lib.results import store
from hq_lib.studies.bench import Bench
from hq_lib.studies.bn_fold import study, tables
from hq_lib.studies.study import StudyError, profile_rows
from hq_lib.training import predict


def row(model, metric, value, statistics, **more):
    named = {"experiment": "bn_fold", "model": model, "dataset": "-", "method": "float", "metric": metric}
    return {**named, "value": value, "switches": {"statistics": statistics}, **more}


@pytest.fixture
def rows(out_dir):
    """One net with random and, later, trained statistics; one without batch norm; one that is random only."""
    both = [("rel_error_float64", 1e-15), ("rel_error_float32", 1e-7)]
    found = [row("toynet", m, v, "random") for m, v in both] + [row("vgg_small", m, 3 * v, "random") for m, v in both]
    judged = [*both, ("acc_pct", 80.0), ("folded_acc_pct", 80.0), ("n_flips", 0.0)]
    for model in ("toynet", "lenet"):
        found += [row(model, m, v, "trained", dataset="cifar10", n_test=9_000) for m, v in judged]
    store.append("bn_fold", found, profile="smoke")
    return study.STUDY.rows("smoke")


def test_a_trained_network_is_listed_as_trained_and_one_without_norms_as_that(rows):
    table = tables.fold_table(tables.shown(rows)).set_index("model")
    assert table["statistics"].to_dict() == {"LeNet": tables.NO_NORM, "ToyNet": "trained", "VGG-Small": "random"}
    assert table.loc["ToyNet", "test images"] == "9,000"
    assert table.loc["ToyNet", "changed"] == "0"
    assert set(table.loc["VGG-Small"].iloc[-6:]) == {tables.UNTRAINED}
    assert table.loc["ToyNet", "integers, norms kept, %"] == "n/r"


def test_the_worst_network_of_each_format_is_named(rows):
    found = tables.worst(rows).set_index("metric")
    assert found.loc["rel_error_float64", "largest"] == pytest.approx(3e-15, rel=1e-12)
    assert set(found["of"]) == {"vgg_small"}
    assert set(found["networks"]) == {3}


def test_the_spread_of_channels_by_hand():
    values = {("a", "before"): [1.0, 2.0], ("a", "after"): [1.0, 8.0], ("b", "before"): [1.0, 4.0],
              ("b", "after"): [2.0, 4.0]}  # fmt: skip
    lines = [
        {"layer": layer, "stage": stage, "channel": i, "max_abs": value}
        for (layer, stage), channels in values.items()
        for i, value in enumerate(channels)
    ]
    found = tables.spread(pd.DataFrame(lines))
    assert found["ratio"].to_dict() == {"a": 4.0, "b": 0.5}
    assert tables.grown(found).to_dict("records") == [
        {"layers": 2, "grew in": 1, "median": 2.25, "largest": 4.0, "in": "a"}
    ]


def test_nothing_run_is_nothing_shown(out_dir):
    ranges = tables.ranges(profile_rows(study.RANGES, "smoke"), "resnet20")
    assert ranges.empty
    assert tables.grown(tables.spread(ranges)).empty
    assert tables.fold_table(tables.shown(study.STUDY.rows("smoke"))).empty


def test_an_unknown_network_is_named_and_writes_nothing(out_dir):
    with pytest.raises(StudyError, match=r"'toinet'.*did you mean 'toynet'"):
        study.STUDY.run("smoke", models=["toinet"])
    assert study.STUDY.rows("smoke").empty


def test_random_statistics_show_an_error_and_an_exact_fold_has_none(out_dir, monkeypatch):
    rows = study.STUDY.run("smoke", models=["vgg_small"])
    assert rows.set_index("metric")["value"].lt(1e-4).all()
    assert [json.loads(text)["statistics"] for text in rows["switches"]] == ["random", "random"]
    real = study.fold_bn

    def wrong(net, x=None, **more):
        folded = real(net, x, **more)
        layer = next(m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
        with torch.no_grad():
            layer.bias.add_(0.1)
        return folded

    monkeypatch.setattr(study, "fold_bn", wrong)
    again = study.errors(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval(), torch.ones(1, 3, 2, 2))
    assert min(again.values()) > 1e-3


@pytest.mark.parametrize("has_compiler", [True, False])
def test_integers_decide_as_the_float_network_whether_norms_are_folded_or_kept(digits, monkeypatch, has_compiler):
    if not has_compiler:
        monkeypatch.setattr(study.export_c, "Runtime", lambda _: (_ for _ in ()).throw(CompilerError("none here")))
    net = trained_like(Tiny())
    train, test = (data.load("digits", split, n=100) for split in ("train", "test"))
    decided = predict(net, test).argmax(1)  # the float network's answers are the right ones
    bench = Bench(net, {"model": "tiny"}, train, train, data.ImageSet(test.images, decided, test.spec))
    found = study.in_integers(bench)
    assert list(found) == ["integers_acc_pct", "integers_kept_acc_pct"]
    assert min(found.values()) >= 90


def test_integers_of_a_network_that_is_folded_already_are_measured_alone(out_dir):
    """Rows of the fold from before there were integers stay, and only the new point is run."""
    fold, integers = study.STUDY.points(study.STUDY.plan("smoke", models=["resnet20"]))
    where = {key: fold.key[key] for key in ("model", "method", "metric", "switches")}
    store.append("bn_fold", [{"experiment": "bn_fold", "dataset": "cifar10", "value": 1e-15, **where}], profile="smoke")
    assert [point.name for point in study.STUDY.todo("smoke", models=["resnet20"])] == [integers.name]


def test_committed_rows_are_not_measured_again(monkeypatch):
    """Every point of profile full that has rows in the repository is known by its key."""
    monkeypatch.delenv("HQ_OUT", raising=False)
    have = set(study.STUDY.rows("full")["model"])
    left = {p.key["model"] for p in study.STUDY.todo("full") if p.key["switches"]["statistics"] == "random"}
    assert not left & have
