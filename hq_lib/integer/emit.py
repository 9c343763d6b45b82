"""From pending real values and a grid to operations of the record: the arithmetic side of ``lower``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.execute import to_grid
from hq_lib.integer.geometry import LowerError, Run, Window
from hq_lib.integer.proof import prove_accumulator
from hq_lib.integer.record import TensorSpec
from hq_lib.integer.requant import pair, single
from hq_lib.integer.terms import Average, Function, Image, Patches, Pending, Product, Sum, Times, in_storage, unchanged

INT32 = (-(2**31), 2**31 - 1)


@dataclass
class Writer:
    """Tensors and operations written so far; names are made unique."""

    requantizer: r.Requantizer
    """the model's"""
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    """by name"""
    ops: list[r.Op] = field(default_factory=list)
    """in execution order"""
    sums: dict[int, TensorSpec] = field(default_factory=dict)
    """accumulators written already, by the identity of their term"""

    def add(self, spec: TensorSpec) -> TensorSpec:
        """Register a tensor; returns it under a name not used before."""
        spec = replace(spec, name=_unused(spec.name, self.tensors))
        self.tensors[spec.name] = spec
        return spec

    def write(self, kind: type[r.Op], name: str, inputs: list[TensorSpec], out: TensorSpec, **rest: Any) -> TensorSpec:
        """Append an operation that reads ``inputs`` and writes ``out``; returns ``out`` as registered."""
        out = self.add(out)
        name = _unused(name, {op.name for op in self.ops})
        self.ops.append(kind(name, tuple(spec.name for spec in inputs), out.name, **rest))
        return out

    def finish(self, value: Pending, out: TensorSpec) -> TensorSpec:
        """Write the operations that compute ``value`` on the grid of ``out``, whose range already holds its clips."""
        term = value.term
        if isinstance(term, Image):
            return self.write(r.Quantize, out.name, [term.x], out)
        if isinstance(term, Average):
            return self._average(term, out)
        if isinstance(term, Patches):
            return self._patches(term, out)
        if isinstance(term, Sum):
            return self._sum(term, out)
        if isinstance(term, Times):
            return self._times(term, out)
        if isinstance(term, Function):
            return self.table(term.name, term.x, to_grid(term.real.copy(), out), out)
        return self._layer(in_storage(term), out)

    def _layer(self, term: Product, out: TensorSpec) -> TensorSpec:
        s_y = np.float32(out.scale)
        requant = single(_acc_scale(term) / s_y, _exact(term) / np.float64(s_y))
        return self._write_layer(term, [], out, requant, None)

    def _write_layer(
        self, term: Product, more: list[TensorSpec], out: TensorSpec, requant: r.Requant | None,
        residual: r.Residual | None,
    ) -> TensorSpec:  # fmt: skip
        acc_scale = _acc_scale(term)
        bias = np.rint(term.bias / acc_scale.astype(np.float64))
        low, high = int(term.w.min()), int(term.w.max())
        storage = np.int8 if low >= -(2**7) and high < 2**7 else np.int16
        if low < -(2**15) or high >= 2**15 or np.abs(bias).max() > INT32[1]:
            raise LowerError(f"layer {term.name!r}: its weights or biases are too wide for int16 and int32")
        fields: dict[str, Any] = {
            "weight": term.w.astype(storage), "weight_scale": term.w_scale, "bias": bias.astype(np.int32),
            "acc_scale": acc_scale, "weight_bits": term.w_bits, "requant": requant, "residual": residual,
        }  # fmt: skip
        kind = r.Linear if term.geometry is None else r.Conv
        out = self.write(kind, term.name, [term.x, *more], out, **fields, **(term.geometry or {}))
        layer = self.ops[-1]
        assert isinstance(layer, r.Layer)
        prove_accumulator(layer, term.x)
        return out

    def accumulators(self, value: Pending) -> TensorSpec:
        """Return the int32 accumulators of a layer, written once; a ReLU behind it becomes a ``Clip`` of them."""
        term = value.term
        if not isinstance(term, Product):
            name = getattr(term, "name", "the image")
            raise LowerError(f"{name!r} goes into an addition without a quantizer: give it one")
        if id(term) not in self.sums:
            fitted = in_storage(term)
            out = TensorSpec(f"{term.name}.acc", output_shape(term), "int32", 32, *INT32, _acc_scale(fitted), 0)
            self.sums[id(term)] = self._write_layer(fitted, [], out, None, None)
        acc = self.sums[id(term)]
        if not value.clipped:
            return acc
        ends = {(0.0, math.inf): {"qmin": 0}, (-math.inf, 0.0): {"qmax": 0}}.get((value.low, value.high))
        if ends is None:
            raise LowerError(f"{term.name!r}: its clip at {value.high} goes into an addition without a quantizer")
        return self.write(r.Clip, f"{term.name}.relu", [acc], replace(acc, name=f"{acc.name}.relu", **ends))

    def _sum(self, term: Sum, out: TensorSpec) -> TensorSpec:
        a, b = term.operands
        if isinstance(a, TensorSpec) and isinstance(b, TensorSpec):
            return self._add(term.name, a, b, out)
        main, other = (a, b) if isinstance(a, Pending) and _is_plain_layer(a) else (b, a)
        if isinstance(other, TensorSpec) and not _is_plain_layer(main) and len(other.shape) == 3:
            main, other = Pending(unchanged(term.name, other)), main  # the clipped layer is the residual
        if not isinstance(main, Pending) or not _is_plain_layer(main):
            raise LowerError(f"{term.name!r} adds tensors without quantizers, of which none is a plain layer's output")
        rest = other if isinstance(other, TensorSpec) else self.accumulators(other)
        product = main.term
        assert isinstance(product, Product)
        return self._conv_add(in_storage(product), rest, out)

    def _conv_add(self, term: Product, other: TensorSpec, out: TensorSpec) -> TensorSpec:
        s_y, n = np.float32(out.scale), len(term.w)
        r_scale = np.broadcast_to(other.scale, n).astype(np.float32)
        floats = (_acc_scale(term) / s_y, r_scale / s_y)
        main, residual = pair(floats, (_exact(term) / np.float64(s_y), r_scale.astype(np.float64) / np.float64(s_y)))
        return self._write_layer(term, [other], out, main, r.Residual(other.name, residual))

    def _add(self, name: str, a: TensorSpec, b: TensorSpec, out: TensorSpec) -> TensorSpec:
        s_y, z_y = np.float32(out.scale), out.zero_point
        m_a, m_b = np.float32(a.scale) / s_y, np.float32(b.scale) / s_y
        exact = tuple(np.float64(x.scale).reshape(1) / np.float64(s_y) for x in (a, b))
        requants = pair((m_a.reshape(1), m_b.reshape(1)), exact)  # type: ignore[arg-type]
        product_b = np.float32(m_b * np.float32(b.zero_point))
        both = np.float32(np.float64(m_a) * a.zero_point + np.float64(product_b))
        return self.write(r.Add, name, [a, b], out, requants=requants, offset=np.float32(np.float32(z_y) - both))

    def _times(self, term: Times, out: TensorSpec) -> TensorSpec:
        s_y, scales = np.float32(out.scale), [np.float32(spec.scale) for spec in (term.a, term.b)]
        exact = np.float64(scales[0]) * np.float64(scales[1]) / np.float64(s_y)
        requant = single((scales[0] * scales[1] / s_y).reshape(1), exact.reshape(1))
        return self.write(r.Mul, term.name, [term.a, term.b], out, requant=requant)

    def table(self, name: str, x: TensorSpec, values: np.ndarray, out: TensorSpec) -> TensorSpec:
        """Write ``out``, whose integer for integer q of ``x`` is values[q] clipped to its range; q = 0 .. x.qmax."""
        return self.write(r.Table, name, [x], out, values=np.clip(values, out.qmin, out.qmax).astype(out.dtype))

    def negated(self, value: TensorSpec | Pending, name: str) -> TensorSpec | Pending:
        """Return ``value`` with the other sign, exactly: a layer by its weights, a known tensor by a table."""
        if isinstance(value, Pending):
            assert isinstance(value.term, Product)  # what else is pending has no integers to add
            return Pending(replace(value.term, w=-value.term.w, bias=-value.term.bias), -value.high, -value.low)
        top = max(value.qmax, value.zero_point)
        ends = {"qmin": top - value.qmax, "qmax": top - value.qmin, "zero_point": top - value.zero_point}
        out = replace(value, name=f"{name}.negated", **ends)
        return self.table(out.name, value, top - np.arange(value.qmax + 1), out)

    def _patches(self, term: Patches, out: TensorSpec) -> TensorSpec:
        """Write a pool of unequal windows piece by piece, each with its own divisor, and join the pieces."""
        rows = []
        for i, row in enumerate(term.rows):
            pieces = [
                self._patch(term, row, column, f"{out.name}.{i}.{j}", out) for j, column in enumerate(term.columns)
            ]
            rows.append(self._joined(pieces, 2, f"{out.name}.{i}" if len(term.rows) > 1 else out.name))
        return self._joined(rows, 1, out.name)

    def _patch(self, term: Patches, row: Run, column: Run, name: str, out: TensorSpec) -> TensorSpec:
        start, stop = (0, row.start, column.start), (term.x.shape[0], row.stop, column.stop)
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        part = replace(term.x, name=f"{name}.part", shape=shape)
        if shape != term.x.shape:
            part = self.write(r.Slice, part.name, [term.x], part, start=start, stop=stop, step=(1, 1, 1))
        else:
            part = term.x
        kernel, stride, n = (row.kernel, column.kernel), (row.stride, column.stride), row.divisor * column.divisor
        return self._average(
            Average(name, part, Window(kernel, stride, (0, 0, 0, 0), (1, 1), n, False)), replace(out, name=name)
        )

    def _joined(self, parts: list[TensorSpec], axis: int, name: str) -> TensorSpec:
        if len(parts) == 1:
            return parts[0]
        shape = [*parts[0].shape]
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.write(r.Concat, name, parts, replace(parts[0], name=name, shape=tuple(shape)), axis=axis)

    def _average(self, term: Average, out: TensorSpec) -> TensorSpec:
        s_x, s_y, n = np.float32(term.x.scale), np.float32(out.scale), np.float32(term.window.n)
        exact = np.float64(s_x) / (np.float64(n) * np.float64(s_y))
        requant = single((s_x / (n * s_y)).reshape(1), exact.reshape(1))
        return self._write_pool(term, out, requant)

    def exact_average(self, term: Average, name: str) -> TensorSpec:
        """Write a pool that no quantizer follows: the exact sums, on the scale s_x / n."""
        places = math.prod(term.window.kernel)
        top, s_x = places * term.x.qmax, np.float32(term.x.scale)
        if top >= 2**16:
            raise LowerError(f"average pool {name!r} has no quantizer, and its exact sums exceed 16 bits: give it one")
        dtype, scale = ("uint8" if top < 256 else "uint16"), np.asarray(s_x / np.float32(term.window.n), np.float32)
        low = 0 if any(term.window.padding) else places * term.x.qmin
        out = TensorSpec(
            name, term.x.shape, dtype, max(1, top.bit_length()), low, top, scale, places * term.x.zero_point
        )
        return self._write_pool(term, out, None)

    def _write_pool(self, term: Average, out: TensorSpec, requant: r.Requant | None) -> TensorSpec:
        w = term.window
        shape = windowed(term.x.shape, w.kernel, w.stride, w.padding, (1, 1))
        pooled = replace(out, shape=shape, name=f"{out.name}.pooled" if w.squeeze else out.name)
        fields = {"kernel": w.kernel, "stride": w.stride, "padding": w.padding, "requant": requant}
        pooled = self.write(r.AvgPool, term.name, [term.x], pooled, **fields)
        if not w.squeeze:
            return pooled
        return self.write(r.Reshape, f"{term.name}.squeeze", [pooled], replace(out, shape=shape[:1]))

    def logits(self, value: Pending, name: str) -> TensorSpec:
        """Write the network's output: int32 accumulators, in the fixed form brought to one scale for all classes."""
        if isinstance(value.term, Average) and not value.clipped:
            return self.exact_average(value.term, name)
        if not isinstance(value.term, Product) or value.clipped:
            raise LowerError(f"the network's output {name!r} has no quantizer, and is no layer's or pool's own output")
        term = in_storage(value.term)
        scale, shape = _acc_scale(term), output_shape(term)
        if self.requantizer == "float32":
            return self._write_layer(term, [], TensorSpec(name, shape, "int32", 32, *INT32, scale, 0), None, None)
        top = scale.max()
        out = TensorSpec(name, shape, "int32", 32, *INT32, np.asarray(top), 0)
        return self._write_layer(term, [], out, single(scale / top, _exact(term) / _exact(term).max()), None)


def _unused(name: str, taken: Any) -> str:
    n, base = 0, name
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    return name


def _is_plain_layer(value: Pending | TensorSpec) -> bool:
    return isinstance(value, Pending) and isinstance(value.term, Product) and not value.clipped


def _acc_scale(term: Product) -> np.ndarray:
    """f32(s_x s_w), (C_out,)."""
    return np.float32(term.x.scale) * term.w_scale


def _exact(term: Product) -> np.ndarray:
    return np.float64(term.x.scale) * term.w_scale.astype(np.float64)


def output_shape(term: Product) -> tuple[int, ...]:
    """Return the shape of a layer's output, without the batch."""
    if term.geometry is None:
        return (*term.x.shape[:-1], len(term.w))
    g = term.geometry
    return windowed((len(term.w), *term.x.shape[1:]), term.w.shape[2:], g["stride"], g["padding"], g["dilation"])


def windowed(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:  # fmt: skip
    """Return (C, H', W') of a window of ``kernel`` moved over ``shape`` (C, H, W)."""
    sizes = zip(shape[1:], padding[:2], padding[2:], kernel, stride, dilation, strict=True)
    return (shape[0], *(r.n_windows(n + a + b, k, s, d) for n, a, b, k, s, d in sizes))
