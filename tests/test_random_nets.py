"""Nothing silent: on random networks and policies each stage is the one before, or refuses and names a layer.

eager = traced = folded = quantized at 32 bits; fake-quantized and integers within one step a tensor; saved = loaded;
NumPy = C = ONNX = ideal crossbar. `HQ_NETS=2000` draws two thousand in the slow test.
"""

import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from random_nets import Net, images, policy

from hq_lib import integer
from hq_lib.crossbar import EngineNetwork, IdealEngine
from hq_lib.deploy import export, onnx
from hq_lib.deploy.c import Runtime, compiler
from hq_lib.deploy.c.runtime import CompilerError
from hq_lib.graph import BitPolicy, calibrate, load, quantize, save
from hq_lib.graph.folding import fold_bn
from hq_lib.graph.tracing import trace

FLOAT = BitPolicy(weight=32, act=32)


def tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_equal(found, wanted, what):
    for a, b in zip(tensors(found), tensors(wanted), strict=True):
        assert torch.equal(a, b), f"{what}: {(a - b).abs().max():.3g} apart"


def check_refusal(error, net, stage):
    """A library error that names a layer or an operation of the network."""
    assert type(error).__module__.startswith("hq_lib"), f"{stage}: {type(error).__name__}: {error}"
    names = [name.replace(".", "[._]") for name, _ in net.named_modules() if name]
    names += [node.name for node in trace(net).graph.nodes]
    assert re.search("|".join(names), str(error)), f"{stage} names no layer: {error}"


def stages(seed, folder):
    """Walks through all stages of one network; the name of the stage that refused, or "all"."""
    net, x, calibration = Net(seed), images(4, seed + 9), images(16, seed + 7)
    stage = "trace"
    try:
        with torch.no_grad():
            y = net(x)
            assert_equal(trace(net)(x), y, "traced")
            assert_equal(quantize(net, FLOAT, x[:1])(x), y, "quantized at 32 bits")
            stage = "quantize"
            qnet = quantize(net, policy(seed), x[:1])
            calibrate(qnet, calibration)
            want = qnet.eval()(x)
            stage = "save"
            for form in ("frozen", "trainable"):
                again = load(save(qnet, folder / "net.safetensors", form=form), net=Net(seed))
                assert_equal(again(x), want, f"loaded {form}")
            stage = "fold"
            for a, b in zip(tensors(fold_bn(net, x)(x)), tensors(y), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    except ValueError as error:
        check_refusal(error, net, stage)
        if stage != "fold":
            return stage
    try:
        models = [integer.lower(qnet, requantizer=r) for r in ("float32", "fixed")]
    except ValueError as error:
        check_refusal(error, net, "lower")
        return "lower"
    for model in models:
        logits = integer.run(model, x)
        export(model, folder / "net.npz", "npz")
        assert np.array_equal(integer.run(integer.load(folder / "net.npz"), x), logits), "npz"
        assert np.array_equal(Runtime(model).run(x), logits), "C"
        assert np.array_equal(EngineNetwork(model, IdealEngine()).run(x), logits), "ideal crossbar"
    logits = integer.run(models[0], x)
    assert np.array_equal(onnx.run(onnx.session(onnx.export(models[0])), x), logits), "ONNX"
    found = integer.agreement(qnet, models[0], x, forced=True)
    far = {t.name: t.largest for t in found.tensors if t.largest > 1}
    assert not far, f"steps between integers and fake-quantized: {far}"
    return "all"


def campaign(seeds, folder):
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            counts[stages(seed, folder)] += 1
        except Exception as error:
            net = Net(seed)
            raise AssertionError(f"net {seed} ({', '.join(net.kinds)}; {policy(seed)}): {error}") from error
    return counts


@pytest.fixture(autouse=True)
def _a_compiler():
    try:
        compiler()
    except CompilerError as error:
        pytest.skip(str(error))


def test_ten_networks(tmp_path):
    assert campaign(range(10), tmp_path)["all"] >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_networks(tmp_path):
    n = int(os.environ.get("HQ_NETS", "300"))
    counts = campaign(range(10, 10 + n), tmp_path)
    print(dict(counts))
    assert counts["all"] >= n / 2
