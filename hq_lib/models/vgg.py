"""VGG networks for 32 x 32 images (Simonyan and Zisserman 2015, arXiv:1409.1556, table 1), with batch norm.

    vgg11      column "A": 64 M 128 M 256 256 M 512 512 M 512 512 M, fc 4096, 4096, 10        28,146,762 parameters
    vgg_small  128 128 M 256 256 M 512 512 M, one fc (the VGG-Small of LQ-Nets, arXiv:1807.10029, section 5.1, and of
               most papers on binary and low-bit networks)                                      4,660,106 parameters

Numbers are 3x3 convolutions of that many channels, each with BN and ReLU; M is a 2x2 max pool.
Departures from the papers: BN (absent in 2015), no dropout, a width factor, and ``hidden``: 4096 units are ImageNet's,
forms for CIFAR have 512.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hq_lib.models.shared import initialize_he_

VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M", 4096, 4096)
VGG_SMALL = (128, 128, "M", 256, 256, "M", 512, 512, "M")
IN_PX = 32


class VGG(nn.Module):
    """A plain stack of convolutions, then linear layers; (B, C, 32, 32) normalised images -> (B, n_classes) logits.

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
