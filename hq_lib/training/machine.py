"""How a run uses the machine: precision, compilation, freed memory, processes. Results change by rounding at most;
at two bits that is much: the shipped W2A2 networks give 7 to 9 % of 1,000 test images another class in bfloat16 than in
float32, which judges.

``benchmarks/training.py`` prints every choice beside the others.

One run in several processes, started by ``torchrun --nproc_per_node=4 -m hq_lib train ...``, is data parallel: each
holds the network and takes every n-th image of each batch; ``DistributedDataParallel`` averages gradients. Order, crops
and flips are those of one process, so ``batch_size`` is of all processes together and the losses are one process's to
rounding, but for what looks at a whole batch: batch norms normalise each share by its own statistics, and running
ranges and statistics are those of the first process's share. The first process alone writes and speaks.
"""

import copy
import ctypes
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from hq_lib.graph.tracing import device_of
from hq_lib.quantizers import Quantizer
from hq_lib.quantizers.straight_through import AS_EAGER
from hq_lib.results import provenance
from hq_lib.training.config import AUTO, TrainConfig

WORTH_COMPILING = 2_000
"""Steps from which a run wins back the minutes that compiling a network and trying it out take."""
GAIN = 1.03
"""How much faster a compiled step must be: below, what was measured may be chance."""
ROUNDS = 3
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def settled(
    config: TrainConfig,
    net: nn.Module,
    batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    n_steps: int,
    stored: Mapping[str, Any],
    say: Callable[[str], None],
) -> TrainConfig:
    """``config`` with a concrete choice in place of every "auto".

    precision: by a rule. bfloat16 where the processor multiplies in it (AVX-512 BF16 or AMX, or a GPU that has it),
               else float32: emulated bfloat16 is slower, ten times on a processor without AVX-512.
    compile:   by measurement, a few steps of a copy of ``net`` either way; never in short runs.

    Args:
        config:  asks for "auto" or not.
        net:     what is trained, on its device.
        batch:   gives images (B, C, H, W) and labels (B,) to try it with.
        n_steps: of the whole run.
        stored:  the settings that the run began with, {} for a fresh one: they stand, on another machine too.
        say:     told what a long run chose and why.
    """
    chosen = {key: stored[key] for key in ("precision", "compile") if getattr(config, key) == AUTO and key in stored}
    config = replace(config, **chosen)
    native = multiplies_bfloat16(device_of(net))
    if config.precision == AUTO:
        config = replace(config, precision="bfloat16" if native else "float32")
    elif config.precision == "bfloat16" and not native:
        say("this processor emulates bfloat16, many times slower than it trains in float32")
    if config.compile == AUTO:
        wins = n_steps >= WORTH_COMPILING and compiling_wins(net, *batch(), precision=config.precision, say=say)
        config = replace(config, compile=wins)
    return config


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and "avx512_bf16" in provenance.cpu_flags()


def compiling_wins(net: nn.Module, x: Tensor, y: Tensor, *, precision: str, say: Callable[[str], None]) -> bool:
    """Whether forward and backward passes of a copy of ``net`` take less time compiled; False where it cannot be."""
    trial = copy.deepcopy(net).train()

    def seconds(forward: Callable[[Tensor], Tensor]) -> float:
        start = _clock(x.device)
        with autocast(x.device, precision):
            loss = F.cross_entropy(forward(x).float(), y)
        loss.backward()
        trial.zero_grad()
        return _clock(x.device) - start

    plain, fast = [seconds(trial) for _ in range(2)], []
    try:
        forward = compiled(trial)
        for _ in range(2):  # compiles, warms up
            seconds(forward)
        for _ in range(ROUNDS):
            plain.append(seconds(trial))
            fast.append(seconds(forward))
    except Exception as error:  # no C++ compiler, no headers, a network that it refuses: all mean "not here"
        reason = (str(error).splitlines() or [""])[0]
        say(f"torch.compile is not to be had here ({type(error).__name__}: {reason[:120]}); training without it")
        return False
    gain = min(plain) / min(fast)
    say(f"compiled steps are {gain:.2f} times as fast as plain ones: {'' if gain > GAIN else 'not '}compiled")
    return gain > GAIN


def _clock(device: torch.device) -> float:
    """Seconds that this process used, which other processes disturb less; on a GPU, when its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The context that a step's forward pass and loss run in."""
    if precision == "float32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), nullcontext() if device.type != "cpu" else _StridedInFloat32():
        yield


class _StridedInFloat32(TorchFunctionMode):
    """Depthwise convolutions with a stride in float32, as their gradient in bfloat16 takes up to 27 times as long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    if groups == 1 or stride in (1, (1, 1)):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(input.float(), weight.float(), bias, stride, padding, dilation, groups).bfloat16()


def compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """``net`` as a function that runs compiled, with its own weights (no copy); compiled anew for another shape."""
    forward = torch.compile(net, dynamic=False, options=AS_EAGER)

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


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started while the block lasts, with a GPU of its own where there are some.

    Networks on the CPU talk through gloo there too.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if n_gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % n_gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if n_gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def end_unless_first() -> None:
    """End every process but the first, which goes on alone to what is done once."""
    if rank():
        raise SystemExit(0)


def rank() -> int:
    """The number of this process; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int) -> slice:
    """Which of a batch of ``n`` images are this process's; ``ValueError`` where they cannot be shared evenly."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if n % size:
        raise ValueError(f"a batch of {n} images cannot be shared evenly by {size} processes: change batch_size")
    return slice(rank(), None, size)


def agreed(value: Any) -> Any:
    """What the first process has, in every process."""
    found = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    return found[0]


def parallel(net: nn.Module) -> nn.Module:
    """``net`` with the first process's parameters, grids and buffers, whose gradients are the mean over all processes.

    Raises:
        ValueError: a quantizer that has no grid yet, which each process would fit to its own images.
    """
    if not dist.is_initialized():
        return net
    if waiting := [name for name, q in net.named_modules() if isinstance(q, Quantizer) and not q.initialised]:
        raise ValueError(f"{waiting[0]!r} has no grid yet: graph.calibrate(qnet, images) before training in processes")
    return DistributedDataParallel(net)


def synchronised(net: nn.Module, loss: float) -> float:
    """Give every process the first one's buffers of ``net``, at an epoch's end; the mean of ``loss`` over processes."""
    if not dist.is_initialized():
        return loss
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)
    total = torch.tensor(loss, dtype=torch.float64, device=next(net.parameters()).device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
