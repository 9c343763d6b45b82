"""Quantized layers: equal to their float layer, and the fold of running statistics with its gradients and updates."""

import copy

import pytest
import torch
from graph_nets import Tiny, images, trained_like
from torch import nn

from hq_lib.graph import (
    BitPolicy,
    FoldedNorm,
    PolicyError,
    QuantConv2d,
    QuantConvBn2d,
    QuantConvTranspose2d,
    QuantLinear,
    QuantLinearBn,
    bake_norms,
    calibrate,
    freeze_statistics,
    quantize,
    weight_layers,
)
from hq_lib.quantizers import weight_quantizer

FOLDED = BitPolicy(weight=32, act=32, bn="fold_train")


def pair(bias: bool = True) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    trained_like(bn)
    return conv, bn


@pytest.mark.parametrize(
    ("form", "layer", "shape"),
    [
        (QuantConv2d, nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (2, 4, 9, 9)),
        (QuantConv2d, nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 9, 9)),
        (QuantLinear, nn.Linear(4, 6), (2, 5, 4)),
        (QuantConvTranspose2d, nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    ],
)
def test_without_a_quantizer_a_layer_equals_its_float_layer(form, layer, shape):
    x = torch.randn(shape)
    quantized = form.from_float(layer)
    assert torch.equal(quantized(x), layer(x))
    assert quantized.weight is layer.weight
    assert repr(layer).split("(")[1] in repr(quantized)


def test_a_quantized_layer_computes_with_its_quantized_weight():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    quantizer = weight_quantizer("minmax", 3)
    quantized = QuantConv2d.from_float(layer, quantizer)
    want = nn.functional.conv2d(x, quantizer(layer.weight), layer.bias)
    assert torch.equal(quantized(x), want)
    assert not torch.equal(quantized(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_fold_equals_convolution_and_norm_in_eval_mode(bias, affine):
    conv, _ = pair(bias)
    bn = nn.BatchNorm2d(4, affine=affine)
    assert bn.running_mean is not None
    bn.running_mean.uniform_(-1, 1)
    net = nn.Sequential(conv, bn).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(QuantConvBn2d.with_norm(conv, bn).eval()(x), net(x), atol=1e-12, rtol=1e-12)


def test_a_linear_layer_folds_its_norm():
    linear, bn = nn.Linear(3, 4), trained_like(nn.BatchNorm1d(4))
    x = torch.randn(6, 3)
    want = nn.Sequential(linear, bn).eval()(x)
    torch.testing.assert_close(QuantLinearBn.with_norm(linear, bn).eval()(x), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dead", [False, True])
def test_training_a_float_fold_is_training_convolution_and_norm(bias, dead):
    """Outputs, gradients and running statistics; a channel with gamma = 0 included."""
    conv, bn = pair(bias)
    bn.weight.data[1] *= not dead
    bn.weight.data[2] *= -1
    folded = QuantConvBn2d.with_norm(copy.deepcopy(conv), copy.deepcopy(bn)).double().train()
    net = nn.Sequential(conv, bn).double().train()
    x = torch.randn(8, 3, 10, 10, dtype=torch.float64)
    y, want = folded(x), net(x)
    torch.testing.assert_close(y, want, atol=1e-4 if dead else 1e-9, rtol=1e-9)
    torch.testing.assert_close(folded.bn.running_mean, bn.running_mean)
    torch.testing.assert_close(folded.bn.running_var, bn.running_var)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(folded.weight.grad, conv.weight.grad, atol=1e-3 if dead else 1e-9, rtol=1e-6)
    torch.testing.assert_close(folded.bn.weight.grad, bn.weight.grad, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(folded.bn.bias.grad, bn.bias.grad, atol=1e-9, rtol=1e-6)


def test_a_linear_layers_norm_trains_likewise():
    linear, bn = nn.Linear(3, 4), trained_like(nn.BatchNorm1d(4))
    x = torch.randn(16, 3)
    folded = QuantLinearBn.with_norm(copy.deepcopy(linear), copy.deepcopy(bn)).train()
    torch.testing.assert_close(folded(x), bn.train()(linear(x)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.bn.running_mean, bn.running_mean)
    torch.testing.assert_close(folded.bn.running_var, bn.running_var)


def test_frozen_train_mode_computes_what_eval_mode_does():
    conv, bn = pair()
    folded, x = QuantConvBn2d.with_norm(conv, bn, weight_quantizer("minmax", 4)), torch.randn(2, 3, 8, 8)
    want = folded.eval()(x)
    assert not torch.equal(copy.deepcopy(folded).train()(x), want)
    freeze_statistics(folded)
    assert torch.equal(folded.train()(x), want)


def test_gradients_reach_weight_gain_and_shift_through_the_fold():
    conv, bn = pair()
    x = torch.randn(2, 3, 6, 6)
    folded = QuantConvBn2d.with_norm(conv, bn).double().train()
    folded.statistics_frozen = True
    parameters = (folded.weight, folded.bn.weight, folded.bn.bias, folded.bias)

    def run(*_):
        return folded(x.double())

    assert torch.autograd.gradcheck(run, parameters)


def test_freezing_ends_the_updates_and_thawing_resumes_them():
    conv, bn = pair()
    folded, x = QuantConvBn2d.with_norm(conv, bn).train(), torch.randn(2, 3, 8, 8)
    before = folded.bn.running_var.clone()
    freeze_statistics(folded)
    folded(x)
    assert torch.equal(folded.bn.running_var, before)
    freeze_statistics(folded, frozen=False)
    folded(x)
    assert not torch.equal(folded.bn.running_var, before)


def test_freezing_plain_norms_puts_them_in_eval_mode():
    net = Tiny().train()
    freeze_statistics(net)
    assert not net.bn.training
    assert net.stem.training
    freeze_statistics(net, frozen=False)
    assert net.bn.training


def test_the_graph_folds_every_norm_that_follows_a_layer():
    net, x = trained_like(Tiny()), images()
    qnet = quantize(net, FOLDED, x)
    assert sum(isinstance(layer, FoldedNorm) for layer in weight_layers(qnet).values()) == 10
    assert not any(node.name.startswith("bn") for node in qnet.graph.nodes)
    torch.testing.assert_close(qnet(x), net(x))


def test_folded_weights_are_what_is_quantized_and_what_baking_keeps():
    net, x = trained_like(Tiny()), images()
    qnet = quantize(net, BitPolicy("lsq:4", "lsq:4", bn="fold_train"), x)
    calibrate(qnet, x)
    layer = qnet.stem
    gain = net.bn.weight / torch.sqrt(net.bn.running_var + net.bn.eps)
    w_hat = layer.weight_quantizer(net.stem.weight * gain.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(layer.quantized_weight(), w_hat)
    baked = bake_norms(qnet)
    assert torch.equal(baked(x), qnet(x))
    assert not any(isinstance(m, FoldedNorm | nn.BatchNorm2d) for m in baked.modules())
    assert all(layer.bias is not None for layer in weight_layers(baked).values())


def test_training_with_folded_norms_lowers_the_loss_and_leaves_eval_consistent():
    torch.manual_seed(0)
    net, x = trained_like(Tiny()), images(32)
    labels = torch.arange(32) % 5
    qnet = quantize(net, BitPolicy("lsq:4", "lsq:4", bn="fold_train"), x).train()
    optimiser = torch.optim.SGD(qnet.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(90):  # the statistics settle at the small rate before they are frozen
        freeze_statistics(qnet, frozen=step >= 75)
        optimiser.param_groups[0]["lr"] = 0.05 if step < 50 else 0.002
        loss = nn.functional.cross_entropy(qnet(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        want = qnet.train()(x)
        qnet.eval().drop.train()  # dropout draws anew; all else is frozen
        torch.manual_seed(1)
        one = qnet(x)
        qnet.train()
        torch.manual_seed(1)
        assert torch.equal(qnet(x), one)
    assert want.shape == one.shape


def test_weights_that_lose_their_magnitude_cannot_fold_while_training():
    weight = {"method": "dorefa", "bits": 4, "keep_magnitude": False}
    with pytest.raises(PolicyError, match=r"bn='fold_train'.*magnitude"):
        quantize(Tiny(), BitPolicy(weight, "lsq:4", bn="fold_train"), images())
