"""What the rows of the post-training studies say: tab_aciq_constants, tab_ptq, and the findings of notebook 04."""

import json
from collections.abc import Sequence

import pandas as pd

from hq_lib.quantizers import aciq
from hq_lib.results import figures, labels, published, store, tables
from hq_lib.studies.ptq import aciq_mse
from hq_lib.studies.ptq.recipes import RECIPES
from hq_lib.studies.ptq.study import BITS, ERRORS, PUBLIC, SHIPPED, STUDY

COLUMNS = ("public ResNet-20", "shipped ResNet-20", "ResNet-20 on digits", "ImageNet EfficientNet-Lite0",
           "ImageNet ResNet-18")  # fmt: skip
"""groups of columns of tab_ptq, those without a number left out"""
PAPERS = COLUMNS[-1]
OTHERS = ("drop 1.0, official rate", "2,000 iterations, rate 1e-2")
"""lines for which there is a measured number of the official code, and none of ours"""
OFFICIAL_LINES = {
    "min-max ranges": RECIPES["minmax"].line,
    "MSE ranges, no reconstruction": RECIPES["mse"].line,
    "500 iterations a block, drop 0.5, rounding rate 1e-2": RECIPES["qdrop"].line,
    "500 iterations a block, drop 0.5": RECIPES["qdrop_official"].line,
    "500 weight + 125 activation iterations a block": RECIPES["brecq"].line,
    "500 iterations a block, drop 1.0": OTHERS[0],
    "2,000 iterations a block, drop 0.5, rounding rate 1e-2": OTHERS[1],
}
"""variant of the official code in data/published.csv -> line of tab_ptq"""
PAPER_LINES = {
    "float": "-", "minmax": RECIPES["minmax"].line, "aciq": RECIPES["aciq_allocated"].line,
    "adaround": RECIPES["adaround"].line, "brecq": RECIPES["brecq"].line, "qdrop": RECIPES["qdrop"].line,
}  # fmt: skip
"""method -> line under which its published ImageNet numbers (20,000 iterations) stand"""
TARGETS_PCT = {(4, 4): 91.0, (3, 3): 88.9, (2, 4): 89.1, (2, 2): 80.4}
"""what the official QDrop code reaches on the public net in 500 iterations with the better rate (one seed)"""


def rows_of(study: str, profile: str) -> pd.DataFrame:
    """A study's rows of one profile, with ``net`` and ``recipe`` (and a block's place) as columns."""
    found = store.read(study, profile=profile)
    found = found.loc[found["profile"] == profile]
    switches = pd.DataFrame([json.loads(text) for text in found["switches"]], index=found.index)
    wanted = switches.reindex(columns=["net", "recipe", "block", "position"])
    found = found.assign(**{column: wanted[column] for column in wanted})
    return found.assign(net=[column_of(*pair) for pair in zip(found["net"], found["dataset"], strict=True)])


def column_of(net: str, dataset: str) -> str:
    """One of ``COLUMNS``: the name in print of a net on a data set."""
    known = {(PUBLIC, "cifar10"): 0, (SHIPPED, "cifar10"): 1, (SHIPPED, "digits"): 2, (SHIPPED, "imagenet"): 3}
    return COLUMNS[known[net, dataset]]


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


def table(profile: str) -> pd.DataFrame:
    """tab_ptq: a block of lines for each pair of bit widths, a group of columns for each network."""
    ours, theirs = rows_of(STUDY, profile), known()
    ours = ours.assign(line=[RECIPES[key].line if key in RECIPES else "-" for key in ours["recipe"]])
    lines = ["-", *(recipe.line for recipe in RECIPES.values()), *OTHERS]
    order = {
        "bits": ["float", *(labels.bits_label(w, a) for w, a in BITS)],
        "line": list(dict.fromkeys(lines)),
        "net": [column for column in COLUMNS if column in {*ours["net"], *theirs["net"]}],
    }
    out = tables.build(ours, theirs, index=["bits", "method", "line"], columns=["net"], order=order)
    empty = {tables.NOT_RUN, tables.NOT_PUBLISHED}
    idle = [c for c in out.columns if c.endswith(" gap") and set(out[c]) <= empty]
    return out.drop(columns=idle).rename(columns={"line": "how"})


def known() -> pd.DataFrame:
    """The published numbers of tab_ptq, with its ``line`` and ``net``."""
    every = published.load()
    widths = {(float(w), float(a)) for w, a in (*BITS, (32, 32))}
    every = every.loc[[pair in widths for pair in zip(every["w_bits"], every["a_bits"], strict=True)]]
    code = every.loc[(every["table"] == "official_ptq") & every["variant"].isin(list(OFFICIAL_LINES))]
    base = every.loc[(every["table"] == "official_inference") & (every["method"] == "float")]
    paper = every.loc[(every["table"] == "imagenet_ptq") & (every["model"] == "resnet18")]
    paper = paper.loc[paper["method"].isin(list(PAPER_LINES)) & ~paper["variant"].str.contains("rerun")]
    return pd.concat([
        code.assign(line=code["variant"].map(OFFICIAL_LINES), net=COLUMNS[0]),
        base.assign(line="-", net=COLUMNS[0]),
        paper.assign(line=paper["method"].map(PAPER_LINES), net=PAPERS),
    ])  # fmt: skip


def caption(profile: str) -> str:
    """What tab_ptq shows, with data set, profile, images and seeds."""
    rows = rows_of(STUDY, profile)
    rows = rows.loc[rows["recipe"] != "float"]
    data_sets = ", ".join(sorted(set(rows["dataset"])))
    n_test, n_calib = ("/".join(f"{n:,}" for n in sorted(set(rows[c]))) for c in ("n_test", "n_calib"))
    iterations = max(rows["iterations"], default=0)
    claim = "Without training, learned rounding is worth little at 4 bits and nearly all at 2: test accuracy, percent"
    switches = f"{n_calib} calibration images, {iterations} iterations a unit (BRECQ a quarter more for the steps)"
    counted = f"{n_test} test images, the number of seeds in each cell"
    return figures.caption(claim, profile=profile, n=counted, seeds=sorted(set(rows["seed"])), dataset=data_sets,
                            switches=switches)  # fmt: skip


def accuracies(profile: str) -> pd.DataFrame:
    """Mean, sd and number of seeds by net, recipe and bits: columns net recipe w_bits a_bits mean sd n."""
    rows = rows_of(STUDY, profile)
    rows = rows.loc[rows["metric"] == "acc_pct"]
    return tables.cells(rows, by=["net", "recipe", "w_bits", "a_bits"])


def errors(profile: str, *, net: str, recipes: Sequence[str]) -> pd.DataFrame:
    """The errors behind each block of one net, for ``fig_error_accumulation``, only recipes given."""
    rows = rows_of(ERRORS, profile)
    return rows.loc[(rows["net"] == net) & rows["recipe"].isin(list(recipes))]


def first_net(profile: str, dataset: str) -> str:
    """The net of a data set that figures show, one of ``COLUMNS``: the public one where it was measured."""
    rows = rows_of(STUDY, profile)
    on_it = rows["dataset"].isin([dataset, "digits"])
    return next(column for column in COLUMNS if column in set(rows.loc[on_it, "net"]))


def findings(profile: str) -> list[str]:
    """The sentences that the rows of a profile support."""
    cells = accuracies(profile).to_dict("records")
    lines: list[str] = []
    for net in COLUMNS:
        if mine := [cell for cell in cells if cell["net"] == net]:
            lines += _accuracy_findings(mine, net)
    return [*lines, *_error_findings(profile), *_clip_findings(profile)]


def _accuracy_findings(cells: list[dict], net: str) -> list[str]:
    lines = [f"{net}: float {cell['mean']:.2f} %" for cell in cells if cell["recipe"] == "float"]
    for bits in BITS:
        here = [cell for cell in cells if (cell["w_bits"], cell["a_bits"]) == bits]
        shown = [f"{cell['recipe']} {_text(cell)}" for cell in sorted(here, key=lambda cell: -cell["mean"])]
        lines += [f"{net}, {labels.bits_label(*bits)}, best first: {', '.join(shown)}"] if shown else []
        for cell in here:
            if net == COLUMNS[0] and bits in TARGETS_PCT and cell["recipe"] == "qdrop":
                gap = cell["mean"] - TARGETS_PCT[bits]
                lines.append(f"  QDrop against the official code's {TARGETS_PCT[bits]} %: {gap:+.2f} points")
    return lines


def _text(cell: dict) -> str:
    spread = f" ± {cell['sd']:.2f}" if cell["n"] > 1 else ""
    return f"{cell['mean']:.2f}{spread} (n={cell['n']})"


def _error_findings(profile: str) -> list[str]:
    rows = rows_of(ERRORS, profile)
    means = rows.pivot_table(index=["net", "w_bits", "a_bits", "position"], columns="recipe", values="value")
    if not {"mse", "qdrop"} <= set(means.columns):
        return []
    factor = means.assign(factor=means["mse"] / means["qdrop"])["factor"].dropna().reset_index()
    lines = []
    for group in [part for _, part in factor.groupby(["net", "w_bits", "a_bits"], sort=False)]:
        first, last = group.to_dict("records")[0], group.to_dict("records")[-1]
        lines.append(
            f"{first['net']}, {labels.bits_label(first['w_bits'], first['a_bits'])}: QDrop divides the error of "
            f"rounding to nearest by {first['factor']:.1f} behind the first block and by {last['factor']:.1f} at the "
            f"logits"
        )
    return lines


def _clip_findings(profile: str) -> list[str]:
    ratios = aciq_mse.ratios(aciq_mse.table(profile))
    return [
        f"ACIQ, {row['bits']} bit {row['tensor']}s: measured error over predicted, median {row['model median']:.2f} "
        f"({row['model min']:.2f} to {row['model max']:.2f}) for the noise model, {row['exact median']:.2f} "
        f"({row['exact min']:.2f} to {row['exact max']:.2f}) for the exact integral"
        for row in ratios.to_dict("records")
    ]
