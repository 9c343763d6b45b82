"""FPGA files: memory images of any integer record, and seed 002's (FPGAI) formats and arithmetic with an exporter.

    write_images(imodel, folder)                        # hex or coe, a manifest: every operation, packed weights
    narrowed(imodel, 18)                                # multipliers for one DSP slice each, and their largest error
    integer.run(read_images(folder), images)            # rebuilt from the files alone, with NumPy

    net = read_net(folder, "lenet", LENET)              # or net_of(read_tuple(path), LENET)
    logits = run(net, images)                           # raw uint8 pixels -> the C program's integers
    record_of(net, (1, 28, 28))                         # the same integers in NumPy, C and memory images
    net = export(float_net, example)                    # a chain with ReLU or ReLU1; eight-bit multipliers
    write_net(net, folder, "lenet")

``export`` and ``.tuple`` files alone need torch, and load it when asked.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hq_lib.deploy.fpga.conversion import int32_overflows, record_of, run
from hq_lib.deploy.fpga.formats import read_net, write_net
from hq_lib.deploy.fpga.layers import LENET, FpgaiError, FpgaiLayer, FpgaiNet, Stage
from hq_lib.deploy.fpga.memory_image import read_images, write_images
from hq_lib.deploy.fpga.multiplier import narrowed, nearest_multiplier, relative_error

if TYPE_CHECKING:
    from hq_lib.deploy.fpga.exporter import export, quantize_layer
    from hq_lib.deploy.fpga.tuple_file import TupleFile, net_of, read_tuple

__all__ = [
    "LENET", "FpgaiError", "FpgaiLayer", "FpgaiNet", "Stage", "TupleFile", "export", "int32_overflows",
    "narrowed", "nearest_multiplier", "net_of", "quantize_layer", "read_images", "read_net", "read_tuple", "record_of",
    "relative_error", "run", "write_images", "write_net",
]  # fmt: skip
_NEED_TORCH = dict.fromkeys(("export", "quantize_layer"), "exporter") | dict.fromkeys(
    ("TupleFile", "net_of", "read_tuple"), "tuple_file"
)


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hq_lib.deploy.fpga.{_NEED_TORCH[name]}"), name)
