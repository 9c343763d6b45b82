"""What notebook 09 shows of the edge-cloud study: rows in, frames out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hq_lib.data import SPECS
from hq_lib.results import labels, tables
from hq_lib.studies.edge_cloud.figures import EDGE_TITLES
from hq_lib.studies.edge_cloud.study import ALL, CIRCUITS, EXACT, IMAGE, NONE

SWITCHES = ("edge", "cut", "grid", "wire_bits", "jpeg_quality")
NEAR = ["acc_pct", "packed_KiB", "deflate_KiB", "edge_mac_pct"]
"""What is told of wires that are near the image."""
TOLERANCE_PP = 1.0
"""Points below the whole network that ``near`` allows."""


def of_network(rows: pd.DataFrame, name: str = "resnet20") -> pd.DataFrame:
    """The rows of one network: a shipped float one by name, or a file by its stem."""
    return rows.loc[names_of(rows) == name]


def names_of(rows: pd.DataFrame) -> pd.Series:
    """The network of each row: a shipped float one by name, or a file by its stem."""
    return pd.Series(tables.with_switches(rows, "network")["network"].fillna(rows["model"]))


def halves(rows: pd.DataFrame) -> dict[str, str]:
    """What the halves of one network compute in, for captions: ``edge`` ("W8A8, MSE ranges"), ``cloud`` ("float")."""
    is_cloud = tables.with_switches(tables.with_bits(rows), "edge")["edge"] == NONE
    told = {}
    for half, mine in (("edge", rows.loc[~is_cloud]), ("cloud", rows.loc[is_cloud])):
        pairs = dict.fromkeys(zip(tables.with_bits(mine)["bits"], mine["method"], strict=True))
        words = (bits if bits == "float" else f"{bits}, {labels.printed('method', name)}" for bits, name in pairs)
        told[half] = " and ".join(words) or tables.NOT_RUN
    return told


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an accuracy of one network; what all below but ``by_network`` take.

    Columns edge, cut, grid, wire_bits, jpeg_quality, seed, n_test, acc_pct, mean KiB by coding, and ``edge_mac_pct``:
    what of the network runs before the cut; in all lines ``bits`` of the edge and ``raw_KiB`` of an image, a byte for
    each pixel and channel. ``wire_bits`` and ``jpeg_quality`` are 0, and ``grid`` is "", where they do
    not apply. The accuracies of the exact edge on the crossbars' images carry the sizes of all its images.
    """
    found = tables.with_switches(rows, *SWITCHES).fillna({"grid": "", "wire_bits": 0, "jpeg_quality": 0})
    wide = tables.wide(found, *SWITCHES, "seed", "n_test")
    sizes = [c for c in ("packed_KiB", "deflate_KiB", "jpeg_KiB") if c in wide]
    wide[sizes] = wide.groupby([*SWITCHES, "seed"])[sizes].transform("max")
    ends: Any = wide.dropna(subset="edge_mac_pct").set_index("cut")["edge_mac_pct"].to_dict()
    wide["edge_mac_pct"] = wide["cut"].map(ends | {IMAGE: 0.0, ALL: 100.0})
    wide["bits"] = halves(rows)["edge"].partition(",")[0]
    wide["raw_KiB"] = max((float(np.prod(SPECS[name].in_shape)) for name in rows["dataset"]), default=0.0) / 1024
    return wide.loc[wide["acc_pct"].notna()].reset_index(drop=True)


def largest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each edge the lines on most images: the exact edge is also judged on the crossbars' fewer ones."""
    return frame.loc[frame["n_test"] == frame.groupby("edge")["n_test"].transform("max")]


def lines(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows for ``fig_edge_cloud``: edge, line, coding, KiB, acc_pct, step; scales per channel only."""
    drawn = largest(frame).query("grid == 'channel' or cut == @IMAGE")
    image, jpeg = drawn["cut"] == IMAGE, drawn["jpeg_quality"] > 0
    drawn = drawn.assign(
        edge=drawn["edge"].mask(image, ""), line=drawn["cut"].mask(image, "pixels").mask(jpeg, "JPEG"),
        step=drawn["wire_bits"].mask(jpeg, drawn["jpeg_quality"]), place=drawn["edge_mac_pct"] + 200 * image + jpeg,
    )  # fmt: skip
    codings: Any = {"packed_KiB": "packed", "deflate_KiB": "deflate", "jpeg_KiB": "deflate"}
    long = drawn.melt(
        ["edge", "line", "place", "step", "acc_pct"], [c for c in codings if c in drawn], "coding", "KiB"
    ).dropna(subset="KiB")
    long = long.assign(coding=long["coding"].map(codings)).sort_values(["place", "step"], ignore_index=True)
    return pd.DataFrame(long, columns=["edge", "line", "coding", "KiB", "acc_pct", "step"])


def whole_on_edge(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the network that runs on each edge as a whole, one row a draw; and ``bits``, ``raw_KiB``."""
    return largest(frame).loc[lambda f: f["cut"] == ALL, ["edge", "seed", "n_test", "acc_pct", "bits", "raw_KiB"]]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """tab_edge_cloud: per cut and bits on the wire the share of the edge, KiB a packet, and the accuracy by edge.

    The digital edge has a column for all its images and one for those that the crossbars are judged on: only the latter
    compares with theirs.
    """
    frame = frame.query("grid == 'channel' or cut == @IMAGE and wire_bits > 0")
    analog = frame.loc[~frame["edge"].isin([EXACT, NONE]), "n_test"]
    n_all, n_same = frame["n_test"].max(), analog.max() if len(analog) else 0
    columns = {f"{frame['bits'].max()}, digital, {n_all:,} images": (EXACT, n_all)}
    if 0 < n_same < n_all:
        columns[f"digital, {n_same:,} images"] = (EXACT, n_same)
    if n_same:
        columns |= {
            f"{EDGE_TITLES[edge].removeprefix('edge: ')}, {n_same:,} images": (edge, n_same) for edge in CIRCUITS
        }
    found = []
    key: Any
    for key, at in frame.groupby(["edge_mac_pct", "cut", "wire_bits"]):
        (share, cut, bits), is_image = key, key[1] == IMAGE
        sizes = at.sort_values(["seed", "n_test"], ascending=[True, False]).iloc[0]  # the digital edge's, where it ran
        line = {"cut after": "- (the image)" if is_image else cut, "MACs on the edge, %": f"{share:.1f}"}
        line |= {"bits": f"{bits:.0f}", "packed, KiB": f"{sizes['packed_KiB']:.3f}"}
        line |= {"compressed, KiB": f"{sizes['deflate_KiB']:.3f}"}
        for title, (edge, n_test) in columns.items():
            values = at.loc[(at["edge"] == (NONE if is_image else edge)) & (at["n_test"] == n_test), "acc_pct"]
            counted = f" (n={len(values)})" if len(values) > 1 else ""
            line[title] = "as digital" if is_image and edge != EXACT else tables.mean_sd(values) + counted
        found.append(line)
    return pd.DataFrame(found)


def counted(frame: pd.DataFrame) -> dict[str, Any]:
    """Images and draws of both kinds of edge, for a caption."""
    frame = largest(frame)
    drawn = frame.loc[frame["seed"] >= 0]
    n = f"{frame.loc[frame['seed'] < 0, 'n_test'].max():,} test images for the digital edge"
    n += f", {drawn['n_test'].max():,} for each draw of a crossbar" if len(drawn) else ""
    return {"n": n, "seeds": sorted(set(drawn["seed"]))}


def near(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each edge what lies within ``TOLERANCE_PP`` of the image sent whole, on the same images, and below its bytes.

    How many wires do; then, of them, the smallest packet and the earliest cut (means over the draws).
    """
    sent_whole = frame.query("cut == @IMAGE and wire_bits == 8").set_index("n_test")["acc_pct"]
    found = []
    for edge, mine in largest(frame.loc[frame["grid"] == "channel"]).groupby("edge"):
        wires = mine.pivot_table(index=["cut", "wire_bits"], values=NEAR).reset_index()
        enough = wires["acc_pct"] >= sent_whole[mine["n_test"].max()] - TOLERANCE_PP
        good = wires.loc[enough & (wires["packed_KiB"] < mine["raw_KiB"].max())]
        about = {"edge": edge, "n_wires": len(wires), "n_near": len(good)}
        for which, by in (("smallest", ["packed_KiB"]), ("earliest", ["edge_mac_pct", "packed_KiB"])):
            first: list[Mapping[Any, Any]] = good.sort_values(by=by).head(1).to_dict("records")
            found.append({**about, "which": which, **(first[0] if first else {})})
    return pd.DataFrame(found).round(3)


def scale_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """One scale per channel against one in all, on the digital edge: points, by bits over the cuts."""
    mine = largest(frame).query("edge == @EXACT and grid != ''")
    if "tensor" not in set(mine["grid"]):
        return pd.DataFrame()
    wide = mine.pivot_table(index=["wire_bits", "cut"], columns="grid", values="acc_pct").dropna()
    gains = (wide["channel"] - wide["tensor"]).groupby("wire_bits").agg(["mean", "min", "max", "count"])
    return pd.DataFrame(gains).round(2)


def against_jpeg(frame: pd.DataFrame) -> pd.DataFrame:
    """The best JPEG, and the best wire of the digital edge that sends no more bytes."""
    jpeg = largest(frame).query("jpeg_quality > 0").nlargest(1, "acc_pct").assign(KiB=lambda f: f["jpeg_KiB"])
    wires = largest(frame).query("edge == @EXACT and grid == 'channel'").assign(KiB=lambda f: f["deflate_KiB"])
    smaller = wires.loc[wires["KiB"] <= jpeg["KiB"].max()].nlargest(1, "acc_pct")
    columns = ["cut", "jpeg_quality", "wire_bits", "KiB", "acc_pct"]
    return pd.DataFrame(pd.concat([jpeg, smaller], ignore_index=True), columns=columns).round(2)


def crossbar_losses(frame: pd.DataFrame) -> pd.DataFrame:
    """Crossbar minus digital edge on the same images, at eight bits sent: points, mean and sd over the draws."""
    frame = frame.query("grid == 'channel' and wire_bits == 8 or cut == @ALL")
    pairs = frame.loc[frame["seed"] >= 0].merge(
        frame.loc[frame["edge"] == EXACT], on=["cut", "n_test"], suffixes=("", "_exact")
    )
    losses = pairs.assign(loss=pairs["acc_pct"] - pairs["acc_pct_exact"])
    found = losses.groupby(["edge", "edge_mac_pct", "cut", "n_test"])["loss"].agg(["mean", "std", "count"])
    return found.reset_index().drop(columns="edge_mac_pct").round(2)


def by_network(rows: pd.DataFrame) -> pd.DataFrame:
    """Digital edge, a scale per channel: accuracy by network, cut and bits on the wire, beside the image sent whole."""
    found = []
    for name in names_of(rows).unique():
        frame = largest(measured(of_network(rows, name)))
        wires = frame.query("edge == @EXACT and grid == 'channel'").sort_values("edge_mac_pct")
        wide = wires.pivot_table(index="cut", columns="wire_bits", values="acc_pct", sort=False)
        wide = wide.sort_index(axis=1).rename(columns="{:.0f} bits".format).reset_index()
        whole = frame.query("cut == @IMAGE and wire_bits == 8")["acc_pct"].max()
        found.append(wide.assign(network=labels.printed("model", name), whole=whole))
    whole = pd.concat(found, ignore_index=True)
    order = ["network", "whole", *(c for c in whole if c not in ("network", "whole"))]
    return pd.DataFrame(whole, columns=order).round(2)
