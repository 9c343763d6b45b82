"""What a training run is: a frozen record, its learning-rate schedule and its parameter groups."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from hq_lib.quantizers.base import Tag
from hq_lib.quantizers.groups import parameter_tags

SCHEDULES = ("cosine", "one_cycle", "step")
AUTO = "auto"
PRECISIONS = ("float32", "bfloat16", AUTO)
KEEPS = ("last", "best_val")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights a run ends with, apart from the network and the images."""

    epochs: int
    """Passes over the training images, >= 1."""
    lr: float
    """Peak learning rate of SGD."""
    batch_size: int = 128
    """Images per step."""
    momentum: float = 0.9
    """SGD momentum; Nesterov's form."""
    weight_decay: float = 5e-4
    """L2 factor on weights; biases, norms and learned clips have none."""
    schedule: str = "cosine"
    """"cosine" (warm-up, then half a cosine to 0), "one_cycle" (30 % linear up, then cosine to 0) or "step"."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0, epochs ("cosine" and "step")."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """"step": fractions of the run after which the rate falls tenfold."""
    label_smoothing: float = 0.0
    """Share of the target given to all classes alike, in [0, 1)."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of weights and statistics, which is then what is kept."""
    pad: int = 4
    """Zero pixels added on each side before the random crop; 0 = no crop."""
    flip: bool = True
    """Random left-right flip."""
    grad_clip: float | None = None
    """Largest gradient norm, or None."""
    precision: str = "float32"
    """"float32", "bfloat16" (autocast: convolutions and linear layers in bfloat16, weights stay float32), or "auto":
    what ``machine.settled`` chooses when the run begins."""
    weight_noise: float = 0.0
    """Noise-aware training for analog arrays: standard deviation of fresh errors of every convolution's and linear
    layer's weights in each step, a fraction of the largest |w| of the output channel (``crossbar.weight_noise``)."""
    compile: bool | str = False
    """Run the training steps through ``torch.compile``; "auto" as above."""
    keep: str = "last"
    """Which epoch's weights the run ends with: "last", or "best_val" (by validation accuracy, never by test)."""
    seed: int = 0
    """Decides batch order, augmentation and everything random in the network, epoch by epoch."""

    def __post_init__(self) -> None:
        for key, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("keep", KEEPS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"TrainConfig.{key}={getattr(self, key)!r}: choose one of {', '.join(allowed)}")
        if self.compile not in (True, False, AUTO):
            raise ValueError(f"TrainConfig.compile={self.compile!r}: choose True, False or {AUTO!r}")
        for key in ("epochs", "batch_size", "lr"):
            if getattr(self, key) <= 0:
                raise ValueError(f"TrainConfig.{key}={getattr(self, key)!r}: must be above 0")
        for key in ("label_smoothing", "weight_noise"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"TrainConfig.{key}={getattr(self, key)!r}: must lie in [0, 1)")

    def as_dict(self) -> dict[str, object]:
        """Field name -> value, ready for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


def lr_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate at a step as a share of ``config.lr``, in [0, 1]; a pure function, so a resumed run agrees.

    cosine:    (1 + cos(pi t)) / 2 after the warm-up, t from 0 to 1       Loshchilov & Hutter 2017, eq. 5
    one_cycle: linear 0 -> 1 over the first 30 %, then the same cosine    after Smith & Topin 2018
    step:      0.1 ** (number of milestones passed)                       He et al. 2016, section 4.2
    """
    total = config.epochs * steps_per_epoch
    warmup = 0.3 * total if config.schedule == "one_cycle" else config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "step":
        return 0.1 ** sum(step >= m * total for m in config.milestones)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def parameter_groups(net: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """SGD's groups: weights with decay; biases and norms without; a quantizer's parameters as their tags say.

    Learned clips, steps and bounds carry a ``Tag`` (own learning-rate factor, decay or not); see ``hq_lib.quantizers``.
    """
    tags = parameter_tags(net)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            tag = tags.get(name) or Tag(lr_factor=1.0, decay=parameter.ndim > 1)
            decay = config.weight_decay if tag.decay else 0.0
            groups.setdefault((tag.lr_factor, decay), []).append(parameter)
    return [
        {"params": members, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def sgd(net: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum over ``parameter_groups``; ``set_lr`` must be called before each step."""
    groups = parameter_groups(net, config)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's rate to ``lr`` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
