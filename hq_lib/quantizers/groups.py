"""How an optimiser should treat learned quantizer parameters; ``hq_lib.training.config`` makes its groups from this."""

from __future__ import annotations

from torch import nn

from hq_lib.quantizers.base import Quantizer, Tag


def parameter_tags(net: nn.Module) -> dict[str, Tag]:
    """Return the tag of every learned quantizer parameter in ``net``, by its full name (``layer.act.alpha``)."""
    return {
        f"{path}.{name}" if path else name: module.tags[name]
        for path, module in net.named_modules()
        if isinstance(module, Quantizer)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }
