"""Starting weights shared by the networks of this package."""

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
