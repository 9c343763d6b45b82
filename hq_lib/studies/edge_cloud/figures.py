"""Figure of notebook 09, a network cut between edge and cloud."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from hq_lib.results.figures import Look, band, looks, need, new_figure, styled

EDGE_TITLES = {
    "integer": "edge: {bits}, digital",
    "crossbar": "edge: crossbar, 1 s",
    "crossbar_1day": "edge: crossbar, 1 day",
}
"""Edge -> title of its column, with its bits."""
CUT_WORDS = {
    "conv1": "cut after the stem", "layer1.2": "cut after stage 1", "layer2.2": "cut after stage 2",
    "layer3.2": "cut after stage 3",
}  # fmt: skip
"""ResNet-20's cuts with a colour, from the input on -> words for them."""
CODINGS = {"packed": "packed bits", "deflate": "compressed"}
TICKS_KiB = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
SPAN_PCT, HEADROOM_PCT = 34.0, 2.5
"""Height of the axes and room above the best point; lines that leave the foot go on downwards."""
PICTURES = {"pixels": "the image, 1 to 8 bits a pixel", "JPEG": "the image as JPEG"}


@styled()
def fig_wire(sent: np.ndarray, received: np.ndarray, *, title: str) -> Figure:
    """One channel of the tensor at a cut as it leaves the edge and as it reaches the cloud, on one scale of greys.

    Args:
        sent:     (H, W) real values.
        received: (H, W), after the wire.
        title:    what was sent, for the second picture.
    """
    figure, axes = new_figure(1, 2, height=2.6)
    for ax, values, words in zip(axes[0], (sent, received), ("leaves the edge", title), strict=True):
        ax.imshow(values, cmap="gray", vmin=float(sent.min()), vmax=float(sent.max()), interpolation="nearest")
        ax.set_title(words)
        ax.set_axis_off()
    return figure


@styled("edge", "line", "coding", "KiB", "acc_pct", "step")
def fig_edge_cloud(points: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """Accuracy against KiB per image: a column of axes for each edge, packed packets above, compressed ones below.

    A line is a cut, its points the bits on the wire; those of ``CUT_WORDS`` have colours, all others are thin and grey.
    Where there are several draws a point is their mean and its bar their standard deviation. The two ways of sending
    the image itself are drawn in all columns: they do not depend on the edge.

    Args:
        points:     one row per edge ("" for pictures), line (name of a cut, "pixels" or "JPEG"), coding and draw:
                    ``edge``, ``line``, ``coding`` ("packed" or "deflate"), ``KiB`` (mean of a packet, 1024 bytes),
                    ``acc_pct``, ``step`` (bits or quality: what tells the points of a line apart).
        references: one row per edge (of ``EDGE_TITLES``, those that are drawn) and draw: ``edge``, ``acc_pct`` of the
                    whole network on that edge, its ``bits`` ("W8A8"), ``raw_KiB`` of an image as it is.

    Raises:
        ValueError: a column is missing or has missing values, or there are no rows.
    """
    need(references, ("edge", "acc_pct", "bits", "raw_KiB"), "fig_edge_cloud")
    bits, raw_KiB = references["bits"].iloc[0], float(references["raw_KiB"].iloc[0])
    whole = {str(edge): float(np.mean(rows["acc_pct"])) for edge, rows in references.groupby("edge")}
    edges = [edge for edge in EDGE_TITLES if edge in whole]
    width = 1.4 + 2.1 * len(edges)
    figure, axes = new_figure(2, len(edges), width=width, height=4.8, sharex=True, sharey=True)
    styles = looks(["float", *CUT_WORDS])
    for column, edge in zip(axes.T, edges, strict=True):
        for ax, coding in zip(column, CODINGS, strict=True):
            _draw_lines(ax, points.loc[points["edge"].isin([edge, ""]) & (points["coding"] == coding)], styles)
            _draw_references(ax, whole[edge], raw_KiB)
        column[0].set_title(EDGE_TITLES[edge].format(bits=bits))
        column[1].set_xlabel("KiB per image")
    for ax, words in zip(axes[:, 0], CODINGS.values(), strict=True):
        ax.set_ylabel(f"{words}\naccuracy, %")
    top = points["acc_pct"].to_numpy(dtype=float).max() + HEADROOM_PCT
    axes[0, 0].set_ylim(top - SPAN_PCT, top)
    _label(figure, whole[edges[0]], raw_KiB)
    return figure


def _draw_lines(ax: Axes, points: pd.DataFrame, styles: Mapping[str, Look]) -> None:
    for line in dict.fromkeys([*(n for n in points["line"] if n not in CUT_WORDS), *CUT_WORDS]):
        rows = points.loc[points["line"] == line]
        if rows.empty:
            continue
        label = CUT_WORDS.get(line, PICTURES.get(line, "_other"))
        at = rows.groupby("step", sort=True)["KiB"].mean()
        height = band(rows, x="step", y="acc_pct")
        ax.errorbar(at, height["mean"], yerr=height["sd"], label=label, **_look(line, styles))


def _look(line: str, styles: Mapping[str, Look]) -> dict[str, Any]:
    if line in CUT_WORDS:
        style = styles[line]
        return {"color": style.color, "marker": style.marker, "markersize": 4, "linestyle": "-", "zorder": 3}
    if line in PICTURES:
        dash = ":" if line == "pixels" else "--"
        return {"color": "black", "marker": "", "linestyle": dash, "linewidth": 1.2, "zorder": 2}
    return {"color": "0.72", "marker": "", "linestyle": "-", "linewidth": 0.8, "elinewidth": 0.5, "zorder": 1}


def _draw_references(ax: Axes, whole_pct: float, raw_KiB: float) -> None:
    ax.axhline(whole_pct, color="0.35", linewidth=0.9, zorder=0)
    ax.axvline(raw_KiB, color="0.35", linewidth=0.9, zorder=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(TICKS_KiB))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0.15, 22)
    ax.tick_params(axis="x", labelrotation=45)


def _label(figure: Figure, whole_pct: float, raw_KiB: float) -> None:
    """One legend below, and words at the reference lines of the first axes."""
    first, found = figure.axes[0], {}
    for ax in figure.axes:
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    words = [w for w in [*CUT_WORDS.values(), *PICTURES.values()] if w in found]
    figure.legend([found[w] for w in words], words, loc="outside lower center", ncols=3)
    first.annotate("raw image", (raw_KiB, 0.02), xycoords=("data", "axes fraction"), xytext=(2, 0), rotation=90,
                   textcoords="offset points", size=7, color="0.35")  # fmt: skip
    first.annotate("all on the edge", (0.16, whole_pct), xytext=(0, 2), textcoords="offset points", size=7,
                   color="0.35")  # fmt: skip
