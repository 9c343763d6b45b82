"""Optimiser groups: which learned quantizer parameters want their own learning rate, and which no weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hq_lib.quantizers.base import Quantizer, Tag

PLAIN = Tag(lr_factor=1.0, decay=True)


def parameter_tags(net: nn.Module) -> dict[str, Tag]:
    """Return the tag of every learned quantizer parameter in ``net``, by its full name (``layer.act.alpha``)."""
    return {
        f"{path}.{name}" if path else name: module.tags[name]
        for path, module in net.named_modules()
        if isinstance(module, Quantizer)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def parameter_groups(
    net: nn.Module, *, lr: float, weight_decay: float, overrides: Mapping[str, Tag] | None = None
) -> list[dict[str, Any]]:
    """Return groups for a torch optimiser: the net's own parameters first, then one per kind of quantizer parameter.

    Args:
        net: any module; parameters that need no gradient are left out.
        lr: learning rate of the weights; a tag's lr_factor multiplies it.
        weight_decay: decay of the weights; tags with ``decay=False`` get 0.
        overrides: another Tag by parameter kind ("alpha", "step_size", "beta", "low", "high", "dsq_alpha_raw").

    Each group has ``name`` ("net" or the kind), ``params``, ``lr``, ``weight_decay``; every trainable parameter is in
    exactly one. Raises ValueError if ``overrides`` names a kind that the net does not have.
    """
    tags = parameter_tags(net)
    kinds = {full.rsplit(".", 1)[-1] for full in tags}
    for kind in set(overrides or {}) - kinds:
        learned = ", ".join(sorted(kinds)) or "nothing"
        raise ValueError(f"overrides name {kind!r}, but the quantizers of this net learn {learned}")
    groups: dict[str, dict[str, Any]] = {"net": _group("net", PLAIN, lr, weight_decay)}
    for full, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = full.rsplit(".", 1)[-1] if full in tags else "net"
        tag = (overrides or {}).get(kind, tags.get(full, PLAIN))
        groups.setdefault(kind, _group(kind, tag, lr, weight_decay))["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _group(name: str, tag: Tag, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": [], "lr": lr * tag.lr_factor, "weight_decay": weight_decay if tag.decay else 0.0}
