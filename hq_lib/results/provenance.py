"""Where a number comes from: commit, versions and device. Nothing here needs git to be present."""

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from hq_lib.results import paths

UNKNOWN_SHA = "unknown"
PACKAGES = ("torch", "torchvision", "numpy", "pandas")
# What runs write is no part of the code that wrote it, so it does not make a commit "dirty".
OUTPUTS = ("data/results", "data/checkpoints", "figures")


def _git(root: Path, *words: str) -> str | None:
    """Standard output of one git command, or None where git, the repository or the commit is absent."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def git_sha(root: Path = paths.ROOT) -> str:
    """The commit of the code, 12 hexadecimal digits, with ``-dirty`` where tracked code differs from it.

    Without git, without a commit, or where ``root`` only lies inside somebody else's repository, it is
    ``$HQ_GIT_SHA`` (for copies made without ``.git``), else ``unknown``. Asked once per process, so a commit made
    during a run is not taken for the code that runs.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    sha = _git(root, "rev-parse", "--short=12", "HEAD")
    if sha is None or top is None or Path(top).resolve() != root.resolve():
        return os.environ.get("HQ_GIT_SHA") or UNKNOWN_SHA
    outputs = [f":(exclude){folder}" for folder in OUTPUTS]
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *outputs)
    return sha if changes == "" else f"{sha}-dirty"


@cache
def versions() -> str:
    """``python 3.11.2; torch 2.14.1; ...``: the interpreter and the packages that can change a number."""
    known = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            known.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            known.append(f"{package} absent")
    return "; ".join(known)


@cache
def cpu_name() -> str:
    """The processor's model name, on Linux from ``/proc/cpuinfo``, elsewhere what the platform calls it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "cpu"


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets that the processor has, as Linux names them (``avx2``, ``avx512_vnni``); empty elsewhere."""
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    """What Linux says of the first core under ``key``; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def device(kind: str = "cpu") -> str:
    """A description of the machine that computed: ``<CPU model>, 2 threads`` or the GPU's name.

    Args:
        kind: a torch device, as text: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    """
    import torch

    where = torch.device(kind)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    if where.type == "cpu":
        n_threads = torch.get_num_threads()
        return f"{cpu_name()}, {n_threads} thread{'s' if n_threads != 1 else ''}"
    return f"{where.type} of {platform.machine()}"


def stamp(kind: str = "cpu") -> dict[str, str]:
    """The provenance columns of a result row: ``git_sha``, ``versions`` and ``device``."""
    return {"git_sha": git_sha(), "versions": versions(), "device": device(kind)}
