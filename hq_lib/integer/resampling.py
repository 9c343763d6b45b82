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
from hq_lib.integer.record import TensorSpec
from hq_lib.integer.terms import Product


def spread(writer: Writer, name: str, x: TensorSpec, stride: tuple[int, int]) -> TensorSpec:
    """Write ``x`` (C, H, W) with stride - 1 real zeros between its rows and columns: (C, (H - 1) s + 1, ...)."""
    if stride == (1, 1):
        return x
    (c, h, w), (down, across) = x.shape, stride
    wider = replace(x, name=name, qmin=min(x.qmin, x.zero_point), qmax=max(x.qmax, x.zero_point))

    def write(kind: type[r.Op], source: TensorSpec, shape: tuple[int, ...], **rest: object) -> TensorSpec:
        return writer.write(kind, name, [source], replace(wider, shape=shape), **rest)

    apart = write(r.Reshape, x, (c, h, 1, w, 1))
    fields = {"before": (0,) * 5, "after": (0, 0, down - 1, 0, across - 1)}
    padded = write(r.Pad, apart, (c, h, down, w, across), **fields)
    joined = write(r.Reshape, padded, (c, h * down, w * across))
    shape = (c, (h - 1) * down + 1, (w - 1) * across + 1)
    return write(r.Slice, joined, shape, start=(0, 0, 0), stop=shape, step=(1, 1, 1))


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
        shape = tuple(size + 2 * (i == axis) for i, size in enumerate(x.shape))
        out = replace(x, name=f"{node.name}.edges", shape=shape)
        x = writer.write(r.Concat, out.name, [first, x, last], out, axis=axis)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.int64)
    w = np.broadcast_to(kernel, (n, 1, 4, 4))
    layer = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": n}
    wide = spread(writer, f"{node.name}.spread", x, (2, 2))
    return Product(node.name, wide, w, np.full(n, 1 / 16, np.float32), np.zeros(n), 8, layer)


def _edge(writer: Writer, node: fx.Node, x: TensorSpec, axis: int, at: int) -> TensorSpec:
    start, stop = [0] * 3, [*x.shape]
    start[axis], stop[axis] = at, at + 1
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    out = replace(x, name=f"{node.name}.edge", shape=shape)
    return writer.write(r.Slice, out.name, [x], out, start=tuple(start), stop=tuple(stop), step=(1, 1, 1))
