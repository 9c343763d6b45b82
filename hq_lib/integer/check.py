"""``check``: everything a record promises, verified; made records and loaded files pass through it alike."""

import math
from typing import Any

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import MAX_SHIFT, RecordError, n_windows, prove_accumulator, prove_add, prove_product

RANGES = {"uint8": (0, 2**8 - 1), "uint16": (0, 2**16 - 1), "int32": (-(2**31), 2**31 - 1), "float32": (0, 0)}
"""dtype of a tensor -> the integers it holds (float32: none)"""
MAX_ELEMENTS = 2**28
MAX_NAME = 300


def need_model(model: object) -> None:
    """Raise RecordError, naming the way out, unless ``model`` is an integer model."""
    if not isinstance(model, r.IntegerModel):
        raise RecordError(f"{type(model).__name__} is no integer model: make one with integer.lower(qnet) first")


def check(model: r.IntegerModel) -> r.IntegerModel:
    """Return ``model`` if it is consistent: shapes, dtypes, ranges, order of execution, multipliers, overflow proofs.

    Raises:
        RecordError: names the tensor or operation, and what is wrong with it.
    """
    need_model(model)
    _need(model.requantizer in r.REQUANTIZERS, f"requantizer {model.requantizer!r}: one of {r.REQUANTIZERS}")
    for name, spec in model.tensors.items():
        _check_spec(name, spec)
    _need(model.input in model.tensors, f"the input tensor {model.input!r} is not among the tensors")
    _need(model.tensors[model.input].dtype == "float32", f"the input {model.input!r} must be float32")
    first = bool(model.ops) and isinstance(model.ops[0], r.Quantize) and model.ops[0].inputs == (model.input,)
    _need(first, "its first operation must quantize its input")
    written, names = {model.input}, set()
    for op in model.ops:
        _check_name(op.name, "an operation")
        _need(op.name not in names, f"two operations are called {op.name!r}")
        names.add(op.name)
        for tensor in op.inputs:
            _need(tensor in written, f"{op.name!r} reads {tensor!r} before anything writes it")
        _need(op.output in model.tensors, f"{op.name!r} writes {op.output!r}, which is not among the tensors")
        _need(op.output not in written, f"{op.name!r} writes {op.output!r} a second time")
        _check_op(op, [model.tensors[t] for t in op.inputs], model.tensors[op.output])
        if isinstance(op, r.Add) and model.requantizer == "float32":
            prove_add(op, *(model.tensors[t] for t in op.inputs))
        integer_logits = isinstance(op, r.Layer) and op.requant and model.tensors[op.output].dtype == "int32"
        _need(not integer_logits or model.requantizer == "fixed", f"{op.name!r}: requantized int32 is for 'fixed'")
        written.add(op.output)
    _need(written == set(model.tensors), f"nothing writes {sorted(set(model.tensors) - written)[:3]}")
    _need(model.output in written - {model.input}, f"the output tensor {model.output!r} is never written")
    return model


def output_shape(op: r.Op, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that ``op`` makes of inputs of ``shapes``; None for a ``Reshape``, whose output says it."""
    x = shapes[0]
    match op:
        case r.Conv() | r.MaxPool() | r.AvgPool():
            sizes = (n + a + b for n, a, b in zip(x[1:], op.padding[:2], op.padding[2:], strict=True))
            channels = len(op.weight) if isinstance(op, r.Conv) else x[0]
            return (channels, *map(n_windows, sizes, op.kernel, op.stride, op.dilation))
        case r.Linear():
            return (*x[:-1], len(op.weight))
        case r.Concat():
            return (*x[: op.axis], sum(shape[op.axis] for shape in shapes), *x[op.axis + 1 :])
        case r.Reshape():
            return None
        case r.Transpose():
            return tuple(x[axis] for axis in op.axes)
        case r.Slice():
            return tuple(len(range(*ends)) for ends in zip(op.start, op.stop, op.step, strict=True))
        case r.Pad():
            return tuple(a + n + b for a, n, b in zip(op.before, x, op.after, strict=True))
        case _:
            return x


def _need(truth: bool | np.bool_, message: str) -> None:
    if not truth:
        raise RecordError(message)


def _check_name(name: str, what: str) -> None:
    ok = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
    _need(ok, f"bad name of {what}: {name!r:.80}")


def _check_spec(name: str, spec: r.TensorSpec) -> None:
    _check_name(name, "a tensor")
    _need(spec.name == name, f"tensor {name!r} calls itself {spec.name!r:.80}")
    _need(spec.dtype in RANGES, f"tensor {name!r}: dtype {spec.dtype!r}; one of {', '.join(RANGES)}")
    _need(0 < len(spec.shape) <= 8 and all(n >= 1 for n in spec.shape), f"tensor {name!r}: shape {spec.shape}")
    _need(math.prod(spec.shape) <= MAX_ELEMENTS, f"tensor {name!r}: {spec.shape} has over {MAX_ELEMENTS:,} elements")
    low, high = RANGES[spec.dtype]
    _need(low <= spec.qmin <= spec.qmax <= high, f"tensor {name!r}: [{spec.qmin}, {spec.qmax}] is not in {spec.dtype}")
    _need(low <= spec.zero_point <= high, f"tensor {name!r}: zero point {spec.zero_point} is not in {spec.dtype}")
    wide = spec.dtype in ("int32", "float32")
    _need(spec.bits == 32 if wide else 1 <= spec.bits <= 16, f"tensor {name!r}: {spec.bits} bits as {spec.dtype}")
    _need(wide or spec.qmax - spec.qmin < 2**spec.bits, f"tensor {name!r}: range wider than {spec.bits} bits")
    _need(spec.zero_point == 0 or not wide, f"tensor {name!r}: {spec.dtype} has zero point 0")
    shapes = [(), (_channels(spec.shape),)] if spec.dtype == "int32" else [()]
    _check_array(spec.scale, "float32", shapes, f"tensor {name!r}, scale")
    _need(np.all(np.isfinite(spec.scale)) and np.all(spec.scale > 0), f"tensor {name!r}: scale must be finite and > 0")


def _channels(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def _check_array(value: Any, dtypes: str, shapes: list[tuple[int, ...]], what: str) -> None:
    _need(isinstance(value, np.ndarray), f"{what}: no array but a {type(value).__name__}")
    _need(value.dtype.name in dtypes.split("|"), f"{what}: dtype {value.dtype}, not {dtypes}")
    _need(value.shape in shapes, f"{what}: shape {value.shape}, not {' or '.join(map(str, shapes))}")


def _check_requants(op: r.Op) -> None:
    requants, shape = r.requants_of(op), op.weight.shape[:1] if isinstance(op, r.Layer) else (1,)
    top, what = 32 - len(requants), repr(op.name)
    for requant in requants:
        for value, dtype in ((requant.multiplier, "float32"), (requant.fixed, "int32"), (requant.shift, "uint8")):
            _check_array(value, dtype, [shape], f"{what}, {dtype} multiplier or shift")
        m, shift = requant.multiplier.astype(np.float64), requant.shift.astype(np.int64)
        _need(np.all(np.isfinite(m)) and np.all(m >= 0), f"{what}: multipliers must be finite and >= 0")
        _need(np.all((shift >= 1) & (shift <= MAX_SHIFT)), f"{what}: shifts lie in 1..{MAX_SHIFT}")
        _need(np.all((requant.fixed >= 0) & (requant.fixed.astype(np.int64) <= 2**top - (top == 31))), f"{what}: fixed")
        step = np.ldexp(1.0, -shift)
        close = np.abs(requant.fixed * step - m) <= step + 1e-5 * m
        _need(np.all(close), f"{what}: the fixed multipliers are not those of the float32 form")
        _need(np.array_equal(requant.shift, requants[0].shift), f"{what}: its two terms have one shift")


_N_INPUTS = {r.Add: (2, 2), r.Mul: (2, 2), r.Concat: (1, 64), r.Conv: (1, 2), r.Linear: (1, 2)}
"""Operation -> least and most inputs, where these are not one"""


def _check_op(op: r.Op, inputs: list[r.TensorSpec], out: r.TensorSpec) -> None:
    _need(type(op) in r.OPS, f"{op.name!r}: unknown operation {type(op).__name__}")
    least, most = _N_INPUTS.get(type(op), (1, 1))
    _need(least <= len(inputs) <= most, f"{op.name!r}: {len(inputs)} inputs")
    for i, spec in enumerate(inputs):
        allowed = {"float32"} if isinstance(op, r.Quantize) else {"uint8", "uint16"}
        if isinstance(op, r.Reshape | r.Clip) or (i and isinstance(op, r.Layer)):
            allowed.add("int32")
        _need(spec.dtype in allowed, f"{op.name!r} cannot read {spec.name!r}, which is {spec.dtype}")
    if isinstance(op, r.Quantize | r.Table | r.Mul):
        _need(out.dtype in ("uint8", "uint16"), f"{op.name!r}: writes {out.dtype}")
    match op:
        case r.Conv() | r.Linear():
            _check_layer(op, inputs, out)
        case r.MaxPool() | r.AvgPool():
            _check_pool(op, inputs[0], out)
        case r.Add() | r.Mul():
            _check_two(op, *inputs)
        case r.Table():
            _check_array(op.values, out.dtype, [(inputs[0].qmax + 1,)], f"{op.name!r}, table")
            ends = int(op.values.min()), int(op.values.max())
            inside = out.qmin <= ends[0] and ends[1] <= out.qmax
            _need(inside, f"{op.name!r}: its table goes from {ends[0]} to {ends[1]}")
        case r.Concat() | r.Reshape() | r.Transpose() | r.Slice() | r.Pad() | r.Clip():
            for x in inputs:
                _check_kept(op, x, out)
            _check_move(op, [x.shape for x in inputs], out)
    _check_requants(op)
    shape = output_shape(op, [x.shape for x in inputs])
    if shape is None:
        shape = out.shape if math.prod(out.shape) == math.prod(inputs[0].shape) else inputs[0].shape
    _need(min(shape) >= 1, f"{op.name!r}: the window is larger than its padded input {inputs[0].shape}")
    _need(out.shape == shape, f"{op.name!r}: its output has shape {shape}, tensor {out.name!r} says {out.shape}")


def _check_kept(op: r.Op, x: r.TensorSpec, out: r.TensorSpec) -> None:
    same = np.array_equal(out.scale, x.scale) and out.zero_point == x.zero_point and out.dtype == x.dtype
    _need(same, f"{op.name!r} must keep dtype, scale and zero point of {x.name!r}")
    clips = isinstance(op, r.Clip)
    _need(clips or (out.qmin <= x.qmin and x.qmax <= out.qmax), f"{op.name!r} cannot narrow the range of {x.name!r}")


def _check_layer(op: r.Layer, inputs: list[r.TensorSpec], out: r.TensorSpec) -> None:
    x, axes = inputs[0].shape, 4 if isinstance(op, r.Conv) else 2
    _need(isinstance(op.weight, np.ndarray) and op.weight.ndim == axes, f"{op.name!r}: weight must have {axes} axes")
    n = op.weight.shape[0]
    if isinstance(op, r.Conv):
        _need(op.groups >= 1 and n % op.groups == 0, f"{op.name!r}: {n} channels in {op.groups} groups")
        fits = len(x) == 3 and x[0] == op.weight.shape[1] * op.groups
        _check_window(op)
    else:
        fits = len(x) <= 2 and x[-1:] == op.weight.shape[1:]
    _need(fits, f"{op.name!r}: input {x}, weight {op.weight.shape}")
    _check_array(op.weight, "int8|int16", [op.weight.shape], f"{op.name!r}, weight")
    _check_array(op.bias, "int32", [(n,)], f"{op.name!r}, bias")
    for scale in (op.weight_scale, op.acc_scale):
        _check_array(scale, "float32", [(n,)], f"{op.name!r}, scales")
        _need(np.all(np.isfinite(scale)) and np.all(scale > 0), f"{op.name!r}: scales must be finite and > 0")
    product = np.float32(inputs[0].scale) * op.weight_scale
    _need(np.array_equal(op.acc_scale, product), f"{op.name!r}: acc_scale is not input scale times weight scale")
    normal = product.min() >= np.finfo(np.float32).tiny
    _need(normal, f"{op.name!r}: its input's scale times its weights' is below float32's numbers; scale one of them up")
    _need(1 <= op.weight_bits <= 16, f"{op.name!r}: {op.weight_bits} weight bits")
    prove_accumulator(op, inputs[0])
    _need(len(inputs) == 1 + (op.residual is not None), f"{op.name!r}: residual and inputs disagree")
    if op.requant is None:
        _need(out.dtype == "int32" and op.residual is None, f"{op.name!r}: without requant it writes int32, alone")
        return
    if op.residual is not None:
        _need(op.residual.tensor == inputs[1].name, f"{op.name!r}: its residual is its second input")
        _need(inputs[1].shape == out.shape, f"{op.name!r}: residual {inputs[1].shape}, output {out.shape}")


def _check_window(op: r.Conv | r.MaxPool | r.AvgPool) -> None:
    _check_sizes(op, op.padding, 4, 0)
    for sizes in (op.kernel, op.stride, op.dilation):
        _check_sizes(op, sizes, 2, 1)


def _check_sizes(op: r.Op, values: tuple[int, ...], n: int, least: int) -> None:
    ok = len(values) == n and all(least <= v <= 2**16 for v in values)
    _need(ok, f"{op.name!r}: {values} must be {n} numbers from {least} to 65536")


def _check_pool(op: r.MaxPool | r.AvgPool, x: r.TensorSpec, out: r.TensorSpec) -> None:
    _need(len(x.shape) == 3, f"{op.name!r}: pools (C, H, W), not {x.shape}")
    _check_window(op)
    if isinstance(op, r.AvgPool):
        prove_accumulator(op, x)
        n = math.prod(op.kernel)
        ends = n * min(x.qmin, x.zero_point), n * max(x.qmax, x.zero_point)
        holds = op.requant is not None or (out.qmin <= ends[0] and ends[1] <= out.qmax)
        _need(holds, f"{op.name!r}: its sums go from {ends[0]} to {ends[1]}, {out.name!r} holds {out.qmin}..{out.qmax}")
        return
    _check_kept(op, x, out)
    reach = [d * (k - 1) + 1 for d, k in zip(op.dilation, op.kernel, strict=True)]
    pads = (max(op.padding[0], op.padding[2]), max(op.padding[1], op.padding[3]))
    _need(pads[0] < reach[0] and pads[1] < reach[1], f"{op.name!r}: padding {op.padding} leaves windows empty")


def _check_two(op: r.Add | r.Mul, a: r.TensorSpec, b: r.TensorSpec) -> None:
    if isinstance(op, r.Mul):
        fits = len(a.shape) == len(b.shape) and all(m in (1, n) for n, m in zip(a.shape, b.shape, strict=True))
        _need(fits, f"{op.name!r}: {b.shape} cannot be repeated to {a.shape}")
        prove_product(op, a, b)
        return
    _need(a.shape == b.shape, f"{op.name!r}: inputs {a.shape} and {b.shape}")
    _need(type(op.offset) is np.float32 and bool(np.isfinite(op.offset)), f"{op.name!r}: offset")


def _check_move(op: r.Op, shapes: list[tuple[int, ...]], out: r.TensorSpec) -> None:
    x, rank = shapes[0], len(shapes[0])
    match op:
        case r.Concat():
            _need(0 <= op.axis < rank and all(len(s) == rank for s in shapes), f"{op.name!r}: axis {op.axis}")
            rests = {s[: op.axis] + s[op.axis + 1 :] for s in shapes}
            _need(len(rests) == 1, f"{op.name!r}: shapes {shapes} do not join on axis {op.axis}")
        case r.Reshape():
            flat = out.dtype != "int32" or {math.prod(x)} == {_channels(x), *out.shape}
            _need(flat, f"{op.name!r}: int32 is reshaped from (C, 1, 1) to (C,) only")
        case r.Transpose():
            _need(sorted(op.axes) == list(range(rank)), f"{op.name!r}: axes {op.axes}")
        case r.Slice():
            _need(len(op.start) == len(op.stop) == len(op.step) == rank, f"{op.name!r}: one range per axis of {x}")
            ok = all(0 <= a < b <= n and s >= 1 for a, b, s, n in zip(op.start, op.stop, op.step, x, strict=True))
            _need(ok, f"{op.name!r}: {op.start}, {op.stop}, {op.step} is no slice of {x}")
        case r.Pad():
            _check_sizes(op, op.before, rank, 0)
            _check_sizes(op, op.after, rank, 0)
            _need(out.qmin <= out.zero_point <= out.qmax, f"{op.name!r}: its range must hold the zero point")
