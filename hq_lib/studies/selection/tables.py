"""What notebook 05 shows of the calibration study: rows in, frames out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hq_lib.ptq import selection
from hq_lib.results import labels, published, tables
from hq_lib.studies.bench import pictures_switch
from hq_lib.studies.selection.sets import CHOICES, SMOOTH
from hq_lib.studies.selection.study import FLOAT, LOWEST, PAIR, SHIPPED, Bits, Plan

NETWORKS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_imagenet", "regnetx_600m", "mnasnet2_0")
"""the paper's columns"""
METHODS = ("brecq", "qdrop")
SOURCES = (
    "CodeDevCurry/CaPTQ (repository README)", "wimh966/QDrop (repository README)",
    "BRECQ (Li et al.), arXiv 2102.05426", "MQBench benchmark (repository ModelTC/MQBench, README)",
)  # fmt: skip
"""of published numbers, the first that has one: the paper compared, then the methods' own"""
TARGETS = {"loss_own": "loss on the set itself", "loss_common": "loss on common images", "acc_pct": "test accuracy"}
UNTOUCHED = {"batch_sampling": "without_replacement", "run_seed": -1, "split": "test"}
"""what switches say that a row does not name"""
NEAR_PP = 0.2
"""how many points below the largest n still count as kept"""
KEYS = ["model", "dataset", "method", "w_bits", "a_bits", "n_calib", "seed", "iterations", "switches"]
METRIC_LABELS = {
    "set_tv": "total variation", "set_gradient_energy": "gradient energy",
    "set_laplacian_variance": "Laplacian variance", "set_high_frequency": "high-frequency ratio",
    "set_roughness": "histogram roughness", "set_entropy": "histogram entropy",
    "set_block_error": "first-block error", "set_bn_distance": "BN distance", "set_knowledge": "cluster distance",
}  # fmt: skip


def sets(rows: pd.DataFrame, root: str = "") -> pd.DataFrame:
    """One line a calibration set: its columns, its switches, and ``acc_pct loss_own loss_common n_test git_sha``.

    Those on the pictures of the folder ``root``, "" = none was given: sets of several folders are never in one cell.
    """
    pictures = tables.with_switches(rows, "pictures")["pictures"].fillna("")
    rows = rows.loc[(rows["method"] != FLOAT) & (pictures == pictures_switch(root).get("pictures", ""))]
    judged = rows.loc[rows["metric"] == "acc_pct", [*KEYS, "n_test", "git_sha"]]
    wide = tables.wide(rows, *KEYS).reindex(columns=[*KEYS, *TARGETS]).merge(judged, on=KEYS)
    return tables.with_switches(wide, "choice", "n_pool", *UNTOUCHED).fillna(UNTOUCHED)


def where(found: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The lines whose columns have these values."""
    keep = np.ones(len(found), dtype=bool)
    for column, value in wanted.items():
        keep &= (found[column] == value).to_numpy()
    return found.loc[keep]


def main(found: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The sets of the plan's size, pool and budget, test images, no switch touched; every method and width."""
    return where(found, n_calib=plan.n_calib, n_pool=plan.n_pool, iterations=plan.iterations, **UNTOUCHED)


def of_width(found: pd.DataFrame, bits: Bits = LOWEST, method: str = "qdrop") -> pd.DataFrame:
    """The sets of one width and method."""
    return where(found, method=method, w_bits=bits[0], a_bits=bits[1])


def float_pct(rows: pd.DataFrame) -> float | None:
    """The shipped float net's test accuracy, percent; None where it was not measured."""
    found = where(rows, method=FLOAT, model=SHIPPED)["value"].tolist()
    return found[0] if found else None


def budget(found: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Validation accuracy by iterations a block, 0 = rounded to nearest: iterations, acc_pct, loss_common, n_test.

    Of sets of the plan's size and pool.
    """
    columns = ["iterations", "acc_pct", "loss_common", "n_test"]
    mine = where(found, split="common", n_calib=plan.n_calib, n_pool=plan.n_pool)
    return pd.DataFrame(mine, columns=columns).sort_values(by="iterations", ignore_index=True)


# ---------------------------------------------------------------- differences


def paired(found: pd.DataFrame, choice: str = SMOOTH, *, target: str = "acc_pct") -> dict[str, float]:
    """Paired difference of a choice to random over the draws that both have; {} below two."""
    both = found.pivot_table(index="seed", columns="choice", values=target)
    if choice == "random" or not {choice, "random"} <= set(both.columns):
        return {}
    both = both[[choice, "random"]].dropna()
    return selection.paired_difference(both[choice].tolist(), both["random"].tolist()) if len(both) > 1 else {}


def comparison(found: pd.DataFrame) -> pd.DataFrame:
    """Per choice: accuracy, losses, draws n, sd, and the paired difference to random with its 95 % interval."""
    own = found.groupby("choice")
    lines = pd.DataFrame({name: own[name].mean() for name in ("acc_pct", "loss_own", "loss_common")})
    lines = lines.assign(n=own.size(), sd=own["acc_pct"].std(ddof=1))
    gains = pd.DataFrame([paired(found, c) for c in lines.index], lines.index, ["mean", "low", "high"])
    lines = lines.join(gains).reindex([choice for choice in CHOICES if choice in own.groups])
    return lines.rename_axis("choice").sort_values("acc_pct", ascending=False, kind="stable").reset_index()


def comparison_table(found: pd.DataFrame) -> pd.DataFrame:
    """tab_selection: the comparison as text, best first; n/r where a difference needs more draws."""
    lines = comparison(found)
    out = pd.DataFrame({"calibration images": [CHOICES[choice].label for choice in lines["choice"]]})
    out["draws"] = lines["n"].astype(str)
    out["test accuracy, %"] = [tables.mean_sd(found.loc[found["choice"] == c, "acc_pct"]) for c in lines["choice"]]
    out["paired difference to random, points (95 %)"] = [
        "the reference" if line["choice"] == "random" else _interval(line) for line in lines.to_dict("records")
    ]
    for name in ("loss_own", "loss_common"):
        out[TARGETS[name]] = [f"{value:.1f}" for value in lines[name]]
    return out


def _interval(found: Mapping[Any, Any]) -> str:
    if np.isnan(found.get("mean", np.nan)):
        return tables.NOT_RUN
    return f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def differences(found: pd.DataFrame) -> pd.DataFrame:
    """Smoothest minus random by network, method, bits and set: mean, 95 % interval, draws, and random's own accuracy.

    NaN below two shared draws.
    """
    lines, names = [], ["model", "method", "w_bits", "a_bits", "n_calib", "n_test"]
    key: Any
    for key, group in found.groupby(names):
        random, result = group.loc[group["choice"] == "random", "acc_pct"], paired(group)
        if SMOOTH in set(group["choice"]):
            named = {"model": key[0], "method": key[1], "bits": labels.bits_label(key[2], key[3])}
            gain = {"random": random.mean(), **{name: result.get(name, np.nan) for name in ("mean", "low", "high")}}
            lines.append({**named, **gain, "draws": result.get("n", len(random)), "n_calib": key[4], "n_test": key[5]})
    return pd.DataFrame(lines)


def selectors(found: pd.DataFrame) -> pd.DataFrame:
    """Choosing the set of lowest loss, without labels: rank correlations with accuracy, over all sets and random ones;
    what the best random draw gains over their mean; and what choosing among all ways of a draw gains over its random
    one (mean, 95 % interval, draws)."""
    lines = []
    for loss in ("loss_own", "loss_common"):
        random = found.loc[found["choice"] == "random"].sort_values(loss)
        if random.empty:
            continue
        full = found.groupby("seed").filter(lambda group: len(group) > 1)
        picked = full.loc[full.groupby("seed")[loss].idxmin()].assign(choice="picked")
        known = paired(pd.concat([picked, full.loc[full["choice"] == "random"]]), "picked")
        lines.append({
            "lowest": TARGETS[loss], "rho, all sets": _rho(found, loss), "rho, random sets": _rho(random, loss),
            "best random draw": float(random["acc_pct"].iloc[0] - random["acc_pct"].mean()),
            **{name: known.get(name, np.nan) for name in ("mean", "low", "high")}, "draws": known.get("n", 0),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _rho(found: pd.DataFrame, loss: str) -> float:
    return float(pd.DataFrame(found, columns=[loss, "acc_pct"]).corr("spearman", min_periods=3).iloc[0, 1])  # type: ignore[arg-type]


# ---------------------------------------------------------------- scores


def scored(found: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The sets with the mean score of their images in every metric (columns ``set_...``) and ``label`` in print."""
    shared = ["dataset", "n_calib", "seed", "choice", "n_pool"]
    out = found.drop(columns="switches").merge(tables.wide(scores, *shared), on=shared)
    return out.assign(label=[CHOICES[choice].label for choice in out["choice"]])


def rho_table(found: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho in words: scores as lines; losses, accuracy, and accuracy over random sets alone as columns."""
    columns = {}
    random = found.loc[found["choice"] == "random"]
    for title, group, target in (
        ("loss,\nits own images", found, "loss_own"), ("loss,\ncommon images", found, "loss_common"),
        ("accuracy,\nall sets", found, "acc_pct"), ("accuracy,\nrandom sets", random, "acc_pct"),
    ):  # fmt: skip
        every = pd.DataFrame(group, columns=[*METRIC_LABELS, target])
        columns[title] = every.corr("spearman", min_periods=3)[target].drop(target)
    return pd.DataFrame(columns).rename(index=METRIC_LABELS)


def captq_logs() -> tuple[float, int]:
    """Spearman's rho of last-layer loss and accuracy over CaPTQ's own W4A4 runs, and their number."""
    logs = published.lookup(table="captq", w_bits=4, a_bits=4, method="captq_qdrop")
    wide = logs.pivot(index="variant", columns="metric", values="value")
    wide = pd.DataFrame(wide, columns=["fc_rec_loss", "acc_pct"]).dropna()
    return _rho(wide.rename(columns={"fc_rec_loss": "loss"}), "loss"), len(wide)


# ---------------------------------------------------------------- the paper's tables


def pairs(found: pd.DataFrame, bits: Bits) -> pd.DataFrame:
    """Accuracy without and with selected images, ours and published: model, method, selected, source, value, and what
    a caption needs of ours: seed, dataset, n_test, git_sha."""
    columns = ["model", "method", "selected", "source", "value", "seed", "dataset", "n_test", "git_sha"]
    width = where(found, w_bits=bits[0], a_bits=bits[1])
    ours = width.loc[width["choice"].isin(PAIR) & width["method"].isin(METHODS)]
    ours = ours.assign(selected=ours["choice"] == SMOOTH, source="ours", value=ours["acc_pct"])
    names = [*METHODS, *(f"captq_{method}" for method in METHODS)]
    theirs = published.lookup(table="imagenet_ptq", method=names, variant="-", source=SOURCES, model=NETWORKS)
    theirs = where(theirs, w_bits=bits[0], a_bits=bits[1]).sort_values("source", key=lambda s: s.map(SOURCES.index))
    theirs = theirs.drop_duplicates(["model", "method"])  # the first source that has one
    selected, method = theirs["method"].str.startswith("captq_"), theirs["method"].str.removeprefix("captq_")
    told = {"source": "published", "seed": -1, "dataset": "-", "n_test": 0, "git_sha": "-"}
    theirs = theirs.assign(selected=selected, method=method, **told)
    parts = [pd.DataFrame(ours, columns=columns), pd.DataFrame(theirs, columns=columns)]
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)


def table_w2a2(found: pd.DataFrame) -> pd.DataFrame:
    """tab1_w2a2: one line a network; ours with random and with the smoothest images, and the published pair."""
    both, lines = pairs(found, LOWEST), []
    ours = both.loc[both["source"] == "ours"]
    for model in dict.fromkeys([*ours["model"], *([] if len(ours) else [SHIPPED]), *NETWORKS]):
        mine = both.loc[both["model"] == model]
        images = next(iter(ours.loc[ours["model"] == model, "dataset"]), "imagenet" if model in NETWORKS else "cifar10")
        line = {"network": labels.printed("model", model), "images": "ImageNet" if images == "imagenet" else images}
        for method in METHODS:
            line |= _pair_texts(mine.loc[mine["method"] == method], labels.printed("method", method))
        lines.append(line)
    return pd.DataFrame(lines)


def _pair_texts(mine: pd.DataFrame, name: str) -> dict[str, str]:
    ours, theirs = (mine.loc[mine["source"] == source] for source in ("ours", "published"))
    texts = {}
    for chosen, words in ((False, "random"), (True, "smoothest")):
        values = ours.loc[ours["selected"] == chosen, "value"]
        texts[f"{name}, {words}, ours"] = tables.mean_sd(values) + (f" (n={len(values)})" if len(values) else "")
    named = ours.assign(choice=ours["selected"].map({True: SMOOTH, False: "random"}))
    texts[f"{name}, paired difference (95 %)"] = _interval(paired(named, target="value") if len(ours) else {})
    known = [theirs.loc[theirs["selected"] == chosen, "value"].tolist() for chosen in (False, True)]
    shown = [f"{values[0]:.2f}" if values else tables.NOT_PUBLISHED for values in known]
    texts[f"{name} → CaPTQ + {name}, published"] = " → ".join(shown) if any(known) else tables.NOT_PUBLISHED
    return texts


def claim(found: pd.DataFrame, bits: Bits) -> str:
    """One sentence: the mean paired difference of the smoothest images at a width; n/r below two shared draws."""
    parts = []
    for method in METHODS:
        gain = paired(of_width(where(found, model=SHIPPED), bits, method)).get("mean")
        parts.append(f"{labels.printed('method', method)} {tables.NOT_RUN if gain is None else f'{gain:+.2f}'}")
    return f"Smoothest instead of random calibration images at {labels.bits_label(*bits)}, points: {', '.join(parts)}"


def protocol(plan: Plan) -> str:
    """What a caption has to say of every point."""
    return f"first/last layer 8 bit, {plan.iterations:,} iterations a block"


# ---------------------------------------------------------------- the number of images


def by_number(found: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The sets of the number-of-images curve with their ``way``: without replacement, or images or batches replaced.

    Of the plan's budget, as of its pool.
    """
    asked = {"n_pool": max(plan.ns, default=0), "iterations": plan.iterations}
    curve = where(found, method="qdrop", split="test", run_seed=-1, **asked)
    curve = curve.loc[curve["choice"].isin(["random_unbalanced", "random_repeated"])]
    way = np.where(curve["choice"] == "random_repeated", "images",
                   np.where(curve["batch_sampling"] == "with_replacement", "batches", "without"))  # fmt: skip
    return curve.assign(way=way)


def by_n(curve: pd.DataFrame) -> pd.DataFrame:
    """Mean, sd and draws by number of images, and whether from there on the mean stays near the largest n's."""
    means = curve.loc[curve["way"] == "without"].groupby("n_calib")["acc_pct"].agg(["mean", "std", "count"])
    near = means["mean"] >= means["mean"].iloc[-1:].max() - NEAR_PP
    return means.assign(kept=near[::-1].cummin()[::-1])


def replacement(curve: pd.DataFrame) -> pd.DataFrame:
    """Paired difference "with minus without replacement" at equal n: way, n_calib, mean, low, high, n."""
    lines = []
    for (n, way), group in curve.loc[curve["way"] != "without"].groupby(["n_calib", "way"]):
        plain = where(curve, way="without", n_calib=n).assign(choice="random")
        if found := paired(pd.concat([group.assign(choice=way), plain]), str(way)):
            lines.append({"way": way, "n_calib": n, **found})
    return pd.DataFrame(lines, columns=["way", "n_calib", "mean", "low", "high", "n"])
