"""Figures of notebook 06, bits per tensor."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hq_lib.results.figures import Look, band_line, heat_map, label_ends, look, need, new_figure, styled

SEARCHES = {
    "optimal": "integer program", "uniform": "same bits", "ends_8": "same bits, first and last 8",
    "at_random": "random",
}  # fmt: skip
BUDGETS = {"size": ("size_KiB", "weights, KiB"), "bop": ("bops", "bit operations per image, 10⁹")}
WINDOW_PP = 12.0
"""Height of an accuracy axis, points; nets below it stand on its foot with their accuracy written."""


@styled()
def fig_hybrid_bits(cells: pd.DataFrame, *, boundary: int) -> Figure:
    """Test accuracy with the hybrid rule over weight x activation bits, and what it gains on calibration alone.

    A white line parts the cells with a trained tensor (below, right) from those that are calibrated throughout.

    Args:
        cells:    one row per pair: ``w_bits``, ``a_bits``, ``calibrated``, ``hybrid`` (accuracy, percent; NaN = n/r).
        boundary: bits from which on a tensor is calibrated.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    need(cells.fillna(0.0), ("w_bits", "a_bits", "calibrated", "hybrid"), "fig_hybrid_bits")
    figure, axes = new_figure(1, 2, width=8.2, height=3.4)
    parts = {
        "hybrid rule: test accuracy": (cells["hybrid"], "%"),
        "gain over calibration alone": (cells["hybrid"] - cells["calibrated"], "percentage points"),
    }
    for ax, (title, (values, unit)) in zip(axes[0], parts.items(), strict=True):
        table = cells.assign(value=values).pivot_table(index="w_bits", columns="a_bits", values="value", dropna=False)
        table = table.sort_index(ascending=False).sort_index(axis=1, ascending=False)
        table.index, table.columns = ([f"{b:g}" for b in names] for names in (table.index, table.columns))
        heat_map(ax, table, unit=unit)
        ax.set(title=title, xlabel="activation bits", ylabel="weight bits")
        # a step around the cells whose bits all reach the boundary; they stand at the top left
        down, right = (sum(int(name) >= boundary for name in names) - 0.5 for names in (table.index, table.columns))
        ax.plot([-0.5, right, right], [down, down, -0.5], color="white", linewidth=2.5, solid_joinstyle="miter")
        ax.plot([-0.5, right, right], [down, down, -0.5], color="black", linewidth=0.8, linestyle="--")
    return figure


@styled()
def fig_assignment(bits: Mapping[str, int]) -> Figure:
    """The bits of each weight, in the network's order; the dashed line is their plain mean.

    Args:
        bits: by tensor, as in ``Assignment.bits``.
    """
    figure, axes = new_figure(height=2.9)
    ax, color = axes[0, 0], look("qdrop").color
    ax.bar(range(len(bits)), list(bits.values()), color=color, width=0.75)
    ax.axhline(np.mean(list(bits.values())), color="0.4", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(bits)), [name.removeprefix("weight ") for name in bits], rotation=90, size=7)
    ax.set(ylabel="bits", ylim=(0, 8.4))
    ax.grid(False, axis="x")
    return figure


@styled("kind", "name", "bits", "kl")
def fig_layer_sensitivity(known: pd.DataFrame) -> Figure:
    """How far the predictions move when one tensor is quantized: weights above, activations below, a line per bits.

    Args:
        known: one row per tensor and bits: ``kind`` ("weight" or "act"), ``name`` (drawn in order of first
            appearance), ``bits``, ``kl`` (nat, >= 0; exact zeros are drawn at the foot).

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    figure, axes = new_figure(2, 1, width=7.2, height=6.4)
    foot = known.loc[known["kl"] > 0, "kl"].min()
    widths = sorted(set(known["bits"]))
    colors = mpl.colormaps["cividis"](np.linspace(0, 0.85, len(widths)))
    for ax, (kind, word) in zip(axes[:, 0], {"weight": "weights of", "act": "activation of"}.items(), strict=True):
        mine = known.loc[known["kind"] == kind]
        names = list(dict.fromkeys(mine["name"]))
        for place, bits in enumerate(widths):
            line = mine.loc[mine["bits"] == bits].set_index("name")["kl"].reindex(names).clip(lower=foot)
            ax.plot(range(len(names)), line, color=colors[place], marker="osDv^P"[place % 6], linewidth=1.0,
                    label=f"{bits} bits")  # fmt: skip
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(base=10.0, numticks=20))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set(ylabel="KL from float, nat", title=f"{word} one tensor quantized", xlim=(-0.5, len(names) - 0.5))
        label_ends(ax, gap_points=9)
    return figure


@styled("budget", "search", "equivalent", "size_KiB", "bops", "acc_pct", "kl", "predicted_kl")
def fig_pareto(points: pd.DataFrame, *, float_acc_pct: float | None = None) -> Figure:
    """Accuracy against cost of searched, uniform and random assignments (above), predicted against measured KL (below).

    Left the size of the weights counts (activations at fixed bits), right the bit operations. Lines join the means over
    calibration draws; bands are ± sd. Nets that fall out of the window stand on its foot, those of nearly one cost as
    one, with their mean accuracy.

    Args:
        points:        one row per net: ``budget`` ("size", "bop"), ``search`` (a key of ``SEARCHES``), ``equivalent``,
                       ``size_KiB``, ``bops``, ``acc_pct``, ``kl``, ``predicted_kl`` (nat).
        float_acc_pct: the float net's accuracy, a dashed line; None = not drawn.

    Raises:
        ValueError: a column is missing or has missing values, there are no rows, or an unknown search.
    """
    if unknown := set(points["search"]) - set(SEARCHES):
        raise ValueError(f"fig_pareto cannot draw {', '.join(sorted(unknown))}: searches are {', '.join(SEARCHES)}")
    figure, axes = new_figure(2, 2, width=8.2, height=6.4)
    for column, (budget, (cost, title)) in enumerate(BUDGETS.items()):
        mine = points.loc[points["budget"] == budget]
        mine = mine.assign(cost=mine[cost] / (1e9 if budget == "bop" else 1))
        _accuracy(axes[0, column], mine, float_acc_pct)
        name = f"{budget.replace('bop', 'operations')} budget"
        axes[0, column].set(xlabel=title, ylabel="test accuracy, %", title=name)
        _additivity(axes[1, column], mine)
    axes[0, 0].legend(loc="lower right")
    return figure


def _accuracy(ax: Axes, mine: pd.DataFrame, float_acc_pct: float | None) -> None:
    values = mine["acc_pct"].to_numpy(dtype=float)
    top = max(float(values.max()), float_acc_pct or 0.0)
    foot, near, below = max(float(values.min()) - 0.5, top - WINDOW_PP), 0.02 * np.ptp(mine["cost"]), []
    for search, label in SEARCHES.items():
        nets, style = mine.loc[mine["search"] == search], look(search)
        if search == "at_random":
            inside = nets.loc[nets["acc_pct"] >= foot]
            ax.plot(inside["cost"], inside["acc_pct"], **{**vars(style), "linestyle": ""}, label=label)
        elif len(nets):
            band_line(ax, nets, x="cost", y="acc_pct", as_=search, label=label)
        low = nets.loc[nets["acc_pct"] < foot, ["cost", "acc_pct"]]
        means = low.groupby((low["cost"] / near).round()).mean()
        below += [(cost, value, style) for cost, value in means.itertuples(index=False)]
    _stand(ax, foot, below, 3 * near)
    if float_acc_pct:
        ax.axhline(float_acc_pct, color="black", linestyle="--", linewidth=0.8)
        ax.annotate("float", (1, float_acc_pct), xycoords=("axes fraction", "data"), xytext=(-2, 2), size=7,
                    textcoords="offset points", ha="right")  # fmt: skip
    ax.set_ylim(foot - 0.02 * WINDOW_PP, top + 0.06 * WINDOW_PP)


def _stand(ax: Axes, foot: float, below: list[tuple[Any, Any, Look]], near: float) -> None:
    """Nets below the window on its foot, hollow, with their accuracy; that of neighbours stands one over the other.

    Args:
        below: cost, mean accuracy and look of those of one search and nearly one cost.
        near:  how far apart in cost two accuracies stand beside each other.
    """
    for cost, _, style in below:
        ax.plot(cost, foot, linestyle="", marker=style.marker, color="white", markeredgecolor=style.color,
                clip_on=False, zorder=5)  # fmt: skip
    last, height = -np.inf, 0
    for cost, value, style in sorted(below, key=lambda net: net[0]):
        height = height + 1 if cost - last < near else 0
        ax.annotate(f"{value:.0f}", (cost, foot), xytext=(0, 5 + 7 * height), textcoords="offset points", size=6,
                    ha="center", color=style.color, bbox={"color": "white", "pad": 0.5})  # fmt: skip
        last = cost


def _additivity(ax: Axes, mine: pd.DataFrame) -> None:
    for search in SEARCHES:
        nets, style = mine.loc[mine["search"] == search], look(search)
        ax.plot(nets["predicted_kl"], nets["kl"], linestyle="", marker=style.marker, color=style.color, alpha=0.8)
    both = mine[["predicted_kl", "kl"]].to_numpy(dtype=float)
    ends = [both[both > 0].min(), both.max()]
    ax.plot(ends, ends, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
    ax.annotate("equal", (ends[1],) * 2, xytext=(-4, -10), textcoords="offset points", size=7, color="0.4", ha="right")
    ax.set(xscale="log", yscale="log", xlabel="predicted KL (sum of single ones), nat", ylabel="measured KL, nat")
