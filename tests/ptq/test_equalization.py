"""Equalized networks compute the same with like ranges; batch norms measured again have the data's moments."""

import pytest
import torch
from graph_nets import Tiny, images, trained_like
from torch import nn

from hq_lib import ptq
from hq_lib.graph import BitPolicy, QuantizeError, calibrate, quantize
from hq_lib.graph.folding import fold_bn


def uneven() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 2, 6).view(-1, 1, 1, 1))
    return net.eval()


def test_the_function_stays_and_neighbours_have_one_range_a_channel():
    net, x = uneven(), images(4)
    even = ptq.equalize(net, x)
    torch.testing.assert_close(even(x), net(x), atol=1e-4, rtol=1e-4)
    a, b, c = (even.get_submodule(name).weight for name in ("0", "2", "5"))
    first, second, third = a.abs().amax((1, 2, 3)), b.abs().amax((1, 2, 3)), c.abs().amax((0, 2, 3))
    torch.testing.assert_close(first, second, atol=0, rtol=1e-2)
    torch.testing.assert_close(second, third, atol=0, rtol=1e-2)
    assert torch.equal(even.get_submodule("8").bias, net[8].bias) is False  # the two linear layers are a pair too


def test_one_grid_for_a_whole_weight_loses_less_afterwards():
    net, x = uneven(), images(16)
    policy = BitPolicy({"method": "minmax", "bits": 5, "axis": None}, 32, first_last_bits=None)
    errors = [(quantize(n, policy, x)(x) - net(x)).norm() for n in (net, ptq.equalize(net, x))]
    assert errors[1] < errors[0]


def test_nothing_to_even_out_is_refused_and_relu6_left_alone():
    with pytest.raises(QuantizeError, match="fold_bn"):
        ptq.equalize(trained_like(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))), images())
    net, x = trained_like(Tiny()), images()
    folded = fold_bn(net, x)
    with pytest.raises(QuantizeError):  # its activations are ReLU6 but for the stem's, which an addition reads too
        ptq.equalize(folded, x)


def test_norms_measured_again_have_the_moments_of_the_quantized_activations():
    net, batches = trained_like(Tiny()), [images(8, seed=s) for s in range(3)]
    qnet = quantize(net, BitPolicy("minmax:3", "minmax:4"), batches[0])
    calibrate(qnet, torch.cat(batches))
    seen = []
    hook = qnet.stem.register_forward_hook(lambda m, args, out: seen.append(out))
    ptq.reestimate_norms(qnet, batches)
    hook.remove()
    torch.testing.assert_close(qnet.bn.running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    torch.testing.assert_close(qnet.bn.running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))
    assert qnet.bn.momentum == 0.1
    assert not any(module.training for module in qnet.modules())
    with pytest.raises(QuantizeError, match="bn='keep'"):
        ptq.reestimate_norms(uneven(), batches)
