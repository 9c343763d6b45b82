"""Exact sums of products: convolutions and linear layers on integers, in the fastest dtype that cannot lose a bit.

float32 matrix products where sum |w| max|q - z| < 2^24 (every partial sum is then an exact float32 integer, in any
order), float64 elsewhere (the overflow proof keeps sums below 2^31 < 2^53). Depthwise layers sum in int32.
"""

import numpy as np

from hq_lib.integer.proof import product_bound
from hq_lib.integer.record import Conv, Layer, TensorSpec

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
