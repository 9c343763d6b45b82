"""Figures of notebook 02, folding batch normalisation into the weights."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hq_lib.results.figures import look, new_figure, plain_log, styled

STAGES = ("before", "after")
SUMMARY = ("min", "q25", "median", "q75", "max")


@styled("layer", "channel", "stage", "max_abs")
def fig_bn_ranges(ranges: pd.DataFrame) -> Figure:
    """How far the channels of each layer differ in their largest weight, before and after folding.

    Per layer and stage: a thin line from the smallest to the largest channel, a thick one over the middle half, a point
    at the median. The layer whose channels differ most after folding is named with its ratio.

    Args:
        ranges: one row per layer, channel and stage: ``layer`` (name, drawn in order of first appearance), ``channel``,
            ``stage`` (``before`` or ``after``), ``max_abs`` (largest |w| of the channel, real units, >= 0). Channels of
            zeros cannot stand on a logarithmic axis; their number is written at the foot of their layer.

    Raises:
        ValueError: a column or a stage is missing, a value is missing or negative, or there are no rows.
    """
    if set(ranges["stage"]) != set(STAGES) or ranges["max_abs"].to_numpy().min() < 0:
        raise ValueError("fig_bn_ranges needs both stages, 'before' and 'after', and no negative max_abs")
    layers = list(dict.fromkeys(ranges["layer"]))
    figure, axes = new_figure(width=max(6.4, 0.26 * len(layers) + 1.2), height=3.8)
    ax = axes[0, 0]
    table = summary(ranges)
    for stage, shift in zip(STAGES, (-0.17, 0.17), strict=True):
        _draw_stage(ax, table.xs(stage, level="stage").reindex(layers), stage, shift)
    _name_the_widest(ax, table.xs("after", level="stage").reindex(layers))
    plain_log(ax)
    ax.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > 6 else 0)
    ax.set(ylabel="largest |w| of a channel, real units", xlim=(-0.6, len(layers) - 0.4))
    ax.grid(False, axis="x")
    for stage, left in zip(STAGES, (0.0, 1.7), strict=True):  # inches from the left end of the axes
        ax.annotate(f"{stage} folding", (0, 1), xycoords="axes fraction", xytext=(72 * left, 6), weight="bold",
                    textcoords="offset points", color=look(stage).color)  # fmt: skip
    return figure


def summary(ranges: pd.DataFrame) -> pd.DataFrame:
    """Per layer and stage, over the channels that are not all zero: ``min q25 median q75 max``; ``n_zero`` others."""
    alive = ranges.assign(max_abs=ranges["max_abs"].where(ranges["max_abs"] > 0))
    groups = alive.groupby(["layer", "stage"], sort=False, observed=True)["max_abs"]
    five = {name: groups.quantile(share) for name, share in zip(SUMMARY, (0, 0.25, 0.5, 0.75, 1), strict=True)}
    return pd.DataFrame({**five, "n_zero": groups.size() - groups.count()})


def _draw_stage(ax: Axes, table: pd.DataFrame, stage: str, shift: float) -> None:
    style = look(stage)
    at = [i + shift for i in range(len(table))]
    ax.vlines(at, table["min"], table["max"], color=style.color, linewidth=0.9)
    ax.vlines(at, table["q25"], table["q75"], color=style.color, linewidth=4)
    ax.plot(at, table["median"], linestyle="", marker=style.marker, markersize=3.5, color="white",
            markeredgecolor=style.color)  # fmt: skip
    for x, n_zero in zip(at, table["n_zero"], strict=True):
        if n_zero > 0:
            ax.annotate(f"{int(n_zero)} zero", (x, 0), xycoords=("data", "axes fraction"), rotation=90, size=6,
                        color=style.color, ha="center", va="bottom")  # fmt: skip


def _name_the_widest(ax: Axes, after: pd.DataFrame) -> None:
    high, low = (after[c].to_numpy(dtype=float) for c in ("max", "min"))
    ratio = high / low  # NaN where all channels are zero
    if np.isfinite(ratio).any():
        place = int(np.nanargmax(ratio))
        ax.annotate(f"×{ratio[place]:.3g}", (place + 0.17, high[place]), xytext=(0, 4), textcoords="offset points",
                    ha="center", size=8, color=look("after").color)  # fmt: skip
