"""Integer-only networks: ``lower`` a quantized graph to one record, and run that record anywhere.

    imodel = lower(qnet)                        # IntegerModel: operations and integers; every accumulator proved
    logits = run(imodel, images)                # NumPy, the reference
    load("net.npz")                             # as ``deploy.export`` writes it; read with NumPy alone
    agreement(qnet, imodel, images)             # per tensor: how many integers differ from the fake-quantized net's
    round_biases(qnet)                          # lets the fake-quantized net add the integer net's biases

``record`` is the text that every executor follows. What touches the graph needs torch, and loads it when asked.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hq_lib.integer.arithmetic import RecordError
from hq_lib.integer.check import check
from hq_lib.integer.execute import ImageError, output_integers, pixel_table, quantize, run
from hq_lib.integer.record import IntegerModel, TensorSpec
from hq_lib.integer.storage import load, to_bytes

if TYPE_CHECKING:
    from hq_lib.integer.comparison import Agreement, agreement, round_biases
    from hq_lib.integer.lowering import lower
    from hq_lib.integer.nodes import LowerError


_NEED_TORCH = {
    "lower": "lowering", "LowerError": "nodes", "agreement": "comparison", "Agreement": "comparison",
    "round_biases": "comparison",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hq_lib.integer.{_NEED_TORCH[name]}"), name)
