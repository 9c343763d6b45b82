"""A second, slow executor of integer records, for tests: Python integers and fractions, one output at a time.

It shares no arithmetic with ``hq_lib.integer.execute``: sums are Python integers, and every float32 result is rounded
from the exact fraction.
"""

from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np

from hq_lib.integer import record as r


def round_half_even(numerator: int, denominator: int) -> int:
    """The integer nearest to a quotient, ties to even; denominator > 0."""
    floor, rest = divmod(numerator, denominator)
    return floor + (2 * rest > denominator or (2 * rest == denominator and floor % 2 == 1))


def f32(value: Fraction | int) -> Fraction:
    """The float32 nearest to an exact value, ties to even (normal range)."""
    n, d = value.numerator, value.denominator
    if n == 0:
        return Fraction(0)
    shift = 24 + d.bit_length() - abs(n).bit_length()
    n, d = n << max(shift, 0), d << max(-shift, 0)  # 2^23 < |n / d| < 2^25
    if abs(n) >= d << 24:
        shift, d = shift - 1, d << 1
    return Fraction(round_half_even(n, d) << max(-shift, 0), 1 << max(shift, 0))


@cache
def exactly(value: float) -> Fraction:
    return Fraction(value)


def number(value) -> Fraction:
    return exactly(float(value))


def clamp(q: int, spec: r.TensorSpec) -> int:
    return min(max(q, spec.qmin), spec.qmax)


def nearest(value: Fraction, spec: r.TensorSpec, offset: int = 0) -> int:
    return clamp(round_half_even(value.numerator, value.denominator) + offset, spec)


def at(values: np.ndarray, i: int):
    return values[i] if len(values) > 1 else values[0]


def requantized(terms, out: r.TensorSpec, channel: int, requantizer: str) -> int:
    """terms: (accumulator, Requant) pairs of one output."""
    if requantizer == "fixed":
        shift = int(at(terms[0][1].shift, channel))
        total = sum(acc * int(at(q.fixed, channel)) for acc, q in terms)
        return clamp((total + 2 ** (shift - 1)) // 2**shift + out.zero_point, out)
    reals = [f32(f32(acc) * number(at(q.multiplier, channel))) for acc, q in terms]
    real = reals[0] if len(reals) == 1 else f32(reals[0] + reals[1])
    return nearest(real, out, out.zero_point)


def run(model: r.IntegerModel, image: np.ndarray) -> dict[str, np.ndarray]:
    """All tensors (object arrays of Python integers) that ``model`` makes of one image (C, H, W) float32."""
    values: dict[str, np.ndarray] = {model.input: image}
    for op in model.ops:
        specs, out = [model.tensors[t] for t in op.inputs], model.tensors[op.output]
        inputs = [values[t] for t in op.inputs]
        result = np.empty(out.shape, object)
        for place in product(*map(range, out.shape)):
            result[place] = element(op, inputs, specs, out, place, model.requantizer)
        if isinstance(op, r.Reshape):
            result = inputs[0].reshape(out.shape)
        values[op.output] = result
    return values


def element(op, inputs, specs, out, place, requantizer) -> int | None:
    x, spec = inputs[0], specs[0]
    if isinstance(op, r.Quantize):
        return nearest(f32(number(x[place]) / number(spec_scale(out))), out, out.zero_point)
    if isinstance(op, r.Layer):
        return layer(op, inputs, specs, out, place, requantizer)
    if isinstance(op, r.Add):
        return add(op, inputs, specs, out, place, requantizer)
    if isinstance(op, r.Table):
        return int(op.values[x[place]])
    if isinstance(op, r.Mul):
        other = int(inputs[1][tuple(i if n > 1 else 0 for i, n in zip(place, inputs[1].shape, strict=True))])
        acc = (int(x[place]) - spec.zero_point) * (other - specs[1].zero_point)
        assert abs(acc) < 2**31
        return requantized([(acc, op.requant)], out, 0, requantizer)
    if isinstance(op, r.MaxPool):
        return max(q for q, _ in window(op, x, place, op.dilation))
    if isinstance(op, r.AvgPool):
        acc = sum(q - spec.zero_point for q, _ in window(op, x, place, (1, 1)))
        return acc + out.zero_point if op.requant is None else requantized([(acc, op.requant)], out, 0, requantizer)
    if isinstance(op, r.Concat):
        offset = place[op.axis]
        for part in inputs:
            if offset < part.shape[op.axis]:
                return part[(*place[: op.axis], offset, *place[op.axis + 1 :])]
            offset -= part.shape[op.axis]
    if isinstance(op, r.Transpose):
        source = [0] * len(place)
        for i, axis in enumerate(op.axes):
            source[axis] = place[i]
        return x[tuple(source)]
    if isinstance(op, r.Slice):
        return x[tuple(a + s * i for a, s, i in zip(op.start, op.step, place, strict=True))]
    if isinstance(op, r.Pad):
        source = [i - b for i, b in zip(place, op.before, strict=True)]
        inside = all(0 <= i < n for i, n in zip(source, x.shape, strict=True))
        return x[tuple(source)] if inside else spec.zero_point
    return clamp(x[place], out) if isinstance(op, r.Clip) else None


def spec_scale(spec: r.TensorSpec):
    return spec.scale.item()


def window(op, x, place, dilation):
    """(integer, (i, j)) of every place of the window that lies inside the image, for the channel of ``place``."""
    kernel = op.kernel if not isinstance(op, r.Conv) else op.weight.shape[2:]
    channel, row, column = place
    for i, j in product(*map(range, kernel)):
        y = row * op.stride[0] + i * dilation[0] - op.padding[0]
        z = column * op.stride[1] + j * dilation[1] - op.padding[1]
        if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
            yield int(x[channel, y, z]), (i, j)


def layer(op, inputs, specs, out, place, requantizer) -> int:
    x, z = inputs[0], specs[0].zero_point
    if isinstance(op, r.Linear):
        channel = place[-1]
        acc = sum(int(w) * (int(q) - z) for w, q in zip(op.weight[channel], x[place[:-1]], strict=True))
    else:
        channel, acc = place[0], 0
        per_group = op.weight.shape[1]
        first = channel // (len(op.weight) // op.groups) * per_group
        for c in range(per_group):
            for q, (i, j) in window(op, x, (first + c, *place[1:]), op.dilation):
                acc += int(op.weight[channel, c, i, j]) * (q - z)
    acc += int(op.bias[channel])
    assert abs(acc) < 2**31
    if op.requant is None:
        return acc
    terms = [(acc, op.requant)]
    if op.residual is not None:
        terms.append((int(inputs[1][place]) - specs[1].zero_point, op.residual.requant))
    return requantized(terms, out, channel, requantizer)


def add(op, inputs, specs, out, place, requantizer) -> int:
    a, b = (int(x[place]) for x in inputs)
    if requantizer == "fixed":
        terms = [(q - s.zero_point, m) for q, s, m in zip((a, b), specs, op.requants, strict=True)]
        return requantized(terms, out, 0, requantizer)
    inner = f32(b * number(op.requants[1].multiplier[0]) + number(op.offset))
    return nearest(f32(a * number(op.requants[0].multiplier[0]) + inner), out)
