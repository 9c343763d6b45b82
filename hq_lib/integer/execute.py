"""The NumPy executor: the reference that C, ONNX and crossbar are compared with, bit for bit.

It follows ``record``'s text operation by operation, over a batch at once, and imports nothing but NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.check import need_model
from hq_lib.integer.record import IntegerModel, Requant, TensorSpec
from hq_lib.integer.sums import FLOAT32_EXACT, centred, padded, products, taps

Products = Callable[[r.Layer, np.ndarray, TensorSpec], np.ndarray]
Watch = Callable[[r.Op, np.ndarray], np.ndarray | None]


class ImageError(ValueError):
    """Images that the model cannot take: another shape, NaN, or no image at all."""


def run(
    model: IntegerModel,
    images: Any,
    *,
    batch_size: int = 50,
    products: Products = products,
    watch: Watch | None = None,
) -> np.ndarray:
    """Return the logits of ``images``: float32 (N, n_classes), the same bits as every other executor's.

    Args:
        model:      from ``lower`` or ``load``.
        images:     (N, C, H, W) float32 (an array or a CPU tensor), normalised as in training; finite or infinite.
        batch_size: images at once, >= 1; changes memory and speed only.
        products:   makes a layer's sums of products from its integers (an analog engine, say); see ``sums.products``.
        watch:      is shown each operation with the integers it wrote, (B, *shape), batch after batch; integers that it
                    returns (not None) take their place.

    Raises:
        ImageError: names what the model takes and what came. RecordError: ``model`` is a graph: lower it first.
    """
    need_model(model)
    images = _as_images(model, images)
    parts = [_run_batch(model, images[i : i + batch_size], products, watch) for i in range(0, len(images), batch_size)]
    return np.concatenate(parts)


def quantize(model: IntegerModel, images: Any) -> np.ndarray:
    """Return the integers of ``images`` (as ``run`` takes them) on the input grid: (N, C, H, W), uint8 or uint16."""
    return to_grid(_as_images(model, images), model.tensors[model.ops[0].output])


def real_values(spec: TensorSpec, x: np.ndarray) -> np.ndarray:
    """Return the real values of integers ``x`` (B, *spec.shape): f32(f32(q - z) * scale), float32."""
    values = (x.astype(np.int64) - spec.zero_point).astype(np.float32)
    return values * (per_channel(spec.scale, values) if spec.scale.ndim else spec.scale)


def to_grid(x: np.ndarray, out: TensorSpec) -> np.ndarray:
    """Return clamp(rint(f32(x / s)) + z) of float32 ``x`` (any shape), on the grid of ``out``."""
    low, high = out.qmin - out.zero_point, out.qmax - out.zero_point
    return _from_float(x / np.float32(out.scale), low, high, out.zero_point, out.dtype)


def per_channel(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return ``values`` (n,) shaped to multiply ``like`` (B, C, H, W) or (B, ..., C)."""
    return values[:, None, None] if like.ndim == 4 and len(values) > 1 else values


def _as_images(model: IntegerModel, images: Any) -> np.ndarray:
    x = np.ascontiguousarray(np.asarray(images))
    shape = model.tensors[model.input].shape
    if x.dtype != np.float32 or x.shape[1:] != shape or not len(x):
        raise ImageError(f"the model takes float32 images (N, {', '.join(map(str, shape))}), not {x.dtype} {x.shape}")
    if np.isnan(x).any():
        raise ImageError(f"{int(np.isnan(x).any(axis=tuple(range(1, x.ndim))).sum())} images hold NaN")
    return x


def _run_batch(model: IntegerModel, images: np.ndarray, products: Products, watch: Watch | None) -> np.ndarray:
    values: dict[str, np.ndarray] = {model.input: images}
    last_use = {tensor: i for i, op in enumerate(model.ops) for tensor in op.inputs}
    for i, op in enumerate(model.ops):
        specs = [model.tensors[t] for t in op.inputs]
        inputs, out = [values[t] for t in op.inputs], model.tensors[op.output]
        if isinstance(op, r.Layer):
            values[op.output] = _layer(op, inputs, specs, out, model.requantizer, products)
        elif isinstance(op, r.Add | r.AvgPool | r.Mul):
            values[op.output] = _SUMS[type(op)](op, inputs, specs, out, model.requantizer)
        else:
            values[op.output] = _MOVES[type(op)](op, inputs, specs, out)
        if watch is not None and (instead := watch(op, values[op.output])) is not None:
            values[op.output] = instead
        for tensor in set(op.inputs):
            if last_use[tensor] == i and tensor != model.output:
                del values[tensor]
    return real_values(model.tensors[model.output], values[model.output])


def requantize(terms: list[tuple[np.ndarray, Requant]], out: TensorSpec, requantizer: r.Requantizer) -> np.ndarray:
    """Return q_y of accumulators (and, second, of centred residuals): see ``record``. Terms may be overwritten.

    Args:
        terms:       (integer-valued array, its multipliers), one or two.
        out:         tensor written.
        requantizer: "float32" or "fixed".
    """
    low, high, z = out.qmin - out.zero_point, out.qmax - out.zero_point, out.zero_point
    if requantizer == "fixed":
        shift = per_channel(terms[0][1].shift.astype(np.int64), terms[0][0])
        total = sum(x.astype(np.int64) * per_channel(q.fixed.astype(np.int64), x) for x, q in terms)
        y = np.right_shift(total + (np.int64(1) << (shift - 1)), shift)
        return (np.clip(y, low, high) + z).astype(out.dtype)
    reals = [_float32(x) for x, _ in terms]
    for real, (_, q) in zip(reals, terms, strict=True):
        np.multiply(real, per_channel(q.multiplier, real), out=real)
    y = reals[0] if len(reals) == 1 else np.add(*reals, out=reals[0])
    return _from_float(y, low, high, z, out.dtype)


def _float32(x: np.ndarray) -> np.ndarray:
    """Return integer-valued ``x`` rounded to float32 (half to even), its own memory where it can be."""
    return x if x.dtype == np.float32 else x.astype(np.float32)


def _from_float(y: np.ndarray, low: int, high: int, z: int, dtype: str) -> np.ndarray:
    np.clip(y, low, high, out=y)
    np.rint(y, out=y)
    return (y.astype(np.int32) + np.int32(z)).astype(dtype)


def _layer(
    op: r.Layer, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec, requantizer: r.Requantizer,
    products: Products,
) -> np.ndarray:  # fmt: skip
    acc = products(op, inputs[0], specs[0])
    acc = _add_bias(acc, op.bias)
    if op.requant is None:
        return acc.astype(np.int32)
    terms = [(acc, op.requant)]
    if op.residual is not None:
        dtype = np.float32 if specs[1].dtype != "int32" else np.int64
        terms.append((centred(inputs[1], specs[1], dtype), op.residual.requant))
    return requantize(terms, out, requantizer)


def _add_bias(acc: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return ``acc`` + ``bias`` exactly: in float32 only while the sum stays below 2^24."""
    if acc.dtype == np.float32:
        room = FLOAT32_EXACT - int(np.abs(bias.astype(np.int64)).max(initial=0))
        if room <= 0 or max(acc.max(initial=0), -acc.min(initial=0)) >= room:
            acc = acc.astype(np.float64)
    return np.add(acc, per_channel(bias.astype(acc.dtype), acc), out=acc)


def _add(
    op: r.Add, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec, requantizer: r.Requantizer
) -> np.ndarray:
    if requantizer == "fixed":
        terms = [(centred(x, s, np.int64), q) for x, s, q in zip(inputs, specs, op.requants, strict=True)]
        return requantize(terms, out, requantizer)
    a, b = (x.astype(np.float64) * q.multiplier.astype(np.float64) for x, q in zip(inputs, op.requants, strict=True))
    y = (b + np.float64(op.offset)).astype(np.float32)
    y = (a + y).astype(np.float32)
    return _from_float(y, out.qmin, out.qmax, 0, out.dtype)


def _avg_pool(
    op: r.AvgPool, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec, requantizer: r.Requantizer
) -> np.ndarray:
    x = centred(inputs[0], specs[0], np.int32)
    if op.kernel == x.shape[2:] and not any(op.padding):
        acc = x.sum((2, 3), keepdims=True, dtype=np.int32)
    else:
        first, *rest = taps(padded(x, op.padding), op.kernel, op.stride, (1, 1))
        acc = sum(rest, start=first)
    if op.requant is None:
        return (acc + np.int32(out.zero_point)).astype(out.dtype)
    return requantize([(acc, op.requant)], out, requantizer)


def _mul(
    op: r.Mul, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec, requantizer: r.Requantizer
) -> np.ndarray:
    a, b = (centred(x, spec, np.int32) for x, spec in zip(inputs, specs, strict=True))
    return requantize([(a * b, op.requant)], out, requantizer)


def _quantize(op: r.Op, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    return to_grid(inputs[0], out)


def _max_pool(op: r.MaxPool, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    views = taps(padded(inputs[0], op.padding, fill=0), op.kernel, op.stride, op.dilation)
    y = views[0].copy()
    for view in views[1:]:
        np.maximum(y, view, out=y)
    return y


def _concat(op: r.Concat, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    return np.concatenate(inputs, axis=op.axis + 1)


def _reshape(op: r.Reshape, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    return inputs[0].reshape(len(inputs[0]), *out.shape)


def _transpose(op: r.Transpose, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    return np.ascontiguousarray(inputs[0].transpose(0, *(a + 1 for a in op.axes)))


def _slice(op: r.Slice, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    ranges = (slice(*ends) for ends in zip(op.start, op.stop, op.step, strict=True))
    return np.ascontiguousarray(inputs[0][:, *ranges])


def _pad(op: r.Pad, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    widths = [(0, 0), *zip(op.before, op.after, strict=True)]
    return np.pad(inputs[0], widths, constant_values=specs[0].zero_point)


def _clip(op: r.Clip, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    return np.clip(inputs[0], out.qmin, out.qmax)


def _table(op: r.Table, inputs: list[np.ndarray], specs: list[TensorSpec], out: TensorSpec) -> np.ndarray:
    return op.values[inputs[0]]


_SUMS: dict[type[r.Op], Callable[..., np.ndarray]] = {r.Add: _add, r.AvgPool: _avg_pool, r.Mul: _mul}
_MOVES: dict[type[r.Op], Callable[..., np.ndarray]] = {
    r.Quantize: _quantize, r.MaxPool: _max_pool, r.Concat: _concat, r.Reshape: _reshape, r.Transpose: _transpose,
    r.Slice: _slice, r.Pad: _pad, r.Clip: _clip, r.Table: _table,
}  # fmt: skip
