"""Blocks found from cut points: names, members, chain of inputs and outputs, and that a cut block is the net's own."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from graph_nets import Branches, Tiny, images, trained_like
from torch import nn

from hq_lib import models, ptq
from hq_lib.graph import BitPolicy, QuantizeError, blocks, calibrate, extract_block, quantize
from hq_lib.graph.tracing import trace

NETS = {"Tiny": Tiny, "Branches": Branches}
SIZES = {"Tiny": 12, "Branches": 12, "lenet": 28}
NAMES = ["Tiny", "Branches", "lenet", "resnet20", "toynet", "mobilenetv2", "vgg11"]


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    net = trained_like(NETS[name]() if name in NETS else models.build(name))
    channels = next(p for p in net.parameters() if p.dim() == 4).shape[1]
    return net, images(2, SIZES.get(name, 32))[:, :channels]


def test_inverted_residuals_are_blocks_with_or_without_identity():
    found = blocks(Tiny())
    assert [b.name for b in found] == ["stem", "blocks.0", "blocks.1", "blocks.2", "fc"]
    assert [b.residual for b in found] == [False, True, False, True, False]
    assert found[1].layers == ("blocks.0.expand", "blocks.0.depthwise", "blocks.0.project")


def test_resnet20_has_a_stem_nine_basic_blocks_and_a_classifier():
    found = blocks(models.build("resnet20"))
    assert [b.name for b in found[1:-1]] == [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)]
    assert [len(b.layers) for b in found] == [1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 1]
    assert all(b.residual for b in found[1:-1])


def test_vgg_is_cut_into_single_layers():
    found = blocks(models.build("vgg11"))
    assert all(len(b.layers) == 1 and not b.residual for b in found)


def test_norms_and_activations_end_a_block_and_pools_begin_one():
    found = blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)))
    assert [(b.input, b.output) for b in found] == [("input_1", "_2"), ("_2", "_4")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", ["deploy", "academic"])
def test_the_blocks_run_one_after_another_are_the_network(name, placement):
    net, x = built(name)
    policy = BitPolicy("minmax:8", "minmax:8", placement=placement)
    qnet = quantize(net, policy, x)
    calibrate(qnet, x)
    for gm in (trace(net), qnet):
        y = x
        for block in blocks(gm):
            y = extract_block(gm, block)(y)
        assert torch.equal(y, gm(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_net_has_the_blocks_of_its_float_net(name):
    net, x = built(name)
    qnet = quantize(net, BitPolicy(bn="keep"), x)
    same = [[(b.name, b.layers, b.residual) for b in blocks(gm)] for gm in (net, qnet)]
    assert same[0] == same[1]


def test_blocks_chain_and_cover_every_node():
    gm = trace(Branches())
    found = blocks(gm)
    assert [b.input for b in found[1:]] == [b.output for b in found[:-1]]
    covered = [name for b in found for name in b.nodes]
    assert covered == [n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output")]


def test_an_extracted_block_shares_its_parameters_and_mode():
    net, x = built("Tiny")
    qnet = quantize(net, BitPolicy("lsq:4", "lsq:4"), x).train()
    qnet(x)
    cut = extract_block(qnet, blocks(qnet)[1])
    assert cut.get_submodule("blocks.0.expand") is qnet.get_submodule("blocks.0.expand")
    cut.eval()(torch.randn(2, 8, 12, 12)).sum().backward()
    assert qnet.get_submodule("blocks.0.expand").weight.grad is not None


def test_a_block_of_another_graph_or_one_that_is_not_closed_is_refused():
    gm = trace(Tiny())
    block = blocks(gm)[1]
    with pytest.raises(QuantizeError, match="not of this graph"):
        extract_block(trace(Branches()), block)
    with pytest.raises(QuantizeError, match="cannot be cut out: node"):
        extract_block(gm, dataclasses.replace(block, input="fc"))
    with pytest.raises(QuantizeError, match="at least one layer"):
        blocks(nn.Sequential(nn.ReLU()))


def test_a_net_of_two_outputs_is_not_reconstructed_for_the_last_of_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return {"a": self.a(x), "b": self.b(x)}

    qnet = quantize(Two(), BitPolicy("minmax:4", "lsq_plus:4"), images())
    calibrate(qnet, images())
    with pytest.raises(QuantizeError, match=r"one output tensor.* and 2 outputs"):
        ptq.reconstruct(qnet, images(), ptq.qdrop(iterations=1, n_images=4, batch_size=4))


def test_a_shape_taken_before_the_cut_is_named():
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            n = x.size(0)
            return self.fc(F.relu(self.conv(x)).amax((2, 3)).view(n, -1))

    gm = trace(Shaped())
    found = blocks(gm)
    assert [b.name for b in found] == ["conv", "fc"]
    with pytest.raises(QuantizeError, match=r"reads 'size' from before it"):
        extract_block(gm, found[1])
