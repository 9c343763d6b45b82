"""ImageNet networks by name: torchvision's, two more from its builders, and EfficientNet-Lite0 (extra ``imagenet``).

The networks come without weights unless ``weights`` names a file (see ``checkpoints.load_public``); only
EfficientNet-Lite0's are part of a package.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from hq_lib.models.efficientnet_lite import efficientnet_lite0

# RegNetX-600MF: Radosavovic et al. 2020, arXiv:2003.13678, table of RegNetX models
REGNETX_600M = {"depth": 16, "w_0": 48, "w_a": 36.97, "w_m": 2.24, "group_width": 24}


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def make(**options: Any) -> nn.Module:
        from torchvision import models  # slow, and breaks where torch is a CPU-only wheel: only when asked for

        return getattr(models, name)(weights=None, **options)

    return make


def _regnetx_600m(**options: Any) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(**REGNETX_600M), **options)


def _mnasnet2_0(**options: Any) -> nn.Module:
    from torchvision.models.mnasnet import MNASNet

    return MNASNet(2.0, **options)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnet101": _torchvision("resnet101"),
    "mobilenetv2_imagenet": _torchvision("mobilenet_v2"),
    "regnetx_600m": _regnetx_600m,
    "mnasnet2_0": _mnasnet2_0,
    "efficientnet_lite0": efficientnet_lite0,
}
"""Name -> builder; options are those of the builder, ``num_classes`` among them."""
