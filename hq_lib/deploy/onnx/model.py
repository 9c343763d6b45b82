"""An integer record as an ONNX model, and onnxruntime, set up so that its integers are the record's on every x86-64
processor: one thread, full precision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import helper

import hq_lib
from hq_lib.deploy.onnx.operators import ONNX_TYPE, ExportError, Graph, write
from hq_lib.integer import check
from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import RecordError
from hq_lib.integer.execute import as_images
from hq_lib.integer.record import IntegerModel
from hq_lib.results.provenance import cpu_flags

OPSET, OPSET_INT4 = 17, 21
IR_VERSION, IR_VERSION_INT4 = 8, 10
BATCH = "N"
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Instruction sets whose products of uint8 and int8 are summed in 32 bits at once."""


def export(imodel: IntegerModel) -> onnx.ModelProto:
    """Return ``imodel`` as an ONNX model: normalised (N, C, H, W) float32 images in, float32 logits out.

    Weights of up to 4 bits are stored in 4 (INT4, opset 21) and widened once, when the model is loaded. Every value has
    its type and shape in the file.

    A session of one's own needs ``session.x64quantprecision`` = "1" on x86-64 without VNNI (``session`` sets it): else
    onnxruntime saturates sums of two products at 16 bits, with weights of few bits too, since they fill int8.

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
        write(graph, op, [imodel.tensors[t] for t in op.inputs], imodel.tensors[op.output])
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


def _logits(graph: Graph, imodel: IntegerModel) -> None:
    out = imodel.tensors[imodel.output]
    value = graph.cast(out.name, "float32")
    if out.zero_point:
        value = graph.node("Sub", [value, graph.constant(float(out.zero_point), "float32")])
    scale = out.scale[:, None, None] if out.scale.ndim and len(out.shape) == 3 else out.scale
    graph.node("Mul", [value, graph.constant(scale, "float32", name="output:scale")], output="output:real")


def session(model: onnx.ModelProto | Path | str, *, n_threads: int = 1) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of ``model`` on the CPU with all graph optimizations.

    Where no VNNI is known of, ``session.x64quantprecision`` keeps onnxruntime from saturating sums of two products at
    16 bits (onnxruntime #6004, #14642). With VNNI nothing saturates, and the option would only move the products to
    slower uint8 x uint8 kernels: it is left alone there.

    Args:
        n_threads: threads inside one operator; the integers do not depend on it.

    Raises:
        RecordError: no such file, or no model that onnxruntime opens.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not cpu_flags() & VNNI:
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    name = "model" if isinstance(model, onnx.ModelProto) else model
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, a class for each of its states
        raise RecordError(f"{name}: onnxruntime cannot open it ({str(error).strip():.200})") from error


def meta_of(file: Path | str) -> dict[str, Any]:
    """What the record says of its images, from the file; {} where it does not. ``RecordError``: no ONNX file."""
    try:
        entries = onnx.load(file, load_external_data=False).metadata_props
        return {entry.key: json.loads(entry.value) for entry in entries if entry.key == "image"}
    except (OSError, ValueError, RecursionError, DecodeError) as error:
        raise RecordError(f"{file}: no readable ONNX file ({error})") from error


def run(runtime: Any, images: Any, *, batch_size: int = 100) -> np.ndarray:
    """Return the logits (N, n_classes) float32 of ``images`` (N, C, H, W) float32, normalised; batch after batch.

    Raises:
        ImageError: as the other executors: another shape or dtype (pixels would be taken for real values), NaN, none.
    """
    taken = runtime.get_inputs()[0]
    x = as_images(images, taken.shape[1:])
    parts = (x[i : i + batch_size] for i in range(0, len(x), batch_size))
    return np.concatenate([runtime.run(None, {taken.name: part})[0] for part in parts])
