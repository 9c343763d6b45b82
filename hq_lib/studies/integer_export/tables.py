"""What the rows of the integer study say: tab_support_matrix, the layers of fig_integer_agreement, findings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hq_lib.results import figures, labels, store, tables
from hq_lib.studies.integer_export.files import MODELS, PLAN, STUDY
from hq_lib.studies.integer_export.study import BITS, LAYERS

NAMES = {"float": "float", "fake_quant": "fake-quantized", "numpy": "NumPy", "c": "C", "onnx": "ONNX Runtime"}
METRICS = {"acc_pct": ".2f", "file_KiB": ",.0f", "cpu_ms": ".3g", "peak_MiB": ".2f"}
TITLES = {
    "acc_pct": "accuracy, %", "agreement": "against NumPy", "file_KiB": "file, KiB", "cpu_ms": "CPU ms an image",
    "peak_MiB": "peak memory, MiB",
}  # fmt: skip
Found = Mapping[tuple[Any, ...], float]


def table(profile: str) -> pd.DataFrame:
    """tab_support_matrix: a line per network, bits and executor; both requantizers of NumPy and C in one cell."""
    rows = _readable(store.read(STUDY, profile=profile))
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    found = {tuple(row[k] for k in _KEY): float(row["value"]) for row in records}
    reasons = {tuple(row[k] for k in _KEY[:4]): row["reason"] for row in records if row["reason"]}
    lines = []
    for model in [m for m in MODELS if m in set(rows["model"]) or m in PLAN[profile].models]:
        n_test = max((row["n_test"] for row in records if row["model"] == model), default=0)
        lines.append(_line(found, reasons, (model, 32, 32, "float"), n_test))
        for w_bits, a_bits in BITS:
            keys = [(model, w_bits, a_bits, name) for name in NAMES if name != "float"]
            lines += [_line(found, reasons, key, n_test) for key in keys]
    return pd.DataFrame(lines)


_KEY = ["model", "w_bits", "a_bits", "method", "metric", "requantizer"]


def _readable(rows: pd.DataFrame) -> pd.DataFrame:
    settings = [json.loads(text) for text in rows["switches"]]
    return rows.assign(
        requantizer=[s.get("requantizer", "") for s in settings], reason=[s.get("reason", "") for s in settings]
    )


def _line(found: Found, reasons: Mapping[tuple, str], key: tuple[str, int, int, str], n_test: int) -> dict[str, str]:
    model, w_bits, a_bits, executor = key
    line = {
        "network": labels.printed("model", model), "bits": labels.bits_label(w_bits, a_bits),
        "executor": NAMES[executor], "images": f"{n_test:,}" if n_test else tables.NOT_RUN,
    }  # fmt: skip
    for metric, title in TITLES.items():
        line[title] = _agreement(found, key, n_test) if metric == "agreement" else _cell(found, key, metric)
    measured = any((*key, "acc_pct", form) in found for form in ("", "float32"))
    return line if measured or key not in reasons else {**line, **dict.fromkeys(TITLES.values(), reasons[key])}


def _cell(found: Found, key: tuple, metric: str) -> str:
    """The value; where there are two requantizers that of "float32", then that of "fixed"."""
    plain = found.get((*key, metric, ""), found.get((*key, metric, "float32")))
    fixed = found.get((*key, metric, "fixed"))
    if plain is None:
        return tables.NOT_RUN
    form = METRICS[metric]
    return f"{plain:{form}}" if fixed is None else f"{plain:{form}} / {fixed:{form}}"


def _agreement(found: Found, key: tuple, n_test: int) -> str:
    if key[3] == "numpy" and (*key, "acc_pct", "float32") in found:
        return "the reference"
    same = found.get((*key, "same_top1_pct", ""))
    if same is not None:
        return f"{n_test - round(same * n_test / 100)} predictions differ"
    counts = [found.get((*key, "n_logit_mismatches", form)) for form in ("float32", "fixed")]
    known = [f"{count:.0f}" for count in counts if count is not None]
    return f"{' / '.join(known)} of {10 * n_test:,} logits differ" if known else tables.NOT_RUN


def caption(profile: str) -> str:
    """What tab_support_matrix shows, with profile, images and what the columns mean."""
    rows = store.read(STUDY, profile=profile)
    n_calib = max(rows["n_calib"], default=0)
    claim = (
        "Every network in every executor: one integer record, equal logits. Two numbers in a cell are the requantizers "
        "float32 / fixed; time is CPU time, summed over threads; memory is what opening the file and running one image "
        "adds to a fresh process; differences of PyTorch are counted against NumPy with float32, those of float at W8A8"
    )
    counted = " and ".join(sorted({f"{n:,} test images" for n in rows["n_test"]})) or tables.NOT_RUN
    data_sets = ", ".join(sorted(set(rows["dataset"])))
    more = f"{n_calib} calibration images"
    return figures.caption(claim, profile=profile, n=counted, seeds=sorted(set(rows["seed"])), dataset=data_sets,
                            switches=more)  # fmt: skip


def layers(profile: str) -> pd.DataFrame:
    """The rows of fig_integer_agreement: model, bits, tensor, place, inputs, mismatch_pct, largest_LSB, n_test."""
    rows = store.read(LAYERS, profile=profile)
    settings = pd.DataFrame([json.loads(text) for text in rows["switches"]], index=rows.index)
    known = tables.with_bits(rows).join(settings)
    index = ["model", "bits", "inputs", "place", "tensor", "n_test"]
    wide = known.pivot_table(index=index, columns="metric", values="value").reset_index()
    order = {name: i for i, name in enumerate(MODELS)}
    return wide.sort_values(
        ["model", "bits", "inputs", "place"], key=lambda c: c.map(order) if c.name == "model" else c
    )


def findings(profile: str) -> list[str]:
    """The sentences that the rows of a profile support."""
    rows = _readable(store.read(STUDY, profile=profile))
    counted = rows.loc[rows["metric"] == "n_logit_mismatches"]
    total = int((10 * counted["n_test"]).sum())
    lines = [
        f"{counted['value'].sum():.0f} of {total:,} logits differ from NumPy's, over {len(counted)} pairs of executor "
        f"and network ({', '.join(sorted({NAMES[m] for m in counted['method']}))}; both requantizers; W8A8 and W4A4)"
    ]
    lines += _accuracy_lines(rows) + _speed_lines(rows)
    born = layers(profile).query('inputs == "the graph\'s"')
    worst = born.sort_values("mismatch_pct").iloc[-1]
    lines.append(
        f"fed with the graph's own integers, no tensor differs by more than {born['largest_LSB'].max():.0f} LSB; the "
        f"most mismatches are {worst['mismatch_pct']:.3f} % ({worst['model']} {worst['bits']}, {worst['tensor']})"
    )
    missing = sorted(set(rows.loc[rows["metric"] == "unavailable", "reason"]))
    return [*lines, *(f"not measured here: {reason}" for reason in missing)]


def _accuracy_lines(rows: pd.DataFrame) -> list[str]:
    """Per network: float, then fake-quantized and integer at each width."""
    kept = rows.loc[(rows["metric"] == "acc_pct") & (rows["requantizer"] != "fixed")]
    found = {(r["model"], r["w_bits"], r["method"]): r["value"] for r in kept.to_dict("records")}
    lines = []
    for model in [m for m in MODELS if (m, 32, "float") in found]:
        parts = [f"float {found[model, 32, 'float']:.2f} %"]
        for w_bits, a_bits in BITS:
            fake, exact = (found.get((model, w_bits, method)) for method in ("fake_quant", "numpy"))
            if fake is not None and exact is not None:
                parts.append(f"W{w_bits}A{a_bits} fake {fake:.2f}, integer {exact:.2f} ({exact - fake:+.2f})")
        lines.append(f"{labels.printed('model', model)}: {'; '.join(parts)}")
    return lines


def _speed_lines(rows: pd.DataFrame) -> list[str]:
    kept = rows.loc[(rows["metric"] == "cpu_ms") & (rows["requantizer"] != "fixed")]
    found = {(r["model"], r["w_bits"], r["method"]): r["value"] for r in kept.to_dict("records")}
    return [
        f"{labels.printed('model', model)} W8A8, ONNX Runtime's time over C's: {onnx / c:.2f}"
        for model in MODELS
        if (c := found.get((model, 8, "c"))) and (onnx := found.get((model, 8, "onnx")))
    ]


def switches() -> dict[str, str]:
    """The settings printed under the table."""
    return {
        "placement": "deploy", "BN": "folded", "image": "8 bit", "first and last layer": "8 bit",
        "W8A8": "min-max ranges", "W4A4": "MSE ranges and an 8 bit stem output", "rounding": "to nearest",
        "batch": "100, C: 1",
    }  # fmt: skip


def shown(rows: pd.DataFrame, metrics: Sequence[str] = ("acc_pct", "n_logit_mismatches")) -> pd.DataFrame:
    """The rows of some metrics as a notebook prints them."""
    columns = ["model", "w_bits", "a_bits", "method", "requantizer", "metric", "value", "unit", "n_test"]
    readable = _readable(rows)
    return readable.loc[readable["metric"].isin(metrics), columns]
