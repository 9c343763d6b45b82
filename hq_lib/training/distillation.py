"""Distillation: the loss of a quantized student that listens to its float teacher."""

import torch.nn.functional as F
from torch import Tensor


def distance(logits: Tensor, taught: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, mean over the images, nats; ``logits``, ``taught`` (B, K).

    Hinton et al. 2015 (arXiv:1503.02531), section 2, in the form of a divergence: the gradient in ``logits`` is that of
    the paper's cross entropy. None flows to ``taught``.
    """
    target = F.log_softmax(taught.detach(), dim=1)
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)
