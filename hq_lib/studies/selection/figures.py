"""Figures of notebook 05, which images to calibrate with."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from hq_lib.results import labels
from hq_lib.results.figures import PaperFigure, band, band_line, heat_map, look, looks, need, new_figure, styled

STEPS = (
    ("candidates", "{n_pool:,} training\nimages, one\nseeded draw"),
    ("score", "on the pixels\nthe network\nsees"),
    ("choose", "the {n_calib:,}\nlowest, equally\nof every class"),
    ("manifest", "indices and a\nSHA-256 each;\nnone twice"),
    ("calibrate", "ranges, then\nrounding learned\nblock by block"),
    ("compare", "with random of\nthe same draw,\nafter {n_draws} draws"),
)
LOOKS = {
    "random": "random", "tv_lowest": "lowest", "tv_highest": "highest", "tv_trimmed": "trimmed",
    "herding": "herding", "k_center": "k_center",
}  # fmt: skip
WAYS = {"without": "each image once", "images": "images drawn with replacement", "batches": "batches with replacement"}


@styled()
def fig1_framework(
    images: np.ndarray, scores: Sequence[float], *, metric: str, n_pool: int, n_calib: int, n_draws: int
) -> Figure:
    """The selection framework: real candidates of one class in order of their score, above the steps they go through.

    Args:
        images:  (k, H, W, 3 or 1) uint8, ascending in score; k of 5 to 8 looks well.
        scores:  (k,) of those images.
        metric:  name of the score.
        n_pool, n_calib, n_draws: candidates of a draw, images chosen, draws compared.

    Raises:
        ValueError: as many scores as images are needed, ascending.
    """
    if len(images) != len(scores) or list(scores) != sorted(scores):
        raise ValueError(f"fig1_framework needs one score per image, ascending: {len(images)} images, scores {scores}")
    figure = PaperFigure(figsize=(6.8, 2.9), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    side, k = 13.0, len(images)
    step = (122 - side) / max(k - 1, 1)
    for i, (image, score) in enumerate(zip(images, scores, strict=True)):
        left = i * step
        extent = (left, left + side, 32, 32 + side)
        ax.imshow(image.squeeze(), extent=extent, cmap="gray", interpolation="nearest", vmin=0, vmax=255)
        ax.text(left + side / 2, 30.5, f"{score:.3f}", ha="center", va="top", size=7.5)
    ax.set(xlim=(0, 122), ylim=(0, 52))  # imshow took its own
    ax.text(0, 47, f"candidates of one class by {metric}: smooth", va="bottom", size=8)
    ax.text(122, 47, "rough", va="bottom", ha="right", size=8)
    facts = {"n_pool": n_pool, "n_calib": n_calib, "n_draws": n_draws}
    _flow(ax, [(name, text.format(**facts)) for name, text in STEPS])
    return figure


def _flow(ax: Axes, steps: Sequence[tuple[str, str]]) -> None:
    """Boxes from left to right with an arrow between neighbours, on axes 122 wide."""
    width, gap = 17.5, 3.4
    for i, (name, text) in enumerate(steps):
        left = i * (width + gap)
        color = look("lowest" if name == "choose" else "random").color
        box = {"boxstyle": "round,pad=0.3,rounding_size=1", "facecolor": "white", "edgecolor": color, "linewidth": 1.1}
        ax.add_patch(FancyBboxPatch((left + 0.6, 6.5), width - 1.2, 17, **box))
        ax.text(left + width / 2, 20.5, name, ha="center", va="center", weight="bold", size=8)
        ax.text(left + width / 2, 12, text, ha="center", va="center", size=6.8, linespacing=1.25)
        if i:
            arrow = {"arrowstyle": "-|>", "color": "0.35", "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (left - 0.2, 15), xytext=(left - gap + 0.2, 15), arrowprops=arrow)


@styled("model", "method", "selected", "source", "seed", "value")
def fig_selected(pairs: pd.DataFrame, *, networks: Sequence[str]) -> Figure:
    """BRECQ and QDrop with random images (open) and with selected ones (filled), one column per network.

    Ours come first, every shared draw a small point and their mean a large one, the mean paired difference above it;
    published pairs, on a grey ground, are large points alone. A network without a number of ours says ``ours n/r``,
    without a published pair ``–``.

    Args:
        pairs:        ``model``, ``method`` ("brecq", "qdrop"), ``selected`` (bool), ``source`` ("ours", "published"),
                      ``seed`` (of the draw), ``value`` (percent).
        networks:     columns after ours, in order; those without numbers are shown as empty.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    ours = dict.fromkeys(pairs.loc[pairs["source"] == "ours", "model"], "ours")
    columns = [*(ours | {model: "published" for model in networks if model not in ours}).items()]
    figure, axes = new_figure(width=6.8, height=3.6)
    ax = axes[0, 0]
    for i, (model, source) in enumerate(columns):
        here = pairs.loc[(pairs["model"] == model) & (pairs["source"] == source)]
        for method, shift in (("brecq", -0.22), ("qdrop", 0.22)):
            _pair(ax, here.loc[here["method"] == method], i + shift, method, size=7 if source == "ours" else 6.5)
    ax.set_xticks(range(len(columns)), [_network_label(m, s, pairs) for m, s in columns], size=7)
    ax.set(ylabel="top-1 accuracy, %", xlim=(-0.6, len(columns) - 0.4))
    if len(ours) < len(columns):
        ax.axvspan(len(ours) - 0.5, len(columns) - 0.4, color="0.94", zorder=-1)
        ax.annotate("published", (len(ours) - 0.45, 0.98), xycoords=("data", "axes fraction"), size=7, va="top")
    ax.margins(y=0.14)
    ax.grid(False, axis="x")
    for method, chosen in product(("brecq", "qdrop"), (False, True)):
        style, words = look(method), f"{labels.printed('method', method)}, {'selected' if chosen else 'random'}"
        face = style.color if chosen else "white"
        ax.plot([], [], linestyle="", marker=style.marker, color=style.color, markerfacecolor=face, label=words)
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2, handletextpad=0.2)
    return figure


def _pair(ax: Axes, rows: pd.DataFrame, x: float, method: str, *, size: float) -> None:
    """Means and their difference over the draws that random and selected share; if none, what there is."""
    style = look(method)
    wide = rows.pivot_table(index="seed", columns="selected", values="value")
    shared = wide.dropna()
    drawn = shared if len(shared) else wide
    means = []
    for chosen, side in ((False, -0.06), (True, 0.06)):
        if chosen not in drawn:
            continue
        values = drawn[chosen].dropna()
        face = style.color if chosen else "white"
        if len(values) > 1:
            ax.plot([x + side] * len(values), values, linestyle="", marker=".", markersize=3.5, color=style.color)
        means.append((x + side, values.mean()))
        ax.plot(*means[-1], linestyle="", marker=style.marker, markersize=6, color=style.color, markerfacecolor=face)
    if len(shared) and len(means) == 2:
        ax.plot(*zip(*means, strict=True), color=style.color, linewidth=0.8, zorder=0)
        gain, top = means[1][1] - means[0][1], shared.to_numpy().max()
        ax.annotate(f"{gain:+.2f}", (x, top), xytext=(0, 6), textcoords="offset points", ha="center", size=size,
                    color=style.color)  # fmt: skip


def _network_label(model: str, source: str, pairs: pd.DataFrame) -> str:
    name = labels.printed("model", model).replace(" (ImageNet)", "").replace("-600M", "\n600M").replace("-2.0", "\n2.0")
    if source == "ours":
        return f"{name}\nours"
    known = pairs.loc[(pairs["model"] == model) & (pairs["source"] == "published")]
    complete = known.groupby("method")["selected"].nunique().eq(2).any()
    return f"{name}\nours n/r" + ("" if complete else "\npublished –" if known.empty else "\nselected –")


@styled("choice", "label", "set_tv", "loss_own", "loss_common", "acc_pct")
def fig_smoothness(sets: pd.DataFrame, rho: pd.DataFrame, *, n_test: str) -> Figure:
    """Smoothness of a set against its losses and its accuracy, one point a set; below, rank correlations by score.

    Args:
        sets:   one row per set: ``choice``, ``label``, ``set_tv``, ``loss_own``, ``loss_common``, ``acc_pct``.
        rho:    Spearman's rho: one row per score (index, in words), one column per target (in words), NaN = n/r.
        n_test: what the accuracy is measured on, e.g. "10,000 test images".

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    targets = {"loss_own": "loss on its own images", "loss_common": "loss on common images", "acc_pct": n_test}
    figure = PaperFigure(figsize=(6.8, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([list(targets), ["rho"] * 3], height_ratios=[1.0, 1.25])  # type: ignore[arg-type]
    for target, words in targets.items():
        ax = axes[target]
        _by_choice(ax, sets, target)
        # Spearman's; NaN where one is constant
        value = pd.DataFrame(sets, columns=["set_tv", target]).corr("spearman", min_periods=3).to_numpy()[0, 1]
        ax.set_title(f"{words}\nρ = {value:.2f}" if np.isfinite(value) else words, size=8)
        ax.set_xlabel("mean total variation")
    axes["loss_own"].set_ylabel("squared error of the logits")
    axes["acc_pct"].set_ylabel("accuracy, %")
    handles, names = axes["loss_own"].get_legend_handles_labels()
    figure.legend(handles, names, ncols=4, loc="outside upper center", fontsize=7, handletextpad=0.1, columnspacing=1.0)
    heat_map(axes["rho"], rho, unit="Spearman's ρ over sets", decimals=2)
    return figure


def _by_choice(ax: Axes, sets: pd.DataFrame, target: str) -> None:
    known = {choice: vars(look(name)) for choice, name in LOOKS.items()} | {"": {"marker": "o", "color": "0.7"}}
    for choice, style in known.items():
        here = sets.loc[sets["choice"] == choice if choice else ~sets["choice"].isin(list(LOOKS))]
        if len(here):
            named = {"label": here["label"].iloc[0] if choice else "other ways", "zorder": 2 if choice else 1}
            ax.plot(here["set_tv"], here[target], **{**style, **named, "linestyle": ""}, markersize=4.5, alpha=0.85,
                    markeredgewidth=0)  # fmt: skip


@styled("n_calib", "acc_pct", "way")
def fig_n_calib(curve: pd.DataFrame, *, float_pct: float | None = None, near_pp: float = 0.2) -> Figure:
    """Accuracy against the number of calibration images: mean over draws, band and bars = ± sd.

    Args:
        curve:     one row per draw: ``n_calib``, ``acc_pct``, ``way`` ("without", or what is drawn with replacement:
                   "images", "batches").
        float_pct: the float net's accuracy, written into the title.
        near_pp:   a grey strip marks this many points below the largest number's mean.

    Raises:
        ValueError: a column is missing or has missing values, there are no rows, or none without replacement.
    """
    plain = curve.loc[curve["way"] == "without"]
    need(plain, ("n_calib",), "fig_n_calib (drawn without replacement)")
    figure, axes = new_figure(height=3.4)
    ax = axes[0, 0]
    styles = looks(["random", "without", "batches"])
    best = float(band(plain, x="n_calib", y="acc_pct")["mean"].iloc[-1])
    ax.axhspan(best - near_pp, best, color="0.88", linewidth=0, zorder=0)
    band_line(ax, plain, x="n_calib", y="acc_pct", as_="random", label=WAYS["without"])
    for way, name, shift in (("images", "without", 1.06), ("batches", "batches", 1.12)):
        rows, style = curve.loc[curve["way"] == way], styles[name]
        if len(rows):  # ± sd bars, moved a little to the right of their n so that they stay visible
            table = band(rows, x="n_calib", y="acc_pct")
            at, drawn = table.index.to_numpy(dtype=float) * shift, {"color": style.color, "marker": style.marker}
            ax.errorbar(at, table["mean"], table["sd"], **drawn, linestyle="", capsize=2, linewidth=1)
            ax.plot(at, table["mean"], **drawn, linestyle="", label=WAYS[way])
    counts = sorted(set(plain["n_calib"]))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(counts))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="calibration images", ylabel="test accuracy, %")
    if float_pct is not None:
        ax.set_title(f"float {float_pct:.2f} %; grey: within {near_pp:g} points of the largest n")
    ax.legend(loc="lower right")
    return figure
