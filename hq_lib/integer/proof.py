"""Proofs that a record's arithmetic is exact: no int32 accumulator overflows, no float sum loses a bit unseen."""

import math

import numpy as np

from hq_lib.integer.record import ACC_MAX, Add, AvgPool, Layer, Mul, TensorSpec
from hq_lib.integer.requant import RecordError


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


def prove_add(op: Add, a: TensorSpec, b: TensorSpec) -> None:
    """Raise RecordError unless float64 holds every product and sum of ``op`` exactly, so that its fma has one rounding.

    Bits needed: from the leading bit of the largest sum to the last bit of the finest term; 53 are there.
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
