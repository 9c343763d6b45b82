"""What a layer puts into on-chip memory: arrays with the numbers that explain them, from either integer record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hq_lib.deploy.fpga.layers import FpgaiLayer, FpgaiNet, Stage
from hq_lib.integer import record

DTYPES = ("uint8", "int8", "int16", "int32")
ROLES = ("weight", "bias", "multiplier", "shift", "residual_multiplier")


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """The memories of one layer."""

    name: str
    """layer name"""
    parameters: dict[str, Any]
    """plain JSON data. Always: "kind" (conv, linear), "scale" (real units per weight step, a number or one per output
    channel), "multiplier" and "shift" (integers, or one per channel; None where accumulators leave as they are),
    "zero_point" (of the weights); then geometry and activations as the record has them"""
    arrays: dict[str, np.ndarray]
    """"weight" and "bias", C order; an ``IntegerModel`` adds the tables "multiplier", "shift" and, with a residual,
    "residual_multiplier" """


def memories_of(model: FpgaiNet | record.IntegerModel) -> tuple[LayerMemory, ...]:
    """Return the memories of every convolution and linear layer of ``model``, in execution order."""
    if isinstance(model, FpgaiNet):
        return tuple(_fpgai(*pair) for pair in zip(model.stages, model.layers, strict=True))
    return tuple(_integer(op, model) for op in model.layers())


def _fpgai(stage: Stage, layer: FpgaiLayer) -> LayerMemory:
    numbers = {"scale": layer.scale, "multiplier": layer.multiplier, "shift": layer.shift}
    geometry = {key: value for key, value in asdict(stage).items() if key not in ("name", "shape")}
    kind = "conv" if layer.weight.ndim == 4 else "linear"
    activations = {"input": _grid(1 / 255, 0, 0, 255), "requantizer": "fpgai"}
    parameters = {"kind": kind, **numbers, "zero_point": layer.zero_point, **geometry, **activations}
    return LayerMemory(layer.name, parameters, {"weight": layer.weight, "bias": layer.bias})


def _integer(op: record.Layer, model: record.IntegerModel) -> LayerMemory:
    arrays, requant = {"weight": op.weight, "bias": op.bias}, op.requant
    parameters: dict[str, Any] = {
        "kind": type(op).__name__.lower(), "scale": _floats(op.weight_scale), "multiplier": None, "shift": None,
        "zero_point": 0, "weight_bits": op.weight_bits, "weight_step": op.weight_step,
        "requantizer": model.requantizer, "inputs": list(op.inputs), "output": op.output,
        "input": _spec(model.tensors[op.inputs[0]]), "result": _spec(model.tensors[op.output]),
    }  # fmt: skip
    if isinstance(op, record.Conv):
        parameters |= {"stride": list(op.stride), "padding": list(op.padding)}
        parameters |= {"dilation": list(op.dilation), "groups": op.groups}
    if requant is not None:
        arrays |= {"multiplier": requant.fixed, "shift": requant.shift}
        parameters |= {"multiplier": requant.fixed.tolist(), "shift": requant.shift.tolist()}
        parameters["multiplier_float32"] = _floats(requant.multiplier)
    if op.residual is not None:
        arrays["residual_multiplier"] = op.residual.requant.fixed
        parameters["residual_multiplier_float32"] = _floats(op.residual.requant.multiplier)
    return LayerMemory(op.name, parameters, arrays)


def _spec(spec: record.TensorSpec) -> dict[str, Any]:
    return _grid(_floats(spec.scale), spec.zero_point, spec.qmin, spec.qmax)


def _grid(scale: Any, zero_point: int, qmin: int, qmax: int) -> dict[str, Any]:
    return {"scale": scale, "zero_point": zero_point, "qmin": qmin, "qmax": qmax}


def _floats(values: np.ndarray) -> Any:
    """Return float32 ``values`` as numbers that give the same float32 again."""
    return np.asarray(values, np.float64).tolist()
