"""Quantizers by method name and bits: the two functions that a bit policy calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from hq_lib.quantizers.base import Quantizer
from hq_lib.quantizers.dorefa import DoReFaAct, DoReFaHardwareWeight, DoReFaWeight
from hq_lib.quantizers.dsq import DSQ
from hq_lib.quantizers.lsq import LSQ, LSQPlusAct, LSQPlusWeight
from hq_lib.quantizers.minmax import AciqAct, AciqWeight, MinMaxAct, MinMaxWeight
from hq_lib.quantizers.pact import MPACT, PACT, FixedMPACT
from hq_lib.results.hints import check_known, nearest

FLOAT_BITS = 32
"""Bits that mean "leave it float"."""

WEIGHT_METHODS: dict[str, Callable[..., Quantizer]] = {
    "minmax": MinMaxWeight,
    "aciq": AciqWeight,
    "dorefa": DoReFaWeight,
    "dorefa_hw": DoReFaHardwareWeight,
    "pact": DoReFaWeight,
    "mpact": DoReFaHardwareWeight,
    "lsq": partial(LSQ, role="weight"),
    "lsq_plus": LSQPlusWeight,
    "dsq": partial(DSQ, role="weight"),
}
"""Weight quantizer of each method. PACT is about activations and takes DoReFa's weights, mPACT the hardware form."""

ACT_METHODS: dict[str, Callable[..., Quantizer]] = {
    "minmax": MinMaxAct,
    "aciq": AciqAct,
    "dorefa": DoReFaAct,
    "dorefa_hw": DoReFaAct,
    "pact": PACT,
    "mpact": MPACT,
    "lsq": partial(LSQ, role="act"),
    "lsq_plus": LSQPlusAct,
    "dsq": partial(DSQ, role="act"),
}
"""Activation quantizer of each method."""


def weight_quantizer(
    method: str, bits: int, *, axis: int | None = 0, signed: bool = True, **options: Any
) -> Quantizer | None:
    """Return a weight quantizer, or None for 32 bits (float).

    Args:
        method: a key of WEIGHT_METHODS; "ste" is "minmax".
        bits: 1 to 16, or 32.
        axis: 0 for a scale per output channel, None for one per tensor (what the papers of DoReFa, PACT, LSQ, DSQ do).
        signed: False for an asymmetric grid (min-max) or weights that are never negative.
        options: keyword options of the method's class.

    Raises ValueError, naming the method and the nearest valid name, for an unknown method or option and for other bits.
    """
    return _build(WEIGHT_METHODS, "weight", method, bits, {"axis": axis, "signed": signed, **options})


def act_quantizer(method: str, bits: int, *, signed: bool, **options: Any) -> Quantizer | None:
    """Return an activation quantizer (one grid per tensor), or None for 32 bits (float).

    Args:
        method: a key of ACT_METHODS; "ste" is "minmax". "mpact" with ``clip=S`` is its fixed form.
        bits: 1 to 16, or 32.
        signed: whether the tensor has negative values. An unsigned quantizer clips them to 0, as a ReLU does.
        options: keyword options of the method's class.

    Raises ValueError, naming the method and the nearest valid name, for an unknown method or option and for other bits.
    """
    fixed = {"mpact": FixedMPACT} if "clip" in options else {}
    return _build({**ACT_METHODS, **fixed}, "activation", method, bits, {"signed": signed, **options})


def _build(
    methods: dict[str, Callable[..., Quantizer]], what: str, method: str, bits: int, options: dict[str, Any]
) -> Quantizer | None:
    key = "minmax" if method == "ste" else method
    check_known(key, methods, f"{what} method")
    if bits == FLOAT_BITS:
        return None
    known = set(inspect.signature(methods[key]).parameters) - {"bits", "role"}
    for name in set(options) - known:
        takes = ", ".join(sorted(known))
        raise ValueError(f"{what} method {method!r} has no option {name!r}: it takes {takes}{nearest(name, known)}")
    return methods[key](bits, **options)
