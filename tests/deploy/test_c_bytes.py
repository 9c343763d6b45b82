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
from single_layers import drawn

from hq_lib.deploy.c import Runtime, compiler, to_bytes
from hq_lib.deploy.c.container import weight_storage
from hq_lib.deploy.c.runtime import KERNELS, CompilerError
from hq_lib.integer import record as r
from hq_lib.integer import run

try:
    compiler()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)


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
                                   odd=rng.random() < 0.4, requantizer=requantizer)  # fmt: skip
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
        model, image, want = drawn(rng, groups, c_in, c_out, kernel, stride, (1, 1), size,
                                   odd=rng.random() < 0.4, requantizer=requantizer)  # fmt: skip
        check(model, image, want if requantizer == "float32" else None)


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("most", "bits"), [(7, 5), (127, 9)])
def test_weights_without_a_zero_leave_as_bytes(most, bits, groups, requantizer):
    rng = np.random.default_rng(most)
    for size in ((1, 1), (1, 2), (1, 3), (2, 2), (3, 3), (4, 4), (5, 27)):
        c_in, c_out = groups * int(rng.choice([4, 16, 20, 64])), groups * int(rng.choice([7, 16, 65, 130]))
        model, image, want = drawn(rng, groups, c_in, c_out, two(rng, 1, 3), two(rng, 1, 2), (1, 1), size,
                                   most=most, odd=True, requantizer=requantizer)  # fmt: skip
        assert weight_storage(model.ops[1])[0] == bits
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
