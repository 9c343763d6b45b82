"""The container (.hqm) that the C runtime runs from: header, tensors, operations and arrays, little-endian.

    word 0  magic "HQM\\x1a"     1  version      2  bytes of the file    3  CRC-32 of everything from word 4 on
    4  fixed requantizer?        5  tensors      6  operations           7, 8  where both tables lie
    9  bytes of the arena       10  zero                                11, 12  metadata (JSON), its size
    13  the tensor of the logits                                        14, 15  zero

A tensor takes 20 words, an operation 32 (named in ``hqm_internal.h``), arrays lie at multiples of 64 bytes. Operation
i writes tensor i + 1; tensor 0 is the image. Weights lie in the order that windows are read in, and tensors will lie in
one arena. The same record gives the same bytes.
"""

import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.check import check
from hq_lib.integer.execute import pixel_table
from hq_lib.integer.record import IntegerModel, Op, TensorSpec

MAGIC, VERSION = b"HQM\x1a", 2
HEADER_WORDS, TENSOR_WORDS, OP_WORDS = 16, 20, 32
MAX_BYTES = 2**30
BLOCK = 16
"""output channels that are computed together (``hqm_internal.h``)"""
SLACK = 64
"""bytes behind every tensor that wide loads may read"""
ALIGNMENT = 64
MAX_SHIFT = 7
"""of stored weights, which ``hqm_open`` holds them to"""
_DTYPES = {"uint8": 0, "uint16": 1, "int32": 2, "float32": 3}
_KINDS = {kind: i for i, kind in enumerate(r.OPS)}


class ExportError(ValueError):
    """A record that no container can hold; the message says why."""


def to_bytes(model: IntegerModel) -> bytes:
    """Return the content of the container of ``model``.

    Raises:
        ExportError: the input is no (C, H, W) image, or file or arena would pass 1 GiB.
        RecordError: the record is inconsistent (see ``integer.check``).
    """
    check(model)
    if len(model.tensors[model.input].shape) != 3:
        raise ExportError(f"the C runtime takes (C, H, W) images, not {model.tensors[model.input].shape}")
    content = _Writer(model).content()
    if max(len(content), *struct.unpack_from("<2I", content, 36)) > MAX_BYTES:
        raise ExportError(f"file ({len(content):,} bytes) or arena is beyond the runtime's {MAX_BYTES:,} bytes")
    return content


class _Writer:
    """Collects arrays behind the two tables and remembers where each lies."""

    def __init__(self, model: IntegerModel) -> None:
        self.model = model
        self.names = [model.input, *(op.output for op in model.ops)]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.blocks, self.padded, self.arena = plan_arena(model)
        tables = 4 * (HEADER_WORDS + TENSOR_WORDS * len(self.names) + OP_WORDS * len(model.ops))
        self.data = bytearray(tables)

    def content(self) -> bytes:
        """Return header, tables and arrays with their checksum."""
        tensors = [self._tensor(self.model.tensors[name]) for name in self.names]
        ops = [self._op(op) for op in self.model.ops]
        meta = json.dumps(self.model.meta, sort_keys=True, ensure_ascii=True).encode()
        place = self._put(np.frombuffer(meta, np.uint8))
        self.data.extend(bytes(-len(self.data) % ALIGNMENT))
        at_ops = 4 * (HEADER_WORDS + TENSOR_WORDS * len(tensors))
        fixed = int(self.model.requantizer == "fixed")
        header = [len(tensors), len(ops), 4 * HEADER_WORDS, at_ops, self.arena, 0, place, len(meta)]
        header = [fixed, *header, self.index[self.model.output], 0, 0]
        words = np.array([*header, *chain(*tensors, *ops)], np.int64).astype("<u4").tobytes()
        self.data[16 : 16 + len(words)] = words
        body = bytes(self.data[16:])
        return MAGIC + struct.pack("<3I", VERSION, len(self.data), zlib.crc32(body)) + body

    def _put(self, array: np.ndarray) -> int:
        """Append ``array`` at the next multiple of 64 bytes and return its offset."""
        self.data.extend(bytes(-len(self.data) % ALIGNMENT))
        place = len(self.data)
        self.data.extend(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
        return place

    def _tensor(self, spec: TensorSpec) -> list[int]:
        shape = [len(spec.shape), *spec.shape, *[0] * (8 - len(spec.shape))]
        ends = [_DTYPES[spec.dtype], spec.bits, spec.qmin, spec.qmax, spec.zero_point]
        scales, name = np.atleast_1d(spec.scale), spec.name.encode()
        at = self.blocks[spec.name].offset if spec.name in self.blocks else 0
        where = [self._put(scales), at, self._put(np.frombuffer(name, np.uint8)), len(name)]
        return [*shape, *ends, scales.size, *where, 0]

    def _op(self, op: Op) -> list[int]:
        inputs = np.array([self.index[name] for name in op.inputs], np.uint32)
        words = [_KINDS[type(op)], len(inputs), self._put(inputs), *[0] * (OP_WORDS - 3)]
        for at, values in self._details(op).items():
            words[at : at + len(values)] = values
        return words

    def _details(self, op: Op) -> dict[int, list[int]]:
        """Return the words of ``op`` behind its inputs, by their place."""
        match op:
            case r.Conv() | r.Linear():
                return self._layer(op) | _window(op)
            case r.MaxPool() | r.AvgPool():
                return _window(op) | self._requant(op)
            case r.Add():
                return self._requant(op) | {16: [int(np.float32(op.offset).view(np.uint32))]}
            case r.Table():
                x = self.model.tensors[op.inputs[0]]
                values = np.zeros(2 ** (8 * np.dtype(x.dtype).itemsize), np.uint16)
                values[: op.values.size] = op.values
                return {16: [self._put(values)]}
            case r.Mul():
                return self._requant(op)
            case r.Concat():
                return {16: [op.axis]}
            case r.Transpose():
                return {16: [*op.axes]}
            case r.Slice():
                return {8: [*op.start], 16: [*op.step]}
            case r.Pad():
                return {16: [*op.before]}
            case r.Quantize() if "image" in self.model.meta and op is self.model.ops[0]:
                return {16: [self._put(pixel_table(self.model).astype(np.uint16))]}
            case _:
                return {}

    def _layer(self, op: r.Layer) -> dict[int, list[int]]:
        groups, (bits, shift) = op.groups if isinstance(op, r.Conv) else 1, weight_storage(op)
        weight, bias = self._put(packed_weight(op)), self._put(_centred_bias(op, self.model.tensors[op.inputs[0]]))
        where = [weight, bits, int(_is_depthwise(op)), bias]
        words = {4: where, 13: [*op.weight.shape[:2], groups], 26: [shift]}
        if op.name in self.padded:
            words[27] = [self.padded[op.name].offset]
        return words | self._requant(op)

    def _requant(self, op: Op) -> dict[int, list[int]]:
        """Multiplier, fixed, shift; of a second term, whose shift is the first's, the multipliers alone."""
        each = [(q.multiplier, q.fixed, q.shift) for q in r.requants_of(op)]
        return {8: [*map(self._put, [array for arrays in each for array in arrays][:5])]}


def _window(op: r.Conv | r.Linear | r.MaxPool | r.AvgPool) -> dict[int, list[int]]:
    if isinstance(op, r.Linear):
        return {16: [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]}
    return {16: [*op.kernel, *op.stride, *op.padding, *op.dilation]}


def _is_depthwise(op: r.Layer) -> bool:
    """Return whether output channel c reads input channel c alone."""
    return isinstance(op, r.Conv) and op.weight.shape[1] == 1 and op.groups == len(op.weight) and op.groups > 1


def weight_storage(op: r.Layer) -> tuple[int, int]:
    """Return (bits, s): ``op.weight`` is 2^s times integers of 4, 8 or 16 bits.

    With 5 and 9 bits it is 2^s (2 q + 1) of integers q of 4 and 8 bits: the grid of DoReFa, which has no zero. Such
    weights have no zeros to fill runs up with, so the runs of ``packed_weight`` must be multiples of 4.
    """
    low, high, step = int(op.weight.min()), int(op.weight.max()), min(op.weight_step.bit_length() - 1, MAX_SHIFT)
    has_odd = not _is_depthwise(op) and _run_length(op) % 4 == 0 and bool((op.weight >> step & 1).all())
    for bits, s in ((4, min(step, 4)), (4, step), (5, step), (8, 0), (8, step), (9, step)):
        odd, half = bits % 2, 2 ** (bits - bits % 2 - 1)
        if has_odd >= odd and -half <= low >> s + odd and high >> s + odd < half:
            return bits, s
    return 16, 0 if _is_depthwise(op) else step


def packed_weight(op: r.Layer) -> np.ndarray:
    """Return the weights of ``op`` as the C kernels read them, flat: uint8 nibbles, int8 or int16 (``weight_storage``).

    Dense: (groups, blocks, runs, run / 4, 16, 4), where a run is what lies side by side in an (H, W, C) image, a kernel
    row of a plain convolution, one kernel place of a grouped or dilated one; zeros fill channels up to 16 and runs up
    to 4. Four int16 of a channel lie as (0, 2), and behind all channels (1, 3). Depthwise: (blocks, k_h k_w, 16) with
    all blocks of one kernel place together. Nibbles hold w + 8, the first half of 64 (depthwise: 16) the low ones.
    """
    (bits, shift), depthwise = weight_storage(op), _is_depthwise(op)
    packed = _ordered(op, op.weight >> shift + bits % 2)
    if bits < 8:
        halves = (packed.reshape(-1, 2, BLOCK // 2 * (1 if depthwise else 4)) + 8).astype(np.uint8)
        return (halves[:, 0] | halves[:, 1] << 4).ravel()
    packed = packed.astype(np.int8 if bits < 16 else np.int16)
    if bits == 16 and not depthwise:
        return np.ascontiguousarray(packed.reshape(-1, BLOCK, 2, 2).transpose(0, 3, 1, 2)).ravel()
    return packed


def _run_length(op: r.Layer) -> int:
    """Return how many inputs of a window of a dense layer lie side by side."""
    if not isinstance(op, r.Conv) or op.groups > 1 or op.dilation[1] > 1:
        return op.weight.shape[1]
    return op.weight.shape[1] * op.weight.shape[3]


def _ordered(op: r.Layer, w: np.ndarray) -> np.ndarray:
    """Return ``w``, shaped as the weights of ``op``, in the order of ``packed_weight``, flat."""
    w = w if w.ndim == 4 else w[:, :, None, None]
    c_out, _, k_h, k_w = w.shape
    if _is_depthwise(op):
        return _filled(w.reshape(c_out, k_h * k_w).T, 1, BLOCK).ravel()
    groups = op.groups if isinstance(op, r.Conv) else 1
    runs = w.transpose(0, 2, 3, 1).reshape(c_out, -1, _run_length(op))
    runs = _filled(runs, 2, 4).reshape(groups, c_out // groups, runs.shape[1], -1, 4)
    runs = _filled(runs, 1, BLOCK)
    blocks = runs.reshape(groups, -1, BLOCK, *runs.shape[2:])
    return np.ascontiguousarray(blocks.transpose(0, 1, 3, 4, 2, 5)).ravel()


def _filled(x: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """Return ``x`` with zeros behind ``axis`` up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return np.pad(x, widths)


def _centred_bias(op: r.Layer, x: TensorSpec) -> np.ndarray:
    """Return int32 (C_out,): bias - z sum w, modulo 2^32, so that uncentred integers can be multiplied."""
    sums = op.weight.astype(np.int64).reshape(len(op.weight), -1).sum(1)
    return (op.bias.astype(np.int64) - x.zero_point * sums).astype(np.uint32).view(np.int32)


@dataclass
class Block:
    """Bytes of the arena, which tensors hold one after the other."""

    first: int
    """operation that writes into it first"""
    last: int = 0
    """operation that needs it last"""
    size: int = 0
    offset: int = 0


def plan_arena(model: IntegerModel) -> tuple[dict[str, Block], dict[str, Block], int]:
    """Return the block of each tensor, that of each layer's padded input (by the layer), and the size of the arena.

    An operation that works element by element writes into an input that it reads last, and a layer pads an input that
    it reads last where it lies. Blocks that are not needed together share bytes: each takes the lowest free gap, the
    largest first or in the order of their use, whichever takes less.
    """
    dies = {tensor: i for i, op in enumerate(model.ops) for tensor in op.inputs} | {model.output: len(model.ops)}
    tensors: dict[str, Block] = {}
    padded: dict[str, Block] = {}
    for i, op in enumerate(model.ops):
        x, out = model.tensors[op.inputs[0]], model.tensors[op.output]
        if isinstance(op, r.Conv) and any(op.padding):
            (channels, height, width), (top, left, bottom, right) = x.shape, op.padding
            size = _room((channels, height + top + bottom, width + left + right), x.dtype)
            free = dies[op.inputs[0]] == i and op.inputs[0] not in op.inputs[1:]
            padded[op.name] = block = tensors[op.inputs[0]] if free else Block(i, i)
            block.size = max(block.size, size)
        size = _room(out.shape, out.dtype)
        into = [t for t in _overwritten(op, model) if dies[t] == i and model.tensors[t].dtype == out.dtype]
        tensors[op.output] = block = tensors[into[0]] if into else Block(i)
        block.last, block.size = dies.get(op.output, i), max(block.size, size)
    blocks = list({id(block): block for block in (*tensors.values(), *padded.values())}.values())
    orders = (lambda block: -block.size, lambda block: block.first)
    return tensors, padded, _placed(blocks, min(orders, key=lambda order: _placed(blocks, order)))


def _placed(blocks: list[Block], order: Callable[[Block], int]) -> int:
    """Give each block the lowest free gap, one after the other in this order; returns the bytes of all."""
    placed: list[Block] = []
    for block in sorted(blocks, key=order):
        block.offset = 0
        for other in sorted(placed, key=lambda block: block.offset):
            together = other.first <= block.last and block.first <= other.last
            if together and other.offset - block.offset < block.size:
                block.offset = max(block.offset, other.offset + other.size)
        placed.append(block)
    return max(block.offset + block.size for block in blocks)


def _room(shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor in the arena, those behind it included."""
    return -(-(math.prod(shape) * np.dtype(dtype).itemsize + SLACK) // ALIGNMENT) * ALIGNMENT


def _overwritten(op: Op, model: IntegerModel) -> tuple[str, ...]:
    """Return the inputs whose elements the runtime reads no later than it writes the output's in their places."""
    match op:
        case r.Add():
            return op.inputs
        case r.Mul() | r.Table() | r.Clip():
            return op.inputs[:1]
        case r.Reshape() if all(map(_is_flat, (model.tensors[op.inputs[0]], model.tensors[op.output]))):
            return op.inputs
        case r.Layer() if op.inputs[0] not in op.inputs[1:] and len(op.bias) % BLOCK == 0:
            return op.inputs[1:]
        case _:
            return ()


def _is_flat(spec: TensorSpec) -> bool:
    """Whether its elements lie in row-major order: (H, W, C) is the order of every (C, H, W)."""
    return len(spec.shape) != 3 or spec.shape[0] in (1, math.prod(spec.shape))
