"""Quantization-aware training: recipes, runs that resume, distillation, checkpoints, what the notebook shows."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from hq_lib.graph import act_quantizers
from hq_lib.models.checkpoints import read_checkpoint, write_checkpoint
from hq_lib.quantizers import act_quantizer
from hq_lib.results import paths, store
from hq_lib.results.tables import with_switches
from hq_lib.studies.bench import Bench, open_bench
from hq_lib.studies.float_training import study as float_training
from hq_lib.studies.qat import study as qat
from hq_lib.studies.qat import tables as qat_tables
from hq_lib.studies.qat.figures import fig_pact_alpha, fig_qat_bits
from hq_lib.studies.study import Run, profile_rows
from hq_lib.training import qat_recipe
from hq_lib.training.recipes import BY_BITS, METHODS, act_of


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_every_recipe_makes_the_network_it_says(method, bits):
    recipe = qat_recipe(method, bits, bits, "full", seed=7)
    assert (recipe.policy.weight.bits, recipe.policy.act.bits) == (bits, bits)
    quantizers = [like["method"] if isinstance(like, dict) else like for like in METHODS[method]]
    assert [recipe.policy.weight.method, recipe.policy.act.method] == quantizers
    assert recipe.config.seed == 7
    assert recipe.n_train is None
    assert recipe.config.epochs == BY_BITS[max(key for key in BY_BITS if key <= bits)].epochs


def test_the_groups_plan_has_both_forms_of_mpact_its_own_weights_and_six_bits():
    plan = qat.GROUP_PLANS["full"]
    assert {"dorefa_hw", "mpact", "mpact_fixed"} <= set(plan.methods)
    assert {(8, 8), (6, 6), (4, 4)} == set(plan.bits)
    learned, fixed = (act_of(name, 8, signed=True) for name in ("mpact", "mpact_fixed"))
    assert [len(list(quantizer.parameters())) for quantizer in (learned, fixed)] == [1, 0]
    assert float(fixed(torch.tensor([9.0]))) == pytest.approx(6.0), "the seed's clip, whatever the data"


def test_a_shipped_checkpoint_agrees_with_its_integers_once_biases_are_those_of_accumulators(out_dir, cifar10_train):
    rows = qat.INTEGERS.run("smoke")
    for _, own in rows.groupby("w_bits"):
        values = {json.loads(s).get("executor"): v for s, v in zip(own["switches"], own["value"], strict=True)}
        assert values["fake_quant, integer biases"] == pytest.approx(values["integers"], abs=2.0)  # one image of 50
        assert values[None] >= 98.0  # same class
    assert list(qat_tables.integers_table(rows)["bits"]) == ["W2A2", "W3A3", "W4A4", "W8A8"]
    assert not qat.INTEGERS.todo("smoke")


def test_every_shipped_network_was_judged_in_integers():
    judged = with_switches(profile_rows("qat_integers", "full"), "network")["network"]
    shipped = paths.checkpoints_dir().glob("resnet20_*_w*_s0.safetensors")
    assert sorted(set(judged)) == sorted(file.stem for file in shipped)


def test_networks_that_differ_in_single_layers_alone_are_judged_apart():
    rows = profile_rows("qat_integers", "full")
    mine = rows.loc[rows["method"] == "mpact"]
    named = mine["switches"].str.replace("resnet20_mpact_w8a8_s0", "resnet20_mpact_w8a8_s0_cfg-1")
    other = mine.assign(value=mine["value"] - 10, switches=named)
    table = qat_tables.integers_table(pd.concat([rows, other], ignore_index=True)).query("method == 'mPACT'")
    before = qat_tables.integers_table(rows)
    assert "network" not in before
    plain, listed = (table.loc[table["network"].str.endswith(end)].squeeze() for end in ("_s0", "_cfg-1"))
    assert plain.drop("network").tolist() == before.query("method == 'mPACT'").squeeze().tolist()
    assert float(listed["integers"]) == pytest.approx(float(plain["integers"]) - 10)


def test_what_is_left_in_float_has_no_quantizer_and_the_rest_has(out_dir, cifar10_train, monkeypatch):
    left, run = {}, Run("qat_untrained", "smoke", qat.untrained.STUDY.plan("smoke"))
    monkeypatch.setattr(
        qat.untrained, "evaluate", lambda net, _: seen.append(net) or SimpleNamespace(acc_pct=90.0, n=50)
    )
    for what in qat.untrained.IN_FLOAT:
        seen = []
        point = qat.untrained._point(run.plan, "resnet20", (8, 8), {"in_float": what})
        bench = qat.open_net(Run("qat", "smoke", qat.STUDY.plan("smoke")), "resnet20")
        assert [row["n_test"] for row in qat.untrained.measure(run, bench, point)] == [50]
        left[what] = {name.removesuffix("_act_quantizer") for name in act_quantizers(seen[0])}
    assert len(left["neither"]) == 32 - 9  # tensors of the network, without the last convolution of each block
    assert left["neither"] - left["branch outputs"] == {"layer2_0_shortcut_1", "layer3_0_shortcut_1"}
    assert len(left["neither"] - left["block inputs"]) == 1 + 8  # the stem, and every sum that a block reads
    assert left["both"] == left["branch outputs"] & left["block inputs"]


def test_an_unknown_method_or_profile_is_named():
    with pytest.raises(ValueError, match="did you mean 'pact'"):
        qat_recipe("pakt", 4, 4, "full")
    with pytest.raises(ValueError, match="quik"):
        qat_recipe("pact", 4, 4, "quik")


@pytest.mark.parametrize("field", [{"binary": ("dqs",)}, {"last": ("dqs",)}, {"spread": (("dqs", 4, 4),)}])
def test_a_list_of_methods_that_sorts_or_narrows_takes_known_ones_alone(field):
    with pytest.raises(ValueError, match="did you mean 'dsq'"):
        qat.points(replace(qat.PLANS["full"], **field))


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_bits_name_the_key(bits):
    with pytest.raises(ValueError, match=r"policy\.weight.*" + str(bits)):
        qat_recipe("lsq", bits, 4, "full")


def test_a_run_leaves_rows_and_is_not_run_twice(out_dir, cifar10_train, monkeypatch):
    rows = qat.STUDY.run("smoke", methods=["pact"], bits=[[4, 4]])
    mine = rows.loc[rows["method"] == "pact"]
    splits = {json.loads(s).get("split", "test"): v for s, v in zip(mine["switches"], mine["value"], strict=True)}
    assert set(splits) == {"test", "val", "start"}
    assert min(splits.values()) > 60  # from a float network of 91 %, four bits cannot be near chance
    clips = qat_tables.clip_curves(profile_rows(qat.CLIPS, "smoke"), qat.STUDY.plan("smoke"))
    assert sorted(set(clips["epoch"])) == [0, 1]
    assert clips["layer"].nunique() * 2 == len(clips)
    monkeypatch.setattr(qat, "fit", lambda *_, **__: pytest.fail("run again, though its rows and its folder are there"))
    assert qat.STUDY.run("smoke", methods=["pact"], bits=[[4, 4]])["value"].tolist() == rows["value"].tolist()
    table = qat_tables.methods_table(rows)
    line = table.loc[(table["bits"] == "W4A4") & (table["method"] == "PACT")].iloc[0]
    assert line["ours"] == f"{splits['test']:.2f} (n=1)"
    assert float(line["gap"]) == pytest.approx(splits["test"] - 91.7, abs=0.006)  # the paper's 91.7 is the best known
    (panel,) = (ax for ax in fig_pact_alpha(clips).axes if ax.lines)
    drawn = sorted(line.get_ydata().tolist() for line in panel.lines)
    assert drawn == sorted(own.sort_values("epoch")["alpha"].tolist() for _, own in clips.groupby("layer"))
    assert qat_tables.best(rows)["method"].tolist() == ["pact"]


def test_another_rate_or_length_is_another_run_and_only_the_plans_own_is_shown(out_dir):
    names = [qat.points(qat.STUDY.plan("quick", methods=["lsq"], bits=[[2, 2]], **changes))[1].name
             for changes in ({}, {"lr": 0.5}, {"lr": 0.25}, {"epochs": 3})]  # fmt: skip
    assert len({*names}) == 4
    plan = qat.STUDY.plan("quick", methods=["lsq"], bits=[[2, 2]])
    asked = qat.STUDY.plan("quick", methods=["lsq"], bits=[[2, 2]], lr=0.5)
    points = [qat.points(each)[1] for each in (plan, asked)]
    told = {"experiment": "qat", "dataset": "cifar10"}
    rows = [{**point.key, **told, "value": 80.0 + i} for i, point in enumerate(points)]
    store.append("qat", rows, profile="quick")
    every = qat.STUDY.rows("quick")
    assert [qat_tables.of_plan(every, each)["value"].tolist() for each in (plan, asked)] == [[80.0], [81.0]]


def test_runs_of_another_rate_network_or_width_of_activations_are_not_averaged(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    plan, clips = qat.STUDY.plan("full"), profile_rows(qat.CLIPS, "full")
    rated = [json.dumps({**json.loads(text), "lr": 0.5}) for text in clips["switches"]]
    both = pd.concat([clips, clips.assign(value=clips["value"] * 3, switches=rated)], ignore_index=True)
    before, after = (qat_tables.clip_curves(rows, plan)["alpha"].tolist() for rows in (clips, both))
    assert before == after
    faster = qat_tables.clip_curves(both, replace(plan, lr=0.5))["alpha"]
    assert faster.tolist() == pytest.approx([3 * alpha for alpha in before])

    rows = qat_tables.of_plan(profile_rows("qat", "full"), plan)
    theirs = rows.assign(model="toynet", value=rows["value"] - 20)
    found = qat_tables.calibrated_and_trained(pd.concat([rows, theirs], ignore_index=True))
    pd.testing.assert_frame_equal(found.loc["resnet20"], qat_tables.calibrated_and_trained(rows).loc["resnet20"])

    made = [("float", 32, 32, 92.0), ("lsq", 2, 2, 80.0), ("lsq", 4, 4, 90.0), ("lsq", 2, 4, 86.0)]
    ax = fig_qat_bits(pd.DataFrame(made, columns=["method", "w_bits", "a_bits", "value"])).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["W4A4", "W2A4", "W2A2"]
    assert [line.get_ydata().tolist() for line in ax.lines if line.get_label() == "LSQ"] == [[90.0, 86.0, 80.0]]


def test_a_run_from_another_checkpoint_does_not_go_on_from_the_first_ones_state(out_dir, cifar10_train, monkeypatch):
    folders = []

    def fit(net, train, val, config, folder, **_):
        folders.append(folder)
        raise RuntimeError("as far as it matters here")

    monkeypatch.setattr(qat, "fit", fit)
    for digits in ("8f3b316e", "0123abcd"):
        monkeypatch.setattr(
            qat, "open_bench", lambda *args, _digits=digits, **named: _with_record(open_bench(*args, **named), _digits)
        )
        with pytest.raises(RuntimeError, match="as far as"):
            qat.STUDY.run("smoke", methods=["pact"], bits=[[4, 4]], n_test=20, n_val=20)
    assert [folder.name for folder in folders] == ["resnet20_pact_w4a4_s0", "resnet20_pact_w4a4_s0_0123abcd"]


def test_a_finished_training_that_is_run_again_leaves_the_file_that_rows_name(out_dir, tmp_path):
    plan = float_training.STUDY.plan("smoke")
    run, point = Run("float_training", "smoke", plan), float_training.points(plan)[0]

    def digits(weight, commit):
        record = {"git_sha": commit}
        state = {"w": torch.tensor([weight])}
        float_training.keep(run, point, tmp_path, lambda path: write_checkpoint(path, state, record))
        found, told = read_checkpoint(float_training.checkpoint(run, point))
        assert found["w"].item() == weight, "the network that was trained, whatever the folder holds"
        return told["sha256"]

    first = digits(1.0, "first")
    assert digits(1.0, "second") == first
    assert digits(2.0, "third") != first  # trained anew in a folder that still holds the other


def _with_record(bench: Bench | None, digits: str) -> Bench:
    assert bench is not None
    return replace(bench, record={**bench.record, "sha256": f"{digits}ffff"})


def test_a_network_without_float_weights_is_skipped(out_dir, capsys):
    assert qat.STUDY.run("smoke", models=["resnet56"], methods=["lsq"]).empty
    assert "no float checkpoint" in capsys.readouterr().out


def test_configurations_have_rows_of_their_own_and_leave_the_other_tables_alone(out_dir, cifar10_train):
    rows = qat.STUDY.run("smoke", methods=["mpact"], bits=[], lists=["cfg-1"])
    mine = rows.loc[rows["method"] == "mpact"]
    assert {json.loads(text)["lists"] for text in mine["switches"]} == {"cfg-1"}
    assert set(mine["w_bits"]) == {8}
    value = mine.loc[~mine["switches"].str.contains("split"), "value"].item()
    assert value > 60
    line = qat_tables.lists_table(rows, "resnet20").query("method == 'mPACT'").iloc[0]
    assert line["ours"] == f"{value:.2f} (n=1)"
    assert set(qat_tables.scores(rows)["method"]) == {"float"}
    assert set(qat_tables.methods_table(rows).query("bits != 'float'")["ours"]) == {"n/r"}


def test_tables_list_what_was_not_run(out_dir):
    table = qat_tables.group_table(profile_rows("qat", "smoke"), "mobilenetv2_seed")
    assert set(table["ours"]) == {"n/r"}
    line = table.loc[(table["bits"] == "W4A4") & (table["method"] == "mPACT")].iloc[0]
    assert line["published"] == "93.33"


def test_methods_that_are_not_for_one_bit_are_left_out_there():
    full = qat.STUDY.points(qat.STUDY.plan("full", seeds=[0]))
    assert {p.key["method"] for p in full if p.key.get("w_bits") == 1} == {"dsq", "dorefa", "ste"}
    assert len({p.name for p in full}) == len(full)


def test_the_reference_spends_its_further_seeds_where_an_interval_is_asked():
    names = [p.name for p in qat.STUDY.points(qat.STUDY.plan("full", methods=("lsq", "ste"), bits=((2, 2), (3, 3))))]
    assert names == [
        "resnet20_float_w32a32_s0", "resnet20_lsq_w2a2_s0", "resnet20_lsq_w3a3_s0", "resnet20_lsq_w2a2_s1",
        "resnet20_lsq_w2a2_s2", "resnet20_ste_w2a2_s0", "resnet20_ste_w3a3_s0",
    ]  # fmt: skip


def test_seeds_that_are_given_are_the_seeds():
    chosen = {"methods": ["pact"], "bits": [[4, 4]]}
    for seeds in ([0], [3, 1]):
        found = qat.STUDY.points(qat.STUDY.plan("full", seeds=seeds, **chosen))
        assert [p.key["seed"] for p in found if p["method"] != "float"] == seeds


@pytest.mark.parametrize("profile", ["smoke", "quick", "full"])
def test_no_run_is_of_both_studies_which_would_write_one_checkpoint(profile):
    ours, theirs = ({p.name for p in one.points(one.plan(profile))} for one in (qat.STUDY, qat.GROUP_STUDY))
    assert not ours & theirs
    if profile == "full":  # what the group's table of ResNet-20 shows is planned by one or the other
        assert {f"resnet20_{m}_w{b}a{b}_s0" for m in ("pact", "mpact") for b in (8, 6, 4)} <= ours | theirs


def test_a_run_that_both_studies_have_is_one_number_in_the_group_s_tables():
    rows = profile_rows("qat", "full")
    shared = rows.loc[(rows["w_bits"] == 8) | (rows["method"] == "float")].assign(experiment="qat_group")
    none = rows.iloc[:0]
    alone, both = (qat_tables.together(rows, group, none) for group in (none, shared))
    pd.testing.assert_frame_equal(alone, both)
    table = qat_tables.group_table(qat_tables.together(none, shared, none), "resnet20")
    mine = qat_tables.scores(shared).query("method == 'pact' and w_bits == 8")["value"].item()
    assert table.loc[(table["bits"] == "W8A8") & (table["method"] == "PACT"), "ours"].tolist() == [f"{mine:.2f} (n=1)"]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.45])
def test_dsq_curve_has_the_published_slopes(alpha):
    curve = qat_tables.dsq_curves(alphas=[alpha], n=4001)
    inside = curve.loc[curve["x"].abs() < 0.999]
    peak = {0.05: 1.928, 0.2: 1.373}.get(alpha)  # c / (2 tanh(c / 2)) at a threshold
    if peak:
        assert inside["slope"].max() == pytest.approx(peak, abs=2e-3)
    assert curve.loc[curve["x"].abs() > 1.001, "slope"].abs().max() == 0
    levels = sorted(set(curve["hard"].round(6)))
    assert levels == pytest.approx([-1, -1 / 3, 1 / 3, 1], abs=1e-5)
    assert (curve["soft"] - curve["hard"]).abs().max() <= 1 / 3 + 1e-6


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_may_start_at_the_least_squared_error(bits, signed):
    x = torch.randn(4_000, generator=torch.Generator().manual_seed(bits))
    x = x if signed else x.relu()
    quantizer = act_quantizer("lsq", bits, signed=signed, init="least_error")
    quantizer.init_from(x)

    def error(step):
        return (step * (x / step).round().clamp(quantizer.qmin, quantizer.qmax) - x).square().mean()

    least = min(error(step) for step in torch.linspace(0.01, 1.5, 300) * x.abs().max())
    assert error(quantizer.grid().scale) <= 1.02 * least
    paper = act_quantizer("lsq", bits, signed=signed)
    paper.init_from(x)
    torch.testing.assert_close(paper.grid().scale, 2 * x.abs().mean() / quantizer.qmax**0.5)


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match=r"init of lsq 'mse'.*least_error"):
        act_quantizer("lsq", 4, signed=True, init="mse")


def test_the_group_s_tables_have_the_measured_float_network_and_integer_runs_apart():
    theirs = [profile_rows(name, "full") for name in ("qat", "qat_group", "float_reference")]
    rows = qat_tables.together(*theirs)
    for model, known in (("toynet", "82.46 (n=1)"), ("mobilenetv2_seed", "79.46 (n=1)"), ("resnet20", "92.23 (n=1)")):
        table = qat_tables.group_table(rows, model)
        assert table.loc[table["bits"] == "float", "ours"].tolist() == [known]
    table = qat_tables.group_table(rows, "toynet").query("bits == 'W8A8'").set_index("method")["published"]
    assert table["mPACT"] == "91.42 / 91.41"
    assert table["mPACT, in integers"] == "91.37 / 91.05 / 71.97 / 68.93"


def test_a_branch_that_was_not_run_is_n_r_and_no_number():
    row = {"experiment": "qat_untrained", "model": "resnet20", "method": "minmax", "w_bits": 8, "a_bits": 8,
           "metric": "acc_pct", "value": 91.2, "unit": "%", "switches": {"in_float": "neither"}}  # fmt: skip
    table = qat_tables.branches_table(pd.DataFrame([{**row, "switches": json.dumps(row["switches"])}]))
    assert table["in float: neither"].tolist() == ["91.20"]
    assert table["in float: both"].tolist() == ["n/r"]
