"""What notebook 03 shows of the QAT study: curves by hand, tables beside published numbers, findings."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from hq_lib import data, models
from hq_lib.quantizers.dsq import dsq_quantize, dsq_soft
from hq_lib.results import figures, labels, paths, provenance, published, store, tables
from hq_lib.studies.float_training import study as float_training
from hq_lib.studies.qat.study import HISTORY, PLAN, STUDY, clip_history
from hq_lib.training import evaluate
from hq_lib.training.bit_lists import BIT_LISTS

GROUP_TABLE = "seed001"
TABLE_BITS = {"resnet20": ("W8A8", "W4A4", "W3A3", "W2A2", "W1A32", "W1A1"), "toynet": ("W8A8", "W6A6")}
"""Bit widths that a table lists even where nothing was run; other published ones are left out."""
LIST_METHODS = ("dorefa_hw", "pact", "mpact")
"""The seed's methods, for each of its configurations."""


def dsq_curves(
    *, bits: int = 2, low: float = -1.0, high: float = 1.0, alphas: Sequence[float] = (0.05, 0.2, 0.45), n: int = 601
) -> pd.DataFrame:
    """DSQ on n points a little beyond [low, high]: columns x, dsq_alpha, soft, hard and slope (d soft / d x).

    The slope is autograd's derivative of the soft staircase, not the library's closed form, so that the figure is an
    independent picture of it.
    """
    frames = []
    bounds = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    margin = 0.1 * (high - low)
    for alpha in alphas:
        x = torch.linspace(low - margin, high + margin, n, dtype=torch.float64, requires_grad=True)
        dsq_alpha = torch.tensor(alpha, dtype=torch.float64)
        soft = dsq_soft(x, *bounds, dsq_alpha, bits=bits)
        (slope,) = torch.autograd.grad(soft.sum(), x)
        hard = dsq_quantize(x.detach(), *bounds, dsq_alpha, bits=bits)
        columns = {"x": x.detach(), "soft": soft.detach(), "hard": hard, "slope": slope}
        frames.append(pd.DataFrame({key: value.numpy() for key, value in columns.items()}).assign(dsq_alpha=alpha))
    return pd.concat(frames, ignore_index=True)


def baseline(profile: str, *, names: Sequence[str] = ("resnet20",), device: str = "cpu") -> pd.DataFrame:
    """The float networks on the very test images of this profile; rows of ``qat.csv`` with method ``float``."""
    for name in names:
        path = float_training.shipped(name)
        if path is None:
            print(f"{name}: no float checkpoint is shipped")
            continue
        net, record = models.load_checkpoint(path)
        test = data.load_or_embedded(record["dataset"], "test", n=PLAN[paths.check_profile(profile)]["n_test"])
        with provenance.stopwatch(device) as watch:
            score = evaluate(net.to(device), test)
        row = {
            "experiment": STUDY, "model": name, "dataset": test.spec.name, "method": "float", "seed": record["seed"],
            "n_train": record["n_train"], "n_test": score.n, "metric": "acc_pct", "value": score.acc_pct, "unit": "%",
            "epochs": record["config"]["epochs"], "switches": {"checkpoint": path.name}, "seconds": watch.seconds,
            **provenance.stamp(device),
        }  # fmt: skip
        store.append(STUDY, [row], profile=profile)
    rows = store.read(STUDY, profile=profile)
    return rows.loc[rows["method"] == "float"]


def scores(profile: str, *, split: str = "test", lists: bool = False) -> pd.DataFrame:
    """The rows of one split ("test", "val", or "start": validation before training), without distilled runs.

    ``lists``: those of seed 001's configurations, named in column ``configuration``, in place of all others.
    """
    rows = store.read(STUDY, profile=profile)
    switches = [json.loads(text) for text in rows["switches"]]
    kept = [s.get("split", "test") == split and "distill" not in s and ("lists" in s) == lists for s in switches]
    keep = pd.Series(kept, index=rows.index, dtype=bool) & (rows["profile"] == profile)
    if lists:
        rows = rows.assign(configuration=[s.get("lists", "") for s in switches])
    return rows.loc[keep]


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Without distilled runs and those of seed 001's configurations, which would stand for others of the same bits."""
    kept = [not {"distill", "lists"} & set(json.loads(text)) for text in rows["switches"]]
    return rows.loc[pd.Series(kept, index=rows.index, dtype=bool)]


def methods_table(profile: str) -> pd.DataFrame:
    """tab_resnet20_methods: bits x methods, ours beside the numbers published for ResNet-20 on CIFAR-10."""
    return _table(profile, "resnet20", published.load().query("table == 'resnet20_cifar10'"))


def group_table(model: str, profile: str) -> pd.DataFrame:
    """tab_toynet, tab_mobilenetv2, tab_resnet20: ours beside the group's own numbers for the network.

    Where the group published several numbers for one cell, all are shown, best first.
    """
    return _table(profile, model, published.load().query("table == @GROUP_TABLE and model == @model"))


def lists_table(model: str, profile: str) -> pd.DataFrame:
    """Seed 001's configurations, bits by layer: ours beside the group's own fake-quantized accuracies."""
    rows, theirs = scores(profile, lists=True), published.load().query("table == @GROUP_TABLE and model == @model")
    named = theirs["variant"].str.split(",").str[0].str.strip()
    theirs = theirs.assign(configuration=named).loc[named.isin(list(BIT_LISTS.get(model, ())))]
    order = {"configuration": list(BIT_LISTS.get(model, ())), "method": LIST_METHODS}
    ours = rows.loc[rows["model"] == model]
    return tables.build(ours, theirs, index=["configuration", "method"], order=order)


def _table(profile: str, model: str, theirs: pd.DataFrame) -> pd.DataFrame:
    rows = scores(profile)
    ours = rows.loc[rows["model"] == model]
    theirs = tables.with_bits(theirs.loc[theirs["metric"] == "acc_pct"])
    known = ["float", *PLAN["full"]["methods"], "dorefa_hw", "lsq_plus"]
    listed = ["float", *TABLE_BITS.get(model, ("W8A8", "W6A6", "W4A4")), *tables.with_bits(ours)["bits"]]
    theirs = theirs.loc[theirs["method"].isin(known) & theirs["bits"].isin(listed)]
    return tables.build(ours, theirs, index=["bits", "method"], order={"bits": list(dict.fromkeys(listed))})


def table_caption(model: str, profile: str) -> str:
    """The claim under a table, with images, seeds and data set."""
    rows = scores(profile)
    rows = rows.loc[rows["model"] == model]
    name = labels.printed("model", model)
    if rows.empty:
        return figures.caption(
            f"{name}: published numbers; none of ours in this profile", profile=profile, n="no images"
        )
    claim = f"{name}: test accuracy in percent after quantization-aware training, beside published numbers"
    counted = " and ".join(f"{n:,} test images" for n in sorted(set(rows["n_test"])))
    epochs = "/".join(str(n) for n in sorted(set(rows.loc[rows["method"] != "float", "epochs"])))
    facts = {"dataset": ", ".join(sorted(set(rows["dataset"]))), "seeds": sorted(set(rows["seed"]))}
    return figures.caption(
        claim, profile=profile, n=counted, switches=f"{epochs or 'no'} epochs of fine-tuning", **facts
    )


def clip_curves(profile: str) -> pd.DataFrame:
    """PACT's clips for fig_pact_alpha: columns w_bits, a_bits, epoch, layer, alpha; layers in order of execution."""
    rows = _plain(clip_history(profile))
    rows = rows.loc[(rows["method"] == "pact") & (rows["model"] == "resnet20")]
    order = {name: i for i, name in enumerate(_execution_order())}
    rows = rows.assign(alpha=rows["value"], place=[order.get(layer, len(order)) for layer in rows["layer"]])
    return rows.sort_values(["w_bits", "epoch", "place"])[["w_bits", "a_bits", "epoch", "layer", "alpha", "seed"]]


def _execution_order() -> list[str]:
    from hq_lib.graph import QUANTIZER_SUFFIX, BitPolicy, quantize

    qnet = quantize(
        models.build("resnet20"), BitPolicy("pact:4", "pact:4", placement="academic"), torch.zeros(1, 3, 32, 32)
    )
    called = [str(node.target) for node in qnet.graph.nodes if node.op == "call_module"]
    return [name.removesuffix(QUANTIZER_SUFFIX) for name in called if name.endswith(QUANTIZER_SUFFIX)]


def findings(profile: str, *, model: str = "resnet20") -> list[str]:
    """The sentences that the rows of a profile support, one per bit width, and one on PACT's clips."""
    rows = tables.with_bits(scores(profile))
    rows = rows.loc[rows["model"] == model]
    base = rows.loc[rows["method"] == "float", "value"].mean()
    lines = []
    for bits, group in rows.loc[rows["method"] != "float"].groupby("bits", sort=False):
        means = group.groupby("method")["value"].mean().sort_values(ascending=False)
        listed = ", ".join(f"{labels.printed('method', m)} {v:.2f}" for m, v in means.items())
        n = int(group["n_test"].iloc[0])
        error = 100 * (means.iloc[0] / 100 * (1 - means.iloc[0] / 100) / n) ** 0.5
        lines.append(
            f"{bits}: {listed} % of {n:,} images (standard error {error:.2f}); best is {means.iloc[0] - base:+.2f} "
            f"against float {base:.2f}"
        )
    clips = clip_curves(profile)
    key: Any
    for key, group in clips.groupby(["w_bits", "a_bits"]):
        first, last = (group.loc[group["epoch"] == e, "alpha"].mean() for e in (0, group["epoch"].max()))
        lines.append(f"PACT {labels.bits_label(*key)}: mean clip {first:.2f} as calibrated -> {last:.2f}")
    return lines


def curves(profile: str) -> pd.DataFrame:
    """Validation accuracy over the epochs: columns model, method, bits, seed, epoch, value."""
    rows = _plain(store.read(HISTORY, profile=profile))
    rows = tables.with_bits(rows.loc[(rows["profile"] == profile) & (rows["metric"] == "val_acc_pct")])
    rows = rows.assign(epoch=[json.loads(text)["epoch"] for text in rows["switches"]])
    return pd.DataFrame(rows, columns=["model", "method", "bits", "seed", "epoch", "value"])
