"""Counts against sums by hand; those of whole networks are in test_models."""

import pytest
import torch
from torch import nn

from hq_lib import models


def test_lenet_by_hand():
    convolutions = 784 * 6 * 25 + 100 * 16 * 6 * 25 + 120 * 16 * 25
    assert models.count_macs(models.build("lenet"), (1, 28, 28)) == convolutions + 120 * 84 + 84 * 10


def test_a_transposed_convolution_counts_per_input_element():
    net = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
    assert models.count_macs(net, (4, 5, 5)) == 4 * 25 * 4 * 3


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    assert models.count_macs(Twice(), (3, 4, 4)) == 2 * 16 * 9


@pytest.mark.parametrize(
    ("module", "madds"),
    [
        (nn.BatchNorm2d(4), 2 * 4 * 64),
        (nn.AvgPool2d(8), 4),
        (nn.AvgPool2d(2), 4 * 16),
        (nn.AdaptiveAvgPool2d(1), 4 * 65),
        (nn.AdaptiveAvgPool2d(2), 4 * 4 * 17),
        (nn.MaxPool2d(2), 0),
        (nn.ReLU(), 0),
    ],
)
def test_thops_rules(module, madds):
    assert models.count_madds_thop(nn.Sequential(module), (4, 8, 8)) == madds


def test_counting_leaves_modes_statistics_and_hooks():
    net = models.build("toynet").train()
    net.blocks[0].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    models.count_madds_thop(net, (3, 32, 32))
    assert net.training
    assert net.stem_bn.training
    assert not net.blocks[0].bn.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
