"""ToyNet, the small hardware-friendly network of seed 001 (no paper): 203,626 parameters, 25,265,152 conv and fc MACs.

    stem 3x3 3->16, BN · 10 blocks in stages of (1, 3, 3, 3) with (16, 32, 32, 64) channels and strides (1, 2, 1, 2)
    · header 1x1 64->512, BN · global average pool · fc 512->10

Stem and header have no ReLU; each block has exactly one. Only the header's, the stem's and the depthwise convolutions
are followed by a BN, so the two 1x1 convolutions of a block carry the scale of its branch themselves.
"""

import torch
from torch import Tensor, nn

from hq_lib.models.shared import initialize_he_, repeated

N_BLOCKS = (1, 3, 3, 3)
WIDTHS = (16, 32, 32, 64)
STRIDES = (1, 2, 1, 2)
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
    """ToyNet, 203,626 parameters (3 channels, 10 classes); (B, C, 32, 32) normalised images -> (B, n_classes) logits.

    Args:
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
    """

    def __init__(self, *, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(STEM)
        stages = zip((STEM, *WIDTHS), WIDTHS, N_BLOCKS, STRIDES, strict=False)
        self.blocks = nn.Sequential(*(block for stage in stages for block in repeated(ToyBlock, *stage)))
        self.header = nn.Conv2d(WIDTHS[-1], HEADER, 1, bias=False)
        self.header_bn = nn.BatchNorm2d(HEADER)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(HEADER, n_classes)
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W multiples of 4 -> (B, n_classes)."""
        x = self.blocks(self.stem_bn(self.stem(x)))
        x = self.header_bn(self.header(x))
        return self.fc(torch.flatten(self.pool(x), 1))
