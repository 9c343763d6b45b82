"""Bits per tensor on the shipped ResNet-20: the hybrid rule, sensitivities, searched assignments (notebook 06).

    python -m hq_lib.studies.hybrid.study --profile full --parts cells sensitivity search

appends rows to ``hybrid_bits.csv``, ``layer_sensitivity.csv`` and ``bit_allocation.csv``, each as soon as it is
measured; what has its rows is skipped, so a killed run goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from hq_lib.results import figures, paths, store
from hq_lib.studies.hybrid import allocation as bit_allocation
from hq_lib.studies.hybrid import cells as hybrid_cells
from hq_lib.studies.hybrid.cells import BOUNDARY

PARTS = ("cells", "sensitivity", "search")
ADDITIVE = 0.1
"""nat; a predicted KL up to this is what the additive model is asked about"""


def run(profile: str, *, parts: Sequence[str] = PARTS, device: str = "cpu") -> None:
    """Measures what has no row yet of the given parts.

    Args:
        profile: "smoke", "quick" or "full".
        parts:   of ``PARTS``; "search" measures the sensitivities it needs.
        device:  "cpu" or "cuda".
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
    if "cells" in parts:
        hybrid_cells.run(profile, device=device)
    if {"sensitivity", "search"} & set(parts):
        lab = bit_allocation.Laboratory(profile, device=device)
        bit_allocation.sensitivity(lab)
        if "search" in parts:
            bit_allocation.search(lab)


def cells(profile: str) -> pd.DataFrame:
    """The map as ``hybrid_cells.table`` has it, from the rows of a profile."""
    return hybrid_cells.table(_rows(profile, hybrid_cells.STUDY))


def _rows(profile: str, study: str) -> pd.DataFrame:
    rows = store.read(study, profile=profile)
    return rows.loc[rows["profile"] == profile]


def facts(profile: str, study: str, metric: str) -> dict[str, Any]:
    """What a caption has to state of a study: data set, images, seeds, switches."""
    rows = _rows(profile, study)
    rows = rows.loc[rows["metric"] == metric]
    trained = rows["n_train"].max()
    switches = [
        "academic placement, image in float",
        "first and last layer 8 bits" if study == hybrid_cells.STUDY else "first and last layer like all others",
        f"{rows['n_calib'].max()} calibration images",
        *([f"{hybrid_cells.QAT.upper()} trained for one epoch on {trained:,} images"] if trained else []),
    ]
    split = "test" if metric == "acc_pct" else "validation"
    return {
        "profile": profile, "n": f"{rows['n_test'].max():,} {split} images", "seeds": sorted(set(rows["seed"])),
        "dataset": ", ".join(sorted(set(rows["dataset"]))), "switches": ", ".join(switches),
    }  # fmt: skip


def caption(claim: str, profile: str, study: str, metric: str) -> str:
    """The claim with what it rests on."""
    return figures.caption(claim, **facts(profile, study, metric))


def slopes(known: pd.DataFrame) -> pd.DataFrame:
    """By what factor one bit more divides a tensor's KL: columns kind, name, bits (the lower of the two), factor."""
    ordered = known.sort_values(["kind", "name", "bits"])
    groups = ordered.groupby(["kind", "name"], sort=False)
    ratio = ordered["kl"] / groups["kl"].shift(-1)
    step = groups["bits"].shift(-1) - ordered["bits"]
    return ordered[["kind", "name", "bits"]].assign(factor=ratio ** (1 / step)).dropna()


def gains(points: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy by search, mean and sd over seeds, and what the optimum gains on each at equal budget (points).

    Columns budget, equivalent, search, mean, sd, n, gain; random assignments count their draws.
    """
    measured = points.dropna(subset=["acc_pct"])
    grouped = measured.groupby(["budget", "equivalent", "search"])["acc_pct"]
    table = pd.DataFrame({"mean": grouped.mean(), "sd": grouped.std(ddof=1), "n": grouped.count()}).reset_index()
    best = table.loc[table["search"] == "optimal", ["budget", "equivalent", "mean"]]
    both = table.merge(best, how="left", on=["budget", "equivalent"], suffixes=("", "_optimal"))
    return table.assign(gain=both["mean_optimal"] - both["mean"])


def cells_findings(profile: str) -> list[str]:
    """What the map supports."""
    table, lines = cells(profile), []
    table = table.assign(gain=table["hybrid"] - table["calibrated"], least=table[["w_bits", "a_bits"]].min(axis=1))
    for row in table.loc[table["w_bits"] == table["a_bits"]].to_dict("records"):
        trained = f", trained {row['hybrid']:.2f} % ({row['gain']:+.2f} points)" if row["least"] < BOUNDARY else ""
        lines.append(f"W{row['w_bits']:g}A{row['a_bits']:g}: calibrated {row['calibrated']:.2f} %{trained}")
    below = table.loc[table["least"] < BOUNDARY].to_dict("records")
    worse = [f"W{row['w_bits']:g}A{row['a_bits']:g} ({row['gain']:+.2f})" for row in below if row["gain"] <= 0]
    lines.append(f"the rule beats calibration in {len(below) - len(worse)} of {len(below)} cells with a tensor below "
                 f"{BOUNDARY} bits; it does not in: {', '.join(worse) or 'none'}")  # fmt: skip
    trained = hybrid_cells.trained_at_boundary(_rows(profile, hybrid_cells.STUDY))
    if trained is not None:
        here = table.set_index(["w_bits", "a_bits"])["calibrated"].loc[(BOUNDARY, BOUNDARY)]
        lines.append(
            f"at the boundary, W{BOUNDARY}A{BOUNDARY}: calibrated {here:.2f} %, trained as briefly {trained:.2f} %"
        )
    return lines


def sensitivity_findings(profile: str) -> list[str]:
    """What the sensitivities support."""
    known, lines = bit_allocation.sensitivities(profile), []
    for kind, word in (("weight", "weights"), ("act", "activations")):
        mine = known.loc[known["kind"] == kind]
        bits = BOUNDARY if BOUNDARY in set(mine["bits"]) else int(mine["bits"].max())
        ranked = mine.loc[mine["bits"] == bits].sort_values("kl", ascending=False)
        kl, names = ranked["kl"].to_numpy(), ranked["name"].to_numpy()
        share = kl[:3].sum() / kl.sum()
        lines.append(
            f"{word} at {bits} bits: most sensitive {names[0]} ({kl[0]:.2g} nat), least {names[-1]} "
            f"({kl[-1]:.2g}), a factor of {kl[0] / kl[-1]:.0f}; three of them make {share:.0%} of the sum"
        )
        found = slopes(mine)
        factors = ", ".join(f"{b} bits {group.median():.1f}" for b, group in found.groupby("bits")["factor"])
        lines.append(f"{word}: one bit more divides the KL by, median over tensors, from {factors}")
    return lines


def search_findings(profile: str) -> list[str]:
    """What the searched assignments support."""
    points = bit_allocation.points(profile)
    lines = []
    for row in gains(points).query("search in ('uniform', 'at_random')").dropna(subset=["gain"]).to_dict("records"):
        against = "the same bits everywhere" if row["search"] == "uniform" else "random assignments"
        spread = f" ± {row['sd']:.2f}" if row["n"] > 1 else ""
        lines.append(f"{row['budget']} of {row['equivalent']:g} bits: optimum {row['mean'] + row['gain']:.2f} %, "
                     f"{against} {row['mean']:.2f}{spread} % (n={row['n']}): {row['gain']:+.2f} points")  # fmt: skip
    keys = ["budget", "equivalent"]
    predicted = points.loc[points["seed"] == 0].pivot_table(index=keys, columns="search", values="predicted_kl")
    excess = (predicted["greedy"] / predicted["optimal"] - 1).max()
    lines.append(f"greedy search predicts at most {excess:.1%} more loss than the integer program at equal budget")
    return lines + additivity(points)


def additivity(points: pd.DataFrame) -> list[str]:
    """How measured KL compares with the sum of single ones, below and above ``ADDITIVE``."""
    measured = points.dropna(subset=["kl"]).to_dict("records")
    predicted, found = (np.array([row[column] for row in measured]) for column in ("predicted_kl", "kl"))
    rank = spearmanr(predicted, found)[0]
    lines = [f"predicted and measured KL over {len(measured)} nets: Spearman correlation {rank:.3f}"]
    for word, part in (("up to", predicted <= ADDITIVE), ("above", predicted > ADDITIVE)):
        if part.any():
            ratio = found[part] / predicted[part]
            lines.append(f"predicted KL {word} {ADDITIVE} nat: measured / predicted {np.median(ratio):.2f} in the "
                         f"median ({ratio.min():.2f} to {ratio.max():.2f}, {part.sum()} nets)")  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.hybrid.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    run(options.profile, parts=options.parts, device=options.device)
    for part, findings in zip(PARTS, (cells_findings, sensitivity_findings, search_findings), strict=True):
        if part in options.parts:
            print(*findings(options.profile), sep="\n")


if __name__ == "__main__":
    main()
