"""ONNX: the checker's approval, real int8 initializers, and onnxruntime's logits equal to NumPy's bit for bit."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from integer_nets import NETS, POLICIES, images, quantized
from onnx import TensorProto, numpy_helper

from hq_lib import data, deploy, integer, models
from hq_lib.deploy import c
from hq_lib.deploy.onnx import ExportError, export, model, run, session, to_bytes
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import ImageError, agreement, check, lower
from hq_lib.integer import record as r
from hq_lib.integer import run as run_numpy
from hq_lib.results import paths


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_onnxruntime_gives_numpy_s_bits(net, policy):
    imodel, x = lower(quantized(net, policy)), images(60, seed=5)
    assert np.array_equal(run(session(export(imodel)), x), run_numpy(imodel, x))


@pytest.mark.parametrize(("flags", "exact_by_option"), [
    ({"avx2"}, True), (set(), True), ({"avx512f", "avx512_vnni"}, False), ({"avx2", "avx_vnni"}, False),
])  # fmt: skip
def test_the_slow_exact_kernels_are_asked_for_only_where_the_fast_ones_saturate(flags, exact_by_option, monkeypatch):
    monkeypatch.setattr(model, "cpu_flags", lambda: frozenset(flags))
    options = session(export(lower(quantized("residual", "w8a8")))).get_session_options()
    if exact_by_option:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):  # never set
            options.get_session_config_entry("session.x64quantprecision")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet20", "toynet", "mobilenetv2"])
def test_every_network_of_the_workbook_lowers_and_agrees(name, bits):
    torch.manual_seed(0)
    net, x = models.build(name), torch.randn(6, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
    with torch.no_grad():
        net.train()(x)  # statistics for its batch norms
    qnet = quantize(net.eval(), BitPolicy(weight=f"minmax:{bits}", act=f"minmax:{bits}"), x[:1])
    calibrate(qnet, x)
    imodel = lower(qnet)
    assert np.array_equal(run(session(export(imodel)), x), run_numpy(imodel, x))
    assert max(t.largest for t in agreement(qnet, imodel, x, forced=True).tensors) <= 1


def kinds(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_eight_bit_layers_run_on_fused_integer_kernels(tmp_path):
    imodel = lower(quantized("residual", "w4a4"))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 3
    onnxruntime.InferenceSession(export(imodel).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = kinds(tmp_path / "fused.onnx")
    assert found.count("QLinearConv") == 5
    assert found.count("QLinearAdd") == 2
    assert found.count("QLinearGlobalAveragePool") == 1
    assert "Conv" not in found


def halved(requant: r.Requant) -> r.Requant:
    return replace(requant, multiplier=requant.multiplier / 2, shift=requant.shift + np.uint8(1))


def edits(op: r.Op) -> list[dict]:
    if isinstance(op, r.Add):
        both = (halved(op.requants[0]), halved(op.requants[1]))
        return [{"requants": both}, {"offset": op.offset + np.float32(9)}]
    requant = getattr(op, "requant", None)
    return [] if requant is None else [{"requant": halved(requant)}]


@pytest.mark.parametrize("kind", [r.Conv, r.Linear, r.Add, r.AvgPool])
def test_multipliers_that_the_scales_do_not_give_are_the_record_s(kind):
    imodel, x = lower(quantized("joined" if kind is r.Linear else "residual", "w8a8")), images(30)
    edited = [(op, edit) for op in imodel.ops if isinstance(op, kind) for edit in edits(op)]
    assert edited
    for op, edit in edited:
        other = check(replace(imodel, ops=tuple(replace(o, **edit) if o is op else o for o in imodel.ops)))
        assert np.array_equal(run(session(export(other)), x), run_numpy(other, x)), op.name
        assert not np.array_equal(run_numpy(other, x), run_numpy(imodel, x))


def test_weights_are_int8_initializers_equal_to_the_record_s():
    imodel = lower(quantized("residual", "w8a8"))
    stored = {i.name: i for i in export(imodel).graph.initializer}
    for op in imodel.layers():
        weight = numpy_helper.to_array(stored[f"{op.name}:weight"])
        assert weight.dtype == np.int8
        assert np.array_equal(weight if weight.ndim == 4 else weight.T, op.weight)


@pytest.mark.parametrize("policy", ["w4a4", "academic"])
def test_weights_of_four_bits_are_stored_in_four(policy):
    """Their INT4 initializers, unpacked here by hand, times a power of two are the record's weights."""
    imodel, x = lower(quantized("residual", policy)), images(30)
    model = export(imodel)
    packed = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.INT4}
    assert set(packed) == {f"{name}:weight" for name in ("conv1", "conv2", "down", "conv3")}
    for name, stored in packed.items():
        weight = imodel.op(name.removesuffix(":weight")).weight
        nibbles = [n for byte in stored.raw_data for n in (byte & 15, byte >> 4)][: weight.size]
        ratios = {w / (n - 16 * (n > 7)) for n, w in zip(nibbles, weight.ravel().tolist(), strict=True) if n}
        assert len(ratios) == 1
    assert np.array_equal(run(session(model), x), run_numpy(imodel, x))


def test_resnet20_of_four_bits_takes_six_tenths_of_eight_in_every_file():
    x, sizes = torch.randn(8, 3, 32, 32), []
    for bits in (8, 4):
        net, _ = models.load_checkpoint(paths.checkpoints_dir() / "resnet20_float_s0.safetensors")
        qnet = quantize(net.eval(), BitPolicy(f"minmax:{bits}", f"minmax:{bits}", bn="fold"), x[:1])
        calibrate(qnet, x)
        imodel = lower(qnet)
        sizes.append([len(integer.to_bytes(imodel)), len(c.to_bytes(imodel)), len(to_bytes(imodel))])
    assert max(four / eight for eight, four in zip(*sizes, strict=True)) <= 0.6  # .npz, .hqm, .onnx


def test_every_value_has_its_shape_in_the_file():
    imodel = lower(quantized("residual", "academic"))
    graph = export(imodel).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= set(shapes)
    for op in imodel.ops:
        if op.output in shapes:
            assert shapes[op.output][1:] == list(imodel.tensors[op.output].shape)


def test_metadata_names_policy_and_origin(tmp_path):
    path = deploy.export(lower(quantized("mobile", "w8a8")), tmp_path / "net.onnx", "onnx")
    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert "W minmax:8" in props["policy"]
    assert props["requantizer"] == "float32"
    assert props["git_sha"]
    assert run(session(path), images(2)).shape == (2, 5)


@pytest.mark.parametrize("spoil", [
    lambda x: (10 * np.abs(x)).astype(np.uint8), lambda x: x.astype(np.float64), lambda x: x[:, :2], lambda x: x[:0],
    lambda x: np.where(x > 1, np.nan, x),
])  # fmt: skip
def test_images_that_other_executors_refuse_are_refused_here(spoil):
    imodel, x = lower(quantized("residual", "w8a8")), images(3).numpy()
    for refuses in (lambda bad: run_numpy(imodel, bad), lambda bad: run(session(export(imodel)), bad)):
        with pytest.raises(ImageError):
            refuses(spoil(x))


def test_what_cannot_be_written_is_refused():
    qnet = quantized("residual", "w8a8")
    with pytest.raises(ExportError, match="float32"):
        export(lower(qnet, requantizer="fixed"))


PUBLIC = {
    "w8a8": BitPolicy(),
    "w4a4": BitPolicy(weight="lsq:4", act="lsq:4", bn="fold"),
    "academic": BitPolicy(weight="lsq:4", act="lsq:4", placement="academic", input_bits=8, bn="fold"),
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", PUBLIC)
def test_a_trained_resnet20_on_real_images(policy, cifar10_test, shared_data):
    net = models.resnet20_akamaster(shared_data / "checkpoints" / "resnet20_akamaster_9173.th")
    test = cifar10_test.normalized_by(*models.IMAGENET_MEAN_STD).subset(list(range(300)))
    x = data.normalize(test.images, test.spec)
    qnet = quantize(net, PUBLIC[policy], x[:1])
    calibrate(qnet, x[:100])
    imodel = lower(qnet, images=test.spec)
    logits = run_numpy(imodel, x)
    assert np.array_equal(run(session(export(imodel)), x), logits)
    if policy == "w8a8":
        assert (logits.argmax(1) == test.labels.numpy()).mean() > 0.88
