"""Seed 001's configurations: the bits of every layer."""

import pytest

from hq_lib import models
from hq_lib.graph.placement import find_sites, layer_types
from hq_lib.graph.spec import of_kind
from hq_lib.graph.tracing import trace
from hq_lib.training.recipes import BIT_LISTS, find_lists, least_bits, list_recipe, widths

EVERY = [(model, name) for model, lists in BIT_LISTS.items() for name in lists]


def bits_of(model: str, name: str) -> tuple[list[int], dict[str, int]]:
    net = models.build(model).eval()
    policy = list_recipe(net, find_lists(model, name), "mpact", "full").policy
    gm = trace(net)
    specs, _ = policy.resolve(layer_types(gm), find_sites(gm, placement="academic"))
    weights, acts = (of_kind(specs, kind) for kind in ("weight", "act"))
    return [spec.bits for spec in weights.values()], {n: spec.bits for n, spec in acts.items()}


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_every_configuration_fits_its_network(model, name):
    acts, weights = find_lists(model, name)
    found, _ = bits_of(model, name)
    hard_coded = {32, 16} if model == "resnet20" else set()
    assert set(found) == set(weights) | hard_coded
    assert least_bits((acts, weights)) == (min(weights), min(acts))


def test_the_first_and_the_last_entries_are_the_seeds():
    weights, acts = bits_of("toynet", "cfg-2")
    assert (weights[0], weights[-1], acts["input"], min(weights)) == (32, 16, 32, 6)
    assert {bits for name, bits in acts.items() if name != "input"} == {8, 32}
    weights, acts = bits_of("mobilenetv2_seed", "cfg-1*")
    assert (set(weights), acts["input"], [*acts.values()][-1]) == ({8}, 32, 16)


def test_only_the_configurations_that_a_network_has_are_run():
    assert widths("resnet20", ("cfg-1", "cfg-3")) == [("cfg-1", (8, 8))]
    with pytest.raises(ValueError, match=r"configuration of toynet 'cfg1'.*did you mean 'cfg-1'"):
        widths("toynet", ("cfg1",))
    with pytest.raises(ValueError, match="network with bit lists 'vgg11'"):
        widths("vgg11", ("cfg-1",))


def test_a_method_with_options_takes_lists_too():
    policy = list_recipe(models.build("resnet20"), find_lists("resnet20", "cfg-2*"), "lsq", "full").policy
    assert (policy.weight.options, policy.act.options) == ({"init": "least_error"},) * 2
    assert policy.overrides["layer2.0.conv1"] == {"weight": 6, "act": 8}
