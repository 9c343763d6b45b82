"""The regions of a quantized graph that are reconstructed one at a time: their inputs and targets, and their error.

Three tensors per unit: its input from the quantized prefix (``x_q``), its input in the float net (``x_fp``), and the
float net's output (``target``); with the Fisher loss a fourth, the gradient at the target. They follow the network
block by block: only one block's are kept, in memory, or in a file where that is too little.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hq_lib.graph import Block, QuantizeError, blocks, extract_block, kinds, set_quantization, weight_layers
from hq_lib.graph.state import put
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.ptq.progress import ReconstructionError
from hq_lib.quantizers import AdaRound, Quantizer

ON_GRID = ("grid", "adaround", "minmax", "aciq", "lsq", "lsq_plus")
"""Methods whose grid is in the weight's own units, so that floor and ceil of the weight are its levels."""
_TAIL = ("norm", "relu", "clip", "act", "quantizer")


Unit = tuple[Block, Block | None]
"""What is reconstructed, and what leads there from the input of the block it is in; None where that is its own."""


def units(qnet: fx.GraphModule, block: Block, *, unit: str) -> list[Unit]:
    """Return what is reconstructed inside ``block``: the block itself, or each layer with its activation function.

    A layer's region ends with the batch norm, activation function and quantizer that alone read it: an add ends it.
    """
    if unit == "block":
        return [(block, None)]
    kind_of = {node: kind for node, kind in kinds(qnet).items() if node.name in block.nodes}
    first_calls = {str(node.target): node for node, kind in reversed(kind_of.items()) if kind == "layer"}
    found: list[Unit] = []
    for name in block.layers:
        chain = [first_calls[name]]
        while len(chain[-1].users) == 1 and kind_of.get(user := next(iter(chain[-1].users))) in _TAIL:
            chain.append(user)
        source, inside = chain[0].all_input_nodes[0].name, tuple(node.name for node in chain)
        before = block.nodes[: block.nodes.index(source) + 1] if source != block.input else ()
        lead = replace(block, name=f"lead of {name}", output=source, nodes=before) if before else None
        found.append((Block(name, source, inside[-1], inside, (name,), False), lead))
    return found


def cut(qnet: fx.GraphModule, region: Block) -> fx.GraphModule:
    """Return ``region`` as a graph in eval mode that shares ``qnet``'s layers and quantizers, without idle nodes."""
    graph = extract_block(qnet, region)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph.eval()


def as_float(net: nn.Module) -> set_quantization:
    """Switch every quantizer of ``net`` off inside: it computes what its float net computes."""
    return set_quantization(net, weights=False, acts=False)


def _through_float(chain: Sequence[fx.GraphModule], x: Tensor) -> Tensor:
    for graph in chain:
        with as_float(graph):
            x = graph(x)
    return x


def install(body: nn.Module, name: str) -> None:
    """Let an ``AdaRound`` quantize the layer ``name`` of ``body`` on the grid it has, unless one does, or it is float.

    Raises:
        QuantizeError: names the layer whose method has no grid in the weight's own units (DoReFa's tanh, DSQ's ends),
                       or no level at 0 (1 bit).
    """
    layer = weight_layers(body)[name]
    old = layer.weight_quantizer
    if not isinstance(old, Quantizer) or isinstance(old, AdaRound):
        return
    grid = old.integers(layer.weight)[1]
    if old.method not in ON_GRID or grid.step != 1:
        raise QuantizeError(
            f"layer {name!r}: {old.method}:{old.bits} has no level at 0, or none at floor and ceil of its weight: make "
            f"the policy with weight='minmax' of 2 bits or more, or leave the rounding alone (learn_rounding=False)"
        )
    put(body, name, AdaRound(layer.weight, grid, bits=old.bits, axis=old.axis))


@torch.no_grad()
def block_errors(qnet: fx.GraphModule, reference: fx.GraphModule, images: Tensor) -> list[tuple[str, float]]:
    """Return (dotted name, relative squared error behind it) of each block of ``qnet``, in execution order.

    sum (x_q - x_fp)^2 / sum x_fp^2 at its output, everything before it quantized; 0 where nothing is.

    Args:
        qnet:      quantized, its quantizers as they are switched.
        reference: a net with the same blocks whose float values are the truth: ``qnet`` itself, or its untouched copy
                   where a method has changed biases.
        images:    (N, C, H, W), normalised; one batch.

    Raises:
        ValueError: the two have other blocks.
    """
    ours, theirs = blocks(qnet), blocks(reference)
    if [block.name for block in ours] != [block.name for block in theirs]:
        raise ValueError("the two nets have other blocks: make both from one float net with one policy")
    found, x_q = [], images.to(device_of(qnet))
    x_fp = x_q
    with eval_mode(qnet), eval_mode(reference):
        for block, like in zip(ours, theirs, strict=True):
            x_q, x_fp = cut(qnet, block)(x_q), _through_float([cut(reference, like)], x_fp)
            error = (x_q - x_fp).double().square().sum() / x_fp.double().square().sum().clamp(min=1e-30)
            found.append((block.name, float(error)))
    return found


class Fisher:
    """What each value at a block's output counts for the network's answer: gradients of drawn labels' log-likelihood.

        F_i = (dL / dz_i)^2,   L = -log p(y | x),   y drawn once per image from p(. | x) of the float net

    z the float net's values at the block's output. BRECQ (Li et al. 2021, arXiv:2102.05426, eq. 10) weights the squared
    error of each value with it, the diagonal of the Fisher information, in place of the full Hessian of the task loss.
    Departure: its code takes the gradient of KL(float net || partly quantized net), which vanishes as the error does,
    and adds 1 to its magnitude; drawing the label from the net itself is the definition of the Fisher information,
    needs no labels and no quantized net. Without that 1, images that the net is sure of count for nothing;
    ``per_image`` makes all count alike (see ``config``).
    """

    def __init__(self, rest: Sequence[fx.GraphModule], labels: Tensor, *, per_image: bool = False) -> None:
        """``rest``: the blocks behind the output, in order, () for the last one; ``labels``: (N,) int64, per image;
        ``per_image``: gradients are divided by their root mean square over each image, so that none counts for more."""
        self.rest, self.labels, self.per_image = rest, labels, per_image

    def gradient(self, z: Tensor, index: Tensor) -> Tensor:
        """Return dL/dz, the shape of ``z`` (B, ...), float32; ``index`` (B,) says which images these are.

        With ``per_image`` each image's has mean square 1; ones where an image's is zero throughout.
        """
        start = z.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = _through_float(self.rest, start.clone())  # a block may begin in place
            loss = F.cross_entropy(logits, self.labels[index], reduction="sum")
        gradient = torch.autograd.grad(loss, start)[0]
        if not self.per_image:
            return gradient
        rows = gradient.flatten(1)
        rows = rows / rows.abs().amax(1, keepdim=True)  # squares of what is nearly certain would underflow
        rows = rows / rows.square().mean(1, keepdim=True).sqrt()
        return torch.where(rows.isfinite(), rows, 1.0).view_as(gradient)


@torch.no_grad()
def drawn_labels(blocks: Sequence[fx.GraphModule], images: Tensor, *, seed: int) -> Tensor:
    """Return (N,) int64: for each image one label drawn from the float net's softmax, the same for the same seed.

    Args:
        blocks: the whole chain, image to logits.
        images: (N, C, H, W), normalised.

    Raises:
        ReconstructionError: the network's output is not (N, classes), so that there is no softmax to draw from.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    labels = []
    for part in images.split(CHUNK):
        z = _through_float(blocks, part)
        if z.dim() != 2:
            shape = tuple(z.shape)
            raise ReconstructionError(f"the Fisher loss needs logits (N, classes); this network's output is {shape}")
        labels.append(torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1))
    return torch.cat(labels)


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
