"""What the networks of this package share: starting weights, and stages of equal blocks."""

from collections.abc import Callable
from typing import Any

from torch import nn


def initialize_he_(net: nn.Module) -> None:
    """Draws conv and linear weights from N(0, 2 / fan_in) (torch's generator) and sets biases to 0, in place.

        var(w) = 2 / n_in        He et al. 2015 (arXiv:1502.01852), eq. 10

    fan_in rather than fan_out, because torch ignores the groups of a depthwise convolution in its fan_out. Batch norms
    keep gain 1 and shift 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def repeated(
    block: Callable[..., nn.Module], c_in: int, c_out: int, n: int, stride: int, **options: Any
) -> list[nn.Module]:
    """``n`` blocks that follow each other, from ``c_in`` to ``c_out`` channels, the first of them of this stride."""
    return [block(c_out if i else c_in, c_out, stride=1 if i else stride, **options) for i in range(n)]
