"""Figures of notebook 08, analog crossbars."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hq_lib.results.figures import (
    Look,
    band,
    band_line,
    band_lines,
    label_ends,
    look,
    looks,
    new_figure,
    plain_log,
    styled,
)

CORRECTIONS = {"none": "none", "global": "layer gain", "column": "column", "bn": "batch norm"}
"""Correction → label at its line; "column" is gain and offset per column, "global" a gain per layer that is fitted."""
DRIFTED = CORRECTIONS | {"global": "drift factor"}
"""The same where cells drift: "global" is the ratio of a layer's first readings to its present ones."""
RULES = {"readout": "read noise once a read-out", "product": "anew for every product"}
"""How long a draw of PCM's read noise lasts → in words."""
MARKS = {"*": "stars", "P": "plus signs", "X": "crosses", "D": "diamonds"}
"""Mark of a device that is no line of fig_drift → in words."""
TICKS_S = {1: "1 s", 20: "20 s", 3600: "1 h", 8.64e4: "1 d", 3.156e7: "1 y", 3.156e8: "10 y"}


@styled("panel", "correction", "ideal_LSB", "measured_LSB")
def fig_mvm_scatter(pairs: pd.DataFrame) -> Figure:
    """Measured against ideal dot products of one layer, a panel per circuit, before and after calibration.

    Args:
        pairs: one row per dot product: ``panel`` (circuit), ``correction`` (``none`` or ``column``), ``ideal_LSB`` and
            ``measured_LSB``, accumulator steps.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    panels = list(dict.fromkeys(pairs["panel"]))
    figure, axes = new_figure(1, len(panels), width=3.3 * len(panels), height=3.3)
    for ax, panel in zip(axes[0], panels, strict=True):
        part = pairs.loc[pairs["panel"] == panel]
        values = part[["ideal_LSB", "measured_LSB"]].to_numpy(dtype=float) / 1e3
        ends = [values.min(), values.max()]
        ax.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)
        for kind, stage in (("none", "before"), ("column", "after")):
            points, style = part.loc[part["correction"] == kind], look(stage)
            ax.scatter(points["ideal_LSB"] / 1e3, points["measured_LSB"] / 1e3, s=14, linewidths=0, alpha=0.8,
                       color=style.color, marker=style.marker)  # fmt: skip
        ax.set(title=panel, xlabel="ideal, thousand steps", ylabel="measured, thousand steps")
    for stage, height in (("before", 0.93), ("after", 0.85)):
        axes[0, 0].annotate(f"{stage} calibration", (0.04, height), xycoords="axes fraction", color=look(stage).color)
    return figure


@styled("panel", "layer", "correction", "relative_error")
def fig_mvm_calibration(layers: pd.DataFrame) -> Figure:
    """Relative error of every layer's dot products under each correction, a panel per circuit.

    Args:
        layers: one row per panel, layer (drawn in order of first appearance), correction and draw: ``panel``,
            ``layer``, ``correction``, ``relative_error`` (rms error over rms of the ideal, held-out rows).

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    panels, order = (list(dict.fromkeys(layers[column])) for column in ("panel", "layer"))
    figure, axes = new_figure(len(panels), 1, height=1.0 + 2.1 * len(panels), sharex=True)
    placed = layers.assign(at=layers["layer"].map(order.index))
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        part = placed.loc[placed["panel"] == panel]
        band_lines(ax, part, x="at", y="relative_error", by="correction", names=CORRECTIONS)
        plain_log(ax)
        ax.set_title(panel, loc="left")
        ax.set_ylabel("relative error")
        label_ends(ax)
    axes[-1, 0].set_xticks(range(len(order)), order, rotation=90)
    return figure


@styled("study", "effect", "x", "correction", "seed", "acc_pct")
def fig_crossbar_accuracy(points: pd.DataFrame, *, exact_pct: float) -> Figure:
    """Accuracy against programming error (two kinds), converter bits by array size, and stuck cells: mean, band = ± sd.

    Args:
        points: one row per measurement: ``study`` (``sigma``, ``adc``, ``stuck``), ``effect`` (line), ``x`` (percent,
            bits, percent), ``correction``, ``seed``, ``acc_pct`` (percent of test images).
        exact_pct: accuracy of the exact integer network, percent: the dashed line.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    figure, axes = new_figure(2, 2, width=7.6, height=6.0, sharey=True)
    for ax, effect, unit in (
        (axes[0, 0], "state independent", "of the window"),
        (axes[0, 1], "proportional", "of the target"),
    ):
        part = points.loc[(points["study"] == "sigma") & (points["effect"] == effect)]
        band_lines(ax, part, x="x", y="acc_pct", by="correction", names=CORRECTIONS)
        ax.set(title=f"programming error, {effect}", xlabel=f"standard deviation, % {unit}")
    _converter_lines(axes[1, 0], points.loc[points["study"] == "adc"])
    _stuck_lines(axes[1, 1], points.loc[points["study"] == "stuck"])
    _finish(axes, exact_pct)
    return figure


@styled("effect", "rule", "x", "correction", "seed", "acc_pct")
def fig_drift(points: pd.DataFrame, *, exact_pct: float, no_error: Mapping[str, float]) -> Figure:
    """Accuracy against time since programming under each correction, a panel per rule of PCM's read noise: mean, band
    = ± sd; RRAM where it was published, devices of one's own where they were measured.

    Args:
        points: one row per measurement: ``effect`` (``PCM``: lines, ``RRAM`` and others: single marks), ``rule`` (key
            of ``RULES``; of PCM), ``x`` (seconds, > 0), ``correction``, ``seed``, ``acc_pct`` (percent).
        exact_pct: accuracy of the exact integer network, percent: the dashed line.
        no_error: correction → accuracy (percent) that it leaves of a network without any error: thin dotted lines.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    rules = [rule for rule in RULES if rule in set(points.loc[points["effect"] == "PCM", "rule"])]
    figure, axes = new_figure(1, len(rules), width=3.8 * len(rules) + 0.4, height=3.8, sharey=True)
    others = dict(zip(sorted(set(points["effect"]) - {"PCM"}, key=lambda e: (e != "RRAM", e)), MARKS, strict=False))
    for ax, rule in zip(axes[0], rules, strict=True):
        part = points.loc[(points["effect"] == "PCM") & (points["rule"] == rule)]
        band_lines(ax, part, x="x", y="acc_pct", by="correction", names=DRIFTED)
        for effect, mark in others.items():
            for kind in ("none", "column"):
                table = band(
                    points.loc[(points["effect"] == effect) & (points["correction"] == kind)], x="x", y="acc_pct"
                )
                ax.errorbar(table.index, table["mean"], table["sd"], color=look(kind).color, marker=mark, markersize=9,
                            linestyle="", label="_other")  # fmt: skip
        ax.set_xscale("log")
        times = points["x"].to_numpy(dtype=float)
        used = {s: text for s, text in TICKS_S.items() if any(np.isclose(times, s, rtol=0.02))}
        ax.set_xticks(list(used), list(used.values()))
        ax.minorticks_off()
        told = "; ".join(f"{MARKS[mark]}: {effect}" for effect, mark in others.items())
        ax.set(title=f"PCM, {RULES[rule]}", xlabel=f"time since programming ({told})")
    _finish(axes, exact_pct)
    for ax, (kind, value) in product(axes[0], no_error.items()):
        _level(ax, value, look(kind).color, ":")
    return figure


@styled("effect", "x", "correction", "reading", "seed", "acc_pct")
def fig_noise_aware(points: pd.DataFrame, *, exact_pct: float) -> Figure:
    """Accuracy against programming error by weight noise in training, without and with column calibration, a row of
    panels for each way of reading. Noise is that of a weight; a weight on a pair errs by sqrt(2) times its cells.

    Args:
        points: one row per measurement: ``effect`` (noise of training), ``x`` (programming error of a cell, percent of
            the window), ``correction``, ``reading`` (converters, in words), ``seed``, ``acc_pct`` (percent).
        exact_pct: accuracy of the exact integers of the network that training starts from, percent: the dashed line.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    readings = sorted(set(points["reading"]), reverse=True)
    figure, axes = new_figure(len(readings), 2, width=7.6, height=0.4 + 3.0 * len(readings), sharey=True)
    styles = looks(sorted(set(points["effect"])))
    for ax, (reading, kind) in zip(axes.flat, product(readings, ("none", "column")), strict=True):
        part = points.loc[(points["reading"] == reading) & (points["correction"] == kind)]
        names = {effect: effect for effect in styles}
        band_lines(ax, part, x="x", y="acc_pct", by="effect", names=names, looks=styles)
        ax.set_title(f"{reading}, correction: {CORRECTIONS[kind]}")
    for ax in axes[-1]:
        ax.set_xlabel("programming error of a cell, % (of a weight: x 1.4)")
    _finish(axes, exact_pct)
    return figure


@styled()
def fig_products(ideal: Tensor, measured: Tensor, *, title: str) -> Figure:
    """Measured against ideal dot products of one array, in accumulator steps, and their relative error in the title."""
    error = float((measured - ideal).norm() / ideal.norm())
    figure, axes = new_figure(1, 1, width=4.2, height=3.4)
    ax, ends = axes[0, 0], [float(ideal.min()), float(ideal.max())]
    ax.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)
    ax.scatter(ideal.flatten(), measured.flatten(), s=4, linewidths=0, alpha=0.6, color=look("before").color)
    ax.set(title=f"{title}: relative error {error:.3f}", xlabel="ideal, steps", ylabel="measured, steps")
    ax.locator_params(nbins=5)
    return figure


def _finish(axes: np.ndarray, exact_pct: float) -> None:
    """Dashes at the exact integers' accuracy in all axes, of percent from 0 to 100, and labels at the ends of lines."""
    for ax in axes.flat:
        _level(ax, exact_pct, "black", "--")
        ax.set_ylim(0, 100)
        label_ends(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy, %")


def _level(ax: Axes, value: float, color: str, linestyle: str) -> None:
    """A thin line at ``value`` over the data, no further: the labels of what is drawn stand beyond."""
    ax.hlines(value, *ax.dataLim.intervalx, color=color, linestyle=linestyle, linewidth=0.8, zorder=0)


def _converter_lines(ax: Axes, part: pd.DataFrame) -> None:
    effects = list(dict.fromkeys(part["effect"]))
    fitted = [effect for effect in effects if not effect.endswith("full range")]
    styles = looks(fitted) | {effect: Look("#8a8a8a", "x", ":") for effect in effects if effect not in fitted}
    names = {effect: effect.replace(" rows, ", ", ") for effect in styles}
    band_lines(ax, part, x="x", y="acc_pct", by="effect", names=names, looks=styles)
    ax.set(title="converters on perfect cells", xlabel="ADC bits")
    ax.set_xticks(sorted(set(part["x"])))


def _stuck_lines(ax: Axes, part: pd.DataFrame) -> None:
    for kind in ("none", "column"):
        for effect, line in (("no fault map", "-"), ("remapped", ":")):
            rows, style = part.loc[(part["effect"] == effect) & (part["correction"] == kind)], look(kind)
            label = CORRECTIONS[kind] if effect == "no fault map" else f"{CORRECTIONS[kind]}, map"
            band_line(ax, rows, x="x", y="acc_pct", as_=Look(style.color, style.marker, line), label=label)
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(part["x"])), [f"{x:g}" for x in sorted(set(part["x"]))])
    ax.minorticks_off()
    ax.set(title="stuck cells", xlabel="% of cells, half low, half high")
