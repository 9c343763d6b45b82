"""Traces of a real network on real images: recorded while it runs, replayed without the engine, damage refused."""

import numpy as np
import pytest
import torch

from hq_lib import models
from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    Device,
    EngineNetwork,
    RecordEngine,
    ReplayEngine,
    SimEngine,
    Trace,
    TraceError,
    device,
)
from hq_lib.data import normalize
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import lower, run
from hq_lib.studies.bench import shipped

LAYER = "layer2.0.conv1"
RRAM = device("rram")
NOISY = Device("rram_noisy", RRAM.source, RRAM.g_min_uS, RRAM.g_max_uS, RRAM.error, read=ConstantRead(0.01))
CIRCUIT = Circuit(NOISY, adc=Adc(8, "max"), seed=7)


@pytest.fixture(scope="module")
def resnet20(cifar10_train, cifar10_test):
    """(the shipped ResNet-20 in W8A8 integers, 6 normalised test images)"""
    path = shipped("resnet20")
    if path is None:
        pytest.skip("no ResNet-20 checkpoint is shipped")
    net, _ = models.load_checkpoint(path)
    x = normalize(cifar10_train.balanced(20, 0).images, cifar10_train.spec)
    qnet = quantize(net.eval(), BitPolicy("minmax:8", "minmax:8", bn="fold"), x[:1])
    calibrate(qnet, x)
    return lower(qnet), normalize(cifar10_test.images[:6], cifar10_test.spec)


@pytest.fixture(scope="module")
def recorded(resnet20, tmp_path_factory):
    """(folder with trace.safetensors, the logits while recording)"""
    record, x = resnet20
    folder = tmp_path_factory.mktemp("trace")
    recorder = RecordEngine(SimEngine(CIRCUIT), folder / "parts")
    logits = EngineNetwork(record, {LAYER: recorder}).run(x, batch_size=3)
    recorder.close()
    recorder.trace().save(folder / "trace.safetensors")
    return folder, logits


def test_every_row_of_the_layer_is_recorded_with_its_exact_product(resnet20, recorded):
    record, x = resnet20
    trace = Trace.load(recorded[0] / "trace.safetensors")
    handle = trace.layers[LAYER]
    assert list(trace.layers) == [LAYER]
    assert trace.n_rows == len(x) * 16 * 16
    np.testing.assert_array_equal(handle.w_int.numpy().T.reshape(32, 16, 3, 3), record.op(LAYER).weight)
    seen = []
    run(record, x, batch_size=3, watch=lambda op, y: seen.append(y.copy()) if op.output == "layer1.2.add" else None)
    patches = torch.nn.functional.unfold(torch.from_numpy(np.concatenate(seen)).double(), 3, padding=1, stride=2)
    rows = np.concatenate([call.x for call in trace.calls])
    np.testing.assert_array_equal(rows, patches.permute(0, 2, 1).reshape(len(rows), -1).numpy())
    measured, ideal = (np.concatenate([getattr(call, part) for call in trace.calls]) for part in ("y", "y_ideal"))
    np.testing.assert_array_equal(ideal, rows.astype(np.int64) @ handle.w_int.numpy().astype(np.int64))
    assert 0.01 < np.std(measured - ideal) / np.std(ideal) < 0.5, "noise is there, and the signal too"


def test_the_replayed_network_gives_the_recorded_logits(resnet20, recorded):
    record, x = resnet20
    engine = ReplayEngine(recorded[0] / "trace.safetensors")
    network = EngineNetwork(record, {LAYER: engine})
    np.testing.assert_array_equal(network.run(x, batch_size=3), recorded[1])
    assert not np.array_equal(run(record, x), recorded[1]), "the crossbar changed something"
    with pytest.raises(TraceError, match=rf"{LAYER}: row \d+ was measured \d+ times"):
        network.run(x)
    engine.trace.rewind()
    np.testing.assert_array_equal(network.run(x, batch_size=3), recorded[1])
    assert engine.describe()["recorded.device.name"] == "rram_noisy"


def test_images_that_were_not_measured_are_refused(resnet20, recorded):
    record, x = resnet20
    network = EngineNetwork(record, {LAYER: ReplayEngine(recorded[0] / "trace.safetensors")})
    with pytest.raises(TraceError, match="record it, or rewind"):
        network.run(x.flip(3), batch_size=3)


def test_the_trace_of_another_layer_is_refused(resnet20, recorded):
    with pytest.raises(ValueError, match=f"did you mean '{LAYER}'"):
        EngineNetwork(resnet20[0], {"layer2.1.conv1": ReplayEngine(recorded[0] / "trace.safetensors")})


def test_a_tampered_trace_is_refused(recorded, tmp_path):
    content = bytearray((recorded[0] / "trace.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "trace.safetensors").write_bytes(content)
    with pytest.raises(TraceError, match="damaged"):
        ReplayEngine(tmp_path / "trace.safetensors")
