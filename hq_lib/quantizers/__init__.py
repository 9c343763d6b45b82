"""Quantizers: pure functions on the affine grid (``affine``), and one small module per published method.

``weight_quantizer(method, bits)`` and ``act_quantizer(method, bits, signed=...)`` build them by name. Each module
trains on a grid that it can name exactly: ``q(x) == grid.scale * (q.to_int(x) - grid.zero_point)``, bit for bit.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from hq_lib.quantizers.affine import Grid, dequantize, quantize_to_int
from hq_lib.quantizers.base import Quantizer, Tag, parameter_tags
from hq_lib.quantizers.dorefa import DoReFaAct, DoReFaHardwareWeight, DoReFaWeight
from hq_lib.quantizers.dsq import DSQ, dsq_quantize, dsq_slope, dsq_soft
from hq_lib.quantizers.fixed import AdaRound, FixedGrid, FrozenWeight
from hq_lib.quantizers.lsq import LSQ, LSQPlusAct, LSQPlusWeight
from hq_lib.quantizers.minmax import AciqAct, AciqWeight, MinMaxAct, MinMaxWeight
from hq_lib.quantizers.pact import MPACT, PACT, FixedMPACT
from hq_lib.quantizers.straight_through import Slope, staircase
from hq_lib.results.hints import check_known, nearest

FLOAT_BITS = 32
"""Bits that mean "leave it float"."""

METHODS: dict[str, tuple[Callable[..., Quantizer], Callable[..., Quantizer]]] = {
    "minmax": (MinMaxWeight, MinMaxAct),
    "aciq": (AciqWeight, AciqAct),
    "dorefa": (DoReFaWeight, DoReFaAct),
    "dorefa_hw": (DoReFaHardwareWeight, DoReFaAct),
    "pact": (DoReFaWeight, PACT),
    "mpact": (DoReFaHardwareWeight, MPACT),
    "lsq": (partial(LSQ, role="weight"), partial(LSQ, role="act")),
    "lsq_plus": (LSQPlusWeight, LSQPlusAct),
    "dsq": (partial(DSQ, role="weight"), partial(DSQ, role="act")),
}
"""Quantizers of weights and of activations, by method. PACT is about activations and takes DoReFa's weights, mPACT the
hardware form."""


def weight_quantizer(
    method: str, bits: int, *, axis: int | None = 0, signed: bool = True, **options: Any
) -> Quantizer | None:
    """Return a weight quantizer, or None for 32 bits (float).

    Args:
        method: a key of METHODS; "ste" is "minmax".
        bits: 1 to 16, or 32.
        axis: 0 for a scale per output channel, None for one per tensor (what the papers of DoReFa, PACT, LSQ, DSQ do).
        signed: False for an asymmetric grid (min-max) or weights that are never negative.
        options: keyword options of the method's class.

    Raises ValueError, naming the method and the nearest valid name, for an unknown method or option and for other bits.
    """
    return _build(0, method, bits, {"axis": axis, "signed": signed, **options})


def act_quantizer(method: str, bits: int, *, signed: bool, **options: Any) -> Quantizer | None:
    """Return an activation quantizer (one grid per tensor), or None for 32 bits (float).

    Args:
        method: a key of METHODS; "ste" is "minmax". "mpact" with ``clip=S`` is its fixed form.
        bits: 1 to 16, or 32.
        signed: whether the tensor has negative values. An unsigned quantizer clips them to 0, as a ReLU does.
        options: keyword options of the method's class.

    Raises ValueError, naming the method and the nearest valid name, for an unknown method or option and for other bits.
    """
    return _build(1, method, bits, {"signed": signed, **options})


def _build(place: int, method: str, bits: int, options: dict[str, Any]) -> Quantizer | None:
    what, key = ("weight", "activation")[place], "minmax" if method == "ste" else method
    check_known(key, METHODS, f"{what} method")
    if bits == FLOAT_BITS:
        return None
    make = FixedMPACT if key == "mpact" and place and "clip" in options else METHODS[key][place]
    known = set(inspect.signature(make).parameters) - {"bits", "role"}
    for name in set(options) - known:
        takes = ", ".join(sorted(known))
        raise ValueError(f"{what} method {method!r} has no option {name!r}: it takes {takes}{nearest(name, known)}")
    return make(bits, **options)
