"""LeNet (LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II.B), as in seed 002.

    conv 5x5 1->6 pad 2, pool 2 · conv 5x5 6->16, pool 2 · conv 5x5 16->120 · fc 84 · fc 10        61,706 parameters

Departures from the paper, all the seed's: plain average pools, full connectivity in the second convolution, rectified
instead of squashed activations, a linear classifier instead of radial basis functions.
"""

import torch
from torch import Tensor, nn

from hq_lib.models.shared import initialize_he_

PADDING = {28: 2, 32: 0}  # of the first convolution, by image size: both leave 28 x 28 after it


class LeNet(nn.Module):
    """LeNet with 61,706 parameters (1 channel, 10 classes); (B, C, in_size, in_size) images -> (B, n_classes) logits.

    Args:
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
        in_size:     pixels: 28 (MNIST, padded by 2) or 32 (no padding); anything else raises ``ValueError``.
        relu1:       clip(x, 0, 1) instead of ReLU: the seed trains with it for its fixed activation scale 1/255.
    """

    def __init__(self, *, n_classes: int = 10, in_channels: int = 1, in_size: int = 28, relu1: bool = False) -> None:
        super().__init__()
        if in_size not in PADDING:
            raise ValueError(f"LeNet in_size {in_size!r}: choose one of {tuple(PADDING)} (pixels)")
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=PADDING[in_size])
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, n_classes)
        self.pool = nn.AvgPool2d(2)
        self.act = nn.Hardtanh(0.0, 1.0) if relu1 else nn.ReLU()
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, in_size, in_size) -> (B, n_classes)."""
        x = self.pool(self.act(self.conv1(x)))  # (B, 6, 14, 14)
        x = self.pool(self.act(self.conv2(x)))  # (B, 16, 5, 5)
        x = self.act(self.conv3(x))  # (B, 120, 1, 1)
        return self.fc2(self.act(self.fc1(torch.flatten(x, 1))))
