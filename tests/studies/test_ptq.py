"""The post-training study: recipes do what they say, points resume, tables and findings come from rows alone."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from graph_nets import Tiny, trained_like

from hq_lib import data
from hq_lib.graph import weight_layers
from hq_lib.quantizers import AdaRound, FixedGrid, FrozenWeight, aciq
from hq_lib.results import store
from hq_lib.studies.bench import Bench, net_switch, newest, pictures_switch
from hq_lib.studies.ptq import recipes, study, tables
from hq_lib.studies.ptq.figures import fig_aciq_mse, fig_clip, fig_error_accumulation
from hq_lib.studies.ptq.recipes import CHOSEN, RECIPES
from hq_lib.studies.study import StudyError, profile_rows


@pytest.fixture
def bench(digits):
    """A small untrained net on the embedded digits."""
    torch.manual_seed(0)
    net = Tiny()
    net.fc = torch.nn.Linear(12, 10)
    parts = (data.load("digits", split, n=n) for split, n in (("train", None), ("val", None), ("test", 50)))
    return Bench(trained_like(net), {"model": "resnet20", "dataset": "cifar10"}, *parts)


@pytest.fixture
def at_hand(bench, monkeypatch):
    """The study's shipped network is the small one."""
    real = study.open_bench
    small = lambda name, **how: bench if name == "resnet20" else real(name, **how)  # noqa: E731
    monkeypatch.setattr(study, "open_bench", small)


def test_a_short_budget_keeps_the_travel_of_the_rounding_logits():
    assert recipes.rated(CHOSEN, 500) == {"rounding_lr": 0.05, "beta_start": 8.0}
    assert recipes.rated(CHOSEN, 20_000)["rounding_lr"] == pytest.approx(1.25e-3)
    assert recipes.rated(CHOSEN, 0)["rounding_lr"] == 0.5
    assert RECIPES["qdrop_official"].config(500)["rounding_lr"] == 1e-3
    assert RECIPES["brecq_fisher"].config(500) == {"rounding_lr": 0.05, "beta_start": 8.0, "loss": "fisher_per_image"}
    assert RECIPES["minmax"].config(500) == {}


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_quantizes(name, bench):
    x = recipes.calibration(bench.train, 40, 0)
    settings = {key: value for key, value in RECIPES[name].settings.items() if key != "iterations"}
    short = dataclasses.replace(RECIPES[name], settings=settings)
    qnet = recipes.quantized(bench.net, x, short, (4, 4), iterations=2, seed=0)
    kinds = {type(layer.weight_quantizer) for layer in weight_layers(qnet).values()}
    wanted = AdaRound if RECIPES[name].passes else FrozenWeight if RECIPES[name].corrected else FixedGrid
    assert kinds == {wanted}
    with torch.no_grad():
        assert torch.isfinite(qnet.eval()(x[:4])).all()


def test_calibration_images_are_drawn_by_the_seed_and_balanced_or_too_few_are_refused(bench):
    a, b = (recipes.calibration(bench.train, 40, seed) for seed in (0, 1))
    assert a.shape == b.shape == (40, 3, 32, 32)
    assert not torch.equal(a, b)
    assert torch.equal(a, recipes.calibration(bench.train, 40, 0))
    assert len(recipes.calibration(bench.train, len(bench.train), 0)) == len(bench.train)
    assert len(recipes.calibration(bench.train, 5, 0)) == 5
    with pytest.raises(ValueError, match=r"n_calib is 1000000.*digits has"):
        recipes.calibration(bench.train, 10**6, 0)


def test_a_point_is_measured_once_and_keeps_its_errors(at_hand, out_dir, monkeypatch):
    rows = study.METHODS.run("smoke", recipes=["qdrop"])
    assert set(rows.loc[rows["method"] == "qdrop", "metric"]) == {"acc_pct", "loss", "calibration_cpu_s"}
    errors = profile_rows(study.ERRORS, "smoke")
    positions = sorted(json.loads(switches)["position"] for switches in errors["switches"])
    assert positions == list(range(len(errors)))
    assert (errors["value"] > 0).all()
    monkeypatch.setattr(study.recipes, "quantized", lambda *args, **kwargs: pytest.fail("measured again"))
    study.METHODS.run("smoke", recipes=["qdrop"])
    assert len(study.METHODS.todo("smoke", recipes=["qdrop"], iterations=3)) == 1


def test_a_network_that_is_absent_is_not_run_and_an_unknown_one_writes_nothing(at_hand, out_dir, monkeypatch, capsys):
    monkeypatch.setattr(study, "public_weights", lambda file: None)
    rows = study.METHODS.run("smoke", nets=["public"], recipes=["minmax"])
    assert rows.empty
    assert "no resnet20_akamaster_9173.th" in capsys.readouterr().out
    for wrong in ({"nets": ["resnet19"]}, {"recipes": ["qdrp"]}):
        with pytest.raises(StudyError, match=r"(network .*'resnet19'|recipe .*'qdrp').*choose one of"):
            study.METHODS.run("smoke", **wrong)
    with pytest.raises(FileNotFoundError, match=r"image folder .*nosuch does not exist"):
        study.METHODS.run("smoke", nets=["resnet18"], root="nosuch")
    assert study.METHODS.rows("smoke").empty


def test_a_recipe_may_have_a_budget_of_its_own_and_the_row_says_so():
    plan = study.METHODS.plan("full", nets=["public"], recipes=["qdrop", "qdrop_2000"], bits=[[2, 2]], seeds=[1005])
    keys = [point.key for point in study.points(plan)[1:]]
    assert [(key["iterations"], RECIPES[key["switches"]["recipe"]].config(500).get("iterations")) for key in keys] == [
        (500, None), (2000, 2000)
    ]  # fmt: skip


def test_nothing_is_reconstructed_at_8_bits():
    plan = study.METHODS.plan("smoke", recipes=["minmax", "qdrop"], bits=[[8, 8], [4, 8]])
    assert [p.name for p in study.points(plan)] == [
        "shipped_float", "shipped_minmax_w8a8_s1005", "shipped_minmax_w4a8_s1005", "shipped_qdrop_w4a8_s1005"
    ]  # fmt: skip


def test_schedules_are_compared_on_validation_images(at_hand, out_dir, monkeypatch):
    seen, score = [], study.evaluate
    monkeypatch.setattr(study, "evaluate", lambda net, images: seen.append(images.split) or score(net, images))
    rows = study.SCHEDULE.run("smoke")
    assert seen == ["val"]
    assert json.loads(rows["switches"].iloc[0])["split"] == "val"
    assert tables.schedules(rows)["schedule"].tolist() == ["rate x iterations 25, beta_start 8"]


@pytest.mark.parametrize("name", ["METHODS", "SCHEDULE", "ACIQ"])
def test_committed_rows_are_not_measured_again(name, monkeypatch):
    """No point of profile full that has rows in the repository is listed."""
    monkeypatch.delenv("HQ_OUT", raising=False)
    one = getattr(study, name)
    have = one.rows("full").query("model == 'resnet20' and metric == 'acc_pct'")
    by_hand = have["switches"].str.contains("|".join(f'"recipe":"{name}"' for name in study.LIKE_OFFICIAL))
    planned = have.loc[~by_hand & ~((have["w_bits"] == 4) & (have["a_bits"] == 8))]  # W4A8 is no width of the plan
    on = planned["switches"].map(json.loads).map(lambda s: s["net"] == study.PUBLIC or s.get("checkpoint"))
    planned = planned.loc[on.isin([True, net_switch("resnet20").get("net")])]  # none of a network not committed yet
    done = len(one.points(one.plan("full"))) - len(one.todo("full"))
    assert done == (len(planned) if name != "ACIQ" else 4)


def fake_rows(values):
    return [
        {"experiment": "ptq_methods", "model": "resnet20", "dataset": "cifar10", "method": "float" if r == "float" else
         RECIPES[r].method, "w_bits": w, "a_bits": a, "seed": seed, "metric": "acc_pct", "value": value, "unit": "%",
         "n_test": 10_000, "n_calib": 1024, "switches": {"net": "public", "recipe": r}}
        for (r, w, a, seed), value in values.items()
    ]  # fmt: skip


def test_ours_stand_beside_the_official_code_at_its_own_schedule_alone(out_dir):
    values = {("float", 32, 32, -1): 91.73, ("qdrop_adapted", 2, 2, 1): 81.0, ("minmax", 4, 4, 1): 79}
    values |= {("qdrop_adapted", 2, 2, 2): 82.0, ("qdrop", 2, 2, 1): 83.0}
    rows = fake_rows(values)
    shipped = [{**row, "value": 10.0, "switches": {**row["switches"], "net": "shipped"}} for row in rows]
    store.append("ptq_methods", [*rows, *shipped], profile="full")
    mine, theirs = tables.by_table(study.METHODS.rows("full"))
    table = tables.official_table(theirs).set_index(["bits", "how"])
    line = table.loc[("W2A2", RECIPES["qdrop_adapted"].line)]
    assert line[["ours", "official", "gap"]].tolist() == ["81.50 ± 0.71 (n=2)", "80.45", "+1.05"]
    assert table.loc[("W4A4", "to nearest"), "gap"] == "+0.08"
    assert ("W2A2", RECIPES["qdrop"].line) not in table.index, "the official code was never run with this schedule"
    table = tables.methods_table(mine)
    assert not table.isna().any(axis=None)
    line = table.loc[(table["bits"] == "W2A2") & (table["method"] == "QDrop")]
    assert line["how"].tolist() == [RECIPES["qdrop"].line], "the other schedules have a table of their own"
    assert line[["public ResNet-20", "shipped ResNet-20"]].squeeze().tolist() == ["83.00 (n=1)", "10.00 (n=1)"]
    assert [name for name in table if "ResNet-18" in name] == ["ImageNet ResNet-18 published"]  # none of ours
    assert line["ImageNet ResNet-18 published"].squeeze().startswith("51.69")
    assert table["bits"].iloc[0] == "float"


def test_an_imagenet_network_that_was_measured_has_columns_beside_its_published_numbers(out_dir):
    rows = fake_rows({("float", 32, 32, -1): 91.73, ("qdrop", 4, 4, 1): 70.0})
    lite = [{**row, "model": "efficientnet_lite0", "dataset": "imagenet"} for row in rows]
    own = [{**row, "model": "resnet50", "dataset": "imagenet"} for row in rows]
    own = [{**row, "switches": {**row["switches"], "net": "shipped", "images": "imagenet"}} for row in own]
    lite = [{**row, "switches": {**row["switches"], "net": "shipped"}} for row in lite]
    better = [{**row, "value": 75.0, "switches": {**row["switches"], "images": "mine"}} for row in lite[1:]]
    store.append("ptq_methods", [*lite, *own, *better], profile="full")
    table = tables.methods_table(study.METHODS.rows("full")).set_index(["bits", "method"])
    line = table.loc[("W4A4", "QDrop")]
    assert line["ImageNet ResNet-50"] == "70.00 (n=1)"
    published = float(line["ImageNet ResNet-50 published"].split(" / ")[0])
    assert line["ImageNet ResNet-50 gap"] == f"{70 - published:+.2f}"
    assert line["ImageNet EfficientNet-Lite0"] == "75.00 (n=1)"  # a folder of one's own goes before the sample
    assert "ImageNet ResNet-18" not in table


def test_the_best_are_listed_beside_the_very_numbers_of_published_csv(out_dir):
    values = {("float", 32, 32, -1): 91.73, ("mse", 4, 4, 1): 90.0}
    values |= {("qdrop_adapted", 4, 4, 1): 91.4, ("qdrop_adapted", 2, 2, 1): 81.4}
    store.append("ptq_methods", fake_rows(values), profile="full")
    found = tables.best(study.METHODS.rows("full")).set_index(["bits", "recipe"])
    assert found.loc[("W4A4", "qdrop_adapted"), "official"] == 90.84
    assert found.loc[("W2A2", "qdrop_adapted"), "official"] == 80.45
    assert list(found.loc["W4A4"].index) == ["qdrop_adapted", "mse"]
    assert found["official"].max() <= 100


def test_the_claim_on_errors_says_what_the_rows_say(out_dir):
    rows = [
        {"experiment": "ptq_errors", "model": "resnet20", "dataset": "cifar10", "method": r, "w_bits": 4, "a_bits": 4,
         "seed": seed, "metric": "rel_error", "value": value, "unit": "1",
         "switches": {"net": "public", "recipe": r, "block": f"b{p}", "position": p}}
        for r, seed, ends in (("mse", 1, (0.1, 0.8)), ("qdrop", 1, (0.1, 0.2)), ("qdrop", 2, (0.1, 0.4)))
        for p, value in enumerate(ends)
    ]  # fmt: skip
    store.append("ptq_errors", rows, profile="full")
    found = tables.errors(profile_rows("ptq_errors", "full"), net="public ResNet-20", recipes=["mse", "qdrop"])
    said = tables.error_claim(found, "public ResNet-20")
    assert "38 % at W4A4" in said["claim"]  # 0.3 of 0.8
    assert said["note"] == "seeds of each method: QDrop 2 at W4A4; else 1"
    other = [{**rows[2], "switches": {**rows[2]["switches"], "recipe": "qdrop_official"}}]
    store.append("ptq_errors", other, profile="full")
    found = tables.errors(
        profile_rows("ptq_errors", "full"), net="public ResNet-20", recipes=["mse", "qdrop", "qdrop_official"]
    )
    assert set(found["name"]) == {"MSE ranges", "qdrop", "qdrop_official"}  # two of a method go by the recipes' names
    assert "qdrop 2 at W4A4" in tables.error_claim(found, "public ResNet-20")["note"]


def test_nothing_run_is_nothing_claimed(out_dir):
    rows, errors = study.METHODS.rows("smoke"), profile_rows(study.ERRORS, "smoke")
    assert tables.first_net(rows) == ""
    none = tables.errors(errors, net="", recipes=["qdrop"])
    assert none.empty
    assert "n/r" in tables.error_claim(none, "")["claim"]
    assert tables.best(rows).empty
    assert tables.schedules(study.SCHEDULE.rows("smoke")).empty
    assert tables.ratios(tables.aciq_table(study.ACIQ.rows("smoke"))).empty
    assert "n/r" in set(tables.methods_table(rows)["public ResNet-20"])
    assert set(tables.official_table(rows)["ours"]) == {"n/r"}
    assert "no test images" in tables.protocol(rows)["n"]


def test_constants_agree_with_the_published_decimals():
    table = tables.constants_table()
    assert len(table) == 32
    assert table["gap"].astype(float).abs().max() < 0.02
    four = table.loc[(table["prior"] == "Laplace") & (table["values"] == "signed") & (table["bits"] == 4)].iloc[0]
    assert four["closed form"] == "5.0286"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("relu", [False, True])
def test_the_exact_prediction_is_the_measured_error_of_its_own_prior(bits, relu):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(400_000, generator=generator, dtype=torch.float64) - 0.5
    sample = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    found = recipes.aciq_errors((sample.relu() if relu else sample).float(), bits=bits, relu=relu)
    assert found["prior"] == "laplace"
    # the real signed grid holds 0, the integrated one lies symmetric: half a step apart
    assert found["mse_exact"] / found["mse_measured"] == pytest.approx(1, abs=0.02 if relu else 0.25)
    power = 1.0 if relu else 2.0
    clip = aciq.clip_ratio(bits, "laplace", relu=relu)
    assert found["mse_model"] * power == pytest.approx(aciq.noise_mse(clip, bits, "laplace", relu=relu), rel=0.03)


def test_the_clip_by_hand_marks_the_published_ratio_and_as_many_levels_as_there_are():
    density, cost = fig_clip(alpha=5.0, bits=4).axes
    assert cost.get_title(loc="left") == "least at 5.03 b"  # ACIQ, Laplace, 4 bits
    (levels,) = [c for c in density.collections if len(c.get_paths()) == 16]
    places = [path.vertices[0, 0] for path in levels.get_paths()]
    assert max(places) == -min(places) == 5.0 - 5.0 / 16


def test_figures_draw_what_they_are_given():
    rng = np.random.default_rng(0)
    clip = [
        {"tensor": tensor, "bits": bits, **{m: rng.uniform(0.01, 0.1) for m in recipes.MSE}}
        for tensor in ("activation", "weight")
        for bits in (2, 4)
    ]
    figure = fig_aciq_mse(pd.DataFrame(clip))
    assert next(ax.get_title(loc="left") for ax in figure.axes) == "activations: noise model (paper)"
    each = pd.concat([pd.DataFrame(clip[:1]).assign(bits=bits) for bits in range(1, 9)])
    drawn = [(dots.get_facecolor().tobytes(), dots.get_paths()[0]) for dots in fig_aciq_mse(each).axes[0].collections]
    assert len({(color, path.vertices.tobytes()) for color, path in drawn}) == 8, "no two widths look alike"
    with pytest.raises(ValueError, match="too many to tell apart"):
        fig_aciq_mse(pd.concat([each, each.assign(bits=9)]))
    errors = pd.DataFrame([
        {"w_bits": 2.0, "a_bits": 2.0, "recipe": recipe, "method": recipe[:5], "name": recipe, "position": p,
         "block": f"b{p}", "value": 0.1 * k * (p + 1)}
        for k, recipe in enumerate(("brecq", "qdrop", "qdrop_official"), start=1) for p in range(3)
    ])  # fmt: skip
    ax = fig_error_accumulation(errors).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["b0", "b1", "b2"]
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([0.1, 0.2, 0.3])  # a line for each recipe
    brecq, qdrop, official = ax.lines
    assert qdrop.get_color() == official.get_color() != brecq.get_color()
    assert qdrop.get_linestyle() != official.get_linestyle()
    with pytest.raises(ValueError, match="no rows to draw"):
        fig_error_accumulation(errors.iloc[:0])


def test_rows_of_a_file_stand_on_what_is_at_its_path_now(monkeypatch, tmp_path, capsys):
    made = pd.DataFrame({"switches": [json.dumps({"network": "own", "file": digits}) for digits in ("aa", "bb")]})
    made = made.assign(model="resnet20", method="lsq", epochs=0, value=[1.0, 2.0])
    file = tmp_path / "own.safetensors"
    file.touch()
    monkeypatch.setattr(f"{newest.__module__}.record_of", lambda name: {"sha256": "bb" if name == str(file) else "cc"})
    assert newest(made, "them", networks=[str(file)])["value"].tolist() == [2.0]
    assert newest(made, "them")["value"].tolist() == []
    assert "several networks called own are left out" in capsys.readouterr().out
    assert newest(made.iloc[:1], "them")["value"].tolist() == [1.0]


def test_pictures_are_known_by_their_names_and_not_by_their_folders_alone(tmp_path):
    for place, name in (("a", "one"), ("b", "one"), ("c", "two")):
        for part in ("train", "val"):
            (tmp_path / place / "photos" / part / "cat").mkdir(parents=True)
            (tmp_path / place / "photos" / part / "cat" / f"{name}.png").touch()
    a, b, c = (pictures_switch(str(tmp_path / place / "photos")) for place in "abc")
    assert a == b
    assert a["images"] == c["images"] == "photos"
    assert a["pictures"] != c["pictures"]
    assert pictures_switch("") == {}
    with pytest.raises(FileNotFoundError, match="nosuch does not exist"):
        study.METHODS.todo("smoke", nets=["efficientnet_lite0"], root=str(tmp_path / "nosuch"))


def test_a_table_has_one_number_of_calibration_images_and_one_budget(out_dir):
    rows = fake_rows({("qdrop", 2, 2, 1): 80.0, ("qdrop_2000", 2, 2, 1): 82.0, ("mse", 2, 2, 1): 15.0})
    rows = [{**row, "iterations": {"qdrop_2000": 2000, "qdrop": 500}.get(row["switches"]["recipe"], 0)} for row in rows]
    other = [{**rows[0], "n_calib": 16}, {**rows[0], "iterations": 2}, {**rows[2], "n_calib": 16}]
    lite = [{**row, "model": "efficientnet_lite0", "switches": {**row["switches"], "net": "shipped"}} for row in other]
    store.append("ptq_methods", [*rows, *other, *lite], profile="full")
    every = study.METHODS.rows("full")
    kept = tables.of_plan(every, study.METHODS.plan("full"))
    assert len(every) == 9
    assert sorted(kept.loc[kept["model"] == "resnet20", "value"]) == [15.0, 80.0, 82.0]
    assert len(kept) == 6, "those of networks that the plan does not have stay as they are"
    few = tables.of_plan(every, study.METHODS.plan("full", n_calib=16))
    assert few.loc[few["model"] == "resnet20", "method"].tolist() == ["mse", "qdrop"]


def test_rows_of_another_network_wait_until_it_is_the_committed_one(monkeypatch, capsys):
    """Of a float network as of a quantized one's file: two trainings of one name are never in one cell."""
    settings = [
        {"net": "shipped"}, {"net": "shipped", "checkpoint": "0123abcd"}, {"net": "public"}, {"net": "0123abcd"}, {},
        {"network": "own", "file": "99"}, {"network": "own", "file": "0123abcd"},
        {"checkpoint": "net"}, {"checkpoint": "net", "net": "0123abcd"}, {},
    ]  # fmt: skip
    made = pd.DataFrame({"value": range(10), "switches": [json.dumps(s) for s in settings]})
    made = made.assign(model="resnet20", method=["mse"] * 7 + ["float"] * 3, epochs=[0] * 7 + [80] * 3)
    for digits, kept, told in (
        ("4d496ff8", [0, 2, 4, 7, 9], "several networks called own"),
        ("0123abcd", [1, 2, 3, 6, 8, 9], ""),
    ):
        monkeypatch.setattr(f"{newest.__module__}.record_of", lambda _, digits=digits: {"sha256": digits + "ff"})
        assert newest(made, "them")["value"].tolist() == kept
        said = capsys.readouterr().out
        assert (told in said) if told else not said
