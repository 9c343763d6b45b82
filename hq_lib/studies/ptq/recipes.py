"""The lines of tab_ptq: each post-training method as ranges, weights and a reconstruction with its schedule.

And ACIQ's error tensor by tensor, measured and predicted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from hq_lib import data, ptq
from hq_lib.data import ImageSet
from hq_lib.graph import QUANTIZER_SUFFIX, BitPolicy, act_quantizers, calibrate, quantize, weight_layers
from hq_lib.ptq.ranges import Method
from hq_lib.quantizers import aciq, dequantize, quantize_to_int
from hq_lib.quantizers.ranges import grid_from_range

CHOSEN = {"travel": 25.0, "beta_start": 8.0}
"""schedule of a short budget, rounding rate x iterations and the regulariser's first exponent: noticed first in a
benchmark of the public net that prints test accuracy, then chosen on the shipped net's validation images"""
RANGE_IMAGES = 256
"""images whose activations set the ranges, the first of a set (QDrop takes one batch of 256)"""
MSE = ("mse_measured", "mse_model", "mse_exact")
"""what ``aciq_errors`` gives"""
OFFICIAL: dict[str, Any] = {"rounding_lr": 1e-3, "beta_start": 20.0}
"""the rate and exponent of the official QDrop and BRECQ code, made for 20,000 iterations"""


def rated(schedule: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """The settings of a schedule at a budget: its travel becomes the rounding rate that goes as far, at most 0.5."""
    others = {key: value for key, value in schedule.items() if key != "travel"}
    return {"rounding_lr": min(0.5, schedule["travel"] / max(1, iterations)), **others}


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
    """its settings, a budget of its own among them; without a rate ``CHOSEN`` is used"""

    def config(self, iterations: int) -> dict[str, Any]:
        """The settings of its reconstruction at a budget; {} without one."""
        if self.passes is None:
            return {}
        return {**({} if "rounding_lr" in self.settings else rated(CHOSEN, iterations)), **self.settings}


RECIPES = {
    "minmax": Recipe("minmax", "to nearest", weights="minmax", acts="minmax"),
    "percentile": Recipe("percentile", "to nearest, 99.99 % of the activations", weights="minmax", acts="percentile"),
    "mse": Recipe("mse", "to nearest, L2.4 ranges", weights="mse", acts="mse"),
    "aciq_official": Recipe("aciq", "clipped activations as published, per tensor", weights="minmax",
                            acts="aciq_official"),
    "aciq": Recipe("aciq", "clipped activations", weights="minmax", acts="aciq"),
    "aciq_corrected": Recipe("aciq", "and corrected moments", weights="minmax", acts="aciq", corrected=True),
    "aciq_allocated": Recipe("aciq", "and bits by channel (average)", weights="minmax", acts="aciq", corrected=True,
                             allocated=True),
    "adaround": Recipe("adaround", "by layer", passes=ptq.adaround),
    "brecq": Recipe("brecq", "by block, squared error", passes=ptq.brecq),
    "brecq_fisher": Recipe("brecq", "by block, Fisher-weighted", passes=ptq.brecq,
                           settings={"loss": "fisher_per_image"}),
    "brecq_official": Recipe("brecq", "by block, squared error, official rate", passes=ptq.brecq, settings=OFFICIAL),
    "qdrop": Recipe("qdrop", "by block, dropping 0.5", passes=ptq.qdrop),
    "qdrop_official": Recipe("qdrop", "dropping 0.5, official rate", passes=ptq.qdrop, settings=OFFICIAL),
    "qdrop_undropped": Recipe("qdrop", "drop 1.0, official rate", passes=ptq.qdrop,
                              settings={**OFFICIAL, "keep_probability": 1.0}),
    "qdrop_adapted": Recipe("qdrop", "dropping 0.5, rate 1e-2", passes=ptq.qdrop,
                            settings={**OFFICIAL, "rounding_lr": 1e-2}),
    "qdrop_2000": Recipe("qdrop", "2,000 iterations, rate 1e-2", passes=ptq.qdrop,
                         settings={**OFFICIAL, "rounding_lr": 1e-2, "iterations": 2000}),
}  # fmt: skip


def policy(w_bits: int, a_bits: int) -> BitPolicy:
    """Bits of the post-training studies: weights per channel, LSQ+ activations, QDrop's placement, folded norms."""
    return BitPolicy(f"minmax:{w_bits}", f"lsq_plus:{a_bits}", placement="academic", bn="fold", pool_bits=32)


def calibration(train: ImageSet, n: int, seed: int) -> Tensor:
    """(n, C, H, W) training images without augmentation, normalised as the net was trained.

    Class-balanced, unless all are taken or there are fewer images than classes (a sample of ImageNet). ``ValueError``
    where there are fewer than ``n``: rows would name a number that was not used.
    """
    if n > len(train):
        raise ValueError(f"n_calib is {n}, and {train.spec.name} has {len(train)} training images: ask for fewer")
    return data.normalize(train.drawn(n, seed).images, train.spec).contiguous()


def quantized(net: nn.Module, x: Tensor, recipe: Recipe, bits: tuple[int, int], **settings: Any) -> fx.GraphModule:
    """The net quantized by one recipe from calibration images ``x``; ``settings`` as in ``fit_recipe``."""
    qnet = quantize(net, policy(*bits), x[:1])
    fit_recipe(qnet, x, recipe, **settings)
    return qnet


def fit_recipe(
    qnet: fx.GraphModule, x: Tensor, recipe: Recipe, *, iterations: int = 500, folder: Path | None = None,
    progress: Callable[[ptq.UnitReport], None] | None = None, **changes: Any,
) -> list[ptq.UnitReport]:  # fmt: skip
    """Fit ``qnet`` in place by one recipe to calibration images ``x``; the reports of its reconstruction, if any.

    ``folder`` lets a killed reconstruction go on; ``changes``: fields of the reconstruction in place of the recipe's.
    """
    few = x[:RANGE_IMAGES]
    if recipe.allocated:
        ptq.fit_allocated(qnet)
    else:
        ptq.fit_weights(qnet, recipe.weights)
    ptq.fit_acts(qnet, few, recipe.acts)
    if recipe.corrected:
        ptq.correct_moments(qnet, few)
    if recipe.passes is None:
        return []
    settings = {"iterations": iterations, "n_images": len(x), "batch_size": min(32, len(x))}
    settings |= {**recipe.config(iterations), **changes}
    return ptq.reconstruct(qnet, x, recipe.passes(**settings), folder=folder, progress=progress)


def tensors(net: nn.Module, x: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """("activation" or "weight", layer, values): what unsigned quantizers see on ``x``, and weights, norms folded."""
    qnet = quantize(net, policy(4, 4), x[:1])
    seen: dict[int, Tensor] = {}
    calibrate(qnet, x, quantized_weights=False, fit=lambda quantizer, values: seen.update({id(quantizer): values}))
    for name, quantizer in act_quantizers(qnet).items():
        if id(quantizer) in seen and not bool(quantizer.signed):
            yield "activation", name.removesuffix(QUANTIZER_SUFFIX), seen[id(quantizer)]
    for name, layer in weight_layers(qnet).items():
        yield "weight", name, layer.weight.detach()


def aciq_errors(values: Tensor, *, bits: int, relu: bool) -> dict[str, Any]:
    """Relative squared errors of ``values`` on one grid clipped by ACIQ: measured, and as both predictions say.

    Args:
        values: real units; with ``relu`` non-negative, the positive ones taken for the upper half of a zero-mean
                variable.
        bits:   of the grid, per tensor, end-point levels with an exact 0.

    Returns:
        ``MSE``, pure numbers, and ``prior``, the likelier of "laplace" and "gauss".
    """
    spread = aciq.fit(values, positive_half=relu)
    prior: aciq.Prior = "laplace" if bool(spread.is_laplace) else "gauss"
    width = float(spread.b if prior == "laplace" else spread.sigma)
    clip = aciq.clip_range(values, bits=bits, prior=prior, relu="theory" if relu else None)
    alpha = float(clip.high if relu else (clip.high - clip.low) / 2)
    grid = grid_from_range(clip, bits=bits)
    x_hat = dequantize(quantize_to_int(values, grid), grid)
    power = float(values.double().square().mean())
    half = 2 * float((values > 0).double().mean()) if relu else 1.0
    exact = aciq.predicted_mse(alpha, width, bits=bits, prior=prior, relu=relu,
                               grid="relu_endpoint" if relu else "endpoint")  # fmt: skip
    return {
        "mse_measured": float((x_hat - values).double().square().mean()) / power,
        "mse_model": aciq.predicted_mse(alpha, width, bits=bits, prior=prior, relu=relu) / power,
        "mse_exact": half * exact / power,
        "prior": prior,
    }
