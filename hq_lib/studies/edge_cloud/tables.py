"""What notebook 09 shows of the edge-cloud study: rows in, frames out."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from hq_lib.results import labels, tables
from hq_lib.studies.edge_cloud.bench import EDGES, EXACT, NONE
from hq_lib.studies.edge_cloud.study import ALL, IMAGE

EDGE_TITLES = {
    "integer": "edge: W8A8, digital",
    "crossbar": "edge: crossbar, 1 s",
    "crossbar_1day": "edge: crossbar, 1 day",
}
"""Edge -> title of its column."""
CUT_WORDS = {
    "conv1": "cut after the stem", "layer1.2": "cut after stage 1", "layer2.2": "cut after stage 2",
    "layer3.2": "cut after stage 3",
}  # fmt: skip
"""ResNet-20's cuts with a colour -> words for them."""
SWITCHES = ("edge", "cut", "grid", "wire_bits", "jpeg_quality")
SIZES_AND_ACCURACY = ["acc_pct", "packed_KiB", "deflate_KiB"]
RAW_KiB = 3.0
"""A CIFAR-10 image as it is: 32 x 32 x 3 bytes."""
TOLERANCE_PP = 1.0
"""Points below the whole network that ``near`` allows."""


def of_network(rows: pd.DataFrame, name: str = "resnet20") -> pd.DataFrame:
    """The rows of one network: a shipped float one by name, or a file by its stem."""
    return rows.loc[names_of(rows) == name]


def names_of(rows: pd.DataFrame) -> pd.Series:
    """The network of each row: a shipped float one by name, or a file by its stem."""
    return pd.Series(tables.with_switches(rows, "network")["network"].fillna(rows["model"]))


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per accuracy: edge, cut, grid, wire_bits, jpeg_quality, seed, n_test, acc_pct, and mean KiB by coding.

    ``wire_bits`` and ``jpeg_quality`` are 0, and ``grid`` is "", where they do not apply. The accuracies of the exact
    edge on the crossbars' images carry the sizes of all its images.
    """
    found = tables.with_switches(rows, *SWITCHES).fillna({"grid": "", "wire_bits": 0, "jpeg_quality": 0})
    keys = [*SWITCHES, "seed", "n_test"]
    wide = found.pivot_table(index=keys, columns="metric", values="value").reset_index().rename_axis(columns=None)
    sizes = [c for c in ("packed_KiB", "deflate_KiB", "jpeg_KiB") if c in wide]
    wide[sizes] = wide.groupby([*SWITCHES, "seed"])[sizes].transform("max")
    return wide.loc[wide["acc_pct"].notna()].reset_index(drop=True)


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """What runs on the edge, by cut in network order: edge_mac_pct (of the network's), edge_weight_KiB at its bits."""
    rows = rows.loc[rows["metric"].isin(["edge_mac_pct", "edge_weight_KiB"])]
    wide = tables.with_switches(rows, "cut").pivot_table(index="cut", columns="metric", values="value")
    return wide.sort_values("edge_mac_pct")


def largest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each edge the rows on most images: the exact edge is also judged on the crossbars' fewer ones."""
    return frame.loc[frame["n_test"] == frame.groupby("edge")["n_test"].transform("max")]


def lines(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows for ``fig_edge_cloud``: edge, line, coding, KiB, acc_pct, step; scales per channel only."""
    frame = largest(measured(rows))
    inner = frame.loc[frame["grid"] == "channel"].assign(line=lambda f: f["cut"], step=lambda f: f["wire_bits"])
    pictures = frame.loc[(frame["cut"] == IMAGE)].assign(edge="")
    jpeg = pictures["jpeg_quality"] > 0
    pictures = pictures.assign(line=jpeg.map({True: "JPEG", False: "pixels"}), step=pictures["wire_bits"])
    pictures.loc[jpeg, "step"] = pictures["jpeg_quality"]
    whole = pd.concat([inner, pictures], ignore_index=True)
    parts = [
        whole.assign(coding=coding, KiB=whole[column]).dropna(subset="KiB")
        for coding, column in (("packed", "packed_KiB"), ("deflate", "deflate_KiB"), ("deflate", "jpeg_KiB"))
        if column in whole
    ]
    order = {name: i for i, name in enumerate([*shares(rows).index, "pixels", "JPEG"])}
    drawn = pd.concat(parts, ignore_index=True)
    drawn = drawn.assign(place=[order[line] for line in drawn["line"]]).sort_values(by=["place", "step"])
    return drawn.loc[:, ["edge", "line", "coding", "KiB", "acc_pct", "step"]]


def whole_on_edge(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the network that runs on each edge as a whole, one row a draw."""
    frame = largest(measured(rows))
    return frame.loc[frame["cut"] == ALL, ["edge", "seed", "n_test", "acc_pct"]]


def titles(rows: pd.DataFrame) -> dict[str, str]:
    """The edges that have rows -> title, in order."""
    there = set(measured(rows)["edge"])
    return {edge: title for edge, title in EDGE_TITLES.items() if edge in there}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_edge_cloud: per cut and bits on the wire the share of the edge, KiB a packet, and the accuracy by edge.

    The digital edge has a column for all its images and one for those that the crossbars are judged on: only the latter
    compares with theirs.
    """
    frame, share = measured(rows), shares(rows)
    frame = frame.loc[(frame["grid"] == "channel") | ((frame["cut"] == IMAGE) & (frame["wire_bits"] > 0))]
    analog = frame.loc[~frame["edge"].isin([EXACT, NONE]), "n_test"]
    n_all, n_same = frame["n_test"].max(), analog.max() if len(analog) else 0
    columns = {f"W8A8, digital, {n_all:,} images": (EXACT, n_all)}
    if 0 < n_same < n_all:
        columns[f"digital, {n_same:,} images"] = (EXACT, n_same)
    if n_same:
        mine = {edge: EDGE_TITLES[edge].removeprefix("edge: ") for edge in EDGES if edge != EXACT}
        columns |= {f"{words}, {n_same:,} images": (edge, n_same) for edge, words in mine.items()}
    found = []
    for cut in [IMAGE, *share.index]:
        for bits, at in frame.loc[frame["cut"] == cut].groupby("wire_bits"):
            sizes = at.loc[at["edge"].isin([EXACT, NONE]) & (at["n_test"] == n_all)].iloc[0]
            macs = share["edge_mac_pct"].get(cut, 0.0)
            line = {"cut after": cut if cut != IMAGE else "- (the image)", "MACs on the edge, %": f"{macs:.1f}"}
            line |= {"bits": f"{bits:.0f}", "packed, KiB": f"{sizes['packed_KiB']:.3f}"}
            line |= {"compressed, KiB": f"{sizes['deflate_KiB']:.3f}"}
            found.append(line | {title: _accuracy(at, *which, cut) for title, which in columns.items()})
    return pd.DataFrame(found)


def _accuracy(at: pd.DataFrame, edge: str, n_test: int, cut: str) -> str:
    if cut == IMAGE and edge != EXACT:
        return "as digital"
    values = at.loc[(at["edge"] == (NONE if cut == IMAGE else edge)) & (at["n_test"] == n_test), "acc_pct"]
    if values.empty:
        return tables.NOT_RUN
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f} (n={len(values)})" if len(values) > 1 else "")


def counted(rows: pd.DataFrame) -> dict[str, Any]:
    """Images and draws of both kinds of edge, for a caption."""
    frame = largest(measured(rows))
    drawn = frame.loc[frame["seed"] >= 0]
    n = f"{frame.loc[frame['seed'] < 0, 'n_test'].max():,} test images for the digital edge"
    n += f", {drawn['n_test'].max():,} for each draw of a crossbar" if len(drawn) else ""
    return {"n": n, "seeds": sorted(set(drawn["seed"]))}


def near(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each edge what lies within ``TOLERANCE_PP`` of the image sent whole, on the same images, and below its bytes.

    How many wires do; then, of them, the smallest packet and the earliest cut (means over the draws).
    """
    frame, share = measured(rows), shares(rows)
    sent_whole = frame.loc[(frame["cut"] == IMAGE) & (frame["wire_bits"] == 8)].set_index("n_test")["acc_pct"]
    found = []
    for edge, mine in largest(frame.loc[frame["grid"] == "channel"]).groupby("edge"):
        whole = sent_whole[mine["n_test"].max()]
        wires = mine.pivot_table(index=["cut", "wire_bits"], values=SIZES_AND_ACCURACY).reset_index()
        good = wires.loc[(wires["packed_KiB"] < RAW_KiB) & (wires["acc_pct"] >= whole - TOLERANCE_PP)]
        good = good.assign(edge_mac_pct=good["cut"].map(share["edge_mac_pct"]))
        about = {"edge": edge, "n_wires": len(wires), "n_near": len(good)}
        for which, by in (("smallest", ["packed_KiB"]), ("earliest", ["edge_mac_pct", "packed_KiB"])):
            first: list[Mapping[Any, Any]] = good.sort_values(by=by).head(1).to_dict("records")
            found.append({**about, "which": which, **(first[0] if first else {})})
    return pd.DataFrame(found).round(3)


def scale_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """One scale per channel against one in all, on the digital edge: points, by bits over the cuts."""
    frame = largest(measured(rows))
    if "tensor" not in set(frame["grid"]):
        return pd.DataFrame()
    mine = frame.loc[(frame["edge"] == EXACT) & frame["grid"].isin(["channel", "tensor"])]
    wide = mine.pivot_table(index=["wire_bits", "cut"], columns="grid", values="acc_pct").dropna()
    gains = (wide["channel"] - wide["tensor"]).groupby("wire_bits").agg(["mean", "min", "max", "count"])
    return pd.DataFrame(gains).round(2)


def against_jpeg(rows: pd.DataFrame) -> pd.DataFrame:
    """The best JPEG, and the best wire of the digital edge that sends no more bytes."""
    frame = largest(measured(rows))
    jpeg = frame.loc[frame["jpeg_quality"] > 0].nlargest(1, "acc_pct").assign(KiB=lambda f: f["jpeg_KiB"])
    wires = frame.loc[(frame["edge"] == EXACT) & (frame["grid"] == "channel")].assign(KiB=lambda f: f["deflate_KiB"])
    smaller = wires.loc[wires["KiB"] <= jpeg["KiB"].max()].nlargest(1, "acc_pct")
    columns = ["cut", "jpeg_quality", "wire_bits", "KiB", "acc_pct"]
    return pd.DataFrame(pd.concat([jpeg, smaller], ignore_index=True), columns=columns).round(2)


def crossbar_losses(rows: pd.DataFrame, bits: int = 8) -> pd.DataFrame:
    """Crossbar minus digital edge on the same images, points: mean and sd over the draws, by edge and cut."""
    frame = measured(rows)
    frame = frame.loc[((frame["wire_bits"] == bits) & (frame["grid"] == "channel")) | (frame["cut"] == ALL)]
    drawn = frame.loc[frame["seed"] >= 0]
    exact = frame.loc[frame["edge"] == EXACT].set_index(["cut", "n_test"])["acc_pct"]
    pairs = zip(drawn["cut"], drawn["n_test"], strict=True)
    losses = drawn.assign(loss=[a - exact[pair] for a, pair in zip(drawn["acc_pct"], pairs, strict=True)])
    order = {cut: i for i, cut in enumerate([*shares(rows).index, ALL])}
    found = losses.groupby(["edge", "cut", "n_test"])["loss"].agg(["mean", "std", "count"]).reset_index()
    return found.sort_values(["edge", "cut"], key=lambda c: c.map(order) if c.name == "cut" else c).round(2)


def by_network(rows: pd.DataFrame) -> pd.DataFrame:
    """Digital edge, a scale per channel: accuracy by network, cut and bits on the wire, beside the image sent whole."""
    found = []
    for name in names_of(rows).unique():
        mine = of_network(rows, name)
        frame = largest(measured(mine))
        whole = frame.loc[(frame["cut"] == IMAGE) & (frame["wire_bits"] == 8), "acc_pct"].max()
        wires = frame.loc[(frame["edge"] == EXACT) & (frame["grid"] == "channel")]
        wide = wires.pivot_table(index="cut", columns="wire_bits", values="acc_pct")
        wide = wide.reindex([cut for cut in shares(mine).index if cut in wide.index])
        wide.columns = [f"{bits:.0f} bits" for bits in wide.columns]
        found.append(wide.reset_index().assign(network=labels.printed("model", name), whole=whole))
    whole = pd.concat(found, ignore_index=True)
    order = ["network", "whole", *(c for c in whole if c not in ("network", "whole"))]
    return pd.DataFrame(whole, columns=order).round(2)
