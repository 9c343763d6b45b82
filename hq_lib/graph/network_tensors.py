"""The tensors of a network file: what a quantized network computes with, integers packed, nothing twice."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_lib.graph.quantizer_record import n_bits, rebuild
from hq_lib.graph.rewrite import QuantizedNet
from hq_lib.graph.spec import QuantizeError
from hq_lib.graph.state import quantizers, weight_layers
from hq_lib.models import CheckpointError
from hq_lib.quantizers import FixedGrid, FrozenWeight, Quantizer
from hq_lib.results.bits import pack, unpack


def tensors_of(qnet: QuantizedNet, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what goes into the file of ``qnet``, whose ``record`` has its "form" and its "quantizers".

    Raises:
        QuantizeError: names a tensor of real numbers that are not float32.
    """
    state, implied = _state(qnet), _implied(qnet, record["form"])
    for name, quantizer in _integer_weights(qnet).items():
        entry = record["quantizers"][name]
        index = (quantizer.x_int.flatten().numpy() - entry["qmin"]) // entry["step"]
        state[f"{name}.weight_quantizer.x_int"] = torch.from_numpy(pack(index, n_bits(entry)))
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            raise QuantizeError(f"{key!r} is {value.dtype}: a network file holds float32; call qnet.float() first")
    return {key: value for key, value in state.items() if key not in implied}


@torch.no_grad()
def restore(qnet: QuantizedNet, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Put the quantizers and tensors of a file into ``qnet``, which its policy made and nothing has fitted.

    Raises:
        CheckpointError: names a tensor that is missing, left over, of another shape, or no grid.
    """
    for name, layer in weight_layers(qnet).items():
        if layer.bias is None and f"{name}.bias" in tensors:  # as a correction gives one to a layer that had none
            layer.bias = nn.Parameter(torch.zeros_like(tensors[f"{name}.bias"]))
    rebuild(qnet, record["quantizers"])
    own, implied, state = _state(qnet), _implied(qnet, record["form"]), dict(tensors)
    if apart := (own.keys() - implied) ^ state.keys():
        raise CheckpointError(f"{len(apart)} tensors are in the file or in the network only, {min(apart)!r} first")
    for name in _integer_weights(qnet):
        entry, key = record["quantizers"][name], f"{name}.weight_quantizer.x_int"
        index = unpack(state[key].numpy(), n_bits(entry), own[key].numel())
        state[key] = torch.from_numpy((index * entry["step"] + entry["qmin"]).astype(np.int32)).view(own[key].shape)
    inside = _prefixes(qnet)
    for key, value in state.items():
        fits = value.shape == own[key].shape or (own[key].ndim == 0 and key.startswith(inside))  # unfitted: no channels
        if not fits or value.dtype != own[key].dtype:
            raise CheckpointError(f"{key!r} is {tuple(value.shape)} {value.dtype} in the file, "
                                  f"{tuple(own[key].shape)} {own[key].dtype} in the network")  # fmt: skip
    known = qnet.state_dict()
    qnet.load_state_dict({key: state.get(key, value) for key, value in known.items()})
    for key in own.keys() - known.keys():
        own[key].copy_(state[key])
    _check_grids(qnet)
    if record["form"] == "frozen":
        for name in _integer_weights(qnet):
            layer = weight_layers(qnet)[name]
            layer.weight = nn.Parameter(layer.eval().quantized_weight(), requires_grad=False)
    if record["channels_last"]:
        qnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _state(qnet: QuantizedNet) -> dict[str, Tensor]:
    """Every tensor that ``qnet`` computes with: its state, and what is registered as no part of it."""
    inside = _prefixes(qnet)
    loose: dict[str, Any] = {name: value for name, value in qnet.named_buffers() if not name.startswith(inside)}
    for node in qnet.graph.nodes:
        if node.op == "get_attr":
            holder, _, last = str(node.target).rpartition(".")
            loose[str(node.target)] = getattr(qnet.get_submodule(holder), last)
    state = {**loose, **qnet.state_dict()}
    del state["_extra_state"]  # the policy is in the record
    return state


def _prefixes(qnet: QuantizedNet) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in qnet.named_modules() if isinstance(module, Quantizer))


def _implied(qnet: QuantizedNet, form: str) -> set[str]:
    """Names of the tensors that the record and the other tensors determine."""
    fixed = [name for name, module in qnet.named_modules() if isinstance(module, FixedGrid)]
    known = {f"{name}.{key}" for name in fixed for key in ("initialised", "spec")}
    return known | ({f"{name}.weight" for name in _integer_weights(qnet)} if form == "frozen" else set())


def _integer_weights(qnet: QuantizedNet) -> dict[str, FrozenWeight]:
    found = {name: layer.weight_quantizer for name, layer in weight_layers(qnet).items()}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, FrozenWeight)}


def _check_grids(qnet: QuantizedNet) -> None:
    shapes = {name: layer.weight.shape for name, layer in weight_layers(qnet).items()}
    shapes |= {site.quantizer: torch.Size([1, *site.shape]) for site in qnet.meta["sites"]}
    for name, quantizer in quantizers(qnet).items():
        if not quantizer.initialised:
            continue
        scale, zero_point, *_ = quantizer.grid()
        n = 1 if quantizer.axis is None else shapes[name][quantizer.axis]
        if scale.numel() != n or torch.broadcast_shapes(scale.shape, zero_point.shape, shapes[name]) != shapes[name]:
            raise CheckpointError(f"{name!r}: a grid of {tuple(scale.shape)} scales does not fit {tuple(shapes[name])}")
        if not (torch.isfinite(scale) & (scale > 0)).all() or not torch.isfinite(zero_point).all():
            raise CheckpointError(f"{name!r}: its scales are not all finite and positive")
