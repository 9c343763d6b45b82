"""Sums of the fast kernels beside int64's, whatever weights, inputs and sizes.

3x3 windows go in tiles of 2x2 outputs (Lavin & Gray 2015), others of 8-bit weights in 16-bit sums as far as the inputs
let them: the data decides on the way, so it is made to come close to every bound.
"""

import struct
import subprocess

import numpy as np
import pytest
from integer_nets import fuzzer
from single_layers import convolution, sums

from hq_lib.deploy.c import Runtime, compiler, to_bytes
from hq_lib.deploy.c.container import weight_storage
from hq_lib.deploy.c.runtime import CompilerError
from hq_lib.integer import run

try:
    compiler()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)


def differing(
    x: np.ndarray,
    weight: np.ndarray,
    zero: int,
    padding: tuple[int, ...],
    *,
    stride: int = 1,
    a_bits: int = 8,
    n_threads: int = 1,
    kernel: str = "auto",
) -> int:
    """Sums of the C runtime, and of NumPy's executor, that are not int64's."""
    bias = np.arange(len(weight)).astype(np.int32) - 7
    model, image = convolution(x, weight, zero, padding, bias, stride, a_bits)
    found_sums = sums(x, weight, zero, (stride, stride), padding, (1, 1), 1)
    want = (found_sums + bias[:, None, None]).astype(np.float32)
    found = (Runtime(model, n_threads=n_threads, kernel=kernel).run(image)[0], run(model, image)[0])
    return sum(int((one != want).sum()) for one in found)


def integers(rng: np.random.Generator, most: int, shape: tuple[int, ...]) -> np.ndarray:
    """Whole numbers of all sizes up to ``most``, half of them at the ends: -most - 1, -most, most."""
    ends = rng.choice([-most - 1, -most, most], shape)
    return np.where(rng.random(shape) < 0.5, ends, rng.integers(-most - 1, most + 1, shape))


@pytest.mark.parametrize("zero", [0, 1, 128, 255])
def test_awkward_sizes_channels_and_paddings(zero):
    rng = np.random.default_rng(zero)
    for _ in range(12):
        c_in, c_out = int(rng.choice([4, 8, 12, 16, 20, 36, 64, 68])), int(rng.integers(1, 50))
        padding = tuple(int(v) for v in rng.integers(0, 3, 4))
        x = rng.choice([0, 255, int(rng.integers(256))], (c_in, *(int(v) for v in rng.integers(5, 24, 2))))
        weight = integers(rng, 127, (c_out, c_in, 3, 3)).astype(np.int8)
        assert differing(x, weight, zero, padding) == 0


@pytest.mark.parametrize("channels", [32, 36, 64, 68, 200, 512])
@pytest.mark.parametrize("step", [1, 16])
def test_four_bits_in_tiles_of_bytes(channels, step):
    """With VNNI 4-bit inputs and weights go in tiles of bytes: random ones, and those at all ends."""
    rng = np.random.default_rng(channels)
    checks = np.indices((3, 3)).sum(0) % 2 * 15 - 8  # -8 and 7 by turns: the largest products
    for k, zero in enumerate((0, 7, 15)):
        c_out, padding = int(rng.integers(1, 40)), tuple(int(v) for v in rng.integers(0, 3, 4))
        weight = rng.integers(-8, 8, (c_out, channels, 3, 3))
        weight[0], weight[-1] = (-8, 7, checks)[k], (checks, -8, 7)[k]
        x = rng.integers(0, 16, (channels, *(int(v) for v in rng.integers(8, 15, 2))))
        x[:, :4, :4] = 15
        x[:, 4:, 4:] *= rng.choice([0, 1])
        assert differing(x, (step * weight).astype(np.int8), zero, padding, a_bits=4, n_threads=1 + k % 2) == 0


@pytest.mark.parametrize("kernel", ["avx2", "avx512vnni"])
@pytest.mark.parametrize("channels", [148, 176, 192, 212, 260, 320, 352, 384, 448])
def test_tiles_of_any_width_stay_in_their_memory(channels, kernel):
    """As many tiles as fit are no multiple of those that are multiplied together."""
    rng = np.random.default_rng(channels)
    x, weight = rng.integers(0, 16, (channels, 13, 14)), rng.integers(-8, 8, (3, channels, 3, 3))
    try:
        assert differing(x, (16 * weight).astype(np.int8), 3, (1, 1, 1, 1), a_bits=4, kernel=kernel) == 0
        weight = rng.integers(-128, 128, (3, channels, 3, 3)).astype(np.int8)
        assert differing(rng.integers(0, 256, x.shape), weight, 3, (1, 1, 1, 1), n_threads=2, kernel=kernel) == 0
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("zero", [15, 16, 18, 200, 255])
def test_padding_may_hold_more_than_the_input_does(zero):
    rng = np.random.default_rng(zero)
    x, weight = rng.integers(0, 16, (32, 8, 8)), rng.integers(-8, 8, (20, 32, 3, 3))
    for kernel in ("auto", "avx2", "scalar"):
        try:
            assert differing(x, (16 * weight).astype(np.int8), zero, (1, 1, 1, 1), a_bits=4, kernel=kernel) == 0
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("zero", [0, 255])
def test_the_largest_sums_that_int8_can_give(zero, sign):
    x = np.full((512, 6, 7), 255 - zero)
    corner = np.broadcast_to(np.asarray([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]), (3, 512, 3, 3))  # the largest product
    for weight in (np.full((3, 512, 3, 3), 127), np.full((3, 512, 3, 3), 128), 127 * corner):
        one = np.clip(sign * weight, -128, 127).astype(np.int8)
        assert differing(x, one, zero, (1, 1, 1, 1)) == 0


@pytest.mark.parametrize("channels", [8, 64, 512, 516])
def test_16_bit_weights_up_to_the_bound_and_beyond_it(channels):
    rng, bound = np.random.default_rng(channels), min((2**31 - 1) // 36 // 255 // channels, (2**15 - 1) // 9)
    x = rng.choice([0, 255], (channels, 5, 8))
    for most in (bound, bound + 1, 9000):
        weight = rng.choice([-most, most], (20, channels, 3, 3)) | 1
        if channels > 64 and most > 3000:  # NumPy's sums would leave int32
            continue
        weight[:16] = np.sign(weight[:16]) * (min(bound, most) // 2 * 2 - 1)  # the second block alone passes it
        assert differing(x, weight.astype(np.int16), 0, (1, 0, 1, 2)) == 0


@pytest.mark.parametrize("channels", [4, 6, 36])
@pytest.mark.parametrize(
    ("step", "most", "stored"),
    [(128, 255, (16, 7)), (128, 100, (8, 7)), (1024, 30, (16, 7)), (64, 7, (4, 6)), (16, 7, (4, 4)), (1, 300, (16, 0))],
)
def test_weights_are_stored_by_the_bits_of_their_steps(step, most, stored, channels):
    rng = np.random.default_rng(most)
    weight = rng.integers(-most, most + 1, (20, channels, 3, 3))
    weight[0, 0, 0] = 1, most, -most
    assert stored_as((step * weight).astype(np.int16)) == stored
    for stride in (1, 2):
        pixels = rng.integers(0, 256, (channels, 15, 14))
        assert differing(pixels, (step * weight).astype(np.int16), 9, (1, 1, 1, 1), stride=stride) == 0


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("step", "most", "channels", "stored"),
    [(1, 15, 4, (5, 0)), (8, 15, 36, (5, 3)), (1, 255, 16, (9, 0)), (128, 255, 32, (9, 7)), (1, 257, 16, (16, 0)),
     (1, 15, 6, (8, 0)), (128, 255, 6, (16, 7))],
)  # fmt: skip
def test_odd_weights_are_stored_by_their_halves(step, most, channels, stored, size):
    """DoReFa's grid has no zero: 2 q + 1; those of runs that zeros would fill up stay as they are."""
    rng = np.random.default_rng(most)
    weight = 2 * rng.integers(-(most // 2) - 1, most // 2 + 1, (20, channels, size, size)) + 1
    weight[0, 0], weight[1, 0] = most, -most
    assert stored_as((step * weight).astype(np.int16)) == stored
    for stride, x in ((1, rng.integers(0, 256, (channels, 15, 14))), (2, np.full((channels, 6, 7), 255))):
        assert differing(x, (step * weight).astype(np.int16), 9, (1, 1, 1, 1), stride=stride) == 0


def stored_as(weight: np.ndarray) -> tuple[int, int]:
    """``weight_storage`` of a convolution by ``weight``."""
    x = np.zeros((weight.shape[1], 5, 5), np.int64)
    return weight_storage(convolution(x, weight, 9, (1, 1, 1, 1), np.zeros(len(weight), np.int32))[0].ops[1])


@pytest.mark.parametrize("spread", [0, 3, 40, 120, 255])
@pytest.mark.parametrize(("c_in", "kernel", "stride"), [(16, 1, 1), (28, 1, 2), (100, 1, 1), (1024, 1, 1), (1028, 1, 1),
                                                        (16, 3, 2), (12, 2, 2), (40, 3, 2)])  # fmt: skip
def test_16_bit_sums_of_inputs_of_any_spread(c_in, kernel, stride, spread):
    rng = np.random.default_rng(c_in + spread)
    for most in (127, 60, 9):
        size = 13 * stride + kernel
        low = rng.integers(0, 256 - spread, (c_in, 1, 1))
        x = low + rng.choice([0, spread, int(rng.integers(spread + 1))], (c_in, size, size))
        weight = integers(rng, most, (20, c_in, kernel, kernel))
        weight[3:9] = np.abs(weight[3:9])  # sums of one sign, which grow the fastest
        weight[9:15] = -np.abs(weight[9:15]) - 1
        weight = np.clip(weight, -128, 127).astype(np.int8)
        assert (
            differing(x, weight, int(rng.integers(256)), (1, 0, 1, 2) if kernel > 1 else (0,) * 4, stride=stride) == 0
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_16_bit_sums_at_the_ends_of_int16(sign):
    rng = np.random.default_rng(7)
    for total in (*range(32760, 32776), 65534, 65535, 65536):
        x, weight = np.zeros((16, 8, 8), np.int64), np.zeros((17, 16, 1, 1), np.int64)
        left, k = total, 0
        while (
            left > 0
        ):  # products of the first place and channel add up to `total` in the even inputs of a quadruple each
            w = min(127, left)
            x[k, 0, 0], weight[0, k] = min(255, left // w), w
            left, k = left - w * min(255, left // w), k + (1 if k % 4 == 0 else 3)
            if k >= 16:
                break
        weight[1:] = rng.integers(-3, 4, weight[1:].shape)
        weight[2, 15] = 100  # or they would be stored in 4 bits
        assert differing(x, (sign * weight).astype(np.int8), 0, (0,) * 4) == 0


def test_threads_share_tiles():
    rng = np.random.default_rng(0)
    x, weight = rng.integers(0, 256, (32, 37, 35)), integers(rng, 127, (40, 32, 3, 3)).astype(np.int8)
    assert [differing(x, weight, 3, (1, 1, 1, 1), n_threads=n) for n in (2, 3, 7)] == [0, 0, 0]


@pytest.mark.parametrize("kernel", [1, 3])
def test_tiles_at_the_edge_stay_in_the_arena(kernel, tmp_path):
    weight, bias = np.full((1, 68, kernel, kernel), 127, np.int8), np.zeros(1, np.int32)
    for size in ((5, 40), (40, 5), (7, 7)):
        content = to_bytes(convolution(np.zeros((68, *size)), weight, 5, (0,) * 4, bias)[0])
        (tmp_path / "one").write_bytes(struct.pack("<I", len(content)) + content)
        done = subprocess.run([fuzzer(), tmp_path / "one", "auto"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "1 0\n"), done.stderr
