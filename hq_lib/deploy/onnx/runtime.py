"""onnxruntime, set up so that its integers are the record's on every x86-64 processor: one thread, full precision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from hq_lib.integer.execute import as_images
from hq_lib.integer.requant import RecordError
from hq_lib.results.provenance import cpu_flags

VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Instruction sets whose products of uint8 and int8 are summed in 32 bits at once."""


def session(model: onnx.ModelProto | Path | str, *, n_threads: int = 1, save_optimized: Path | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of ``model`` on the CPU with all graph optimizations.

    Where no VNNI is known of, ``session.x64quantprecision`` keeps onnxruntime from saturating sums of two products at
    16 bits (onnxruntime #6004, #14642). With VNNI nothing saturates, and the option would only move the products to
    slower uint8 x uint8 kernels: it is left alone there.

    Args:
        n_threads:      threads inside one operator; the integers do not depend on it.
        save_optimized: where onnxruntime writes the graph with its fused kernels, if asked.

    Raises:
        RecordError: no such file, or no model that onnxruntime opens.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not cpu_flags() & VNNI:
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
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
