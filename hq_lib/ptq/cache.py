"""Activations that a reconstruction reads again and again: kept where memory allows, else computed anew.

Three tensors per unit: its input from the quantized prefix (``x_q``), its input in the float net (``x_fp``), and the
float net's output (``target``); with the Fisher loss a fourth, the gradient at the target. They follow the network
block by block: only one block's are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from hq_lib.graph import Block
from hq_lib.ptq.fisher import Fisher
from hq_lib.ptq.units import Unit, as_float

CHUNK = 128
"""images per pass that fills a cache or measures a loss"""
MAX_BYTES = 2**31
"""that the activations of one unit may take; where they need more, every batch is computed from the images"""


def bytes_needed(qnet: fx.GraphModule, block: Block, inside: list[Unit], n_images: int, *, fisher: bool = False) -> int:
    """Return the bytes of one block's caches in float32: two inputs, two outputs (three with the Fisher loss), and a
    layer's three inside."""
    size = {node.name: int(node.meta["shape"][1:].numel()) for node in qnet.graph.nodes if "shape" in node.meta}
    inner = [2 * size[unit.region.input] + size[unit.region.output] for unit in inside if unit.lead]
    outer = 2 * size[block.input] + (3 if fisher else 2) * size[block.output]
    return 4 * n_images * (outer + max(inner, default=0))


def chunks(images: Tensor) -> Iterator[Tensor]:
    """Yield the positions of ``images`` in int64 tensors of up to ``CHUNK``."""
    yield from torch.arange(len(images), device=images.device).split(CHUNK)


def filled(make: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> tuple[Tensor, ...]:
    """Return what ``make`` gives for the positions of all ``images``, made chunk by chunk, in float32."""
    whole: tuple[Tensor, ...] = ()
    for index in chunks(images):
        parts = make(index)
        whole = whole or tuple(torch.empty((len(images), *part.shape[1:]), device=part.device) for part in parts)
        for tensor, part in zip(whole, parts, strict=True):
            tensor[index] = part
    return whole


@torch.no_grad()
def through(graph: fx.GraphModule, x_q: Tensor, x_fp: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``graph`` makes of ``x_q``, and what its float net makes of ``x_fp``; both may change in place."""
    y_q = graph(x_q)
    with as_float(graph):
        return y_q, graph(x_fp)


class Stream:
    """The two inputs of the block that is next: kept, or recomputed from the images through the finished blocks."""

    def __init__(self, images: Tensor) -> None:
        """``images``: (N, C, H, W), the input of the first block, quantized net and float net alike."""
        self.images = images
        self.passed: list[fx.GraphModule] = []
        self.kept: tuple[Tensor, ...] | None = (images, images)  # the images are in memory in any case

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return fresh float32 (x_q, x_fp) of the images at ``index``; whatever follows may change them in place."""
        if self.kept is not None:
            return self.kept[0][index], self.kept[1][index]
        x_q, x_fp = self.images[index], self.images[index]
        for graph in self.passed:
            x_q, x_fp = through(graph, x_q, x_fp)
        return x_q, x_fp

    def advance(self, graph: fx.GraphModule, *, keep: bool = True) -> None:
        """Move on behind the block ``graph``; ``keep`` what leaves it."""
        self.kept = filled(lambda index: through(graph, *self.rows(index)), self.images) if keep else None
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
        self.inputs: tuple[Tensor, ...] | None = None
        self.target: Tensor | None = None
        self.gradient: Tensor | None = None
        if keep and lead is not None:
            self.inputs = filled(self._inputs, stream.images)
        if keep:
            (self.target,) = filled(lambda index: (self.batch(index)[2],), stream.images)
        if fisher is None:
            return
        if keep:
            (self.gradient,) = filled(lambda index: (self._gradient(fisher, index),), stream.images)
        found = (self._gradient(fisher, index) for index in chunks(stream.images))
        sums, counts = zip(*((float(g.double().square().sum()), g.numel()) for g in found), strict=True)
        self.mean_square = sum(sums) / sum(counts)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 (x_q, x_fp, target) of the images at ``index``, without gradients."""
        x_q, x_fp = self._inputs(index)
        if self.target is not None:
            return x_q, x_fp, self.target[index]
        with as_float(self.body), torch.no_grad():
            return x_q, x_fp, self.body(x_fp.clone())

    def importance(self, index: Tensor) -> Tensor | None:
        """Return the Fisher diagonal at the target of the images at ``index``, its mean over all images being 1.

        None without a Fisher loss; ones where no output changes the answer.
        """
        if self.fisher is None:
            return None
        g = self._gradient(self.fisher, index)
        return g.square() / self.mean_square if self.mean_square else torch.ones_like(g)

    def _inputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        if self.inputs is not None:
            return self.inputs[0][index], self.inputs[1][index]
        x_q, x_fp = self.stream.rows(index)
        return (x_q, x_fp) if self.lead is None else through(self.lead, x_q, x_fp)

    def _gradient(self, fisher: Fisher, index: Tensor) -> Tensor:
        return fisher.gradient(self.batch(index)[2], index) if self.gradient is None else self.gradient[index]
