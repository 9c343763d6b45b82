"""Tensors with more rows and columns, written with operations that the record has: spread for transposed convolutions,
edges repeated and spread for bilinear upsampling.

A transposed convolution is the convolution, stride 1, of its input with stride - 1 zeros between the elements and the
kernel turned by half a turn. Bilinear upsampling by 2 is such a layer, each channel apart, with the kernel
(1 3 3 1) / 4 in either direction on an input whose edges are repeated once (PyTorch's align_corners=False).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import fx, nn

from hq_lib.integer import geometry
from hq_lib.integer import record as r
from hq_lib.integer.emit import Writer
from hq_lib.integer.geometry import LowerError
from hq_lib.integer.products import Product, unchanged
from hq_lib.integer.record import TensorSpec


def with_zero(x: TensorSpec) -> TensorSpec:
    """Return ``x`` with a range that holds real 0."""
    return replace(x, qmin=min(x.qmin, x.zero_point), qmax=max(x.qmax, x.zero_point))


def spread(writer: Writer, name: str, x: TensorSpec, stride: tuple[int, int]) -> TensorSpec:
    """Write ``x`` (C, H, W) with stride - 1 real zeros between its rows and columns: (C, (H - 1) s + 1, ...)."""
    if stride == (1, 1):
        return x
    (c, h, w), (down, across), out = x.shape, stride, with_zero(replace(x, name=name))
    apart = writer.write(r.Reshape, name, [x], replace(out, shape=(c, h, 1, w, 1)))
    padded = writer.write(r.Pad, name, [apart], out, before=(0,) * 5, after=(0, 0, down - 1, 0, across - 1))
    joined = writer.write(r.Reshape, name, [padded], replace(out, shape=(c, h * down, w * across)))
    stop = (c, (h - 1) * down + 1, (w - 1) * across + 1)
    return writer.write(r.Slice, name, [joined], out, start=(0, 0, 0), stop=stop, step=(1, 1, 1))


def transposed(writer: Writer, layer: nn.Module, node: fx.Node, x: TensorSpec, term: Product) -> Product:
    """Return ``term`` (of transposed convolution ``layer`` on ``x``) as a convolution of the spread input."""
    assert isinstance(layer, nn.ConvTranspose2d)
    assert term.geometry is not None
    wide = spread(writer, f"{node.name}.spread", x, geometry.two(layer.stride))
    pads = []
    for i, n in enumerate(wide.shape[1:]):
        reach = geometry.two(layer.dilation)[i] * (term.w.shape[2 + i] - 1)
        before = reach - geometry.two(layer.padding)[i]
        pads.append((before, node.meta["shape"][2 + i] - n + reach - before))
    if min(min(pair) for pair in pads) < 0:
        raise LowerError(f"layer {term.name!r}: a transposed convolution padded by more than its kernel reaches")
    padding = (pads[0][0], pads[1][0], pads[0][1], pads[1][1])
    return replace(term, x=wide, geometry={**term.geometry, "padding": padding})


def bilinear(writer: Writer, node: fx.Node, gm: fx.GraphModule, x: TensorSpec) -> Product:
    """Return the term of a bilinear upsampling by 2. Raises LowerError for other modes, factors and aligned corners."""
    options, n = geometry.arguments(node, gm), x.shape[0]
    plain = options.get("mode") == "bilinear" and not options.get("align_corners")
    if not plain or tuple(node.meta["shape"][2:]) != (2 * x.shape[1], 2 * x.shape[2]):
        raise LowerError(
            f"{node.name!r}: upsampling from {x.shape[1:]} to {tuple(node.meta['shape'][2:])} has no integer form; "
            "nearest by whole factors and bilinear by 2 with align_corners=False have"
        )
    for axis in (1, 2):
        first, last = (_edge(writer, node, x, axis, at) for at in (0, x.shape[axis] - 1))
        x = writer.write(r.Concat, f"{node.name}.edges", [first, x, last], axis=axis)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.int64)
    wide = spread(writer, f"{node.name}.spread", x, (2, 2))
    return replace(
        unchanged(node.name, wide), w=np.broadcast_to(kernel, (n, 1, 4, 4)), w_scale=np.full(n, 1 / 16, np.float32)
    )


def _edge(writer: Writer, node: fx.Node, x: TensorSpec, axis: int, at: int) -> TensorSpec:
    start, stop = [0] * 3, [*x.shape]
    start[axis], stop[axis] = at, at + 1
    return writer.write(r.Slice, f"{node.name}.edge", [x], start=tuple(start), stop=tuple(stop), step=(1, 1, 1))
