"""Operations that keep the grid: max-pools, concatenations, reshapes, transposes, slices, padding; integers move.

With them tensors get more rows and columns. A transposed convolution is the convolution, stride 1, of its input with
stride - 1 zeros between the elements and the kernel turned by half a turn. Bilinear upsampling by 2 is such a layer,
each channel apart, with the kernel (1 3 3 1) / 4 in either direction on an input whose edges are repeated once
(PyTorch's align_corners=False).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from torch import fx, nn

from hq_lib.graph import op_name
from hq_lib.integer import nodes
from hq_lib.integer import record as r
from hq_lib.integer.emit import Writer
from hq_lib.integer.execute import levels, to_grid
from hq_lib.integer.nodes import LowerError
from hq_lib.integer.products import Product, unchanged
from hq_lib.integer.record import TensorSpec
from hq_lib.integer.terms import pooled, with_zero

RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"}
"""Operations whose output shape says it all."""
Moved = TensorSpec | tuple[TensorSpec, ...]


def move(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> Moved:
    """Write the operation that ``node`` is on ``x`` and return what it makes; splits make several tensors.

    Raises:
        LowerError: names an operation, or arguments of one, without an integer form.
    """
    name = op_name(node, gm)
    if name not in _MOVES:
        raise LowerError(f"{node.name!r}: {name} has no integer form")
    return _MOVES[name](writer, gm, node, x)


def reshape(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Return ``x`` under the shape that ``node`` had; the same tensor if it has that shape already."""
    shape = nodes.shape_of(node)
    if math.prod(shape) != math.prod(x.shape):
        raise LowerError(f"{node.name!r}: reshapes across the batch, {x.shape} to {shape}")
    return x if shape == x.shape else _reshape(writer, node, x, shape)


def _reshape(writer: Writer, node: fx.Node, x: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    return writer.write(r.Reshape, node.name, [x], replace(x, name=node.name, shape=shape))


def concat(writer: Writer, gm: fx.GraphModule, node: fx.Node, parts: list[TensorSpec]) -> TensorSpec:
    """Write tensors joined; those of different grids on one that spans them all first."""
    if len({(float(p.scale), p.zero_point, p.dtype) for p in parts}) > 1:
        parts = _on_one_grid(writer, parts, node.name)
    axis = nodes.axis_of(nodes.arguments(node, gm)["dim"] or 0, len(parts[0].shape), node)
    ends = {"qmin": min(p.qmin for p in parts), "qmax": max(p.qmax for p in parts)}
    return writer.write(r.Concat, node.name, parts, replace(parts[0], name=node.name, **ends), axis=axis)


def _on_one_grid(writer: Writer, parts: list[TensorSpec], name: str) -> list[TensorSpec]:
    """Bring tensors to a grid that spans them all, as many bits as the widest: a rounding the graph has not."""
    bits = max(p.bits for p in parts)
    low = min(0.0, *(float(p.scale) * (p.qmin - p.zero_point) for p in parts))
    high = max(0.0, *(float(p.scale) * (p.qmax - p.zero_point) for p in parts))
    scale = np.asarray((high - low) / (2**bits - 1), np.float32)
    dtype, zero = "uint8" if bits <= 8 else "uint16", round(-low / float(scale))
    moved = []
    for i, part in enumerate(parts):
        out = TensorSpec(f"{name}.{i}", part.shape, dtype, bits, 0, 2**bits - 1, scale, zero)
        moved.append(writer.table(out.name, part, to_grid(levels(part), out), out))
    return moved


def _max_pool(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    pool = nodes.pool(node, gm, x.shape)
    if not pool.plain:
        raise LowerError(
            f"{node.name!r}: a max-pool from {x.shape[1:]} to a size that does not divide it; use one that does"
        )
    out = replace(x, name=node.name)
    return pooled(writer, pool, r.MaxPool, node.name, x, out, dilation=pool.dilation)


def _pieces(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> tuple[TensorSpec, ...]:
    """Chunk, split and unbind: a slice for each piece."""
    options = {"split_size_or_sections": 1} | nodes.arguments(node, gm)
    axis = nodes.axis_of(options["dim"] or 0, len(x.shape), node)
    n = x.shape[axis]
    sizes: Any = -(-n // options["chunks"]) if "chunks" in options else options["split_size_or_sections"]
    bounds = [*(range(0, n, sizes) if isinstance(sizes, int) else accumulate([0, *sizes[:-1]])), n]
    parts = (_part(writer, node.name, x, axis, *ends) for ends in pairwise(bounds))
    if op_name(node, gm) != "unbind":
        return tuple(parts)
    return tuple(_reshape(writer, node, part, part.shape[:axis] + part.shape[axis + 1 :]) for part in parts)


def _one_part(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Narrow, and select: one place of an axis, which disappears."""
    options = nodes.arguments(node, gm)
    axis = nodes.axis_of(options["dim"], len(x.shape), node)
    start = (options["index"] if op_name(node, gm) == "select" else options["start"]) % x.shape[axis]
    return reshape(writer, gm, node, _part(writer, node.name, x, axis, start, start + options.get("length", 1)))


def _index(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """What an indexing such as ``x[:, 1, ..., ::2]`` takes."""
    index: Any = nodes.known_sizes(node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))
    index, rank = tuple(i for i in index if i is not None), len(x.shape)  # new axes are of the output's shape
    if ... in index:
        at = index.index(...)
        index = (*index[:at], *[slice(None)] * (rank + 2 - len(index)), *index[at + 1 :])
    index = tuple(slice(i, i + 1 or None) if type(i) is int else i for i in index)  # a place, which disappears
    simple = all(isinstance(i, slice) for i in index) and index[:1] == (slice(None),) and len(index) <= rank + 1
    if not simple or any(isinstance(end, fx.Node) for i in index for end in (i.start, i.stop, i.step)):
        raise LowerError(f"{node.name!r}: only slices such as x[:, :, ::2, ::2] have an integer form, not {index}")
    rest = [*index[1:], *[slice(None)] * (rank + 1 - len(index))]
    cut = _cut(writer, node.name, x, [slice(*s.indices(n)) for s, n in zip(rest, x.shape, strict=True)])
    return reshape(writer, gm, node, cut)


def _cut(writer: Writer, name: str, x: TensorSpec, taken: list[slice]) -> TensorSpec:
    start, stop, step = zip(*((s.start, s.stop, s.step) for s in taken), strict=True)
    return writer.write(r.Slice, name, [x], start=start, stop=stop, step=step)


def _part(writer: Writer, name: str, x: TensorSpec, axis: int, start: int, stop: int) -> TensorSpec:
    taken = [slice(0, n, 1) for n in x.shape]
    taken[axis] = slice(start, stop, 1)
    return _cut(writer, name, x, taken)


def _transpose(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Transpose and permute: which input axis each output axis is."""
    rank = len(x.shape)
    if op_name(node, gm) == "transpose":
        options, dims = nodes.arguments(node, gm), list(range(rank + 1))
        first, second = (nodes.axis_of(options[key], rank, node) + 1 for key in ("dim0", "dim1"))
        dims[first], dims[second] = second, first
    else:
        given: Any = nodes.known_sizes(node.kwargs.get("dims", node.args[1:]))
        dims = [*(given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given)]
    if dims[0] % (rank + 1) != 0:
        raise LowerError(f"{node.name!r}: moves the batch axis")
    return writer.write(r.Transpose, node.name, [x], axes=tuple(nodes.axis_of(d, rank, node) for d in dims[1:]))


def _pad(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Padding by zeros, whose list begins with the last axis."""
    options, rank = nodes.arguments(node, gm), len(x.shape)
    flat = options.get("pad", options["padding"])
    flat = [flat] * 4 if isinstance(flat, int) else list(flat)
    if options.get("mode", "constant") != "constant" or options.get("value") or min(flat) < 0:
        raise LowerError(f"{node.name!r}: only padding by zeros has an integer form")
    flat += [0] * (2 * (rank + 1) - len(flat))
    if any(flat[2 * rank :]):
        raise LowerError(f"{node.name!r}: pads the batch")
    before, after = (tuple(flat[side : 2 * rank : 2][::-1]) for side in (0, 1))
    return writer.write(r.Pad, node.name, [x], with_zero(replace(x, name=node.name)), before=before, after=after)


def _resize(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Nearest upsampling by whole factors: each row, then each column, beside itself."""
    sizes = tuple(node.meta["shape"][2:])
    factors = [m // n for n, m in zip(x.shape[1:], sizes, strict=True)]
    if (x.shape[1] * factors[0], x.shape[2] * factors[1]) != sizes:
        raise LowerError(f"{node.name!r}: nearest upsampling from {x.shape[1:]} to {sizes}; only whole factors can be")
    for axis, factor in ((2, factors[1]), (1, factors[0])):
        if factor == 1:
            continue
        beside = _reshape(writer, node, x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
        joined = writer.write(r.Concat, node.name, [beside] * factor, axis=axis + 1)
        x = _reshape(writer, node, joined, (*x.shape[:axis], x.shape[axis] * factor, *x.shape[axis + 1 :]))
    return x


def _shuffle(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Channel shuffle, pixel shuffle and its inverse: a reshape, a transpose, a reshape."""
    (c, h, w), kind = x.shape, op_name(node, gm)
    option = {"channelshuffle": "groups", "pixelshuffle": "upscale_factor", "pixelunshuffle": "downscale_factor"}[kind]
    n = nodes.arguments(node, gm)[option]
    split, axes = {
        "channelshuffle": ((n, c // n, h, w), (1, 0, 2, 3)),
        "pixelshuffle": ((c // n**2, n, n, h, w), (0, 3, 1, 4, 2)),
        "pixelunshuffle": ((c, h // n, n, w // n, n), (0, 2, 4, 1, 3)),
    }[kind]
    apart = _reshape(writer, node, x, split)
    turned = writer.write(r.Transpose, node.name, [apart], axes=axes)
    return _reshape(writer, node, turned, tuple(node.meta["shape"][1:]))


_MOVES: dict[str, Callable[[Writer, fx.GraphModule, fx.Node, TensorSpec], Moved]] = {
    **dict.fromkeys(("maxpool2d", "adaptivemaxpool2d", "amax"), _max_pool),
    **dict.fromkeys(("chunk", "split", "unbind"), _pieces),
    **dict.fromkeys(("narrow", "select"), _one_part),
    **dict.fromkeys(("transpose", "permute"), _transpose),
    **dict.fromkeys(("pad", "zeropad2d", "constantpad2d"), _pad),
    **dict.fromkeys(("interpolate", "upsample", "upsamplingnearest2d"), _resize),
    **dict.fromkeys(("channelshuffle", "pixelshuffle", "pixelunshuffle"), _shuffle),
    **dict.fromkeys(RESHAPES, reshape),
    "getitem": _index,
}


def repeated(writer: Writer, name: str, x: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """Write ``x``, (C, 1, 1) say, at all places of ``shape`` (C, H, W): its max-pool, whose padding never wins."""
    fits = len(shape) == len(x.shape) == 3 and x.shape[0] == shape[0]
    if not fits or any(n not in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        raise LowerError(f"{name!r} adds {x.shape} to {shape}: only rows and columns are repeated")
    for kernel in ((shape[1] // x.shape[1], 1), (1, shape[2] // x.shape[2])):
        if kernel != (1, 1):
            padding = (kernel[0] - 1, kernel[1] - 1) * 2
            out, fields = replace(x, name=f"{name}.repeated"), {"stride": (1, 1), "dilation": (1, 1)}
            x = writer.write(r.MaxPool, out.name, [x], out, kernel=kernel, padding=padding, **fields)
    return x


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
    wide = spread(writer, f"{node.name}.spread", x, nodes.two(layer.stride))
    pads = []
    for i, n in enumerate(wide.shape[1:]):
        reach = nodes.two(layer.dilation)[i] * (term.w.shape[2 + i] - 1)
        before = reach - nodes.two(layer.padding)[i]
        pads.append((before, node.meta["shape"][2 + i] - n + reach - before))
    if min(min(pair) for pair in pads) < 0:
        raise LowerError(f"layer {term.name!r}: a transposed convolution padded by more than its kernel reaches")
    padding = (pads[0][0], pads[1][0], pads[0][1], pads[1][1])
    return replace(term, x=wide, geometry={**term.geometry, "padding": padding})


def bilinear(writer: Writer, node: fx.Node, gm: fx.GraphModule, x: TensorSpec) -> Product:
    """Return the term of a bilinear upsampling by 2. Raises LowerError for other modes, factors and aligned corners."""
    options, n = nodes.arguments(node, gm), x.shape[0]
    plain = options.get("mode") == "bilinear" and not options.get("align_corners")
    if not plain or tuple(node.meta["shape"][2:]) != (2 * x.shape[1], 2 * x.shape[2]):
        raise LowerError(
            f"{node.name!r}: upsampling from {x.shape[1:]} to {tuple(node.meta['shape'][2:])} has no integer form; "
            "nearest by whole factors and bilinear by 2 with align_corners=False have"
        )
    for axis in (1, 2):
        first, last = (_part(writer, f"{node.name}.edge", x, axis, at, at + 1) for at in (0, x.shape[axis] - 1))
        x = writer.write(r.Concat, f"{node.name}.edges", [first, x, last], axis=axis)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.int64)
    wide = spread(writer, f"{node.name}.spread", x, (2, 2))
    return replace(
        unchanged(node.name, wide), w=np.broadcast_to(kernel, (n, 1, 4, 4)), w_scale=np.full(n, 1 / 16, np.float32)
    )
