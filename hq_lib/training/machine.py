"""How a run uses the machine: precision, compilation, freed memory. None of it changes a result beyond rounding.

What "auto" means is a rule and no measurement, so that a run says beforehand what it will do;
``benchmarks/training.py`` measures every choice beside the others and so holds the rule to account.
"""

import ctypes
import dataclasses
import functools
import platform
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hq_lib.training.config import AUTO, TrainConfig

WORTH_COMPILING = 2_000
"""Steps from which a run wins back the minute or two that compiling a network takes."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def settled(
    config: TrainConfig, device: torch.device, *, n_steps: int, stored: Mapping[str, Any], say: Callable[[str], None]
) -> TrainConfig:
    """``config`` with a concrete choice in place of every "auto".

    precision: bfloat16 where the processor multiplies matrices in it (AMX, or a GPU that has it), else float32. Without
               such units bfloat16 is emulated: slower than float32, on processors without AVX-512 many times.
    compile:   where a compiler works and the run is long enough to win back the time that compiling takes.

    Args:
        config:  asks for "auto" or not.
        device:  where the network trains.
        n_steps: of the whole run.
        stored:  the settings that the run began with, {} for a fresh one: they stand, on another machine too.
        say:     told why a long run is not compiled.
    """
    chosen = {key: stored[key] for key in ("precision", "compile") if getattr(config, key) == AUTO and key in stored}
    config = dataclasses.replace(config, **chosen)
    if config.precision == AUTO:
        config = dataclasses.replace(config, precision="bfloat16" if _multiplies_bfloat16(device) else "float32")
    if config.compile == AUTO:
        why_not = _why_not_compiled(device.type) if n_steps >= WORTH_COMPILING else None
        if why_not:
            say(f"torch.compile is not to be had here ({why_not}); training without it")
        config = dataclasses.replace(config, compile=n_steps >= WORTH_COMPILING and why_not is None)
    return config


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = Path("/proc/cpuinfo")
    return processor.exists() and "amx_bf16" in processor.read_text()


@functools.cache
def _why_not_compiled(device: str) -> str | None:
    """None where a small function compiles, else the reason."""
    try:
        compiled(nn.Sigmoid())(torch.ones(16, device=device))
    except Exception as error:  # no C++ compiler, no headers, unsupported device: all mean "not here"
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return None


def compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """``net`` as a function that runs compiled, with its own weights (no copy); compiled anew for another shape."""
    forward = torch.compile(net, dynamic=False)

    def call(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations are not the user's concern
            return forward(x)

    return call


def keep_freed_memory_() -> None:
    """Tells glibc's malloc to keep what is freed, for the rest of this process; elsewhere nothing.

    Otherwise each tensor of a step is mapped afresh from the kernel, page fault by page fault.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
