"""onnxruntime, set up so that its integers are the record's on every x86-64 processor: one thread, full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort


def session(model: onnx.ModelProto | Path | str, *, n_threads: int = 1, save_optimized: Path | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of ``model`` on the CPU with all graph optimizations.

    ``session.x64quantprecision`` keeps processors without VNNI from saturating sums of two products at 16 bits
    (onnxruntime #6004, #14642); it changes nothing on others.

    Args:
        n_threads:      threads inside one operator; the integers do not depend on it.
        save_optimized: where onnxruntime writes the graph with its fused kernels, if asked.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(runtime: Any, images: Any, *, batch_size: int = 100) -> np.ndarray:
    """Return the logits (N, n_classes) float32 of ``images`` (N, C, H, W) float32, normalised; batch after batch."""
    x = np.ascontiguousarray(np.asarray(images, np.float32))
    name = runtime.get_inputs()[0].name
    return np.concatenate([runtime.run(None, {name: x[i : i + batch_size]})[0] for i in range(0, len(x), batch_size)])
