"""What a graph's nodes say: the arguments of pools, pads, slices and reshapes, whether a module or a function spells
them, and functions of one element, as the graph's own operation computes them at every real value of a grid."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

from hq_lib.graph import op_name
from hq_lib.graph.modes import module_path
from hq_lib.graph.tracing import device_of


class LowerError(ValueError):
    """A quantized network without an integer form; the message names the layer or tensor, and the way out."""


_POOL = ("kernel_size", "stride", "padding")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "maxpool2d": (*_POOL, "dilation", "ceil_mode", "return_indices"),
    "avgpool2d": (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptiveavgpool2d": ("output_size",),
    "adaptivemaxpool2d": ("output_size", "return_indices"),
    **dict.fromkeys(("mean", "amax"), ("dim", "keepdim")),
    "pad": ("pad", "mode", "value"),
    **dict.fromkeys(("zeropad2d", "constantpad2d"), ("padding", "value")),
    "chunk": ("chunks", "dim"),
    "split": ("split_size_or_sections", "dim"),
    "unbind": ("dim",),
    "narrow": ("dim", "start", "length"),
    "select": ("dim", "index"),
    **dict.fromkeys(("clamp", "clip"), ("min", "max")),
    "clampmin": ("min",),
    "clampmax": ("max",),
    "hardtanh": ("min_val", "max_val"),
    **dict.fromkeys(("cat", "concat", "concatenate"), ("dim",)),
    "transpose": ("dim0", "dim1"),
    **dict.fromkeys(("interpolate", "upsample"), ("size", "scale_factor", "mode", "align_corners")),
    "pixelshuffle": ("upscale_factor",),
    "pixelunshuffle": ("downscale_factor",),
    "channelshuffle": ("groups",),
}
_ALSO = {"axis": "dim", "keepdims": "keepdim", "split_size": "split_size_or_sections", "axis0": "dim0", "axis1": "dim1"}
"""PyTorch's other name of an option -> the name in ``_PARAMETERS``"""
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
    named = {_ALSO.get(key, key): value for key, value in node.kwargs.items()}
    given = dict(zip(names, node.args[1:], strict=False)) | named
    return _DEFAULTS | known_sizes(given)


def known_sizes(value: Any) -> Any:
    """Return ``value`` (any nesting) with each node that is a size, or a number of sizes, replaced by its value."""
    return map_aggregate(value, lambda v: v.meta.get("value", v) if isinstance(v, fx.Node) else v)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape that ``node`` had when the graph was made, without the batch."""
    if "shape" not in node.meta:
        raise LowerError(f"{node.name!r}: its shape is not known; make the graph with graph.quantize")
    return tuple(node.meta["shape"][1:])


def two(value: Any) -> tuple[int, int]:
    """Return a size that may be one number or a pair as (rows, columns)."""
    if isinstance(value, Sequence):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


@dataclass(frozen=True)
class Run:
    """Neighbouring windows along one axis of a pool, of equal length and equally far apart."""

    start: int
    """first input place that the first window reads"""
    stop: int
    """end of the last window"""
    kernel: int
    """places that each window reads"""
    stride: int
    """input places from window to window"""
    divisor: int
    """what this axis contributes to the number that an average divides by"""
    before: int = 0
    """padded places in front of ``start``"""
    after: int = 0
    """padded places behind ``stop``"""


@dataclass(frozen=True)
class Pool:
    """Where a pool looks: at each run of rows crossed with each run of columns; one of each where all windows fit."""

    rows: list[Run]
    columns: list[Run]
    dilation: tuple[int, int] = (1, 1)
    """(rows, columns)"""
    shape: tuple[int, ...] | None = None
    """of the output where axes disappear: (C, 1, 1) becomes (C,)"""
    divisor: int | None = None
    """what an average divides by instead of the runs' divisors"""

    @property
    def plain(self) -> bool:
        """Whether it is one pool, not pieces that are joined."""
        return len(self.rows) == len(self.columns) == 1

    @property
    def n(self) -> int:
        """What an average divides by, of a plain pool."""
        return self.divisor or self.rows[0].divisor * self.columns[0].divisor

    @property
    def fields(self) -> dict[str, Any]:
        """Kernel, stride and padding of a plain pool, as the record has them."""
        row, column = self.rows[0], self.columns[0]
        padding = (row.before, column.before, row.after, column.after)
        return {"kernel": (row.kernel, column.kernel), "stride": (row.stride, column.stride), "padding": padding}


def pool(node: fx.Node, gm: fx.GraphModule, shape: tuple[int, ...]) -> Pool:
    """Return where a pool (average, max, adaptive, ``mean``, ``amax``) looks in a tensor of ``shape`` (C, H, W).

    An adaptive pool to a size that does not divide its input, an average that leaves padding out, and one whose
    ceil_mode windows are cut have windows that differ: several runs, of places that exist. Raises LowerError for other
    axes than rows and columns.
    """
    name, options, n_out = op_name(node, gm), arguments(node, gm), node.meta["shape"][2:]
    if len(shape) != 3 and not (len(shape) == 2 and name in ("mean", "amax")):
        raise LowerError(f"{node.name!r}: {name} of a tensor of shape {shape}; only (C, H, W) is pooled")
    if options.get("return_indices"):
        raise LowerError(f"{node.name!r}: {name} with return_indices has no integer form")
    if name in ("mean", "amax"):
        dims = options["dim"] if isinstance(options["dim"], Sequence) else [options["dim"]]
        over = set() if None in dims else {d % (len(shape) + 1) for d in dims}
        if not over or not over <= {len(shape) - 1, len(shape)}:
            raise LowerError(f"{node.name!r}: reduces over {options['dim']}; only rows and columns, (2, 3), can be")
        rows, columns = (
            [Run(0, n, n, 1, n) if axis in over else Run(0, n, 1, 1, 1)]
            for axis, n in enumerate(shape[-2:], len(shape) - 1)
        )
        return Pool(rows, columns, shape=None if len(n_out) == 2 and len(shape) == 3 else shape_of(node))
    if name.startswith("adaptive"):
        axes = [[(k * n // m, -(-(k + 1) * n // m)) for k in range(m)] for n, m in zip(shape[1:], n_out, strict=True)]
        rows, columns = (_runs(axis, axis, axis[0][1]) for axis in axes)
        return Pool(rows, columns)
    kernel, padding, dilation = (two(options[key]) for key in ("kernel_size", "padding", "dilation"))
    stride = kernel if options.get("stride") in (None, (), []) else two(options["stride"])
    axes = [*zip(shape[1:], n_out, kernel, stride, padding, dilation, strict=True)]
    beyond = [max(0, (m - 1) * s + d * (k - 1) + 1 - (n + 2 * p)) for n, m, k, s, p, d in axes]
    counted, override = options["count_include_pad"], options.get("divisor_override")
    if name.startswith("avg") and (any(beyond) or (any(padding) and not counted)):
        rows, columns = (_cut(n, m, k, s, p, counted=counted) for n, m, k, s, p, _ in axes)
    else:
        rows, columns = (
            [Run(0, n, k, s, k, p, p + more)] for (n, _, k, s, p, _), more in zip(axes, beyond, strict=True)
        )
    return Pool(rows, columns, dilation, divisor=override or None)


def _cut(n: int, n_out: int, kernel: int, stride: int, padding: int, *, counted: bool) -> list[Run]:
    """Return the windows of one axis without the places beyond its ``n``; padding is ``counted`` in divisors or not."""
    firsts = [j * stride - padding for j in range(n_out)]
    whole = [(a, min(a + kernel, n + padding)) for a in firsts]
    inside = [(max(a, 0), min(b, n)) for a, b in whole]
    return _runs(inside, whole if counted else inside)


def _runs(windows: list[tuple[int, int]], counted: list[tuple[int, int]], stride: int = 1) -> list[Run]:
    """Return (first, end) of one window after another joined to runs; ``stride`` is that of a window alone."""
    groups: list[list[tuple[int, int, int]]] = []
    for (a, b), (low, high) in zip(windows, counted, strict=True):
        last, d = groups[-1] if groups else [], high - low
        alike = bool(last) and (b - a, d) == (last[0][1] - last[0][0], last[0][2]) and a > last[-1][0]
        if alike and (len(last) == 1 or a - last[-1][0] == last[1][0] - last[0][0]):
            last.append((a, b, d))
        else:
            groups.append([(a, b, d)])
    strides = [g[1][0] - g[0][0] if len(g) > 1 else stride if len(groups) == 1 else 1 for g in groups]
    return [Run(g[0][0], g[-1][1], g[0][1] - g[0][0], s, g[0][2]) for g, s in zip(groups, strides, strict=True)]


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
    low, high = (options.get("min_val", -1.0), options.get("max_val", 1.0)) if name == "hardtanh" else (
        options.get("min"), options.get("max"))  # fmt: skip
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        raise LowerError(f"{node.name!r}: its bounds are tensors; only numbers have an integer form")
    return (-float("inf") if low is None else float(low)), (float("inf") if high is None else float(high))


RESIZES = {"interpolate", "upsample", "upsamplingbilinear2d"}
"""Operations that are no function of one element but of one tensor: see ``moves``."""
_OF_ONE = {
    "sigmoid", "hardsigmoid", "silu", "hardswish", "gelu", "elu", "selu", "celu", "leakyrelu", "prelu", "rrelu",
    "tanh", "mish", "softplus", "softsign", "tanhshrink", "logsigmoid", "threshold", "add", "iadd", "sub", "isub",
    "rsub", "mul", "imul", "div", "truediv", "itruediv", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "pow",
    "square", "reciprocal", "sin", "cos", "erf", "sign", "round", "floor", "ceil", "relu6", "hardtanh", "clamp",
}  # fmt: skip
"""Operations of one tensor (and numbers) that work element by element."""
_INSTEAD = {
    **dict.fromkeys(("softmax", "logsoftmax"), (
        "as the last step leave it out of the network (the largest logit is the largest probability); attention inside "
        "stays in float, outside"
    )),
    **dict.fromkeys(("layernorm", "groupnorm", "instancenorm2d", "rmsnorm"), (
        "it measures each image anew; train with batch norm, which the layer before it absorbs"
    )),
    **dict.fromkeys(("matmul", "bmm", "scaleddotproductattention", "multiheadattention", "einsum"), (
        "products of two activations across positions stay in float: lower the parts before and behind it"
    )),
}  # fmt: skip
"""Operations without an integer form -> the way out."""


def source_of(node: fx.Node, gm: fx.GraphModule, kinds: dict[fx.Node, str]) -> fx.Node:
    """Return the one tensor that ``node``, a function of one element or a resampling, reads.

    Raises:
        LowerError: the operation works across elements, reads two tensors, or has a constant per channel; with the
                    layer's name and the way out.
    """
    name, read = op_name(node, gm), [n for n in node.all_input_nodes if "shape" in n.meta or kinds[n] == "param"]
    constants = [n for n in read if kinds[n] == "param"]
    tensors = [n for n in read if n not in constants]
    held = [_parameter(n, gm) for n in constants]
    held += [*gm.get_submodule(str(node.target)).parameters()] if node.op == "call_module" else []
    if len(tensors) == 1 and (name in RESIZES or (name in _OF_ONE and all(p.numel() == 1 for p in held))):
        return tensors[0]
    way_out = "compute it outside of the network, or write it with layers, sums, products, pools and such functions"
    if name in _OF_ONE and held:
        way_out = "it holds a constant per channel; fold it into the layer before it, or make it one number"
    raise LowerError(f"{_where(node)!r} ({name}) has no integer form: {_INSTEAD.get(name, way_out)}")


def computed(node: fx.Node, gm: fx.GraphModule, source: fx.Node, real: np.ndarray) -> np.ndarray:
    """Return float32 (n,): what ``node`` makes of the values ``real`` (n,) of the tensor ``source``.

    Raises:
        LowerError: it is not a number at one of them; with the layer's name.
    """
    one = fx.Interpreter(gm)
    one.env = {n: _parameter(n, gm).reshape(()) if n.op == "get_attr" else known_sizes(n) for n in node.all_input_nodes}
    one.env[source] = torch.from_numpy(real.astype(np.float32)).to(device_of(gm))
    with torch.no_grad():
        y = one.run_node(node)
    values = y.cpu().numpy().astype(np.float32)
    if np.isnan(values).any():
        at = float(real[int(np.isnan(values).argmax())])
        raise LowerError(f"{_where(node)!r} ({op_name(node, gm)}) is not a number at {at:.4g}, which its input can be")
    return values


def _parameter(node: fx.Node, gm: fx.GraphModule) -> torch.Tensor:
    return operator.attrgetter(str(node.target))(gm)


def _where(node: fx.Node) -> str:
    """Return the layer's dotted name, or for a function the module that calls it and the node."""
    path = module_path(node)
    return str(node.target) if node.op == "call_module" else f"{path[-1][0]}.{node.name}" if path else node.name
