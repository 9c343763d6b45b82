"""What the arguments of pools, pads, slices and reshapes say, whether a module or a function spells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from hq_lib.graph import op_name


class LowerError(ValueError):
    """A quantized network without an integer form; the message names the layer or tensor, and the way out."""


_POOL = ("kernel_size", "stride", "padding")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "maxpool2d": (*_POOL, "dilation", "ceil_mode", "return_indices"),
    "avgpool2d": (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptiveavgpool2d": ("output_size",),
    "adaptivemaxpool2d": ("output_size", "return_indices"),
    "mean": ("dim", "keepdim"),
    "amax": ("dim", "keepdim"),
    "pad": ("pad", "mode", "value"),
    "zeropad2d": ("padding",),
    "chunk": ("chunks", "dim"),
    "split": ("split_size_or_sections", "dim"),
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
    "clampmin": ("min",),
    "clampmax": ("max",),
    "hardtanh": ("min_val", "max_val"),
    "cat": ("dim",),
    "concat": ("dim",),
    "concatenate": ("dim",),
    "transpose": ("dim0", "dim1"),
    "interpolate": ("size", "scale_factor", "mode", "align_corners"),
    "upsample": ("size", "scale_factor", "mode", "align_corners"),
    "pixelshuffle": ("upscale_factor",),
    "pixelunshuffle": ("downscale_factor",),
    "channelshuffle": ("groups",),
}
_DEFAULTS = {"dilation": 1, "padding": 0, "ceil_mode": False, "count_include_pad": True, "dim": None, "keepdim": False}


def arguments(node: fx.Node, gm: fx.GraphModule) -> dict[str, Any]:
    """Return the options of ``node`` by PyTorch's name, defaults filled in; the tensors it reads are left out.

    Sizes that the graph computes (``y.size(3)``, ``x.shape[2] // 2``) are the numbers they were on the example.
    """
    name = op_name(node, gm)
    names = _PARAMETERS.get(name, ())
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return _DEFAULTS | {key: getattr(module, key) for key in names if hasattr(module, key)}
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    return _DEFAULTS | known_sizes(given)


def known_sizes(value: Any) -> Any:
    """Return ``value`` (any nesting) with each node that is a size, or a number of sizes, replaced by its value."""
    return map_aggregate(value, lambda v: v.meta.get("value", v) if isinstance(v, fx.Node) else v)


def two(value: Any) -> tuple[int, int]:
    """Return a size that may be one number or a pair as (rows, columns)."""
    if isinstance(value, Sequence):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


@dataclass(frozen=True)
class Window:
    """Where a pool looks."""

    kernel: tuple[int, int]
    """(rows, columns)"""
    stride: tuple[int, int]
    """(rows, columns)"""
    padding: tuple[int, int, int, int]
    """(top, left, bottom, right)"""
    dilation: tuple[int, int]
    """(rows, columns)"""
    n: int
    """what an average divides by"""
    squeeze: bool
    """whether rows and columns disappear: (C, 1, 1) becomes (C,)"""


def window(node: fx.Node, gm: fx.GraphModule, shape: tuple[int, ...]) -> Window | None:
    """Return the window of a pool (average, max, adaptive, ``mean``, ``amax``) over a tensor of ``shape`` (C, H, W).

    None where its windows differ: an adaptive pool to a size that does not divide its input, an average that leaves
    padding out, or whose ceil_mode windows are cut. Raises LowerError for other axes than rows and columns.
    """
    name, options = op_name(node, gm), arguments(node, gm)
    if len(shape) != 3:
        raise LowerError(f"{node.name!r}: {name} of a tensor of shape {shape}; only (C, H, W) is pooled")
    if options.get("return_indices"):
        raise LowerError(f"{node.name!r}: {name} with return_indices has no integer form")
    if name in ("mean", "amax"):
        return _reduction(node, options, shape)
    if name.startswith("adaptive"):
        return _adaptive(options, shape)
    return _fixed(node, options, shape, average=name.startswith("avg"))


@dataclass(frozen=True)
class Run:
    """Neighbouring places of one axis of an average pool whose windows are of equal length and equally far apart."""

    start: int
    """first input place that the first window reads"""
    stop: int
    """end of the last window"""
    kernel: int
    """places that each window reads: padding and what lies outside are left out"""
    stride: int
    """input places from window to window"""
    divisor: int
    """what this axis contributes to the number that the sum is divided by"""


def uneven_runs(node: fx.Node, gm: fx.GraphModule, shape: tuple[int, ...]) -> tuple[list[Run], list[Run]]:
    """Return the runs of rows and of columns of an average pool for which ``window`` gives None."""
    options, n_out = arguments(node, gm), node.meta["shape"][2:]
    if "output_size" in options:
        axes = [[(k * n // m, -(-(k + 1) * n // m)) for k in range(m)] for n, m in zip(shape[1:], n_out, strict=True)]
        rows, columns = ([(a, b, b - a) for a, b in axis] for axis in axes)
        return _runs(rows), _runs(columns)
    kernel, padding, override = two(options["kernel_size"]), two(options["padding"]), options.get("divisor_override")
    stride = kernel if options.get("stride") in (None, (), []) else two(options["stride"])
    axes = []
    for n, m, k, s, p in zip(shape[1:], n_out, kernel, stride, padding, strict=True):
        whole = [(j * s - p, min(j * s - p + k, n + p)) for j in range(m)]
        ends = [(max(a, 0), min(b, n)) for a, b in whole]
        counted = whole if options["count_include_pad"] else ends
        divisors = [override if override and not axes else 1 if override else b - a for a, b in counted]
        axes.append(_runs([(*each, d) for each, d in zip(ends, divisors, strict=True)]))
    return axes[0], axes[1]


def _runs(windows: list[tuple[int, int, int]]) -> list[Run]:
    """Return (first, end, divisor) of one window after another joined to runs."""
    groups: list[list[tuple[int, int, int]]] = []
    for a, b, d in windows:
        last = groups[-1] if groups else []
        alike = bool(last) and (b - a, d) == (last[0][1] - last[0][0], last[0][2]) and a > last[-1][0]
        if alike and (len(last) == 1 or a - last[-1][0] == last[1][0] - last[0][0]):
            last.append((a, b, d))
        else:
            groups.append([(a, b, d)])
    strides = [g[1][0] - g[0][0] if len(g) > 1 else 1 for g in groups]
    return [Run(g[0][0], g[-1][1], g[0][1] - g[0][0], s, g[0][2]) for g, s in zip(groups, strides, strict=True)]


def _reduction(node: fx.Node, options: dict[str, Any], shape: tuple[int, ...]) -> Window:
    dims = options["dim"]
    dims = {d % 4 for d in (dims if isinstance(dims, Sequence) else [dims])} if dims is not None else None
    if dims != {2, 3}:
        raise LowerError(f"{node.name!r}: reduces over {options['dim']}; only rows and columns, (2, 3), can be")
    return Window(two(shape[1:]), (1, 1), (0, 0, 0, 0), (1, 1), shape[1] * shape[2], not options["keepdim"])


def _adaptive(options: dict[str, Any], shape: tuple[int, ...]) -> Window | None:
    size = [s if s is not None else n for s, n in zip(two_or_none(options["output_size"]), shape[1:], strict=True)]
    if any(n % s for n, s in zip(shape[1:], size, strict=True)):
        return None
    kernel = (shape[1] // size[0], shape[2] // size[1])
    return Window(kernel, kernel, (0, 0, 0, 0), (1, 1), kernel[0] * kernel[1], False)


def two_or_none(value: Any) -> tuple[int | None, int | None]:
    """Return an adaptive pool's output size, one entry or a pair of which each may be None, as a pair."""
    return (value[0], value[-1]) if isinstance(value, Sequence) else (value, value)


def _fixed(node: fx.Node, options: dict[str, Any], shape: tuple[int, ...], *, average: bool) -> Window | None:
    kernel, dilation = two(options["kernel_size"]), two(options["dilation"])
    stride = kernel if options.get("stride") in (None, (), []) else two(options["stride"])
    rows, columns = two(options["padding"])
    spans = [(d * (k - 1) + 1) for k, d in zip(kernel, dilation, strict=True)]
    extra = [
        max(0, (size - 1) * s + span - (n + 2 * p))
        for size, s, span, n, p in zip(node.meta["shape"][2:], stride, spans, shape[1:], (rows, columns), strict=True)
    ]
    if average and (any(extra) or ((rows or columns) and not options["count_include_pad"])):
        return None
    n = options.get("divisor_override") or kernel[0] * kernel[1]
    padding = (rows, columns, rows + extra[0], columns + extra[1])
    return Window(kernel, stride, padding, dilation, n, False)


def axis_of(dim: int, rank: int, node: fx.Node) -> int:
    """Return axis ``dim`` of a batch, which may be negative, as an axis without the batch; refuse the batch itself."""
    axis = dim % (rank + 1) - 1
    if axis < 0:
        raise LowerError(f"{node.name!r}: works across the batch, which no executor knows")
    return axis


def clip_bounds(node: fx.Node, gm: fx.GraphModule) -> tuple[float, float]:
    """Return the real (low, high) that a relu, relu6, hardtanh or clamp keeps its values in; infinite where open."""
    name, options = op_name(node, gm), arguments(node, gm)
    if name == "relu":
        return 0.0, float("inf")
    if name == "relu6":
        return 0.0, 6.0
    if name == "threshold":
        raise LowerError(f"{node.name!r}: threshold has no integer form; use a ReLU or clamp")
    low, high = (options.get("min_val", -1.0), options.get("max_val", 1.0)) if name == "hardtanh" else (
        options.get("min"), options.get("max"))  # fmt: skip
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        raise LowerError(f"{node.name!r}: its bounds are tensors; only numbers have an integer form")
    return (-float("inf") if low is None else float(low)), (float("inf") if high is None else float(high))
