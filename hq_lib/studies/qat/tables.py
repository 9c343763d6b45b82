"""What notebook 03 shows of the QAT study: curves by hand, tables beside published numbers; rows in, frames out."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from hq_lib import models
from hq_lib.graph import QUANTIZER_SUFFIX, BitPolicy, act_quantizers, quantize
from hq_lib.quantizers.dsq import dsq_quantize, dsq_soft
from hq_lib.results import labels, published, tables
from hq_lib.results.rows import KEY
from hq_lib.studies.qat.study import EXECUTORS, FLOAT, GROUP, PLANS, Plan, settings
from hq_lib.studies.qat.untrained import IN_FLOAT
from hq_lib.training.recipes import BIT_LISTS

GROUP_TABLE = "seed001"
METHODS_BITS, GROUP_BITS = ("W8A8", "W4A4", "W3A3", "W2A2", "W1A32", "W1A1"), ("W8A8", "W6A6", "W4A4")
"""Bit widths that a table lists even where nothing was run; other published ones are left out."""
LIST_METHODS = ("minmax", "dorefa_hw", "pact", "mpact", "mpact_fixed")
"""Ranges alone, without training, and the seed's methods, for each of its configurations."""


def dsq_curves(*, alphas: Sequence[float] = (0.05, 0.2, 0.45), n: int = 601) -> pd.DataFrame:
    """DSQ of 2 bits in [-1, 1] on n points a little beyond: columns x, dsq_alpha, soft, hard, slope (d soft / d x).

    The slope is autograd's derivative of the soft staircase, not the library's closed form, so that the figure is an
    independent picture of it.
    """
    frames = []
    for alpha in alphas:
        x = torch.linspace(-1.2, 1.2, n, dtype=torch.float64, requires_grad=True)
        grid = torch.tensor([-1.0, 1.0, alpha], dtype=torch.float64)  # low, high, dsq_alpha
        soft = dsq_soft(x, *grid, bits=2)
        (slope,) = torch.autograd.grad(soft.sum(), x)
        hard = dsq_quantize(x.detach(), *grid, bits=2)
        columns = {"x": x.detach(), "soft": soft.detach(), "hard": hard, "slope": slope}
        frames.append(pd.DataFrame({key: value.numpy() for key, value in columns.items()}).assign(dsq_alpha=alpha))
    return pd.concat(frames, ignore_index=True)


def of_plan(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The rows without those that were trained for other epochs, or at another rate, than the plan has for them."""
    known = tables.with_switches(rows, "lr", "lists")

    def is_planned(row: Any) -> bool:
        if row["method"] == FLOAT or pd.notna(row["lists"]):
            return True
        widths = {"w_bits": int(row["w_bits"]), "a_bits": int(row["a_bits"])}
        config = settings(plan, {**row, **widths, "lists": ""}).config
        return (row["epochs"], row["lr"]) == (config.epochs, config.lr)

    return rows.loc[[is_planned(row) for row in known.to_dict("records")]]


def scores(rows: pd.DataFrame, *, split: str | None = None, lists: bool = False) -> pd.DataFrame:
    """Of each cell the longest runs of one split (None = test, "val", or "start": validation before training).

    Distilled runs are left out. ``lists``: the rows of seed 001's configurations, named in column ``configuration``, in
    place of all others.
    """
    known = tables.with_switches(rows, "split", "lists", "distill").rename(columns={"lists": "configuration"})
    judged = known["split"].isna() if split is None else known["split"] == split
    kept = known.loc[judged & known["distill"].isna() & (known["configuration"].notna() == lists)]
    return tables.longest(kept, "model", "method", "w_bits", "a_bits", "configuration")


def calibrated_and_trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy, %, after calibration alone and after training, by network, bits and method."""
    parts = {"calibrated": scores(rows, split="start"), "trained": scores(rows, split="val")}
    index = ["model", "bits", "method"]
    return pd.DataFrame({k: tables.with_bits(v).groupby(index)["value"].mean() for k, v in parts.items()}).round(2)


def methods_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_resnet20_methods: bits x methods, ours beside the numbers published for ResNet-20 on CIFAR-10."""
    return _table(rows, "resnet20", published.load().query("table == 'resnet20_cifar10'"), METHODS_BITS)


def group_table(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """tab_toynet, tab_mobilenetv2, tab_resnet20: ours beside the group's own numbers for the network.

    Where the group published several numbers for one cell, all are shown, best first; its integer runs are a line of
    their own.
    """
    theirs = published.load().query("table == @GROUP_TABLE and model == @model")
    in_integers = theirs["variant"].str.startswith("integer")
    theirs = theirs.assign(method=theirs["method"].mask(in_integers, theirs["method"] + "_integer"))
    return _table(rows, model, theirs, GROUP_BITS)


def together(rows: pd.DataFrame, group: pd.DataFrame, floats: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``qat`` and of ``qat_group``, each run once, whichever of them has it.

    Of networks that have no float row among them that of ``float_reference`` besides.
    """
    both = pd.concat([rows, group], ignore_index=True).drop_duplicates([c for c in KEY if c != "experiment"])
    there = both.loc[both["method"] == FLOAT, "model"]
    return pd.concat([both, floats.loc[~floats["model"].isin(there)]], ignore_index=True)


def sizes() -> pd.DataFrame:
    """Parameters of the group's networks, and MAdds by the counting that gives its numbers (``count_madds_thop``)."""
    nets = [models.build(model) for model in GROUP]
    counted = [(models.count_parameters(net), models.count_madds_thop(net, (3, 32, 32))) for net in nets]
    return pd.DataFrame(counted, GROUP, ["parameters", "MAdds"])


def lists_table(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """Seed 001's configurations, bits by layer: ours beside the group's own fake-quantized accuracies."""
    ours, theirs = scores(rows, lists=True), published.load().query("table == @GROUP_TABLE and model == @model")
    named = theirs["variant"].str.split(",").str[0].str.strip()
    theirs = theirs.assign(configuration=named).loc[named.isin(list(BIT_LISTS.get(model, ())))]
    order = {"configuration": list(BIT_LISTS.get(model, ())), "method": LIST_METHODS}
    return tables.build(ours.loc[ours["model"] == model], theirs, index=["configuration", "method"], order=order)


def _table(rows: pd.DataFrame, model: str, theirs: pd.DataFrame, bits: Sequence[str]) -> pd.DataFrame:
    ours = scores(rows)
    ours = ours.loc[ours["model"] == model]
    theirs = tables.with_bits(theirs.loc[theirs["metric"] == "acc_pct"])
    known = [FLOAT, *PLANS["full"].methods, "dorefa_hw", "lsq_plus", "mpact_integer"]
    listed = [FLOAT, *bits, *tables.with_bits(ours)["bits"]]
    theirs = theirs.loc[theirs["method"].isin(known) & theirs["bits"].isin(listed)]
    return tables.build(ours, theirs, index=["bits", "method"], order={"bits": list(dict.fromkeys(listed))})


def integers_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_qat_integers: each trained network as it was trained, with its accumulators' biases, and in integers, %.

    Networks that are one but for the bits of some layers go by their files' names.
    """
    shown = tables.with_bits(tables.with_switches(rows, "executor", "network")).fillna({"executor": "same class"})
    for column in ("model", "method"):
        shown[column] = [labels.printed(column, name) for name in shown[column]]
    return _pivoted(
        shown.sort_values(["w_bits", "method"]),
        tables.telling(shown, ["model", "bits", "method", "seed"], "network"),
        "executor",
        [*EXECUTORS, "same class"],
    )


def branches_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_branches: accuracy of ``qat_untrained``'s ResNet-20 in percent, by bits and by what is left in float."""
    shown = tables.with_bits(tables.with_switches(rows, "in_float")).dropna(subset="in_float")
    shown["in_float"] = "in float: " + shown["in_float"]
    return _pivoted(shown, ["bits"], "in_float", [f"in float: {what}" for what in IN_FLOAT])


def _pivoted(shown: pd.DataFrame, index: list[str], columns: str, order: list[str]) -> pd.DataFrame:
    """Values as text, a line for each cell of ``index``, a column for each of ``order``; n/r where there is no row."""
    wide = shown.pivot_table(index=index, columns=columns, values="value", sort=False).reindex(columns=order)
    return wide.map("{:.2f}".format).where(wide.notna(), tables.NOT_RUN).reset_index().rename_axis(columns=None)


def lengths(rows: pd.DataFrame) -> str:
    """The epochs of fine-tuning behind ``scores`` and their numbers' formats, for a caption."""
    trained = rows.loc[rows["method"] != FLOAT]
    epochs = "/".join(map(str, sorted(set(trained["epochs"])))) or "no"
    formats = sorted(set(trained["device"].str.extract("(float32|bfloat16)")[0].dropna()))
    return f"{epochs} epochs of fine-tuning" + f" in {' or '.join(formats)}" * bool(formats)


def clip_curves(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """PACT's clips of ResNet-20 for fig_pact_alpha, from rows of ``qat_clips``, of the plan's epochs and rate.

    Columns w_bits, a_bits, epoch, layer, alpha, seed, git_sha; layers in order of execution.
    """
    rows = of_plan(rows, plan)
    rows = tables.with_switches(rows, "epoch", "layer", "lists", "distill").assign(alpha=rows["value"])
    plain = rows["lists"].isna() & rows["distill"].isna()
    rows = rows.loc[plain & (rows["method"] == "pact") & (rows["model"] == "resnet20")]
    policy = BitPolicy("pact:4", "pact:4", placement="academic")
    qnet = quantize(models.build("resnet20"), policy, torch.zeros(1, 3, 32, 32))
    order = {name.removesuffix(QUANTIZER_SUFFIX): i for i, name in enumerate(act_quantizers(qnet))}
    reached = rows.groupby(["w_bits", "a_bits"])["epoch"].transform("max")
    rows = rows.loc[reached == rows["epochs"]]  # a training that is not done yet waits
    rows = rows.assign(place=[order.get(n, len(order)) for n in rows["layer"]])
    rows = rows.sort_values(["w_bits", "epoch", "place"])
    return pd.DataFrame(rows, columns=["w_bits", "a_bits", "epoch", "layer", "alpha", "seed", "git_sha"])


def best(rows: pd.DataFrame, *, model: str = "resnet20") -> pd.DataFrame:
    """By bits: each method's mean test accuracy, best first, its distance to float and the images' standard error."""
    mine = scores(rows)
    mine = tables.with_bits(mine.loc[mine["model"] == model])
    base = mine.loc[mine["method"] == FLOAT, "value"].mean()
    means = mine.loc[mine["method"] != FLOAT].groupby(["bits", "method"], sort=False)
    out = means.agg(acc_pct=("value", "mean"), n_seeds=("value", "count"), n_test=("n_test", "first")).reset_index()
    share = out["acc_pct"] / 100
    out = out.assign(minus_float=out["acc_pct"] - base, error=100 * (share * (1 - share) / out["n_test"]) ** 0.5)
    return out.sort_values(["bits", "acc_pct"], ascending=False, ignore_index=True).round(2)


def mean_clips(clips: pd.DataFrame) -> pd.DataFrame:
    """PACT's mean clip as calibrated and at the end, by width."""
    ends = pd.DataFrame(clips.groupby(["w_bits", "a_bits", "epoch"])["alpha"].mean()).reset_index()
    found = ends.groupby(["w_bits", "a_bits"])["alpha"].agg(["first", "last"])
    return pd.DataFrame(found).rename(columns={"first": "calibrated", "last": "trained"}).reset_index().round(3)
