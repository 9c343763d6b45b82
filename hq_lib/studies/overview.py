"""The paper in one table: ResNet-20 from float to analog arrays, each step beside what it is compared with.

Notebook 10 shows it as tab_overview, the index of the pages to share repeats it, and ``python -m
hq_lib.studies.overview`` (``make readme``) writes it, and the times of the integers, between the markers
``<!-- rows: NAME -->`` and ``<!-- end -->`` of README.md and docs/. A test fails where they differ from the rows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from hq_lib.results import atomic, labels, paths, published, store, tables
from hq_lib.studies.integer_export.executors import version
from hq_lib.studies.study import profile_rows

PROTOCOL = ["epochs", "iterations", "n_test"]
_GROUP_SOURCE = "louvinci/PACT-Quantization (README of 2022-04-19)"
PEERS = {
    "onnxruntime": "ONNX Runtime, C's logits",
    "onnxruntime as it comes": "ONNX Runtime as it comes",
    "OpenVINO": "OpenVINO",
}
DOCUMENTS = ("README.md", "docs/speed.md")


@dataclass(frozen=True)
class Number:
    """Rows that are one number, mean ± sd over their seeds; of several protocols the longest."""

    words: str
    """What it is called where it is compared with."""
    file: str
    """Results file; "published" = data/published.csv."""
    where: Mapping[str, Any]
    """Columns and switches of ResNet-20's rows, and their values; None = the row has no such switch."""
    metric: str = "acc_pct"
    """The metric."""

    def rows(self, profile: str) -> pd.DataFrame:
        """Its rows; none where it is n/r.

        Raises:
            TableError: two rows of one seed, so ``where`` names more than one number.
            PublishedError: ``where`` names what nobody published.
        """
        where = {"model": "resnet20", "metric": self.metric, **self.where}
        if self.file == "published":
            return published.lookup(**where)
        found = tables.with_switches(profile_rows(self.file, profile), *where)
        for name, value in where.items():
            found = found.loc[found[name].isna() if value is None else found[name] == value]
        if len(found):
            longest = found[PROTOCOL].apply(tuple, axis=1)
            found = found.loc[longest == longest.max()]
            if found["seed"].duplicated().any():
                raise tables.TableError(f"{self.file}: {dict(self.where)} are several numbers: name more columns")
        return found

    def text(self, profile: str) -> str:
        """``91.01 ± 0.09``, ``1.52 KiB`` or n/r; one decimal where less than 10,000 images were tested."""
        found = self.rows(profile)
        if found.empty:
            return tables.NOT_RUN
        value, unit = pd.Series(found["value"]), found["unit"].iloc[0]
        decimals = 0 if unit == "count" else 1 if "n_test" in found and found["n_test"].iloc[0] < 10_000 else 2
        return tables.mean_sd(value, decimals) + ("" if unit in ("%", "count") else f" {unit}")


@dataclass(frozen=True)
class Line:
    """One step of the way."""

    step: str
    """What was done."""
    notebook: str
    """The notebook that argues it."""
    ours: Number
    """The number."""
    beside: tuple[Number, ...]
    """What it is compared with."""


def _bits(w: int, a: int, **more: Any) -> dict[str, Any]:
    return {"w_bits": w, "a_bits": a, **more}


def _array(words: str, correction: str, effect: str = "rram, column scale") -> Number:
    return Number(words, "crossbar", _bits(8, 8, correction=correction, effect=effect, network=None))


def _sent(words: str, metric: str = "acc_pct", **wire: Any) -> Number:
    return Number(words, "edge_cloud", {"network": None, **wire}, metric)


def _integers(words: str, method: str, metric: str = "acc_pct") -> Number:
    form = {"requantizer": "float32" if method == "c" else None, "version": version(method, 8), "network": None}
    return Number(words, "integer_export", _bits(8, 8, method=method, **form), metric)


def _both(step: str, notebook: str, ours: Number, whole: Number, theirs: Number) -> list[Line]:
    """A step at four and at two bits, beside the float network and what is published of each width."""
    lines = []
    for bits, words in ((4, f"W4A4, {step}"), (2, "W2A2, the same")):
        mine, known = (replace(number, where=_bits(bits, bits, **number.where)) for number in (ours, theirs))
        lines.append(Line(words, notebook, mine, (whole, known)))
    return lines


_FLOAT = Number("float", "float_reference", {"method": "float"})
_GROUP = Number("the group's", "published", _bits(32, 32, table="seed001", source=_GROUP_SOURCE))
_PUBLIC = Number("float", "ptq_methods", _bits(32, 32, net="public"))
_SEARCHED = {"budget": "size", "equivalent": 3.0, "split": "test"}
_STAGE_2 = {"cut": "layer2.2", "wire_bits": 2, "edge": "integer", "grid": "channel"}
_IMAGE = {"cut": "image", "wire_bits": 8}
_TRAINED = {"method": "pact", "split": None, "lists": None, "distill": None}
_PACT = {"table": "resnet20_cifar10", "method": "pact", "variant": "first and last layer 8 bit"}
_QDROP = {"variant": "500 iterations a block, drop 0.5, rounding rate 1e-2", "table": "official_ptq", "method": "qdrop"}

LINES = (
    Line("Float", "01", _FLOAT, (_GROUP,)),
    *_both("trained through PACT's quantizers", "03", Number("", "qat", _TRAINED), _FLOAT,
           Number("published, the same first and last layer", "published", _PACT)),
    *_both("QDrop without training, public network", "04",
           Number("", "ptq_methods", {"recipe": "qdrop", "net": "public"}), _PUBLIC,
           Number("official code, another schedule", "published", _QDROP)),
    Line("3 bits a weight, by sensitivity", "06", Number("", "bit_allocation", {"search": "optimal", **_SEARCHED}),
         (Number("3 bits everywhere", "bit_allocation", {"search": "uniform", **_SEARCHED}),)),
    Line("W8A8 in integers, in C", "07", _integers("", "c"),
         (_integers("fake-quantized", "fake_quant"), _integers("logits unlike NumPy's", "c", "n_logit_mismatches"))),
    Line("W8A8 on simulated RRAM, columns calibrated", "08", _array("", "column"),
         (_array("uncorrected", "none"), _array("exact", "none", "no error"))),
    Line("Cut after stage 2, two bits a number sent", "09", _sent("", **_STAGE_2),
         (_sent("sends", "deflate_KiB", **_STAGE_2), _sent("the image itself", **_IMAGE),
          _sent("sends", "deflate_KiB", **_IMAGE))),
)  # fmt: skip


def table(profile: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """tab_overview, one line a step, and the rows behind its own numbers."""
    lines, behind = [], []
    for line in LINES:
        mine = line.ours.rows(profile)
        behind.append(mine)
        beside = "; ".join(f"{number.words} {number.text(profile)}" for number in line.beside)
        counts = (str(len(mine)), f"{mine['n_test'].iloc[0]:,}") if len(mine) else (tables.NOT_RUN, tables.NOT_RUN)
        lines.append((line.step, line.ours.text(profile), *counts, beside, line.notebook))
    columns = ["ResNet-20, CIFAR-10", "test accuracy, %", "n", "images", "beside it", "notebook"]
    return pd.DataFrame(lines, columns=columns), pd.concat(behind, ignore_index=True)


def speed(profile: str, kernel: str) -> pd.DataFrame:
    """C's time an image and how many times as long its peers take, from the rows of ``benchmarks/integer.py``.

    ``kernel`` chose the processor: "avx2" (also rows that name none) or "avx512vnni", where ONNX Runtime gives C's
    logits as it comes.
    """
    found = store.read("integer_speed", profile=profile)
    found = tables.with_bits(tables.with_switches(found, "threads", "batch", "kernel"))
    found = found.loc[found["kernel"].fillna("avx2") == kernel]
    cell = ["threads", "model", "bits", "batch"]
    ratios = found.loc[found["metric"] == "over_c"].set_index(["method", *cell])["value"]
    times = found.loc[(found["metric"] == "time_ms") & found["method"].str.startswith("C ")]
    peers = {key: name for key, name in PEERS.items() if key in set(found["method"])}
    lines = []
    for threads, model, bits, batch, time in times[[*cell, "value"]].itertuples(index=False):
        found_here = [ratios.get((peer, threads, model, bits, batch)) for peer in peers]
        shown = [tables.NOT_RUN if ratio is None else f"{ratio:.2f}" for ratio in found_here]
        lines.append((str(threads), labels.printed("model", model), bits, str(batch), f"{time:.3g}", *shown))
    table = pd.DataFrame(lines, columns=["threads", "network", "bits", "batch", "C, ms an image", *peers.values()])
    return table.sort_values("threads", kind="stable")


def written(text: str) -> str:
    """A document with each block between markers as the committed rows have it.

    Raises:
        KeyError: a marker names no table.
    """
    makers = {
        "tab_overview": lambda: table("full")[0],
        "integer_speed_avx2": lambda: speed("full", "avx2"),
        "integer_speed_vnni": lambda: speed("full", "avx512vnni"),
    }
    return re.sub(
        r"(<!-- rows: (\w+) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{tables.markdown(makers[m[2]]())}{m[3]}",
        text,
        flags=re.S,
    )


def main() -> None:
    """Writes the documents; see the module docstring."""
    for name in DOCUMENTS:
        file = paths.ROOT / name
        atomic.write_text(file, written(file.read_text(encoding="utf-8")))
        print(file)


if __name__ == "__main__":
    main()
