"""What a network file holds of a quantized network: each quantizer as plain data, and tensors, integers packed."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_lib.graph.layers import QuantizedWeight
from hq_lib.graph.rewrite import QuantizedNet, fresh_quantizers
from hq_lib.graph.spec import QuantizeError
from hq_lib.graph.state import put, quantizers, weight_layers
from hq_lib.graph.tracing import channels_last_
from hq_lib.models import CheckpointError
from hq_lib.quantizers import AdaRound, FixedGrid, FrozenWeight, Grid, Quantizer
from hq_lib.results.bits import pack, unpack

POLICY = "policy"
"""Kind of a quantizer that is as its policy makes it."""
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (FixedGrid, FrozenWeight, AdaRound)}
"""The other kinds: what PTQ or freezing puts there."""
SWITCHES = ("enabled", "observing")
"""What may have been switched on a quantizer since it was made."""


def describe(qnet: QuantizedNet) -> dict[str, dict[str, Any]]:
    """Return what each quantizer is: of kind "policy", or one that PTQ or freezing put there, with its grid's ends.

    Raises:
        QuantizeError: names the tensor whose quantizer is neither, contradicts the policy, or is still being learned.
    """
    found, fresh = quantizers(qnet), fresh_quantizers(qnet)
    if apart := found.keys() ^ fresh.keys():
        raise QuantizeError(f"{min(apart)!r} has a quantizer, or none, against its policy: make the network with a "
                            "policy that says so")  # fmt: skip
    return {name: _entry(name, q, fresh[name]) for name, q in found.items()}


def _entry(name: str, quantizer: Quantizer, fresh: Quantizer) -> dict[str, Any]:
    switched = {key: getattr(quantizer, key) for key in SWITCHES if not getattr(quantizer, key, True)}
    if type(quantizer) is type(fresh) and _settings(quantizer) == _settings(fresh):
        return {"kind": POLICY, **switched}
    if type(quantizer) not in KINDS.values() or quantizer.bits != fresh.bits:
        raise QuantizeError(f"{name!r}: its quantizer, {quantizer}, is not what its policy makes ({fresh}): put that "
                            "into the policy, so that it can be made again")  # fmt: skip
    if getattr(quantizer, "soft", False):
        raise QuantizeError(f"{name!r}: its rounding is still being learned; save when reconstruct has returned")
    plain = {key: getattr(quantizer, key) for key in ("bits", "signed", "axis", "qmin", "qmax", "step")}
    return {"kind": type(quantizer).__name__, **plain, **switched}


def _settings(quantizer: Quantizer) -> dict[str, Any]:
    plain = {key: v for key, v in vars(quantizer).items() if isinstance(v, bool | int | float | str | None)}
    return {key: v for key, v in plain.items() if key not in (*SWITCHES, "training", "owner", "_ready")}


def rebuild(qnet: QuantizedNet, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the quantizers that ``describe`` described into ``qnet``, unfitted, made by the same policy."""
    found = quantizers(qnet)
    if apart := found.keys() ^ entries.keys():
        raise ValueError(
            f"saved by an older version, which gave other tensors a grid ({min(apart)!r} in one of the two only): "
            "quantize the network again"
        )
    for name, entry in entries.items():
        if entry["kind"] != POLICY:
            put(qnet, name, _built(entry, found[name].role, weight_layers(qnet).get(name)))
        for key in SWITCHES:
            if key in entry:
                setattr(quantizers(qnet)[name], key, bool(entry[key]))


def _built(entry: Mapping[str, Any], role: Any, layer: QuantizedWeight | None) -> Quantizer:
    ends = [entry[key] for key in ("qmin", "qmax", "step")]
    if not all(type(v) is int for v in ends) or not ends[0] < ends[1] or ends[2] not in (1, 2) or n_bits(entry) > 17:
        raise ValueError(f"a grid cannot run from {ends[0]!r} to {ends[1]!r} by {ends[2]!r}")
    grid, own = Grid(torch.tensor(1.0), torch.tensor(0.0), *ends), {key: entry[key] for key in ("bits", "axis")}
    if entry["kind"] == FixedGrid.__name__:
        return FixedGrid(grid, role=role, signed=bool(entry["signed"]), **own)
    if layer is None:
        raise ValueError(f"an activation cannot have a {entry['kind']}")
    return KINDS[entry["kind"]](torch.zeros_like(layer.weight), grid, **own)


def n_bits(entry: Mapping[str, Any]) -> int:
    """Return how many bits an integer of this grid takes."""
    return ((entry["qmax"] - entry["qmin"]) // entry["step"]).bit_length()


@torch.no_grad()
def frozen(qnet: QuantizedNet) -> QuantizedNet:
    """Return a copy of ``qnet`` whose weights are integers on their grids and whose activation grids are constants.

    Raises:
        QuantizeError: names the tensor whose quantizer is not fitted, switched off, or not on the grid it names.
    """
    qnet = copy.deepcopy(qnet)
    layers = weight_layers(qnet)
    for name, quantizer in quantizers(qnet).items():
        if not quantizer.enabled:
            raise QuantizeError(f"{name!r}: its quantizer is switched off; switch it on (graph.set_quantization), or "
                                "save the trainable form")  # fmt: skip
        try:
            put(qnet, name, _frozen(quantizer, layers.get(name)))
        except (RuntimeError, ValueError) as error:
            raise QuantizeError(f"{name!r} cannot be frozen: {error}") from error
        if name in layers:
            layers[name].weight = nn.Parameter(layers[name].quantized_weight(), requires_grad=False)
    return qnet


def _frozen(quantizer: Quantizer, layer: QuantizedWeight | None) -> Quantizer:
    if layer is None:
        grid = _compact(quantizer.grid())
        return FixedGrid(grid, bits=quantizer.bits, axis=quantizer.axis, role="act", signed=quantizer.signed)
    w_hat = quantizer(layer.weight)
    x_int, grid = quantizer.integers(layer.weight)
    new = FrozenWeight(x_int, _compact(grid), bits=quantizer.bits, axis=quantizer.axis)
    if not torch.equal(new.eval()(layer.weight), w_hat):
        raise ValueError(f"{quantizer} gives weights that are not on the grid it names")
    return new


def _compact(grid: Grid) -> Grid:
    """Return ``grid`` with one zero point where all channels have the same."""
    first: Tensor = grid.zero_point.flatten()[0]
    return grid._replace(zero_point=first) if bool((grid.zero_point == first).all()) else grid


def refuse_other_floats(qnet: QuantizedNet) -> None:
    """Raise ``QuantizeError`` that names a tensor of real numbers of ``qnet`` that are not float32."""
    for key, value in _state(qnet).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            raise QuantizeError(f"{key!r} is {value.dtype}: a network file holds float32; call qnet.float() first")


def tensors_of(qnet: QuantizedNet, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what goes into the file of ``qnet``, whose ``record`` has its "form" and its "quantizers"."""
    state, implied = _state(qnet), _implied(qnet, record["form"])
    for name, quantizer in _integer_weights(qnet).items():
        entry = record["quantizers"][name]
        index = (quantizer.x_int.flatten().numpy() - entry["qmin"]) // entry["step"]
        state[f"{name}.weight_quantizer.x_int"] = torch.from_numpy(pack(index, n_bits(entry)))
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
        channels_last_(qnet)


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
