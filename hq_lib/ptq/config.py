"""What a reconstruction does, every switch in the open, and the three published methods as settings of it."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from hq_lib.results.settings import Bound, Settings

Positive = Annotated[float, Bound("> 0")]


@dataclass(frozen=True)
class ReconstructionConfig(Settings):
    """One pass over the network; the defaults are QDrop (arXiv:2203.05740) with a budget for minutes on a CPU."""

    unit: Literal["block", "layer"] = "block"
    """what is reconstructed at a time: a block of ``graph.blocks``, or each layer with its activation function"""

    iterations: Annotated[int, Bound(">= 0", whole=True)] = 500
    """optimiser steps per unit; 0 leaves the rounding to nearest and the steps as calibrated (published: 20,000)"""

    batch_size: Annotated[int, Bound(">= 1", whole=True)] = 32
    """images per step"""

    n_images: Annotated[int, Bound(">= 1", whole=True)] | None = 1024
    """calibration images expected, fewer or more are an error; None takes what comes"""

    batch_sampling: Literal["without_replacement", "with_replacement"] = "without_replacement"
    """"without_replacement": each image once per epoch (a remainder below a batch waits for the next permutation);
    "with_replacement": independent draws, as QDrop's code"""

    learn_rounding: bool = True
    """whether the rounding of the weights is learned"""

    learn_steps: bool = True
    """whether the steps of the unit's activation quantizers are learned (those of lsq and lsq_plus have some); zero
    points stay as calibrated, as in the published code"""

    quantize_acts: bool = True
    """False: activation quantizers are bypassed in this pass, in the prefix too (AdaRound, BRECQ's first stage)"""

    keep_probability: Annotated[float, Bound(">= 0 and <= 1")] = 0.5
    """probability of KEEPING the quantized value, element by element, of the unit's input and behind each activation
    quantizer inside: 1 = always quantized, 0 = activations always float (the code of QDrop calls it drop_prob)"""

    rounding_lr: Positive = 1e-2
    """Adam's rate of the rounding logits. Adam moves a logit by at most about rate x iterations, and deciding a
    rounding takes 2.4: 1e-3, the official default, fits 20,000 iterations, 1e-2 a few hundred. Where many roundings
    are left undecided, raise it (rate x iterations near 20, as published) and lower ``beta_start``: ResNet-20 at W2A2,
    500 iterations, one seed: 79.6 % with 1e-2 and 20 (6 to 34 % undecided), 81.3 % with 5e-2 and 8 (0 to 1.3 %)"""

    step_lr: Positive = 4e-5
    """Adam's rate of the activation steps in real units, falls to 0 along a cosine"""

    rounding_weight: Annotated[float, Bound(">= 0")] = 0.01
    """lambda of the regulariser, relative to a loss summed over channels (0.1 MobileNetV2, 0.2 MNASNet)"""

    warm_up: Annotated[float, Bound(">= 0 and <= 1")] = 0.2
    """share of the iterations without the regulariser"""

    beta_start: Positive = 20.0
    """the regulariser's exponent after the warm-up"""

    beta_end: Positive = 2.0
    """its exponent at the end, reached linearly"""

    loss: Literal["mse", "fisher", "fisher_per_image"] = "mse"
    """weight of each value's error: "mse" 1; "fisher" (units of blocks only) the Fisher diagonal at the block's output,
    divided by its mean so that ``rounding_weight`` keeps its meaning; costs a pass through the rest of the net. Where
    the net is sure of most images, nearly all of that weight falls on the others: 256 training images of the shipped
    ResNet-20 count for 3. "fisher_per_image" divides by each image's own mean, so that all images count alike (W2A2,
    60 iterations, one seed, 1,000 test images: "mse" 60.3 %, "fisher" 24.4 %, "fisher_per_image" 59.1 %)"""

    loss_power: Positive = 2.0
    """p of the loss sum_channels weight |y - target|^p, averaged over images and positions"""

    seed: Annotated[int, Bound(">= -inf", whole=True)] = 0
    """of the batches and the dropping; each unit has its own stream, so that resuming changes nothing"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "mse" and self.unit != "block":
            raise ValueError(f"ReconstructionConfig.loss {self.loss!r} needs unit 'block': the output of a layer "
                             "inside a block does not alone decide what follows")  # fmt: skip

    def beta(self, i: int) -> float | None:
        """Return the regulariser's exponent at iteration ``i``; None during the warm-up, where it is off."""
        start = self.warm_up * self.iterations
        if i < start:
            return None
        return self.beta_end + (self.beta_start - self.beta_end) * (1 - (i - start) / (self.iterations - start))


def adaround(**changes: Any) -> tuple[ReconstructionConfig, ...]:
    """Return AdaRound's one pass (arXiv:2004.10568): layer by layer, weights only, quantized prefix as input."""
    base = ReconstructionConfig(unit="layer", quantize_acts=False, learn_steps=False, keep_probability=1.0)
    return (replace(base, **changes),)


def brecq(**changes: Any) -> tuple[ReconstructionConfig, ...]:
    """Return BRECQ's two passes (arXiv:2102.05426): rounding with float activations, then the activation steps.

    Block by block, squared error as the official default or, with ``loss="fisher"``, the paper's weighting; the second
    pass has a quarter of the iterations, p = 2.4 (2 with Fisher) and a step rate of 4e-4. ``changes`` go to both
    passes, iterations in this ratio.

    Departs from the official code, whose second pass takes the float network's inputs (ours the quantized prefix's) and
    starts the steps on 64 images, layer after layer; ours start on the float network's activations.
    """
    base = replace(ReconstructionConfig(keep_probability=1.0), **changes)
    weights = replace(base, quantize_acts=False, learn_steps=False)
    rate, power = changes.get("step_lr", 4e-4), 2.4 if base.loss == "mse" else 2.0
    return weights, replace(base, learn_rounding=False, iterations=base.iterations // 4, loss_power=power, step_lr=rate)


def qdrop(**changes: Any) -> tuple[ReconstructionConfig, ...]:
    """Return QDrop's one pass (arXiv:2203.05740): block by block, rounding and steps together, dropping 0.5.

    Departs from the official code (so does ``brecq``), which rounds before it clips: a value up to half a step beyond
    the ends has the gradient of one inside there, and of one clipped here; what that costs is not measured. The
    classifier's unit begins before its average pool, where dropping works on each position and not on each mean.
    """
    return (ReconstructionConfig(**changes),)
