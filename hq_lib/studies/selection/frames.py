"""Frames of the calibration study, from its rows alone: points, scored sets, paired differences, rank correlations."""

import json

import numpy as np
import pandas as pd

from hq_lib.ptq import selection
from hq_lib.results import published, store
from hq_lib.studies.selection.bench import Bits
from hq_lib.studies.selection.points import LOWEST, size_of
from hq_lib.studies.selection.sets import CHOICES
from hq_lib.studies.selection.study import SETS, STUDY

TARGETS = {"loss_own": "loss on the set itself", "loss_common": "loss on common images", "acc_pct": "test accuracy"}
UNTOUCHED = {"batch_sampling": "without_replacement", "run_seed": -1, "split": "test"}
"""what switches say that a row does not name"""
NEAR_PP = 0.2
"""how many points below the largest n still count as kept"""
KEYS = ["model", "method", "w_bits", "a_bits", "n_calib", "seed", "iterations", "switches"]


def frame(profile: str, dataset: str) -> pd.DataFrame:
    """One line a point: its columns, its switches, and ``acc_pct loss_own loss_common n_test seconds``."""
    rows = store.read(STUDY, profile=profile)
    rows = rows.loc[(rows["profile"] == profile) & (rows["dataset"] == dataset) & (rows["method"] != "float")]
    if rows.empty:
        return pd.DataFrame(
            columns=[*KEYS, "choice", "n_pool", "batch_sampling", "run_seed", "split", *TARGETS, "n_test"]
        )
    wide = rows.pivot(index=KEYS, columns="metric", values="value").reset_index().rename_axis(columns=None)
    judged = rows.loc[rows["metric"] == "acc_pct"].set_index(KEYS)[["n_test", "seconds"]]
    wide = wide.merge(judged, left_on=KEYS, right_index=True)
    switches = pd.DataFrame([json.loads(text) for text in wide["switches"]], index=wide.index)
    for name, value in UNTOUCHED.items():
        switches[name] = switches[name].fillna(value) if name in switches else value
    return wide.join(switches[["choice", "n_pool", *UNTOUCHED]])


def measured_on(profile: str, dataset: str) -> str:
    """The data set whose rows stand in for ``dataset``: itself, or "digits" where CIFAR-10 could not be had."""
    rows = store.read(STUDY, profile=profile)
    known = set(rows.loc[rows["profile"] == profile, "dataset"])
    return "digits" if dataset == "cifar10" and dataset not in known and "digits" in known else dataset


def main_sets(
    points: pd.DataFrame, profile: str, dataset: str, *, method: str = "qdrop", bits: Bits = LOWEST
) -> pd.DataFrame:
    """The points of the main comparison: one set size and pool, test images, no switch touched."""
    size = size_of(dataset, profile)
    width = {"method": method, "w_bits": bits[0], "a_bits": bits[1]}
    protocol = {"n_calib": size.n_calib, "n_pool": size.n_pool, "iterations": size.iterations}
    return where(points, **width, **protocol, **UNTOUCHED)


def where(points: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The lines whose columns have these values."""
    keep = np.ones(len(points), dtype=bool)
    for column, value in wanted.items():
        keep &= (points[column] == value).to_numpy()
    return points.loc[keep]


def paired(
    points: pd.DataFrame, choice: str, *, baseline: str = "random", target: str = "acc_pct"
) -> dict[str, float] | None:
    """Paired difference of a choice to the baseline over the draws that both have; None below two."""
    both = points.pivot_table(index="seed", columns="choice", values=target)
    if choice == baseline or not {choice, baseline} <= set(both.columns):
        return None
    both = both[[choice, baseline]].dropna()
    return selection.paired_difference(both[choice].tolist(), both[baseline].tolist()) if len(both) > 1 else None


def comparison(points: pd.DataFrame) -> pd.DataFrame:
    """Per choice: draws, accuracy mean and sd, losses, and the paired difference to random with its 95 % interval."""
    lines = []
    for choice in [c for c in CHOICES if c in set(points["choice"])]:
        own = points.loc[points["choice"] == choice]
        line = {"choice": choice, "label": CHOICES[choice].label, "n": len(own)}
        line |= {"acc_pct": own["acc_pct"].mean(), "sd": own["acc_pct"].std(ddof=1)}
        line |= {name: own[name].mean() for name in ("loss_own", "loss_common")}
        found = paired(points, choice) or {}
        lines.append(line | {key: found.get(key, np.nan) for key in ("mean", "low", "high", "p_value")})
    columns = ["choice", "label", "n", "acc_pct", "sd", "loss_own", "loss_common", "mean", "low", "high", "p_value"]
    return pd.DataFrame(lines, columns=columns).sort_values("acc_pct", ascending=False, ignore_index=True)


def scored_sets(profile: str, dataset: str) -> pd.DataFrame:
    """The main comparison's sets with the mean score of their images in every metric (columns ``set_...``)."""
    rows = store.read(SETS, profile=profile)
    rows = rows.loc[(rows["profile"] == profile) & (rows["dataset"] == dataset)]
    wide = rows.pivot_table(index=["n_calib", "seed", "switches"], columns="metric", values="value").reset_index()
    switches = [json.loads(text) for text in wide["switches"]]
    wide = wide.assign(choice=[s["choice"] for s in switches], n_pool=[s["n_pool"] for s in switches])
    points = main_sets(frame(profile, dataset), profile, dataset).drop(columns="switches")
    return points.merge(wide.drop(columns="switches"), on=["n_calib", "seed", "choice", "n_pool"])


def correlations(sets: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho of every set metric and both losses with both losses and accuracy: metric target rho p_value n."""
    metrics = [c for c in sets.columns if c.startswith("set_")]
    parts = []
    for target in TARGETS:
        names = [*metrics, *(name for name in ("loss_own", "loss_common") if name != target), target]
        parts.append(selection.spearman(pd.DataFrame(sets, columns=names), target).assign(target=target))
    return pd.concat(parts, ignore_index=True)


def by_number(profile: str, dataset: str) -> pd.DataFrame:
    """The points of the number-of-images curve: ``n_calib seed acc_pct way`` (without, images or batches replaced)."""
    size = size_of(dataset, profile)
    points = where(frame(profile, dataset), method="qdrop", split="test", n_pool=max(size.ns), run_seed=-1)
    points = points.loc[points["choice"].isin(["random_unbalanced", "random_repeated"])]
    way = np.where(points["choice"] == "random_repeated", "images",
                   np.where(points["batch_sampling"] == "with_replacement", "batches", "without"))  # fmt: skip
    return points.assign(way=way)[["n_calib", "seed", "acc_pct", "way", "n_test"]]


def smallest_n(curve: pd.DataFrame, *, within: float = NEAR_PP) -> tuple[int, pd.DataFrame]:
    """The smallest n from which on the mean stays within ``within`` points of the largest n's, and all means."""
    plain = curve.loc[curve["way"] == "without"]
    means = plain.groupby("n_calib")["acc_pct"].agg(["mean", "std", "count"])
    near = (means["mean"] >= means["mean"].iloc[-1] - within).to_numpy()
    far = np.flatnonzero(~near)
    return int(means.index[far[-1] + 1 if len(far) else 0]), means


def replacement(curve: pd.DataFrame) -> pd.DataFrame:
    """Paired difference "with minus without replacement" at equal n: way, n_calib, mean, low, high, n."""
    lines = []
    for (n, way), group in curve.loc[curve["way"] != "without"].groupby(["n_calib", "way"]):
        plain = curve.loc[(curve["way"] == "without") & (curve["n_calib"] == n)]
        both = group.merge(plain, on="seed", suffixes=("", "_plain"))
        if len(both) > 1:
            found = selection.paired_difference(both["acc_pct"].tolist(), both["acc_pct_plain"].tolist())
            lines.append({"way": way, "n_calib": n, **found})
    return pd.DataFrame(lines, columns=["way", "n_calib", "mean", "low", "high", "sd", "p_value", "n"])


def selector(points: pd.DataFrame, loss: str) -> dict[str, float]:
    """Choosing by a loss without labels: gain over the mean of random draws, its rank correlation, gain over random
    where it chooses among all ways of each draw (mean, low, high, n)."""
    random = points.loc[points["choice"] == "random"].sort_values(loss)
    found = {"gain_of_best_draw": float(random["acc_pct"].iloc[0] - random["acc_pct"].mean()), "n_random": len(random)}
    found["rho_random"] = _rho(random, loss)
    found["rho_all"] = _rho(points, loss)
    full = points.groupby("seed").filter(lambda group: len(group) > 1)
    picked = full.loc[full.groupby("seed")[loss].idxmin()].set_index("seed")["acc_pct"]
    base = full.loc[full["choice"] == "random"].set_index("seed")["acc_pct"].reindex(picked.index)
    known = selection.paired_difference(picked.tolist(), base.tolist()) if len(picked) > 1 else {}
    return found | {key: known.get(key, np.nan) for key in ("mean", "low", "high", "n")}


def _rho(points: pd.DataFrame, loss: str) -> float:
    return float(selection.spearman(pd.DataFrame(points, columns=[loss, "acc_pct"]), "acc_pct")["rho"].iloc[0])


def captq_logs() -> tuple[float, int]:
    """Spearman's rho of last-layer loss and accuracy over CaPTQ's own W4A4 runs, and their number."""
    logs = published.lookup(table="captq", w_bits=4, a_bits=4, method="captq_qdrop")
    wide = logs.pivot(index="variant", columns="metric", values="value")
    wide = pd.DataFrame(wide, columns=["fc_rec_loss", "acc_pct"]).dropna()
    return float(selection.spearman(wide, "acc_pct")["rho"].iloc[0]), len(wide)
