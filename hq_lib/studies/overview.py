"""The paper in one table: ResNet-20 from float to analog arrays, each step beside what it is compared with.

Notebook 10 shows it as tab_overview, the index of the pages to share repeats it, and ``python -m
hq_lib.studies.overview`` (``make readme``) writes it, and the times of the integers, between the markers
``<!-- rows: NAME -->`` and ``<!-- end -->`` of README.md and docs/. A test fails where they differ from the rows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hq_lib.results import atomic, labels, paths, published, store, tables
from hq_lib.studies.integer_export.executors import version

PROTOCOL = ["epochs", "iterations", "n_test"]
_GROUP_SOURCE = "louvinci/PACT-Quantization (later README)"
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
    """Columns and switches, and their values; None = the row has no such switch."""
    metric: str = "acc_pct"
    """The metric."""

    def rows(self, profile: str) -> pd.DataFrame:
        """Its rows; none where it is n/r.

        Raises:
            TableError: two rows of one seed, so ``where`` names more than one number.
            PublishedError: ``where`` names what nobody published.
        """
        if self.file == "published":
            return published.lookup(metric=self.metric, **self.where)
        found = store.read(self.file, profile=profile)
        found = tables.with_switches(found, *(name for name in self.where if name not in found))
        for name, value in {**self.where, "profile": profile, "metric": self.metric}.items():
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
        value, unit = found["value"], found["unit"].iloc[0]
        decimals = 0 if unit == "count" else 1 if "n_test" in found and found["n_test"].iloc[0] < 10_000 else 2
        spread = f" ± {value.std(ddof=1):.{decimals}f}" if len(value) > 1 else ""
        return f"{value.mean():.{decimals}f}{spread}{'' if unit in ('%', 'count') else f' {unit}'}"


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
    return {"model": "resnet20", "w_bits": w, "a_bits": a, **more}


def _trained(w: int, a: int) -> Number:
    return Number("", "qat", _bits(w, a, method="pact", split=None, lists=None, distill=None))


def _official_qdrop(w: int, a: int) -> Number:
    variant = "500 iterations a block, drop 0.5, rounding rate 1e-2"
    where = _bits(w, a, table="official_ptq", method="qdrop", variant=variant)
    return Number("official code, 500 iterations", "published", where)


def _qdrop(w: int, a: int) -> Number:
    return Number("", "ptq_methods", _bits(w, a, recipe="qdrop", net="public"))


def _pact(w: int, a: int) -> Number:
    where = _bits(w, a, table="resnet20_cifar10", method="pact", variant="first and last layer 8 bit")
    return Number("published, the same first and last layer", "published", where)


def _search(words: str, search: str) -> Number:
    chosen = {"model": "resnet20", "search": search, "budget": "size", "equivalent": 3.0, "split": "test"}
    return Number(words, "bit_allocation", chosen)


def _array(words: str, correction: str, effect: str = "rram, column scale") -> Number:
    return Number(words, "crossbar", _bits(8, 8, correction=correction, effect=effect, network=None))


def _sent(words: str, cut: str, bits: int, metric: str = "acc_pct", **switches: Any) -> Number:
    chosen = {"model": "resnet20", "cut": cut, "wire_bits": bits, "network": None, **switches}
    return Number(words, "edge_cloud", chosen, metric)


def _integers(words: str, method: str, metric: str = "acc_pct") -> Number:
    form = {"requantizer": "float32" if method == "c" else None, "version": version(method, 8), "network": None}
    return Number(words, "integer_export", _bits(8, 8, method=method, **form), metric)


_FLOAT = Number("float", "float_reference", {"model": "resnet20", "method": "float"})
_GROUP = Number("the group's", "published", _bits(32, 32, table="seed001", source=_GROUP_SOURCE))
_PUBLIC = Number("float", "ptq_methods", _bits(32, 32, net="public"))
_EXACT = _array("exact", "none", "no error")
_WIRE = {"edge": "integer", "grid": "channel"}
_MISMATCHES = _integers("logits unlike NumPy's", "c", "n_logit_mismatches")

LINES = (
    Line("Float", "01", _FLOAT, (_GROUP,)),
    Line("W4A4, trained through PACT's quantizers", "03", _trained(4, 4), (_FLOAT, _pact(4, 4))),
    Line("W2A2, the same", "03", _trained(2, 2), (_FLOAT, _pact(2, 2))),
    Line("W4A4, QDrop without training, public network", "04", _qdrop(4, 4), (_PUBLIC, _official_qdrop(4, 4))),
    Line("W2A2, the same", "04", _qdrop(2, 2), (_PUBLIC, _official_qdrop(2, 2))),
    Line("3 bits a weight, by sensitivity", "06", _search("", "optimal"), (_search("3 bits everywhere", "uniform"),)),
    Line("W8A8 in integers, in C", "07", _integers("", "c"), (_integers("fake-quantized", "fake_quant"), _MISMATCHES)),
    Line("W8A8 on simulated RRAM, columns calibrated", "08", _array("", "column"),
         (_array("uncorrected", "none"), _EXACT)),
    Line("Cut after stage 2, two bits a number sent", "09", _sent("", "layer2.2", 2, **_WIRE),
         (_sent("sends", "layer2.2", 2, "deflate_KiB", **_WIRE), _sent("the image itself", "image", 8),
          _sent("sends", "image", 8, "deflate_KiB"))),
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


def speed(profile: str) -> pd.DataFrame:
    """C's time an image and how many times as long its peers take, from the rows of ``benchmarks/integer.py``."""
    found = store.read("integer_speed", profile=profile)
    found = tables.with_bits(tables.with_switches(found, "batch"))
    cell = ["model", "bits", "batch"]
    ratios = found.loc[found["metric"] == "over_c"].set_index(["method", *cell])["value"]
    times = found.loc[(found["metric"] == "time_ms") & found["method"].str.startswith("C ")]
    lines = []
    for model, bits, batch, time in times[[*cell, "value"]].itertuples(index=False):
        peers = [ratios.get((peer, model, bits, batch)) for peer in PEERS]
        shown = [tables.NOT_RUN if ratio is None else f"{ratio:.2f}" for ratio in peers]
        lines.append((labels.printed("model", model), bits, str(batch), f"{time:.3g}", *shown))
    return pd.DataFrame(lines, columns=["network", "bits", "batch", "C, ms an image", *PEERS.values()])


def written(text: str) -> str:
    """A document with each block between markers as the committed rows have it.

    Raises:
        KeyError: a marker names no table.
    """
    makers = {"tab_overview": lambda: table("full")[0], "integer_speed": lambda: speed("full")}
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
