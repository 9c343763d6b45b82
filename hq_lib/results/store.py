"""The memory of the workbook: tidy CSV files of measured numbers, one file per study, written whole or not at all.

``append`` adds or replaces rows under a lock shared by all processes, so that a killed run resumes from ``read``.
The columns are those of ``rows.Row``.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from hq_lib.results import atomic, paths, provenance
from hq_lib.results import rows as schema
from hq_lib.results.rows import RowError

LOCK_TIMEOUT_S = 120.0


class ResultsError(RuntimeError):
    """A results file that cannot be read or written; the message names file, line and mend."""


def path_of(name: str, *, profile: str) -> Path:
    """The CSV file of a study: ``results_dir(profile) / <name>.csv``."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ResultsError(f"results name {name!r}: use lower-case letters, digits and _, without .csv")
    return paths.results_dir(profile) / f"{name}.csv"


def append(name: str, rows: Iterable[Mapping[str, Any]], *, profile: str, folder: Path | None = None) -> int:
    """Number of rows in the file afterwards; rows whose key is already there replace the old ones.

    Two processes may append to one file at once: they wait for each other and nothing is lost. Provenance columns that
    a row leaves empty are filled in (CPU; use ``provenance.stamp("cuda")`` for another device).

    Args:
        name: study, e.g. ``"qat"``.
        rows: dicts of the columns of ``rows.Row``; ``switches`` may be a dict.
        profile: profile of the run, which chooses the folder; a row that states another one is refused.
        folder: another folder for the file, where no two processes may write one: ``<folder>/<name>.csv``.

    Raises:
        RowError: a row is malformed, or two rows of this call share a key.
        ResultsError: the file is damaged, locked for two minutes, or cannot be written; it is left as it was.
    """
    fresh = _by_key(_completed(row, profile) for row in rows)
    path = path_of(name, profile=profile)
    path = path if folder is None else folder / path.name
    with _locked(path):
        known = _load(path)
        _check_units([*known.values(), *fresh.values()], path)
        known.update(fresh)
        atomic.write_text(path, schema.to_csv(known.values()))
    return len(known)


def read(name: str, *, profile: str) -> pd.DataFrame:
    """All rows of the study, sorted by key, with the types of ``rows.DTYPES``; no rows where nothing was run yet.

    ``profile="full"`` reads the reference folder: the ``profile`` column of each row says how it was made.
    """
    return schema.frame(_load(path_of(name, profile=profile)).values())


def read_file(path: Path) -> pd.DataFrame:
    """All rows of one file, wherever it lies; none where it is absent. ``ResultsError`` names a damaged line."""
    return schema.frame(_load(path).values())


def _completed(row: Mapping[str, Any], profile: str) -> dict[str, Any]:
    stated = row.get("profile") or profile
    if stated != profile:
        raise RowError(f"a row of profile {stated!r} cannot go to profile {profile!r}: results never mix them")
    filled = {c: row.get(c) or default for c, default in provenance.stamp().items()}
    return schema.clean({**row, **filled, "profile": profile})


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if schema.key(row) in found:
            shown = {c: row[c] for c in schema.KEY}
            raise RowError(f"two rows share the key {shown}: tell them apart by seed, or by a key in switches")
        found[schema.key(row)] = row
    return found


def _check_units(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    units: dict[str, str] = {}
    for row in rows:
        if units.setdefault(row["metric"], row["unit"]) != row["unit"]:
            both = f"{units[row['metric']]!r} and {row['unit']!r}"
            raise RowError(f"{path.name}: metric {row['metric']!r} in two units, {both}; convert one or rename it")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=LOCK_TIMEOUT_S):
            atomic.sweep(path)
            yield
    except filelock.Timeout:
        raise ResultsError(f"{path} stayed locked for {LOCK_TIMEOUT_S:g} s: wait for the other run to end") from None
    except OSError as error:
        mend = "free or unlock the folder, or point HQ_OUT to a writable one; the file is as it was"
        raise ResultsError(f"cannot write {path} ({error.strerror or error}): {mend}") from error


def _load(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of the file by key; an absent file holds none. ``ResultsError`` names the first bad line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as spreadsheets write it
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise _damaged(path, error.object[: error.start].count(b"\n") + 1, "it is not UTF-8 text") from None
    n_lines = text.count("\n") + 1
    if not text.endswith("\n"):
        raise _damaged(path, n_lines, "the file ends in the middle of this line")
    reader = csv.reader(text.split("\n")[:-1], strict=True)
    try:
        if tuple(next(reader)) != schema.COLUMNS:
            raise RowError("the header is another one")
        return _by_key(map(schema.from_cells, reader))
    except (ValueError, csv.Error) as error:
        raise _damaged(path, reader.line_num, str(error)) from None


def _damaged(path: Path, line: int, reason: str) -> ResultsError:
    row = "delete that line (a run then redoes that row)"
    head = f"these columns alone, here and in every row: {','.join(schema.COLUMNS)}; delete the file if it has no row"
    mend = f"{head if line == 1 else row}; or `git checkout -- {path.name}` in its folder"
    return ResultsError(f"{path}, line {line}: {reason}. Mend: {mend}")
