"""Activations that a reconstruction reads again and again: in memory, or in a file where that is too little.

Three tensors per unit: its input from the quantized prefix (``x_q``), its input in the float net (``x_fp``), and the
float net's output (``target``); with the Fisher loss a fourth, the gradient at the target. They follow the network
block by block: only one block's are kept.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, fx

from hq_lib.ptq.fisher import Fisher
from hq_lib.ptq.units import as_float

CHUNK = 128
"""images per pass that fills a cache or measures a loss"""
MAX_BYTES = 2**29
"""of one tensor of activations that stays in memory; a larger one lies in a temporary file, on the CPU"""

Pair = tuple[Tensor, Tensor]


def chunks(images: Tensor) -> Iterator[Tensor]:
    """Yield the positions of ``images`` in int64 tensors of up to ``CHUNK``."""
    yield from torch.arange(len(images), device=images.device).split(CHUNK)


def filled(make: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> tuple[Tensor, ...]:
    """Return what ``make`` gives for the positions of all ``images``, made chunk by chunk, in float32."""
    whole: tuple[Tensor, ...] = ()
    for index in chunks(images):
        parts = make(index)
        whole = whole or tuple(_room((len(images), *part.shape[1:]), part.device) for part in parts)
        for tensor, part in zip(whole, parts, strict=True):
            tensor[index.to(tensor.device)] = part.to(tensor.device)
    return whole


def _room(shape: tuple[int, ...], device: torch.device) -> Tensor:
    n_bytes = 4 * int(np.prod(shape))
    if n_bytes <= MAX_BYTES:
        return torch.empty(shape, device=device)
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if n_bytes > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, "No space left on device")
            if hasattr(os, "posix_fallocate"):  # the space is ours: a map of a file on a full disk ends the process
                os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            text = f"no space for {n_bytes / 2**30:.1f} GiB of activations: set TMPDIR"
            raise OSError(error.errno, text, folder) from error
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return a copy of the rows at ``index``, on its device."""
    return tensor[index.to(tensor.device)].to(index.device)


@torch.no_grad()
def through(graph: fx.GraphModule, pair: Pair, images: Tensor) -> Pair:
    """Return what ``graph`` makes of the first of ``pair``, and what its float net makes of the second."""

    def make(index: Tensor) -> Pair:
        x_q, x_fp = (rows(x, index) for x in pair)
        y_q = graph(x_q)
        with as_float(graph):
            return y_q, graph(x_fp)

    x_q, x_fp = filled(make, images)
    return x_q, x_fp


class UnitCache:
    """What one unit is trained on: batches of (x_q, x_fp, target), and what each value's error weighs."""

    def __init__(self, pair: Pair, body: fx.GraphModule, images: Tensor, *, fisher: Fisher | None = None) -> None:
        """``pair``: all (x_q, x_fp) of the unit ``body``; ``images``: all, for their number and device; ``fisher``:
        weighs its loss."""
        self.pair, self.body, self.images, self.gradient = pair, body, images, None
        with as_float(body), torch.no_grad():
            (self.target,) = filled(lambda index: (body(rows(pair[1], index)),), images)
        if fisher is not None:
            (self.gradient,) = filled(lambda index: (fisher.gradient(rows(self.target, index), index),), images)
            parts = [rows(self.gradient, index) for index in chunks(images)]
            self.mean_square = sum(float(g.double().square().sum()) for g in parts) / self.gradient.numel()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 (x_q, x_fp, target) of the images at ``index``, without gradients."""
        return rows(self.pair[0], index), rows(self.pair[1], index), rows(self.target, index)

    def importance(self, index: Tensor) -> Tensor | None:
        """Return the Fisher diagonal at the target of the images at ``index``, its mean over all images being 1.

        None without a Fisher loss; ones where no output changes the answer.
        """
        if self.gradient is None:
            return None
        g = rows(self.gradient, index)
        return g.square() / self.mean_square if self.mean_square else torch.ones_like(g)
