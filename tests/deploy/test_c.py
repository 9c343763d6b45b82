"""The C runtime against the NumPy executor: equal logits, for every operation, policy, requantizer and kernel."""

import math

import numpy as np
import pytest
import torch
from integer_nets import NETS, POLICIES, all_pairs, images, quantized, random_layer, random_moves
from torch import nn

from hq_lib import deploy, models
from hq_lib.data import normalize
from hq_lib.deploy.c import ContainerError, Runtime, compiler, container, library, to_bytes
from hq_lib.deploy.c.runtime import KERNELS, CompilerError
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import ImageError, lower, run
from hq_lib.integer import record as r
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
