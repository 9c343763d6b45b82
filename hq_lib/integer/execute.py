"""The NumPy executor: the reference that C, ONNX and crossbar are compared with, bit for bit.

It follows ``record``'s text operation by operation, over a batch at once, and imports nothing but NumPy. Raw pixels
become the input's integers by a table: what devices without floats do instead of normalising.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import FLOAT32_EXACT, RecordError, centred, padded, products, taps
from hq_lib.integer.check import need_model
from hq_lib.integer.record import IntegerModel, Requant, TensorSpec

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
        products:   makes a layer's sums of products from its integers (an analog engine, say); ``arithmetic.products``
                    does it exactly.
        watch:      is shown each operation with the integers it wrote, (B, *shape), batch after batch; integers that it
                    returns (not None) take their place.

    Raises:
        ImageError: names what the model takes and what came. RecordError: ``model`` is a graph: lower it first.
    """
    integers = output_integers(model, images, batch_size=batch_size, products=products, watch=watch)
    return real_values(model.tensors[model.output], integers)


def output_integers(
    model: IntegerModel, images: Any, *, batch_size: int = 50, products: Products = products, watch: Watch | None = None
) -> np.ndarray:
    """Return the integers of the tensor ``model.output``, (N, *shape); arguments and errors of ``run``."""
    need_model(model)
    images = as_images(images, model.tensors[model.input].shape)
    parts = [_run_batch(model, images[i : i + batch_size], products, watch) for i in range(0, len(images), batch_size)]
    return np.concatenate(parts)


def quantize(model: IntegerModel, images: Any) -> np.ndarray:
    """Return the integers of ``images`` (as ``run`` takes them) on the input grid: (N, C, H, W), uint8 or uint16."""
    return to_grid(as_images(images, model.tensors[model.input].shape), model.tensors[model.ops[0].output])


def real_values(spec: TensorSpec, x: np.ndarray) -> np.ndarray:
    """Return the real values of integers ``x`` (B, *spec.shape): f32(f32(q - z) * scale), float32."""
    values = (x.astype(np.int64) - spec.zero_point).astype(np.float32)
    return values * (per_channel(spec.scale, values) if spec.scale.ndim else spec.scale)


def levels(spec: TensorSpec) -> np.ndarray:
    """Return the real value of each integer 0 .. qmax of a tensor with one scale: float32 (qmax + 1,).

    Integers below qmin, which do not occur, have the value of qmin: a function need not exist beyond the range.
    """
    return real_values(spec, np.arange(spec.qmax + 1).clip(min=spec.qmin))


def to_grid(x: np.ndarray, out: TensorSpec) -> np.ndarray:
    """Return clamp(rint(f32(x / s)) + z) of float32 ``x`` (any shape), on the grid of ``out``."""
    low, high = out.qmin - out.zero_point, out.qmax - out.zero_point
    return _from_float(x / np.float32(out.scale), low, high, out.zero_point, out.dtype)


def per_channel(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return ``values`` (n,) shaped to multiply ``like`` (B, C, H, W) or (B, ..., C)."""
    return values[:, None, None] if like.ndim == 4 and len(values) > 1 else values


def as_images(images: Any, shape: Sequence[int | str]) -> np.ndarray:
    """Return ``images`` as an array (N, *shape), checked; axes of ``shape`` that are names may be of any length."""
    x = np.ascontiguousarray(np.asarray(images))
    wanted = tuple(m if isinstance(n, str) else n for n, m in zip(shape, x.shape[1:], strict=False))
    if x.dtype != np.float32 or len(wanted) < len(shape) or x.shape[1:] != wanted or not len(x):
        raise ImageError(f"the model takes float32 images (N, {', '.join(map(str, shape))}), not {x.dtype} {x.shape}")
    if np.isnan(x).any():
        raise ImageError(f"{int(np.isnan(x).any(axis=tuple(range(1, x.ndim))).sum())} images hold NaN")
    return x


def _run_batch(model: IntegerModel, images: np.ndarray, products: Products, watch: Watch | None) -> np.ndarray:
    values: dict[str, np.ndarray] = {model.input: images}
    last_use = {tensor: i for i, op in enumerate(model.ops) for tensor in op.inputs}
    for i, op in enumerate(model.ops):
        inputs = [(values[t], model.tensors[t]) for t in op.inputs]
        made = _executed(op, inputs, model.tensors[op.output], model.requantizer, products)
        instead = None if watch is None else watch(op, made)
        values[op.output] = made if instead is None else instead
        for tensor in set(op.inputs):
            if last_use[tensor] == i and tensor != model.output:
                del values[tensor]
    return values[model.output]


def _executed(
    op: r.Op, inputs: list[tuple[np.ndarray, TensorSpec]], out: TensorSpec, requantizer: r.Requantizer,
    products: Products,
) -> np.ndarray:  # fmt: skip
    x, spec = inputs[0]
    match op:
        case r.Quantize():
            return to_grid(x, out)
        case r.Conv() | r.Linear():
            acc = _add_bias(products(op, x, spec), op.bias)
            if op.requant is None:
                return acc.astype(np.int32)
            terms = [(acc, op.requant)]
            if op.residual is not None:
                other, spec = inputs[1]
                exact = np.float32 if spec.dtype != "int32" else np.int64
                terms.append((centred(other, spec, exact), op.residual.requant))
            return requantize(terms, out, requantizer)
        case r.Add() if requantizer == "float32":
            (a, m_a), (b, m_b) = (
                (x.astype(np.float64), q.multiplier.astype(np.float64))
                for (x, _), q in zip(inputs, op.requants, strict=True)
            )
            y = (a * m_a + (b * m_b + np.float64(op.offset)).astype(np.float32)).astype(np.float32)
            return _from_float(y, out.qmin, out.qmax, 0, out.dtype)
        case r.Add():
            terms = [(centred(x, s, np.int64), q) for (x, s), q in zip(inputs, op.requants, strict=True)]
            return requantize(terms, out, requantizer)
        case r.Mul():
            a, b = (centred(x, s, np.int32) for x, s in inputs)
            return requantize([(a * b, op.requant)], out, requantizer)
        case r.AvgPool():
            first, *rest = taps(padded(centred(x, spec, np.int32), op.padding), op.kernel, op.stride, op.dilation)
            acc = sum(rest, start=first)
            if op.requant is None:
                return (acc + np.int32(out.zero_point)).astype(out.dtype)
            return requantize([(acc, op.requant)], out, requantizer)
        case r.MaxPool():
            return reduce(np.maximum, taps(padded(x, op.padding), op.kernel, op.stride, op.dilation))
        case r.Concat():
            return np.concatenate([x for x, _ in inputs], axis=op.axis + 1)
        case r.Reshape():
            return x.reshape(len(x), *out.shape)
        case r.Transpose():
            return np.ascontiguousarray(x.transpose(0, *(a + 1 for a in op.axes)))
        case r.Slice():
            return np.ascontiguousarray(x[:, *map(slice, op.start, op.stop, op.step)])
        case r.Pad():
            return np.pad(x, [(0, 0), *zip(op.before, op.after, strict=True)], constant_values=spec.zero_point)
        case r.Clip():
            return np.clip(x, out.qmin, out.qmax)
        case r.Table():
            return op.values[x]
        case _:
            raise RecordError(f"{op.name!r}: unknown operation {type(op).__name__}")


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
    reals = [x.astype(np.float32, copy=False) for x, _ in terms]  # integers beyond 2^24: half to even
    for real, (_, q) in zip(reals, terms, strict=True):
        np.multiply(real, per_channel(q.multiplier, real), out=real)
    y = reals[0] if len(reals) == 1 else np.add(*reals, out=reals[0])
    return _from_float(y, low, high, z, out.dtype)


def _from_float(y: np.ndarray, low: int, high: int, z: int, dtype: str) -> np.ndarray:
    np.clip(y, low, high, out=y)
    np.rint(y, out=y)
    return (y.astype(np.int32) + np.int32(z)).astype(dtype)


def _add_bias(acc: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return ``acc`` + ``bias`` exactly: in float32 only while the sum stays below 2^24."""
    if acc.dtype == np.float32:
        room = FLOAT32_EXACT - int(np.abs(bias.astype(np.int64)).max(initial=0))
        if room <= 0 or max(acc.max(initial=0), -acc.min(initial=0)) >= room:
            acc = acc.astype(np.float64)
    return np.add(acc, per_channel(bias.astype(acc.dtype), acc), out=acc)


def normalized(model: IntegerModel, pixels: np.ndarray) -> np.ndarray:
    """Return uint8 ``pixels`` (..., C, H, W) as ``run`` takes them, float32.

        f32(f32(pixel - f32(f32(mean) * 255)) / f32(f32(std) * 255))        exactly what ``hq_lib.data.normalize`` makes

    Raises:
        RecordError: the record does not know its data set's mean and std (``lower(..., images=spec)`` stores them).
    """
    image = model.meta.get("image")
    if not isinstance(image, dict) or not {"mean", "std"} <= set(image):
        raise RecordError("the record holds no mean and std of its images: lower the network with images=spec")
    n_channels = model.tensors[model.input].shape[0]
    mean, std = (_column(image[key], n_channels, key) for key in ("mean", "std"))
    return (pixels.astype(np.float32) - mean) / std


def pixel_table(model: IntegerModel) -> np.ndarray:
    """Return (C, 256), uint8 or uint16: the input integer of each ``normalized`` pixel value 0..255 of each channel."""
    every = np.broadcast_to(np.arange(256)[:, None], (model.tensors[model.input].shape[0], 256, 1))
    return to_grid(normalized(model, every), model.tensors[model.ops[0].output])[..., 0]


def _column(values: object, n: int, key: str) -> np.ndarray:
    column = np.asarray(values, np.float32) * np.float32(255)
    if column.shape != (n,) or not np.all(np.isfinite(column)) or (key == "std" and not np.all(column > 0)):
        raise RecordError(f"the record's image {key} is {values!r:.60}: {n} numbers were expected")
    return column[:, None, None]
