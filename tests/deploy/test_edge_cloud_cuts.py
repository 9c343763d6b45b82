"""Networks cut in two: the halves are the whole, in floats and in integers, at every cut of every kind of network."""

import numpy as np
import pytest
import torch
from graph_nets import Branches, Tiny, images, trained_like
from torch import nn

from hq_lib import data, models
from hq_lib.deploy.edge_cloud import find_cuts, float_wire, integer_edge, pack, split_at, unpack
from hq_lib.graph import BitPolicy, QuantizeError, blocks, calibrate, quantize
from hq_lib.integer import lower, run
from hq_lib.integer.execute import output_integers, real_values

NETS = {"Tiny": (Tiny, 12), "Branches": (Branches, 12)}
SIZES = {"lenet": 28}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    net = trained_like(NETS[name][0]() if name in NETS else models.build(name))
    channels = next(p for p in net.parameters() if p.dim() == 4).shape[1]
    return net.eval(), images(2, NETS[name][1] if name in NETS else SIZES.get(name, 32))[:, :channels]


def integers(net: nn.Module, x: torch.Tensor, bits: int = 8):
    qnet = quantize(net, BitPolicy(f"minmax:{bits}", f"minmax:{bits}", bn="fold"), x)
    calibrate(qnet, x)
    return qnet, lower(qnet)


def test_resnet20_is_cut_before_and_between_its_blocks():
    net, x = built("resnet20")
    cuts = find_cuts(net, x)
    assert [c.name for c in cuts] == ["image", "conv1", *(f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3))]
    assert [c.shape for c in cuts] == [(3, 32, 32), *[(16, 32, 32)] * 4, *[(32, 16, 16)] * 3, *[(64, 8, 8)] * 3]
    assert [c.n_values for c in cuts[::5]] == [3072, 8192, 4096]
    assert [len(c.layers) for c in cuts] == [0, 1, 3, 5, 7, 10, 12, 14, 17, 19, 21]


@pytest.mark.parametrize("name", [*NETS, "lenet", "resnet20", "toynet", "mobilenetv2", "vgg11"])
def test_with_floats_on_the_wire_the_halves_are_the_whole_bit_for_bit(name):
    net, x = built(name)
    with torch.no_grad():
        whole = net(x)
        for cut in find_cuts(net, x[:1]):
            edge, cloud = split_at(net, cut)
            sent = edge(x)
            assert tuple(sent.shape[1:]) == cut.shape
            wire = float_wire(cut.shape, cut.name)
            arrived = unpack(wire, pack(wire, wire.encode(sent.numpy()), coding="deflate"))
            assert torch.equal(cloud(torch.from_numpy(wire.decode(arrived))), whole)


def test_the_halves_share_the_layers_and_leave_the_mode_alone():
    net, x = built("Tiny")
    net.train()
    edge, cloud = split_at(net, find_cuts(net, x)[1])
    assert net.training
    assert net.stem.training
    shared = {p.data_ptr() for p in [*edge.parameters(), *cloud.parameters()]}
    assert shared == {p.data_ptr() for p in net.parameters()}


@pytest.mark.parametrize("name", ["Tiny", "lenet", "resnet20", "toynet"])
def test_the_integer_edge_computes_the_integers_of_the_whole_network(name):
    net, x = built(name)
    qnet, record = integers(net, x)
    seen = {}
    run(record, x.contiguous(), watch=lambda op, values: seen.update({op.output: values.copy()}))
    for cut in find_cuts(net, x[:1])[1:]:
        edge = integer_edge(qnet, record, cut)
        assert edge.tensors[edge.output].shape == cut.shape
        assert {op.name for op in edge.layers()} == set(cut.layers)
        np.testing.assert_array_equal(output_integers(edge, x.contiguous(), batch_size=2), seen[edge.output])


def test_an_8_bit_edge_and_a_float_wire_are_close_to_the_float_network():
    net, x = built("Tiny")
    qnet, record = integers(net, x)
    with torch.no_grad():
        whole = net(x)
        for cut in find_cuts(net, x[:1])[1:]:
            edge = integer_edge(qnet, record, cut)
            sent = real_values(edge.tensors[edge.output], output_integers(edge, x.contiguous()))
            logits = split_at(net, cut)[1](torch.from_numpy(sent))
            assert (logits - whole).abs().max() < 0.1 * whole.abs().max()


def test_an_edge_holds_only_what_it_needs():
    net, x = built("resnet20")
    qnet, record = integers(net, x)
    part = integer_edge(qnet, record, next(cut for cut in find_cuts(net, x) if cut.name == "layer1.0"))
    assert part.output == "layer1.0.add"
    assert len(part.ops) < len(record.ops)
    assert set(part.tensors) == {part.input, *(op.output for op in part.ops)}


def test_a_cut_of_another_network_is_refused():
    net, _ = built("Tiny")
    other, y = built("resnet20")
    with pytest.raises(QuantizeError, match=r"cut 9 .*not of this network"):
        split_at(net, find_cuts(other, y)[9])
    with pytest.raises(QuantizeError, match=r"cut 2 .*not of this network"):
        split_at(net, find_cuts(other, y)[2])


def test_a_cut_without_integers_is_refused_with_those_that_have_them():
    net, x = built("Tiny")
    qnet, record = integers(net, x)
    cuts = find_cuts(net, x)
    with pytest.raises(QuantizeError, match=r"after 'image' there is no tensor of integers.*stem, blocks.0"):
        integer_edge(qnet, record, cuts[0])


def test_the_cuts_of_a_quantized_net_are_those_of_its_float_net():
    net, x = built("toynet")
    qnet, _ = integers(net, x)
    assert [b.name for b in blocks(qnet)][:-1] == [c.name for c in find_cuts(net, x)][1:]


def test_the_shipped_network_cut_on_real_images(cifar10_test):
    from hq_lib.studies.bench import shipped

    path = shipped("resnet20")
    if path is None:
        pytest.skip("no ResNet-20 checkpoint is shipped")
    net, _ = models.load_checkpoint(path)
    net.eval()
    x = data.normalize(cifar10_test.images[:16], cifar10_test.spec)
    with torch.no_grad():
        whole = net(x)
        for cut in find_cuts(net, x[:1]):
            edge, cloud = split_at(net, cut)
            assert torch.equal(cloud(edge(x)), whole)
