"""Real values that no quantizer has rounded yet: what ``lower`` holds between a layer and the grid that ends it.

A ``Product`` is a layer's result; ``Sum`` adds two of those or of known tensors; ``Average`` is a pool; ``Function``
maps each element alone; ``Plain`` is the image's rounding or a product of two known tensors.
All but a function have ``write(writer, out)``: the operations that compute them on the grid of ``out``, whose range
holds their clips; a function becomes what its quantizer makes of every integer of its input (``lowering``).
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import add_offset, forms, requants
from hq_lib.integer.emit import INT32, Writer
from hq_lib.integer.nodes import LowerError, Pool
from hq_lib.integer.products import Product, in_storage, unchanged
from hq_lib.integer.record import TensorSpec


@dataclass(frozen=True, eq=False)
class Function:
    """A function of one element that waits for the grid of its output: a table."""

    name: str
    """node"""
    x: TensorSpec
    """its input"""
    real: np.ndarray
    """float32 (x.qmax + 1,): its value at each integer 0 .. qmax"""


@dataclass(frozen=True, eq=False)
class Plain:
    """One operation on known tensors that waits for the grid of its output: the image's ``Quantize``, a ``Mul``."""

    kind: type[r.Op]
    name: str
    """node; "": as its output is called"""
    inputs: list[TensorSpec]

    def write(self, writer: Writer, out: TensorSpec) -> TensorSpec:
        """Write it; a product with its rescaling."""
        fields = {}
        if self.kind is r.Mul:
            (fields["requant"],) = requants(forms([x.scale for x in self.inputs], (out.scale,)), name=self.name)
        return writer.write(self.kind, self.name or out.name, self.inputs, out, **fields)


@dataclass(frozen=True, eq=False)
class Average:
    """An average pool that waits for the grid of its output."""

    name: str
    """node"""
    x: TensorSpec
    """its input"""
    pool: Pool
    """where it looks"""

    def write(self, writer: Writer, out: TensorSpec, *, exact: bool = False) -> TensorSpec:
        """Write the pool, requantized or (``exact``) its sums as they are; unequal windows piece by piece, joined."""
        if self.pool.plain:
            ratio = forms((self.x.scale,), (self.pool.n, out.scale))
            requant = None if exact else requants(ratio, name=self.name)[0]
            return pooled(writer, self.pool, r.AvgPool, self.name, self.x, out, requant=requant)
        rows = []
        for i, row in enumerate(self.pool.rows):
            pieces = []
            for j, column in enumerate(self.pool.columns):
                name, pool = f"{out.name}.{i}.{j}", replace(self.pool, rows=[row], columns=[column])
                pieces.append(Average(name, self.x, pool).write(writer, replace(out, name=name)))
            rows.append(_joined(writer, pieces, 2, f"{out.name}.{i}" if len(self.pool.rows) > 1 else out.name))
        return _joined(writer, rows, 1, out.name)

    def write_exact(self, writer: Writer, name: str) -> TensorSpec:
        """Write a plain pool that no quantizer follows: the exact sums, on the scale s_x / n."""
        x, places = with_zero(self.x), math.prod(self.pool.fields["kernel"])
        top = places * x.qmax
        if top >= 2**16:
            raise LowerError(f"average pool {name!r} has no quantizer, and its exact sums exceed 16 bits: give it one")
        dtype, scale = ("uint8" if top < 256 else "uint16"), forms((x.scale,), (self.pool.n,))[0].reshape(())
        bits, zero = max(1, top.bit_length()), places * x.zero_point
        out = TensorSpec(name, x.shape, dtype, bits, places * x.qmin, top, scale, zero)
        return self.write(writer, out, exact=True)


def with_zero(x: TensorSpec) -> TensorSpec:
    """Return ``x`` with a range that holds real 0."""
    return replace(x, qmin=min(x.qmin, x.zero_point), qmax=max(x.qmax, x.zero_point))


def pooled(
    writer: Writer, pool: Pool, kind: type[r.Op], name: str, x: TensorSpec, out: TensorSpec, **fields: object
) -> TensorSpec:
    """Write a plain pool of the places it reads, of (1, T, C) for (T, C); where it takes axes away, the reshape too."""
    if len(x.shape) == 2:
        x = writer.write(r.Reshape, f"{name}.map", [x], replace(x, name=f"{name}.map", shape=(1, *x.shape)))
    row, column, fields = pool.rows[0], pool.columns[0], {**pool.fields, **fields}
    start, stop = (0, row.start, column.start), (x.shape[0], row.stop, column.stop)
    if (start, stop) != ((0, 0, 0), x.shape):
        x = writer.write(r.Slice, f"{name}.part", [x], start=start, stop=stop, step=(1, 1, 1))
    if pool.shape is None:
        return writer.write(kind, name, [x], out, **fields)
    y = writer.write(kind, name, [x], replace(out, name=f"{out.name}.pooled"), **fields)
    return writer.write(r.Reshape, f"{name}.squeeze", [y], replace(out, shape=pool.shape))


def _joined(writer: Writer, parts: list[TensorSpec], axis: int, name: str) -> TensorSpec:
    return parts[0] if len(parts) == 1 else writer.write(r.Concat, name, parts, axis=axis)


@dataclass(frozen=True, eq=False)
class Sum:
    """An addition that waits for the grid of its output."""

    name: str
    """node"""
    operands: "tuple[TensorSpec | Pending, TensorSpec | Pending]"
    """known tensors, or layers without a quantizer of their own"""

    def write(self, writer: Writer, out: TensorSpec) -> TensorSpec:
        """Write an ``Add`` of known tensors, or a layer that the other operand joins as its residual."""
        a, b = self.operands
        if isinstance(a, TensorSpec) and isinstance(b, TensorSpec):
            return self._add(writer, a, b, out)
        main, other = (a, b) if _is_plain_layer(a) else (b, a)
        if isinstance(other, TensorSpec) and not _is_plain_layer(main) and len(other.shape) == 3:
            main, other = Pending(unchanged(self.name, other)), main  # the clipped layer is the residual
        if not isinstance(main, Pending) or not isinstance(main.term, Product) or main.clipped:
            raise LowerError(f"{self.name!r} adds tensors without quantizers, of which none is a plain layer's output")
        rest, term = other if isinstance(other, TensorSpec) else accumulators(writer, other), in_storage(main.term)
        r_scale = np.broadcast_to(rest.scale, len(term.w))
        ratios = (forms(scales, (out.scale,)) for scales in ((term.x.scale, term.w_scale), (r_scale,)))
        requant, residual = requants(*ratios, name=self.name)
        return term.write_layer(writer, out, requant, rest, r.Residual(rest.name, residual))

    def _add(self, writer: Writer, a: TensorSpec, b: TensorSpec, out: TensorSpec) -> TensorSpec:
        both = requants(*(forms((x.scale,), (out.scale,)) for x in (a, b)), name=self.name)
        return writer.write(r.Add, self.name, [a, b], out, requants=both, offset=add_offset(both, a, b, out))


@dataclass(frozen=True, eq=False)
class Pending:
    """A term and the clips (ReLU, ReLU6, ...) that its real value passes before it is rounded."""

    term: Product | Average | Sum | Function | Plain
    """what is computed"""
    low: float = -math.inf
    """least real value after the clips"""
    high: float = math.inf
    """largest real value after the clips"""

    @property
    def clipped(self) -> bool:
        """Whether any clip is at work."""
        return self.low > -math.inf or self.high < math.inf

    def clip(self, low: float, high: float) -> "Pending":
        """Return the value clipped once more."""
        return replace(self, low=min(max(self.low, low), high), high=min(max(self.high, low), high))


def _is_plain_layer(value: Pending | TensorSpec) -> bool:
    return isinstance(value, Pending) and isinstance(value.term, Product) and not value.clipped


def accumulators(writer: Writer, value: Pending) -> TensorSpec:
    """Return the int32 accumulators of a layer, written once; a ReLU behind it becomes a ``Clip`` of them."""
    term = value.term
    if not isinstance(term, Product):
        name = getattr(term, "name", "the image")
        raise LowerError(f"{name!r} goes into an addition without a quantizer: give it one")
    if term not in writer.sums:
        writer.sums[term] = in_storage(term).write_accumulators(writer, f"{term.name}.acc")
    acc = writer.sums[term]
    if not value.clipped:
        return acc
    ends = {(0.0, math.inf): {"qmin": 0}, (-math.inf, 0.0): {"qmax": 0}}.get((value.low, value.high))
    if ends is None:
        raise LowerError(f"{term.name!r}: its clip at {value.high} goes into an addition without a quantizer")
    return writer.write(r.Clip, f"{term.name}.relu", [acc], replace(acc, name=f"{acc.name}.relu", **ends))


def logits(writer: Writer, value: Pending, name: str) -> TensorSpec:
    """Write the network's output: int32 accumulators, in the fixed form brought to one scale for all classes."""
    if isinstance(value.term, Average) and value.term.pool.plain and not value.clipped:
        return value.term.write_exact(writer, name)
    if not isinstance(value.term, Product) or value.clipped:
        raise LowerError(f"the network's output {name!r} has no quantizer, and is no layer's or pool's own output")
    term = in_storage(value.term)
    if writer.requantizer == "float32":
        return term.write_accumulators(writer, name)
    scale, exact = forms((term.x.scale, term.w_scale), ())
    out = TensorSpec(name, (), "int32", 32, *INT32, np.asarray(scale.max()), 0)
    return term.write_layer(writer, out, requants((scale / scale.max(), exact / exact.max()), name=name)[0])


def negated(writer: Writer, value: TensorSpec | Pending, name: str) -> TensorSpec | Pending:
    """Return ``value`` with the other sign, exactly: a layer by its weights, a known tensor by a table."""
    if isinstance(value, Pending):
        assert isinstance(value.term, Product)  # what else is pending has no integers to add
        return Pending(replace(value.term, w=-value.term.w, bias=-value.term.bias), -value.high, -value.low)
    top = max(value.qmax, value.zero_point)
    ends = {"qmin": top - value.qmax, "qmax": top - value.qmin, "zero_point": top - value.zero_point}
    out = replace(value, name=f"{name}.negated", **ends)
    return writer.table(out.name, value, top - np.arange(value.qmax + 1), out)
