"""What notebook 09 shows of the edge-cloud study: its rows as frames, the table, captions and findings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hq_lib.results import figures, store, tables
from hq_lib.studies.edge_cloud.bench import EDGES
from hq_lib.studies.edge_cloud.study import ALL, IMAGE, STUDY

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
"""Cuts with a colour -> words for them."""
SWITCHES = ("edge", "cut", "grid", "wire_bits", "jpeg_quality")
SIZES_AND_ACCURACY = ["acc_pct", "packed_KiB", "deflate_KiB"]
RAW_KiB = 3.0
"""A CIFAR-10 image as it is: 32 x 32 x 3 bytes."""
TOLERANCE_PP = 1.0
"""Points below the float network that the findings allow."""


def measured(profile: str) -> pd.DataFrame:
    """One row per accuracy: edge, cut, grid, wire_bits, jpeg_quality, seed, n_test, acc_pct, and mean KiB by coding.

    ``wire_bits`` and ``jpeg_quality`` are 0, and ``grid`` is "", where they do not apply. The accuracies of the exact
    edge on the crossbars' images carry the sizes of all its images.
    """
    rows = store.read(STUDY, profile=profile)
    found = rows.assign(**{name: [json.loads(s).get(name) for s in rows["switches"]] for name in SWITCHES})
    found = found.fillna({"grid": "", "wire_bits": 0, "jpeg_quality": 0})
    keys = [*SWITCHES, "seed", "n_test"]
    wide = found.pivot_table(index=keys, columns="metric", values="value").reset_index().rename_axis(columns=None)
    sizes = [c for c in ("packed_KiB", "deflate_KiB", "jpeg_KiB") if c in wide]
    wide[sizes] = wide.groupby([*SWITCHES, "seed"])[sizes].transform("max")
    return wide.loc[wide["acc_pct"].notna()].reset_index(drop=True)


def shares(profile: str) -> pd.DataFrame:
    """What runs on the edge, by cut in network order: edge_mac_pct (of the network's) and edge_weight_KiB at 8 bits."""
    rows = store.read(STUDY, profile=profile)
    rows = rows.loc[rows["metric"].isin(["edge_mac_pct", "edge_weight_KiB"])]
    named = rows.assign(cut=[json.loads(text)["cut"] for text in rows["switches"]])
    return named.pivot_table(index="cut", columns="metric", values="value").sort_values("edge_mac_pct")


def largest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each edge the rows on most images: the exact edge is also judged on the crossbars' fewer ones."""
    return frame.loc[frame["n_test"] == frame.groupby("edge")["n_test"].transform("max")]


def lines(profile: str) -> pd.DataFrame:
    """Rows for ``fig_edge_cloud``: edge, line, coding, KiB, acc_pct, step; scales per channel only."""
    frame = largest(measured(profile))
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
    order = {name: i for i, name in enumerate([*shares(profile).index, "pixels", "JPEG"])}
    drawn = pd.concat(parts, ignore_index=True)
    drawn = drawn.assign(place=[order[line] for line in drawn["line"]]).sort_values(by=["place", "step"])
    return drawn.loc[:, ["edge", "line", "coding", "KiB", "acc_pct", "step"]]


def whole_on_edge(profile: str) -> pd.DataFrame:
    """Accuracy of the network that runs on each edge as a whole, one row a draw."""
    frame = largest(measured(profile))
    return frame.loc[frame["cut"] == ALL, ["edge", "seed", "n_test", "acc_pct"]]


def edges_there(profile: str) -> list[str]:
    """The edges that have rows, in order."""
    return [edge for edge in EDGES if edge in set(measured(profile)["edge"])]


def table(profile: str) -> pd.DataFrame:
    """tab_edge_cloud: per cut and bits on the wire the share of the edge, KiB a packet, and the accuracy by edge."""
    frame, share = largest(measured(profile)), shares(profile)
    frame = frame.loc[(frame["grid"] == "channel") | ((frame["cut"] == IMAGE) & (frame["wire_bits"] > 0))]
    rows = []
    for cut in [IMAGE, *share.index]:
        for bits, at in frame.loc[frame["cut"] == cut].groupby("wire_bits"):
            sizes = at.loc[at["edge"].isin(["integer", "none"])].iloc[0]
            macs = share["edge_mac_pct"].get(cut, 0.0)
            line = {"cut after": cut if cut != IMAGE else "- (the image)", "MACs on the edge, %": f"{macs:.1f}"}
            line |= {"bits": f"{bits:.0f}", "packed, KiB": f"{sizes['packed_KiB']:.3f}"}
            line |= {"compressed, KiB": f"{sizes['deflate_KiB']:.3f}"}
            edges = {EDGE_TITLES[edge].removeprefix("edge: "): edge for edge in EDGES}
            line |= {title: _accuracy(at, edge, cut) for title, edge in edges.items()}
            rows.append(line)
    return pd.DataFrame(rows)


def _accuracy(at: pd.DataFrame, edge: str, cut: str) -> str:
    if cut == IMAGE:
        return f"{at['acc_pct'].iloc[0]:.2f}" if edge == "integer" else "as digital"
    values = at.loc[at["edge"] == edge, "acc_pct"]
    if values.empty:
        return tables.NOT_RUN
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f} (n={len(values)})" if len(values) > 1 else "")


def caption(profile: str, claim: str) -> str:
    """A claim with what figure and table rest on: profile, images and draws of both kinds of edge."""
    frame = largest(measured(profile))
    digital = frame.loc[frame["seed"] < 0, "n_test"].max()
    drawn = frame.loc[frame["seed"] >= 0]
    counted = f"{digital:,} test images for the digital edge"
    if len(drawn):
        counted += f", {drawn['n_test'].max():,} for each draw of a crossbar"
    rows = store.read(STUDY, profile=profile)
    return figures.caption(claim, profile=profile, n=counted, seeds=sorted(set(drawn["seed"])),
                            dataset=", ".join(sorted(set(rows["dataset"]))))  # fmt: skip


def findings(profile: str) -> list[str]:
    """The sentences that the rows of a profile support."""
    frame = largest(measured(profile))
    whole = frame.loc[(frame["cut"] == IMAGE) & (frame["wire_bits"] == 8)].iloc[0]
    said = [
        f"float network in the cloud, whole images sent: {whole['acc_pct']:.2f} % of {whole['n_test']:,} test images, "
        f"{whole['packed_KiB']:.2f} KiB a packet, {whole['deflate_KiB']:.2f} compressed"
    ]
    for edge in edges_there(profile):
        said += _of_edge(frame, shares(profile), edge, whole["acc_pct"])
    return [*said, *_of_scales(frame), *_of_pictures(frame), *_of_crossbars(profile)]


def _mean(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the draws."""
    return frame.pivot_table(index=["cut", "wire_bits"], values=SIZES_AND_ACCURACY, aggfunc="mean").reset_index()


def _of_edge(frame: pd.DataFrame, share: pd.DataFrame, edge: str, float_pct: float) -> list[str]:
    """Of one edge, what lies within the tolerance and below the raw image: the smallest packet, the earliest cut."""
    wires = _mean(frame.loc[(frame["edge"] == edge) & (frame["grid"] == "channel")]).to_dict("records")
    small = [wire for wire in wires if wire["packed_KiB"] < RAW_KiB]
    near = [wire for wire in small if wire["acc_pct"] >= float_pct - TOLERANCE_PP]
    said = (
        f"{EDGE_TITLES[edge]}: {len(near)} of {_count(len(wires), 'wire')} lie within {TOLERANCE_PP:g} point of it and "
        f"below the raw image's {RAW_KiB:g} KiB"
    )
    if not near:
        best = max(small, key=lambda wire: wire["acc_pct"], default=None)
        return [said if best is None else f"{said}; the best below it is {_wire(best)}"]
    first = min(near, key=lambda wire: (share["edge_mac_pct"][wire["cut"]], wire["packed_KiB"]))
    macs = share["edge_mac_pct"][first["cut"]]
    return [
        f"{said}; the smallest is {_wire(min(near, key=lambda wire: wire['packed_KiB']))}",
        f"{EDGE_TITLES[edge]}: the earliest such cut, with {macs:.0f} % of the MACs on the edge, is {_wire(first)}",
    ]


def _count(n: float, what: str) -> str:
    return f"{n:.0f} {what}" if n == 1 else f"{n:.0f} {what}s"


def _wire(row: Mapping[Any, Any]) -> str:
    sizes = f"{row['packed_KiB']:.2f} KiB, {row['deflate_KiB']:.2f} compressed"
    return f"{_count(row['wire_bits'], 'bit')} after {row['cut']}: {row['acc_pct']:.2f} % with {sizes}"


def _of_scales(frame: pd.DataFrame) -> list[str]:
    """One scale per channel against one in all, on the digital edge."""
    mine = frame.loc[(frame["edge"] == "integer") & frame["grid"].isin(["channel", "tensor"])]
    wide = mine.pivot_table(index=["wire_bits", "cut"], columns="grid", values="acc_pct")
    if "tensor" not in wide:
        return []
    gains = wide["channel"].sub(wide["tensor"]).dropna()
    return [
        f"a scale per channel instead of one in all, {_count(bits, 'bit')}: {gain.mean():+.2f} points on average over "
        f"{len(gain)} cuts, from {gain.min():+.2f} to {gain.max():+.2f}"
        for bits, gain in gains.groupby("wire_bits")
    ]


def _of_pictures(frame: pd.DataFrame) -> list[str]:
    """The best JPEG, and what a wire of no more bytes gives."""
    pictures = frame.loc[frame["jpeg_quality"] > 0].to_dict("records")
    wires = frame.loc[(frame["edge"] == "integer") & (frame["grid"] == "channel")].to_dict("records")
    if not pictures:
        return []
    best = max(pictures, key=lambda row: row["acc_pct"])
    quality = f"JPEG at its best (quality {best['jpeg_quality']:.0f})"
    said = f"{quality}: {best['acc_pct']:.2f} % with {best['jpeg_KiB']:.2f} KiB"
    smaller = [wire for wire in wires if wire["deflate_KiB"] <= best["jpeg_KiB"]]
    better = max(smaller, key=lambda wire: wire["acc_pct"], default=None)
    return [said if better is None else f"{said}; with no more bytes, {_wire(better)}"]


def _of_crossbars(profile: str, bits: int = 8) -> list[str]:
    """What a crossbar costs by how much of the network it holds, on the same images."""
    frame, order = measured(profile), [*shares(profile).index, ALL]
    said = []
    for edge in [e for e in edges_there(profile) if e != "integer"]:
        drawn = frame.loc[(frame["edge"] == edge) & ((frame["wire_bits"] == bits) | (frame["cut"] == ALL))]
        n_test, n_draws = drawn["n_test"].max(), drawn["seed"].nunique()
        exact = frame.loc[(frame["edge"] == "integer") & (frame["n_test"] == n_test) & (frame["grid"] != "tensor")]
        exact = exact.loc[(exact["wire_bits"] == bits) | (exact["cut"] == ALL)].set_index("cut")["acc_pct"]
        loss = drawn.groupby("cut")["acc_pct"].agg(["mean", "std"])
        shown = [
            f"{cut} {loss['mean'][cut] - exact[cut]:+.2f} (sd {0.0 if n_draws < 2 else loss['std'][cut]:.2f})"
            for cut in _ends(order, loss.index)
        ]
        against = f"against the digital edge on the same {n_test:,} images"
        drawn_words = f"{_count(n_draws, 'draw')}, {bits} bits: {', '.join(shown)} points"
        said.append(f"{EDGE_TITLES[edge]}, {against}, {drawn_words}")
    return said


def _ends(order: Sequence[str], there: pd.Index) -> list[str]:
    """The cuts with words of their own, and the whole network, that were measured."""
    return [cut for cut in order if cut in there and (cut in CUT_WORDS or cut == ALL)]
