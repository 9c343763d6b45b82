"""hq_lib: from float CNNs to low-bit, integer-only and analog-crossbar inference.

    import hq_lib as hq                          # what follows is loaded when it is asked for

    net = hq.models.load_checkpoint(file)[0]     # or any network of yours
    qnet = hq.quantize(net, hq.BitPolicy("minmax:4", "lsq_plus:4", bn="fold"), images[:1])
    hq.calibrate(qnet, images)                   # or hq.fit: train; or hq.ptq: ranges and hq.reconstruct
    hq.save(qnet, "net.safetensors")             # hq.load gives it back, to the last bit
    hq.export(hq.lower(qnet), "net.onnx", "onnx")

Names: ``BitPolicy``, ``fold_bn``, ``quantize``, ``calibrate``, ``fit``, ``evaluate``, ``reconstruct``, ``lower``,
``save``, ``load``, ``export``, and every room: ``data``, ``models``, ``quantizers``, ``graph``, ``training``, ``ptq``,
``integer``, ``deploy``, ``crossbar``.

Glossary (one word per concept, everywhere):
    w, x            real weight, real activation of one layer
    x_int, x_hat    grid index of x; the real value that the index stands for
    scale           real units per grid step, > 0
    zero_point      grid index of real 0
    qmin, qmax      ends of the grid, inclusive
    bits            width of a grid; 32 means "left in float"
    alpha           PACT's learned clip; DSQ's characteristic is ``dsq_alpha``
    n_calib         number of calibration images
    acc_pct         top-1 accuracy, percent
    seed            random seed; seed 000 to seed 003 are the four repositories that this one grew from
    profile         smoke (seconds, CI), quick (minutes, two cores), full (the published protocol)
"""

import importlib
from typing import Any

__version__ = "0.1.0"
ROOMS = ("data", "models", "quantizers", "graph", "training", "ptq", "integer", "deploy", "crossbar")
HOMES = {
    "BitPolicy": "graph", "calibrate": "graph", "evaluate": "training", "export": "deploy", "fit": "training",
    "fold_bn": "graph.folding", "load": "graph", "lower": "integer", "quantize": "graph", "reconstruct": "ptq",
    "save": "graph",
}  # fmt: skip
"""Name -> where it lives. No import statement names them: every file would depend on all of them."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    if name in ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join([*HOMES, *ROOMS])}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, *ROOMS})
