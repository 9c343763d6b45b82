"""One run in several processes, started by ``torchrun --nproc_per_node=4 -m hq_lib train ...``: data parallel.

Each process holds the network and takes every n-th image of each batch; ``DistributedDataParallel`` averages gradients.
Order, crops and flips are those of one process, so ``batch_size`` is of all processes together and the losses are one
process's to rounding, but for what looks at a whole batch: batch norms normalise each share by its own statistics, and
running ranges and statistics are those of the first process's share. The first process alone writes and speaks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hq_lib.quantizers import Quantizer


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
