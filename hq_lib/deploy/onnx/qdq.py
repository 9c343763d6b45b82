"""Operations in the quantize-dequantize form that onnxruntime fuses into QLinearConv, QGemm, QLinearAdd and the like.

    x -> DequantizeLinear -> Conv, Gemm, Add, GlobalAveragePool in float -> QuantizeLinear [-> Clip] -> y

Fused, these compute the record's "float32" arithmetic exactly; the ``Clip`` on integers holds what is left of a ReLU or
of a grid below 8 bits (QCDQ).
"""

import math
from typing import Any

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
        mean = np.float32(inputs[0].scale) / (np.float32(math.prod(op.kernel)) * np.float32(out.scale))
        return bool(op.requant.multiplier[0] == mean)  # it divides by as many as it sums
    return isinstance(op, r.Add)


def write(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write ``op``, for which ``fits`` is true."""
    reals = [graph.node("DequantizeLinear", [x.name, *_grid(graph, x)]) for x in inputs]
    attributes: dict[str, Any] = {}
    if isinstance(op, r.Layer):
        reals += _parameters(graph, op)
        attributes = geometry(op, inputs[0]) if isinstance(op, r.Conv) else {"transB": 1}
    kind = {r.Conv: "Conv", r.Linear: "Gemm", r.Add: "Add", r.AvgPool: "GlobalAveragePool"}[type(op)]
    quantize(graph, graph.node(kind, reals, name=op.name, **attributes), out)


def quantize(graph: Graph, real: str, out: TensorSpec) -> None:
    """Write ``out`` from real values: saturating at 0 and 255, then clipped to its own range where that is narrower."""
    whole = (out.qmin, out.qmax) == (0, 255)
    q = graph.node("QuantizeLinear", [real, *_grid(graph, out)], output=out.name if whole else None)
    if not whole:
        graph.node("Clip", [q, *(graph.constant(end, out.dtype) for end in (out.qmin, out.qmax))], output=out.name)


def _grid(graph: Graph, spec: TensorSpec) -> list[str]:
    return [graph.constant(spec.scale, "float32"), graph.constant(spec.zero_point, spec.dtype)]


def _parameters(graph: Graph, op: r.Layer) -> list[str]:
    scale = graph.constant(op.weight_scale, "float32", name=f"{op.name}:weight_scale")
    zeros = [graph.constant(np.zeros(len(op.bias)), dtype, name=f"{op.name}:{what}_zero") for what, dtype in _ZEROS]
    weight = graph.node("DequantizeLinear", [graph.weight(op.weight, f"{op.name}:weight"), scale, zeros[0]], axis=0)
    acc_scale = graph.constant(op.acc_scale, "float32", name=f"{op.name}:acc_scale")
    bias = graph.constant(op.bias, "int32", name=f"{op.name}:bias")
    return [weight, graph.node("DequantizeLinear", [bias, acc_scale, zeros[1]], axis=0)]
