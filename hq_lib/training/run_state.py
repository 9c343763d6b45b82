"""A run's folder: ``state.pt`` (resume from here), ``log.jsonl`` (one line an epoch), ``config.json``.

Everything is written to a temporary file and renamed, so that a kill at any moment leaves the last complete epoch.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import filelock
import torch

from hq_lib.models.public import unpickled
from hq_lib.results import atomic
from hq_lib.training.config import TrainConfig

STATE, LOG, CONFIG = "state.pt", "log.jsonl", "config.json"
_DEFAULTS = json.loads(json.dumps({f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}))

_GONE = {
    "momentum": 0.9, "schedule": "cosine", "milestones": [0.5, 0.75], "ema_decay": None, "grad_clip": None,
    "keep": "last",
}  # fmt: skip
"""Settings that no longer are, each with the one value that has stayed."""


def settings(folder: Path | None) -> dict[str, Any]:
    """What the run of this folder began with; {} where none has finished an epoch."""
    return {} if folder is None or not _has_run(folder) else {**_DEFAULTS, **_mapping(folder, CONFIG)}


def _has_run(folder: Path) -> bool:
    return (folder / CONFIG).exists() and (folder / STATE).exists()


def _mapping(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = (folder / name).read_bytes()
        found = unpickled(content, name) if name == STATE else json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(folder, name, error) from error
    if not isinstance(found, dict):
        raise unusable(folder, name, "no mapping")
    return found


def unusable(folder: Path, name: str, why: object) -> ValueError:
    """The error of a file that no run of this library left so."""
    return ValueError(f"{folder / name} cannot be read ({why}): delete {folder} to start afresh")


def another(folder: Path, apart: object) -> ValueError:
    """The error of a folder whose run differs from the one asked for; ``apart`` says in what."""
    return ValueError(f"{folder} holds another run ({apart}): choose another folder or delete it")


@contextmanager
def owned(folder: Path | None) -> Iterator[None]:
    """The folder is this process's while the block lasts; the lock goes with the process, however that ends.

    Raises ``ValueError`` where another process is at work in it: two would overwrite each other's epochs.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            for name in (STATE, LOG, CONFIG):
                atomic.sweep(folder / name)
            yield
    except filelock.Timeout:
        raise ValueError(f"another process trains in {folder}: wait for it, or choose another folder") from None


def begin(folder: Path, identity: dict[str, object]) -> dict[str, Any] | None:
    """The state to resume from, or None for a fresh run.

    Raises:
        ValueError: the folder holds a run of another configuration (the differing keys are named; a setting that came
            later had its default then), or a state that cannot be read (damaged, or not written by this library).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _has_run(folder):
        old, new = _mapping(folder, CONFIG), json.loads(json.dumps(identity))
        old = {**_DEFAULTS, **{k: v for k, v in old.items() if k in new or k not in _GONE or _GONE[k] != v}}
        apart = [f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in old | new if old.get(k) != new.get(k)]
        if apart:
            raise another(folder, "; ".join(apart))
    else:
        atomic.write_text(folder / CONFIG, json.dumps(identity, indent=1))
    return _mapping(folder, STATE) if (folder / STATE).exists() else None


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state, then the log that belongs to it."""
    content = io.BytesIO()
    torch.save(state, content)
    atomic.write_bytes(folder / STATE, content.getvalue())
    atomic.write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in state["history"]))
