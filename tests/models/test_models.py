import pytest
import torch
from torch import nn

from hq_lib import models

CIFAR = ("resnet20", "toynet", "mobilenetv2", "mobilenetv2_seed", "vgg11", "vgg_small")


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("resnet20", {}, 272_474),
        ("resnet20", {"option": "A"}, 269_722),
        ("resnet56", {"option": "A"}, 853_018),
        ("toynet", {}, 203_626),
        ("mobilenetv2_seed", {}, 2_383_050),
        ("mobilenetv2", {}, 2_296_922),
        ("lenet", {}, 61_470 + 236),
        ("vgg11", {}, 28_146_762),
        ("vgg11", {"width": 0.5, "hidden": 512}, 2_304_864 + 2 * 1_376 + 2 * (256 * 256 + 256) + 2_570),
        ("resnet18", {}, 11_689_512),
        ("resnet50", {}, 25_557_032),
        ("resnet101", {}, 44_549_160),
        ("mobilenetv2_imagenet", {}, 3_504_872),
        ("regnetx_600m", {}, 6_196_040),
    ],
)
def test_parameter_counts(name, options, parameters):
    assert models.count_parameters(models.build(name, **options)) == parameters


@pytest.mark.parametrize(
    ("name", "macs", "madds"),
    [
        ("resnet20", 40_813_184, 41_214_656),
        ("toynet", 25_265_152, 25_601_536),
        ("mobilenetv2_seed", 95_054_336, 98_645_504),
    ],
)
def test_operation_counts_of_the_seed(name, macs, madds):
    net = models.build(name)
    assert models.count_macs(net, (3, 32, 32)) == macs
    assert models.count_madds_thop(net, (3, 32, 32)) == madds


def test_macs_by_hand():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))
    assert models.count_macs(net, (4, 8, 8)) == 6 * 4 * 4 * 2 * 9 + 96 * 5


def test_counting_leaves_the_network_alone():
    net = models.build("resnet20").train()
    models.count_macs(net, (3, 32, 32))
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("name", CIFAR)
def test_logits_and_gradients(name):
    net = models.build(name, n_classes=7)
    logits = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", [*CIFAR, "lenet"])
def test_it_traces(name):
    net = models.build(name).eval()
    x = torch.randn(2, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_the_image_decides_the_input_channels():
    assert models.build("resnet20", in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_pads_with_zeros():
    from hq_lib.models.small import PadShortcut

    x = torch.randn(1, 4, 6, 6)
    y = PadShortcut(4, 8, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


def test_block_is_the_published_formula():
    block = models.build("resnet20").layer2[0].eval()
    x = torch.randn(2, 16, 8, 8)
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(inner + block.shortcut[1](block.shortcut[0](x))))


def test_toynet_block_is_residual():
    block = models.build("toynet").blocks[2].eval()
    with torch.no_grad():
        block.project.weight.zero_()
    x = torch.randn(1, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_relu1_clips():
    net = models.build("lenet", relu1=True)
    seen = []
    net.fc1.register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0]))
    net(torch.randn(4, 1, 28, 28) * 50)
    assert 0 <= seen[0].min() <= seen[0].max() <= 1


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"unknown network 'resnt20'.*did you mean 'resnet20'"):
        models.build("resnt20")
    with pytest.raises(ValueError, match="resnet20 has no option 'width': it has option"):
        models.build("resnet20", width=2)
    with pytest.raises(ValueError, match="option 'C'"):
        models.build("resnet20", option="C")
    with pytest.raises(ValueError, match="takes RGB"):
        models.build("resnet18", in_channels=1)
    with pytest.raises(ValueError, match=r"resnet18 n_classes=2\.5: a whole number of at least 1"):
        models.build("resnet18", n_classes=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width inf: a positive factor"):
        models.build("vgg_small", width=float("inf"))
    with pytest.raises(ValueError, match="hidden=-1: a layer has at least one unit"):
        models.build("vgg11", hidden=-1)  # became one unit without a word


def test_same_seed_same_weights():
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(models.build("toynet"))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_hidden_units_need_a_hidden_layer():
    with pytest.raises(ValueError, match="no hidden linear layer"):
        models.build("vgg_small", hidden=512)
