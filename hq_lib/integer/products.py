"""A layer's result before a quantizer rounds it, s_x w_scale_c sum w (q - z) + bias_c, and how it is stored.

Batch norms behind it only change w_scale and bias.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hq_lib.graph import QuantizedWeight
from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import forms, largest, requants
from hq_lib.integer.emit import INT32, Writer
from hq_lib.integer.nodes import LowerError
from hq_lib.integer.record import TensorSpec

BIAS_MAX = 2**30
"""Largest bias, and largest sum of products, that ``in_storage`` aims at: together they fit int32."""
MIN_SCALE, MIN_PRODUCT = 1e-25, 5e-34
"""Smallest real weight step that a batch norm leaves, and smallest product of it with the input's scale, which so stays
a normal float32 number."""
NORM_STEPS = 2**14
"""The weight (int16) with which a batch norm becomes a depthwise layer: its bias has so many steps per input step."""


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or linear layer that waits for the grid of its output."""

    name: str
    """dotted name of the layer"""
    x: TensorSpec
    """its input, on a grid"""
    w: np.ndarray
    """int64 (C_out, ...): integers minus zero point"""
    w_scale: np.ndarray
    """float32 (C_out,): real units per step of w, batch norm included"""
    bias: np.ndarray
    """float64 (C_out,), real units"""
    w_bits: int
    """of the trained grid, as a network file packs it"""
    geometry: dict[str, Any] | None
    """stride, padding, dilation and groups of a convolution; None: linear"""

    @property
    def acc_scale(self) -> np.ndarray:
        """Real units per accumulator step, f32(s_x s_w): float32 (C_out,)."""
        return np.float32(self.x.scale) * self.w_scale

    def write(self, writer: Writer, out: TensorSpec) -> TensorSpec:
        """Write the layer on the grid of ``out``, whose range already holds its clips."""
        term = in_storage(self)
        (requant,) = requants(forms((term.x.scale, term.w_scale), (out.scale,)), name=self.name)
        return term.write_layer(writer, out, requant)

    def write_accumulators(self, writer: Writer, name: str) -> TensorSpec:
        """Write its int32 accumulators (of a term that is ``in_storage``)."""
        return self.write_layer(writer, TensorSpec(name, (), "int32", 32, *INT32, self.acc_scale, 0))

    def write_layer(
        self, writer: Writer, out: TensorSpec, requant: r.Requant | None = None, other: TensorSpec | None = None,
        residual: r.Residual | None = None,
    ) -> TensorSpec:  # fmt: skip
        """Write the operation itself, for a term that is ``in_storage``; ``other`` is the tensor of ``residual``."""
        bias = np.rint(self.bias / self.acc_scale.astype(np.float64))
        storage = np.int8 if self.w.min() >= -(2**7) and self.w.max() < 2**7 else np.int16
        if self.w.min() < -(2**15) or self.w.max() >= 2**15 or np.abs(bias).max() > INT32[1]:
            raise LowerError(f"layer {self.name!r}: its weights or biases are too wide for int16 and int32")
        fields: dict[str, Any] = {
            "weight": self.w.astype(storage), "weight_scale": self.w_scale, "bias": bias.astype(np.int32),
            "acc_scale": self.acc_scale, "weight_bits": self.w_bits, "requant": requant, "residual": residual,
        }  # fmt: skip
        kind, inputs = r.Linear if self.geometry is None else r.Conv, [self.x] if other is None else [self.x, other]
        return writer.write(kind, self.name, inputs, out, **fields, **(self.geometry or {}))


def product(name: str, layer: nn.Module, x: TensorSpec) -> Product:
    """Return the term of quantized ``layer`` (conv2d, linear, convtranspose2d on a spread input) on tensor ``x``.

    Raises:
        LowerError: its weight is in float, or its quantizer is switched off; a linear layer of rows and columns.
    """
    if not isinstance(layer, QuantizedWeight):
        raise LowerError(f"layer {name!r}: {type(layer).__name__} is in float; name it a weight in the policy")
    quantizer = layer.weight_quantizer
    if quantizer is None or not getattr(quantizer, "enabled", True):
        raise LowerError(
            f"layer {name!r}: its weight is in float; give it 16 bits or fewer in the policy "
            f"(overrides={{{name!r}: {{'weight': 8}}}}), or switch its quantizer on"
        )
    if isinstance(layer, nn.Linear) and len(x.shape) > 2:
        raise LowerError(
            f"layer {name!r} reads {x.shape}, and a linear layer takes (channels,) or (tokens, channels): flatten rows "
            f"and columns before it (x.flatten(1, 2)), or make it a 1x1 convolution"
        )
    weight = layer.weight.detach()
    w_int, grid = quantizer.integers(weight)  # type: ignore[operator]
    w = _numpy(w_int, np.int64) - _numpy(grid.zero_point, np.int64)
    scale, axis = _numpy(grid.scale, np.float32), 0
    if isinstance(layer, nn.ConvTranspose2d):
        w, axis = turned(w, layer.groups), 1
    if scale.size > 1 and (scale.size != len(w) or scale.shape[axis] != len(w)):
        raise LowerError(f"layer {name!r}: weight scales of shape {scale.shape} are not one per output channel")
    scale = np.broadcast_to(scale.reshape(-1), len(w)).astype(np.float32)
    bias = layer.bias
    real_bias = np.zeros(len(w)) if bias is None else _numpy(bias, np.float64)
    bits = ((grid.qmax - grid.qmin) // grid.step).bit_length()
    return Product(name, x, w, scale, real_bias, bits, _geometry(name, layer))


def turned(w: np.ndarray, groups: int) -> np.ndarray:
    """Return the weight (C_in, C_out / groups, k_h, k_w) of a transposed convolution as that of the convolution of a
    spread input: (C_out, C_in / groups, k_h, k_w), turned by half a turn."""
    c_in, per_group, *kernel = w.shape
    split = w.reshape(groups, c_in // groups, per_group, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(split.reshape(groups * per_group, c_in // groups, *kernel)[:, :, ::-1, ::-1])


def _numpy(values: torch.Tensor, dtype: type) -> np.ndarray:
    return values.detach().cpu().numpy().astype(dtype)


def _geometry(name: str, layer: nn.Module) -> dict[str, Any] | None:
    if isinstance(layer, nn.ConvTranspose2d):
        return {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": tuple(layer.dilation), "groups": layer.groups}
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.padding_mode != "zeros":
        raise LowerError(
            f"layer {name!r} is padded by {layer.padding_mode!r}: only padding by zeros has an integer form"
        )
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        before = [total // 2 for total in totals]
        after = [total - b for total, b in zip(totals, before, strict=True)]
    else:
        before = after = [0, 0] if layer.padding == "valid" else [int(p) for p in layer.padding]
    return {
        "stride": tuple(layer.stride),
        "padding": (before[0], before[1], after[0], after[1]),
        "dilation": tuple(layer.dilation),
        "groups": layer.groups,
    }


def norm_gain(norm: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return (g, h), float64 (C,), of a batch norm in eval mode: y = g x + h."""
    if norm.running_var is None or norm.running_mean is None:
        raise LowerError(f"{norm}: a batch norm without running statistics has no integer form")
    mean = _numpy(norm.running_mean, np.float64)  # type: ignore[arg-type]
    variance = _numpy(norm.running_var, np.float64)  # type: ignore[arg-type]
    g = 1 / np.sqrt(variance + norm.eps)  # type: ignore[operator]
    g = g if norm.weight is None else g * _numpy(norm.weight, np.float64)  # type: ignore[arg-type]
    h = -g * mean
    return g, h if norm.bias is None else h + _numpy(norm.bias, np.float64)  # type: ignore[arg-type]


def with_norm(term: Product, norm: nn.Module) -> Product:
    """Return ``term`` followed by ``norm``: exact in w (signs only), w_scale and bias absorb the rest."""
    g, h = norm_gain(norm)
    sign = np.sign(g).astype(np.int64).reshape(-1, *[1] * (term.w.ndim - 1))
    gain = np.where(g == 0, 1.0, np.abs(g))  # a dead channel has w = 0: its scale is free
    least = max(MIN_SCALE, MIN_PRODUCT / float(term.x.scale))
    w_scale = np.maximum(term.w_scale * gain, least).astype(np.float32)
    return replace(term, w=term.w * sign, w_scale=w_scale, bias=g * term.bias + h)


def norm_product(name: str, norm: nn.Module, x: TensorSpec) -> Product:
    """Return a batch norm that reads a known tensor, as a 1x1 depthwise convolution with weights +-NORM_STEPS."""
    if len(x.shape) != 3:
        raise LowerError(f"batch norm {name!r} reads a tensor of shape {x.shape}; put it behind a layer, or fold it")
    plain = unchanged(name, x)
    steps = replace(plain, w=plain.w * NORM_STEPS, w_scale=plain.w_scale / np.float32(NORM_STEPS))
    return with_norm(steps, norm)


def unchanged(name: str, x: TensorSpec) -> Product:
    """Return ``x`` (C, H, W) itself as a 1x1 depthwise convolution."""
    n = x.shape[0]
    geometry = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": n}
    return Product(name, x, np.ones((n, 1, 1, 1), np.int64), np.ones(n, np.float32), np.zeros(n), 8, geometry)


def in_storage(term: Product) -> Product:
    """Return ``term`` as it is stored: weights that fill int8 or int16, and scales coarse enough for every bias.

    Weights of few bits are multiplied, and their scale divided, by a power of two: exact, and the bias is rounded to
    finer steps. A channel with (nearly) no weights has a tiny scale, in which its bias would exceed int32: its weights
    are rounded to a grid of bias / 2^30 instead, which moves outputs by at most n_w max|q - z| |bias| 2^-30 / 2.
    """
    step = 2 ** _spare_bits(term)
    least = np.abs(term.bias) * (step / BIAS_MAX) / float(term.x.scale)
    coarse = least > term.w_scale
    w_scale = np.where(coarse, least.astype(np.float32), term.w_scale)
    ratio = (term.w_scale / w_scale).astype(np.float64).reshape(-1, *[1] * (term.w.ndim - 1))
    w = np.where(coarse.reshape(ratio.shape), np.rint(term.w * ratio).astype(np.int64), term.w)
    return replace(term, w=w * step, w_scale=w_scale / np.float32(step))


def _spare_bits(term: Product) -> int:
    """How many bits the weights may grow: inside their int8 or int16, with every sum of products below 2^30."""
    largest_w = int(np.abs(term.w).max())
    room = 2**7 - 1 if term.w.min() >= -(2**7) and term.w.max() < 2**7 else 2**15 - 1
    if largest_w == 0:
        return 0
    sums = int(np.abs(term.w).reshape(len(term.w), -1).sum(1).max()) * max(1, largest(term.x))
    return max(0, int(math.log2(min(room / largest_w, BIAS_MAX / sums))))
