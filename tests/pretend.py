"""The device that tests marked `gpu` run on: "cuda", or with HQ_DEVICE=pretend one that stands in for it anywhere.

The stand-in (``pretend.cpp``) computes the CPU's bits and refuses what a GPU refuses, so the tests themselves, and
every device that the library names or forgets to, are proved without a GPU.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from hq_lib.results import paths

DEVICE = os.environ.get("HQ_DEVICE", "cuda")
PRETENDED = DEVICE == "pretend"
SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def built() -> Path:
    """The shared library, compiled for this torch where it is not yet; kept beside the data."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target, home = paths.cache_dir() / "pretend" / f"{digest}.so", Path(torch.__file__).parent
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", *include, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([str(compiler()), str(SOURCE), "-o", str(fresh), *flags], check=True)
        fresh.replace(target)
    return target


def register() -> None:
    """Make torch know the device "pretend", in this process; before anything has a gradient."""
    torch.utils.rename_privateuse1_backend("pretend")
    yes, none = lambda *_: True, lambda *_: None
    module = SimpleNamespace(
        is_available=yes, is_initialized=yes, current_device=lambda: 0, device_count=lambda: 1, manual_seed_all=none,
        _is_in_bad_fork=lambda: False,
    )  # fmt: skip
    torch._register_device_module("pretend", module)
    torch.ops.load_library(built())


@contextmanager
def waits() -> Iterator[Callable[[], int]]:
    """Inside the block, a function that says how often the host has waited for the device since it began."""
    if PRETENDED:
        count = ctypes.CDLL(str(built())).pretend_waits
        before = count()
        yield lambda: count() - before
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(one.message) for one in said)
        finally:
            torch.cuda.set_sync_debug_mode("default")
