"""Records of a single convolution with the sums that it should give, for what is tested of the C kernels."""

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import requants

ONE, WHOLE = np.asarray(1.0, np.float32), (32, -(2**31), 2**31 - 1)


def sums(x: np.ndarray, weight: np.ndarray, zero: int, stride, padding, dilation, groups: int) -> np.ndarray:
    """(C_out, H', W') int64 sums of the centred integers ``x`` (C, H, W)."""
    top, left, bottom, right = padding
    centred = np.pad(x.astype(np.int64) - zero, ((0, 0), (top, bottom), (left, right)))
    spans = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(centred, spans, (1, 2))
    windows = windows[:, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    parts = np.split(np.arange(len(weight)), groups)
    each = weight.shape[1]
    return np.concatenate([
        np.einsum("chwij,ocij->ohw", windows[g * each : (g + 1) * each], weight[part].astype(np.int64))
        for g, part in enumerate(parts)
    ])  # fmt: skip


def drawn(rng: np.random.Generator, groups: int, c_in: int, c_out: int, kernel, stride, dilation, size, *,
          largest: float = 0.9, most: int = 0, odd: bool = False, requantizer: r.Requantizer = "float32"):  # fmt: skip
    """A record of one random convolution with uint8 outputs of a random range, its image, and what it should give.

    Weights fit 4, 8 or 16 bits, sometimes in steps of 4 or 16.

    Args:
        largest: the greatest multiplier.
        most: the largest weight before steps; 0: one that fits 4, 8 or 16 bits.
        odd: all weights w become 2 w + 1.
    """
    most = most or int(rng.choice([7, 127, 300]))
    weight = rng.integers(-most, most + 1, (c_out, c_in // groups, *kernel))
    weight = (2 * weight + 1 if odd else weight) * int(rng.choice([1, 4, 16]))
    zero, padding = int(rng.integers(256)), tuple(int(v) for v in rng.integers(0, 4, 4))
    sizes = [max(n, d * (k - 1) + 1) for n, k, d in zip(size, kernel, dilation, strict=True)]
    x = rng.choice([0, 255, zero, int(rng.integers(256))], (c_in, *sizes))
    bias = rng.integers(-3000, 3000, c_out)
    acc = sums(x, weight, zero, stride, padding, dilation, groups) + bias[:, None, None]
    m = (rng.uniform(0.05, 3, c_out) * 100 / max(1, np.abs(acc).max())).clip(max=largest)
    m[0] = largest if largest >= 1 else m[0]
    low, high = sorted(int(v) for v in rng.choice([0, 3, 15, 200, 255], 2, replace=False))
    z = int(rng.integers(low, high + 1))
    scaled = acc.astype(np.float32) * m.astype(np.float32)[:, None, None]
    want = np.clip(np.rint(scaled.astype(np.float64)) + z, low, high) - z
    ones = np.ones(c_out, np.float32)
    specs = [
        r.TensorSpec("image", x.shape, "float32", 32, 0, 0, ONE, 0),
        r.TensorSpec("q", x.shape, "uint8", 8, 0, 255, ONE, zero),
        r.TensorSpec("y", acc.shape, "uint8", 8, low, high, ONE, z),
    ]
    common = (
        weight.astype(np.int16),
        ones,
        bias.astype(np.int32),
        ones,
        8,
        requants((m.astype(np.float32), m))[0],
        None,
    )
    conv = r.Conv("conv", ("q",), "y", *common, stride, padding, dilation, groups)
    ops = (r.Quantize("quantize", ("image",), "q"), conv)
    model = r.IntegerModel(requantizer, {spec.name: spec for spec in specs}, ops, "image", "y")
    return model, (x - zero).astype(np.float32)[None], want.astype(np.float32)


def convolution(
    x: np.ndarray,
    weight: np.ndarray,
    zero: int,
    padding: tuple[int, ...],
    bias: np.ndarray,
    stride: int = 1,
    a_bits: int = 8,
):
    """A record of one convolution of the integers ``x`` (C, H, W) that returns its sums, and its image."""
    shape, ones = sums(x, weight, zero, (stride, stride), padding, (1, 1), 1).shape, np.ones(len(weight), np.float32)
    specs = [
        r.TensorSpec("image", x.shape, "float32", 32, 0, 0, ONE, 0),
        r.TensorSpec("q", x.shape, "uint8", a_bits, 0, 2**a_bits - 1, ONE, zero),
        r.TensorSpec("y", shape, "int32", *WHOLE, ONE, 0),
    ]
    conv = r.Conv("conv", ("q",), "y", weight, ones, bias, ones, 8, None, None, (stride, stride), padding, (1, 1), 1)
    ops = (r.Quantize("quantize", ("image",), "q"), conv)
    model = r.IntegerModel("float32", {spec.name: spec for spec in specs}, ops, "image", "y")
    return model, (x - zero).astype(np.float32)[None]
