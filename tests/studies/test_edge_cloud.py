"""The edge-cloud study in its smallest form: rows, resuming, what is fitted to what, report and figure."""

import json

import numpy as np
import pytest
import torch

from hq_lib.crossbar import EngineNetwork, IdealEngine
from hq_lib.data import normalize
from hq_lib.deploy.edge_cloud import HEADER_BYTES, integer_edge, run_edge
from hq_lib.integer.execute import real_values
from hq_lib.results import store
from hq_lib.studies.bench import shipped
from hq_lib.studies.edge_cloud import bench as edge_cloud_bench
from hq_lib.studies.edge_cloud import study as edge_cloud
from hq_lib.studies.edge_cloud import tables as edge_cloud_report
from hq_lib.studies.edge_cloud.figures import fig_edge_cloud

CUT = "layer3.2"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The smoke workbench; rows go to a temporary folder, where the study has run on two edges at one cut."""
    if shipped("resnet20") is None:
        pytest.skip("no ResNet-20 checkpoint is shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HQ_OUT", str(tmp_path_factory.mktemp("out")))
        edge_cloud.run("smoke", edges=("integer", "crossbar"), cuts=(CUT,))
        yield edge_cloud_bench.workbench("smoke")


def test_packets_are_as_long_as_the_wire_says(bench):
    frame = edge_cloud_report.measured("smoke")
    n_values = {"image": 3072, CUT: 4096}
    wires = frame.loc[frame["wire_bits"] > 0]
    assert set(wires["cut"]) == set(n_values)
    for row in wires.to_dict("records"):
        assert row["packed_KiB"] == (n_values[row["cut"]] * row["wire_bits"] / 8 + HEADER_BYTES) / 1024
        assert 0 < row["deflate_KiB"] < row["packed_KiB"]


def test_each_edge_has_its_images_draws_and_settings(bench):
    frame = edge_cloud_report.measured("smoke")
    sizes = frame.groupby("edge")[["n_test", "seed"]].agg(["min", "max"])
    assert list(sizes.loc["integer"]) == [20, 30, -1, -1]
    assert list(sizes.loc["crossbar"]) == [20, 20, 0, 0]
    assert int(bench.subset.sum()) == 20
    rows = store.read("edge_cloud", profile="smoke")
    described = [json.loads(s) for s in rows["switches"]]
    crossbars = [s for s in described if s["edge"] == "crossbar"]
    assert all(s["device.name"] == "rram" and s["adc.bits"] == 8 for s in crossbars)
    assert not any("device.name" in s for s in described if s["edge"] != "crossbar")


def test_what_is_there_is_not_measured_again(bench, monkeypatch):
    before = store.read("edge_cloud", profile="smoke")
    for name in ("over_the_wire", "run_edge", "run_integers", "to_jpeg"):
        monkeypatch.setattr(edge_cloud, name, lambda *_, **__: pytest.fail("measured again"))
    after = edge_cloud.run("smoke", edges=("integer", "crossbar"), cuts=(CUT,))
    assert before.equals(after)


def test_wires_are_fitted_to_training_images_only(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    given = []

    def spy(x, *args, **kwargs):
        given.append(x)
        return fit(x, *args, **kwargs)

    fit = edge_cloud.fit_wire
    monkeypatch.setattr(edge_cloud, "fit_wire", spy)
    edge_cloud.fitted_wire.cache_clear()
    cut = bench.cut(CUT)
    edge_cloud.measure(bench, edge_cloud_bench.exact_edge(bench), cut, "smoke")
    part = integer_edge(bench.qnet, bench.record, cut)
    wanted = real_values(part.tensors[part.output], run_edge(part, normalize(bench.train.images, bench.train.spec)))
    assert len(given) == len(edge_cloud.WIRE_BITS) + len(edge_cloud.TENSOR_BITS)
    assert all(torch.equal(x, torch.from_numpy(wanted)) for x in given)
    assert (bench.train.split, bench.test.split) == ("train", "test")


def test_an_ideal_crossbar_sends_what_the_exact_edge_sends(bench):
    part = integer_edge(bench.qnet, bench.record, bench.cut(CUT))
    x = normalize(bench.test.images[:4], bench.test.spec)
    ideal = EngineNetwork(bench.record, IdealEngine()).products
    np.testing.assert_array_equal(run_edge(part, x, products=ideal), run_edge(part, x))


def test_shares_grow_to_almost_everything(bench):
    shares = [bench.share(cut) for cut in bench.cuts]
    macs = [share["edge_mac_pct"] for share in shares]
    assert macs[0] == 0
    assert macs == sorted(macs)
    assert 99.9 < macs[-1] < 100
    assert shares[-1]["edge_weight_KiB"] == sum(op.weight.size for op in bench.record.layers()[:-1]) / 1024


def test_unknown_names_are_refused_with_the_known_ones(bench):
    with pytest.raises(ValueError, match="unknown edge 'fpga': choose among integer, crossbar"):
        edge_cloud.run("smoke", edges=("fpga",))
    with pytest.raises(ValueError, match="unknown cut 'layer9': choose among conv1"):
        edge_cloud.run("smoke", cuts=("layer9",))


def test_table_findings_and_figure_come_from_the_rows(bench):
    table = edge_cloud_report.table("smoke")
    assert list(table["cut after"]) == ["- (the image)"] * 4 + [CUT] * 4
    assert set(table["crossbar, 1 day"]) == {"as digital", "n/r"}
    said = edge_cloud_report.findings("smoke")
    assert any(line.startswith("edge: crossbar, 1 s, against the digital edge on the same 20 images") for line in said)
    drawn = edge_cloud_report.lines("smoke")
    assert set(drawn["line"]) == {CUT, "pixels", "JPEG"}
    assert not drawn.isna().to_numpy().any()
    named = edge_cloud_report.CUT_WORDS
    whole = edge_cloud_report.whole_on_edge("smoke")
    titles = {"integer": "a", "crossbar": "b"}
    figure = fig_edge_cloud(drawn, whole, edges=titles, named=named)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["a", "b"]
    with pytest.raises(ValueError, match="needs the columns"):
        fig_edge_cloud(drawn.drop(columns="KiB"), whole, edges=titles, named=named)
