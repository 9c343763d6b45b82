"""Distillation: the loss of a quantized student that listens to its float teacher."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation(
    teacher: nn.Module, share: float, label_smoothing: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss (1 - share) CE(logits, labels) + share KL(teacher || student), temperature 1.

    Hinton et al. 2015 (arXiv:1503.02531), eq. 1 and section 2.

    Raises ``ValueError`` for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"distill={share!r}: the share of the teacher lies in [0, 1]")
    teacher = teacher.eval()

    def loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher(images).float(), dim=1)
        distance = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)
        return (1 - share) * F.cross_entropy(logits, labels, label_smoothing=label_smoothing) + share * distance

    return loss
