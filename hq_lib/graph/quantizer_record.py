"""The quantizers of a network as plain data, and the way back: what a network file says of each beside its tensors."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hq_lib.graph.layers import QuantizedWeight
from hq_lib.graph.rewrite import QuantizedNet, fresh_quantizers
from hq_lib.graph.spec import QuantizeError
from hq_lib.graph.state import quantizers, weight_layers
from hq_lib.quantizers import AdaRound, FixedGrid, FrozenWeight, Grid, Quantizer

POLICY = "policy"
"""Kind of a quantizer that is as its policy makes it."""
SWITCHES = ("enabled", "observing")
"""What may have been switched on a quantizer since it was made."""


def put(qnet: QuantizedNet, name: str, quantizer: Quantizer) -> None:
    """Make ``quantizer`` that of the layer, or the activation module, called ``name``; mode and owner stay."""
    layer = weight_layers(qnet).get(name)
    old = qnet.get_submodule(name) if layer is None else layer.weight_quantizer
    quantizer.owner = getattr(old, "owner", name)
    quantizer.train(qnet.training)
    if layer is None:
        setattr(qnet, name, quantizer)
    else:
        layer.weight_quantizer = quantizer


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
    if type(quantizer) not in (FixedGrid, FrozenWeight, AdaRound) or quantizer.bits != fresh.bits:
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
        raise ValueError(f"{min(apart)!r} has a quantizer either in the file or in the network only")
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
    grid = Grid(torch.tensor(1.0), torch.tensor(0.0), *ends)
    if entry["kind"] == FixedGrid.__name__:
        return FixedGrid(grid, bits=entry["bits"], axis=entry["axis"], role=role, signed=bool(entry["signed"]))
    makers = {kind.__name__: kind for kind in (FrozenWeight, AdaRound)}
    if layer is None:
        raise ValueError(f"an activation cannot have a {entry['kind']}")
    return makers[entry["kind"]](torch.zeros_like(layer.weight), grid, bits=entry["bits"], axis=entry["axis"])


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
