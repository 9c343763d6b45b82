"""What an FPGAI network is, a chain of layers with their integers, and ``record_of``: the same chain as a record.

FPGAI is the 8-bit toolchain of seed 002. Its files hold integers only; shapes and order live in C source, so that a
reader must be told the ``Stage``s. Symbols: ``q`` weight integers, ``zp`` zero point, ``m`` multiplier, real weight
``(q - zp) m 2^-shift``; activations are integers 0..255 of scale 1/255 and zero point 0. Its arithmetic is that of seed
002's C and NumPy programs without their overflow:

    acc = sum x (q - zp) + bias         x 0..255, zero padding       (ALGORITHMS 10.4)
    y   = (acc m) >> shift              arithmetic shift: floor, no rounding
    y   = min(max(y, 0), 255)           ReLU1, where the stage has it
    average pool: sum / n truncated toward zero

The record, which NumPy, C, memory images and crossbars run, rounds half up where FPGAI takes the floor. A layer's floor
is kept by a residual: the accumulators of a layer without weights, whose bias takes the rounding away again,

    (acc m + (-2^(s-1)) 1 + 2^(s-1)) >> s = (acc m) >> s.

An average pool is a depthwise layer of weights 2 and bias 1 - n, for windows of n places:

    (2 sum + 1 - n) / (2 n) + 1/2 = (sum + 1/2) / n, whose floor is that of sum / n whatever the multiplier's last bit.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import requants
from hq_lib.integer.check import check
from hq_lib.integer.emit import INT32, Writer
from hq_lib.integer.execute import output_integers
from hq_lib.integer.record import IntegerModel, TensorSpec

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


def run(net: Sequence[FpgaiLayer], images: Any, *, batch_size: int = 50) -> np.ndarray:
    """Return the integer logits of ``images``, int64 (N, C_out), equal to the C program's: those of ``record_of``.

    Args:
        net:        chain of layers; the first reads ``images``.
        images:     uint8 (N, C, H, W) raw pixels (an array or a CPU tensor), or (N, C) for a chain of linear layers.
        batch_size: images at once, >= 1; changes memory and speed only.

    Raises:
        FpgaiError: images of another dtype or shape, or what ``record_of`` refuses; names the layer.
    """
    images = np.asarray(images)
    need(images.dtype == np.uint8, f"FPGAI reads raw pixels, uint8; these images are {images.dtype}")
    need(images.ndim in (2, 4) and len(images) > 0, f"images (N, C, H, W) are needed, not {images.shape}")
    record = record_of(net, images.shape[1:])
    return output_integers(record, images.astype(np.float32) / 255, batch_size=batch_size).astype(np.int64)


def int32_overflows(net: Sequence[FpgaiLayer]) -> list[str]:
    """Return the names of the layers whose (acc) m can exceed int32 for some input 0..255: unsafe in the C program.

    The bound is max over channels of (255 sum |q - zp| + |bias|) m; it assumes that each layer's input is 0..255.
    """
    found = []
    for layer in net:
        centred = layer.weight.reshape(len(layer.weight), -1).astype(np.int64) - layer.zero_point
        worst = 255 * np.abs(centred).sum(1) + np.abs(layer.bias.astype(np.int64))
        if int(worst.max()) * layer.multiplier > r.ACC_MAX:
            found.append(layer.stage.name)
    return found


def record_of(net: Sequence[FpgaiLayer], shape: tuple[int, ...]) -> IntegerModel:
    """Return ``net`` as a record with the "fixed" requantizer; its logits are FPGAI's integers.

    Args:
        net:   a chain; each layer but the last clips (ReLU1).
        shape: (C, H, W) of its images, or (C,). Executors take pixel / 255, or the raw pixels.

    Raises:
        FpgaiError:  a layer that cannot read its input, or one without ReLU1 that is not the last; names it.
        RecordError: an accumulator that int32 does not hold; names the layer.
    """
    need(len(net) > 0, "an FPGAI net needs a layer")
    one = np.asarray(1.0, np.float32)
    writer = Writer("fixed")
    image = writer.add(TensorSpec("image", shape, "float32", 32, 0, 0, one, 0))
    x = TensorSpec("input", shape, "uint8", 8, 0, 255, np.asarray(1 / 255, np.float32), 0)
    x = writer.write(r.Quantize, "input", [image], x)
    for layer in net:
        stage, last = layer.stage, layer is net[-1]
        need(stage.relu1 or last, f"stage {stage.name!r} has no ReLU1: between layers a record holds 0..255")
        x = _layer(writer, layer, _readable(writer, stage, x), last=last and not stage.relu1)
        x = _pool(writer, stage, x) if stage.pool else x
    if len(x.shape) > 1:
        x = writer.write(r.Reshape, "flatten", [x], replace(x, name="flatten", shape=(math.prod(x.shape),)))
    meta = {"image": {"name": "pixels", "mean": [0.0] * shape[0], "std": [1.0] * shape[0]}}
    return check(IntegerModel("fixed", writer.tensors, tuple(writer.ops), image.name, x.name, meta))


def _readable(writer: Writer, stage: Stage, x: TensorSpec) -> TensorSpec:
    """Return ``x`` as the layer reads it: a linear layer flattens. Names the stage that cannot read it."""
    if len(stage.shape) == 4:
        kernel, sizes = stage.shape[2:], x.shape[1:]
        fits = len(x.shape) == 3 and x.shape[0] == stage.shape[1]
        fits = fits and all(n + 2 * stage.padding >= k for n, k in zip(sizes, kernel, strict=True))
        need(fits, f"{stage.name!r} with weight {stage.shape} and padding {stage.padding} cannot read {x.shape}")
        return x
    n = math.prod(x.shape)
    need(n == stage.shape[1], f"{stage.name!r} reads {stage.shape[1]} values, its input is {x.shape}")
    if len(x.shape) == 1:
        return x
    return writer.write(r.Reshape, f"{stage.name}.flatten", [x], replace(x, name=f"{stage.name}.flat", shape=(n,)))


def _layer(writer: Writer, layer: FpgaiLayer, x: TensorSpec, *, last: bool) -> TensorSpec:
    stage, n, (m, s) = layer.stage, len(layer.weight), (layer.multiplier, layer.shift)
    m, s = (m, s) if s else (2 * m, 1)  # the record shifts by one at least
    weight = layer.weight.astype(np.int16) - np.int16(layer.zero_point)
    geometry = {}
    if len(stage.shape) == 4:
        geometry = {"stride": (stage.stride,) * 2, "padding": (stage.padding,) * 4, "dilation": (1, 1), "groups": 1}
    w_scale = np.full(n, layer.scale, np.float32)
    common = {"weight_scale": w_scale, "acc_scale": np.float32(x.scale) * w_scale, "weight_bits": 8, **geometry}
    kind = r.Conv if geometry else r.Linear
    floor = TensorSpec(f"{stage.name}.floor", (), "int32", 32, *INT32, common["acc_scale"], 0)
    nothing = {"weight": np.zeros_like(weight, np.int8), "bias": np.full(n, -(2 ** (s - 1)), np.int32)}
    floor = writer.write(kind, floor.name, [x], floor, **nothing, **common, requant=None, residual=None)
    y = replace(x, name=stage.name)
    if last:
        y = TensorSpec(stage.name, (), "int32", 32, *INT32, np.asarray(1.0, np.float32), 0)
    fits = np.abs(weight).max() <= 127
    fields = {"weight": weight.astype(np.int8) if fits else weight, "bias": layer.bias, "requant": _dyadic(m, s, n)}
    residual = r.Residual(floor.name, _dyadic(1, s, n))
    return writer.write(kind, stage.name, [x, floor], y, **fields, **common, residual=residual)


def _dyadic(m: int, s: int, n: int) -> r.Requant:
    """Return m 2^-s exactly, for n channels."""
    return r.Requant(np.full(n, math.ldexp(m, -s), np.float32), np.full(n, m, np.int32), np.full(n, s, np.uint8))


def _pool(writer: Writer, stage: Stage, x: TensorSpec) -> TensorSpec:
    size, c = (stage.pool_size,) * 2, x.shape[0]
    need(len(x.shape) == 3 and min(x.shape[1:]) >= stage.pool_size,
         f"stage {stage.name!r}: a pool of {stage.pool_size} does not fit {x.shape}")  # fmt: skip
    name = f"{stage.name}.{stage.pool}"
    moved = {"stride": size, "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    if stage.pool == "max":
        return writer.write(r.MaxPool, name, [x], kernel=size, **moved)
    n = stage.pool_size**2
    half, scale = np.full(c, 1 / (2 * n)), np.full(c, 1 / (2 * n), np.float32)
    fields = {"weight": np.full((c, 1, *size), 2, np.int8), "bias": np.full(c, 1 - n, np.int32), "weight_bits": 8}
    fields |= {"weight_scale": scale, "acc_scale": np.float32(x.scale) * scale}
    (requant,) = requants((half.astype(np.float32), half), name=name)
    return writer.write(r.Conv, name, [x], **fields, **moved, groups=c, requant=requant, residual=None)
