"""The ways of choosing calibration images that the study compares, and what each set scores.

A draw is a seeded pool of candidates; every way chooses n images of the same pool, so that ways are paired by draw and
deterministic ones get a spread too. Smoothness is ranked within class, since plain rankings are mostly of classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from hq_lib import data, ptq
from hq_lib.data import ImageSet
from hq_lib.graph import Block, blocks, quantize, set_quantization
from hq_lib.graph.modes import eval_mode
from hq_lib.ptq import selection
from hq_lib.ptq.selection import Manifest
from hq_lib.ptq.selection.sets import groups
from hq_lib.ptq.units import as_float, cut
from hq_lib.studies.bench import Bench
from hq_lib.studies.ptq import recipes
from hq_lib.training import predict

ERROR_BITS = (2, 2)
"""bits of the rounding whose first-block error scores an image"""
NETWORK_METRICS = ("block_error", "bn_distance", "knowledge")
BN = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Choice:
    """One way of choosing images from a pool."""

    label: str
    """what is printed"""
    metric: str = ""
    """score that is ranked (one of ``selection.METRICS`` or ``NETWORK_METRICS``); "" = none"""
    strategy: str = "random"
    """of ``selection.select``; "repeated" = drawn with replacement; or the name of a method on features"""
    balanced: bool = True
    """whether every class gives as many"""


CHOICES = {
    "random": Choice("random, balanced"),
    "random_unbalanced": Choice("random, not balanced", balanced=False),
    "random_repeated": Choice("random, with replacement", strategy="repeated", balanced=False),
    "tv_lowest": Choice("smoothest (TV lowest)", "tv", "lowest"),
    "tv_highest": Choice("roughest (TV highest)", "tv", "highest"),
    "tv_trimmed": Choice("smooth, 5 % smoothest left out", "tv", "trimmed"),
    "tv_lowest_unbalanced": Choice("smoothest, not balanced", "tv", "lowest", balanced=False),
    "roughness_lowest": Choice("smoothest histogram", "roughness", "lowest"),
    "entropy_highest": Choice("histogram entropy highest", "entropy", "highest"),
    "block_error_lowest": Choice("first-block error lowest", "block_error", "lowest"),
    "knowledge_lowest": Choice("near cluster centres (SelectQ-like)", "knowledge", "lowest"),
    "herding": Choice("herding", strategy="herding"),
    "k_center": Choice("k-center", strategy="k_center"),
}
SMOOTH = "tv_lowest"
"""the reading of "smooth" fixed before any run: total variation, lowest within class (ALGORITHMS section 8.3)"""


class Pool:
    """The candidates of one draw, with scores and features computed when first asked for."""

    def __init__(self, bench: Bench, n_pool: int, draw: int, *, n_common: int = 0) -> None:
        """Draw ``n_pool`` of the training images with seed ``draw``; ``n_common`` validation images compare sets."""
        self.bench, self.n_pool, self.draw = bench, n_pool, draw
        self.common: ImageSet = bench.val.drawn(n_common or len(bench.val), 0)
        self.positions = selection.draw_pool(len(bench.train), n_pool, seed=draw)
        self.images: ImageSet = bench.train.subset(self.positions).mixed(draw)
        self._scores: dict[str, Tensor] = {}

    @cached_property
    def x(self) -> Tensor:
        """(N, C, H, W) float32, normalised as the net takes them."""
        device = next(self.bench.net.parameters()).device
        return data.normalize(self.images.images, self.images.spec).contiguous().to(device)

    @cached_property
    def seen(self) -> "Seen":
        """What the float net computes on the pool."""
        return watch(self.bench.net, self.x, batch_size=self.bench.eval_batch)

    @cached_property
    def common_logits(self) -> Tensor:
        """(N, n_classes), the float net's on ``common``."""
        return predict(self.bench.net, self.common, batch_size=self.bench.eval_batch)

    def scores(self, metric: str) -> Tensor:
        """(N,) scores of the pool's images, pixels' or the network's."""
        if metric not in self._scores:
            network: dict[str, Callable[[], Tensor]] = {
                "block_error": lambda: first_block_error(self.bench, self.x),
                "bn_distance": lambda: selection.bn_distance(*self.seen.moments),
                "knowledge": lambda: selection.knowledge_distance(self.seen.layers, seed=self.draw),
            }
            made = network[metric]() if metric in network else selection.score(self.images.images, metric)
            self._scores[metric] = made
        return self._scores[metric]

    def choose(self, name: str, n: int) -> Tensor:
        """(n,) positions in the pool, chosen the way ``name``; a short or repeated set is an error.

        Only "random_repeated" may repeat images: what that costs is what it is there to show.
        """
        choice, n_pool = CHOICES[name], self.n_pool
        if choice.strategy == "repeated":
            return selection.draw_pool(n_pool, n, seed=self.draw, replacement=True)
        labels = self.images.labels if choice.balanced and n >= self.images.spec.n_classes else None
        if choice.strategy in ("herding", "k_center"):
            method, seen = getattr(selection, choice.strategy), self.seen.penultimate
            parts = [(torch.from_numpy(own), k) for own, k, _ in groups(labels, None, n_pool, n) if k]
            chosen = torch.cat([own[method(seen[own], k)] for own, k in parts])
            return selection.check_set(chosen.sort().values, n)
        scores = self.scores(choice.metric) if choice.metric else None
        of = {"labels": labels, "n_classes": self.images.spec.n_classes, "n_images": n_pool}
        return selection.select(scores, n, strategy=choice.strategy, seed=self.draw, **of)  # type: ignore[arg-type]

    def manifest(self, name: str, chosen: Tensor) -> Manifest:
        """The manifest of a set without repeats: indices in the raw file and a hash per image."""
        choice = CHOICES[name]
        how = {"metric": choice.metric, "strategy": choice.strategy, "seed": self.draw, "balanced": choice.balanced}
        return selection.from_images(self.images, chosen, **how)  # type: ignore[arg-type]


def examples(pool: Pool, metric: str, *, label: int = 0, k: int = 7) -> tuple[np.ndarray, list[float]]:
    """k of a class's candidates spread evenly over their ranks, ascending in score: (k, H, W, C) uint8, and scores."""
    members = (pool.images.labels == label).nonzero().flatten()
    scores = pool.scores(metric)[members]
    order = scores.argsort()[torch.linspace(0, len(members) - 1, k).round().long()]
    pixels = pool.images.images[members[order]].permute(0, 2, 3, 1)
    return pixels.numpy(), scores[order].tolist()


@dataclass(frozen=True)
class Seen:
    """What a float net computes on images."""

    penultimate: Tensor
    """(N, D), input of the last linear layer"""
    layers: list[Tensor]
    """per batch norm: (N, C_l) channel means of its input"""
    moments: tuple[Tensor, Tensor, Tensor, Tensor]
    """(N, C) means and mean squares of the inputs of all batch norms, then (C,) running means and variances"""


def watch(net: nn.Module, x: Tensor, *, batch_size: int) -> Seen:
    """Features of images ``x`` (N, C, H, W) from one pass in eval mode; ``ValueError`` for a net without batch norm."""
    norms = [module for module in net.modules() if isinstance(module, BN)]
    heads = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not norms or not heads:
        raise ValueError("features need a net with batch norms and a linear layer: use pixel scores instead")
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in (*norms, heads[-1])}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        last = module is heads[-1]
        seen[module].append(inputs[0].flatten(1) if last else torch.stack(selection.channel_moments(inputs[0]), 1))

    hooks = [module.register_forward_pre_hook(keep) for module in seen]
    try:
        with eval_mode(net), torch.no_grad():
            for batch in x.split(batch_size):
                net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    moments = [torch.cat(seen[norm]) for norm in norms]  # (N, 2, C_l) each
    mean, variance = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var"))
    means, squares = torch.cat(moments, dim=2).unbind(1)
    return Seen(torch.cat(seen[heads[-1]]), [each[:, 0] for each in moments], (means, squares, mean, variance))


def first_block_error(bench: Bench, x: Tensor) -> Tensor:
    """(N,) mean squared error per image behind the first residual block, rounded to nearest at ``ERROR_BITS``.

    Ranges are of least squared error, as recipe "mse" has them; what comes later gets none.
    """
    qnet = quantize(bench.net, recipes.policy(*ERROR_BITS), x[:1])
    found = blocks(qnet)
    upto = found[: next(i for i, block in enumerate(found) if block.residual) + 1]
    nodes, layers = (tuple(name for b in upto for name in getattr(b, key)) for key in ("nodes", "layers"))
    whole = Block("head", upto[0].input, upto[-1].output, nodes, layers, True)
    head = cut(qnet, whole)
    own = set(head.modules())
    ptq.fit_weights(qnet, "mse", only=own.__contains__)
    with set_quantization(qnet, weights=False, acts=False, only=lambda quantizer: quantizer not in own):
        ptq.fit_acts(qnet, x[: recipes.RANGE_IMAGES], "mse", only=own.__contains__)

    def exact(part: Tensor) -> Tensor:
        with as_float(head):
            return head(part)

    return selection.reconstruction_error(x, exact, head, batch_size=bench.eval_batch)
