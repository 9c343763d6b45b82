"""Figures: the drawn numbers, equal bytes, nothing left behind in matplotlib, and colours that survive grey."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from hq_lib.results import figures
from hq_lib.results.figures import marks, methods, style
from hq_lib.studies.bn_fold import figures as bn_fold
from hq_lib.studies.bn_fold.figures import fig_bn_ranges
from hq_lib.studies.float_training.figures import fig_float_training


def history(models=("resnet20", "toynet"), n_seeds=3, n_epochs=8):
    random = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "model": m, "seed": s, "epoch": e, "train_loss": 2.0 / (e + 1) + random.uniform(0, 0.1),
                "val_acc_pct": 90 - 40 / (e + 1) + random.normal(), "lr": 0.1 * 0.5**e,
            }
            for m in models for s in range(n_seeds) for e in range(n_epochs)
        ]
    )  # fmt: skip


def ranges(n_layers=4, n_channels=9):
    random = np.random.default_rng(1)
    return pd.DataFrame(
        [
            {"layer": f"layer{i}.conv", "channel": c, "stage": stage, "max_abs": random.uniform(0.1, 1) * factor}
            for i in range(n_layers) for stage, factor in (("before", 1.0), ("after", i + 1.0))
            for c in range(n_channels)
        ]
    )  # fmt: skip


@figures.styled()
def a_heat_map():
    figure, axes = figures.new_figure()
    marks.heat_map(axes[0, 0], pd.DataFrame([[90.0, 80.0], [np.nan, 10.0]], ["W4", "W2"], ["A4", "A2"]), unit="%")
    return figure


FIGURES = {
    "fig_float_training": lambda: fig_float_training(history()),
    "fig_bn_ranges": lambda: fig_bn_ranges(ranges()),
    "fig_heat": a_heat_map,
}


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    return tmp_path


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_drawing_and_saving_twice_gives_the_same_bytes(out, name):
    figure = FIGURES[name]()
    first = [p.read_bytes() for p in figures.save(figure, name, "quick", caption="A claim")]
    again = [p.read_bytes() for p in figures.save(figure, name, "quick", caption="A claim")]
    redrawn = [p.read_bytes() for p in figures.save(FIGURES[name](), name, "quick", caption="A claim")]
    assert first == again == redrawn
    pdf, png, caption = first
    assert pdf.startswith(b"%PDF")
    assert png.startswith(b"\x89PNG")
    assert caption == b"A claim\n"
    assert b"CreationDate" not in pdf
    assert b"Software" not in png
    assert len(png) > 5000


def test_another_process_with_other_settings_draws_the_same_bytes(out):
    program = (
        "import matplotlib as mpl; mpl.rcParams.update({'font.size': 30, 'lines.linewidth': 9})\n"
        "import sys; sys.path.insert(0, 'tests/results'); import test_figures as t\n"
        "from hq_lib.results import figures; figures.save(t.FIGURES['fig_bn_ranges'](), 'fig_bn_ranges', 'full')"
    )
    from hq_lib.results import paths

    subprocess.run([sys.executable, "-c", program], check=True, cwd=paths.ROOT, timeout=200)
    for path in figures.save(FIGURES["fig_bn_ranges"](), "fig_bn_ranges", "quick"):
        assert path.read_bytes() == (out / "figures" / path.name).read_bytes()


def test_files_go_where_the_profile_says_and_ids_are_checked(out):
    made = figures.save(a_heat_map(), "fig_heat", "quick")
    assert [p.relative_to(out).as_posix() for p in made] == [f"figures/quick/fig_heat.{e}" for e in ("pdf", "png")]
    with pytest.raises(ValueError, match="no id of a fig"):
        figures.save(a_heat_map(), "heat", "quick")
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        figures.save(a_heat_map(), "fig_heat", "quickly")


def test_a_heat_map_without_a_number_is_drawn_without_a_warning():
    figure, axes = figures.new_figure()
    marks.heat_map(axes[0, 0], pd.DataFrame({"A4": [np.nan, np.nan]}), unit="%")
    figure.canvas.draw()
    assert [text.get_text() for text in axes[0, 0].texts if text.get_text()] == ["n/r", "n/r"]


def test_nothing_is_left_behind_in_matplotlib():
    program = (
        "import sys, matplotlib as mpl\n"
        "mpl.rcParams['font.size'] = 17.5\n"
        "settings = lambda: {k: v for k, v in mpl.rcParams.copy().items() if k != 'backend'}\n"
        "before = settings()\n"
        "sys.path.insert(0, 'tests/results'); import test_figures as t\n"
        "[(f := draw())._repr_png_() for draw in t.FIGURES.values()]\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    from hq_lib.results import paths

    done = subprocess.run([sys.executable, "-c", program], cwd=paths.ROOT, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_notebook_shows_the_figure():
    picture = a_heat_map()._repr_png_()
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20], "big")
    assert 600 < width < 800


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_training_curves_are_the_means_over_seeds():
    data = history()
    accuracy, loss, rate = fig_float_training(data).axes
    expected = data.groupby(["model", "epoch"])[["val_acc_pct", "train_loss", "lr"]].mean()
    for ax, column in ((accuracy, "val_acc_pct"), (loss, "train_loss"), (rate, "lr")):
        for line, model in zip(ax.get_lines(), ("resnet20", "toynet"), strict=True):
            assert np.allclose(line.get_ydata(), expected.loc[model, column])
            assert line.get_color() == methods.METHOD_COLORS[model]
    assert [t.get_text() for t in accuracy.figure.legends[0].get_texts()] == ["ResNet-20", "ToyNet"]
    assert "%" in accuracy.get_ylabel()
    assert "nat" in loss.get_ylabel()
    assert rate.get_xlabel() == "epoch"


def test_unknown_models_are_drawn_too():
    data = history(models=("resnet20", "my_net", "other_net"))
    accuracy, loss, _ = fig_float_training(data).axes
    assert len(loss.get_lines()) == len(accuracy.get_lines()) == 3
    assert len({line.get_color() for line in accuracy.get_lines()}) == 3


def test_a_single_seed_has_a_band_of_no_width():
    table = marks.band(history(n_seeds=1), x="epoch", y="lr")
    assert (table["sd"] == 0).all()
    assert (marks.band(history(models=("toynet",)), x="epoch", y="lr")["n"] == 3).all()


def test_the_band_is_the_sample_standard_deviation():
    data = history(models=("toynet",))
    table = marks.band(data, x="epoch", y="val_acc_pct")
    wide = data.pivot(index="seed", columns="epoch", values="val_acc_pct").to_numpy()
    assert np.allclose(table["mean"], wide.mean(axis=0))
    assert np.allclose(table["sd"], np.sqrt(((wide - wide.mean(axis=0)) ** 2).sum(axis=0) / 2))


def test_bn_ranges_are_summed_up_as_numpy_does_and_zero_channels_are_counted():
    data = ranges()
    data.loc[(data["layer"] == "layer2.conv") & (data["channel"] < 2) & (data["stage"] == "after"), "max_abs"] = 0.0
    line = bn_fold.summary(data).loc[("layer2.conv", "after")]
    values = data.query("layer == 'layer2.conv' and stage == 'after' and max_abs > 0")["max_abs"]
    assert np.allclose(line.to_numpy()[:5], np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    assert line["n_zero"] == 2
    texts = [t.get_text() for t in fig_bn_ranges(data).axes[0].texts]
    assert "2 zero" in texts


def test_the_widest_layer_after_folding_is_named():
    data = ranges()
    data.loc[(data["layer"] == "layer1.conv") & (data["channel"] == 0) & (data["stage"] == "after"), "max_abs"] = 1e-3
    after = data.query("layer == 'layer1.conv' and stage == 'after'")["max_abs"]
    ax = fig_bn_ranges(data).axes[0]
    assert f"×{after.max() / after.min():.3g}" in [t.get_text() for t in ax.texts]
    assert ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"layer{i}.conv" for i in range(4)]


def test_a_layer_of_zeros_does_not_stop_the_figure():
    data = ranges()
    data.loc[data["layer"] == "layer0.conv", "max_abs"] = 0.0
    assert "9 zero" in [t.get_text() for t in fig_bn_ranges(data).axes[0].texts]


def test_heat_map_prints_every_cell_and_what_was_not_run():
    texts = [t.get_text() for t in a_heat_map().axes[0].texts]
    assert texts == ["90.0", "80.0", "n/r", "10.0"]


def test_a_heat_map_of_gains_and_losses_is_centred_at_zero():
    """Equal gain and loss are equally far from the colour of none, and a loss that rounds to 0.0 has no sign."""
    _, axes = figures.new_figure()
    marks.heat_map(axes[0, 0], pd.DataFrame([[-20.0, -0.04], [20.0, 40.0]]), unit="points")
    assert [t.get_text() for t in axes[0, 0].texts] == ["-20.0", "0.0", "20.0", "40.0"]
    (image,) = axes[0, 0].images
    low, none, high = (np.asarray(image.cmap(image.norm(v)))[:3] for v in (-40.0, 0.0, 40.0))
    assert none.min() > 0.9
    assert low[2] > low[0]
    assert high[0] > high[2]


def test_a_model_trained_on_all_images_has_no_validation_line():
    data = history(models=("resnet20", "lenet"))
    data.loc[data["model"] == "resnet20", "val_acc_pct"] = np.nan
    drawn = [len(ax.get_lines()) for ax in fig_float_training(data).axes]
    whole = [len(ax.get_lines()) for ax in fig_float_training(history(models=("resnet20", "lenet"))).axes]
    assert drawn == [whole[0] // 2, *whole[1:]]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (history().drop(columns="lr"), "missing: lr"),
        (history().iloc[:0], "no rows to draw"),
        (history().replace({"val_acc_pct": {history()["val_acc_pct"].iloc[0]: np.nan}}), "missing values in val_acc"),
    ],
)
def test_a_frame_that_cannot_be_drawn_is_refused_by_column(frame, message):
    with pytest.raises(ValueError, match=message):
        fig_float_training(frame)


def test_bn_ranges_need_both_stages_and_sizes():
    with pytest.raises(ValueError, match="both stages"):
        fig_bn_ranges(ranges().query("stage == 'before'"))
    with pytest.raises(ValueError, match="no negative"):
        fig_bn_ranges(ranges().assign(max_abs=-1.0))


@pytest.mark.parametrize("places", [[0.0, 1.0, 2.0], [5.0, 5.0, 5.0], [30.0, 0.0, 29.0], [7.0], []])
def test_spread_labels_keep_their_order_distance_and_centre(places):
    moved = marks.spread(places, 10.0)
    assert len(moved) == len(places)
    if places:
        assert np.mean(moved) == pytest.approx(np.mean(places))
        assert (np.diff(np.sort(moved)) >= 10 - 1e-9).all()
        assert np.argsort(moved, kind="stable").tolist() == np.argsort(places, kind="stable").tolist()
    assert marks.spread([0.0, 50.0], 10.0) == [0.0, 50.0]


# --- colours ---------------------------------------------------------------------------------------------------------


def lightness(color):
    """CIE 1976 L* of an sRGB colour, by the formula of IEC 61966-2-1 and CIE 15."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize("group", methods.GROUPS)
def test_methods_of_a_group_differ_in_grey_marker_and_line(group):
    looks = [figures.look(name) for name in methods.GROUPS[group]]
    levels = np.sort([lightness(s.color) for s in looks])
    assert (np.diff(levels) >= 6).all()
    assert levels[-1] < 82  # still visible on white
    assert len({s.marker for s in looks}) == len({str(s.linestyle) for s in looks}) == len(looks)


def test_a_method_has_one_colour_and_a_misspelt_one_is_answered():
    assert sum(map(len, methods.GROUPS.values())) == len(methods.METHOD_COLORS)
    with pytest.raises(ValueError, match="did you mean 'qdrop'"):
        figures.look("qdropp")
    with pytest.raises(ValueError, match="too many"):
        figures.looks([f"net{i}" for i in range(9)])


def test_captions_say_claim_profile_n_and_seeds():
    text = figures.caption(
        "Folding is exact.", profile="quick", n="10,000 images", seeds=[2, 0, 1, 0], dataset="digits"
    )
    assert text == "Folding is exact. [digits; profile quick; n = 10,000 images; 3 seeds (0, 1, 2)]"
    assert figures.caption("A", profile="full", n="64 channels", switches="fold eps 1e-5") == (
        "A. [profile full; n = 64 channels; deterministic; fold eps 1e-5]"
    )
    with pytest.raises(ValueError, match="unknown profile"):
        figures.caption("A", profile="ful1", n="1")


def test_the_style_sheet_is_in_force_only_inside_the_block():
    outside = mpl.rcParams["axes.spines.top"]
    with style.house_style():
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert mpl.rcParams["axes.spines.top"] == outside
