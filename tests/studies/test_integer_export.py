"""The integer study: executors opened from files agree bit for bit, rows resume, the table has no empty cell."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from integer_nets import images as noise
from integer_nets import quantized as small_net

import hq_lib.deploy
from hq_lib import data, integer, models
from hq_lib.deploy import c as export_c
from hq_lib.deploy.c import CompilerError
from hq_lib.results import store
from hq_lib.studies.integer_export import executors
from hq_lib.studies.integer_export import files as integer_files
from hq_lib.studies.integer_export import study as integer_export
from hq_lib.studies.integer_export import tables as integer_report
from hq_lib.studies.integer_export.figures import INPUTS, fig_integer_agreement

try:
    export_c.compiler()
    COMPILER = True
except CompilerError:
    COMPILER = False
needs_c = pytest.mark.skipif(not COMPILER, reason="no C compiler here")


def toy_job(profile: str = "smoke", w_bits: int = 8, a_bits: int = 8) -> integer_files.Job:
    """An untrained ToyNet on the embedded digits: everything but its accuracy is as in the study."""
    torch.manual_seed(0)
    net, train, test = models.build("toynet"), data.load("digits", "train", n=20), data.load("digits", "test", n=20)
    with torch.no_grad():
        net.train()(data.normalize(train.images, train.spec))
    record = {"model": "toynet", "options": {}, "dataset": "digits", "n_classes": 10, "in_channels": 3, "seed": 0}
    return integer_files.Job(profile, "toynet", net.eval(), record, test, train, w_bits, a_bits)


@pytest.fixture
def only_toy(monkeypatch):
    """The study, of that network alone."""
    monkeypatch.setattr(integer_files, "job", lambda name, profile, w, a: toy_job(profile, w, a))
    monkeypatch.setattr(integer_report, "PLAN", {"smoke": integer_files.Plan(20, 4, 20, ("toynet",))})
    return ["toynet"]


def cells(rows: pd.DataFrame, metric: str) -> dict[tuple[str, str], float]:
    kept = rows.loc[rows["metric"] == metric]
    forms = [json.loads(s).get("requantizer", "") for s in kept["switches"]]
    return dict(zip(zip(kept["method"], forms, strict=True), kept["value"], strict=True))


@needs_c
def test_every_executor_is_run_and_the_integers_agree(out_dir, only_toy):
    pytest.importorskip("onnxruntime")
    rows = integer_export.run("smoke", names=only_toy, bits=[(4, 4)])
    everything = {("numpy", "float32"), ("numpy", "fixed"), ("c", "float32"), ("c", "fixed"), ("onnx", "float32")}
    assert set(cells(rows, "acc_pct")) == everything | {("float", ""), ("fake_quant", "")}
    mismatches = cells(rows, "n_logit_mismatches")
    assert mismatches == dict.fromkeys([("c", "float32"), ("c", "fixed"), ("onnx", "float32")], 0)
    assert all(cells(rows, metric)["c", "fixed"] > 0 for metric in ("cpu_ms", "file_KiB"))
    table = integer_report.table("smoke")
    assert list(table["executor"]) == ["float", *["fake-quantized", "NumPy", "C", "ONNX Runtime"] * 2]
    assert table.iloc[7]["against NumPy"] == "0 / 0 of 200 logits differ"
    assert (table.iloc[1:5]["accuracy, %"] == "n/r").all()  # W8A8 was not asked for
    assert not (table == "").any(axis=None)
    assert integer_report.findings("smoke")[0].startswith("0 of 600 logits")


def test_accuracy_is_that_of_the_fake_quantized_graph(out_dir):
    job = toy_job()
    qnet = integer_files.quantized(job)
    files = integer_files.write(job, qnet)
    x = np.concatenate(list(integer_files.parts(job.test)))
    with torch.no_grad():
        want = qnet(torch.from_numpy(x).contiguous(memory_format=torch.channels_last)).numpy()
    assert np.array_equal(executors.opened("fake_quant", files["fake_quant"])(x), want)
    with torch.no_grad():
        plain = job.net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(executors.opened("float", files["float"])(x), plain, atol=1e-3, rtol=1e-4)
    imodel = integer.lower(qnet, requantizer="fixed")
    assert np.array_equal(executors.opened("numpy", files["numpy fixed"])(x), integer.run(imodel, x))


def test_points_that_are_there_are_not_run_again(out_dir, only_toy, capsys, monkeypatch):
    first = integer_export.run("smoke", names=only_toy, bits=[(8, 8)])
    monkeypatch.setattr(executors, "measure", lambda *_, **__: pytest.fail("measured again"))
    again = integer_export.run("smoke", names=only_toy, bits=[(8, 8)])
    assert "done already" in capsys.readouterr().out
    pd.testing.assert_frame_equal(first, again)


def test_a_killed_run_goes_on_with_the_reference_it_kept(out_dir, monkeypatch):
    job = toy_job()
    files = integer_files.write(job, integer_files.quantized(job))
    logits = executors.measure(executors.opened("numpy", files["numpy float32"]), integer_files.parts(job.test))[0]
    found = integer_export._agreement(job, "onnx float32", logits + np.eye(20, 10, dtype=np.float32), files)
    assert found == {"n_logit_mismatches": 10}  # the reference was computed, as none was kept
    monkeypatch.setattr(executors, "measure", lambda *_, **__: pytest.fail("computed again"))
    assert integer_export._agreement(job, "c float32", logits, files) == {"n_logit_mismatches": 0}
    assert integer_export._agreement(job, "float", -logits, files)["same_top1_pct"] < 50


def test_what_a_machine_lacks_is_said_in_its_line(out_dir, only_toy, monkeypatch):
    monkeypatch.setenv("CC", "cc-that-is-not-there")
    monkeypatch.setitem(sys.modules, "hq_lib.deploy.onnx", None)  # as where onnx is not installed
    monkeypatch.delattr(hq_lib.deploy, "onnx", raising=False)
    rows = integer_export.run("smoke", names=only_toy, bits=[(8, 8)])
    assert {method for method, _ in cells(rows, "acc_pct")} == {"float", "fake_quant", "numpy"}
    table = integer_report.table("smoke").iloc[:5].set_index("executor")
    assert set(table.loc["C"].iloc[3:]) == {"no C compiler"}
    assert set(table.loc["ONNX Runtime"].iloc[3:]) == {"no onnxruntime"}
    assert table.loc["NumPy"].iloc[3] != "n/r"
    assert "not measured here: no C compiler" in integer_report.findings("smoke")


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
    peak = executors.peak_MiB("numpy", integer.save(imodel, tmp_path / "net.npz"), x)
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    assert 0 < peak < 100
    assert [p.name for p in tmp_path.iterdir()] == ["net.npz"]


def test_layers_are_compared_on_both_kinds_of_inputs(out_dir, only_toy):
    integer_export.run("smoke", names=only_toy, bits=[(8, 8)])
    layers = integer_report.layers("smoke")
    assert set(layers["inputs"]) == set(INPUTS)
    born = layers.loc[layers["inputs"] == "the graph's"]
    assert list(born["place"]) == list(range(len(born)))
    assert born["largest_LSB"].max() <= 1  # rounding alone
    assert layers["mismatch_pct"].between(0, 100).all()
    figure = fig_integer_agreement(layers)
    line = figure.axes[0].get_lines()[1]
    assert list(line.get_ydata()) == list(born["mismatch_pct"])
    with pytest.raises(ValueError, match="'mine' is neither"):
        fig_integer_agreement(layers.assign(inputs="mine"))


def test_a_network_without_a_checkpoint_is_skipped(out_dir, capsys):
    assert integer_files.job("vgg_small", "smoke", 8, 8) is None
    assert "no checkpoint is shipped" in capsys.readouterr().out
    assert store.read(integer_files.STUDY, profile="smoke").empty


@pytest.mark.slow
def test_resnet20_at_eight_bits_loses_little_on_real_images(out_dir, cifar10_test):
    del cifar10_test  # only whether it is there
    job = integer_files.job("resnet20", "quick", 8, 8)
    qnet = integer_files.quantized(job)
    files = integer_files.write(job, qnet)
    x = np.concatenate(list(integer_files.parts(job.test)))
    right = executors.opened("numpy", files["numpy float32"])(x).argmax(1) == job.test.labels.numpy()
    assert right.mean() > 0.88
