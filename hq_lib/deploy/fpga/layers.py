"""What an FPGAI network is: a chain of layers, each the stage that says how it is executed, and its integers.

FPGAI is the 8-bit toolchain of seed 002. Its files hold integers only; shapes and order live in C source, so that a
reader must be told the ``Stage``s. Symbols: ``q`` weight integers, ``zp`` zero point, ``m`` multiplier, real weight
``(q - zp) m 2^-shift``; activations are integers 0..255 of scale 1/255 and zero point 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_MULTIPLIER = 255
"""The C program holds ``m`` in an unsigned char: 256 would become 0."""
MAX_SHIFT = 31
MAX_ELEMENTS = 2**28
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


class FpgaiError(ValueError):
    """A network that FPGAI cannot express, or a file that is not of its format; the message names the layer or file."""


def need(truth: bool | np.bool_, message: str) -> None:
    """Raise ``FpgaiError(message)`` unless ``truth``."""
    if not truth:
        raise FpgaiError(message)


def check_quant(multiplier: int, shift: int, zero_point: int, what: str) -> None:
    """Raise ``FpgaiError`` naming ``what`` unless the three numbers of a quant line lie in their ranges."""
    wrap = " (the C program keeps it in 8 bits, where 256 is 0: export again)" if multiplier == 256 else ""
    need(1 <= multiplier <= MAX_MULTIPLIER, f"{what}: multiplier {multiplier!r:.40} is not in 1..255{wrap}")
    need(0 <= shift <= MAX_SHIFT, f"{what}: shift {shift!r:.40} is not in 0..{MAX_SHIFT}")
    need(0 <= zero_point <= 255, f"{what}: zero point {zero_point!r:.40} is not in 0..255")


def plain_name(name: object, what: str) -> str:
    """Return ``name`` if it is a plain file name: no folder, no leading dot, letters, digits and ``_.-`` only."""
    ok = isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None
    need(ok, f"{what}: {name!r:.80} is no plain file name (letters, digits and _ . - only, no folders)")
    return str(name)


@dataclass(frozen=True)
class Stage:
    """How one layer of a chain is executed: layer, then ReLU1, then pool."""

    name: str
    """name of the layer"""
    shape: tuple[int, ...]
    """of its weight, (C_out, C_in, k_h, k_w) or (C_out, C_in)"""
    stride: int = 1
    """of a convolution, >= 1"""
    padding: int = 0
    """of a convolution, zeros on each side"""
    relu1: bool = True
    """clip to 0..255 after the layer; False for the logits"""
    pool: Literal["average", "max"] | None = None
    """pool after the clip"""
    pool_size: int = 2
    """rows, columns and stride of the pool; rows that do not fill a window are dropped"""

    def __post_init__(self) -> None:
        ok = len(self.shape) in (2, 4) and all(n >= 1 for n in self.shape) and math.prod(self.shape) <= MAX_ELEMENTS
        need(ok, f"stage {self.name!r}: weight shape {self.shape}; (C_out, C_in, k_h, k_w) or (C_out, C_in)")
        need(min(self.stride, self.pool_size) >= 1 and self.padding >= 0, f"stage {self.name!r}: stride or padding")
        pools = (None, "average", "max")
        need(self.pool in pools, f"stage {self.name!r}: pool {self.pool!r}; one of {pools}")


LENET = (
    Stage("conv1", (6, 1, 5, 5), padding=2, pool="average"),
    Stage("conv2", (16, 6, 5, 5), pool="average"),
    Stage("conv3", (120, 16, 5, 5)),
    Stage("fc1", (84, 120)),
    Stage("fc2", (10, 84), relu1=False),
)
"""The network of seed 002's LeNet.c: 28 x 28 digits, 61,470 weights, 236 biases."""


@dataclass(frozen=True, eq=False)
class FpgaiLayer:
    """One stage of a chain with its integers; a network is a sequence of these in execution order."""

    stage: Stage
    """how it is executed, and its name; the numbered files do not hold it"""
    weight: np.ndarray
    """uint8, of the stage's shape"""
    bias: np.ndarray
    """int32 (C_out,), in accumulator steps: bias x 255 / (m 2^-shift)"""
    multiplier: int
    """m, 1..255"""
    shift: int
    """0..31, bits of the arithmetic right shift"""
    zero_point: int
    """integer of weight 0, 0..255"""

    def __post_init__(self) -> None:
        (name, shape), w, b = (self.stage.name, self.stage.shape), self.weight, self.bias
        need(
            w.dtype == np.uint8 and w.shape == shape,
            f"layer {name!r}: weight is {w.dtype} {w.shape}, not uint8 {shape}",
        )
        need(b.dtype == np.int32 and b.shape == shape[:1], f"layer {name!r}: bias is {b.dtype} {b.shape}")
        check_quant(self.multiplier, self.shift, self.zero_point, f"layer {name!r}")

    @property
    def scale(self) -> float:
        """Real units per weight step, m 2^-shift."""
        return math.ldexp(self.multiplier, -self.shift)
