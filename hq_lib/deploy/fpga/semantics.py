"""FPGAI's arithmetic in NumPy: the integers of seed 002's C and NumPy programs, bit for bit, without their overflow.

    acc = sum x (q - zp) + bias         x 0..255, zero padding       (ALGORITHMS 10.4)
    y   = (acc m) >> shift              arithmetic shift: floor, no rounding
    y   = min(max(y, 0), 255)           ReLU1, where the stage has it
    average pool: sum / n truncated toward zero

All integers are int64. The sums of products alone are float64 matrix products, which are exact here: every partial sum
stays below 2^53. The C program keeps ``acc m`` in int32; ``int32_overflows`` names the layers for which that is unsafe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hq_lib.deploy.fpga.layers import FpgaiError, FpgaiLayer, FpgaiNet, Stage, need

ACTIVATION_MAX = 255
_EXACT = 2**53
_INT32_MAX = 2**31 - 1


def run(net: FpgaiNet, images: Any, *, batch_size: int = 50) -> np.ndarray:
    """Return the integer logits of ``images``, int64 (N, C_out), equal to the C program's.

    Args:
        net:        chain of layers; the first reads ``images``.
        images:     uint8 (N, C, H, W) raw pixels (an array or a CPU tensor), or (N, C) for a chain of linear layers.
        batch_size: images at once, >= 1; changes memory and speed only.

    Raises:
        FpgaiError: images of another dtype or shape, or a layer that cannot read its input; names it.
    """
    images = np.asarray(images)
    need(images.dtype == np.uint8, f"FPGAI reads raw pixels, uint8; these images are {images.dtype}")
    need(images.ndim in (2, 4) and len(images) > 0, f"images (N, C, H, W) are needed, not {images.shape}")
    need(batch_size >= 1, f"batch_size {batch_size}: at least 1")
    return np.concatenate([_run_batch(net, images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


def relu1(y: np.ndarray) -> np.ndarray:
    """Return min(max(y, 0), 255): clip(x, 0, 1) on integers of scale 1/255."""
    return np.clip(y, 0, ACTIVATION_MAX)


def average_pool(x: np.ndarray, size: int) -> np.ndarray:
    """Return (B, C, H // size, W // size) window means of int64 (B, C, H, W), truncated toward zero as C divides."""
    windows = _windows(x, size)
    total = sum(windows[:, :, :, i, :, j] for i in range(size) for j in range(size))
    return np.where(total < 0, -(-total // size**2), total // size**2)


def max_pool(x: np.ndarray, size: int) -> np.ndarray:
    """Return (B, C, H // size, W // size) window maxima of (B, C, H, W)."""
    return _windows(x, size).max((3, 5))


def requantize(acc: np.ndarray, multiplier: int, shift: int) -> np.ndarray:
    """Return (acc m) >> shift of int64 ``acc``: floor((acc m) / 2^shift)."""
    return (acc * np.int64(multiplier)) >> np.int64(shift)


def accumulate(x: np.ndarray, layer: FpgaiLayer, *, stride: int = 1, padding: int = 0) -> np.ndarray:
    """Return acc = sum x (q - zp) + bias of a layer.

    Args:
        x:       int64 (B, C, H, W) for a convolution; a linear layer reads any (B, ...) flattened in C order.
        layer:   its integers.
        stride:  of a convolution.
        padding: zeros on each side, of a convolution.

    Returns:
        int64 (B, C_out, H', W') or (B, C_out).

    Raises:
        FpgaiError: an input that does not fit the layer; names both.
    """
    weight = layer.weight.astype(np.float64) - layer.zero_point
    _check_exact(x, weight, layer)
    if weight.ndim == 2:
        flat = x.reshape(len(x), -1)
        n = weight.shape[1]
        need(flat.shape[1] == n, f"{layer.name!r} reads {n} values, its input is {x.shape[1:]}")
        return (flat.astype(np.float64) @ weight.T).astype(np.int64) + layer.bias.astype(np.int64)
    columns = _columns(x, layer, stride, padding)  # (B, H', W', C k_h k_w)
    sums = (columns @ weight.reshape(len(weight), -1).T).astype(np.int64) + layer.bias.astype(np.int64)
    return np.ascontiguousarray(sums.transpose(0, 3, 1, 2))


def int32_overflows(net: FpgaiNet) -> list[str]:
    """Return the names of the layers whose (acc) m can exceed int32 for some input 0..255: unsafe in the C program.

    The bound is max over channels of (255 sum |q - zp| + |bias|) m; it assumes that each layer's input is 0..255.
    """
    found = []
    for layer in net.layers:
        centred = layer.weight.reshape(len(layer.weight), -1).astype(np.int64) - layer.zero_point
        worst = ACTIVATION_MAX * np.abs(centred).sum(1) + np.abs(layer.bias.astype(np.int64))
        if int(worst.max()) * layer.multiplier > _INT32_MAX:
            found.append(layer.name)
    return found


def _run_batch(net: FpgaiNet, images: np.ndarray) -> np.ndarray:
    x = images.astype(np.int64)
    for stage, layer in zip(net.stages, net.layers, strict=True):
        x = _run_stage(x, stage, layer)
    return x.reshape(len(x), -1)


def _run_stage(x: np.ndarray, stage: Stage, layer: FpgaiLayer) -> np.ndarray:
    y = requantize(accumulate(x, layer, stride=stage.stride, padding=stage.padding), layer.multiplier, layer.shift)
    y = relu1(y) if stage.relu1 else y
    if stage.pool is None:
        return y
    fits = y.ndim == 4 and min(y.shape[2:]) >= stage.pool_size
    need(fits, f"stage {stage.name!r}: a pool of {stage.pool_size} does not fit {y.shape[1:]}")
    return average_pool(y, stage.pool_size) if stage.pool == "average" else max_pool(y, stage.pool_size)


def _windows(x: np.ndarray, size: int) -> np.ndarray:
    """Return a (B, C, H', size, W', size) view; what does not fill a window is dropped."""
    b, c, h, w = x.shape
    rows, columns = h // size, w // size
    return x[:, :, : rows * size, : columns * size].reshape(b, c, rows, size, columns, size)


def _check_exact(x: np.ndarray, weight: np.ndarray, layer: FpgaiLayer) -> None:
    largest = max(abs(int(x.max(initial=0))), abs(int(x.min(initial=0))))
    if largest * float(np.abs(weight).reshape(len(weight), -1).sum(1).max()) >= _EXACT:
        raise FpgaiError(f"{layer.name!r}: inputs up to {largest} make sums beyond 2^53; is a ReLU1 missing before it?")


def _columns(x: np.ndarray, layer: FpgaiLayer, stride: int, padding: int) -> np.ndarray:
    """Return float64 (B, H', W', C k_h k_w), the window of every output place."""
    channels, kernel = layer.weight.shape[1], layer.weight.shape[2:]
    fits = x.ndim == 4 and x.shape[1] == channels
    fits = fits and all(n + 2 * padding >= k for n, k in zip(x.shape[2:], kernel, strict=True))
    need(fits, f"{layer.name!r} with weight {layer.weight.shape} and padding {padding} cannot read {x.shape[1:]}")
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    view = sliding_window_view(padded, kernel, (2, 3))[:, :, ::stride, ::stride].transpose(0, 2, 3, 1, 4, 5)
    return view.reshape(*view.shape[:3], -1)
