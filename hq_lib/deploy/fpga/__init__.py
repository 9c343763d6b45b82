"""FPGA files: seed 002's (FPGAI) formats and arithmetic, an exporter that writes them, and memory images.

    net = read_net(folder, "lenet", LENET)              # or net_of(read_tuple(path), LENET)
    logits = run(net, images)                           # raw uint8 pixels -> the C program's integers
    net = export(float_net, example)                    # trained with ReLU1; multipliers with eight significant bits
    write_net(net, folder, "lenet")
    write_images(memories_of(net), folder)              # hex or coe with a manifest; an IntegerModel's likewise

Only ``export`` and ``quantize_layer`` need torch, and load it when asked.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hq_lib.deploy.fpga.formats import read_net, write_net
from hq_lib.deploy.fpga.layers import LENET, FpgaiError, FpgaiLayer, FpgaiNet, Stage
from hq_lib.deploy.fpga.memory import LayerMemory, memories_of
from hq_lib.deploy.fpga.memory_image import read_images, write_images
from hq_lib.deploy.fpga.multiplier import nearest_multiplier, relative_error, seed_multiplier
from hq_lib.deploy.fpga.semantics import int32_overflows, run
from hq_lib.deploy.fpga.tuple_file import TupleFile, net_of, read_tuple, tuple_of, write_tuple

if TYPE_CHECKING:
    from hq_lib.deploy.fpga.exporter import export, quantize_layer

__all__ = [
    "LENET",
    "FpgaiError",
    "FpgaiLayer",
    "FpgaiNet",
    "LayerMemory",
    "Stage",
    "TupleFile",
    "export",
    "int32_overflows",
    "memories_of",
    "nearest_multiplier",
    "net_of",
    "quantize_layer",
    "read_images",
    "read_net",
    "read_tuple",
    "relative_error",
    "run",
    "seed_multiplier",
    "tuple_of",
    "write_images",
    "write_net",
    "write_tuple",
]


def __getattr__(name: str) -> Any:
    if name not in ("export", "quantize_layer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("hq_lib.deploy.fpga.exporter"), name)
