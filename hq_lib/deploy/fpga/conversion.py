"""``record_of``: an FPGAI chain as an integer record, so that NumPy, C, memory images and crossbars run it.

The record rounds half up where FPGAI takes the floor. A layer's floor is kept by a residual: the accumulators of a
layer without weights, whose bias takes the rounding away again,

    (acc m + (-2^(s-1)) 1 + 2^(s-1)) >> s = (acc m) >> s.

An average pool is a depthwise layer of weights 2 and bias 1 - n, for windows of n places:

    (2 sum + 1 - n) / (2 n) + 1/2 = (sum + 1/2) / n, whose floor is that of sum / n whatever the multiplier's last bit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hq_lib.deploy.fpga.layers import FpgaiLayer, FpgaiNet, Stage, need
from hq_lib.integer import record as r
from hq_lib.integer.check import check
from hq_lib.integer.emit import INT32, Writer, windowed
from hq_lib.integer.record import IntegerModel, TensorSpec
from hq_lib.integer.requant import single

_PLAIN = {"dilation": (1, 1), "groups": 1}


def record_of(net: FpgaiNet, shape: tuple[int, int, int]) -> IntegerModel:
    """Return ``net`` as a record with the "fixed" requantizer; its logits are FPGAI's integers.

    Args:
        net:   a chain; each layer but the last clips (ReLU1).
        shape: (C, H, W) of its images. Executors take pixel / 255, or the raw pixels.

    Raises:
        FpgaiError:  a layer that cannot read its input, or one without ReLU1 that is not the last; names it.
        RecordError: an accumulator that int32 does not hold; names the layer.
    """
    one = np.asarray(1.0, np.float32)
    writer = Writer("fixed")
    image = writer.add(TensorSpec("image", shape, "float32", 32, 0, 0, one, 0))
    x = TensorSpec("input", shape, "uint8", 8, 0, 255, np.asarray(1 / 255, np.float32), 0)
    x = writer.write(r.Quantize, "input", [image], x)
    for stage, layer in zip(net.stages, net.layers, strict=True):
        last = stage is net.stages[-1]
        need(stage.relu1 or last, f"stage {stage.name!r} has no ReLU1: between layers a record holds 0..255")
        x = _layer(writer, stage, layer, _readable(writer, stage, x), last=last and not stage.relu1)
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


def _layer(writer: Writer, stage: Stage, layer: FpgaiLayer, x: TensorSpec, *, last: bool) -> TensorSpec:
    n, (m, s) = len(layer.weight), (layer.multiplier, layer.shift)
    m, s = (m, s) if s else (2 * m, 1)  # the record shifts by one at least
    weight = layer.weight.astype(np.int16) - np.int16(layer.zero_point)
    geometry, shape = {}, (n,)
    if len(stage.shape) == 4:
        geometry = {"stride": (stage.stride,) * 2, "padding": (stage.padding,) * 4, **_PLAIN}
        shape = windowed((n, *x.shape[1:]), weight.shape[2:], (stage.stride,) * 2, (stage.padding,) * 4, (1, 1))
    w_scale = np.full(n, layer.scale, np.float32)
    common = {"weight_scale": w_scale, "acc_scale": np.float32(x.scale) * w_scale, "weight_bits": 8, **geometry}
    kind = r.Conv if geometry else r.Linear
    floor = TensorSpec(f"{stage.name}.floor", shape, "int32", 32, *INT32, np.float32(x.scale) * w_scale, 0)
    nothing = {"weight": np.zeros_like(weight, np.int8), "bias": np.full(n, -(2 ** (s - 1)), np.int32)}
    floor = writer.write(kind, floor.name, [x], floor, **nothing, **common, requant=None, residual=None)
    y = replace(x, name=stage.name, shape=shape)
    if last:
        y = TensorSpec(stage.name, shape, "int32", 32, *INT32, np.asarray(1.0, np.float32), 0)
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
    out = replace(x, name=name, shape=windowed(x.shape, size, size, (0,) * 4, (1, 1)))
    moved = {"stride": size, "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    if stage.pool == "max":
        return writer.write(r.MaxPool, name, [x], out, kernel=size, **moved)
    n = stage.pool_size**2
    half, scale = np.full(c, 1 / (2 * n)), np.full(c, 1 / (2 * n), np.float32)
    fields = {"weight": np.full((c, 1, *size), 2, np.int8), "bias": np.full(c, 1 - n, np.int32), "weight_bits": 8}
    fields |= {"weight_scale": scale, "acc_scale": np.float32(x.scale) * scale}
    requant = single(half.astype(np.float32), half)
    return writer.write(r.Conv, name, [x], out, **fields, **moved, groups=c, requant=requant, residual=None)
