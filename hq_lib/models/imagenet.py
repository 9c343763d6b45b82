"""ImageNet networks by name: torchvision's, two more from its builders, EfficientNet-Lite (extra ``imagenet``).

They come untrained; ``published`` fetches torchvision's weights. Only EfficientNet-Lite's are part of a package.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from hq_lib.models import efficientnet_lite
from hq_lib.models.public import CheckpointError

# RegNetX-600MF: Radosavovic et al. 2020, arXiv:2003.13678, table of RegNetX models
REGNETX_600M = {"depth": 16, "w_0": 48, "w_a": 36.97, "w_m": 2.24, "group_width": 24}
TORCHVISION = {"mobilenetv2_imagenet": "mobilenet_v2"}
"""Name here -> torchvision's, where the two differ"""


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def make(**options: Any) -> nn.Module:
        from torchvision import models  # slow, and breaks where torch is a CPU-only wheel: only when asked for

        return models.get_model(TORCHVISION.get(name, name), weights=None, **options)

    return make


def _regnetx_600m(**options: Any) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(**REGNETX_600M), **options)


def _mnasnet2_0(**options: Any) -> nn.Module:
    from torchvision.models.mnasnet import MNASNet

    return MNASNet(2.0, **options)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{name: _torchvision(name) for name in ("resnet18", "resnet50", "resnet101", "mobilenetv2_imagenet")},
    "regnetx_600m": _regnetx_600m,
    "mnasnet2_0": _mnasnet2_0,
    **{f"efficientnet_lite{i}": partial(efficientnet_lite.efficientnet_lite, i) for i in efficientnet_lite.FORMS},
}
"""Name -> builder of the networks that tables name; options are those of the builder, ``num_classes`` among them."""


def torchvision_names() -> list[str]:
    """Every classifier of torchvision's, by its name there."""
    from torchvision import models

    return models.list_models(module=models)


def builder(name: str) -> Callable[..., nn.Module] | None:
    """The builder of an ImageNet network, torchvision's others among them; None where there is none of that name."""
    return BUILDERS.get(name) or (_torchvision(name) if name in torchvision_names() else None)


def taken(name: str) -> Mapping[str, object] | None:
    """What a network that is built with its weights takes, fields of ``DataSpec``; None for all others."""
    lites = {f"efficientnet_lite{i}": i for i in efficientnet_lite.FORMS}
    return efficientnet_lite.images(lites[name]) if name in lites else None


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
