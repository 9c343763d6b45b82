"""The edge-cloud study in its smallest form: rows, resuming, what is fitted to what, tables and figure."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hq_lib.crossbar import EngineNetwork, IdealEngine
from hq_lib.data import normalize
from hq_lib.deploy.edge_cloud import HEADER_BYTES, fit_wire, integer_edge
from hq_lib.integer import round_biases
from hq_lib.integer.execute import output_integers, real_values
from hq_lib.studies.bench import network_file, shipped
from hq_lib.studies.edge_cloud import study, tables
from hq_lib.studies.edge_cloud.figures import fig_edge_cloud, fig_wire
from hq_lib.studies.study import StudyError

CUT = "layer3.2"
CHOSEN = {"edges": ("integer", "crossbar"), "cuts": (CUT,)}
PLAN = study.PLANS["smoke"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The smoke workbench; rows go to a temporary folder, where the study has run on two edges at one cut."""
    if shipped("resnet20") is None:
        pytest.skip("no ResNet-20 checkpoint is shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HQ_OUT", str(tmp_path_factory.mktemp("out")))
        study.STUDY.run("smoke", **CHOSEN)
        yield study.workbench("resnet20", study.STUDY.plan("smoke", **CHOSEN))


@pytest.fixture
def rows(bench):
    return study.STUDY.rows("smoke")


def test_packets_are_as_long_as_the_wire_says(rows):
    frame = tables.measured(rows)
    n_values = {"image": 3072, CUT: 4096}
    wires = frame.loc[frame["wire_bits"] > 0]
    assert set(wires["cut"]) == set(n_values)
    for row in wires.to_dict("records"):
        assert row["packed_KiB"] == (n_values[row["cut"]] * row["wire_bits"] / 8 + HEADER_BYTES) / 1024
        assert 0 < row["deflate_KiB"] < row["packed_KiB"]


def test_each_edge_has_its_images_draws_and_settings(bench, rows):
    sizes = tables.measured(rows).groupby("edge")[["n_test", "seed"]].agg(["min", "max"])
    assert list(sizes.loc["integer"]) == [10, 20, -1, -1]
    assert list(sizes.loc["crossbar"]) == [10, 10, 0, 0]
    assert len(bench.few) == 10
    described = [json.loads(s) for s in rows["switches"]]
    crossbars = [s for s in described if s["edge"] == "crossbar"]
    assert all(s["device.name"] == "rram" and s["adc.bits"] == 8 for s in crossbars)
    assert not any("device.name" in s for s in described if s["edge"] != "crossbar")


def test_what_is_there_is_not_measured_again(rows, monkeypatch):
    monkeypatch.setattr(study, "workbench", lambda *_: pytest.fail("opened again"))
    assert rows.equals(study.STUDY.run("smoke", **CHOSEN))
    assert {p["seed"] for p in study.STUDY.todo("smoke", **{**CHOSEN, "n_draws": 2})} == {1}


def test_committed_rows_are_not_measured_again(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    assert study.STUDY.todo("full", networks=["resnet20"]) == []


def test_wires_are_fitted_to_training_images_only(bench, monkeypatch):
    given = []
    monkeypatch.setattr(study.ec, "fit_wire", lambda x, *args, **more: given.append(x) or fit_wire(x, *args, **more))
    study.fitted_wire.cache_clear()
    cut = bench.cut(CUT)
    study.fitted_wire(bench, cut, bits=2, per_channel=True)
    part = integer_edge(bench.qnet, bench.record, cut)
    x_int = output_integers(part, normalize(bench.train.images, bench.train.spec))
    wanted = real_values(part.tensors[part.output], x_int)
    assert len(given) == 1
    assert torch.equal(given[0], torch.from_numpy(wanted))
    assert (bench.train.split, bench.test.split) == ("train", "test")


def test_an_ideal_crossbar_sends_what_the_exact_edge_sends(bench):
    part = integer_edge(bench.qnet, bench.record, bench.cut(CUT))
    x = normalize(bench.test.images[:4], bench.test.spec)
    ideal = EngineNetwork(bench.record, IdealEngine()).products
    np.testing.assert_array_equal(output_integers(part, x, products=ideal), output_integers(part, x))


def test_shares_grow_to_almost_everything(bench):
    shares = [bench.share(cut) for cut in bench.cuts]
    macs = [share["edge_mac_pct"] for share in shares]
    assert macs[0] == 0
    assert macs == sorted(macs)
    assert 99.9 < macs[-1] < 100
    assert shares[-1]["edge_weight_KiB"] == sum(op.weight.size for op in bench.record.layers()[:-1]) / 1024


def test_a_network_trained_at_two_bits_sends_two_bits_without_loss(bench):
    """The tensor at a cut holds four levels: a wire of two bits finds them, and the answers stay."""
    name = "resnet20_dsq_w2a2_s0"
    if network_file(name) is None:
        pytest.skip(f"no {name} is shipped")
    plan = replace(PLAN, n_calib=32, n_test=16, n_crossbar=16, n_columns=8)
    trained = study.workbench(name, plan)
    assert trained.net is trained.qnet
    assert trained.about == {"model": "resnet20", "method": "dsq", "w_bits": 2, "a_bits": 2, "placement": "academic"}
    what = study.point(name, "integer", "layer2.2", grid="tensor", wire_bits=2)
    logits, sizes = study.answered(trained, trained.test, study.exact_products, what)
    more = study.point(name, "integer", "layer2.2", grid="tensor", wire_bits=8)
    torch.testing.assert_close(logits, study.answered(trained, trained.test, study.exact_products, more)[0])
    held = copy.deepcopy(trained.qnet)
    round_biases(held, images=trained.test.spec)  # the edge's biases are those of accumulators
    with torch.no_grad():
        answers = held(normalize(trained.test.images, trained.test.spec).contiguous()).argmax(1)
    assert torch.equal(logits.argmax(1), answers)
    assert sizes["packed"] == [32 * 16 * 16 * 2 // 8 + HEADER_BYTES] * 16


def test_unknown_names_are_refused_with_the_known_ones(bench):
    with pytest.raises(StudyError, match="edge of edge_cloud 'fpga': choose one of integer, crossbar"):
        study.STUDY.run("smoke", edges=("fpga",))
    with pytest.raises(StudyError, match="cut of resnet20 'layer9': choose one of conv1"):
        study.STUDY.run("smoke", cuts=("layer9",))
    with pytest.raises(StudyError, match=r"network .*'resnet20x'.*mean 'resnet20'"):
        study.STUDY.run("smoke", networks=("resnet20x",))


def test_edges_are_compared_on_the_same_images(rows):
    """The digital edge has a column for the crossbars' images, from the very rows on them."""
    frame = tables.measured(rows)
    table = tables.table(frame)
    assert list(table["cut after"]) == ["- (the image)"] * 4 + [CUT] * 4
    assert list(table)[5:] == [
        "W8A8, digital, 20 images", "digital, 10 images", "crossbar, 1 s, 10 images", "crossbar, 1 day, 10 images",
    ]  # fmt: skip
    assert set(table["crossbar, 1 day, 10 images"]) == {"as digital", "n/r"}
    few = frame.loc[(frame["edge"] == "integer") & (frame["n_test"] == 10) & (frame["grid"] == "channel")]
    assert list(table["digital, 10 images"][4:]) == [f"{v:.2f}" for v in few.sort_values("wire_bits")["acc_pct"]]
    (loss,) = tables.crossbar_losses(frame).query("cut == @CUT").to_dict("records")
    crossbar = frame.loc[(frame["edge"] == "crossbar") & (frame["wire_bits"] == 8), "acc_pct"].item()
    assert loss["mean"] == pytest.approx(crossbar - few.set_index("wire_bits")["acc_pct"][8])


def test_a_crossbar_alone_is_tabled_by_its_own_packets(rows):
    said = rows["switches"]
    measured = said.str.contains('"edge":"integer"') & (rows["metric"] != "edge_mac_pct")
    table, whole = (tables.table(tables.measured(r)) for r in (rows.loc[~measured], rows))
    sizes = ["cut after", "bits", "packed, KiB"]
    assert table[sizes].equals(whole[sizes])
    assert set(table["W8A8, digital, 20 images"][4:]) == {"n/r"}
    assert "n/r" not in set(table["crossbar, 1 s, 10 images"])


def test_tables_and_figure_come_from_the_rows(rows):
    frame = tables.measured(rows)
    assert set(tables.near(frame)["edge"]) == {"integer", "crossbar"}
    assert list(tables.scale_gains(frame).index) == [1, 2]
    assert tables.against_jpeg(frame)["jpeg_quality"].iloc[0] > 0
    assert tables.by_network(rows)["network"].tolist() == ["ResNet-20"]
    assert tables.counted(frame)["seeds"] == [0]
    drawn = tables.lines(frame)
    assert set(drawn["line"]) == {CUT, "pixels", "JPEG"}
    assert not drawn.isna().to_numpy().any()
    whole = tables.whole_on_edge(frame)
    figure = fig_edge_cloud(drawn, whole)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["edge: W8A8, digital", "edge: crossbar, 1 s"]
    with pytest.raises(ValueError, match="needs the columns"):
        fig_edge_cloud(drawn.drop(columns="KiB"), whole)
    (raw,) = {tuple(line.get_xdata()) for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]}
    assert raw == (3.0, 3.0)
    two = fig_wire(np.eye(4), np.zeros((4, 4)), title="1 bit")
    assert np.array_equal(two.axes[0].images[0].get_array(), np.eye(4))


def test_words_and_the_raw_image_are_those_of_the_rows_network_and_data(rows):
    """A network of two bits is not called W8A8, nor an image of 28 x 28 x 1 bytes one of 32 x 32 x 3."""
    assert tables.halves(rows) == {"edge": "W8A8, MSE ranges", "cloud": "float"}
    theirs = rows.assign(method="dsq", w_bits=2, a_bits=3, dataset="mnist")
    assert tables.halves(theirs) == {"edge": "W2A3, DSQ", "cloud": "W2A3, DSQ"}
    frame = tables.measured(theirs)
    assert list(tables.table(frame))[5] == "W2A3, digital, 20 images"
    figure = fig_edge_cloud(tables.lines(frame), tables.whole_on_edge(frame))
    assert figure.axes[0].get_title(loc="left") == "edge: W2A3, digital"
    assert figure.axes[0].texts[0].xy[0] == 28 * 28 / 1024
    near = tables.near(frame).dropna(subset="packed_KiB")
    assert (near["packed_KiB"] < 28 * 28 / 1024).all()
    assert near["n_near"].max() < tables.near(tables.measured(rows))["n_near"].max()
