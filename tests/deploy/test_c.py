"""The C runtime against the NumPy executor: equal logits, for every operation, policy, requantizer and kernel."""

import math
import struct
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from integer_nets import NETS, POLICIES, all_pairs, fuzzer, images, quantized, random_layer, random_moves
from torch import nn

from hq_lib import deploy, models
from hq_lib.data import normalize
from hq_lib.deploy.c import ContainerError, Runtime, compiler, container, library, to_bytes
from hq_lib.deploy.c.runtime import KERNELS, CompilerError
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import ImageError, lower, run
from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import requants
from hq_lib.integer.execute import normalized
from hq_lib.results import paths

try:
    compiler()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def qnets() -> dict:
    """Quantized networks by (net, policy), made on first use."""
    return {}


def kernels_here(model) -> list[str]:
    found = []
    for kernel in KERNELS[1:]:
        try:
            Runtime(model, kernel=kernel)
        except ValueError:
            continue
        found.append(kernel)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_c_gives_numpy_s_bits_with_every_kernel(qnets, net, policy):
    qnet, x = qnets.setdefault((net, policy), quantized(net, policy)), images(20, seed=5)
    for requantizer in r.REQUANTIZERS:
        imodel = lower(qnet, requantizer=requantizer)
        want = run(imodel, x)
        for kernel in kernels_here(imodel):
            assert np.array_equal(Runtime(imodel, kernel=kernel).run(x), want), (requantizer, kernel)


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize("residual", [None, "uint8", "int32"])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [("uint8", "int8"), ("uint16", "int8"), ("uint8", "int16")])
def test_layers_of_awkward_sizes(requantizer, residual, x_dtype, w_dtype):
    for seed in range(16):
        for conv in (True, False):
            model, x = random_layer(
                seed, conv=conv, x_dtype=x_dtype, w_dtype=w_dtype, residual=residual, requantizer=requantizer
            )
            want = run(model, x)
            assert len(np.unique(want)) > 2
            for kernel in kernels_here(model):
                assert np.array_equal(Runtime(model, kernel=kernel).run(x), want), (seed, conv, kernel)


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize("add", [True, False])
def test_ties_are_rounded_alike(add, requantizer):
    for seed in range(8 if add else 2):
        model, x = all_pairs(seed, requantizer=requantizer, add=add)
        want = run(model, x)
        for kernel in kernels_here(model):
            assert np.array_equal(Runtime(model, kernel=kernel).run(x), want), (seed, kernel)


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_moves_and_products_of_any_shape(dtype, requantizer):
    for seed in range(40):
        model, x = random_moves(seed, dtype=dtype, requantizer=requantizer)
        want = run(model, x)
        for kernel in kernels_here(model):
            assert np.array_equal(Runtime(model, kernel=kernel).run(x), want), (seed, kernel)


@pytest.fixture(params=["", "-DHQM_PORTABLE"], ids=["vectors", "portable"])
def flags(request, monkeypatch):
    """Compiled as everywhere, or as for a small device, where less is made side by side."""
    monkeypatch.setenv("CFLAGS", request.param)


def grid(name: str, shape: tuple[int, ...], dtype: str, zero: int, *, scale: float = 1.0) -> r.TensorSpec:
    """A tensor whose integers leave the ends of ``dtype`` free."""
    big = int(np.iinfo(dtype).max)
    return r.TensorSpec(name, shape, dtype, 8 if big == 255 else 16, 2, big - 3, np.asarray(scale, np.float32), zero)


def record(q: r.TensorSpec, *made: tuple[r.Op, r.TensorSpec], requantizer: r.Requantizer = "float32", meta=None):
    """A record of operations, each with the tensor that it writes, on images quantized to ``q``."""
    image = r.TensorSpec("image", q.shape, "float32", 32, 0, 0, np.asarray(1.0, np.float32), 0)
    specs = [image, q, *(spec for _, spec in made)]
    ops = (r.Quantize("quantize", ("image",), q.name), *(op for op, _ in made))
    return r.IntegerModel(requantizer, {s.name: s for s in specs}, ops, "image", specs[-1].name, meta or {})


def n_wrong(model: r.IntegerModel, x: np.ndarray) -> int:
    """Logits of every kernel that differ from NumPy's."""
    want = run(model, x)
    return sum(int((Runtime(model, kernel=kernel).run(x) != want).sum()) for kernel in kernels_here(model))


def random_pool(rng: np.random.Generator, q_dtype: str, channels: int, kernel: tuple[int, int], *, largest: bool):
    """A pool of ``kernel`` with random strides, gaps and paddings, which may fill whole windows of an average."""
    stride, dilation = (tuple(rng.integers(1, n, 2).tolist()) for n in (4, 3))
    dilation = dilation if largest else (1, 1)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(int(rng.integers(n if largest else n + 2)) for n in 2 * reach)
    around = [a + b for a, b in zip(padding[:2], padding[2:], strict=True)]
    size = [max(1, n - p) + int(rng.integers(7)) for n, p in zip(reach, around, strict=True)]
    out = [(n + p - k) // s + 1 for n, p, k, s in zip(size, around, reach, stride, strict=True)]
    zero, n_taps, name = int(rng.integers(250)), math.prod(kernel), ("pool", ("q",), "y", kernel, stride, padding)
    q, shape = grid("q", (channels, *size), q_dtype, zero), (channels, *out)
    if largest:
        return q, r.MaxPool(*name, dilation), grid("y", shape, q_dtype, zero)
    if q_dtype == "uint8" and n_taps < 256 and rng.random() < 0.3:
        return q, r.AvgPool(*name, None), grid("y", shape, "uint16", n_taps * zero)
    ratio = np.array([1.1 / n_taps])
    return q, r.AvgPool(*name, requants((ratio.astype(np.float32), ratio))[0]), grid("y", shape, q_dtype, 100)


@pytest.mark.parametrize("largest", [True, False], ids=["max", "average"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pools_of_awkward_channels_and_windows(flags, dtype, largest):
    rng, big = np.random.default_rng(0), int(np.iinfo(dtype).max)
    for channels in (1, 3, 6, 15, 16, 17, 33, 130, 2050):
        for kernel in ((1, 1), (2, 2), (3, 3), (2, 5), (4, 1), (17, 17)):
            q, op, y = random_pool(rng, dtype, channels, kernel, largest=largest)
            model = record(q, (op, y), requantizer=str(rng.choice(r.REQUANTIZERS)))
            x = rng.integers(0, big + 1, (2, *q.shape)) - q.zero_point
            x[1] = big  # the largest sums
            assert n_wrong(model, x.astype(np.float32)) == 0, (op, q.shape)


def test_pools_that_fill_their_sums_stay_in_memory(tmp_path):
    corpus, window = b"", (("q",), "y", (1, 2), (1, 1), (0, 1, 0, 0))
    for dtype in ("uint8", "uint16"):
        for op in (r.MaxPool("pool", *window, (1, 1)), r.AvgPool("pool", *window, None)):
            q, y = grid("q", (1, 40, 64), dtype, 3), grid("y", (1, 40, 64), dtype, 3)
            q = q if isinstance(op, r.MaxPool) else replace(q, qmax=q.qmax // 2)  # two of them fit y
            content = to_bytes(record(q, (op, y)))
            corpus += struct.pack("<I", len(content)) + content
    (tmp_path / "pools").write_bytes(corpus)
    done = subprocess.run([fuzzer(), tmp_path / "pools", "auto"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4 0\n"), done.stderr


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 127), (1, 16, 8), (3, 1, 129), (2, 3, 100), (5, 16, 17)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_images_and_pixels_of_awkward_sizes(flags, dtype, shape):
    rng, n, big = np.random.default_rng(1), math.prod(shape), int(np.iinfo(dtype).max)
    for scale in (0.5, 0.1, 0.0173):
        mean, std = rng.random((2, shape[0])) + 0.1
        q = grid("q", shape, dtype, big // 3, scale=scale)
        model = record(q, meta={"image": {"mean": mean.tolist(), "std": std.tolist()}})
        x = (rng.integers(-big, 2 * big, (2, n)) * (np.float32(scale) / 2)).astype(np.float32)  # half of them are ties
        x[1] = rng.choice(np.asarray([np.inf, -np.inf, 1e30, -1e30, -0.0, 1e-40], np.float32), n)
        assert n_wrong(model, x.reshape(2, *shape)) == 0
        pixels = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
        assert np.array_equal(Runtime(model).run(pixels), run(model, normalized(model, pixels)))
        for place in {0, 126, 127, 128, n - 2, n - 1} & set(range(n)):
            bad = x[:1].copy()
            bad[0, place] = np.nan
            with pytest.raises(ImageError, match="NaN"):
                Runtime(model).run(bad.reshape(1, *shape))


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize(
    "dtypes", [("uint8",) * 3, ("uint16",) * 3, ("uint8", "uint16", "uint8"), ("uint8", "uint8", "uint16")]
)
def test_sums_of_any_widths_and_clipping(flags, dtypes, requantizer):
    rng, (a, b, y) = np.random.default_rng(2), dtypes
    big, top = (int(np.iinfo(dtype).max) for dtype in (a, b))
    for n in (1, 5, 8, 9, 23):
        q, other, out = grid("q", (3, n, n), a, 90), grid("b", (3, n, n), b, 40), grid("y", (3, n, n), y, 100)
        values = rng.integers(2, top - 2, big + 1).astype(b)
        first, second = (np.array([0.35 * int(np.iinfo(y).max) / m]) for m in (big, top))
        both = requants((first.astype(np.float32), first), (second.astype(np.float32), second))
        made = [(r.Table("table", ("q",), "b", values), other)]
        made.append((r.Add("add", ("q", "b"), "y", both, np.float32(0.2)), out))
        made.append((r.Clip("clip", ("y",), "z"), replace(out, name="z", qmin=out.qmax // 4, qmax=out.qmax // 2)))
        x = rng.integers(-90, big - 90, (2, 3, n, n)).astype(np.float32)
        for model in (record(q, *made[:2], requantizer=requantizer), record(q, *made, requantizer=requantizer)):
            assert n_wrong(model, x) == 0, n


@pytest.mark.parametrize(("net", "policy"), [("joined", "w8a8"), ("residual", "academic"), ("gated", "w4a4")])
def test_what_is_needed_together_does_not_share_bytes(net, policy):
    imodel = lower(quantized(net, policy))
    blocks, padded, size = container.plan_arena(imodel)
    n_bytes = {t: math.prod(s.shape) * np.dtype(s.dtype).itemsize for t, s in imodel.tensors.items()}
    born = {op.output: i for i, op in enumerate(imodel.ops)}
    dies = {t: max([i for i, op in enumerate(imodel.ops) if t in op.inputs], default=len(imodel.ops)) for t in born}
    for a in born:
        assert blocks[a].offset + n_bytes[a] + container.SLACK <= size
        for b in born:
            apart = blocks[a].offset + blocks[a].size <= blocks[b].offset
            apart = apart or blocks[b].offset + blocks[b].size <= blocks[a].offset
            takes_over = blocks[a] is blocks[b] and (dies[a] <= born[b] or dies[b] <= born[a])
            assert a == b or apart or takes_over or dies[a] < born[b] or dies[b] < born[a]
    for op in imodel.layers():
        if op.name in padded and padded[op.name] is blocks.get(op.inputs[0]):
            assert dies[op.inputs[0]] == born[op.output]  # an input is padded where it lies when it is read last
    assert size < sum(n_bytes[t] + container.SLACK for t in born)  # and some do share


def test_threads_share_images_or_rows_and_change_no_bit():
    big = quantize(nn.Sequential(nn.Conv2d(3, 40, 5, padding=2), nn.ReLU(), nn.Conv2d(40, 24, 3, padding=1)),
                   BitPolicy(), images(1, 33))  # fmt: skip
    calibrate(big, images(4, 33))
    for requantizer in r.REQUANTIZERS:
        model, x = lower(big.eval(), requantizer=requantizer), images(3, 33).numpy()
        want = Runtime(model).run(x)
        assert np.array_equal(want, run(model, x))
        for n in (2, 3, 7):  # images of a batch are shared but by the last
            shared = Runtime(model, n_threads=n)
            assert np.array_equal(shared.run(x), want)
            assert np.array_equal(shared.run(x[1:2]), want[1:2])
            with pytest.raises(ImageError):
                shared.run(np.where(np.arange(3)[:, None, None, None] == 2, np.float32("nan"), x))
    for n in (0, 65, -1):
        with pytest.raises(ValueError, match="threads"):
            Runtime(model, n_threads=n)


def test_same_record_same_bytes_and_the_file_s_name(tmp_path):
    imodel = lower(quantized("residual", "w8a8"))
    content = to_bytes(imodel)
    assert content == to_bytes(imodel)
    assert deploy.export(imodel, tmp_path / "net.hqm", "c").read_bytes() == content
    with pytest.raises(ValueError, match=r"\.hqm"):
        deploy.export(imodel, tmp_path / "net.bin", "c")


def test_images_and_containers_that_do_not_fit_are_refused():
    runtime = Runtime(lower(quantized("residual", "w8a8")))
    x = images(2).numpy()
    for bad in (x[:, :2], x.astype(np.float64), x[:0], x * np.nan, np.zeros((1, 3, 12, 12), np.uint8)):
        with pytest.raises(ImageError):
            runtime.run(bad)
    with pytest.raises(ContainerError, match=r"not a \.hqm"):
        Runtime(b"no container of any kind" * 10)
    with pytest.raises(ValueError, match="no kernel 'mmx'"):
        Runtime(lower(quantized("residual", "w8a8")), kernel="mmx")


def test_no_compiler_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc-that-is-not-there")
    with pytest.raises(CompilerError, match="install gcc or clang"):
        library()
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("HQ_DATA", str(tmp_path))
    with pytest.raises(CompilerError, match="does not compile"):
        library()


@pytest.mark.slow
@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
def test_a_trained_resnet20_on_real_images(requantizer, cifar10_test):
    net, _ = models.load_checkpoint(paths.checkpoints_dir() / "resnet20_float_s0.safetensors")
    x = normalize(cifar10_test.images[:300], cifar10_test.spec)
    qnet = quantize(net.eval(), BitPolicy(), x[:1])
    calibrate(qnet, x[:64])
    imodel = lower(qnet.eval(), requantizer=requantizer, images=cifar10_test.spec)
    want, runtime = run(imodel, x), Runtime(imodel)
    assert int((runtime.run(x) != want).sum()) == 0
    assert int((runtime.run(cifar10_test.images[:300]) != want).sum()) == 0  # pixels through the table
    assert (torch.tensor(want).argmax(1) == cifar10_test.labels[:300]).float().mean() > 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "requantizer"), [(8, "float32"), (4, "fixed")])
@pytest.mark.parametrize("name", ["lenet", "vgg_small", "toynet", "mobilenetv2"])
def test_every_network_of_the_workbook(name, bits, requantizer):
    torch.manual_seed(0)
    net, x = models.build(name), torch.randn(6, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
    with torch.no_grad():
        net.train()(x)  # statistics for its batch norms
    qnet = quantize(net.eval(), BitPolicy(weight=f"minmax:{bits}", act=f"minmax:{bits}"), x[:1])
    calibrate(qnet, x)
    imodel = lower(qnet.eval(), requantizer=requantizer)
    assert np.array_equal(Runtime(imodel).run(x), run(imodel, x))
