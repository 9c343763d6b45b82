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
FORMATS = ("npz", "h5")


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
    """(folder with trace.npz and trace.h5 where h5py is there, the logits while recording)"""
    record, x = resnet20
    folder = tmp_path_factory.mktemp("trace")
    recorder = RecordEngine(SimEngine(CIRCUIT), folder / "parts")
    logits = EngineNetwork(record, {LAYER: recorder}).run(x, batch_size=3)
    recorder.close()
    for ending in available():
        recorder.trace().save(folder / f"trace.{ending}")
    return folder, logits


def available():
    try:
        import h5py  # noqa: F401
    except ImportError:
        return FORMATS[:1]
    return FORMATS


def path_of(recorded, ending):
    if ending not in available():
        pytest.skip("HDF5 traces need h5py (pip install 'hq_lib[traces]')")
    return recorded[0] / f"trace.{ending}"


def test_every_row_of_the_layer_is_recorded_with_its_exact_product(resnet20, recorded):
    record, x = resnet20
    trace = Trace.load(recorded[0] / "trace.npz")
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


@pytest.mark.parametrize("ending", FORMATS)
def test_the_replayed_network_gives_the_recorded_logits(resnet20, recorded, ending):
    record, x = resnet20
    engine = ReplayEngine(path_of(recorded, ending))
    network = EngineNetwork(record, {LAYER: engine})
    np.testing.assert_array_equal(network.run(x, batch_size=3), recorded[1])
    assert not np.array_equal(run(record, x), recorded[1]), "the crossbar changed something"
    with pytest.raises(TraceError, match=rf"{LAYER}: row \d+ was measured \d+ times"):
        network.run(x)
    engine.rewind()
    np.testing.assert_array_equal(network.run(x, batch_size=3), recorded[1])
    assert network.describe()["recorded.device.name"] == "rram_noisy"


@pytest.mark.parametrize("ending", FORMATS)
def test_images_that_were_not_measured_are_refused(resnet20, recorded, ending):
    record, x = resnet20
    network = EngineNetwork(record, {LAYER: ReplayEngine(path_of(recorded, ending))})
    with pytest.raises(TraceError, match="record it, or rewind"):
        network.run(x.flip(3), batch_size=3)


@pytest.mark.parametrize("ending", FORMATS)
def test_the_trace_of_another_layer_is_refused(resnet20, recorded, ending):
    with pytest.raises(ValueError, match=f"nearest: {LAYER}"):
        EngineNetwork(resnet20[0], {"layer2.1.conv1": ReplayEngine(path_of(recorded, ending))})


def test_tampered_hdf5_is_refused_dataset_by_dataset(recorded, tmp_path):
    content = path_of(recorded, "h5").read_bytes()
    h5py = pytest.importorskip("h5py")
    copy, names = tmp_path / "trace.h5", []
    copy.write_bytes(content)
    with h5py.File(copy) as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    assert len(names) == 2 + 3 * len(Trace.load(copy).calls)
    for name in names:
        copy.write_bytes(content)
        with h5py.File(copy, "r+") as file:
            values = file[name][()]
            values.reshape(-1)[0] += 1
            file[name][...] = values
        with pytest.raises(TraceError, match=f"array {name} was changed after recording"):
            ReplayEngine(copy)
    copy.write_bytes(content)
    with h5py.File(copy, "r+") as file:
        del file["calls/0/y"]
    with pytest.raises(TraceError, match="missing or foreign: calls/0/y"):
        ReplayEngine(copy)
    copy.write_bytes(content[: len(content) // 2])
    with pytest.raises(TraceError, match="unreadable trace"):
        ReplayEngine(copy)


def test_tampered_npz_is_refused(recorded, tmp_path):
    for name in ("trace.npz", "trace.json"):
        (tmp_path / name).write_bytes((recorded[0] / name).read_bytes())
    content = bytearray((tmp_path / "trace.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "trace.npz").write_bytes(content)
    with pytest.raises(TraceError, match=r"damaged archive|changed after recording"):
        ReplayEngine(tmp_path / "trace.npz")
