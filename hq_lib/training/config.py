"""What a training run is: a frozen record, its learning-rate schedule and its parameter groups."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from hq_lib.graph.layers import is_norm
from hq_lib.quantizers.base import Tag, parameter_tags
from hq_lib.results.settings import Bound, Settings

AUTO = "auto"
MOMENTUM = 0.9


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Everything that decides the weights a run ends with, apart from the network and the images."""

    epochs: Annotated[int, Bound(">= 1", whole=True)]
    """Passes over the training images, >= 1."""
    lr: Annotated[float, Bound("> 0")]
    """Peak learning rate of SGD with Nesterov's momentum (``MOMENTUM``)."""
    batch_size: Annotated[int, Bound(">= 1", whole=True)] = 128
    """Images per step."""
    weight_decay: float = 5e-4
    """L2 factor on weights; biases, norms and vectors have none, parameters of quantizers as their tags say."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0, epochs; then half a cosine to 0, which is why the last epoch's weights are kept."""
    label_smoothing: Annotated[float, Bound(">= 0 and < 1")] = 0.0
    """Share of the target given to all classes alike, in [0, 1)."""
    distill: Annotated[float, Bound(">= 0 and <= 1")] = 0.0
    """Share of the loss that is the distance to a teacher's logits, in [0, 1]; above 0, ``fit`` needs the teacher."""
    pad: Annotated[int, Bound(">= 0", whole=True)] = 4
    """Zero pixels added on each side before the random crop; 0 = no crop."""
    flip: bool = True
    """Random left-right flip."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """"float32", "bfloat16" (autocast: convolutions and linear layers in bfloat16, weights stay float32), or "auto":
    what ``machine.settled`` chooses when the run begins."""
    weight_noise: Annotated[float, Bound(">= 0 and < 1")] = 0.0
    """Noise-aware training for analog arrays: standard deviation of fresh errors of every convolution's and linear
    layer's weights in each step, a fraction of the largest |w| of the output channel (``training.weight_noise``)."""
    drive_bits: Annotated[int, Bound(">= 0 and <= 16", whole=True)] = 0
    """The same through drives: inputs of every such layer have so many bits while it trains, 2..16; 0: ideal ones."""
    converter_bits: Annotated[int, Bound(">= 0 and <= 16", whole=True)] = 0
    """The same through converters: outputs of every such layer."""
    compile: Literal[True, False, "auto"] = False
    """Run the training steps through ``torch.compile``; "auto" as above."""
    seed: int = 0
    """Decides batch order, augmentation and everything random in the network, epoch by epoch."""


def lr_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate at a step as a share of ``config.lr``, in [0, 1]; a pure function, so a resumed run agrees.

    (1 + cos(pi t)) / 2 after the linear warm-up, t from 0 to 1        Loshchilov & Hutter 2017, eq. 5
    """
    total, warmup = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def parameter_groups(net: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """SGD's groups: weights with decay; biases and norms without; a quantizer's parameters as their tags say.

    Learned clips, steps and bounds carry a ``Tag`` (own learning-rate factor, decay or not); see ``hq_lib.quantizers``.
    """
    tags = parameter_tags(net)
    normed = {id(p) for m in net.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            none = id(parameter) in normed or "bias" in name.rpartition(".")[2]
            tag = tags.get(name) or Tag(lr_factor=1.0, decay=parameter.ndim > 1 and not none)
            decay = config.weight_decay if tag.decay else 0.0
            groups.setdefault((tag.lr_factor, decay), []).append(parameter)
    return [
        {"params": members, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def sgd(net: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum over ``parameter_groups``; ``set_lr`` must be called before each step."""
    return torch.optim.SGD(parameter_groups(net, config), lr=config.lr, momentum=MOMENTUM, nesterov=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's rate to ``lr`` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
