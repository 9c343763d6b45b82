"""Marks that several figures share: lines with a band, heat maps, scatters, labels at line ends."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from hq_lib.results.figures.methods import Look, look


def band(frame: pd.DataFrame, *, x: str, y: str) -> pd.DataFrame:
    """Columns ``mean``, ``sd`` (0 where n = 1) and ``n`` of ``y`` at each ``x``, ascending in ``x``."""
    groups = frame.groupby(x, sort=True, observed=True)[y]
    return pd.DataFrame({"mean": groups.mean(), "sd": groups.std(ddof=1).fillna(0.0), "n": groups.count()})


def band_line(
    ax: Axes, frame: pd.DataFrame, *, x: str, y: str, as_: str | Look, label: str = "", marks: bool = True
) -> None:
    """Adds the mean of ``y`` over all rows at each ``x`` (the seeds) as a line, and mean ± sd as a band.

    Args:
        x, y: columns drawn.
        as_: method (model, executor ...) whose look the line takes, or a look.
        label: text for ``label_ends``; "" = the line is not labelled.
        marks: whether points carry the method's marker; False for long curves.
    """
    style = look(as_) if isinstance(as_, str) else as_
    table = band(frame, x=x, y=y)
    at, mean, sd = (np.asarray(v, dtype=float) for v in (table.index, table["mean"], table["sd"]))
    ax.fill_between(at, mean - sd, mean + sd, color=style.color, alpha=0.18, linewidth=0)
    marker = style.marker if marks else ""
    ax.plot(at, mean, color=style.color, linestyle=style.linestyle, marker=marker, label=label or "_unlabelled")


def band_lines(
    ax: Axes, frame: pd.DataFrame, *, x: str, y: str, by: str, names: Mapping[str, str],
    looks: Mapping[str, Look] | None = None, marks: bool = True,
) -> None:  # fmt: skip
    """A ``band_line`` for each value of ``by`` that has rows, in the order of ``names``: value -> label.

    ``looks`` of those values that have none of their own.
    """
    for value, label in names.items():
        rows = frame.loc[frame[by] == value]
        if len(rows):
            band_line(ax, rows, x=x, y=y, as_=(looks or {}).get(value, value), label=label, marks=marks)


def label_ends(ax: Axes, *, gap_points: float = 10.0) -> None:
    """Writes each labelled line's label at its right end in its colour, moved apart where they would overlap.

    Call it last, when the limits of the axes are final; it replaces a legend.
    """
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [(float(line.get_xdata()[-1]), float(line.get_ydata()[-1])) for line in lines]  # type: ignore[index]
    height = ax.get_position().height * _figure(ax).get_figheight() * 72  # of the axes, points
    places = [height * ax.transAxes.inverted().transform(ax.transData.transform(end))[1] for end in ends]
    for line, end, place, free in zip(lines, ends, places, spread(places, gap_points), strict=True):
        ax.annotate(str(line.get_label()), end, xytext=(5, free - place), textcoords="offset points", va="center",
                    color=line.get_color(), fontsize=8, annotation_clip=False)  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved by one upward sweep and a common shift, so that neighbours lie at least ``gap`` apart."""
    if not len(places):
        return []
    order = np.argsort(places, kind="stable")
    moved = np.asarray(places, dtype=float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved -= np.mean(moved - np.asarray(places, dtype=float)[order])
    result = np.empty_like(moved)
    result[order] = moved
    return result.tolist()


def plain_log(ax: Axes) -> None:
    """Makes the y axis logarithmic with ticks at 1, 2 and 5 of each decade, written as plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def heat_map(ax: Axes, table: pd.DataFrame, *, unit: str, decimals: int = 1) -> None:
    """Draws the table (index = rows, top down; columns = columns) in colour with its numbers; NaN is printed ``n/r``.

    Where some are negative, the colours are those of a map centred at 0: blue below, red above.

    Args:
        unit: of the numbers, for the colour bar's label.
        decimals: digits after the point in the cells.
    """
    values = table.to_numpy(dtype=float)
    known = values[~np.isnan(values)]
    reach = np.abs(known).max(initial=0.0)
    if is_signed := bool((known < 0).any()):
        image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
    else:
        image = ax.imshow(np.ma.masked_invalid(values), aspect="auto")
    middle = (known.min() + known.max()) / 2 if known.size else 0.0
    for (row, column), value in np.ndenumerate(values):
        missing = np.isnan(value)
        is_dark = abs(value) > 0.6 * reach if is_signed else value <= middle  # cividis is dark where low
        ax.text(column, row, "n/r" if missing else f"{value:z.{decimals}f}", ha="center", va="center", size=7,
                color="white" if is_dark and not missing else "black")  # fmt: skip
    ax.set_xticks(range(table.shape[1]), [str(c) for c in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(c) for c in table.index])
    ax.grid(False)
    _figure(ax).colorbar(image, ax=ax, label=unit)


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes belong to no figure: make them with plotting.new_figure")
    return figure
