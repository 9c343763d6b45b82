"""The container (.hqm) that the C runtime runs from: header, tensors, operations and arrays, little-endian.

    word 0  magic "HQM\\x1a"     1  version      2  bytes of the file    3  CRC-32 of everything from word 4 on
    4  fixed requantizer?        5  tensors      6  operations           7, 8  where both tables lie
    9  bytes of the arena       10  zero                                11, 12  metadata (JSON), its size
    13  the tensor of the logits                                        14, 15  zero

A tensor takes 20 words, an operation 32 (named in ``hqm_internal.h``), arrays lie at multiples of 64 bytes. Operation
i writes tensor i + 1; tensor 0 is the image. The same record gives the same bytes.
"""

import json
import struct
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from hq_lib.deploy.c.layout import ALIGNMENT, centred_bias, is_depthwise, packed_weight, plan_arena, weight_storage
from hq_lib.integer import record as r
from hq_lib.integer.check import check
from hq_lib.integer.execute import pixel_table
from hq_lib.integer.record import IntegerModel, Op, TensorSpec

MAGIC, VERSION = b"HQM\x1a", 2
HEADER_WORDS, TENSOR_WORDS, OP_WORDS = 16, 20, 32
MAX_BYTES = 2**30
_DTYPES = {"uint8": 0, "uint16": 1, "int32": 2, "float32": 3}
_KINDS = {kind: i for i, kind in enumerate(r.OPS)}


class ExportError(ValueError):
    """A record that no container can hold; the message says why."""


def meta_of(file: Path | str) -> dict[str, Any]:
    """The metadata of the record that a container was made from: policy, commit, the images' mean and deviation."""
    raw = Path(file).read_bytes()
    if raw[:4] != MAGIC:
        raise ExportError(f"{file} is no container: its first bytes are {raw[:4]!r}")
    try:
        place, size = struct.unpack_from("<2I", raw, 4 * 11)
        return dict(json.loads(raw[place : place + size]))
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{file}: its metadata cannot be read ({error}): export it again") from error


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
        words = np.array([*header, *chain(*tensors, *ops)], np.uint32).astype("<u4").tobytes()
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
        shape = [*spec.shape, *[0] * (8 - len(spec.shape))]
        ends = [_DTYPES[spec.dtype], spec.bits, _word(spec.qmin), _word(spec.qmax), spec.zero_point]
        scales, name = np.atleast_1d(spec.scale), spec.name.encode()
        at = self.blocks[spec.name].offset if spec.name in self.blocks else 0
        where = [self._put(scales), at, self._put(np.frombuffer(name, np.uint8)), len(name)]
        return _filled([len(spec.shape), *shape, *ends, scales.size, *where], TENSOR_WORDS)

    def _op(self, op: Op) -> list[int]:
        inputs = np.array([self.index[name] for name in op.inputs], np.uint32)
        words = _filled([_KINDS[type(op)], len(inputs), self._put(inputs)], OP_WORDS)
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
        x = self.model.tensors[op.inputs[0]]
        groups = op.groups if isinstance(op, r.Conv) else 1
        bits, shift = weight_storage(op)
        weight, bias = self._put(packed_weight(op)), self._put(centred_bias(op, x))
        where = [weight, bits, int(is_depthwise(op)), bias]
        words = {4: where, 13: [op.weight.shape[0], op.weight.shape[1], groups], 26: [shift]}
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


def _word(value: int) -> int:
    return value & 0xFFFFFFFF


def _filled(words: list[int], n: int) -> list[int]:
    return [*words, *[0] * (n - len(words))]
