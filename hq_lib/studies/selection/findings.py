"""The sentences that the rows of the calibration study support; a losing way is called one."""

from math import nan
from typing import Any

import pandas as pd

from hq_lib.results import store
from hq_lib.results.labels import bits_label
from hq_lib.studies.selection import frames
from hq_lib.studies.selection.points import LOWEST, WIDTHS, size_of
from hq_lib.studies.selection.sets import CHOICES, SMOOTH
from hq_lib.studies.selection.study import STUDY

METHODS = ("brecq", "qdrop")


def findings(profile: str, dataset: str) -> list[str]:
    """Every sentence in the order of the notebook; parts that were not run give none."""
    points = frames.frame(profile, dataset)
    main = frames.main_sets(points, profile, dataset)
    lines = [*_budget(points, profile, dataset), *_luck(points, main), *_ways(main), *_widths(points, profile, dataset)]
    lines += [*_rank(profile, dataset), *_selectors(main), *_numbers(profile, dataset), *_captq()]
    return lines


def float_pct(profile: str, dataset: str) -> float | None:
    """The float net's test accuracy, percent; None where it was not measured."""
    rows = store.read(STUDY, profile=profile)
    rows = rows.loc[(rows["profile"] == profile) & (rows["dataset"] == dataset) & (rows["method"] == "float")]
    return None if rows.empty else rows.to_dict("records")[0]["value"]


def budget(profile: str, dataset: str) -> pd.DataFrame:
    """Held-out accuracy by iterations a block, 0 = rounded to nearest: iterations, acc_pct, loss_common, n_test."""
    points = frames.where(frames.frame(profile, dataset), split="common")
    columns = ["iterations", "acc_pct", "loss_common", "n_test"]
    return pd.DataFrame(points, columns=columns).sort_values(by="iterations", ignore_index=True)


def ranges(profile: str, dataset: str = "imagenet") -> pd.DataFrame:
    """Ranges alone, no reconstruction: method, bits, choice, draws, mean accuracy and the paired difference."""
    points = frames.where(frames.frame(profile, dataset), iterations=0, split="test")
    lines = []
    key: Any
    for key, group in points.groupby(["method", "w_bits", "a_bits"]):
        means = {choice: part["acc_pct"].mean() for choice, part in group.groupby("choice")}
        found = frames.paired(group, SMOOTH) or {}
        first = group.to_dict("records")[0]
        lines.append({
            "bits": bits_label(key[1], key[2]), "ranges": key[0], "draws": group["seed"].nunique(),
            "random, %": means.get("random", nan), "smoothest, %": means.get(SMOOTH, nan),
            "difference": means.get(SMOOTH, nan) - means.get("random", nan),
            "low": found.get("low", nan), "high": found.get("high", nan),
            "n_calib": first["n_calib"], "n_test": first["n_test"],
        })  # fmt: skip
    return pd.DataFrame(lines)


def signed(found: dict[str, float]) -> str:
    """A paired difference in words: ``-0.42 points (95 % -1.10 to +0.26, n = 5 draws)``."""
    return f"{found['mean']:+.2f} points (95 % {found['low']:+.2f} to {found['high']:+.2f}, n = {found['n']:.0f} draws)"


def _budget(points: pd.DataFrame, profile: str, dataset: str) -> list[str]:
    found = frames.where(points, split="common").sort_values("iterations")
    if found.empty:
        return []
    lines = found.to_dict("records")
    steps = ", ".join(f"{line['iterations']}: {line['acc_pct']:.1f}" for line in lines)
    used = size_of(dataset, profile).iterations
    return [
        f"Iterations a block against accuracy on {lines[0]['n_test']:,} held-out images, percent: {steps}; "
        f"the study uses {used}, short of the end of that curve"
    ]


def _luck(points: pd.DataFrame, main: pd.DataFrame) -> list[str]:
    random = main.loc[main["choice"] == "random", "acc_pct"]
    again = points.loc[points["run_seed"] >= 0, "acc_pct"]
    if len(random) < 2:
        return []
    line = (
        f"Random, class-balanced sets: {random.mean():.2f} ± {random.std(ddof=1):.2f} % over {len(random)} draws, "
        f"from {random.min():.2f} to {random.max():.2f}"
    )
    if len(again) > 1:
        line += f"; one set with {len(again)} other seeds of the reconstruction: ± {again.std(ddof=1):.2f}"
    return [line]


def _ways(main: pd.DataFrame) -> list[str]:
    found = frames.comparison(main)
    judged = found.dropna(subset=["mean"]).to_dict("records")
    if not judged:
        return []
    smooth = frames.paired(main, SMOOTH)
    lines = [] if smooth is None else [f"Smoothest against random, same draw: {signed(smooth)}"]
    apart = [line for line in judged if line["p_value"] * len(judged) < 0.05]
    names = ", ".join(f"{line['label']} ({line['mean']:+.2f})" for line in apart) or "none"
    lines.append(f"Of {len(judged)} ways, different from random at 5 % after Bonferroni's correction: {names}")
    best, worst = max(judged, key=lambda line: line["mean"]), min(judged, key=lambda line: line["mean"])
    return [*lines, *(f"{word}: {line['label']}, {line['mean']:+.2f} points (95 % {line['low']:+.2f} to "
                      f"{line['high']:+.2f})" for word, line in (("Best", best), ("Worst", worst)))]  # fmt: skip


def _widths(points: pd.DataFrame, profile: str, dataset: str) -> list[str]:
    lines = []
    for method in METHODS:
        parts = []
        for bits in (*WIDTHS, LOWEST):
            sets = frames.main_sets(points, profile, dataset, method=method, bits=bits)
            if (found := frames.paired(sets, SMOOTH)) is not None:
                base = sets.loc[sets["choice"] == "random", "acc_pct"].mean()
                parts.append(f"{bits_label(*bits)} {signed(found)} on {base:.2f} %")
        if parts:
            name = {"qdrop": "QDrop", "brecq": "BRECQ"}[method]
            lines.append(f"{name}, smoothest minus random: {'; '.join(parts)}")
    return lines


def _rank(profile: str, dataset: str) -> list[str]:
    sets = frames.scored_sets(profile, dataset)
    if len(sets) < 3:
        return []
    found = frames.correlations(sets)
    lines = []
    for target, words in frames.TARGETS.items():
        here = found.loc[(found["target"] == target) & found["metric"].str.startswith("set_")].dropna()
        rho = dict(zip(here["metric"], here["rho"], strict=True))
        if "set_tv" in rho:
            top = max(rho, key=lambda name: abs(rho[name]))
            lines.append(
                f"Spearman with {words} over {len(sets)} sets: total variation {rho['set_tv']:+.2f}; strongest "
                f"{METRIC_LABELS[top]} {rho[top]:+.2f}"
            )
    return lines


def _selectors(main: pd.DataFrame) -> list[str]:
    if len(set(main["choice"])) < 2 or list(main["choice"]).count("random") < 3:
        return []
    lines = []
    for loss in ("loss_own", "loss_common"):
        found = frames.selector(main, loss)
        lines.append(
            f"Lowest {frames.TARGETS[loss]} as selector: rho with accuracy {found['rho_all']:+.2f} over all sets, "
            f"{found['rho_random']:+.2f} over {found['n_random']} random ones (the best of them "
            f"{found['gain_of_best_draw']:+.2f} points against their mean); choosing among all ways of a draw "
            f"{signed(found)} against random"
        )
    return lines


def _numbers(profile: str, dataset: str) -> list[str]:
    curve = frames.by_number(profile, dataset)
    if curve.empty:
        return []
    smallest, means = frames.smallest_n(curve)
    shown = ", ".join(f"{n}: {m:.2f}" for n, m in zip(means.index, means["mean"], strict=True))
    lines = [
        f"Accuracy by number of images ({min(means['count'])} draws): {shown}; within {frames.NEAR_PP} points of "
        f"the largest from {smallest} images on"
    ]
    for line in frames.replacement(curve).to_dict("records"):
        lines.append(f"{line['n_calib']} images, {line['way']} drawn with replacement: {signed(line)}")  # type: ignore[arg-type]
    return lines


def _captq() -> list[str]:
    rho, n = frames.captq_logs()
    return [f"CaPTQ's own logs (W4A4, {n} sets): Spearman of the last layer's loss with accuracy {rho:+.2f}"]


def labelled(sets: pd.DataFrame) -> pd.DataFrame:
    """A copy with the printed name of each way in ``label``."""
    return sets.assign(label=[CHOICES[choice].label for choice in sets["choice"]])


METRIC_LABELS = {
    "set_tv": "total variation", "set_gradient_energy": "gradient energy",
    "set_laplacian_variance": "Laplacian variance", "set_high_frequency": "high-frequency ratio",
    "set_roughness": "histogram roughness", "set_entropy": "histogram entropy",
    "set_block_error": "first-block error", "set_bn_distance": "BN distance", "set_knowledge": "cluster distance",
}  # fmt: skip


def rho_table(sets: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho in words: scores as lines; losses, accuracy, and accuracy over random sets alone as columns."""
    columns = {}
    random = sets.loc[sets["choice"].isin(["random"])]
    for title, group, target in (
        ("loss,\nits own images", sets, "loss_own"), ("loss,\ncommon images", sets, "loss_common"),
        ("accuracy,\nall sets", sets, "acc_pct"), ("accuracy,\nrandom sets", random, "acc_pct"),
    ):  # fmt: skip
        found = frames.correlations(group)
        found = found.loc[found["target"] == target].set_index("metric")["rho"]
        columns[title] = found.reindex(list(METRIC_LABELS))
    return pd.DataFrame(columns).rename(index=METRIC_LABELS)
