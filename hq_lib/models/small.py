"""Networks for small images: LeNet, ToyNet, VGG and ResNet, with what all networks here share.

Each class names its paper, its layers, its number of parameters and its departures from the paper.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def initialize_he_(net: nn.Module, *, biases: bool = True) -> None:
    """Draws conv and linear weights from N(0, 2 / fan_in) (torch's generator) and sets biases to 0 if asked, in place.

        var(w) = 2 / n_in        He et al. 2015 (arXiv:1502.01852), eq. 10

    fan_in rather than fan_out, because torch ignores the groups of a depthwise convolution in its fan_out. Batch norms
    keep gain 1 and shift 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if biases and module.bias is not None:
                nn.init.zeros_(module.bias)


def repeated(
    block: Callable[..., nn.Module], c_in: int, c_out: int, n: int, stride: int, **options: Any
) -> list[nn.Module]:
    """``n`` blocks that follow each other, from ``c_in`` to ``c_out`` channels, the first of them of this stride."""
    return [block(c_out if i else c_in, c_out, stride=1 if i else stride, **options) for i in range(n)]


class LeNet(nn.Module):
    """LeNet as in seed 002, 61,706 parameters (1 channel, 10 classes); (B, C, 28, 28) -> (B, n_classes).

        conv 5x5 1->6 pad 2, pool 2 · conv 5x5 6->16, pool 2 · conv 5x5 16->120 · fc 84 · fc 10

    LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II.B. Departures, all the
    seed's: plain average pools, full connectivity in the second convolution, rectified instead of squashed activations,
    a linear classifier instead of radial basis functions.

    Args:
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
        relu1:       clip(x, 0, 1) instead of ReLU: the seed trains with it for its fixed activation scale 1/255.
    """

    def __init__(self, *, n_classes: int = 10, in_channels: int = 1, relu1: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, n_classes)
        self.pool = nn.AvgPool2d(2)
        self.act = nn.Hardtanh(0.0, 1.0) if relu1 else nn.ReLU()
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 28, 28) -> (B, n_classes)."""
        x = self.pool(self.act(self.conv1(x)))  # (B, 6, 14, 14)
        x = self.pool(self.act(self.conv2(x)))  # (B, 16, 5, 5)
        x = self.act(self.conv3(x))  # (B, 120, 1, 1)
        return self.fc2(self.act(self.fc1(torch.flatten(x, 1))))


TOY_STAGES = ((1, 16, 1), (3, 32, 2), (3, 32, 1), (3, 64, 2))
"""blocks, channels, stride of the first block"""
STEM, HEADER, EXPANSION = 16, 512, 4


class ToyBlock(nn.Module):
    """project(relu(expand(bn(depthwise(x'))))) + x' with x' = down(x): 3x3 depthwise, 1x1 to 4 C, 1x1 back to C.

    ``down`` is BN, then a convolution of kernel = stride without padding, where stride or channels change; else x' = x.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.down: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, stride, stride=stride, bias=False)
            self.down = nn.Sequential(nn.BatchNorm2d(in_channels), conv)
        wide = EXPANSION * out_channels
        self.depthwise = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=out_channels, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.expand = nn.Conv2d(out_channels, wide, 1, bias=False)
        self.relu = nn.ReLU()
        self.project = nn.Conv2d(wide, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        x = self.down(x)
        branch = self.relu(self.expand(self.bn(self.depthwise(x))))
        return self.project(branch) + x


class ToyNet(nn.Module):
    """The small hardware-friendly network of seed 001 (no paper); (B, C, 32, 32) normalised -> (B, n_classes) logits.

        stem 3x3 3->16, BN · 10 blocks in stages of (1, 3, 3, 3) with (16, 32, 32, 64) channels and strides (1, 2, 1, 2)
        · header 1x1 64->512, BN · global average pool · fc 512->10

    203,626 parameters (3 channels, 10 classes), 25,265,152 conv and fc MACs. Stem and header have no ReLU; each block
    has exactly one. Only the header's, the stem's and the depthwise convolutions are followed by a BN, so the two 1x1
    convolutions of a block carry the scale of its branch themselves.

    Args:
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
    """

    def __init__(self, *, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(STEM)
        blocks, channels = [], STEM
        for n, width, stride in TOY_STAGES:
            blocks += repeated(ToyBlock, channels, width, n, stride)
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.header = nn.Conv2d(channels, HEADER, 1, bias=False)
        self.header_bn = nn.BatchNorm2d(HEADER)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(HEADER, n_classes)
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W multiples of 4 -> (B, n_classes)."""
        x = self.blocks(self.stem_bn(self.stem(x)))
        x = self.header_bn(self.header(x))
        return self.fc(torch.flatten(self.pool(x), 1))


VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M", 4096, 4096)
VGG_SMALL = (128, 128, "M", 256, 256, "M", 512, 512, "M")
IN_PX = 32


class VGG(nn.Module):
    """A plain stack of convolutions with BN and ReLU, then linear layers; (B, C, 32, 32) -> (B, n_classes) logits.

        VGG11      64 M 128 M 256 256 M 512 512 M 512 512 M, fc 4096, 4096, 10      28,146,762 parameters
        VGG_SMALL  128 128 M 256 256 M 512 512 M, one fc                             4,660,106 parameters

    Column "A" of Simonyan and Zisserman 2015 (arXiv:1409.1556, table 1); the VGG-Small of LQ-Nets (arXiv:1807.10029,
    section 5.1) and of most papers on binary and low-bit networks. Numbers are 3x3 convolutions of that many channels,
    M is a 2x2 max pool. Departures: BN (absent in 2015), no dropout, a width factor, and ``hidden``: 4096 units are
    ImageNet's, forms for CIFAR have 512.

    Args:
        layout:      channels of each convolution, "M" for each max pool; after the last pool, widths of linear layers.
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
        width:       factor > 0 on every number of the layout (rounded, at least 1), else ``ValueError``.
        hidden:      units >= 1 of each hidden linear layer in place of the layout's, before the factor; ``ValueError``
                     for a layout without hidden linear layers.
    """

    def __init__(
        self,
        layout: Sequence[int | str],
        *,
        n_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < width < math.inf:
            raise ValueError(f"VGG width {width!r}: a positive factor on the number of channels is needed, e.g. 0.25")
        if hidden is not None and not hidden >= 1:
            raise ValueError(f"VGG hidden={hidden!r}: a layer has at least one unit")
        last = len(layout) - layout[::-1].index("M")
        if hidden is not None and last == len(layout):
            raise ValueError(f"VGG hidden={hidden}: this layout has no hidden linear layer, leave the option out")
        if hidden is not None:
            layout = [*layout[:last], *(hidden for _ in layout[last:])]
        sizes = [size if isinstance(size, str) else max(1, round(size * width)) for size in layout]
        parts: list[nn.Module] = []
        channels = in_channels
        for size in sizes[:last]:
            if isinstance(size, str):
                parts.append(nn.MaxPool2d(2))
            else:
                parts += [nn.Conv2d(channels, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
                channels = size
        px = IN_PX // 2 ** sizes.count("M")
        widths = [channels * px * px, *map(int, sizes[last:])]
        hidden_layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Sequential(*hidden_layers, nn.Linear(widths[-1], n_classes))
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 32, 32) -> (B, n_classes)."""
        return self.classifier(torch.flatten(self.features(x), 1))


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


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), two 3x3 convolutions without bias."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        if stride == 1 and in_channels == out_channels:
            self.shortcut: nn.Module = nn.Identity()
        elif option == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-20/32/44/56 for CIFAR (He et al. 2016, arXiv:1512.03385, section 4.2); (B, C, 32, 32) -> (B, n_classes).

    Three stages of n = (depth - 2) / 6 basic blocks with 16, 32 and 64 channels; strides 1, 2, 2; 8x8 average pooling;
    one linear layer. Where the shape changes, the shortcut is either

        option "A": every second pixel, new channels filled with zeros; no parameters
        option "B": a 1x1 convolution with batch norm (the form of the group's ResNet-20, 272,474 parameters)

    Args:
        depth:       20, 32, 44 or 56; anything else raises ``ValueError``.
        option:      "A" or "B".
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
        initialize_he_(self, biases=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised images -> (B, n_classes) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))
