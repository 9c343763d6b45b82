"""The record's arithmetic spelled out in ONNX operators, for what onnxruntime has no fused kernel for.

Accumulators come from ConvInteger and MatMulInteger, which multiply 8-bit integers only. Wider operands are split,
x = 256 x_hi + x_lo and w = 256 w_hi + w_lo, and the int32 sums of the parts added with their powers of 256.
"""

from typing import Any

import numpy as np

from hq_lib.deploy.onnx.graph import Graph
from hq_lib.integer import record as r
from hq_lib.integer.record import TensorSpec


def accumulators(graph: Graph, op: r.Layer | r.AvgPool, x: TensorSpec) -> str:
    """Return int32 sum w (q - z) + bias of ``op``, (B, *output shape); of a pool the sums over each window."""
    parts: list[str] = []
    for i, (q, zero, x_factor) in enumerate(_input_parts(graph, x)):
        for w, w_factor in _weight_parts(graph, op, x, suffix=f".{i}" if i else ""):
            kind, attributes = ("MatMulInteger", {}) if isinstance(op, r.Linear) else ("ConvInteger", geometry(op, x))
            value = graph.node(kind, [q, w, zero], name=f"{op.name}/{w}/{q}", **attributes)
            if x_factor * w_factor != 1:
                value = graph.node("Mul", [value, graph.constant(x_factor * w_factor, "int32")])
            parts.append(value)
    total = parts[0]
    for part in parts[1:]:
        total = graph.node("Add", [total, part])
    if isinstance(op, r.AvgPool):
        return total
    return graph.node("Add", [total, graph.constant(_column(op.bias, op), "int32", name=f"{op.name}:bias")])


def _input_parts(graph: Graph, x: TensorSpec) -> list[tuple[str, str, int]]:
    """Return (value, zero point, factor) of the 8-bit parts of tensor ``x``."""
    zero = x.zero_point
    if x.dtype == "uint8":
        return [(x.name, graph.constant(zero, "uint8"), 1)]
    wide = graph.cast(x.name, "int32")
    base = graph.constant(256, "int32")
    high = graph.node("Div", [wide, base])
    low = graph.node("Sub", [wide, graph.node("Mul", [high, base])])
    return [
        (graph.cast(high, "uint8"), graph.constant(zero >> 8, "uint8"), 256),
        (graph.cast(low, "uint8"), graph.constant(zero & 255, "uint8"), 1),
    ]


def _weight_parts(graph: Graph, op: r.Layer | r.AvgPool, x: TensorSpec, suffix: str) -> list[tuple[str, int]]:
    """Return (initializer, factor) of the 8-bit parts of the weight; its own for each product, as onnxruntime asks."""
    if isinstance(op, r.AvgPool):
        return [(graph.constant(np.ones((x.shape[0], 1, *op.kernel)), "int8", name=f"{op.name}:ones{suffix}"), 1)]
    w = op.weight.astype(np.int32)
    w = w if isinstance(op, r.Conv) else w.T
    if op.weight.dtype == np.int8:
        return [(graph.weight(w, f"{op.name}:weight{suffix}"), 1)]
    high = (w + 128) >> 8  # then w - 256 high lies in [-128, 127]
    parts = [(high, 256, "high"), (w - 256 * high, 1, "low")]
    if high.max() > 127:
        spill = np.where(high > 127, 1, 0)  # weights above 32,639: the high part takes two summands
        parts = [(high - spill, 256, "high"), (spill, 256, "spill"), (w - 256 * high, 1, "low")]
    return [(graph.weight(v, f"{op.name}:weight.{part}{suffix}"), factor) for v, factor, part in parts]


def geometry(op: r.Op, x: TensorSpec) -> dict[str, Any]:
    """Return the attributes of a convolution node, or of the depthwise one that sums the windows of a pool of ``x``."""
    assert isinstance(op, r.Conv | r.AvgPool)
    group = op.groups if isinstance(op, r.Conv) else x.shape[0]
    return {
        "strides": op.stride,
        "pads": op.padding,
        "dilations": op.dilation,
        "group": group,
        "kernel_shape": op.kernel,
    }


def _column(values: np.ndarray, op: r.Op) -> np.ndarray:
    """Return per-channel ``values`` shaped to meet the output of ``op``."""
    return values[:, None, None] if isinstance(op, r.Conv) else values


def requantize(
    graph: Graph, op: r.Layer | r.AvgPool | r.Mul, acc: str, residual: list[TensorSpec], out: TensorSpec
) -> None:
    """Write ``out`` = clamp(rint(f32(acc) m [+ f32(r - z_r) n]) + z), each step a float32 operator."""
    assert op.requant is not None  # the caller writes accumulators otherwise
    m = graph.constant(_column(op.requant.multiplier, op), "float32", name=f"{op.name}:multiplier")
    real = graph.node("Mul", [graph.cast(acc, "float32"), m])
    if isinstance(op, r.Layer) and op.residual is not None:
        centred = graph.cast(residual[0].name, "float32")
        if residual[0].zero_point:
            centred = graph.node("Sub", [centred, graph.constant(float(residual[0].zero_point), "float32")])
        n = graph.constant(_column(op.residual.requant.multiplier, op), "float32", name=f"{op.name}:residual")
        real = graph.node("Add", [real, graph.node("Mul", [centred, n])])
    round_to(graph, real, out)


def round_to(graph: Graph, real: str, out: TensorSpec, *, zero_included: bool = False) -> None:
    """Write ``out`` = clamp(rint(real) + z), or clamp(rint(real)) where ``real`` holds z already."""
    y = graph.node("Round", [real])
    if out.zero_point and not zero_included:
        y = graph.node("Add", [y, graph.constant(float(out.zero_point), "float32")])
    ends = [graph.constant(float(q), "float32") for q in (out.qmin, out.qmax)]
    graph.cast(graph.node("Clip", [y, *ends]), out.dtype, output=out.name)


def quantize(graph: Graph, x: TensorSpec, out: TensorSpec) -> None:
    """Write ``out`` = clamp(rint(x / s) + z)."""
    round_to(graph, graph.node("Div", [x.name, graph.constant(float(out.scale), "float32")]), out)


def add(graph: Graph, op: r.Add, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write ``out`` by the record's two fused multiply-adds: exact in double, rounded to float after each."""
    total = graph.constant(np.float64(op.offset), "float64")
    for i in (1, 0):
        m = graph.constant(np.float64(op.requants[i].multiplier[0]), "float64")
        term = graph.node("Mul", [graph.cast(inputs[i].name, "float64"), m])
        rounded = graph.cast(graph.node("Add", [term, total]), "float32")
        total = graph.cast(rounded, "float64") if i else rounded
    round_to(graph, total, out, zero_included=True)


def product(graph: Graph, inputs: list[TensorSpec]) -> str:
    """Return int32 (q_a - z_a) (q_b - z_b)."""
    centred = [graph.node("Sub", [graph.cast(x.name, "int32"), graph.constant(x.zero_point, "int32")]) for x in inputs]
    return graph.node("Mul", centred)
