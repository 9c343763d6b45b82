"""Figures of notebook 07, integer networks in several executors."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from hq_lib.results import labels
from hq_lib.results.figures import look, new_figure, styled

INPUTS = {"its own": "numpy", "the graph's": "before"}
"""Whose integers every operation reads -> whose look the line takes."""
FLOOR_PCT = 0.001  # below it the axis is linear, so that 0 has a place


@styled("model", "bits", "inputs", "place", "mismatch_pct", "largest_LSB")
def fig_integer_agreement(layers: pd.DataFrame) -> Figure:
    """Share of integers that differ from the fake-quantized network's, tensor by tensor: a panel per model and bits.

    Two lines: the integer network on its own integers (differences are carried on), and every operation fed with the
    graph's integers (differences born there). The largest differences of the two stand above each panel, in LSB.

    Args:
        layers: one row per model, bits, inputs and tensor: ``model``, ``bits`` (text, a column of panels each),
            ``inputs`` (a key of ``INPUTS``), ``place`` (order of execution), ``mismatch_pct`` (percent of integers),
            ``largest_LSB`` (steps).

    Raises:
        ValueError: a column is missing or has missing values, an unknown ``inputs``, or there are no rows.
    """
    if unknown := sorted(set(layers["inputs"]) - set(INPUTS)):
        raise ValueError(f"fig_integer_agreement: inputs {unknown[0]!r} is neither of {', '.join(map(repr, INPUTS))}")
    models, bits = list(dict.fromkeys(layers["model"])), sorted(set(layers["bits"]), reverse=True)
    size = {"width": 3.2 * max(len(bits), 2), "height": max(0.9 + 1.25 * len(models), 3.6)}
    figure, axes = new_figure(len(models), len(bits), sharey=True, sharex="row", **size)
    for row, model in zip(axes, models, strict=True):
        for ax, width in zip(row, bits, strict=True):
            _panel(ax, layers.loc[(layers["model"] == model) & (layers["bits"] == width)])
        row[0].set_title(labels.printed("model", model), loc="left", size=8)
    for ax in axes[-1]:
        ax.set_xlabel("tensor, in order of execution")
    figure.supylabel("integers that differ from fake-quantized, %", size=9)
    _name_lines(axes[0, 0])
    return figure


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    if rows.empty:
        ax.annotate("n/r", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    for inputs, name in INPUTS.items():
        line, style = rows.loc[rows["inputs"] == inputs].sort_values("place"), look(name)
        ax.plot(line["place"], line["mismatch_pct"], color=style.color, marker=style.marker, markersize=2.5,
                linewidth=0.9, clip_on=False, zorder=3)  # fmt: skip
    ax.set_yscale("symlog", linthresh=FLOOR_PCT, linscale=0.5)
    ax.set_ylim(0, 100)
    ax.set_yticks([0, 0.001, 0.01, 0.1, 1, 10, 100])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    worst = [rows.loc[rows["inputs"] == i, "largest_LSB"] for i in INPUTS]
    told = " / ".join(f"{steps.max():.0f}" for steps in worst if len(steps))
    ax.set_title(f"{rows['bits'].iloc[0]}, at most {told} LSB", loc="right", size=7)


def _name_lines(ax: Axes) -> None:
    for text, name, height in (("on its own integers", "numpy", -3), ("fed with the graph's", "before", -12)):
        ax.annotate(text, (0, 1), xycoords="axes fraction", xytext=(3, height), textcoords="offset points", va="top",
                    size=7, color=look(name).color)  # fmt: skip
