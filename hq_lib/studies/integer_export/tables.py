"""What notebook 07 shows of the integer studies: rows in, frames out."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from hq_lib.integer import IntegerModel
from hq_lib.integer.proof import accumulator_bound
from hq_lib.integer.record import Layer
from hq_lib.results import labels, tables
from hq_lib.studies.integer_export.executors import version
from hq_lib.studies.integer_export.study import AS_TRAINED, MOBILE, MODELS, Plan

NAMES = {"float": "float", "fake_quant": "fake-quantized", "numpy": "NumPy", "c": "C", "onnx": "ONNX Runtime"}
METRICS = {"acc_pct": ".2f", "file_KiB": ",.0f", "cpu_ms": ".3g", "peak_MiB": ".2f"}
TITLES = {
    "acc_pct": "accuracy, %", "agreement": "against NumPy", "file_KiB": "file, KiB", "cpu_ms": "CPU ms an image",
    "peak_MiB": "peak memory, MiB",
}  # fmt: skip
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
    found = found.fillna({"network": found["model"], "requantizer": "", "reason": "", "version": 0})
    today = [version(method, w_bits) or 0 for method, w_bits in zip(rows["method"], rows["w_bits"], strict=True)]
    kept = found.loc[(found["version"] == today) | (found["metric"] == "acc_pct")]
    return kept.drop_duplicates(["network", "bits", "method", "metric", "requantizer"], keep="last")


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


def _lines(mine: pd.DataFrame, network: str, bits: str) -> list[dict[str, str]]:
    """The lines of a network at one width, one an executor."""
    n_test = max((int(n) for n in mine["n_test"]), default=0)
    at = mine.loc[mine["bits"] == bits]
    values = at.set_index(["method", "metric", "requantizer"])["value"].to_dict()
    reasons = at.loc[at["reason"] != ""].set_index("method")["reason"].to_dict()
    executors = ["float"] if bits == "float" else list(NAMES)[2:] if network in MOBILE else list(NAMES)[1:]
    lines = []
    for executor in executors:
        line = {
            "network": labels.printed("model", network), "bits": bits, "executor": NAMES[executor],
            "images": f"{n_test:,}" if n_test else tables.NOT_RUN,
        }  # fmt: skip
        for metric, title in TITLES.items():
            line[title] = _cell(values, executor, metric, n_test)
        if network in MOBILE and line[TITLES["cpu_ms"]] != tables.NOT_RUN:
            line[TITLES["acc_pct"]] = "untrained"
        measured = any((executor, "cpu_ms", form) in values for form in ("", "float32"))
        lacks = executor in reasons and not measured
        lines.append({**line, **dict.fromkeys(TITLES.values(), reasons[executor])} if lacks else line)
    return lines


def _cell(values: Mapping[Key, float], executor: str, metric: str, n_test: int) -> str:
    """The value; where there are two requantizers that of "float32", then that of "fixed"."""
    if metric == "agreement":
        return _agreement(values, executor, n_test)
    plain = values.get((executor, metric, ""), values.get((executor, metric, "float32")))
    fixed = values.get((executor, metric, "fixed"))
    if plain is None:
        return tables.NOT_RUN
    form = METRICS[metric]
    return f"{plain:{form}}" if fixed is None else f"{plain:{form}} / {fixed:{form}}"


def _agreement(values: Mapping[Key, float], executor: str, n_test: int) -> str:
    if executor == "numpy" and any(("numpy", metric, "float32") in values for metric in ("acc_pct", "cpu_ms")):
        return "the reference"
    same = values.get((executor, "same_top1_pct", ""))
    if same is not None:
        return f"{n_test - round(same * n_test / 100)} predictions differ"
    counts = [values.get((executor, "n_logit_mismatches", form)) for form in ("float32", "fixed")]
    known = [f"{count:.0f}" for count in counts if count is not None]
    return f"{' / '.join(known)} of {10 * n_test:,} logits differ" if known else tables.NOT_RUN


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
    counted = found.assign(n_logits=10 * found["n_test"], executor=found["method"].map(NAMES))
    groups = counted.groupby("executor")
    return groups.agg(n_pairs=("value", "count"), n_logits=("n_logits", "sum"), n_differ=("value", "sum")).astype(int)


def layers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of fig_integer_agreement: model, bits, tensor, place, inputs, mismatch_pct, largest_LSB, n_test.

    ``model`` is a network of ours, in the order of ``MODELS``, or the stem of a file.
    """
    known = tables.with_switches(tables.with_bits(rows), "inputs", "place", "tensor", "network", "biases")
    known = known.loc[known["biases"].isna()]
    known["model"] = known["network"].fillna(known["model"])
    index = ["model", "bits", "inputs", "place", "tensor", "n_test", "dataset", "seed"]
    wide = known.pivot_table(index=index, columns="metric", values="value").reset_index()
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
    lines = []
    for op, each in zip(imodel.ops, seconds, strict=True):
        places = int(np.prod(imodel.tensors[op.output].shape[1:]))
        products = op.weight.size * places if isinstance(op, Layer) else 0
        lines.append({"operation": op.name, "kind": type(op).__name__, "kMAC": products / 1000, "us": 1e6 * each,
                      "share_pct": 100 * each / seconds.sum()})  # fmt: skip
    return pd.DataFrame(lines).round(1)
