"""Networks by name, untrained."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hq_lib.models.imagenet import BUILDERS as IMAGENET
from hq_lib.models.lenet import LeNet
from hq_lib.models.mobilenetv2 import MobileNetV2
from hq_lib.models.resnet import DEPTHS, ResNet
from hq_lib.models.toynet import ToyNet
from hq_lib.models.vgg import VGG, VGG11, VGG_SMALL

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
    """Every network that ``build`` knows, the small ones first."""
    return (*SMALL, *IMAGENET)


def imagenet_names() -> tuple[str, ...]:
    """The ImageNet networks among ``names()``; efficientnet_lite0 needs the extra ``imagenet``."""
    return tuple(IMAGENET)


def build(name: str, *, n_classes: int | None = None, in_channels: int | None = None, **options: Any) -> nn.Module:
    """The untrained network of that name (EfficientNet-Lite0 comes with its weights), weights drawn from torch's seed.

    Args:
        name:        one of ``names()``.
        n_classes:   width of the last layer; default 10, or 1000 for ImageNet networks.
        in_channels: channels of the image; default 3, for LeNet 1. Not for ImageNet networks.
        options:     the network's own: ``option`` (ResNets), ``width`` and ``hidden`` (VGGs), ``relu1`` and ``in_size``
                     (LeNet).

    Raises:
        ValueError: an unknown name or option; names the nearest valid one, or lists the options.
    """
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(names())}{hint}")
    if name in IMAGENET:
        if in_channels not in (None, 3):
            raise ValueError(f"{name} takes RGB images: in_channels={in_channels} is not offered")
        classes = {} if n_classes is None else {"num_classes": n_classes}
        try:
            return IMAGENET[name](**classes, **options)
        except TypeError as error:
            raise ValueError(f"{name} does not take these options: {error}") from error
    sizes = {"n_classes": n_classes, "in_channels": in_channels}
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
