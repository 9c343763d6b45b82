"""How the C runtime lays a record out: weights in the order that windows are read in, tensors in one arena."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hq_lib.integer.record import Conv, IntegerModel, Layer, TensorSpec

BLOCK = 16
"""output channels that are computed together (``hqm_internal.h``)"""
SLACK = 64
"""bytes behind every tensor that wide loads may read"""
ALIGNMENT = 64


def is_depthwise(op: Layer) -> bool:
    """Return whether output channel c reads input channel c alone."""
    return isinstance(op, Conv) and op.weight.shape[1] == 1 and op.groups == len(op.weight) and op.groups > 1


def weight_storage(op: Layer) -> tuple[int, int]:
    """Return (bits of a stored weight: 4, 8 or 16; s): the stored integers times 2^s are ``op.weight``."""
    narrow = op.weight // op.weight_step
    if op.weight.dtype == np.int8 and narrow.min() >= -8 and narrow.max() < 8:
        return 4, op.weight_step.bit_length() - 1
    return 8 * op.weight.itemsize, 0


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


def scratch_size(model: IntegerModel) -> int:
    """Return the bytes of the largest padded input of a layer, 0 where none pads."""
    return max((_padded_bytes(op, model.tensors[op.inputs[0]]) for op in model.layers()), default=0)


def _padded_bytes(op: Layer, x: TensorSpec) -> int:
    if not isinstance(op, Conv) or not any(op.padding):
        return 0
    (channels, height, width), (top, left, bottom, right) = x.shape, op.padding
    size = channels * (height + top + bottom) * (width + left + right) * np.dtype(x.dtype).itemsize
    return _aligned(size + SLACK)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_arena(model: IntegerModel) -> tuple[dict[str, int], int]:
    """Return the offset of each tensor, and the size of the arena: tensors share bytes when not needed together.

    Each tensor takes the lowest free gap, the largest tensors first. The scratch of padded inputs comes before them.
    """
    born = {op.output: i for i, op in enumerate(model.ops)}
    dies = born | {tensor: i for i, op in enumerate(model.ops) for tensor in op.inputs if tensor != model.input}
    dies[model.output] = len(model.ops)
    start = scratch_size(model)
    placed: dict[str, tuple[int, int]] = {}
    for name in sorted(born, key=lambda t: (-n_bytes(model.tensors[t]), born[t])):
        size = _aligned(n_bytes(model.tensors[name]) + SLACK)
        busy = [placed[t] for t in placed if born[t] <= dies[name] and born[name] <= dies[t]]
        offset = _lowest_gap(sorted(busy), size, start)
        placed[name] = (offset, offset + size)
    return {name: ends[0] for name, ends in placed.items()}, max(end for _, end in placed.values())


def _lowest_gap(busy: Sequence[tuple[int, int]], size: int, start: int) -> int:
    for first, end in busy:
        if first - start >= size:
            break
        start = max(start, end)
    return start
