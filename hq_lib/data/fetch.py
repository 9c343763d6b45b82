"""Bring a data set's raw arrays to this machine: cache, then each source in turn; never unverified.

A data set is a few uint8 arrays. They are cached as ``.npy`` files in ``cache_dir()/<name>/``, written into a temporary
folder first and renamed when complete, and their SHA-256 sums are checked at a process's first load and again whenever
the files are others by inode, size or time, whatever the source was.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from hq_lib.results import paths

Arrays = dict[str, np.ndarray]
SUMS = "sha256.json"
SETTLED_NS = 2 * 10**9
"""Files younger than this are checked at every load: they could change again within one tick of their clock."""
_checked: dict[Path, object] = {}


class DataUnavailableError(RuntimeError):
    """No source could deliver a data set; the message lists what was tried and what to do."""


@dataclass(frozen=True)
class DataSet:
    """The raw arrays of one data set and where they can come from."""

    name: str
    """Identifier and folder name in the cache."""
    sha256: Mapping[str, str | None]
    """Array name -> SHA-256 of its raw bytes; None where only the archive's own sum is published."""
    sources: tuple[tuple[str, Callable[[Path], Arrays]], ...]
    """(description, function of a scratch folder that returns the arrays), tried in this order."""


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def obtain(data_set: DataSet) -> Arrays:
    """The verified arrays: from the cache, else from the first source that delivers the right bytes.

    Raises:
        DataUnavailableError: nothing delivered them; lists every attempt with its reason.
        OSError: the cache folder cannot be written; names it and ``HQ_DATA``.
    """
    folder = paths.cache_dir() / data_set.name
    arrays, reason = _read_cache(folder, data_set)
    if arrays is not None:
        return arrays
    tried = [f"cache {folder}: {reason}"]
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    with FileLock(f"{folder}.lock"):
        arrays, _ = _read_cache(folder, data_set)  # another process may have filled it meanwhile
        if arrays is not None:
            return arrays
        for description, source in data_set.sources:
            print(f"{data_set.name}: fetching from {description} ...", flush=True)
            try:
                return _fetch(folder, data_set, source)
            except _Full:
                raise
            except Exception as error:  # a source may fail in any way; the next one is tried, all are reported
                tried.append(f"{description}: {type(error).__name__}: {_first_line(error)}")
    raise DataUnavailableError(
        f"data set {data_set.name!r} is not available. Tried:\n  - "
        + "\n  - ".join(tried)
        + f"\nTo mend it: connect to the network once, or copy a filled cache folder to {folder} "
        + "(or set HQ_DATA to a folder that has cache/)."
    )


class _Full(OSError):
    """The cache folder cannot take the data set: no other source would change that."""


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn the error of an unwritable or full cache folder into one that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        text = f"cannot write the data cache {cache} ({error.strerror}): free space there or set HQ_DATA"
        raise _Full(error.errno, text) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _fetch(folder: Path, data_set: DataSet, source: Callable[[Path], Arrays]) -> Arrays:
    scratch = folder.parent / f".{data_set.name}.download"  # kept between tries, so that a download can resume
    scratch.mkdir(parents=True, exist_ok=True)
    arrays = source(scratch)
    sums = {key: sha256_of(array) for key, array in arrays.items()}
    _check_sums(sums, data_set.sha256)
    with _writing(folder.parent):
        _store(folder, arrays, sums)
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"{data_set.name}: verified and cached in {folder}", flush=True)
    return arrays


def _check_sums(sums: Mapping[str, str], wanted: Mapping[str, str | None]) -> None:
    for key, want in wanted.items():
        if key not in sums:
            raise ValueError(f"array {key} is missing")
        if want is not None and sums[key] != want:
            raise ValueError(f"wrong SHA-256 of {key}: {sums[key][:12]}..., expected {want[:12]}...")


def _store(folder: Path, arrays: Arrays, sums: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        fresh = Path(place) / folder.name
        fresh.mkdir()
        for key, array in arrays.items():
            np.save(fresh / f"{key}.npy", np.ascontiguousarray(array))
        (fresh / SUMS).write_text(json.dumps(sums, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)


def _read_cache(folder: Path, data_set: DataSet) -> tuple[Arrays | None, str]:
    if not folder.is_dir():
        return None, "empty"
    try:
        recorded = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        # copy-on-write maps: pages are shared with the file cache, and nothing can write to the file by accident
        arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False) for key in data_set.sha256}
        files = [file.stat() for file in sorted(folder.iterdir())]
        seen = (data_set.sha256, recorded, [(file.st_ino, file.st_size, file.st_mtime_ns) for file in files])
        if _checked.get(folder) != seen:
            sums = {key: sha256_of(array) for key, array in arrays.items()}
            for wanted in (data_set.sha256, {key: recorded[key] for key in sums}):
                _check_sums(sums, wanted)
            if time.time_ns() - max(file.st_mtime_ns for file in files) > SETTLED_NS:
                _checked[folder] = seen
    except Exception as error:  # damaged bytes come out of numpy's reader as a dozen types
        reason = f"corrupt ({_first_line(error)})"
        print(f"{data_set.name}: cache {folder} is {reason}; fetching again", flush=True)
        return None, reason
    return {key: np.asarray(array) for key, array in arrays.items()}, ""
