"""``export``: an integer record as an ONNX model, operation by operation."""

import json
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


def to_bytes(imodel: IntegerModel) -> bytes:
    """Return the content of the ONNX file of ``imodel``, the same bytes every time; see ``export``."""
    return export(imodel).SerializeToString(deterministic=True)


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
    x, named = inputs[0], {"output": out.name, "name": op.name}
    match op:
        case _ if qdq.fits(op, inputs, out):
            qdq.write(graph, op, inputs, out)
        case r.Quantize() if out.dtype == "uint8":
            qdq.quantize(graph, x.name, out)
        case r.Quantize():
            explicit.quantize(graph, x, out)
        case r.Conv() | r.Linear() | r.AvgPool():
            acc = explicit.accumulators(graph, op, x)
            if op.requant is not None:
                explicit.requantize(graph, op, acc, inputs[1:], out)
            elif isinstance(op, r.AvgPool):
                acc = graph.node("Add", [acc, graph.constant(out.zero_point, "int32")]) if out.zero_point else acc
                graph.cast(acc, out.dtype, output=out.name)
            else:
                graph.node("Identity", [acc], output=out.name)
        case r.Add():
            explicit.add(graph, op, inputs, out)
        case r.Mul():
            explicit.requantize(graph, op, explicit.product(graph, inputs), [], out)
        case r.MaxPool():
            attributes = {"kernel_shape": [*op.kernel], "strides": [*op.stride], "pads": [*op.padding]}
            _through_float(graph, "MaxPool", op, x, out, [], dilations=[*op.dilation], **attributes)
        case r.Concat():
            graph.node("Concat", [x.name for x in inputs], **named, axis=op.axis + 1)
        case r.Reshape():
            graph.node("Reshape", [x.name, graph.constant(np.array([-1, *out.shape]), "int64")], **named)
        case r.Transpose():
            graph.node("Transpose", [x.name], **named, perm=[0, *(a + 1 for a in op.axes)])
        case r.Slice():
            ranges = (op.start, op.stop, np.arange(1, len(op.start) + 1), op.step)
            graph.node("Slice", [x.name, *(graph.constant(np.array(v), "int64") for v in ranges)], **named)
        case r.Pad():
            widths = graph.constant(np.array([0, *op.before, 0, *op.after]), "int64")
            fill = graph.constant(x.zero_point, _float_for_uint16(x))
            _through_float(graph, "Pad", op, x, out, [widths, fill])
        case r.Clip():
            ends = [graph.constant(q, _float_for_uint16(out)) for q in (out.qmin, out.qmax)]
            _through_float(graph, "Clip", op, x, out, ends)
        case r.Table():
            values = graph.constant(op.values, out.dtype, name=f"{op.name}:table")
            graph.node("Gather", [values, graph.cast(x.name, "int32")], **named)
        case _:
            raise ExportError(f"{op.name!r}: {type(op).__name__} has no ONNX form")


def _float_for_uint16(spec: TensorSpec) -> str:
    return "float32" if spec.dtype == "uint16" else spec.dtype


def _through_float(
    graph: Graph, kind: str, op: r.Op, x: TensorSpec, out: TensorSpec, extra: list[str], **attributes: Any
) -> None:
    """Write an operator that onnxruntime has for uint8 but not for uint16: float32 holds either exactly."""
    if x.dtype != "uint16":
        graph.node(kind, [x.name, *extra], output=out.name, name=op.name, **attributes)
        return
    value = graph.node(kind, [graph.cast(x.name, "float32"), *extra], name=op.name, **attributes)
    graph.cast(value, out.dtype, output=out.name)


def _logits(graph: Graph, imodel: IntegerModel) -> None:
    out = imodel.tensors[imodel.output]
    value = graph.cast(out.name, "float32")
    if out.zero_point:
        value = graph.node("Sub", [value, graph.constant(float(out.zero_point), "float32")])
    scale = out.scale[:, None, None] if out.scale.ndim and len(out.shape) == 3 else out.scale
    graph.node("Mul", [value, graph.constant(scale, "float32", name="output:scale")], output="output:real")
