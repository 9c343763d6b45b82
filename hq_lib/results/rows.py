"""One measured number as a row: its columns, what each may hold, and its exact text in a CSV.

A row is *key* (what was measured, and by which protocol) + *value and unit* + *provenance* (who computed it, how long).
Two rows with one key are the same measurement: the later replaces the earlier. There are no empty cells; what does not
apply is written as ``-``, 0 or 32 bits, and what was not run is no row at all (tables print it as ``n/r``).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from hq_lib.results import paths
from hq_lib.results.hints import nearest

# Unit → what it counts. A metric whose name ends in one of SUFFIX_UNITS' keys, begins with n_ (a count) or is one of
# METRIC_UNITS' has that unit and no other.
UNITS = {
    "%": "percent", "pp": "percentage points", "1": "a pure number", "nat": "natural-log entropy or loss",
    "bit": "bits", "LSB": "integer steps", "count": "how many", "epoch": "epochs", "iteration": "optimizer steps",
    "s": "seconds", "ms": "milliseconds", "us": "microseconds", "1/s": "per second",
    "B": "bytes", "kB": "1000 bytes", "KiB": "1024 bytes", "MiB": "1024 KiB",
    "MAC": "multiply-accumulates", "BOP": "bit operations", "uS": "microsiemens", "uA": "microamperes",
    "V": "volts", "pJ": "picojoules", "nJ": "nanojoules", "uJ": "microjoules",
    "x": "ratio to a reference in the same run",
}  # fmt: skip
SUFFIX_UNITS = {
    "_pct": "%", "_pp": "pp", "_per_s": "1/s", "_s": "s", "_ms": "ms", "_us": "us", "_kB": "kB", "_KiB": "KiB",
    "_MiB": "MiB", "_LSB": "LSB", "_uS": "uS", "_pJ": "pJ", "_nJ": "nJ", "_uJ": "uJ",
}  # fmt: skip
METRIC_UNITS = {
    **dict.fromkeys(("loss", "train_loss", "loss_rise", "kl", "predicted_kl", "set_entropy"), "nat"),
    **dict.fromkeys(("alpha", "lr", "r2", "slope", "max_abs_w", "loss_own", "loss_common", "logit_error"), "1"),
    **dict.fromkeys(("rel_error", "relative_error", "rel_error_float32", "rel_error_float64"), "1"),
    **dict.fromkeys(("mse_measured", "mse_model", "mse_exact"), "1"),
    "bops": "BOP", "unavailable": "count",
}  # fmt: skip


class RowError(ValueError):
    """A row that cannot be a result; the message names the column and the mend."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The columns, in the order of the file. A default means "does not apply"; ``append`` fills in the empty ones."""

    experiment: str
    """Id of the study or output that asked for it, e.g. ``tab_resnet20_methods``."""
    model: str
    """Network, as in ``models.names()``."""
    dataset: str
    """Data set the value was measured on; the split is ``test`` unless ``switches`` says otherwise."""
    method: str
    """Quantization method, a key of ``plotting.METHOD_COLORS`` where it is drawn; ``float`` = none."""
    w_bits: float = 32
    """Bits of the weights, (0, 32]; averages of mixed policies may be fractions; 32 = float."""
    a_bits: float = 32
    """Bits of the activations, likewise."""
    placement: str = "-"
    """Where activation quantizers sit: ``deploy``, ``academic`` or ``-``."""
    n_calib: int = 0
    """Calibration images used; 0 = none."""
    seed: int = -1
    """Seed of the run or draw; -1 = deterministic, there is nothing to draw."""
    metric: str
    """What ``value`` is, e.g. ``acc_pct``."""
    value: float
    """The number, finite. A run that diverged is metric ``diverged``, value 1."""
    unit: str
    """A key of ``UNITS``; left out where the metric's name says it, see ``unit_of``."""
    profile: str = ""
    """``smoke``, ``quick`` or ``full``."""
    epochs: int = 0
    """Training epochs behind the number; 0 = no training."""
    iterations: int = 0
    """Reconstruction (or other optimizer) iterations per block; 0 = none."""
    n_train: int = 0
    """Training images seen per epoch; 0 = none."""
    n_test: int = 0
    """Images the value was measured on; 0 = measured on no image."""
    git_sha: str = ""
    """Commit of the code, ``-dirty`` if changed."""
    versions: str = ""
    """Interpreter and package versions."""
    device: str = ""
    """CPU model and threads, or GPU."""
    seconds: float = 0.0
    """Wall-clock time of the run behind the number, s; 0 = not timed."""
    switches: str = "{}"
    """Everything else that changes the number (first/last bits, drop probability, engine ...) as canonical JSON."""


TYPES: dict[str, Any] = {f.name: f.type for f in fields(Row)}
COLUMNS = tuple(TYPES)
KEY = tuple(c for c in COLUMNS if c not in ("value", "unit", "git_sha", "versions", "device", "seconds"))
BITS = ("w_bits", "a_bits")
DTYPES = {c: {float: "float64", int: "int64", str: "str"}[kind] for c, kind in TYPES.items()}
REQUIRED = tuple(f.name for f in fields(Row) if f.default is MISSING)
_DEFAULTS = {f.name: f.default for f in fields(Row) if f.name not in REQUIRED}


def check_columns(names: Iterable[str]) -> None:
    """Nothing, or ``RowError`` for the first name that is no column, with the nearest one that is."""
    for name in names:
        if name not in COLUMNS:
            known = f"the columns are {', '.join(COLUMNS)}, any other setting belongs into switches"
            raise RowError(f"unknown column {name!r}: {known}{nearest(name, COLUMNS)}")


def unit_of(metric: str) -> str | None:
    """The unit that a metric's name says, by its ending or as one of ``METRIC_UNITS``; None where it says none."""
    ending = next((unit for suffix, unit in SUFFIX_UNITS.items() if metric.endswith(suffix)), None)
    return ending or ("count" if metric.startswith("n_") else METRIC_UNITS.get(metric))


def clean(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a plain dict in column order, defaults filled in, every cell of its column's exact type.

    Raises:
        RowError: an unknown or missing column, a value of the wrong type or range, a metric in another unit.
    """
    given = dict(row)
    check_columns(given)
    if unit := unit_of(str(given.get("metric"))):
        given.setdefault("unit", unit)
    missing = [c for c in REQUIRED if c not in given]
    if missing:
        raise RowError(f"the row has no {', '.join(missing)}: give every row {', '.join(REQUIRED)}")
    given = {**_DEFAULTS, **given}
    tidy = {c: clean_cell(c, given[c]) for c in COLUMNS}
    if unit not in (None, tidy["unit"]):
        raise RowError(f"metric {tidy['metric']!r} has unit {tidy['unit']!r}: its name promises {unit!r}")
    if tidy["metric"] == "acc_pct" and not 0 <= tidy["value"] <= 100:
        raise RowError(f"acc_pct is {tidy['value']!r}: an accuracy in percent lies in [0, 100]")
    return tidy


def clean_cell(column: str, value: Any) -> Any:
    """``value`` as the type that the column holds, else ``RowError`` naming the column."""
    if column == "switches":
        return _canonical_switches(value)
    if TYPES[column] is str:
        return _text(column, value)
    number = _number(value)
    if TYPES[column] is int:
        low = -1 if column == "seed" else 0
        if not number.is_integer() or not low <= number < 2**63:
            raise RowError(f"{column} is {value!r:.80}: it must be a whole number of at least {low} in 64 bits")
        return int(value)
    if not math.isfinite(number):
        raise RowError(f"{column} is {value!r}: it must be finite (a diverged run is metric 'diverged', value 1)")
    if column in BITS and not 0 < number <= 32:
        raise RowError(f"{column} is {value!r}: bits lie in (0, 32], 32 meaning float")
    if column == "seconds" and number < 0:
        raise RowError(f"seconds is {value!r}: a time cannot be negative")
    return number


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str) or value.strip() != value or value == "" or not value.isprintable():
        raise RowError(f"{column} is {value!r}: it must be one line of text (write - where it does not apply)")
    if column == "profile":
        paths.check_profile(value)
    if column == "unit" and value not in UNITS:
        raise RowError(f"unknown unit {value!r}: choose one of {', '.join(UNITS)}, or add it to rows.UNITS")
    return value


def _number(value: Any) -> float:
    """``value`` as a float, NaN where it is no number."""
    try:
        return math.nan if isinstance(value, (bool, np.bool_, str)) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _canonical_switches(value: Any) -> str:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        if not isinstance(parsed, Mapping):
            raise TypeError("not an object")
        return json.dumps(dict(parsed), sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        example = '{"first_last_bits": 8}'
        raise RowError(f"switches is {value!r:.200}: it must be a JSON object such as {example} ({error})") from None


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies the measurement: every column but value, unit and provenance."""
    return tuple(row[c] for c in KEY)


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows as a DataFrame with fixed column order and types, sorted by key; also when there are none."""
    ordered = sorted(rows, key=key)
    return pd.DataFrame({c: pd.Series([r[c] for r in ordered], dtype=DTYPES[c]) for c in COLUMNS})


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as CSV text: sorted by key, floats in their shortest exact form, the same rows always the same bytes."""
    table = frame(rows)
    whole = {c: [int(bits) if bits.is_integer() else bits for bits in table[c]] for c in BITS}
    table = table.assign(**{c: pd.Series(bits, dtype="object") for c, bits in whole.items()})
    return table.to_csv(index=False, lineterminator="\n")


def from_cells(cells: list[str]) -> dict[str, Any]:
    """One CSV line, already split, as a clean row; ``RowError`` where it is none."""
    if len(cells) != len(COLUMNS):
        raise RowError(f"it has {len(cells)} cells instead of {len(COLUMNS)}")
    return clean({c: _parsed(c, cell) for c, cell in zip(COLUMNS, cells, strict=True)})


def _parsed(column: str, cell: str) -> Any:
    try:
        return TYPES[column](cell)
    except ValueError:
        raise RowError(f"{column} is {cell!r}: it must be a number") from None
