"""Figures of notebook 04, post-training quantization."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hq_lib.quantizers import aciq
from hq_lib.results import labels
from hq_lib.results.figures import band_lines, label_ends, look, looks, new_figure, styled

PREDICTIONS = {"mse_model": "noise model (paper)", "mse_exact": "exact, on the real grid"}
TENSORS = {"activation": "activations", "weight": "weights"}
# Bits have no colours of their own: from dark (few) to light (many), with the markers of that place.
BIT_LOOKS = ("dsq", "pact", "lsq", "dorefa", "ste")


@styled()
def fig_clip(alpha: float = 5.0, bits: int = 4) -> Figure:
    """A Laplace variable of spread b = 1 on a grid clipped at ``alpha``: its levels, and the error that a clip costs.

    Left the density with the levels of the noise model (``bits`` of them, 2 alpha / 2^bits apart); right the clipping
    and the rounding error against the clip, their sum, and where ``alpha`` stands on it.

    Args:
        alpha: clip, in units of b, > 0.
        bits:  of the grid.
    """
    figure, axes = new_figure(1, 2, width=7.0, height=3.0)
    density, cost = axes[0]
    x, step = np.linspace(-12, 12, 481), 2 * alpha / 2**bits
    density.fill_between(x, np.exp(-np.abs(x)) / 2, color="0.85")
    density.vlines(step * (np.arange(2**bits) - (2**bits - 1) / 2), 0, 0.1, color=look("lsq").color, linewidth=0.8)
    density.axvline(-alpha, color="0.3", linestyle="--")
    density.axvline(alpha, color="0.3", linestyle="--")
    density.set(xlabel="x / b", ylabel="density", title=f"{2**bits} levels, {step:.2f} b apart")
    clips = np.linspace(0.5, 12, 116)
    parts = {"clipping": 2 * np.exp(-clips), "rounding": clips**2 / (3 * 4.0**bits)}
    parts["sum"] = np.array([aciq.noise_mse(clip, bits, "laplace") for clip in clips])
    for (name, values), color in zip(parts.items(), ("0.6", "0.4", look("qdrop").color), strict=True):
        cost.plot(clips, values, color=color, linewidth=2 if name == "sum" else 1, label=name)
    cost.plot(alpha, aciq.noise_mse(alpha, bits, "laplace"), marker="o", color="0.2")
    best = aciq.clip_ratio(bits, "laplace")
    cost.axvline(best, color="0.6", linestyle=":", linewidth=1)
    cost.set(xlabel="clip alpha / b", ylabel="squared error / b²", yscale="log", title=f"least at {best:.2f} b")
    cost.legend(loc="lower right")
    return figure


@styled("tensor", "bits", "mse_measured", *PREDICTIONS)
def fig_aciq_mse(found: pd.DataFrame) -> Figure:
    """Measured against predicted squared error, a point for each tensor and width, both relative to the tensor's power.

    Left activations, right weights; above ACIQ's noise model, below the exact integral over the fitted prior. On the
    dashed line prediction and measurement agree.

    Args:
        found: columns ``tensor`` ("activation" or "weight"), ``bits``, ``mse_measured``, ``mse_model``, ``mse_exact``
            (pure numbers, > 0).

    Raises:
        ValueError: there are more widths than looks (8).
    """
    figure, axes = new_figure(2, 2, width=6.4, height=5.6, sharex=True, sharey=True)
    widths = sorted({int(bits) for bits in found["bits"]})
    many = looks([f"{bits} bit" for bits in widths]) if len(widths) > len(BIT_LOOKS) else {}
    styles = [*many.values()] or [look(name) for name in BIT_LOOKS]
    low, high = (f(found[["mse_measured", *PREDICTIONS]].to_numpy(dtype=float)) for f in (np.min, np.max))
    panels = product(PREDICTIONS.items(), TENSORS.items())
    for ax, ((column, title), (tensor, name)) in zip(axes.flat, panels, strict=True):
        ax.plot([low, high], [low, high], color="0.5", linewidth=0.8, linestyle="--", zorder=0)
        for bits, style in zip(widths, styles, strict=False):
            points = found.loc[(found["tensor"] == tensor) & (found["bits"] == bits)]
            ax.scatter(points[column], points["mse_measured"], s=14, color=style.color, marker=style.marker, alpha=0.8,
                       linewidths=0, label=f"{bits} bit")  # fmt: skip
        ax.set(xscale="log", yscale="log", xlim=(low / 1.5, high * 1.5), ylim=(low / 1.5, high * 1.5))
        ax.set_title(f"{name}: {title}", fontsize=9, loc="left")
    for below, left in zip(axes[1], axes[:, 0], strict=True):
        below.set_xlabel("predicted error / mean square")
        left.set_ylabel("measured error / mean square")
    axes[0, 0].legend(loc="upper left", fontsize=8, frameon=False)
    return figure


@styled("w_bits", "a_bits", "recipe", "method", "name", "position", "block", "value")
def fig_error_accumulation(errors: pd.DataFrame) -> Figure:
    """How far the quantized network's tensors are from the float network's behind each block, recipe by recipe.

    A panel for each pair of bit widths; mean over the seeds, with a band of one standard deviation where there are
    several. The labels stand at the last block, the logits.

    Args:
        errors: columns ``w_bits``, ``a_bits``, ``recipe`` (of a line), its ``method`` (whose colour it has) and
            ``name`` in print, ``position`` (0 ...), ``block`` (name), ``value`` (relative squared error, pure number,
            > 0).
    """
    panels: Any = list(errors.groupby(["w_bits", "a_bits"], sort=True))[::-1]
    names = errors.drop_duplicates("position").sort_values("position")["block"].tolist()
    recipes = errors.drop_duplicates("recipe")
    places = zip(recipes["recipe"], recipes["method"], recipes.groupby("method").cumcount(), strict=True)
    styles = {recipe: look(method, place) for recipe, method, place in places}
    figure, axes = new_figure(1, len(panels), width=0.6 + 4.1 * len(panels), height=4.2, sharey=False)
    for ax, (bits, panel) in zip(axes[0], panels, strict=True):
        drawn = dict(zip(panel["recipe"], panel["name"], strict=True))
        band_lines(ax, panel, x="position", y="value", by="recipe", names=drawn, looks=styles)
        ax.set_yscale("log")
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set(title=labels.bits_label(*bits), xlim=(-0.3, len(names) + 1.8))
        ax.grid(False, axis="x")
        label_ends(ax)
    axes[0, 0].set_ylabel("squared error behind the block / mean square")
    return figure
