"""Operations in the quantize-dequantize form that onnxruntime fuses into QLinearConv, QGemm, QLinearAdd and the like.

    x -> DequantizeLinear -> Conv, Gemm, Add, GlobalAveragePool in float -> QuantizeLinear [-> Clip] -> y

Fused, these compute the record's "float32" arithmetic exactly; the ``Clip`` on integers holds what is left of a ReLU or
of a grid below 8 bits (QCDQ).
"""

from __future__ import annotations

import numpy as np

from hq_lib.deploy.onnx.explicit import geometry
from hq_lib.deploy.onnx.graph import Graph
from hq_lib.integer import record as r
from hq_lib.integer.record import TensorSpec

_ZEROS = (("weight", "int8"), ("bias", "int32"))  # not shared: onnxruntime rewrites each layer's own


def fits(op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> bool:
    """Return whether ``op`` has a fused 8-bit kernel."""
    if any(spec.dtype != "uint8" for spec in (*inputs, out)):
        return False
    if isinstance(op, r.Layer):
        plain = op.weight.dtype == np.int8 and op.requant is not None and op.residual is None
        return plain and (isinstance(op, r.Conv) or len(out.shape) == 1)
    if isinstance(op, r.AvgPool):
        if op.requant is None or op.kernel != inputs[0].shape[1:] or any(op.padding):
            return False
        return bool(op.requant.multiplier[0] == _mean(inputs[0], out))  # it divides by as many as it sums
    return isinstance(op, r.Add)


def _mean(x: TensorSpec, out: TensorSpec) -> np.float32:
    """The multiplier of a global average pool of ``x`` on the grid of ``out``."""
    return np.float32(x.scale) / (np.float32(x.shape[1] * x.shape[2]) * np.float32(out.scale))


def write(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write ``op``, for which ``fits`` is true."""
    reals = [dequantize(graph, spec) for spec in inputs]
    if isinstance(op, r.Conv):
        real = graph.node("Conv", [*reals, *_parameters(graph, op)], name=op.name, **geometry(op))
    elif isinstance(op, r.Linear):
        real = graph.node("Gemm", [*reals, *_parameters(graph, op)], name=op.name, transB=1)
    elif isinstance(op, r.Add):
        real = graph.node("Add", reals, name=op.name)
    else:
        real = graph.node("GlobalAveragePool", reals, name=op.name)
    quantize(graph, real, out)


def dequantize(graph: Graph, spec: TensorSpec) -> str:
    """Return the real values of tensor ``spec``."""
    return graph.node("DequantizeLinear", [spec.name, *_grid(graph, spec)])


def quantize(graph: Graph, real: str, out: TensorSpec) -> None:
    """Write ``out`` from real values: saturating at 0 and 255, then clipped to its own range where that is narrower."""
    whole = (out.qmin, out.qmax) == (0, 255)
    q = graph.node("QuantizeLinear", [real, *_grid(graph, out)], output=out.name if whole else None)
    if not whole:
        clip(graph, q, out)


def clip(graph: Graph, value: str, out: TensorSpec) -> None:
    """Write ``out`` = integers ``value`` clipped to its range."""
    ends = [graph.constant(q, out.dtype) for q in (out.qmin, out.qmax)]
    graph.node("Clip", [value, *ends], output=out.name)


def _grid(graph: Graph, spec: TensorSpec) -> list[str]:
    return [graph.constant(spec.scale, "float32"), graph.constant(spec.zero_point, spec.dtype)]


def _parameters(graph: Graph, op: r.Layer) -> list[str]:
    scale = graph.constant(op.weight_scale, "float32", name=f"{op.name}:weight_scale")
    zeros = [graph.constant(np.zeros(len(op.bias)), dtype, name=f"{op.name}:{what}_zero") for what, dtype in _ZEROS]
    weight = graph.node("DequantizeLinear", [graph.weight(op.weight, f"{op.name}:weight"), scale, zeros[0]], axis=0)
    acc_scale = graph.constant(op.acc_scale, "float32", name=f"{op.name}:acc_scale")
    bias = graph.constant(op.bias, "int32", name=f"{op.name}:bias")
    return [weight, graph.node("DequantizeLinear", [bias, acc_scale, zeros[1]], axis=0)]
