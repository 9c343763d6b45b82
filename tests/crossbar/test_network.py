"""Whole networks on engines: the NumPy executor's bits when ideal, calibrated, resumable, refusals."""

import numpy as np
import pytest
import torch
from integer_nets import images, quantized

from hq_lib import models
from hq_lib.crossbar import (
    Adc,
    Circuit,
    Correction,
    CrossbarError,
    Engine,
    EngineNetwork,
    Faults,
    IdealEngine,
    Mapping,
    RecordEngine,
    SimEngine,
    device,
    state_independent,
)
from hq_lib.crossbar.calibration import compensate, references
from hq_lib.crossbar.profiles import IDEAL
from hq_lib.data import SPECS, ImageSet, normalize
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import lower, run
from hq_lib.integer.arithmetic import products
from hq_lib.integer.record import Conv, Layer, Requantizer
from hq_lib.training.evaluation import evaluation_of

NETWORKS = ("resnet20", "lenet", "vgg_small", "toynet", "mobilenetv2")
POLICIES = {"w8a8": BitPolicy(bn="fold"), "w4a4": BitPolicy("minmax:4", "minmax:4", bn="fold")}


@pytest.fixture(scope="module")
def qnets():
    return {}


def lowered(qnets, name, policy, requantizer: Requantizer = "float32"):
    """(record, images) of a network of the workbook with random weights."""
    if (name, policy) not in qnets:
        torch.manual_seed(0)
        x = torch.randn(8, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
        qnet = quantize(models.build(name).eval(), POLICIES[policy], x[:1])
        calibrate(qnet, x)
        qnets[name, policy] = qnet.eval(), x[:3].contiguous()
    qnet, x = qnets[name, policy]
    return lower(qnet, requantizer=requantizer), x


def small(policy="w8a8", name="residual"):
    return lower(quantized(name, policy)), images(24, seed=5)


def distance(network, x):
    """Relative L2 distance of the logits to the exact network's."""
    exact = run(network.model, x)
    return float(np.linalg.norm(network.run(x) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("policy", "requantizer"),
    [("w8a8", "float32"), ("w4a4", "fixed"),
     *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("w8a8", "fixed"), ("w4a4", "float32")))],
)  # fmt: skip
@pytest.mark.parametrize("name", NETWORKS)
def test_ideal_engine_gives_the_numpy_executor_s_bits(qnets, name, policy, requantizer):
    model, x = lowered(qnets, name, policy, requantizer)
    network = EngineNetwork(model, IdealEngine())
    assert list(network.layers) == [op.name for op in model.layers()]
    assert np.array_equal(network.run(x), run(model, x))


@pytest.mark.parametrize("policy", ["w8a8", "w2a3", "dorefa", "a16", "academic", "academic_no_pool"])
@pytest.mark.parametrize("name", ["residual", "mobile", "joined", "preactivation"])
def test_every_method_s_grid_and_geometry_is_exact(name, policy):
    model, x = small(policy, name)
    assert np.array_equal(EngineNetwork(model, IdealEngine()).run(x), run(model, x))


@pytest.mark.parametrize(
    "make", [lambda: SimEngine(Circuit(IDEAL)), lambda: SimEngine(Circuit(IDEAL, path="converted"))]
)
def test_perfect_cells_are_exact_in_simulation_too(qnets, make):
    model, x = lowered(qnets, "resnet20", "w4a4")
    assert np.array_equal(EngineNetwork(model, make()).run(x), run(model, x))


def test_linear_layers_on_sequences_are_exact():
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))

    torch.manual_seed(0)
    qnet = quantize(Tokens().eval(), BitPolicy(), images(1, size=4))
    calibrate(qnet, images(8, size=4))
    model, x = lower(qnet), images(3, size=4)
    assert np.array_equal(EngineNetwork(model, IdealEngine()).run(x), run(model, x))


def test_only_chosen_layers_go_to_their_engines():
    class Counting(IdealEngine):
        tag = ""

        def _measure(self, handle, x):
            seen.append((self.tag, handle.name))
            return super()._measure(handle, x)

    model, x = small()
    a, b, seen = Counting(), Counting(), []
    a.tag, b.tag = "a", "b"
    network = EngineNetwork(model, {"conv1": a, "conv*": b})
    assert np.array_equal(network.run(x), run(model, x))
    assert {name: engine for engine, name in seen} == {"conv1": "a", "conv2": "b", "conv3": "b"}
    assert network.engines == [a, b]


def test_a_pattern_that_fits_no_layer_is_refused_with_the_nearest():
    with pytest.raises(CrossbarError, match=r"'conv9'.*conv1"):
        EngineNetwork(small()[0], {"conv9": IdealEngine()})


def test_an_engine_holds_a_network_once():
    engine, (model, _) = IdealEngine(), small()
    EngineNetwork(model, engine)
    with pytest.raises(CrossbarError, match="already loaded"):
        EngineNetwork(model, engine)


def test_answers_do_not_depend_on_the_batch_size():
    model, x = small()
    one, many = (EngineNetwork(model, SimEngine(Circuit(device("rram"), precision="float64"))) for _ in range(2))
    assert np.array_equal(one.run(x, batch_size=1), many.run(x, batch_size=24))


def test_evaluation_counts_right_answers(qnets):
    model, _ = lowered(qnets, "toynet", "w8a8")
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=random, dtype=torch.uint8)
    some = ImageSet(pixels, torch.randint(0, 10, (40,), generator=random), SPECS["cifar10"], "test")
    found = EngineNetwork(model, IdealEngine()).evaluate(some, batch_size=7)
    wanted = 100 * (run(model, normalize(pixels, some.spec)).argmax(1) == some.labels.numpy()).mean()
    assert (found.n, found.acc_pct) == (40, pytest.approx(wanted))


def test_pictures_are_judged_batch_by_batch(pictures_read):
    pictures, read = pictures_read
    model, _ = small()
    found, wanted = (EngineNetwork(model, SimEngine(Circuit(state_independent(0.1), seed=1))) for _ in range(2))
    score = found.evaluate(pictures, batch_size=4)
    assert read == [4, 4, 2]
    logits = wanted.run(normalize(pictures.images, pictures.spec), batch_size=4)
    assert score == evaluation_of(torch.from_numpy(logits), pictures.labels)


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_calibration_brings_noisy_cells_nearer_to_exact(name, loop):
    model, x = small("w8a8", name)
    network = EngineNetwork(model, SimEngine(Circuit(state_independent(0.04), seed=1)))
    before = distance(network, x)
    found = network.calibrate(images(64), loop=loop)
    assert len(found) == len(list(network.groups()))
    assert distance(network, x) < 0.8 * before
    network.reset()
    assert distance(network, x) == before


def test_calibrating_a_pure_gain_error_restores_every_bit():
    class Tilted(IdealEngine):
        def _measure(self, handle, x):
            return 0.7 * super()._measure(handle, x).double() + 31.0

    model, x = small()
    network = EngineNetwork(model, Tilted())
    assert not np.array_equal(network.run(x), run(model, x))
    network.calibrate(images(32))
    assert np.array_equal(network.run(x), run(model, x))


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_closed_loop_takes_out_what_earlier_layers_left(loop):
    """A fit with an offset leaves no mean error on its own rows: those the network delivers, if the loop is closed."""
    model, x = small()
    network = EngineNetwork(model, SimEngine(Circuit(state_independent(0.1))))
    network.calibrate(x, loop=loop, n_rows=10**6)
    ideal, delivered = {}, {}

    def note(kept, make):
        def look(op, x_int, spec):
            y = make(op, x_int, spec)
            kept[op.name] = y.reshape(*y.shape[:2], -1).mean((0, 2))
            return y

        return look

    run(model, x, products=note(ideal, products))
    run(model, x, products=note(delivered, network.products))
    errors = [np.abs(delivered[name] - ideal[name]).max() for name in ideal]
    assert (max(errors) < 1) == (loop == "closed")


def test_converter_ranges_are_fitted_before_anything_is_measured():
    model, x = small()
    network = EngineNetwork(model, SimEngine(Circuit(IDEAL, Mapping(tile_rows=16), adc=Adc(10, "calibrated"))))
    with pytest.raises(CrossbarError, match="calibrate_adc"):
        network.run(x)
    found = network.calibrate(images(16), kind=None)
    assert {correction.kind for correction in found.values()} == {"identity"}
    assert distance(network, x) < 0.05


def test_a_fault_map_of_no_layer_is_refused_with_the_nearest():
    model = lower(quantized("residual", "w8a8"))
    shape = EngineNetwork(model, SimEngine()).layers["conv1"].groups[0].w_int.shape
    codes = np.full((*shape, 2), 2, np.uint8)
    stuck = [SimEngine(Circuit(IDEAL, faults=Faults(maps={name: codes}))) for name in ("conv1", "con1")]
    network = EngineNetwork(model, stuck[0])
    assert not bool(stuck[0].layer(network.layers["conv1"].groups[0]).weight.any())
    with pytest.raises(CrossbarError, match=r"layer of a fault map 'con1'.*did you mean 'conv1'"):
        EngineNetwork(model, stuck[1])


def test_drift_is_compensated():
    model, x = small()
    network = EngineNetwork(model, SimEngine(Circuit(device("pcm_drift"))))
    network.calibrate(images(64))
    fresh_readings = references(network, images(32))
    fresh = distance(network, x)
    network.set_time(3e7)
    drifted = distance(network, x)
    compensate(network, fresh_readings)
    compensated = distance(network, x)
    assert fresh < compensated < drifted


def test_an_interrupted_run_goes_on_from_its_record(tmp_path):
    class Failing(IdealEngine):
        left = 5

        def _measure(self, handle, x):
            if Failing.left == 0:
                raise RuntimeError("the bench is gone")
            Failing.left -= 1
            calls.append(handle.name)
            return super()._measure(handle, x)

    model, x = small()
    calls: list[str] = []
    with pytest.raises(RuntimeError, match="bench is gone"):
        EngineNetwork(model, RecordEngine(Failing(), tmp_path)).run(x[:2])
    first, Failing.left = len(calls), 1000
    assert np.array_equal(EngineNetwork(model, RecordEngine(Failing(), tmp_path)).run(x[:2]), run(model, x[:2]))
    assert len(set(calls[:first]) & set(calls[first:])) == 0


def test_accumulators_saturate_as_int32():
    class Enormous(Engine):
        def describe(self):
            return {"engine": "enormous"}

        def _program(self, handle):
            pass

        def _measure(self, handle, x):
            return torch.full((x.n_rows, handle.w_int.shape[1]), 1e15, dtype=torch.float64)

    model, x = small()
    last = model.layers()[-1].name
    logits = EngineNetwork(model, {last: Enormous()}).run(x)
    assert np.isfinite(logits).all()
    assert (logits > 0).all()


def test_a_correction_kind_or_loop_that_does_not_exist_is_refused():
    network = EngineNetwork(small()[0], IdealEngine())
    with pytest.raises(CrossbarError, match=r"'cloesd'.*closed"):
        network.calibrate(images(4), loop="cloesd")
    with pytest.raises(CrossbarError, match=r"'colum'.*column"):
        network.calibrate(images(4), kind="colum")


def test_weights_travel_in_steps_of_their_trained_grid():
    model, _ = small("w4a4")
    network = EngineNetwork(model, IdealEngine())
    for op in model.layers():
        assert isinstance(op, Layer)
        handle = network.layers[op.name].groups[0]
        assert handle.w_bits == op.weight_bits
        n = op.weight.shape[0] // (op.groups if isinstance(op, Conv) else 1)
        stored = torch.from_numpy(op.weight[:n].reshape(n, -1).T.astype(np.int32))
        assert torch.equal(handle.w_int * op.weight_step, stored)
    assert isinstance(network.calibrate(images(4))[model.layers()[0].name], Correction)
