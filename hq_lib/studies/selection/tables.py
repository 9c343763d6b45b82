"""What the calibration study shows: its tables, captions and findings, from its frames."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hq_lib.results import figures, labels, published, tables
from hq_lib.studies.selection import frames
from hq_lib.studies.selection.bench import Bits
from hq_lib.studies.selection.points import LOWEST, size_of
from hq_lib.studies.selection.sets import SMOOTH

NETWORKS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_imagenet", "regnetx_600m", "mnasnet2_0")
"""the paper's columns"""
METHODS = ("brecq", "qdrop")
SOURCES = (
    "CodeDevCurry/CaPTQ (repository README)", "wimh966/QDrop (repository README)",
    "BRECQ (Li et al.), arXiv 2102.05426", "MQBench benchmark (repository ModelTC/MQBench, README)",
)  # fmt: skip
"""of published numbers, the first that has one: the paper compared, then the methods' own"""


def comparison_table(profile: str, dataset: str) -> pd.DataFrame:
    """tab_selection: the comparison as text, best first; n/r where a difference needs more draws."""
    found = frames.comparison(frames.main_sets(frames.frame(profile, dataset), profile, dataset))
    out = pd.DataFrame({"calibration images": found["label"], "draws": found["n"].astype(str)})
    out["test accuracy, %"] = [_mean_sd(m, s) for m, s in zip(found["acc_pct"], found["sd"], strict=True)]
    out["paired difference to random, points (95 %)"] = [_interval(line) for line in found.to_dict("records")]
    for name in ("loss_own", "loss_common"):
        out[frames.TARGETS[name]] = [f"{value:.1f}" for value in found[name]]
    return out


def _mean_sd(mean: float, sd: float) -> str:
    return f"{mean:.2f}" if np.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"


def _interval(line: Mapping[str, Any]) -> str:
    if line.get("choice") == "random":
        return tables.NOT_PUBLISHED
    if np.isnan(line["mean"]):
        return tables.NOT_RUN
    return f"{line['mean']:+.2f} ({line['low']:+.2f} to {line['high']:+.2f})"


def pairs(profile: str, dataset: str, bits: Bits) -> pd.DataFrame:
    """Accuracy without and with selected images: model, method, selected, source ("ours", "published"), value."""
    points = frames.frame(profile, dataset)
    lines = []
    for method in METHODS:
        ours = frames.main_sets(points, profile, dataset, method=method, bits=bits)
        for line in ours.loc[ours["choice"].isin(["random", SMOOTH])].to_dict("records"):
            known = {"model": line["model"], "method": method, "selected": line["choice"] == SMOOTH}
            lines.append({**known, "seed": line["seed"], "source": "ours", "value": line["acc_pct"]})
        lines += [
            {"model": network, "method": method, "selected": chosen, "source": "published", "value": value, "seed": -1}
            for network in NETWORKS
            for chosen in (False, True)
            if (value := published_value(network, method, bits, selected=chosen)) is not None
        ]
    return pd.DataFrame(lines, columns=["model", "method", "selected", "source", "value", "seed"])


def published_value(network: str, method: str, bits: Bits, *, selected: bool) -> float | None:
    """The published ImageNet accuracy (percent) of BRECQ or QDrop, without or with CaPTQ's images; None = nothing."""
    name = f"captq_{method}" if selected else method
    found = published.lookup(table="imagenet_ptq", model=network, method=name, variant="-")
    found = found.loc[(found["w_bits"] == bits[0]) & (found["a_bits"] == bits[1])]
    for source in SOURCES:
        values = found.loc[found["source"] == source, "value"].tolist()
        if values:
            return values[0]
    return None


def table_w2a2(profile: str, dataset: str) -> pd.DataFrame:
    """tab1_w2a2: one line a network; ours with random and with the smoothest images, and the published pair."""
    found = pairs(profile, dataset, LOWEST)
    models = [*dict.fromkeys(found.loc[found["source"] == "ours", "model"]), *NETWORKS]
    lines = []
    for model in models:
        line = {"network": labels.printed("model", model), "images": "ImageNet" if model in NETWORKS else dataset}
        for method in METHODS:
            mine = found.loc[(found["model"] == model) & (found["method"] == method)]
            line |= _pair_texts(mine, labels.printed("method", method))
        lines.append(line)
    return pd.DataFrame(lines)


def _pair_texts(mine: pd.DataFrame, name: str) -> dict[str, str]:
    ours, theirs = (mine.loc[mine["source"] == source] for source in ("ours", "published"))
    texts = {}
    for chosen, words in ((False, "random"), (True, "smoothest")):
        values = ours.loc[ours["selected"] == chosen, "value"]
        texts[f"{name}, {words}, ours"] = (
            f"{_mean_sd(values.mean(), values.std(ddof=1))} (n={len(values)})" if len(values) else tables.NOT_RUN
        )
    named = ours.assign(choice=np.where(ours["selected"].astype(bool), SMOOTH, "random"))
    found = frames.paired(named, SMOOTH, target="value") if len(ours) else None
    texts[f"{name}, paired difference (95 %)"] = _interval(found) if found else tables.NOT_RUN
    known = [theirs.loc[theirs["selected"] == chosen, "value"].tolist() for chosen in (False, True)]
    shown = [f"{values[0]:.2f}" if values else tables.NOT_PUBLISHED for values in known]
    texts[f"{name} → CaPTQ + {name}, published"] = " → ".join(shown) if any(known) else tables.NOT_PUBLISHED
    return texts


def claim(profile: str, dataset: str, bits: Bits) -> str:
    """One sentence: the mean paired difference of the smoothest images at a width; n/r below two shared draws."""
    points, parts = frames.frame(profile, dataset), []
    for method in METHODS:
        sets = frames.main_sets(points, profile, dataset, method=method, bits=bits)
        found = frames.paired(sets, SMOOTH)
        gain = tables.NOT_RUN if found is None else f"{found['mean']:+.2f}"
        parts.append(f"{labels.printed('method', method)} {gain}")
    return f"Smoothest instead of random calibration images at {labels.bits_label(*bits)}, points: {', '.join(parts)}"


def caption(words: str, profile: str, points: pd.DataFrame, *, dataset: str, seeds: Sequence[int] | None = None) -> str:
    """A caption with images, draws and the switches that every point shares."""
    if points.empty:
        return figures.caption(words, profile=profile, n=tables.NOT_RUN, dataset=dataset)
    counts = sorted({int(n) for n in points["n_test"]}) if "n_test" in points else []
    counted = " and ".join(f"{n:,} test images" for n in counts) or "published numbers"
    drawn = sorted({int(s) for s in points["seed"] if s >= 0}) if seeds is None else seeds
    switches = f"first/last layer 8 bit, {size_of(dataset, profile).iterations:,} iterations a block"
    return figures.caption(words, profile=profile, n=counted, seeds=drawn, dataset=dataset, switches=switches)
