"""What notebook 07 shows of the integer studies: rows in, frames out."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hq_lib.integer import IntegerModel
from hq_lib.integer.arithmetic import accumulator_bound
from hq_lib.integer.record import REQUANTIZERS, Layer
from hq_lib.results import labels, tables
from hq_lib.studies.integer_export.executors import EXECUTORS, version
from hq_lib.studies.integer_export.study import AS_TRAINED, MOBILE, MODELS, Plan

METRICS = {
    "acc_pct": ("accuracy, %", ".2f"), "agreement": ("against NumPy", ".0f"), "file_KiB": ("file, KiB", ",.0f"),
    "cpu_ms": ("CPU ms an image", ".3g"), "peak_MiB": ("peak memory, MiB", ".2f"),
}  # fmt: skip
"""Metric of the support matrix -> title and format in print."""
CLAIM = (
    "Every network in every executor: one integer record, equal logits. Two numbers in a cell are the requantizers "
    "float32 / fixed; time is CPU time, summed over threads; memory is what opening the file and running one image "
    "adds to a fresh process; differences of PyTorch are counted against NumPy with float32, those of float at W8A8"
)
SWITCHES = {
    "placement": "deploy", "BN": "folded where that is exact", "image": "8 bit", "first and last layer": "8 bit",
    "W8A8": "min-max ranges", "W4A4": "MSE ranges and an 8 bit stem output", "rounding": "to nearest",
    "trained networks": "as their file says", "batch": "100, C: 1",
}  # fmt: skip
"""The settings printed under tab_support_matrix."""
Key = tuple[str, str, str]


def current(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with columns ``network`` (a name of ours or a file's stem), ``bits`` and ``requantizer``.

    Of executors that have changed since (``executors.VERSIONS``) only today's rows, but for accuracies: the integers
    have stayed the same.
    """
    found = tables.with_switches(tables.with_bits(rows), "network", "requantizer", "reason", "version")
    found = found.fillna({"network": found["model"], "requantizer": "float32", "reason": "", "version": 0})
    today = [version(method, w_bits) or 0 for method, w_bits in zip(rows["method"], rows["w_bits"], strict=True)]
    kept = found.loc[(found["version"] == today) | (found["metric"] == "acc_pct")]
    newest_last = kept.sort_values("version", kind="stable")
    return newest_last.drop_duplicates(["network", "bits", "method", "metric", "requantizer"], keep="last").sort_index()


def support_matrix(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """tab_support_matrix: a line per network, bits and executor; both requantizers of NumPy and C in one cell."""
    found = current(rows)
    stems = [Path(name).name.removesuffix(".safetensors") for name in plan.networks]
    known = list(dict.fromkeys([*stems, *found["network"]]))
    order = [*MODELS, *(name for name in known if name not in (*MODELS, *MOBILE)), *MOBILE]
    lines = []
    for network in [name for name in order if name in known]:
        mine = found.loc[found["network"] == network]
        bits = _planned_bits(network, plan) if mine.empty or network in MODELS else []
        for at in dict.fromkeys([*bits, *sorted(set(mine["bits"]) - {*bits, "float"}, reverse=True)]):
            lines += _lines(mine, network, at)
    return pd.DataFrame(lines)


def _planned_bits(network: str, plan: Plan) -> list[str]:
    if network in MODELS:
        return ["float", *(labels.bits_label(*pair) for pair in plan.bits)]
    at = re.search(r"_w(\d+)a(\d+)", network)
    return ["W8A8" if network in MOBILE else labels.bits_label(*map(int, at.groups())) if at else tables.NOT_RUN]


def _lines(mine: pd.DataFrame, network: str, bits: str) -> Iterator[dict[str, Any]]:
    """The lines of a network at one width, one an executor."""
    n_test = max((int(n) for n in mine["n_test"]), default=0)
    at = mine.loc[mine["bits"] == bits]
    values = at.set_index(["method", "metric", "requantizer"])["value"].to_dict()
    reasons = at.loc[at["reason"] != ""].set_index("method")["reason"].to_dict()
    for executor in EXECUTORS[:1] if bits == "float" else EXECUTORS[1 + (network in MOBILE) :]:
        line = {title: _cell(values, executor, metric, n_test) for metric, (title, _) in METRICS.items()}
        is_measured = (executor, "cpu_ms", "float32") in values
        if executor in reasons and not is_measured:
            line = dict.fromkeys(line, reasons[executor])
        elif network in MOBILE and is_measured:
            line[METRICS["acc_pct"][0]] = "untrained"
        yield {
            "network": labels.printed("model", network), "bits": bits, "executor": labels.printed("method", executor),
            "images": f"{n_test:,}" if n_test else tables.NOT_RUN, **line,
        }  # fmt: skip


def _cell(values: Mapping[Key, float], executor: str, metric: str, n_test: int) -> str:
    """The value; where there are two requantizers that of "float32", then that of "fixed"; how many logits differ."""
    if metric == "agreement" and executor == "numpy" and any((executor, m, "float32") in values for m in METRICS):
        return "the reference"
    if (same := values.get((executor, "same_top1_pct", "float32"))) is not None and metric == "agreement":
        return f"{n_test - round(same * n_test / 100)} predictions differ"
    counted = "n_logit_mismatches" if metric == "agreement" else metric
    both = [values.get((executor, counted, form)) for form in REQUANTIZERS]
    if both[0] is None:
        return tables.NOT_RUN
    shown = " / ".join(f"{value:{METRICS[metric][1]}}" for value in both if value is not None)
    return f"{shown} of {10 * n_test:,} logits differ" if metric == "agreement" else shown


def accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """By network and bits, percent: float, fake-quantized, integers (NumPy, float32), and integers minus fake."""
    found = current(rows)
    found = found.loc[(found["metric"] == "acc_pct") & (found["requantizer"] != "fixed")]
    whole = found.loc[found["method"] == "float"].set_index("network")["value"]
    wide = found.loc[found["method"].isin(["fake_quant", "numpy"])].pivot_table(
        index=["network", "bits"], columns="method", values="value", sort=False
    )
    wide = wide.reset_index().rename_axis(columns=None).rename(columns={"fake_quant": "fake", "numpy": "integers"})
    return wide.assign(float=wide["network"].map(whole), difference=wide["integers"] - wide["fake"]).round(2)


def mismatches(rows: pd.DataFrame) -> pd.DataFrame:
    """By executor: how many networks (at each width and requantizer) and logits were compared, and how many differ."""
    found = current(rows)
    found = found.loc[found["metric"] == "n_logit_mismatches"]
    counted = found.assign(
        n_logits=10 * found["n_test"], executor=[labels.printed("method", m) for m in found["method"]]
    )
    groups = counted.groupby("executor")
    return groups.agg(n_pairs=("value", "count"), n_logits=("n_logits", "sum"), n_differ=("value", "sum")).astype(int)


def layers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of fig_integer_agreement: model, bits, tensor, place, inputs, mismatch_pct, largest_LSB, n_test.

    ``model`` is a network of ours, in the order of ``MODELS``, or the stem of a file.
    """
    known = tables.with_switches(tables.with_bits(rows), "network", "biases")
    known = known.loc[known["biases"].isna()].assign(model=known["network"].fillna(known["model"]))
    wide = tables.wide(known, "model", "bits", "inputs", "place", "tensor", "n_test", "dataset", "seed")
    order = {name: i for i, name in enumerate([*MODELS, *sorted(set(wide["model"]) - {*MODELS})])}
    return wide.sort_values(
        ["model", "bits", "inputs", "place"], key=lambda c: c.map(order) if c.name == "model" else c
    )


def biases_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_biases: of each trained network, tensor by tensor, the integers that are others than fake-quantized where
    every operation is fed with the graph's, percent: with biases as trained / with those that accumulators hold."""
    known = tables.with_switches(rows, "inputs", "place", "tensor", "network", "biases")
    known = known.loc[(known["inputs"] == "the graph's") & (known["metric"] == "mismatch_pct")]
    both = known.loc[known["network"].isin(known.loc[known["biases"].notna(), "network"])]
    both = both.assign(biases=both["biases"].fillna("held"))
    wide = both.pivot_table(index=["place", "tensor"], columns=["network", "biases"], values="value")
    out = pd.DataFrame({"tensor": wide.index.get_level_values("tensor")})
    for network in dict.fromkeys(both["network"]):
        pairs = zip(wide[network, AS_TRAINED], wide[network, "held"], strict=True)
        out[network] = ["-" if np.isnan(trained) else f"{trained:.3g} / {held:.3g}" for trained, held in pairs]
    return out


def worst_born(compared: pd.DataFrame) -> pd.DataFrame:
    """Of each network, from ``layers``: the tensor with most mismatches when fed with the graph's integers."""
    born = compared.loc[compared["inputs"] == "the graph's"].sort_values("mismatch_pct", ascending=False)
    columns = ["model", "bits", "tensor", "mismatch_pct", "largest_LSB"]
    return born.drop_duplicates(["model", "bits"])[columns].reset_index(drop=True)


def operations(imodel: IntegerModel) -> pd.DataFrame:
    """The record as a table: operation, kind, shape and integer type of its output, bits that its accumulator needs."""
    lines = []
    for op in imodel.ops:
        out = imodel.tensors[op.output]
        line = {"operation": op.name, "kind": type(op).__name__, "output": "x".join(map(str, out.shape)),
                "type": out.dtype, "weights": 0, "weight bits": 0, "accumulator bits": 0}  # fmt: skip
        if isinstance(op, Layer):
            bound = int(accumulator_bound(op, imodel.tensors[op.inputs[0]]).max())
            line |= {"weights": op.weight.size, "weight bits": op.weight_bits}
            line["accumulator bits"] = bound.bit_length() + 1
        lines.append(line)
    return pd.DataFrame(lines)


def time_by_operation(imodel: IntegerModel, seconds: np.ndarray) -> pd.DataFrame:
    """Where the time of C goes: operation, kind, thousands of products, us an image, and per cent of the whole.

    ``seconds`` from ``deploy.c.Runtime.profile``.
    """
    shapes = [imodel.tensors[op.output].shape[1:] for op in imodel.ops]
    known = operations(imodel)
    products = known["weights"] * [int(np.prod(shape)) for shape in shapes] / 1000
    shares = {"kMAC": products, "us": 1e6 * seconds, "share_pct": 100 * seconds / seconds.sum()}
    return known[["operation", "kind"]].assign(**shares).round(1)
