"""Operations that keep the grid: max-pools, reshapes, transposes, slices, padding; integers move, none changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from hq_lib.graph import op_name
from hq_lib.integer import geometry
from hq_lib.integer import record as r
from hq_lib.integer.emit import Writer
from hq_lib.integer.geometry import LowerError
from hq_lib.integer.record import TensorSpec

RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"}
"""Operations whose output shape says it all."""
SPLITS = {"chunk", "split"}
"""Operations that give several tensors."""
Moved = TensorSpec | tuple[TensorSpec, ...]


def move(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec, shape: tuple[int, ...]) -> Moved:
    """Write the operation that ``node`` is on ``x`` and return what it makes.

    Args:
        shape: of its output without the batch, as the graph recorded it; unused for splits.

    Raises:
        LowerError: names an operation, or arguments of one, without an integer form.
    """
    name = op_name(node, gm)
    if name in RESHAPES:
        return reshape(writer, node, x, shape)
    if name not in _MOVES:
        raise LowerError(f"{node.name!r}: {name} has no integer form")
    return _MOVES[name](writer, gm, node, x)


def reshape(writer: Writer, node: fx.Node, x: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """Return ``x`` under another shape; the same tensor if it has that shape already."""
    if math.prod(shape) != math.prod(x.shape):
        raise LowerError(f"{node.name!r}: reshapes across the batch, {x.shape} to {shape}")
    return x if shape == x.shape else _write(writer, r.Reshape, node, x, shape)


def _write(
    writer: Writer, kind: type[r.Op], node: fx.Node, x: TensorSpec, shape: tuple[int, ...], **rest: Any
) -> TensorSpec:
    return writer.write(kind, node.name, [x], replace(x, name=node.name, shape=shape), **rest)


def _max_pool(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    w = geometry.window(node, gm, x.shape)
    if w is None:
        raise LowerError(
            f"{node.name!r}: a max-pool from {x.shape[1:]} to a size that does not divide it; use one that does"
        )
    fields = {"kernel": w.kernel, "stride": w.stride, "padding": w.padding, "dilation": w.dilation}
    if not w.squeeze:
        return _write(writer, r.MaxPool, node, x, (x.shape[0], *node.meta["shape"][2:]), **fields)
    pooled = replace(x, name=f"{node.name}.pooled", shape=(x.shape[0], 1, 1))
    pooled = writer.write(r.MaxPool, node.name, [x], pooled, **fields)
    return writer.write(r.Reshape, f"{node.name}.squeeze", [pooled], replace(x, name=node.name, shape=x.shape[:1]))


def _pieces(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> tuple[TensorSpec, ...]:
    axis, ranges = geometry.pieces(node, gm, x.shape)
    whole = [slice(0, n, 1) for n in x.shape]
    return tuple(_cut(writer, node, x, [*whole[:axis], slice(*ends, 1), *whole[axis + 1 :]]) for ends in ranges)


def _index(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    return _cut(writer, node, x, geometry.slices(node, x.shape))


def _cut(writer: Writer, node: fx.Node, x: TensorSpec, taken: list[slice]) -> TensorSpec:
    ends = [(s.start, s.stop, s.step) for s in taken]
    start, stop, step = zip(*ends, strict=True)
    shape = tuple(len(range(*each)) for each in ends)
    return _write(writer, r.Slice, node, x, shape, start=start, stop=stop, step=step)


def _transpose(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    axes = geometry.permutation(node, gm, len(x.shape))
    return _write(writer, r.Transpose, node, x, tuple(x.shape[a] for a in axes), axes=axes)


def _pad(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    before, after = geometry.pads(node, gm, len(x.shape))
    shape = tuple(a + n + b for a, n, b in zip(before, x.shape, after, strict=True))
    wider = replace(x, qmin=min(x.qmin, x.zero_point), qmax=max(x.qmax, x.zero_point))
    return _write(writer, r.Pad, node, wider, shape, before=before, after=after)


def _resize(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Nearest upsampling by whole factors: each row, then each column, beside itself."""
    sizes = tuple(node.meta["shape"][2:])
    factors = [m // n for n, m in zip(x.shape[1:], sizes, strict=True)]
    if (x.shape[1] * factors[0], x.shape[2] * factors[1]) != sizes:
        raise LowerError(f"{node.name!r}: nearest upsampling from {x.shape[1:]} to {sizes}; only whole factors can be")
    for axis, factor in ((2, factors[1]), (1, factors[0])):
        if factor == 1:
            continue
        beside = _write(writer, r.Reshape, node, x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
        shape = [*beside.shape[: axis + 1], factor, *x.shape[axis + 1 :]]
        joined = replace(x, name=node.name, shape=tuple(shape))
        joined = writer.write(r.Concat, node.name, [beside] * factor, joined, axis=axis + 1)
        x = _write(writer, r.Reshape, node, joined, (*x.shape[:axis], x.shape[axis] * factor, *x.shape[axis + 1 :]))
    return x


def _shuffle(writer: Writer, gm: fx.GraphModule, node: fx.Node, x: TensorSpec) -> TensorSpec:
    """Channel shuffle, pixel shuffle and its inverse: a reshape, a transpose, a reshape."""
    (c, h, w), kind = x.shape, op_name(node, gm)
    option = {"channelshuffle": "groups", "pixelshuffle": "upscale_factor", "pixelunshuffle": "downscale_factor"}[kind]
    n = geometry.arguments(node, gm)[option]
    split, axes = {
        "channelshuffle": ((n, c // n, h, w), (1, 0, 2, 3)),
        "pixelshuffle": ((c // n**2, n, n, h, w), (0, 3, 1, 4, 2)),
        "pixelunshuffle": ((c, h // n, n, w // n, n), (0, 2, 4, 1, 3)),
    }[kind]
    apart = _write(writer, r.Reshape, node, x, split)
    turned = _write(writer, r.Transpose, node, apart, tuple(split[a] for a in axes), axes=axes)
    return _write(writer, r.Reshape, node, turned, tuple(node.meta["shape"][1:]))


_MOVES: dict[str, Callable[[Writer, fx.GraphModule, fx.Node, TensorSpec], Moved]] = {
    **dict.fromkeys(("maxpool2d", "adaptivemaxpool2d", "amax"), _max_pool),
    **dict.fromkeys(("chunk", "split"), _pieces),
    **dict.fromkeys(("transpose", "permute"), _transpose),
    **dict.fromkeys(("pad", "zeropad2d"), _pad),
    **dict.fromkeys(("interpolate", "upsample", "upsamplingnearest2d"), _resize),
    **dict.fromkeys(("channelshuffle", "pixelshuffle", "pixelunshuffle"), _shuffle),
    "getitem": _index,
}
