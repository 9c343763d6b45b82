"""What notebook 02 shows of the folds: how exact they are and how channel ranges spread; rows in, frames out."""

import pandas as pd

from hq_lib import models
from hq_lib.graph.folding import per_channel_ranges
from hq_lib.results import labels, tables
from hq_lib.studies.bn_fold.figures import summary
from hq_lib.studies.bn_fold.study import BN

NO_NORM = "no batch norm"
UNTRAINED = "untrained"
"""In place of what a network with random statistics does not have: predictions worth counting."""
METRICS = {
    "rel_error_float64": ("relative error, float64", ".1e"), "rel_error_float32": ("relative error, float32", ".1e"),
    "acc_pct": ("accuracy, %", ".2f"), "folded_acc_pct": ("folded, %", ".2f"), "n_flips": ("changed", ".0f"),
    "integers_acc_pct": ("integers, folded, %", ".2f"), "integers_kept_acc_pct": ("integers, norms kept, %", ".2f"),
}  # fmt: skip
"""Metric -> title and format in print; all but the relative errors are of trained networks alone."""


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``bn_fold`` with ``statistics``: of each network the trained ones where they were folded, else random."""
    rows = tables.with_switches(rows, "statistics")
    trained = rows["statistics"] == "trained"
    return rows.loc[trained | ~rows["model"].isin(list(rows.loc[trained, "model"]))]


def fold_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_bn_fold, from ``shown``: relative errors in both number formats, and what predictions did."""
    index = ["model", "dataset", "n_test", "statistics"]
    wide = tables.wide(rows, *index).reindex(columns=[*index, *METRICS])
    out = pd.DataFrame({"model": [labels.printed("model", m) for m in wide["model"]]})
    out["statistics"] = [_source(*pair) for pair in zip(wide["model"], wide["statistics"], strict=True)]
    out["images"] = wide["dataset"].replace("-", "noise")
    absent = [UNTRAINED if source == "random" else tables.NOT_RUN for source in wide["statistics"]]
    for metric, (title, form) in METRICS.items():
        out[title] = [a if pd.isna(v) else f"{v:{form}}" for v, a in zip(wide[metric], absent, strict=True)]
    out["test images"] = [f"{n:,}" if n else a for n, a in zip(wide["n_test"], absent, strict=True)]
    return out


def _source(model: str, statistics: str) -> str:
    """The statistics in words; a trained network without any says so, since its fold changes nothing."""
    if statistics == "trained" and not any(isinstance(module, BN) for module in models.build(model).modules()):
        return NO_NORM
    return statistics


def worst(rows: pd.DataFrame) -> pd.DataFrame:
    """By number format the largest relative error, the network that has it, and among how many."""
    found = rows.loc[rows["metric"].str.startswith("rel_error")]
    top = found.loc[found.groupby("metric")["value"].idxmax()]
    return pd.DataFrame({
        "metric": top["metric"], "largest": top["value"], "of": top["model"], "networks": found["model"].nunique()
    }).reset_index(drop=True)  # fmt: skip


def ranges(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """One network's channels, from rows of ``bn_ranges``: layer, channel, stage, max_abs, git_sha; in order of the net.

    No lines where the network has none: its checkpoint is not shipped, or its images were not to be had.
    """
    rows = rows.loc[rows["model"] == model]
    found = tables.with_switches(rows, "channel", "layer", "stage").assign(max_abs=rows["value"])
    order = list(dict.fromkeys(per_channel_ranges(models.build(model))["layer"]))
    found = found.assign(place=found["layer"].map(order.index)).sort_values(["place", "stage", "channel"])
    return pd.DataFrame(found, columns=["channel", "layer", "stage", "max_abs", "git_sha"])


def spread(found: pd.DataFrame) -> pd.DataFrame:
    """Largest over smallest (non-zero) channel of each layer of ``ranges``, before and after, and the ratio of both."""
    table = summary(found)
    both = table["max"].div(table["min"]).unstack("stage").reindex(list(dict.fromkeys(found["layer"])))
    both = pd.DataFrame(both, columns=["before", "after"])
    return both.assign(ratio=both["after"] / both["before"]).rename_axis(columns=None)


def grown(spreads: pd.DataFrame) -> pd.DataFrame:
    """In how many layers of ``spread`` it grew, its median and largest growth, and the layer of the largest."""
    ratio = spreads["ratio"].dropna()
    if ratio.empty:
        return pd.DataFrame()
    line = (len(ratio), ratio.gt(1).to_numpy().sum(), ratio.median(), ratio.max(), ratio.idxmax())
    return pd.DataFrame([line], columns=["layers", "grew in", "median", "largest", "in"]).round(2)
