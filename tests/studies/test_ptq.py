"""The post-training study: recipes do what they say, points resume, tables and findings come from rows alone."""

import json

import numpy as np
import pytest
import torch
from graph_nets import Tiny, trained_like

from hq_lib import data
from hq_lib.graph import weight_layers
from hq_lib.quantizers import AdaRound, FixedGrid, FrozenWeight, aciq
from hq_lib.results import store
from hq_lib.studies.ptq import (
    aciq_mse,
)
from hq_lib.studies.ptq import (
    recipes as ptq_recipes,
)
from hq_lib.studies.ptq import (
    schedule as ptq_schedule,
)
from hq_lib.studies.ptq import (
    study as ptq_methods,
)
from hq_lib.studies.ptq import (
    tables as ptq_report,
)
from hq_lib.studies.ptq.figures import fig_aciq_mse, fig_error_accumulation
from hq_lib.studies.ptq.recipes import RECIPES
from hq_lib.studies.ptq.study import Point
from hq_lib.studies.selection.bench import Bench


@pytest.fixture
def bench(digits):
    """A small untrained net on the embedded digits."""
    torch.manual_seed(0)
    net = Tiny()
    net.fc = torch.nn.Linear(12, 10)
    return Bench("resnet20", trained_like(net), data.load("digits", "train"), data.load("digits", "val"),
                 data.load("digits", "test", n=50))  # fmt: skip


def test_a_short_budget_keeps_the_travel_of_the_rounding_logits():
    assert ptq_recipes.fast(500) == {"rounding_lr": 0.05, "beta_start": 8.0}
    assert ptq_recipes.fast(20_000)["rounding_lr"] == pytest.approx(1.25e-3)
    assert ptq_recipes.fast(0)["rounding_lr"] == 0.5
    assert RECIPES["qdrop_official"].config(500)["rounding_lr"] == 1e-3
    assert RECIPES["brecq_fisher"].config(500) == {"rounding_lr": 0.05, "beta_start": 8.0, "loss": "fisher_per_image"}
    assert RECIPES["minmax"].config(500) == {}
    assert ptq_schedule.settings({"travel": 25.0, "beta_start": 8.0}, 500) == ptq_recipes.fast(500)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_quantizes(name, bench):
    x = ptq_recipes.calibration(bench, 40, 0)
    qnet = ptq_recipes.quantized(bench.net, x, RECIPES[name], (4, 4), iterations=2, seed=0)
    kinds = {type(layer.weight_quantizer) for layer in weight_layers(qnet).values()}
    wanted = AdaRound if RECIPES[name].passes else FrozenWeight if RECIPES[name].corrected else FixedGrid
    assert kinds == {wanted}
    with torch.no_grad():
        assert torch.isfinite(qnet.eval()(x[:4])).all()


def test_calibration_images_are_drawn_by_the_seed_and_balanced(bench):
    a, b = (ptq_recipes.calibration(bench, 40, seed) for seed in (0, 1))
    assert a.shape == b.shape == (40, 3, 32, 32)
    assert not torch.equal(a, b)
    assert torch.equal(a, ptq_recipes.calibration(bench, 40, 0))
    assert len(ptq_recipes.calibration(bench, 10**6, 0)) == len(bench.train)
    assert len(ptq_recipes.calibration(bench, 5, 0)) == 5


def test_a_point_is_measured_once_and_keeps_its_errors(bench, out_dir, monkeypatch):
    point = Point("shipped", "qdrop", (4, 4), 1005)
    ptq_methods.measure(point, bench, "smoke")
    rows = store.read("ptq_methods", profile="smoke")
    assert set(rows["metric"]) == {"acc_pct", "loss", "calibration_cpu_s"}
    errors = store.read("ptq_errors", profile="smoke")
    positions = sorted(json.loads(switches)["position"] for switches in errors["switches"])
    assert positions == list(range(len(errors)))
    assert (errors["value"] > 0).all()
    monkeypatch.setattr(ptq_methods, "quantized", lambda *args, **kwargs: pytest.fail("measured again"))
    ptq_methods.measure(point, bench, "smoke")


def test_the_public_net_is_skipped_where_it_is_absent(bench, out_dir, monkeypatch, capsys):
    monkeypatch.setattr(ptq_methods.selection_bench, "open_bench", lambda *args, **kwargs: bench)
    monkeypatch.setattr(ptq_methods, "public_file", lambda: None)
    rows = ptq_methods.run("smoke", nets=["public", "shipped"], recipes=["minmax"], bits=[(4, 4)])
    assert "public: skipped, no resnet20_akamaster_9173.th" in capsys.readouterr().out
    assert set(rows["method"]) == {"float", "minmax"}


def test_nothing_is_reconstructed_at_8_bits(bench, out_dir, monkeypatch):
    monkeypatch.setattr(ptq_methods.selection_bench, "open_bench", lambda *args, **kwargs: bench)
    rows = ptq_methods.run("smoke", recipes=["minmax", "qdrop"], bits=[(8, 8)])
    assert set(rows["method"]) == {"float", "minmax"}


def test_schedules_are_compared_on_validation_images(bench, out_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(ptq_schedule, "open_net", lambda *args, **kwargs: bench)
    score = ptq_schedule.evaluate
    monkeypatch.setattr(ptq_schedule, "evaluate", lambda net, images: seen.append(images.split) or score(net, images))
    rows = ptq_schedule.run("smoke")
    assert all("val" in split for split in seen)
    assert json.loads(rows["switches"].iloc[0])["split"] == "val"
    assert ptq_schedule.summary(rows)["schedule"].tolist() == ["rate x iterations 25, beta_start 8"]


def fake_rows(values):
    return [
        {"experiment": "ptq_methods", "model": "resnet20", "dataset": "cifar10", "method": "float" if r == "float" else
         RECIPES[r].method, "w_bits": w, "a_bits": a, "seed": seed, "metric": "acc_pct", "value": value, "unit": "%",
         "n_test": 10_000, "n_calib": 1024, "switches": {"net": "public", "recipe": r}}
        for (r, w, a, seed), value in values.items()
    ]  # fmt: skip


def test_the_table_sets_ours_beside_the_official_codes_number(out_dir):
    values = {("float", 32, 32, -1): 91.73, ("qdrop", 2, 2, 1): 81.0, ("qdrop", 2, 2, 2): 82.0, ("minmax", 4, 4, 1): 79}
    store.append("ptq_methods", fake_rows(values), profile="full")
    table = ptq_report.table("full")
    assert not table.isna().any(axis=None)
    cell = table.loc[(table["bits"] == "W2A2") & (table["how"] == RECIPES["qdrop"].line)].iloc[0]
    assert cell["public ResNet-20"] == "81.50 ± 0.71 (n=2)"
    assert cell["public ResNet-20 published"] == "80.45"
    assert cell["public ResNet-20 gap"] == "+1.05"
    assert cell["ImageNet ResNet-18"] == "n/r"
    assert cell["ImageNet ResNet-18 published"].startswith("51.69")
    assert table["bits"].iloc[0] == "float"


def test_findings_name_the_gap_to_the_target(out_dir, monkeypatch):
    monkeypatch.setattr(ptq_report, "_clip_findings", lambda profile: [])
    values = {("float", 32, 32, -1): 91.73, ("qdrop", 2, 2, 1): 81.4, ("mse", 2, 2, 1): 15.0}
    store.append("ptq_methods", fake_rows(values), profile="full")
    text = "\n".join(ptq_report.findings("full"))
    assert "W2A2, best first: qdrop 81.40 (n=1), mse 15.00 (n=1)" in text
    assert "official code's 80.4 %: +1.00 points" in text


def test_constants_agree_with_the_published_decimals():
    table = ptq_report.constants_table()
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
    found = aciq_mse.errors((sample.relu() if relu else sample).float(), bits=bits, relu=relu)
    assert found["prior"] == "laplace"
    # the real signed grid holds 0, the integrated one lies symmetric: half a step apart
    assert found["mse_exact"] / found["mse_measured"] == pytest.approx(1, abs=0.02 if relu else 0.25)
    power = 1.0 if relu else 2.0
    clip = aciq.clip_ratio(bits, "laplace", relu=relu)
    assert found["mse_model"] * power == pytest.approx(aciq.noise_mse(clip, bits, "laplace", relu=relu), rel=0.03)


def test_figures_draw_what_they_are_given():
    rng = np.random.default_rng(0)
    clip = [
        {"tensor": tensor, "bits": bits, **{m: rng.uniform(0.01, 0.1) for m in aciq_mse.METRICS}}
        for tensor in ("activation", "weight")
        for bits in (2, 4)
    ]
    figure = fig_aciq_mse(aciq_mse.pd.DataFrame(clip))
    assert next(ax.get_title(loc="left") for ax in figure.axes) == "activations: noise model (paper)"
    errors = aciq_mse.pd.DataFrame([
        {"w_bits": 2.0, "a_bits": 2.0, "method": method, "position": p, "block": f"b{p}", "value": 0.1 * (p + 1)}
        for method in ("mse", "qdrop") for p in range(3)
    ])  # fmt: skip
    ax = fig_error_accumulation(errors).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["b0", "b1", "b2"]
    with pytest.raises(ValueError, match="no rows to draw"):
        fig_error_accumulation(errors.iloc[:0])
