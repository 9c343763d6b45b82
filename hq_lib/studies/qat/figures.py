"""Figures of notebook 03, quantization-aware training."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hq_lib.results import labels
from hq_lib.results.figures import label_ends, look, new_figure, plain_log, styled
from hq_lib.results.figures.methods import METHOD_COLORS, SPARE


@styled("x", "dsq_alpha", "soft", "hard", "slope")
def fig_dsq_curve(curves: pd.DataFrame) -> Figure:
    """DSQ's soft staircase over the hard one, and below it the slope that trains: one line per dsq_alpha.

    Args:
        curves: one row per x and dsq_alpha: ``x``, ``dsq_alpha``, ``soft``, ``hard`` (real units), ``slope``.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    figure, axes = new_figure(2, height=5.2, sharex=True)
    stairs, slopes = axes[:, 0]
    groups = list(curves.groupby("dsq_alpha", sort=True))
    first = groups[0][1].sort_values("x")
    stairs.step(first["x"], first["hard"], where="mid", color="0.75", linewidth=2.5, label="hard: forward")
    for (value, group), name in zip(groups, SPARE, strict=False):
        line, style = group.sort_values("x"), look(name)
        text = f"dsq_alpha {value:g}"
        stairs.plot(line["x"], line["soft"], color=style.color, linestyle=style.linestyle, label=text)
        slopes.plot(line["x"], line["slope"], color=style.color, linestyle=style.linestyle, label=text)
    inside = first.loc[first["slope"] > 0, "x"]
    slopes.hlines(1.0, inside.min(), inside.max(), color="0.75", linewidth=2.5, zorder=0)
    slopes.annotate("straight-\nthrough", (inside.max(), 1.0), xytext=(5, 0), textcoords="offset points", va="center",
                    size=8, color="0.45")  # fmt: skip
    stairs.set_ylabel("quantized value")
    slopes.set(ylabel="slope of the soft staircase", xlabel="x")
    stairs.legend(loc="upper left")
    figure.align_ylabels()
    return figure


@styled("w_bits", "a_bits", "epoch", "layer", "alpha")
def fig_pact_alpha(clips: pd.DataFrame) -> Figure:
    """PACT's learned clips over the epochs, one panel per bit width, one line per layer, dark (early) to light (late).

    Args:
        clips: one row per layer and epoch (0 = as calibrated): ``w_bits``, ``a_bits``, ``epoch``, ``layer`` (in the
            order of execution within each epoch), ``alpha`` (real units).

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    panels: Any = list(clips.groupby(["w_bits", "a_bits"], sort=True))[::-1]
    figure, axes = new_figure(1, len(panels), height=3.4, sharey=True)
    names = list(dict.fromkeys(clips["layer"]))
    scale = ScalarMappable(Normalize(0, max(len(names) - 1, 1)), cmap=mpl.colormaps["cividis"])
    for ax, (bits, panel) in zip(axes[0], panels, strict=True):
        for layer, line in panel.groupby("layer", sort=False):
            mean: Any = line.groupby("epoch")["alpha"].mean()
            ax.plot(mean.index, mean, color=scale.to_rgba(np.asarray(names.index(str(layer)))), linewidth=1.0)
        ax.set(title=labels.bits_label(*bits), xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    plain_log(axes[0, 0])
    axes[0, 0].set_ylabel("learned clip alpha, real units")
    bar = figure.colorbar(scale, ax=axes.ravel().tolist(), label="layer, in order of execution")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled("method", "w_bits", "a_bits", "value")
def fig_qat_bits(scores: pd.DataFrame) -> Figure:
    """Accuracy by bits, one line per method that has a colour, the float network as a dashed line.

    Args:
        scores: one row per run: ``method`` ("float" is the line), ``w_bits``, ``a_bits``, ``value`` (percent).

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    figure, axes = new_figure(height=3.4)
    ax = axes[0, 0]
    trained = scores.loc[scores["method"] != "float"]
    widths = sorted({*zip(trained["w_bits"], trained["a_bits"], strict=True)}, reverse=True)
    drawn = set(trained["method"]) & set(METHOD_COLORS)
    for method in (name for name in labels.METHOD_LABELS if name in drawn):
        mean = trained.loc[trained["method"] == method].groupby(["w_bits", "a_bits"])["value"].mean()[::-1]
        at = [widths.index(pair) for pair in mean.index]
        ax.plot(at, mean, **vars(look(method)), label=labels.printed("method", method))
    for value in scores.loc[scores["method"] == "float", "value"]:
        ax.plot([*range(len(widths))], [value] * len(widths), color="0.3", linestyle=(0, (4, 2)), linewidth=1,
                label="float")  # fmt: skip
    ax.set_xticks(range(len(widths)), [labels.bits_label(*pair) for pair in widths])
    ax.set(xlabel="bits of weights and activations", ylabel="test accuracy, %")
    label_ends(ax)
    return figure
