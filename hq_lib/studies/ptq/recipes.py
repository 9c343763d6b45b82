"""The lines of tab_ptq: each post-training method as ranges, weights and a reconstruction with its schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib import data, ptq
from hq_lib.graph import quantize
from hq_lib.ptq.ranges import Method
from hq_lib.studies.selection import bench as selection_bench

TRAVEL, BETA_START = 25.0, 8.0
"""rounding rate x iterations, and the regulariser's first exponent: chosen on validation images (``tune``)"""
OFFICIAL: dict[str, Any] = {"rounding_lr": 1e-3, "beta_start": 20.0}
"""the rate and exponent of the official QDrop and BRECQ code, made for 20,000 iterations"""


def fast(iterations: int) -> dict[str, Any]:
    """The schedule for a short budget: its rounding rate lets a logit travel as far as 20,000 slow steps do."""
    return {"rounding_lr": min(0.5, TRAVEL / max(1, iterations)), "beta_start": BETA_START}


@dataclass(frozen=True)
class Recipe:
    """One line of tab_ptq."""

    method: str
    """key of ``labels.METHOD_LABELS``"""
    line: str
    """what distinguishes it from the other lines of its method, as printed"""
    weights: Method = "mse"
    """how the weights' ranges are chosen, per output channel"""
    acts: Method = "mse"
    """how the activations' ranges are chosen, per tensor, from the float net on 256 images"""
    allocated: bool = False
    """bits shared out among output channels (their average is the width)"""
    corrected: bool = False
    """weight moments restored through scales and biases"""
    passes: Callable[..., Sequence[ptq.ReconstructionConfig]] | None = None
    """the reconstruction, None = rounding to nearest"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """its settings beyond the budget; without a rate among them ``fast`` is used"""

    def config(self, iterations: int) -> dict[str, Any]:
        """The settings of its reconstruction at a budget; {} without one."""
        if self.passes is None:
            return {}
        return {**({} if "rounding_lr" in self.settings else fast(iterations)), **self.settings}


RECIPES = {
    "minmax": Recipe("minmax", "to nearest", weights="minmax", acts="minmax"),
    "percentile": Recipe("percentile", "to nearest, 99.99 % of the activations", weights="minmax", acts="percentile"),
    "mse": Recipe("mse", "to nearest, L2.4 ranges", weights="mse", acts="mse"),
    "aciq_official": Recipe("aciq", "clipped activations as published", weights="minmax", acts="aciq_official"),
    "aciq": Recipe("aciq", "clipped activations", weights="minmax", acts="aciq"),
    "aciq_corrected": Recipe("aciq", "and corrected moments", weights="minmax", acts="aciq", corrected=True),
    "aciq_allocated": Recipe("aciq", "and bits by channel (average)", weights="minmax", acts="aciq", corrected=True,
                             allocated=True),
    "adaround": Recipe("adaround", "by layer", passes=ptq.adaround),
    "brecq": Recipe("brecq", "by block, squared error", passes=ptq.brecq),
    "brecq_fisher": Recipe("brecq", "by block, Fisher-weighted", passes=ptq.brecq,
                           settings={"loss": "fisher_per_image"}),
    "qdrop": Recipe("qdrop", "by block, dropping 0.5", passes=ptq.qdrop),
    "qdrop_official": Recipe("qdrop", "dropping 0.5, official rate", passes=ptq.qdrop, settings=OFFICIAL),
}  # fmt: skip
NEAREST = tuple(name for name, recipe in RECIPES.items() if recipe.passes is None)
LEARNED = ("adaround", "brecq", "brecq_fisher", "qdrop")


def calibration(bench: selection_bench.Bench, n: int, seed: int) -> Tensor:
    """(n, C, H, W) training images without augmentation, normalised as the net was trained; all where n exceeds them.

    Class-balanced, unless there are fewer images than classes (a sample of ImageNet).
    """
    n = min(n, len(bench.train))
    if n == len(bench.train):
        chosen = bench.train
    elif n < bench.train.spec.n_classes:
        order = torch.randperm(len(bench.train), generator=torch.Generator().manual_seed(seed))
        chosen = bench.train.subset(order[:n])
    else:
        chosen = bench.train.balanced(n, seed)
    return data.normalize(chosen.images, bench.train.spec).contiguous()


def quantized(
    net: nn.Module, x: Tensor, recipe: Recipe, bits: tuple[int, int], *, iterations: int, seed: int,
    folder: Path | None = None, progress: Callable[[ptq.UnitReport], None] | None = None,
) -> fx.GraphModule:  # fmt: skip
    """The net quantized by one recipe from calibration images ``x``; ``folder`` lets a killed reconstruction go on."""
    qnet = quantize(net, selection_bench.policy(*bits), x[:1])
    fit_recipe(qnet, x, recipe, iterations=iterations, seed=seed, folder=folder, progress=progress)
    return qnet


def fit_recipe(
    qnet: fx.GraphModule, x: Tensor, recipe: Recipe, *, iterations: int = 500, folder: Path | None = None,
    progress: Callable[[ptq.UnitReport], None] | None = None, **changes: Any,
) -> None:  # fmt: skip
    """Fit ``qnet`` in place by one recipe to calibration images ``x``; ``changes``: fields of a reconstruction."""
    few = x[: selection_bench.RANGE_IMAGES]
    if recipe.allocated:
        ptq.fit_allocated(qnet)
    else:
        ptq.fit_weights(qnet, recipe.weights)
    ptq.fit_acts(qnet, few, recipe.acts)
    if recipe.corrected:
        ptq.correct_moments(qnet, few)
    if recipe.passes is not None:
        settings = {"iterations": iterations, "n_images": len(x), "batch_size": min(32, len(x))}
        settings |= {**recipe.config(iterations), **changes}
        ptq.reconstruct(qnet, x, recipe.passes(**settings), folder=folder, progress=progress)
