"""MobileNetV2 for 32 x 32 images (Sandler et al. 2018, arXiv:1801.04381, table 2), in two published CIFAR-10 forms.

    mobilenetv2       2,296,922 parameters: the form in common use; a block of stride 1 adds its input, through a 1x1
                      convolution with BN where the channels change
    mobilenetv2_seed  2,383,050 parameters: seed 001; *every* block of stride 1 has the 1x1 convolution with BN, and
                      there is no activation after stem and head

Departures from the paper, of both: stride 1 in stem and second stage (the images are 32 pixels wide), and the shortcut
where channels change (the paper has none there; without any the count would be 2,237,770).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.models.shared import initialize_he_, repeated

STAGES = (  # expansion t, channels c, blocks n, stride s of the first one
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
STEM, HEAD = 32, 1280


class InvertedResidual(nn.Module):
    """bn3(conv3(relu6(bn2(conv2(relu6(bn1(conv1(x)))))))) + shortcut(x): 1x1 to t C, depthwise 3x3, linear 1x1.

    A block of stride 2 has no shortcut. With ``always_conv`` even a shortcut between equal shapes is a convolution.
    """

    def __init__(self, c_in: int, c_out: int, *, expansion: int, stride: int, always_conv: bool) -> None:
        super().__init__()
        wide = expansion * c_in
        self.conv1, self.bn1 = nn.Conv2d(c_in, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.adds = stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if self.adds and (always_conv or c_in != c_out):
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.adds else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for CIFAR; (B, C, H, W) normalised images, H and W multiples of 8 -> (B, n_classes) logits.

    Args:
        seed_form:   False: 2,296,922 parameters. True: seed 001's 2,383,050; see the module docstring.
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
    """

    def __init__(self, seed_form: bool = False, *, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.act = nn.Identity() if seed_form else nn.ReLU6()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False), nn.BatchNorm2d(STEM)
        blocks, channels = [], STEM
        for expansion, width, n_blocks, stride in STAGES:
            options = {"expansion": expansion, "always_conv": seed_form}
            blocks += repeated(InvertedResidual, channels, width, n_blocks, stride, **options)
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(STAGES[-1][1], HEAD, 1, bias=False), nn.BatchNorm2d(HEAD)
        self.linear = nn.Linear(HEAD, n_classes)
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, n_classes)."""
        x = self.blocks(self.act(self.bn1(self.conv1(x))))
        x = self.act(self.bn2(self.conv2(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
