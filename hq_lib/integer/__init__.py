"""Integer-only networks: ``lower`` a quantized graph to one record, and run that record anywhere.

    imodel = lower(qnet)                        # IntegerModel: operations and integers; every accumulator proved
    logits = run(imodel, images)                # NumPy, the reference
    save(imodel, "net.npz"); load("net.npz")    # read with NumPy alone
    agreement(qnet, imodel, images)             # per tensor: how many integers differ from the fake-quantized net's

``record`` is the text that every executor follows. Only ``lower`` and ``agreement`` need torch, and load it when asked.
"""

from typing import TYPE_CHECKING, Any

from hq_lib.integer.check import check
from hq_lib.integer.execute import ImageError, quantize, run
from hq_lib.integer.record import IntegerModel, TensorSpec
from hq_lib.integer.requant import RecordError
from hq_lib.integer.storage import from_bytes, load, save, to_bytes

if TYPE_CHECKING:
    from hq_lib.integer.geometry import LowerError
    from hq_lib.integer.lowering import lower

__all__ = [
    "ImageError",
    "IntegerModel",
    "LowerError",
    "RecordError",
    "TensorSpec",
    "check",
    "from_bytes",
    "load",
    "lower",
    "quantize",
    "run",
    "save",
    "to_bytes",
]


def __getattr__(name: str) -> Any:
    if name == "lower":
        from hq_lib.integer.lowering import lower as found
    elif name == "LowerError":
        from hq_lib.integer.geometry import LowerError as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
