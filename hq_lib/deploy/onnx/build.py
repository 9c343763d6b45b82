"""``export``: an integer record as an ONNX model, operation by operation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

import hq_lib
from hq_lib.deploy.onnx import explicit, qdq
from hq_lib.deploy.onnx.graph import ONNX_TYPE, Graph
from hq_lib.integer import check
from hq_lib.integer import record as r
from hq_lib.integer.record import IntegerModel, TensorSpec
from hq_lib.results.atomic import write_bytes

OPSET, OPSET_INT4 = 17, 21
IR_VERSION, IR_VERSION_INT4 = 8, 10
BATCH = "N"


class ExportError(ValueError):
    """A record that cannot be written as ONNX; the message names the operation and the reason."""


def export(imodel: IntegerModel) -> onnx.ModelProto:
    """Return ``imodel`` as an ONNX model: normalised (N, C, H, W) float32 images in, float32 logits out.

    Weights of up to 4 bits are stored in 4 (INT4, opset 21) and widened once, when the model is loaded. Every value has
    its type and shape in the file.

    Args:
        imodel: a record with the "float32" requantizer, which is onnxruntime's own arithmetic.

    Raises:
        ExportError: a "fixed" record.
    """
    check(imodel)
    if imodel.requantizer != "float32":
        raise ExportError("onnxruntime multiplies in float32: lower the network with requantizer='float32'")
    graph = Graph()
    for op in imodel.ops:
        _write(graph, op, [imodel.tensors[t] for t in op.inputs], imodel.tensors[op.output])
    _logits(graph, imodel)
    return _finished(graph, imodel)


def save(model: onnx.ModelProto, path: Path | str) -> Path:
    """Write ``model`` to ``path``, whole or not at all, and return the path."""
    write_bytes(Path(path), model.SerializeToString(deterministic=True))
    return Path(path)


def _finished(graph: Graph, imodel: IntegerModel) -> onnx.ModelProto:
    int4 = any(each.data_type == onnx.TensorProto.INT4 for each in graph.initializers)
    image, out = imodel.tensors[imodel.input], imodel.tensors[imodel.output]
    float_type = ONNX_TYPE["float32"]
    body = helper.make_graph(
        graph.nodes,
        "integer_network",
        [helper.make_tensor_value_info(image.name, float_type, [BATCH, *image.shape])],
        [helper.make_tensor_value_info("output:real", float_type, [BATCH, *out.shape])],
        graph.initializers,
    )
    opset = helper.make_opsetid("", OPSET_INT4 if int4 else OPSET)
    model = helper.make_model(body, opset_imports=[opset], producer_name="hq_lib", producer_version=hq_lib.__version__)
    model.ir_version = IR_VERSION_INT4 if int4 else IR_VERSION
    known = {key: value if isinstance(value, str) else json.dumps(value) for key, value in imodel.meta.items()}
    helper.set_model_props(model, {"schema": str(r.SCHEMA), "requantizer": imodel.requantizer, **known})
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _write(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    if qdq.fits(op, inputs, out):
        qdq.write(graph, op, inputs, out)
    else:
        _WRITERS[type(op)](graph, op, inputs, out)


def _logits(graph: Graph, imodel: IntegerModel) -> None:
    out = imodel.tensors[imodel.output]
    value = graph.cast(out.name, "float32")
    if out.zero_point:
        value = graph.node("Sub", [value, graph.constant(float(out.zero_point), "float32")])
    scale = out.scale[:, None, None] if out.scale.ndim and len(out.shape) == 3 else out.scale
    graph.node("Mul", [value, graph.constant(scale, "float32", name="output:scale")], output="output:real")


def _quantize(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    if out.dtype == "uint8":
        qdq.quantize(graph, inputs[0].name, out)
    else:
        explicit.quantize(graph, inputs[0], out)


def _layer(graph: Graph, op: r.Layer, inputs: list[TensorSpec], out: TensorSpec) -> None:
    acc = explicit.accumulators(graph, op, inputs[0])
    if op.requant is None:
        graph.node("Identity", [acc], output=out.name)
    else:
        explicit.requantize(graph, op, acc, inputs[1] if op.residual else None, out)


def _add(graph: Graph, op: r.Add, inputs: list[TensorSpec], out: TensorSpec) -> None:
    explicit.add(graph, op, inputs[0], inputs[1], out)


def _avg_pool(graph: Graph, op: r.AvgPool, inputs: list[TensorSpec], out: TensorSpec) -> None:
    acc = explicit.window_sums(graph, op, inputs[0])
    if op.requant is not None:
        explicit.requantize(graph, op, acc, None, out)
        return
    if out.zero_point:
        acc = graph.node("Add", [acc, graph.constant(out.zero_point, "int32")])
    graph.cast(acc, out.dtype, output=out.name)


def _through_float(
    graph: Graph, kind: str, x: TensorSpec, out: TensorSpec, extra: list[str], **attributes: Any
) -> None:
    """Write an operator that onnxruntime has for uint8 but not for uint16: float32 holds either exactly."""
    if x.dtype != "uint16":
        graph.node(kind, [x.name, *extra], output=out.name, **attributes)
        return
    value = graph.node(kind, [graph.cast(x.name, "float32"), *extra], **attributes)
    graph.cast(value, out.dtype, output=out.name)


def _max_pool(graph: Graph, op: r.MaxPool, inputs: list[TensorSpec], out: TensorSpec) -> None:
    attributes = {"kernel_shape": [*op.kernel], "strides": [*op.stride], "pads": [*op.padding]}
    _through_float(graph, "MaxPool", inputs[0], out, [], name=op.name, dilations=[*op.dilation], **attributes)


def _concat(graph: Graph, op: r.Concat, inputs: list[TensorSpec], out: TensorSpec) -> None:
    graph.node("Concat", [x.name for x in inputs], output=out.name, name=op.name, axis=op.axis + 1)


def _reshape(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    shape = graph.constant(np.array([-1, *out.shape]), "int64")
    graph.node("Reshape", [inputs[0].name, shape], output=out.name, name=op.name)


def _transpose(graph: Graph, op: r.Transpose, inputs: list[TensorSpec], out: TensorSpec) -> None:
    graph.node("Transpose", [inputs[0].name], output=out.name, name=op.name, perm=[0, *(a + 1 for a in op.axes)])


def _slice(graph: Graph, op: r.Slice, inputs: list[TensorSpec], out: TensorSpec) -> None:
    axes = np.arange(1, len(op.start) + 1)
    ranges = [graph.constant(np.array(v), "int64") for v in (op.start, op.stop, axes, op.step)]
    graph.node("Slice", [inputs[0].name, *ranges], output=out.name, name=op.name)


def _pad(graph: Graph, op: r.Pad, inputs: list[TensorSpec], out: TensorSpec) -> None:
    x = inputs[0]
    widths = graph.constant(np.array([0, *op.before, 0, *op.after]), "int64")
    fill = graph.constant(x.zero_point, "float32" if x.dtype == "uint16" else x.dtype)
    _through_float(graph, "Pad", x, out, [widths, fill], name=op.name)


def _clip(graph: Graph, op: r.Clip, inputs: list[TensorSpec], out: TensorSpec) -> None:
    dtype = "float32" if out.dtype == "uint16" else out.dtype
    ends = [graph.constant(q, dtype) for q in (out.qmin, out.qmax)]
    _through_float(graph, "Clip", inputs[0], out, ends, name=op.name)


def _table(graph: Graph, op: r.Table, inputs: list[TensorSpec], out: TensorSpec) -> None:
    values = graph.constant(op.values, out.dtype, name=f"{op.name}:table")
    graph.node("Gather", [values, graph.cast(inputs[0].name, "int32")], output=out.name, name=op.name)


def _mul(graph: Graph, op: r.Mul, inputs: list[TensorSpec], out: TensorSpec) -> None:
    explicit.requantize(graph, op, explicit.product(graph, *inputs), None, out)


_WRITERS: dict[type[r.Op], Callable[..., None]] = {
    r.Quantize: _quantize, r.Conv: _layer, r.Linear: _layer, r.Add: _add, r.AvgPool: _avg_pool, r.MaxPool: _max_pool,
    r.Concat: _concat, r.Reshape: _reshape, r.Transpose: _transpose, r.Slice: _slice, r.Pad: _pad, r.Clip: _clip,
    r.Table: _table, r.Mul: _mul,
}  # fmt: skip
