"""Seed 001's configurations: the bits of every layer, a run of one, and its table beside the published numbers."""

import json

import pytest

from hq_lib import models
from hq_lib.graph.placement import find_sites, layer_types
from hq_lib.graph.tracing import trace
from hq_lib.results import store
from hq_lib.studies.qat import study as qat
from hq_lib.studies.qat import tables as qat_report
from hq_lib.training.bit_lists import BIT_LISTS, find_lists, least_bits, list_recipe, widths

EVERY = [(model, name) for model, lists in BIT_LISTS.items() for name in lists]


def bits_of(model: str, name: str) -> tuple[list[int], dict[str, int]]:
    net = models.build(model).eval()
    policy = list_recipe(net, model, name, "mpact", "full").policy
    gm = trace(net)
    weights, acts = policy.resolve(layer_types(gm), find_sites(gm, placement="academic"))
    return [spec.bits for spec in weights.values()], {n: spec.bits for n, spec in acts.items()}


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_every_configuration_fits_its_network(model, name):
    acts, weights = find_lists(model, name)
    found, _ = bits_of(model, name)
    hard_coded = {32, 16} if model == "resnet20" else set()
    assert set(found) == set(weights) | hard_coded
    assert least_bits(model, name) == (min(weights), min(acts))


def test_the_first_and_the_last_entries_are_the_seeds():
    weights, acts = bits_of("toynet", "cfg-2")
    assert (weights[0], weights[-1], acts["input"], min(weights)) == (32, 16, 32, 6)
    assert {bits for name, bits in acts.items() if name != "input"} == {8, 32}
    weights, acts = bits_of("mobilenetv2_seed", "cfg-1*")
    assert (set(weights), acts["input"], [*acts.values()][-1]) == ({8}, 32, 16)


def test_only_the_configurations_that_a_network_has_are_run():
    assert widths("resnet20", ("cfg-1", "cfg-3"), ()) == [("cfg-1", (8, 8))]
    assert widths("resnet20", (), ((4, 4),)) == [("", (4, 4))]
    with pytest.raises(ValueError, match=r"no bit lists 'cfg1'.*did you mean 'cfg-1'"):
        widths("toynet", ("cfg1",), ())
    with pytest.raises(ValueError, match="no bit lists for 'vgg11'"):
        widths("vgg11", ("cfg-1",), ())
    with pytest.raises(ValueError, match="'lsq' has options"):
        list_recipe(models.build("resnet20"), "resnet20", "cfg-1", "lsq", "full")


def test_a_run_has_rows_of_its_own_and_leaves_the_other_tables_alone(out_dir, cifar10_train):
    rows = qat.run("smoke", methods=["mpact"], lists=["cfg-1"])
    assert {json.loads(text)["lists"] for text in rows["switches"]} == {"cfg-1"}
    assert set(rows["w_bits"]) == {8}
    value = rows.loc[~rows["switches"].str.contains("split"), "value"].item()
    assert value > 60
    line = qat_report.lists_table("resnet20", "smoke").query("method == 'mPACT'").iloc[0]
    assert line["ours"] == f"{value:.2f} (n=1)"
    assert qat_report.scores("smoke").empty
    assert qat_report.curves("smoke").empty
    assert set(qat_report.methods_table("smoke")["ours"]) == {"n/r"}
    assert len(store.read("qat", profile="smoke")) == 3
