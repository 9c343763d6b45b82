"""Layers whose integers leave a fast kernel as bytes, beside int64 sums and one float32 multiplication.

Depthwise windows join a column's rows and read the input without its padding; with VNNI dense ones keep a tile in
registers. Sizes are drawn so that every remainder occurs: of channels in a vector, of places in a tile, of rows and
columns that lie outside.
"""

import struct
import subprocess

import numpy as np
import pytest
from integer_nets import fuzzer

from hq_lib.deploy.c import Runtime, compiler, to_bytes
from hq_lib.deploy.c.runtime import KERNELS, CompilerError
from hq_lib.integer import record as r
from hq_lib.integer import run
from hq_lib.integer.arithmetic import requants

try:
    compiler()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)

ONE = np.asarray(1.0, np.float32)


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
          largest: float = 0.9, requantizer: str = "float32"):  # fmt: skip
    """A record of one random convolution with uint8 outputs of a random range, its image, and what it should give.

    Weights fit 4, 8 or 16 bits, sometimes in steps of 4 or 16, sometimes all odd. ``largest``: the greatest multiplier.
    """
    most = int(rng.choice([7, 127, 300]))
    weight = rng.integers(-most, most + 1, (c_out, c_in // groups, *kernel))
    weight = (weight if rng.random() < 0.6 else 2 * weight + 1) * int(rng.choice([1, 4, 16]))
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


def check(model: r.IntegerModel, image: np.ndarray, want: np.ndarray | None, *, n_threads: int = 1) -> None:
    """NumPy's executor and every kernel of this processor give ``want`` (None: NumPy's)."""
    numpy = run(model, image)[0]
    assert want is None or np.array_equal(numpy, want)
    for kernel in KERNELS[1:]:
        try:
            runtime = Runtime(model, kernel=kernel, n_threads=n_threads)
        except ValueError:  # of another processor
            continue
        assert np.array_equal(runtime.run(image)[0], numpy), kernel


def two(rng: np.random.Generator, *choices: int) -> tuple[int, int]:
    """Two of ``choices``, each by itself."""
    return int(rng.choice(choices)), int(rng.choice(choices))


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize("seed", range(12))
def test_depthwise_windows_of_any_size(seed, requantizer):
    rng = np.random.default_rng(seed)
    for channels in (1, 8, 16, 17, 32, 33, 48, 64, 70, 130):
        kernel = (3, 3) if rng.random() < 0.5 else two(rng, 1, 2, 3, 4, 5, 7)
        stride, dilation = two(rng, 1, 1, 2, 3), (1, 1) if rng.random() < 0.6 else two(rng, 1, 2, 3)
        size = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
        model, image, want = drawn(rng, channels, channels, channels, kernel, stride, dilation, size,
                                   requantizer=requantizer)  # fmt: skip
        check(model, image, want if requantizer == "float32" else None, n_threads=1 + seed % 2)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 9)])
@pytest.mark.parametrize("width", [33, 64, 65, 67, 130, 300])
def test_depthwise_rows_longer_than_a_strip(width, kernel):
    rng = np.random.default_rng(width)
    for channels in (20, 100):
        check(*drawn(rng, channels, channels, channels, kernel, two(rng, 1, 2), (1, 1), (4, width)))


def test_depthwise_windows_too_large_for_a_strip_go_place_by_place():
    rng = np.random.default_rng(0)
    for kernel, dilation in (((3, 9), (1, 40)), ((12, 12), (1, 1)), ((2, 2), (5, 70))):
        check(*drawn(rng, 40, 40, 40, kernel, (1, 1), dilation, (6, 20)))


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_dense_tiles_of_any_number_of_places_and_blocks(seed, groups, requantizer):
    rng = np.random.default_rng(seed)
    for size in ((1, 1), (1, 2), (1, 3), (2, 2), (1, 7), (3, 3), (3, 4), (4, 4), (5, 27)):
        kernel, stride = two(rng, 1, 1, 3), two(rng, 1, 1, 2)
        c_in, c_out = groups * int(rng.integers(1, 40)), groups * int(rng.choice([1, 7, 8, 16, 20, 63, 64, 65, 130]))
        model, image, want = drawn(rng, groups, c_in, c_out, kernel, stride, (1, 1), size, requantizer=requantizer)
        check(model, image, want if requantizer == "float32" else None)


@pytest.mark.parametrize("largest", [np.nextafter(np.float32(1), np.float32(0)), 1.0, 40.0, 1e6])
@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
def test_multipliers_of_one_and_more(requantizer, groups, largest):
    rng = np.random.default_rng(int(largest))
    for _ in range(6):
        model, image, want = drawn(rng, groups, 24, 24, (3, 3), (1, 1), (1, 1), (4, 5), largest=float(largest),
                                   requantizer=requantizer)  # fmt: skip
        check(model, image, want if requantizer == "float32" else None)


@pytest.mark.parametrize("channels", [1, 40, 64, 70])
def test_depthwise_windows_at_the_edge_stay_in_the_arena(channels, tmp_path):
    rng = np.random.default_rng(channels)
    for size in ((5, 40), (40, 5), (7, 7)):
        model, _, _ = drawn(rng, channels, channels, channels, (3, 3), (1, 1), (1, 1), size)
        content = to_bytes(model)
        (tmp_path / "one").write_bytes(struct.pack("<I", len(content)) + content)
        done = subprocess.run([fuzzer(), tmp_path / "one", "auto"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "1 0\n"), done.stderr
