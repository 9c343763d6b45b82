"""The arithmetic of integer networks: multipliers, proofs that nothing overflows, and exact sums of products.

From real multipliers to the numbers that executors hold, float32, and 31-bit integer with a right shift:

    m = M 2^-S,   M = rint(m 2^S) in [2^30, 2^31),   S in 1..62        ALGORITHMS 10.1; Jacob et al. 2018, eq. 5 and 6

where two terms share one sum the larger has M in [2^29, 2^30), so that the sum of both and the rounding fits int64.

Sums of products, convolutions and linear layers on integers, are made in the fastest dtype that cannot lose a bit:
float32 matrix products where sum |w| max|q - z| < 2^24 (every partial sum is then an exact float32 integer, in any
order), float64 elsewhere (the overflow proof keeps sums below 2^31 < 2^53). Depthwise layers sum in int32.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hq_lib.integer.record import ACC_MAX, Add, AvgPool, Conv, Layer, Mul, Requant, TensorSpec

MAX_SHIFT = 62


class RecordError(ValueError):
    """An integer record that cannot be made, or a file that holds none; the message names the operation or file."""


def forms(over: Sequence[Any], under: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return prod over / prod under, (n,), float32 after every step and float64: what a ``Requant`` is made of."""
    found = []
    for dtype in (np.float32, np.float64):
        top, bottom = (
            math.prod((np.asarray(value, dtype).reshape(-1) for value in values), start=dtype(1))
            for values in (over, under)
        )
        found.append(np.asarray(top / bottom))
    return found[0], found[1]


def requants(*terms: tuple[np.ndarray, np.ndarray], name: str = "") -> tuple[Requant, ...]:
    """Return the ``Requant`` of each term, one or two, of one sum; two share a shift per channel.

    Args:
        terms: of each the float32 form (n,), rounded as the executors' text says, and float64 (n,), the same ratio
               unrounded: what the fixed form approximates, relative error <= 2^-31 (2^-30 where two share a sum).
        name:  of the operation, for the error.

    Raises:
        RecordError: names the operation, whose multiplier is negative, not finite, or >= 2^30 (2^29).
    """
    top, exact = 31 - len(terms), np.stack([exact for _, exact in terms])
    if not np.all(np.isfinite(exact)) or np.any(exact < 0):
        raise RecordError(f"{name!r}: a multiplier is negative or not finite: {exact!r:.200}")
    greatest = exact.max(0)
    _, exponent = np.frexp(greatest)  # greatest in [2^(exponent - 1), 2^exponent)
    shift = top + 1 - exponent.astype(np.int64)
    shift = np.where(np.rint(np.ldexp(greatest, np.minimum(shift, MAX_SHIFT))) >= 2.0 ** (top + 1), shift - 1, shift)
    shift = np.where(greatest == 0, 1, np.minimum(shift, MAX_SHIFT))
    if np.any(shift < 1):
        raise RecordError(
            f"{name!r}: a multiplier of {greatest.max():.3g} is too large for {top + 1} bits and a right shift: "
            "the grid of its output is far too fine for its sums; calibrate it on images that reach it"
        )
    fixed = np.rint(np.ldexp(exact, shift)).astype(np.int32)
    return tuple(
        Requant(m.astype(np.float32), f, shift.astype(np.uint8)) for (m, _), f in zip(terms, fixed, strict=True)
    )


def largest(spec: TensorSpec) -> int:
    """Return max |q - z| over the integers that ``spec`` admits, 0 (padding) included."""
    return max(abs(spec.qmax - spec.zero_point), abs(spec.qmin - spec.zero_point))


def product_bound(op: Layer, x: TensorSpec) -> np.ndarray:
    """Return int64 (C_out,): sum |w| max|q - z|, which no partial sum of centred products exceeds."""
    magnitudes = np.abs(op.weight.astype(np.int64)).reshape(op.weight.shape[0], -1).sum(1)
    return magnitudes * largest(x)


def accumulator_bound(op: Layer | AvgPool, x: TensorSpec) -> np.ndarray:
    """Return int64 (C_out,) (pools: (1,)): the largest magnitude that any partial sum of ``op`` can reach."""
    if isinstance(op, AvgPool):
        return np.array([math.prod(op.kernel) * largest(x)], np.int64)
    return product_bound(op, x) + np.abs(op.bias.astype(np.int64))


def prove_accumulator(op: Layer | AvgPool, x: TensorSpec) -> None:
    """Raise RecordError, naming the operation, channel and bound, unless every accumulator provably fits int32."""
    bound = accumulator_bound(op, x)
    worst = int(bound.argmax())
    if bound[worst] > ACC_MAX:
        raise RecordError(
            f"{op.name!r}: the accumulator of output channel {worst} can reach {bound[worst]:,}, beyond int32's "
            f"{ACC_MAX:,}; give its input ({x.bits} bit) or its weights fewer bits"
        )


def add_offset(requants: Sequence[Requant], a: TensorSpec, b: TensorSpec, out: TensorSpec) -> np.float32:
    """Return f32(z_y - fma(m_a, z_a, f32(m_b z_b))): the ``offset`` of an ``Add`` of ``a`` and ``b``."""
    m_a, m_b = (requant.multiplier[0] for requant in requants)
    product_b = np.float32(m_b * np.float32(b.zero_point))
    zeros = np.float32(np.float64(m_a) * a.zero_point + np.float64(product_b))
    return np.float32(np.float32(out.zero_point) - zeros)


def prove_add(op: Add, a: TensorSpec, b: TensorSpec) -> None:
    """Raise RecordError unless float64 holds every product and sum of ``op`` exactly, so that its fma has one rounding.

    Bits needed: from the leading bit of the largest sum to the last bit of the finest term; 53 are there. The fixed
    form needs no such proof: multipliers of two terms are at most 2^30, so that int64 holds their sum at any scales.
    """
    terms = [(spec.qmax, float(requant.multiplier[0])) for spec, requant in zip((a, b), op.requants, strict=True)]
    largest_sum = sum(q * m for q, m in terms) + abs(float(op.offset))
    last_bits = [math.frexp(value)[1] - 24 for value in (*(m for _, m in terms), float(op.offset)) if value]
    if last_bits and math.frexp(largest_sum)[1] - min(last_bits) > 53:
        raise RecordError(f"{op.name!r}: the scales of its two inputs and of its output lie too far apart for one sum")


def prove_product(op: Mul, a: TensorSpec, b: TensorSpec) -> None:
    """Raise RecordError, naming the operation and its bound, unless every product of ``a`` and ``b`` fits int32."""
    bound = largest(a) * largest(b)
    if bound > ACC_MAX:
        raise RecordError(
            f"{op.name!r}: the product of {a.name!r} ({a.bits} bit) and {b.name!r} ({b.bits} bit) can reach {bound:,}, "
            f"beyond int32's {ACC_MAX:,}; give one of them fewer bits"
        )


FLOAT32_EXACT = 2**24
"""Integers up to this magnitude are exact in float32."""


def n_windows(n: int, kernel: int, stride: int, dilation: int) -> int:
    """Return at how many places a window fits an axis of ``n`` places, its padding included; below 1: at none."""
    return (n - dilation * (kernel - 1) - 1) // stride + 1


def products(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Return sum w (q - z) of layer ``op``, without its bias: (B, *output shape), integer-valued, dtype float or int32.

    Args:
        op:   a ``Conv`` or ``Linear``.
        x:    (B, *spec.shape), integers on ``spec``'s grid.
        spec: of ``x``.
    """
    exact = np.float32 if product_bound(op, spec).max() < FLOAT32_EXACT else np.float64
    if not isinstance(op, Conv):
        return centred(x, spec, exact) @ op.weight.astype(exact).T
    if op.groups > 1 and op.weight.shape[1] == 1:
        return _depthwise(op, x, spec)
    return _convolution(op, centred(x, spec, exact), exact)


def centred(x: np.ndarray, spec: TensorSpec, dtype: type) -> np.ndarray:
    """Return q - z as ``dtype``, which must hold it exactly."""
    values = x.astype(dtype)
    return values if spec.zero_point == 0 else np.subtract(values, dtype(spec.zero_point), out=values)


def padded(x: np.ndarray, padding: tuple[int, int, int, int], fill: float = 0) -> np.ndarray:
    """Return ``x`` (B, C, H, W) with (top, left, bottom, right) rows and columns of ``fill`` around it."""
    if not any(padding):
        return x
    top, left, bottom, right = padding
    n, c, height, width = x.shape
    out = np.full((n, c, top + height + bottom, left + width + right), fill, x.dtype)
    out[:, :, top : top + height, left : left + width] = x
    return out


def taps(
    x: np.ndarray, kernel: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int]
) -> list[np.ndarray]:
    """Return one view of padded ``x`` per kernel place, row by row: (B, C, H', W') each, what that place multiplies."""
    size = [n_windows(*axis) for axis in zip(x.shape[2:], kernel, stride, dilation, strict=True)]

    def at(axis: int, place: int) -> slice:
        start = place * dilation[axis]
        return slice(start, start + (size[axis] - 1) * stride[axis] + 1, stride[axis])

    return [x[:, :, at(0, i), at(1, j)] for i in range(kernel[0]) for j in range(kernel[1])]


def _convolution(op: Conv, x: np.ndarray, dtype: type) -> np.ndarray:
    """Unfold the patches, (B, G, C/G k_h k_w, H' W'), and multiply by the weights of each group."""
    n_out, per_group = op.weight.shape[:2]
    views = taps(padded(x, op.padding), op.kernel, op.stride, op.dilation)
    n, c, height, width = views[0].shape
    rows = np.empty((n, c, len(views), height, width), dtype)
    for k, view in enumerate(views):
        rows[:, :, k] = view
    weight = op.weight.reshape(op.groups, n_out // op.groups, -1).astype(dtype)
    sums = weight @ rows.reshape(n, op.groups, per_group * len(views), height * width)
    return sums.reshape(n, n_out, height, width)


def _depthwise(op: Conv, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
    n_out = len(op.weight)
    x = padded(centred(x, spec, np.int32), op.padding)
    total: np.ndarray | None = None
    for view, w in zip(taps(x, op.kernel, op.stride, op.dilation), op.weight.reshape(n_out, -1).T, strict=True):
        term = np.repeat(view, n_out // op.groups, axis=1) if n_out != op.groups else view
        term = term * w.astype(np.int32)[:, None, None]
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None  # a kernel has at least one place
    return total
