"""Numbers that others have published, from ``data/published.csv``: one row each, with source and how it is known.

Tags say how far to trust a row: R read in a README, log or issue; C read in source code; M quoted from memory of the
paper, not looked up again; N computed here from a formula; V measured by this project with the named code. ``variant``
holds the switch that makes a number incomparable with its neighbours (first/last bits, calibration set, iterations).
A cell printed "p\\q" in its source, without saying which setting is which, is two rows whose note says so.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from hq_lib.results import paths
from hq_lib.results.hints import check
from hq_lib.results.rows import UNITS

COLUMNS = (
    "table", "model", "dataset", "method", "variant", "w_bits", "a_bits", "metric", "value", "unit", "source", "tag",
    "note",
)  # fmt: skip
NUMBERS = ("w_bits", "a_bits", "value")
KEY = ("table", "model", "dataset", "method", "variant", "w_bits", "a_bits", "metric", "source")
TAGS = ("M", "R", "C", "N", "V")
FILE = paths.ROOT / "data" / "published.csv"


class PublishedError(ValueError):
    """The file or the question about it is wrong; the message names line or word, and the mend."""


def load(path: Path = FILE) -> pd.DataFrame:
    """All published numbers in the order of the file; text columns never empty (``-`` = nothing to say), no duplicates.

    Raises:
        PublishedError: a row is incomplete, repeated, in an unknown unit or tag, or out of range; its line is named.
    """
    return _load(path).copy()


@cache
def _load(path: Path) -> pd.DataFrame:
    types: Any = {c: "float64" if c in NUMBERS else "str" for c in COLUMNS}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, encoding="utf-8")
    except FileNotFoundError:
        raise PublishedError(f"{path} is missing: restore it with `git checkout -- data/published.csv`") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise PublishedError(f"{path} cannot be read ({error}): mend or restore that line") from error
    if tuple(table.columns) != COLUMNS:
        raise PublishedError(f"{path}: the columns must be {','.join(COLUMNS)}")
    for problem, bad in _problems(table).items():
        if bad.any():
            raise PublishedError(f"{path}, line {int(bad.to_numpy().argmax()) + 2}: {problem}")
    return table


def _problems(table: pd.DataFrame) -> dict[str, Any]:
    """For each rule, which rows break it."""
    text = table[[c for c in COLUMNS if c not in NUMBERS]]
    percent = table["unit"] == "%"
    return {
        "a cell is empty (write -)": (text == "").any(axis=1),
        "a number needs a source": table["source"] == "-",
        f"the tag must be one of {', '.join(TAGS)}": ~table["tag"].isin(TAGS),
        f"the unit must be one of {', '.join(UNITS)}": ~table["unit"].isin(list(UNITS)),
        "bits lie in (0, 32]": ~(table["w_bits"].between(0.1, 32) & table["a_bits"].between(0.1, 32)),
        "a percentage lies in [0, 100]": percent & ~table["value"].between(0, 100),
        "the number is there already": table.duplicated(list(KEY)),
    }


def lookup(**wanted: Any) -> pd.DataFrame:
    """The published rows that agree with every given column; a list means any of its values.

    ``lookup(model="resnet20", method=["pact", "lsq"], w_bits=4, a_bits=4)``. A combination nobody published is an
    empty frame; a word that occurs nowhere in its column is an error, because it is misspelt.

    Raises:
        PublishedError: an unknown column, or a text that no row has; the nearest valid one is named.
    """
    table = load()
    for column, value in wanted.items():
        check("published numbers", "column", [column], COLUMNS, error=PublishedError)
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if column not in NUMBERS:
            check("published numbers", column, values, _load(FILE)[column].unique(), error=PublishedError)
        table = table.loc[table[column].isin(values)]
    return table.reset_index(drop=True)
