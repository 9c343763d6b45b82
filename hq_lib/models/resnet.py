"""ResNet-20/32/44/56 for CIFAR (He et al. 2016, arXiv:1512.03385, section 4.2).

Three stages of n = (depth - 2) / 6 basic blocks with 16, 32 and 64 channels; strides 1, 2, 2; 8x8 average pooling;
one linear layer. Where the shape changes, the shortcut is either

    option "A": every second pixel, new channels filled with zeros; no parameters
    option "B": a 1x1 convolution with batch norm (the form of the group's ResNet-20, 272,474 parameters)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.models.shared import repeated

DEPTHS = (20, 32, 44, 56)
WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: subsample by the stride and pad the channels with zeros, half before and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.stride = stride
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(in_channels: int, out_channels: int, stride: int, option: str) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), two 3x3 convolutions without bias."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR ResNet of the given depth; (B, 3, 32, 32) normalised images -> (B, n_classes) logits.

    Args:
        depth:       20, 32, 44 or 56; anything else raises ``ValueError``.
        option:      "A" or "B", see the module docstring.
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
    """

    def __init__(self, depth: int = 20, *, option: str = "B", n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"ResNet depth {depth}: choose one of {DEPTHS}")
        if option not in ("A", "B"):
            raise ValueError(f"ResNet shortcut option {option!r}: choose 'A' (zero padding) or 'B' (1x1 convolution)")
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = nn.Sequential(*repeated(BasicBlock, WIDTHS[0], WIDTHS[0], n_blocks, 1, option=option))
        self.layer2 = nn.Sequential(*repeated(BasicBlock, WIDTHS[0], WIDTHS[1], n_blocks, 2, option=option))
        self.layer3 = nn.Sequential(*repeated(BasicBlock, WIDTHS[1], WIDTHS[2], n_blocks, 2, option=option))
        self.pool = nn.AvgPool2d(8)
        self.linear = nn.Linear(WIDTHS[2], n_classes)
        self.apply(_init_he)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised images -> (B, n_classes) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


def _init_he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
