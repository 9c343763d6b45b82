"""How the C runtime lays a record out: weights in the order that windows are read in, tensors in one arena."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hq_lib.integer.record import Add, Clip, Conv, IntegerModel, Layer, Mul, Op, Reshape, Table, TensorSpec

BLOCK = 16
"""output channels that are computed together (``hqm_internal.h``)"""
SLACK = 64
"""bytes behind every tensor that wide loads may read"""
ALIGNMENT = 64
MAX_SHIFT = 7
"""of stored weights, which ``hqm_open`` holds them to"""


def is_depthwise(op: Layer) -> bool:
    """Return whether output channel c reads input channel c alone."""
    return isinstance(op, Conv) and op.weight.shape[1] == 1 and op.groups == len(op.weight) and op.groups > 1


def weight_storage(op: Layer) -> tuple[int, int]:
    """Return (bits of a stored weight: 4, 8 or 16; s): the stored integers times 2^s are ``op.weight``."""
    shift = min(op.weight_step.bit_length() - 1, MAX_SHIFT)
    low, high = int(op.weight.min()) >> shift, int(op.weight.max()) >> shift
    bits = next(bits for bits in (4, 8, 16) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
    return bits, shift


def packed_weight(op: Layer) -> np.ndarray:
    """Return the weights of ``op`` as the C kernels read them, flat: uint8 nibbles, int8 or int16 (``weight_storage``).

    Dense: (groups, blocks, runs, run / 4, 16, 4), where a run is what lies side by side in an (H, W, C) image, a kernel
    row of a plain convolution, one kernel place of a grouped or dilated one; zeros fill channels up to 16 and runs up
    to 4. Four int16 of a channel lie as (0, 2), and behind all channels (1, 3). Depthwise: (blocks, k_h k_w, 16) with
    all blocks of one kernel place together. Nibbles hold w + 8, the first half of 64 (depthwise: 16) the low ones.
    """
    (bits, shift), depthwise = weight_storage(op), is_depthwise(op)
    packed = _ordered(op, op.weight >> shift)
    if bits == 4:
        halves = (packed.reshape(-1, 2, BLOCK // 2 * (1 if depthwise else 4)) + 8).astype(np.uint8)
        return (halves[:, 0] | halves[:, 1] << 4).ravel()
    packed = packed.astype(np.int8 if bits == 8 else np.int16)
    if bits == 16 and not depthwise:
        return np.ascontiguousarray(packed.reshape(-1, BLOCK, 2, 2).transpose(0, 3, 1, 2)).ravel()
    return packed


def _ordered(op: Layer, w: np.ndarray) -> np.ndarray:
    """Return ``w``, shaped as the weights of ``op``, in the order of ``packed_weight``, flat."""
    w = w if w.ndim == 4 else w[:, :, None, None]
    c_out, _, k_h, k_w = w.shape
    if is_depthwise(op):
        return _filled(w.reshape(c_out, k_h * k_w).T, 1, BLOCK).ravel()
    groups, columns = (op.groups, op.dilation[1]) if isinstance(op, Conv) else (1, 1)
    joined = groups == 1 and columns == 1
    runs = w.transpose(0, 2, 3, 1).reshape(c_out, k_h if joined else k_h * k_w, -1)
    runs = _filled(runs, 2, 4).reshape(groups, c_out // groups, runs.shape[1], -1, 4)
    runs = _filled(runs, 1, BLOCK)
    blocks = runs.reshape(groups, -1, BLOCK, *runs.shape[2:])
    return np.ascontiguousarray(blocks.transpose(0, 1, 3, 4, 2, 5)).ravel()


def _filled(x: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """Return ``x`` with zeros behind ``axis`` up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return np.pad(x, widths)


def centred_bias(op: Layer, x: TensorSpec) -> np.ndarray:
    """Return int32 (C_out,): bias - z sum w, modulo 2^32, so that uncentred integers can be multiplied."""
    sums = op.weight.astype(np.int64).reshape(len(op.weight), -1).sum(1)
    return (op.bias.astype(np.int64) - x.zero_point * sums).astype(np.uint32).view(np.int32)


def n_bytes(spec: TensorSpec) -> int:
    """Return the bytes of one tensor in the arena."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


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
        if size := _padded_bytes(op, model.tensors[op.inputs[0]]):
            free = dies[op.inputs[0]] == i and op.inputs[0] not in op.inputs[1:]
            padded[op.name] = block = tensors[op.inputs[0]] if free else Block(i, i)
            block.size = max(block.size, size)
        size = _aligned(n_bytes(model.tensors[op.output]) + SLACK)
        into = [t for t in _overwritten(op, model) if dies[t] == i]
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


def _padded_bytes(op: Op, x: TensorSpec) -> int:
    if not isinstance(op, Conv) or not any(op.padding):
        return 0
    (channels, height, width), (top, left, bottom, right) = x.shape, op.padding
    size = channels * (height + top + bottom) * (width + left + right) * np.dtype(x.dtype).itemsize
    return _aligned(size + SLACK)


def _overwritten(op: Op, model: IntegerModel) -> list[str]:
    """Return the inputs whose elements the runtime reads no later than it writes the output's in their places."""
    out, names = model.tensors[op.output], ()
    if isinstance(op, Add):
        names = op.inputs
    elif isinstance(op, Mul | Table | Clip) or (isinstance(op, Reshape) and _is_flat(out)):
        names = op.inputs[:1]
    elif isinstance(op, Layer) and op.inputs[0] not in op.inputs[1:] and len(op.bias) % BLOCK == 0:
        names = op.inputs[1:]
    specs = [model.tensors[name] for name in names]
    flat = not isinstance(op, Reshape) or _is_flat(specs[0]) if specs else True
    return [spec.name for spec in specs if flat and spec.dtype == out.dtype]


def _is_flat(spec: TensorSpec) -> bool:
    """Whether its elements lie in row-major order: (H, W, C) is the order of every (C, H, W)."""
    return len(spec.shape) != 3 or spec.shape[0] in (1, math.prod(spec.shape))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
