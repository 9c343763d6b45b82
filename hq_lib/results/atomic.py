"""Whole files or none: bytes reach a path by way of a temporary neighbour and one rename."""

import glob
import os
import platform
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Makes ``path`` hold exactly ``content``; killed at any moment it holds the old bytes or the new, never a mixture.

    The temporary neighbour is ``.<name>.<machine>.<process id>.tmp``. The next write removes what killed processes of
    this machine left, ``sweep`` what those of any did.

    Raises:
        OSError: the folder cannot be written (read-only, full); names ``path``, whose old content is untouched, and no
            temporary file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    _sweep_dead(path)
    try:
        with open(fresh, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write names no file
    finally:
        fresh.unlink(missing_ok=True)
    if os.name == "posix":  # Windows cannot open a folder; its rename is durable enough
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, content: str) -> None:
    """``write_bytes`` of UTF-8 text with line feeds on every platform."""
    write_bytes(path, content.encode("utf-8"))


def sweep(path: Path) -> None:
    """Removes the temporary neighbours of ``path``; only under a lock that keeps other writers out."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        stale.unlink(missing_ok=True)


def _sweep_dead(path: Path) -> None:
    """Removes the temporary neighbours of processes of this machine that are no more."""
    if os.name != "posix":
        return  # a signal 0 would end the process there
    for stale in path.parent.glob(f".{glob.escape(f'{path.name}.{platform.node()}')}.*.tmp"):
        try:
            os.kill(int(stale.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            stale.unlink(missing_ok=True)
        except PermissionError:
            continue  # another user's, alive
