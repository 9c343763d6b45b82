"""What notebook 06 shows: the map, sensitivities and assignments; rows in, frames out."""

import pandas as pd

from hq_lib.results import tables
from hq_lib.studies.hybrid.cells import BOUNDARY, QAT, RANGES

ADDITIVE = 0.1
"""nat; a predicted KL up to this is what the additive model is asked about"""


def map_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The map: columns w_bits, a_bits, calibrated, hybrid (test accuracy, %; means over seeds), one line per pair.

    Where no tensor is below the boundary the rule calibrates everything, so both columns agree.
    """
    rows = tables.with_switches(rows, "boundary")
    means = rows.pivot_table(index=["w_bits", "a_bits"], columns="boundary", values="value").reset_index()
    both = means[["w_bits", "a_bits"]].min(axis=1) >= BOUNDARY
    known = means.reindex(columns=["w_bits", "a_bits", 0, BOUNDARY]).rename_axis(columns=None)
    known = known.rename(columns={0: "calibrated", BOUNDARY: "hybrid"})
    return known.assign(hybrid=known["hybrid"].where(~both, known["calibrated"]))


def map_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What the rule gains on calibration, points, in each cell with a trained tensor, worst first.

    The last line is the cell at the boundary, trained as briefly; it is left out where that was not run.
    """
    found = map_table(rows)
    below = found.loc[found[["w_bits", "a_bits"]].min(axis=1) < BOUNDARY]
    below = below.assign(gain=below["hybrid"] - below["calibrated"]).sort_values("gain")
    at = tables.with_switches(rows, "boundary").query("boundary == @BOUNDARY + 1")["value"]
    if at.empty:
        return below
    here = found.loc[(found["w_bits"] == BOUNDARY) & (found["a_bits"] == BOUNDARY)]
    last = here.assign(hybrid=at.mean(), gain=at.mean() - here["calibrated"])
    return pd.concat([below, last], ignore_index=True)


def map_claim(found: pd.DataFrame) -> str:
    """What the map shows, from ``map_table``: without a cell below the boundary nothing of the training."""
    if (found[["w_bits", "a_bits"]].min(axis=1) < BOUNDARY).any():
        return "Training the tensors below four bits is what keeps the low corner alive; above, calibration is enough"
    return "No tensor has fewer than four bits: the rule trains nothing, every cell is calibration alone"


def map_note(rows: pd.DataFrame) -> str:
    """The settings behind the map, for its caption."""
    trained, n_calib = max(rows["n_train"]), max(rows["n_calib"])
    told = f"academic placement, image in float, first and last layer 8 bits, {n_calib} calibration images"
    return told + (f", {QAT.upper()} trained for one epoch on {trained:,} images" if trained else "")


def search_note(rows: pd.DataFrame) -> str:
    """The settings behind sensitivities and assignments, for their captions."""
    placed = "academic placement, image in float, first and last layer like all others"
    return f"{placed}, {rows['n_calib'].max()} calibration images"


def sensitivities(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns kind ("weight" or "act"), name, tensor, bits, kl, loss_rise, acc_drop_pp."""
    wide = tables.wide(rows.assign(bits=rows[["w_bits", "a_bits"]].min(axis=1).astype(int)), "tensor", "bits")
    return wide.assign(**wide["tensor"].str.extract("(?P<kind>[^ ]*) (?P<name>.*)"))


def losses(known: pd.DataFrame) -> dict[str, dict[int, float]]:
    """What the searches work on: KL, nat, by tensor (in the order of ``sensitivities``' lines) and bits."""
    groups = known.groupby("tensor", sort=False)
    return {str(tensor): dict(zip(mine["bits"], mine["kl"], strict=True)) for tensor, mine in groups}


def most_sensitive(known: pd.DataFrame) -> pd.DataFrame:
    """At the boundary's bits, by kind: the most and the least sensitive tensor, and by what factor they differ."""
    found = []
    for kind, mine in known.groupby("kind"):
        known_bits = [int(b) for b in mine["bits"]]
        bits = BOUNDARY if BOUNDARY in known_bits else max(known_bits)
        ranked = mine.loc[mine["bits"] == bits].sort_values("kl", ascending=False)
        kl, names = ranked["kl"].to_numpy(), ranked["name"].to_numpy()
        found.append((kind, bits, names[0], kl[0], names[-1], kl[-1], kl[0] / kl[-1], kl[:3].sum() / kl.sum()))
    columns = ["kind", "bits", "most", "most_kl", "least", "least_kl", "ratio", "share_of_three"]
    return pd.DataFrame(found, columns=columns)


def slopes(known: pd.DataFrame) -> pd.DataFrame:
    """By what factor one bit more divides a tensor's KL: columns kind, name, bits (the lower of the two), factor."""
    ordered = known.sort_values(["kind", "name", "bits"])
    groups = ordered.groupby(["kind", "name"], sort=False)
    ratio = ordered["kl"] / groups["kl"].shift(-1)
    step = groups["bits"].shift(-1) - ordered["bits"]
    return ordered[["kind", "name", "bits"]].assign(factor=ratio ** (1 / step)).dropna()


def points(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an assignment: budget, search, equivalent, seed, w, a, w_bits, a_bits, the metrics."""
    keys = ("budget", "search", "equivalent", "seed", "w", "a", "w_bits", "a_bits")
    return tables.wide(rows.loc[rows["method"] == RANGES], *keys)


def float_accuracy(rows: pd.DataFrame) -> float:
    """Test accuracy of the float network, percent, on the images of the study."""
    return float(rows.loc[rows["method"] == "float", "value"].iloc[0])


def gains(points: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy by search, mean and sd over seeds, and what the optimum gains on each at equal budget (points).

    Columns budget, equivalent, search, mean, sd, n, gain; random assignments count their draws.
    """
    grouped = points.dropna(subset=["acc_pct"]).groupby(["budget", "equivalent", "search"])["acc_pct"]
    table = grouped.agg(mean="mean", sd="std", n="count").reset_index()
    best = table["mean"].where(table["search"] == "optimal").groupby([table["budget"], table["equivalent"]])
    return table.assign(gain=best.transform("max") - table["mean"])


def additivity(found: pd.DataFrame) -> pd.DataFrame:
    """Measured over predicted KL (the sum of single ones), up to ``ADDITIVE`` nat and above, and rank correlations."""
    known = found.dropna(subset=["kl"])
    small = known["predicted_kl"] <= ADDITIVE
    parts = {f"up to {ADDITIVE} nat": known.loc[small], "above": known.loc[~small]}
    lines = []
    for word, part in {**parts, "all": known}.items():
        ratio = part["kl"] / part["predicted_kl"]
        rho = part[["predicted_kl", "kl"]].corr("spearman").iloc[0, 1]
        lines.append((word, len(part), ratio.median(), ratio.min(), ratio.max(), rho))
    return pd.DataFrame(lines, columns=["predicted KL", "nets", "median", "least", "largest", "Spearman"])
