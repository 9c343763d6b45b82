"""One operation of the record after another as ONNX operators, fused ones where onnxruntime has them.

    x -> DequantizeLinear -> Conv, Gemm, Add, GlobalAveragePool in float -> QuantizeLinear [-> Clip] -> y

is the quantize-dequantize form that onnxruntime fuses into QLinearConv, QGemm, QLinearAdd and the like. Fused, these
compute the record's "float32" arithmetic exactly; the ``Clip`` on integers holds what is left of a ReLU or of a grid
below 8 bits (QCDQ). The rest is spelled out: accumulators come from ConvInteger and MatMulInteger, which multiply 8-bit
integers only. Wider operands are split, x = 256 x_hi + x_lo and w = 256 w_hi + w_lo, and the int32 sums of the parts
added with their powers of 256.
"""

import math
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import add_offset
from hq_lib.integer.record import TensorSpec
from hq_lib.integer.storage import narrowest
from hq_lib.results.bits import pack

ONNX_TYPE = {
    "uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "uint16": TensorProto.UINT16, "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE,
}  # fmt: skip
_ZEROS = (("weight", "int8"), ("bias", "int32"))  # not shared: onnxruntime rewrites each layer's own


class ExportError(ValueError):
    """A record that cannot be written as ONNX; the message names the operation and the reason."""


class Graph:
    """Collects nodes and initializers; every method returns the name of the value it makes."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._n_values = 0

    def node(
        self, kind: str, inputs: list[str], *, output: str | None = None, name: str = "", **attributes: Any
    ) -> str:
        """Append a node of type ``kind`` and return its output (a fresh name if none is given)."""
        output = self.fresh(kind) if output is None else output
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value: Any, dtype: str, *, name: str | None = None) -> str:
        """Return an initializer with ``value`` as ``dtype``; unnamed ones are shared where they are equal."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, dtype)
        if name is None and key in self._constants:
            return self._constants[key]
        name = name or self.fresh("constant")
        self._constants.setdefault(key, name)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def cast(self, value: str, dtype: str, *, output: str | None = None) -> str:
        """Return ``value`` cast to ``dtype``."""
        return self.node("Cast", [value], output=output, to=ONNX_TYPE[dtype])

    def fresh(self, stem: str) -> str:
        """Return a name no value has yet."""
        self._n_values += 1
        return f"{stem}:{self._n_values}"

    def weight(self, value: np.ndarray, name: str) -> str:
        """Return int8 ``value``: an initializer, of 4 bits (two values a byte) and a step where these hold it."""
        step, bits, signed = narrowest(value)
        if bits + (not signed) > 4:
            return self.constant(value, "int8", name=name)
        packed = pack(value.reshape(-1).astype(np.int64) // step, 4).tobytes()
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, value.shape, packed, raw=True))
        real = self.node("Mul", [self.cast(name, "float32"), self.constant(float(step), "float32")])
        return self.cast(real, "int8")


def write(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write what ``op`` makes of ``inputs`` as the value ``out``."""
    x, named = inputs[0], {"output": out.name, "name": op.name}
    match op:
        case _ if _fuses(op, inputs, out):
            _write_fused(graph, op, inputs, out)
        case r.Quantize() if out.dtype == "uint8":
            _quantize(graph, x.name, out)
        case r.Quantize():
            _round_to(graph, graph.node("Div", [x.name, graph.constant(float(out.scale), "float32")]), out)
        case r.Conv() | r.Linear() | r.AvgPool():
            _sum(graph, op, inputs, out)
        case r.Add():
            _add(graph, op, inputs, out)
        case r.Mul():
            centred = [
                graph.node("Sub", [graph.cast(x.name, "int32"), graph.constant(x.zero_point, "int32")]) for x in inputs
            ]
            _requantize(graph, op, graph.node("Mul", centred), [], out)
        case r.MaxPool():
            window = {"kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding, "dilations": op.dilation}
            _through_float(graph, "MaxPool", op, x, out, [], **window)
        case r.Concat():
            graph.node("Concat", [x.name for x in inputs], **named, axis=op.axis + 1)
        case r.Reshape():
            graph.node("Reshape", [x.name, graph.constant(np.array([-1, *out.shape]), "int64")], **named)
        case r.Transpose():
            graph.node("Transpose", [x.name], **named, perm=[0, *(a + 1 for a in op.axes)])
        case r.Slice():
            ranges = (op.start, op.stop, np.arange(1, len(op.start) + 1), op.step)
            graph.node("Slice", [x.name, *(graph.constant(np.array(v), "int64") for v in ranges)], **named)
        case r.Pad():
            widths = graph.constant(np.array([0, *op.before, 0, *op.after]), "int64")
            fill = graph.constant(x.zero_point, _float_for_uint16(x))
            _through_float(graph, "Pad", op, x, out, [widths, fill])
        case r.Clip():
            ends = [graph.constant(q, _float_for_uint16(out)) for q in (out.qmin, out.qmax)]
            _through_float(graph, "Clip", op, x, out, ends)
        case r.Table():
            values = graph.constant(op.values, out.dtype, name=f"{op.name}:table")
            graph.node("Gather", [values, graph.cast(x.name, "int32")], **named)
        case _:
            raise ExportError(f"{op.name!r}: {type(op).__name__} has no ONNX form")


def _sum(graph: Graph, op: r.Layer | r.AvgPool, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write a sum over a window: requantized, or as it is (logits, a residual's accumulators, an exact pool)."""
    acc = _accumulators(graph, op, inputs[0])
    if op.requant is not None:
        _requantize(graph, op, acc, inputs[1:], out)
    elif isinstance(op, r.AvgPool):
        acc = graph.node("Add", [acc, graph.constant(out.zero_point, "int32")]) if out.zero_point else acc
        graph.cast(acc, out.dtype, output=out.name)
    else:
        graph.node("Identity", [acc], output=out.name)


def _float_for_uint16(spec: TensorSpec) -> str:
    return "float32" if spec.dtype == "uint16" else spec.dtype


def _through_float(
    graph: Graph, kind: str, op: r.Op, x: TensorSpec, out: TensorSpec, extra: list[str], **attributes: Any
) -> None:
    """Write an operator that onnxruntime has for uint8 but not for uint16: float32 holds either exactly."""
    if x.dtype != "uint16":
        graph.node(kind, [x.name, *extra], output=out.name, name=op.name, **attributes)
        return
    value = graph.node(kind, [graph.cast(x.name, "float32"), *extra], name=op.name, **attributes)
    graph.cast(value, out.dtype, output=out.name)


def _fuses(op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> bool:
    """Return whether ``op`` has a fused 8-bit kernel, whose multipliers, from the scales alone, are the record's."""
    if any(spec.dtype != "uint8" for spec in (*inputs, out)):
        return False
    scale = np.float32(out.scale)
    match op:
        case r.Add():
            (a, b), (m, n) = inputs, op.requants
            same = m.multiplier[0] == np.float32(a.scale) / scale and n.multiplier[0] == np.float32(b.scale) / scale
            return bool(same and op.offset == add_offset(op.requants, a, b, out))
        case r.Layer(requant=r.Requant(multiplier=m), residual=None):
            plain = op.weight.dtype == np.int8 and (isinstance(op, r.Conv) or len(out.shape) == 1)
            return plain and np.array_equal(m, op.acc_scale / scale)
        case r.AvgPool(requant=r.Requant(multiplier=m)) if op.kernel == inputs[0].shape[1:] and not any(op.padding):
            return bool(m[0] == np.float32(inputs[0].scale) / (np.float32(math.prod(op.kernel)) * scale))
        case _:
            return False


def _write_fused(graph: Graph, op: r.Op, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write ``op``, for which ``_fuses`` is true."""
    reals = [graph.node("DequantizeLinear", [x.name, *_grid(graph, x)]) for x in inputs]
    attributes: dict[str, Any] = {}
    if isinstance(op, r.Layer):
        reals += _parameters(graph, op)
        attributes = _geometry(op, inputs[0]) if isinstance(op, r.Conv) else {"transB": 1}
    kind = {r.Conv: "Conv", r.Linear: "Gemm", r.Add: "Add", r.AvgPool: "GlobalAveragePool"}[type(op)]
    _quantize(graph, graph.node(kind, reals, name=op.name, **attributes), out)


def _quantize(graph: Graph, real: str, out: TensorSpec) -> None:
    """Write ``out`` from real values: saturating at 0 and 255, then clipped to its own range where that is narrower."""
    whole = (out.qmin, out.qmax) == (0, 255)
    q = graph.node("QuantizeLinear", [real, *_grid(graph, out)], output=out.name if whole else None)
    if not whole:
        graph.node("Clip", [q, *(graph.constant(end, out.dtype) for end in (out.qmin, out.qmax))], output=out.name)


def _grid(graph: Graph, spec: TensorSpec) -> list[str]:
    return [graph.constant(spec.scale, "float32"), graph.constant(spec.zero_point, spec.dtype)]


def _parameters(graph: Graph, op: r.Layer) -> list[str]:
    scale = graph.constant(op.weight_scale, "float32", name=f"{op.name}:weight_scale")
    zeros = [graph.constant(np.zeros(len(op.bias)), dtype, name=f"{op.name}:{what}_zero") for what, dtype in _ZEROS]
    weight = graph.node("DequantizeLinear", [graph.weight(op.weight, f"{op.name}:weight"), scale, zeros[0]], axis=0)
    acc_scale = graph.constant(op.acc_scale, "float32", name=f"{op.name}:acc_scale")
    bias = graph.constant(op.bias, "int32", name=f"{op.name}:bias")
    return [weight, graph.node("DequantizeLinear", [bias, acc_scale, zeros[1]], axis=0)]


def _accumulators(graph: Graph, op: r.Layer | r.AvgPool, x: TensorSpec) -> str:
    """Return int32 sum w (q - z) + bias of ``op``, (B, *output shape); of a pool the sums over each window."""
    parts: list[str] = []
    for i, (q, zero, x_factor) in enumerate(_input_parts(graph, x)):
        for w, w_factor in _weight_parts(graph, op, x, suffix=f".{i}" if i else ""):
            kind, attributes = ("MatMulInteger", {}) if isinstance(op, r.Linear) else ("ConvInteger", _geometry(op, x))
            value = graph.node(kind, [q, w, zero], name=f"{op.name}/{w}/{q}", **attributes)
            if x_factor * w_factor != 1:
                value = graph.node("Mul", [value, graph.constant(x_factor * w_factor, "int32")])
            parts.append(value)
    total = parts[0]
    for part in parts[1:]:
        total = graph.node("Add", [total, part])
    if isinstance(op, r.AvgPool):
        return total
    return graph.node("Add", [total, graph.constant(_column(op.bias, op), "int32", name=f"{op.name}:bias")])


def _input_parts(graph: Graph, x: TensorSpec) -> list[tuple[str, str, int]]:
    """Return (value, zero point, factor) of the 8-bit parts of tensor ``x``."""
    zero = x.zero_point
    if x.dtype == "uint8":
        return [(x.name, graph.constant(zero, "uint8"), 1)]
    wide = graph.cast(x.name, "int32")
    base = graph.constant(256, "int32")
    high = graph.node("Div", [wide, base])
    low = graph.node("Sub", [wide, graph.node("Mul", [high, base])])
    return [
        (graph.cast(high, "uint8"), graph.constant(zero >> 8, "uint8"), 256),
        (graph.cast(low, "uint8"), graph.constant(zero & 255, "uint8"), 1),
    ]


def _weight_parts(graph: Graph, op: r.Layer | r.AvgPool, x: TensorSpec, suffix: str) -> list[tuple[str, int]]:
    """Return (initializer, factor) of the 8-bit parts of the weight; its own for each product, as onnxruntime asks."""
    if isinstance(op, r.AvgPool):
        return [(graph.constant(np.ones((x.shape[0], 1, *op.kernel)), "int8", name=f"{op.name}:ones{suffix}"), 1)]
    w = op.weight.astype(np.int32)
    w = w if isinstance(op, r.Conv) else w.T
    if op.weight.dtype == np.int8:
        return [(graph.weight(w, f"{op.name}:weight{suffix}"), 1)]
    high = (w + 128) >> 8  # then w - 256 high lies in [-128, 127]
    parts = [(high, 256, "high"), (w - 256 * high, 1, "low")]
    if high.max() > 127:
        spill = np.where(high > 127, 1, 0)  # weights above 32,639: the high part takes two summands
        parts = [(high - spill, 256, "high"), (spill, 256, "spill"), (w - 256 * high, 1, "low")]
    return [(graph.weight(v, f"{op.name}:weight.{part}{suffix}"), factor) for v, factor, part in parts]


def _geometry(op: r.Op, x: TensorSpec) -> dict[str, Any]:
    """Return the attributes of a convolution node, or of the depthwise one that sums the windows of a pool of ``x``."""
    assert isinstance(op, r.Conv | r.AvgPool)
    group = op.groups if isinstance(op, r.Conv) else x.shape[0]
    window = {"kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding, "dilations": op.dilation}
    return window | {"group": group}


def _column(values: np.ndarray, op: r.Op) -> np.ndarray:
    """Return per-channel ``values`` shaped to meet the output of ``op``."""
    return values[:, None, None] if isinstance(op, r.Conv) else values


def _requantize(
    graph: Graph, op: r.Layer | r.AvgPool | r.Mul, acc: str, residual: list[TensorSpec], out: TensorSpec
) -> None:
    """Write ``out`` = clamp(rint(f32(acc) m [+ f32(r - z_r) n]) + z), each step a float32 operator."""
    assert op.requant is not None  # the caller writes accumulators otherwise
    m = graph.constant(_column(op.requant.multiplier, op), "float32", name=f"{op.name}:multiplier")
    real = graph.node("Mul", [graph.cast(acc, "float32"), m])
    if isinstance(op, r.Layer) and op.residual is not None:
        centred = graph.cast(residual[0].name, "float32")
        if residual[0].zero_point:
            centred = graph.node("Sub", [centred, graph.constant(float(residual[0].zero_point), "float32")])
        n = graph.constant(_column(op.residual.requant.multiplier, op), "float32", name=f"{op.name}:residual")
        real = graph.node("Add", [real, graph.node("Mul", [centred, n])])
    _round_to(graph, real, out)


def _round_to(graph: Graph, real: str, out: TensorSpec, *, zero_included: bool = False) -> None:
    """Write ``out`` = clamp(rint(real) + z), or clamp(rint(real)) where ``real`` holds z already."""
    y = graph.node("Round", [real])
    if out.zero_point and not zero_included:
        y = graph.node("Add", [y, graph.constant(float(out.zero_point), "float32")])
    ends = [graph.constant(float(q), "float32") for q in (out.qmin, out.qmax)]
    graph.cast(graph.node("Clip", [y, *ends]), out.dtype, output=out.name)


def _add(graph: Graph, op: r.Add, inputs: list[TensorSpec], out: TensorSpec) -> None:
    """Write ``out`` by the record's two fused multiply-adds: exact in double, rounded to float after each."""
    total = graph.constant(np.float64(op.offset), "float64")
    for i in (1, 0):
        m = graph.constant(np.float64(op.requants[i].multiplier[0]), "float64")
        term = graph.node("Mul", [graph.cast(inputs[i].name, "float64"), m])
        rounded = graph.cast(graph.node("Add", [term, total]), "float32")
        total = graph.cast(rounded, "float64") if i else rounded
    _round_to(graph, total, out, zero_included=True)
