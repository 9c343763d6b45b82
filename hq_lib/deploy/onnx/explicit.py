"""The record's arithmetic spelled out in ONNX operators, for what onnxruntime has no fused kernel for.

Accumulators come from ConvInteger and MatMulInteger, which multiply 8-bit integers only. Wider operands are split,
x = 256 x_hi + x_lo and w = 256 w_hi + w_lo, and the int32 sums of the parts added with their powers of 256.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hq_lib.deploy.onnx.graph import Graph
from hq_lib.integer import record as r
from hq_lib.integer.record import TensorSpec


def accumulators(graph: Graph, op: r.Layer, x: TensorSpec) -> str:
    """Return int32 sum w (q - z) + bias of ``op``, (B, *output shape)."""
    parts: list[str] = []
    inputs = _input_parts(graph, x)
    for i, (q, zero, x_factor) in enumerate(inputs):
        for w, w_factor in _weight_parts(graph, op, suffix=f".{i}" if i else ""):
            value = _integer_product(graph, op, q, zero, w)
            if x_factor * w_factor != 1:
                value = graph.node("Mul", [value, graph.constant(x_factor * w_factor, "int32")])
            parts.append(value)
    total = parts[0]
    for part in parts[1:]:
        total = graph.node("Add", [total, part])
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


def _weight_parts(graph: Graph, op: r.Layer, suffix: str) -> list[tuple[str, int]]:
    """Return (initializer, factor) of the 8-bit parts of the weight; its own for each product, as onnxruntime asks."""
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


def _integer_product(graph: Graph, op: r.Layer, q: str, zero: str, w: str) -> str:
    if not isinstance(op, r.Conv):
        return graph.node("MatMulInteger", [q, w, zero], name=f"{op.name}/{w}/{q}")
    return graph.node("ConvInteger", [q, w, zero], name=f"{op.name}/{w}/{q}", **geometry(op))


def geometry(op: r.Conv) -> dict[str, Any]:
    """Return the attributes of a convolution node."""
    return {
        "strides": [*op.stride],
        "pads": [*op.padding],
        "dilations": [*op.dilation],
        "group": op.groups,
        "kernel_shape": [*op.weight.shape[2:]],
    }


def _column(values: np.ndarray, op: r.Op) -> np.ndarray:
    """Return per-channel ``values`` shaped to meet the output of ``op``."""
    return values[:, None, None] if isinstance(op, r.Conv) else values


def requantize(
    graph: Graph, op: r.Layer | r.AvgPool | r.Mul, acc: str, residual: TensorSpec | None, out: TensorSpec
) -> None:
    """Write ``out`` = clamp(rint(f32(acc) m [+ f32(r - z_r) n]) + z), each step a float32 operator."""
    assert op.requant is not None  # the caller writes accumulators otherwise
    m = graph.constant(_column(op.requant.multiplier, op), "float32", name=f"{op.name}:multiplier")
    real = graph.node("Mul", [graph.cast(acc, "float32"), m])
    if isinstance(op, r.Layer) and op.residual is not None and residual is not None:
        centred = graph.cast(residual.name, "float32")
        if residual.zero_point:
            centred = graph.node("Sub", [centred, graph.constant(float(residual.zero_point), "float32")])
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


def add(graph: Graph, op: r.Add, a: TensorSpec, b: TensorSpec, out: TensorSpec) -> None:
    """Write ``out`` by the record's two fused multiply-adds: exact in double, rounded to float after each."""
    total = graph.constant(np.float64(op.offset), "float64")
    for last, spec, requant in ((False, b, op.requants[1]), (True, a, op.requants[0])):
        m = graph.constant(np.float64(requant.multiplier[0]), "float64")
        term = graph.node("Mul", [graph.cast(spec.name, "float64"), m])
        rounded = graph.cast(graph.node("Add", [term, total]), "float32")
        total = rounded if last else graph.cast(rounded, "float64")
    round_to(graph, total, out, zero_included=True)


def product(graph: Graph, a: TensorSpec, b: TensorSpec) -> str:
    """Return int32 (q_a - z_a) (q_b - z_b)."""
    centred = [
        graph.node("Sub", [graph.cast(spec.name, "int32"), graph.constant(spec.zero_point, "int32")]) for spec in (a, b)
    ]
    return graph.node("Mul", centred)


def window_sums(graph: Graph, op: r.AvgPool, x: TensorSpec) -> str:
    """Return int32 sums of (q - z) over each window: a depthwise ConvInteger with weights 1."""
    channels = x.shape[0]
    w = graph.constant(np.ones((channels, 1, *op.kernel)), "int8", name=f"{op.name}:ones")
    attributes = {"strides": [*op.stride], "pads": [*op.padding], "group": channels, "kernel_shape": [*op.kernel]}
    total: str | None = None
    for q, zero, factor in _input_parts(graph, x):
        value = graph.node("ConvInteger", [q, w, zero], name=f"{op.name}/{q}", **attributes)
        if factor != 1:
            value = graph.node("Mul", [value, graph.constant(factor, "int32")])
        total = value if total is None else graph.node("Add", [total, value])
    assert total is not None  # a tensor has at least one part
    return total
