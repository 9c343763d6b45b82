"""ONNX from the integer record: real int8 initializers, quantize-dequantize nodes, the record's integers bit for bit.

    model = export(imodel)                      # onnx.ModelProto, checked by onnx.checker
    to_bytes(imodel)                            # the file
    logits = run(session(model), images)        # onnxruntime, single thread; equal to hq_lib.integer.run

Operations that onnxruntime has fused kernels for are written as QDQ (below 8 bits: QCDQ, with a ``Clip`` between
quantize and dequantize); the others (16 bits, fused conv-adds, logits) as integer operators with an explicit
requantization. Needs the extra ``export`` (onnx, onnxruntime).
"""

from hq_lib.deploy.onnx.model import export, meta_of, run, session, to_bytes
from hq_lib.deploy.onnx.operators import ExportError
