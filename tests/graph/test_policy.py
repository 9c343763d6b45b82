"""BitPolicy: who decides a tensor's bits, what is refused in which words, YAML, seed 001's lists, seed 000's rule."""

import pytest
import torch
import yaml
from torch import nn

from hq_lib import models
from hq_lib.graph import BitPolicy, PolicyError, Site, Spec, quantize
from hq_lib.graph.spec import of_kind

LAYERS = {"stem": {"first"}, "layer1.0.conv1": set(), "layer1.0.conv2": set(), "fc": {"last", "linear"}}


def site(name: str, role: str = "") -> Site:
    return Site(name, name.replace(".", "_"), role, False, name)


def resolved(policy: BitPolicy, layers, sites) -> list[dict[str, Spec]]:
    """The specs of weights and of activations, by name."""
    return [of_kind(policy.resolve(layers, sites)[0], kind) for kind in ("weight", "act")]


SITES = [
    site("input", "image"),
    site("stem", "stem"),
    site("layer1.0.conv1"),
    site("layer1.0.add"),
    site("pool", "pool_last"),
]


def bits(policy: BitPolicy) -> tuple[list[int], list[int]]:
    weights, acts = resolved(policy, LAYERS, SITES)
    return [weights[name].bits for name in LAYERS], [acts[s.name].bits for s in SITES]


def test_first_and_last_layers_keep_eight_bits_by_default():
    assert bits(BitPolicy(weight="lsq:4", act="lsq:3")) == ([8, 4, 4, 8], [8, 3, 3, 3, 8])


def test_none_makes_no_exception():
    assert bits(BitPolicy(weight="lsq:4", act="lsq:3", first_last_bits=None)) == ([4] * 4, [8, 3, 3, 3, 3])


def test_stem_output_pool_and_image_have_their_own_knobs():
    policy = BitPolicy(weight="lsq:4", act="lsq:3", stem_out_bits=7, pool_bits=6, input_bits=5)
    assert bits(policy)[1] == [5, 7, 3, 3, 6]


def test_float_defaults_stay_float_in_the_first_and_last_layers():
    assert bits(BitPolicy(weight=32, act=32)) == ([32] * 4, [32] * 5)
    assert bits(BitPolicy(weight="lsq:2", act=32)) == ([8, 2, 2, 8], [32] * 5)


def test_the_image_is_float_in_academic_placement_unless_asked():
    assert bits(BitPolicy(placement="academic"))[1][0] == 32
    assert bits(BitPolicy(placement="academic", input_bits=8))[1][0] == 8


def test_overrides_beat_roles_and_later_ones_beat_earlier_ones():
    policy = BitPolicy(
        weight="lsq:4", act="lsq:4", overrides={"layer1.*": 2, "layer1.0.conv2": {"weight": 3}, "stem": {"weight": 5}}
    )
    assert bits(policy) == ([5, 2, 3, 8], [8, 4, 2, 2, 8])


def test_a_partial_override_keeps_what_it_does_not_name():
    policy = BitPolicy(
        weight={"method": "lsq", "bits": 4, "axis": None},
        overrides={"stem": {"weight": "dsq"}, "fc": {"weight": 3}, "layer1.0.conv1": {"weight": "pact:2"}},
    )
    weights, _ = resolved(policy, LAYERS, SITES)
    assert weights["stem"] == Spec("dsq", 8)  # another method does not inherit lsq's options
    assert weights["fc"] == Spec("lsq", 3, {"axis": None})
    assert weights["layer1.0.conv1"] == Spec("pact", 2)


@pytest.mark.parametrize("wrong", [0, 17, 31, -4, 33])
def test_impossible_bits_are_refused_by_key(wrong):
    with pytest.raises(PolicyError, match=rf"policy\.act: bits must be 1\.\.16, or 32 for float; got {wrong}"):
        BitPolicy(act=f"lsq:{wrong}" if wrong >= 0 else {"method": "lsq", "bits": wrong})
    with pytest.raises(PolicyError, match=r"policy\.first_last_bits"):
        BitPolicy(first_last_bits=wrong)
    with pytest.raises(PolicyError, match=r"policy\.overrides\['fc'\]\.weight"):
        BitPolicy(overrides={"fc": {"weight": wrong}})


@pytest.mark.parametrize("malformed", ["lsq:", "lsq:four", "4", "", ":4", True, 4.0, None, ["lsq", 4]])
def test_malformed_specs_are_refused(malformed):
    with pytest.raises(PolicyError, match=r"policy\.weight"):
        BitPolicy(weight=malformed)


def test_a_method_needs_bits_when_there_is_nothing_to_inherit_them_from():
    with pytest.raises(PolicyError, match=r"write 'lsq:4'"):
        BitPolicy(weight="lsq")


def test_unknown_methods_and_options_name_the_key_and_the_nearest():
    with pytest.raises(PolicyError, match=r"policy\.weight: .*'lsqq'.*lsq"):
        BitPolicy(weight="lsqq:4")
    with pytest.raises(PolicyError, match=r"policy\.weight: .*no option 'axes'.*axis"):
        BitPolicy(weight={"method": "lsq", "bits": 4, "axes": 0})
    with pytest.raises(PolicyError, match=r"overrides\['fc'\].*'dsqq'"):
        bits(BitPolicy(overrides={"fc": {"weight": "dsqq:2"}}))


def test_unknown_keys_name_the_nearest():
    with pytest.raises(PolicyError, match=r"key of policy 'wieght'.*did you mean 'weight'"):
        BitPolicy.from_dict({"wieght": "lsq:4"})
    with pytest.raises(PolicyError, match=r"overrides\['fc'\] 'weights'.*did you mean 'weight'"):
        BitPolicy(overrides={"fc": {"weights": 4}})
    with pytest.raises(PolicyError, match=r"policy\.placement 'deployed': choose one of deploy, academic"):
        BitPolicy(placement="deployed")
    with pytest.raises(PolicyError, match=r"policy\.bn"):
        BitPolicy(bn="folded")


def test_patterns_that_match_nothing_name_themselves_and_the_way_out():
    with pytest.raises(PolicyError, match=r"overrides\['fd'\].* matches no weight or quantized activation.*'fc'"):
        bits(BitPolicy(overrides={"fd": 4}))
    with pytest.raises(PolicyError, match=r"overrides\['layer1'\].*'layer1\.\*' would match"):
        bits(BitPolicy(overrides={"layer1": 4}))
    with pytest.raises(PolicyError, match=r"overrides\['fc'\]\.act: matches no quantized activation"):
        bits(BitPolicy(overrides={"fc": {"act": 4}}))


def through_yaml(policy):
    return BitPolicy.from_dict(yaml.safe_load(yaml.safe_dump(policy.to_dict())))


def test_yaml_round_trip():
    policy = BitPolicy(
        weight={"method": "lsq", "bits": 4, "axis": None},
        act="pact:4",
        stem_out_bits=8,
        overrides={"layer1.*": 3, "fc": {"weight": "dsq:2", "act": {"method": "pact", "bits": 5}}},
        placement="academic",
        bn="fold",
    )
    assert through_yaml(policy) == policy
    rule = BitPolicy.hybrid(2, 4, qat=("dsq", "pact"))
    assert through_yaml(rule) == rule


def test_a_spec_object_and_its_text_make_the_same_policy():
    assert BitPolicy(weight=Spec("lsq", 4)) == BitPolicy(weight="lsq:4")
    by_spec = BitPolicy(overrides={"fc": {"weight": Spec("lsq", 4, {"axis": None})}})
    assert bits(through_yaml(by_spec)) == bits(by_spec)


def test_the_policy_in_one_line_names_every_switch():
    line = BitPolicy(weight="lsq:4", act="pact:2", stem_out_bits=8).describe()
    for part in ("W lsq:4", "A pact:2", "first/last 8", "stem output 8", "image 8", "deploy", "BN keep"):
        assert part in line


@pytest.mark.parametrize(("w", "a"), [(2, 8), (3, 3), (4, 4), (8, 1), (5, 32)])
def test_hybrid_methods_follow_from_bits(w, a):
    weights, acts = resolved(BitPolicy.hybrid(w, a, qat=("dsq", "pact"), ptq="minmax", boundary=4), LAYERS, SITES)
    assert {str(spec) for spec in weights.values()} == {f"dsq:{w}" if w < 4 else f"minmax:{w}"}
    want = "float" if a == 32 else f"pact:{a}" if a < 4 else f"minmax:{a}"
    assert {str(acts[s.name]) for s in SITES[1:]} == {want}


def test_hybrid_takes_overrides_and_covers_stem_and_classifier():
    policy = BitPolicy.hybrid(2, 8, overrides={"fc": {"weight": 8}, "layer1.0.*": {"act": 3}})
    weights, acts = resolved(policy, LAYERS, SITES)
    assert [str(spec) for spec in weights.values()] == ["dsq:2", "dsq:2", "dsq:2", "minmax:8"]
    assert [str(acts[s.name]) for s in SITES] == ["minmax:8", "minmax:8", "dsq:3", "dsq:3", "minmax:8"]


def test_hybrid_boundary_is_policy_not_code():
    weights, _ = resolved(BitPolicy.hybrid(4, 4, boundary=5), LAYERS, SITES)
    assert {spec.method for spec in weights.values()} == {"dsq"}


def test_the_method_hybrid_without_a_rule_is_refused():
    with pytest.raises(PolicyError, match=r"BitPolicy\.hybrid"):
        BitPolicy(weight="hybrid:4")


def bits_of(name: str, a: list[int], w: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    from hq_lib.graph.placement import find_sites, layer_types
    from hq_lib.graph.tracing import trace

    net = models.build(name).eval()
    policy = BitPolicy.from_lists(net, a, w)
    gm = trace(net)
    weights, acts = resolved(policy, layer_types(gm), find_sites(gm))
    return {n: s.bits for n, s in weights.items()}, {n: s.bits for n, s in acts.items()}


def test_seed_lists_of_resnet20_speak_of_inputs():
    a, w = [2, 3, 4, 5, 6, 7, 8, 9, 10], [10, 9, 8, 7, 6, 5, 4, 3, 2]
    weights, acts = bits_of("resnet20", a, w)
    assert weights["conv1"] == 32
    assert weights["layer1.0.conv1"] == weights["layer1.0.conv2"] == 10
    assert weights["layer3.2.conv2"] == 2
    assert [bits for name, bits in weights.items() if not name.startswith(("conv1", "layer"))] == [16]
    assert acts["input"] == 32
    assert acts["conv1"] == 2  # the stem's output is the first block's input
    assert acts["layer1.0.conv1"] == acts["layer1.0.conv2"] == 2
    assert acts["layer1.0.add"] == 3  # a block's output is the next block's input
    assert acts["layer2.0.shortcut.0"] == 5
    assert acts["layer3.2.add"] == 32


def test_seed_lists_of_toynet():
    a, w = [32, *range(2, 12), 14, 16], [16, *range(2, 12), 13, 15]
    weights, acts = bits_of("toynet", a, w)
    assert sorted(set(weights.values())) == [*range(2, 12), 13, 15, 16]
    assert next(iter(weights.values())) == 16
    assert [*weights.values()][-2:] == [13, 15]
    assert acts["input"] == 32
    assert [*acts.values()][1] == 2  # the stem's output
    assert [*acts.values()][-2:] == [16, 16]  # header output and pool use the classifier's entry


def test_seed_lists_of_mobilenetv2_count_every_block():
    weights, acts = bits_of("mobilenetv2", [8, *[4] * 17, 6, 5], [8, *[3] * 17, 6, 5])
    assert sorted(set(weights.values())) == [3, 5, 6, 8]
    assert next(iter(acts.values())) == 8
    assert [*acts.values()][-1] == 5


@pytest.mark.parametrize("n", [8, 10, 12])
def test_lists_of_another_length_say_what_fits(n):
    with pytest.raises(PolicyError, match=r"has 11 layers.*or 9 for the blocks alone"):
        BitPolicy.from_lists(models.build("resnet20"), [8] * n, [8] * n)


def test_lists_of_the_blocks_and_of_all_layers_go_together():
    weights, acts = bits_of("resnet20", [4] * 9, [8, *range(2, 11), 6])
    assert (weights["conv1"], weights["layer1.0.conv1"], weights["linear"]) == (8, 2, 6)
    assert (acts["input"], acts["conv1"], acts["layer3.2.add"]) == (32, 4, 32)


class Joined(nn.Module):
    """The image joined with a rectified convolution, and two convolutions joined."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1), nn.Conv2d(7, 2, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.cat([x, torch.relu(self.a(x))], 1)
        return self.fc(torch.cat([self.b(x), self.c(x)], 1).amax((2, 3)))


def joined(**settings) -> dict[str, tuple[int, bool, str]]:
    policy = BitPolicy("minmax:8", "minmax:4", first_last_bits=None, **settings)
    qnet = quantize(Joined(), policy, torch.ones(1, 3, 4, 4))
    found = {site.name: site for site in qnet.meta["sites"]}
    return {name: (qnet.meta["specs"][f"act {name}"].bits, s.signed, s.group) for name, s in found.items()}


def test_a_tensor_joined_with_one_in_float_keeps_its_own_grid():
    assert joined(placement="academic") == {
        "input": (32, True, "x"), "a": (4, False, "relu"), "b": (4, True, "b"), "c": (4, True, "b"),
    }  # fmt: skip
    assert joined(overrides={"b": {"act": "float"}}) == {
        "input": (8, True, "x"), "a": (8, True, "x"), "b": (32, True, "b"), "c": (4, True, "c"),
    }  # fmt: skip


def test_an_override_of_one_tensor_on_a_grid_lifts_the_others_and_never_gives_way():
    assert joined(overrides={"c": {"act": 6}})["b"] == joined(overrides={"c": {"act": 6}})["c"] == (6, True, "b")
    assert joined(overrides={"[bc]": {"act": 2}})["b"][0] == 2
    with pytest.raises(PolicyError, match=r"^policy\.overrides\['c'\]\.act: 'c' would have minmax:2.*'b' of minmax:4"):
        joined(overrides={"c": {"act": 2}})
    with pytest.raises(PolicyError, match=r"\['b'\]\.act: 'b' would have minmax:2.*'c' of minmax:3"):
        joined(overrides={"b": {"act": 2}, "c": {"act": 3}})
