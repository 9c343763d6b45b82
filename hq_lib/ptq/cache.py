"""Activations that a reconstruction reads again and again: kept where memory allows, else computed anew.

Three tensors per unit: its input from the quantized prefix (``x_q``), its input in the float net (``x_fp``), and the
float net's output (``target``); with the Fisher loss a fourth, the gradient at the target. They follow the network
block by block: only one block's are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from hq_lib.graph import Block
from hq_lib.ptq.fisher import Fisher
from hq_lib.ptq.units import Unit, as_float, n_values

CHUNK = 128
"""images per pass that fills a cache or measures a loss"""
MAX_BYTES = 2**31
"""that the activations of one unit may take; where they need more, every batch is computed from the images"""


def bytes_needed(qnet: fx.GraphModule, block: Block, inside: list[Unit], n_images: int, *, fisher: bool = False) -> int:
    """Return the bytes of one block's caches in float32: two inputs, two outputs (three with the Fisher loss), and a
    layer's three inside."""
    inner = [2 * n_values(qnet, unit.region.input) + n_values(qnet, unit.region.output) for unit in inside if unit.lead]
    outer = 2 * n_values(qnet, block.input) + (3 if fisher else 2) * n_values(qnet, block.output)
    per_image = outer + max(inner, default=0)
    return 4 * n_images * per_image


def chunks(n: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the positions 0 ... n - 1 in int64 tensors of up to ``CHUNK``."""
    yield from torch.arange(n, device=device).split(CHUNK)


def _empty(n: int, like: Tensor) -> Tensor:
    return torch.empty((n, *like.shape[1:]), device=like.device)


class Stream:
    """The two inputs of the block that is next: kept, or recomputed from the images through the finished blocks."""

    def __init__(self, images: Tensor) -> None:
        """``images``: (N, C, H, W), the input of the first block, quantized net and float net alike."""
        self.images = images
        self.passed: list[fx.GraphModule] = []
        self.kept: tuple[Tensor, Tensor] | None = (images, images)  # the images are in memory in any case

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return fresh float32 (x_q, x_fp) of the images at ``index``; whatever follows may change them in place."""
        if self.kept is not None:
            return self.kept[0][index], self.kept[1][index]
        x_q, x_fp = self.images[index], self.images[index]
        for graph in self.passed:
            x_q = graph(x_q)
            with as_float(graph):
                x_fp = graph(x_fp)
        return x_q, x_fp

    @torch.no_grad()
    def advance(self, graph: fx.GraphModule, *, keep: bool = True) -> None:
        """Move on behind the block ``graph``; ``keep`` what leaves it."""
        fresh: tuple[Tensor, Tensor] | None = None
        for index in chunks(len(self), self.images.device) if keep else ():
            x_q, x_fp = self.rows(index)
            y_q = graph(x_q)
            with as_float(graph):
                y_fp = graph(x_fp)
            fresh = fresh or (_empty(len(self), y_q), _empty(len(self), y_fp))
            fresh[0][index], fresh[1][index] = y_q, y_fp
        self.kept = fresh
        self.passed.append(graph)


class UnitCache:
    """What one unit is trained on: batches of (x_q, x_fp, target)."""

    def __init__(
        self, stream: Stream, lead: fx.GraphModule | None, body: fx.GraphModule, *, keep: bool = True,
        fisher: Fisher | None = None,
    ) -> None:  # fmt: skip
        """``lead``: from the block's input to the unit's, or None; ``body``: the unit; ``keep`` all batches, or
        make each when asked; ``fisher``: weights its loss."""
        self.stream, self.lead, self.body, self.fisher = stream, lead, body, fisher
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.target: Tensor | None = None
        self.gradient: Tensor | None = None
        self.mean_square = 1.0
        if keep:
            self._fill()
        if fisher is not None:
            self._measure(fisher, keep=keep)

    @torch.no_grad()
    def _made(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x_q, x_fp = self.stream.rows(index)
        if self.lead is None:
            return x_q, x_fp
        x_q = self.lead(x_q)
        with as_float(self.lead):
            return x_q, self.lead(x_fp)

    @torch.no_grad()
    def _target(self, x_fp: Tensor) -> Tensor:
        with as_float(self.body):
            return self.body(x_fp)

    def _fill(self) -> None:
        n, inputs, target = len(self.stream), None, None
        for index in chunks(n, self.stream.images.device):
            x_q, x_fp = self._made(index)
            if self.lead is not None:
                inputs = inputs or (_empty(n, x_q), _empty(n, x_fp))
                inputs[0][index], inputs[1][index] = x_q, x_fp
            y = self._target(x_fp)
            target = _empty(n, y) if target is None else target
            target[index] = y
        self.inputs, self.target = inputs, target

    def _measure(self, fisher: Fisher, *, keep: bool) -> None:
        """Take the mean of the squared gradients, and keep them unless memory forbids."""
        total, count = 0.0, 0
        for index in chunks(len(self.stream), self.stream.images.device):
            g = fisher.gradient(self.batch(index)[2], index)
            total, count = total + float(g.double().square().sum()), count + g.numel()
            if keep:
                self.gradient = _empty(len(self.stream), g) if self.gradient is None else self.gradient
                self.gradient[index] = g
        self.mean_square = total / count

    def importance(self, index: Tensor) -> Tensor | None:
        """Return the Fisher diagonal at the target of the images at ``index``, its mean over all images being 1.

        None without a Fisher loss; ones where no output changes the answer.
        """
        if self.fisher is None:
            return None
        kept = self.gradient
        g = self.fisher.gradient(self.batch(index)[2], index) if kept is None else kept[index]
        return g.square() / self.mean_square if self.mean_square else torch.ones_like(g)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 (x_q, x_fp, target) of the images at ``index``, without gradients."""
        if self.inputs is not None:
            x_q, x_fp = self.inputs[0][index], self.inputs[1][index]
        else:
            x_q, x_fp = self._made(index)
        if self.target is not None:
            return x_q, x_fp, self.target[index]
        return x_q, x_fp, self._target(x_fp.clone())
