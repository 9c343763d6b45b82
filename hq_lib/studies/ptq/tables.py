"""What notebook 04 shows of the post-training studies: rows in, frames out."""

import json
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from hq_lib.quantizers import aciq
from hq_lib.results import labels, published, tables
from hq_lib.studies.bench import PUBLIC, SHIPPED
from hq_lib.studies.ptq.recipes import MSE, RECIPES
from hq_lib.studies.ptq.study import LIKE_OFFICIAL, NETS, PLANS, Plan

WIDTHS = ["float", *(labels.bits_label(w_bits, a_bits) for w_bits, a_bits in PLANS["full"].bits)]
"""groups of lines of tab_ptq; of other widths those that were measured"""
PLACES = {
    (PUBLIC, "cifar10"): "public ResNet-20", (SHIPPED, "cifar10"): "shipped ResNet-20",
    (SHIPPED, "digits"): "ResNet-20 on digits",
}  # fmt: skip
"""net and data set -> group of columns of tab_ptq, before those of the ImageNet networks"""
PAPERS = "resnet18"
"""the network whose published ImageNet numbers are always shown; those of others where they are measured"""
OFFICIAL_LINES = {
    "min-max ranges": RECIPES["minmax"].line,
    "MSE ranges, no reconstruction": RECIPES["mse"].line,
    "500 iterations a block, drop 0.5, rounding rate 1e-2": RECIPES["qdrop_adapted"].line,
    "500 iterations a block, drop 0.5": RECIPES["qdrop_official"].line,
    "500 weight + 125 activation iterations a block": RECIPES["brecq_official"].line,
    "500 iterations a block, drop 1.0": RECIPES["qdrop_undropped"].line,
    "2,000 iterations a block, drop 0.5, rounding rate 1e-2": RECIPES["qdrop_2000"].line,
}
"""variant of the official code in data/published.csv -> line of tab_ptq_official, of the same schedule"""
PAPER_LINES = {
    "float": "-", "minmax": RECIPES["minmax"].line, "mse": RECIPES["mse"].line, "aciq": RECIPES["aciq_allocated"].line,
    "adaround": RECIPES["adaround"].line, "brecq": RECIPES["brecq"].line, "qdrop": RECIPES["qdrop"].line,
}  # fmt: skip
"""method -> line under which its published ImageNet numbers (20,000 iterations) stand"""
ORDER = {"bits": WIDTHS, "line": ["-", *dict.fromkeys(recipe.line for recipe in RECIPES.values())]}
"""of the lines of both tables"""


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with ``net`` (the name in print), ``recipe``, its ``line`` (and a block's place) as columns.

    Of an ImageNet network measured on a folder of one's own, the rows on the sample are left out.
    """
    found = tables.with_switches(rows, "net", "recipe", "block", "position", "images")
    found["net"] = [column_of(*each) for each in zip(found["net"], found["dataset"], found["model"], strict=True)]
    found["line"] = [RECIPES[name].line if name in RECIPES else "-" for name in found["recipe"]]
    elsewhere = set(found.loc[found["images"].notna(), "net"])
    return found.loc[found["images"].notna() | ~found["net"].isin(list(elsewhere))]


def column_of(net: str, dataset: str, model: str) -> str:
    """The name in print of a net on a data set."""
    if dataset == "imagenet":
        return f"ImageNet {labels.printed('model', model)}".replace(" (ImageNet)", "")
    return PLACES[net, dataset]


def constants_table() -> pd.DataFrame:
    """tab_aciq_constants: the published ratio, the closed form, and the exact optimum of the real grid, by bits."""
    every = aciq.constants()
    real = every.loc[every["grid"].isin(["endpoint", "relu_endpoint"])]
    return pd.DataFrame({
        "prior": real["prior"].map({"laplace": "Laplace", "gauss": "Gauss"}),
        "values": real["relu"].map({False: "signed", True: "after a ReLU"}),
        "bits": real["bits"],
        "published": [f"{value:.2f}" for value in real["published"]],
        "closed form": [f"{value:.4f}" for value in real["ours"]],
        "gap": [f"{value:+.4f}" for value in real["gap"]],
        "optimum of the real grid": [f"{value:.4f}" for value in real["grid_optimum"]],
        "excess error of the closed form, %": [f"{value:.1f}" for value in real["penalty_pct"]],
    })  # fmt: skip


def of_plan(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The rows without those of the plan's networks that have other calibration images or another budget than it."""
    found = tables.with_switches(rows, "net", "recipe")
    asked = [(NETS[net], PUBLIC if net == PUBLIC else SHIPPED) for net in plan.nets]
    mine = [each in asked for each in zip(found["model"], found["net"], strict=True)]
    steps = {
        name: recipe.settings.get("iterations", plan.iterations) for name, recipe in RECIPES.items() if recipe.passes
    }
    fits = (found["n_calib"] == plan.n_calib) & (
        found["iterations"] == [steps.get(name, 0) for name in found["recipe"]]
    )
    return rows.loc[~np.array(mine, dtype=bool) | fits | (found["method"] == "float")]


def by_table(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of ``ptq_methods`` for tab_ptq, and for tab_ptq_official: the public network's of the official schedules."""
    known = named(rows)
    theirs = {*official()["line"], *(RECIPES[name].line for name in LIKE_OFFICIAL)}
    mine = known.loc[~known["recipe"].isin(LIKE_OFFICIAL)]
    compared = known.loc[(known["net"] == PLACES[PUBLIC, "cifar10"]) & known["line"].isin(list(theirs))]
    return rows.loc[mine.index], rows.loc[compared.index]


def methods_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_ptq, from rows of ``ptq_methods``: a block of lines for each pair of widths, columns for each network.

    An ImageNet network that was not measured has the column of its published numbers alone.
    """
    ours = named(rows)
    theirs = papers(set(rows.loc[rows["dataset"] == "imagenet", "model"]))
    measured = {*zip(tables.with_bits(ours)["bits"], ours["line"], strict=True)}
    lines = zip(theirs["bits"], theirs["line"], strict=True)
    theirs = theirs.loc[[bits in WIDTHS or (bits, line) in measured for bits, line in lines]]
    nets = dict.fromkeys([PLACES[PUBLIC, "cifar10"], *ours["net"], *theirs["net"]])
    others = [net for net in nets if net not in PLACES.values()]
    order = {**ORDER, "net": [*(net for net in PLACES.values() if net in nets), *others]}
    out = tables.build(ours, theirs, index=["bits", "method", "line"], columns=["net"], order=order)
    empty = {tables.NOT_RUN, tables.NOT_PUBLISHED}
    idle = [c for c in out.columns if (c.endswith(" gap") or c in others) and set(out[c]) <= empty]
    return out.drop(columns=idle).rename(columns={"line": "how"})


def official_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_ptq_official: the public network, ours beside the official code wherever both have one schedule."""
    out = tables.build(named(rows), official(), index=["bits", "method", "line"], order=ORDER)
    return out.rename(columns={"line": "how", "published": "official"})


def official() -> pd.DataFrame:
    """What the official code reached on the public network, with ``line`` and ``net``."""
    every = tables.with_bits(published.load())
    code = every.loc[(every["table"] == "official_ptq") & every["variant"].isin(list(OFFICIAL_LINES))]
    base = every.loc[(every["table"] == "official_inference") & (every["method"] == "float")]
    found = pd.concat([code.assign(line=code["variant"].map(OFFICIAL_LINES)), base.assign(line="-")])
    return found.assign(net=PLACES[PUBLIC, "cifar10"])


def papers(models: Collection[str]) -> pd.DataFrame:
    """The numbers of papers on ImageNet, with ``line`` and ``net``: of ``PAPERS`` and ``models``."""
    paper = tables.with_bits(published.load()).query("table == 'imagenet_ptq'")
    paper = paper.loc[paper["model"].isin([PAPERS, *models]) & paper["method"].isin(list(PAPER_LINES))]
    paper = paper.loc[~paper["variant"].str.contains("rerun")]
    nets = [column_of("", "imagenet", model) for model in paper["model"]]
    return paper.assign(line=paper["method"].map(PAPER_LINES), net=nets)


def protocol(rows: pd.DataFrame) -> dict[str, str]:
    """``n`` and ``note`` of tab_ptq's caption: images and budget."""
    rows = rows.loc[rows["method"] != "float"]
    counts = {c: "/".join(f"{n:,}" for n in sorted(set(rows[c]) - {0})) for c in ("n_test", "n_calib", "iterations")}
    n_test, n_calib, iterations = counts.values()
    budget = f"{iterations or 0} iterations a unit (BRECQ a quarter more for the steps)"
    return {
        "n": f"{n_test or 'no'} test images, the number of seeds in each cell",
        "note": f"{n_calib or 'no'} calibration images, {budget}",
    }


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """By network and bits the recipes, best first: mean, sd and number of seeds, and what the official code reached."""
    found = named(rows.loc[rows["metric"] == "acc_pct"])
    found = tables.with_bits(tables.cells(found, by=["net", "recipe", "line", "w_bits", "a_bits"]))
    where = ["net", "bits", "line"]
    theirs = official().query("metric == 'acc_pct'").pivot_table("value", where, aggfunc="max").reset_index()
    found = found.merge(theirs, on=where, how="left").sort_values(
        ["net", "bits", "mean"], ascending=[True, False, False]
    )
    out = pd.DataFrame(found, columns=["net", "bits", "recipe", "mean", "sd", "n", "value"])
    return out.rename(columns={"value": "official"}).reset_index(drop=True).round(2)


def first_net(rows: pd.DataFrame) -> str:
    """The network that figures show: the public one where it was measured, else the next; "" where none was."""
    measured = dict.fromkeys(named(rows)["net"])
    return next((column for column in (*PLACES.values(), *measured) if column in measured), "")


def errors(rows: pd.DataFrame, *, net: str, recipes: Sequence[str]) -> pd.DataFrame:
    """The errors behind each block, from rows of ``ptq_errors``, of one network and some recipes.

    With ``name``: the method's, or the recipe's where its method has several.
    """
    found = named(rows)
    found = found.loc[(found["net"] == net) & found["recipe"].isin(list(recipes))]
    printed = pd.Series([labels.printed("method", method) for method in found["method"]], found.index, dtype="str")
    alone = found.groupby("method")["recipe"].transform("nunique") == 1
    return found.assign(name=printed.where(alone, found["recipe"]))


def at_the_logits(found: pd.DataFrame) -> pd.DataFrame:
    """By bits and recipe of ``errors``: mean error behind the first block and behind the last, and seeds of each."""
    lines = tables.with_bits(found.assign(position=found["position"].astype(float)))
    wide = lines.pivot_table(index=["bits", "recipe"], columns="position", values="value", sort=False)
    ends = {"first block": lines["position"].min(), "logits": lines["position"].max()}
    wide = wide.reindex(columns=list(ends.values())).set_axis(list(ends), axis=1)
    return wide.assign(seeds=lines.groupby(["bits", "recipe"])["seed"].nunique())


def error_claim(found: pd.DataFrame, net: str) -> dict[str, str]:
    """``claim`` and ``note`` of fig_error_accumulation: what QDrop leaves of the error, and seeds by recipe."""
    ends = at_the_logits(found)
    logits = pd.DataFrame(ends["logits"].unstack("recipe"), columns=["mse", "qdrop"])
    left = logits.dropna().reset_index().to_dict("records")
    shown = ", ".join(f"{100 * line['qdrop'] / line['mse']:.0f} % at {line['bits']}" for line in left)
    names = dict(zip(found["recipe"], found["name"], strict=True))
    several = ", ".join(
        f"{names[line['recipe']]} {line['seeds']} at {line['bits']}"
        for line in ends.reset_index().to_dict("records")
        if line["seeds"] > 1
    )
    return {
        "claim": f"Quantization error behind each block ({net}); at the logits QDrop leaves this share of what the "
        f"nearest rounding leaves: {shown or tables.NOT_RUN}",
        "note": f"seeds of each method: {several}; else 1" if several else "one seed of each method",
    }


def schedules(rows: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy by schedule, from rows of ``ptq_schedule``, best first: columns schedule, mean, count."""
    lines = rows.assign(schedule=[_schedule_name(json.loads(text)) for text in rows["switches"]])
    table = lines.groupby("schedule")["value"].agg(["mean", "count"]).reset_index()
    return table.sort_values("mean", ascending=False, ignore_index=True)


def _schedule_name(switches: dict) -> str:
    skipped = ("net", "split", "first_last_bits", "travel", "checkpoint")
    others = [f"{name} {value:g}" for name, value in switches.items() if name not in skipped]
    return ", ".join([f"rate x iterations {switches['travel']:g}", *others])


def aciq_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``aciq_mse`` side by side: dataset, net, tensor, layer, prior, bits, n_calib, a column for each error."""
    index = ["dataset", "net", "tensor", "layer", "prior", "bits", "n_calib"]
    rows = tables.with_switches(rows, *index[1:5])
    rows["bits"] = rows["a_bits"].where(rows["tensor"] == "activation", rows["w_bits"]).astype(int)
    return tables.wide(rows, *index).reindex(columns=[*index, *sorted(MSE)])


def ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Measured over predicted error by tensor and bits: median, smallest, largest, of both predictions."""
    ratio = {name: found["mse_measured"] / found[f"mse_{name}"] for name in ("model", "exact")}
    groups = found.assign(**ratio).groupby(["tensor", "bits"])[list(ratio)]
    out = groups.agg(["median", "min", "max"])
    return out.set_axis(out.columns.map(" ".join), axis=1).reset_index()
