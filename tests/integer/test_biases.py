"""Rounded biases: the integers stay, the fake-quantized network comes to them; closed form by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from integer_nets import images, quantized
from torch import nn

from hq_lib import ptq
from hq_lib.graph import BitPolicy, quantize
from hq_lib.integer import LowerError, agreement, lower, round_biases

FOUR = BitPolicy(weight="minmax:4", act="lsq_plus:4", bn="fold")


def test_one_layer_by_hand() -> None:
    # x on 16 levels of 1/4; w on 15 steps of 0.1 from -0.75, stored as steps of 0.1 / 16: an accumulator step is 1/640
    net, bias = nn.Sequential(nn.Linear(1, 1)).eval(), 192.4 / 640
    with torch.no_grad():
        net[0].weight.fill_(0.75)
        net[0].bias.fill_(bias)
    qnet = quantize(
        net, BitPolicy(weight="minmax:4", act="lsq_plus:4", input_bits=4, first_last_bits=None), images(1)[:, 0, 0, :1]
    )
    ptq.fit_weights(qnet, "minmax", scheme="symmetric")
    ptq.fit_acts(qnet, torch.linspace(0, 3.75, 16).reshape(-1, 1), "minmax")
    changes = round_biases(qnet)
    assert changes == {"0": pytest.approx(0.4 / 640, rel=1e-3)}
    assert qnet.get_submodule("0").bias.item() == pytest.approx(192 / 640, rel=1e-6)


@pytest.mark.parametrize("bn", ["fold", "keep"])
@pytest.mark.parametrize("name", ["residual", "mobile", "joined"])
def test_the_integers_stay_and_the_graph_comes_to_them(name: str, bn: str) -> None:
    qnet = quantized(name, replace(FOUR, bn=bn))
    before, x = lower(qnet), images(64, seed=3)
    rough = agreement(qnet, before, x, forced=True)
    changes = round_biases(qnet)
    after = lower(qnet)
    assert set(changes) == {op.name for op in after.layers()}
    for old, new in zip(before.layers(), after.layers(), strict=True):
        np.testing.assert_array_equal(old.bias, new.bias)
        np.testing.assert_array_equal(old.weight, new.weight)
        assert changes[old.name] <= 0.5001 * float(old.acc_scale.max())
    fine = agreement(qnet, after, x, forced=True)
    n_rough, n_fine = (sum(t.n_differ for t in found.tensors) for found in (rough, fine))
    assert n_fine <= n_rough / 5, (n_fine, n_rough)
    again = round_biases(qnet)
    assert all(value <= 1e-6 * changes[key] + 1e-7 for key, value in again.items()), "a second call changes nothing"


def test_a_subtracted_layer_keeps_the_sign_of_its_bias() -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """fc(mean(a(x) - b(x)))."""
            return self.fc((self.a(x) - self.b(x)).mean((2, 3)))

    qnet = quantize(Difference().eval(), replace(FOUR, placement="academic", input_bits=8), images(1))
    ptq.fit_acts(qnet, images(8), "minmax")
    before = qnet.get_submodule("b").bias.detach().clone()
    round_biases(qnet)
    steps = {op.name: float(op.acc_scale.max()) for op in lower(qnet).layers()}
    assert (qnet.get_submodule("b").bias - before).abs().max() <= 0.5001 * max(steps.values())


def test_a_layer_whose_result_nothing_uses_is_left_as_it_is() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """fc(mean(x)), beside a layer that runs for nothing."""
            self.idle(x)
            return self.fc(x.mean((2, 3)))

    qnet = quantize(Idle().eval(), replace(FOUR, bn="keep"), images(1))
    ptq.fit_acts(qnet, images(8), "minmax")
    before = qnet.get_submodule("idle").bias.detach().clone()
    assert set(round_biases(qnet)) == {"fc"}
    assert torch.equal(qnet.get_submodule("idle").bias, before)


def test_a_layer_that_runs_twice_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Apply the layer twice."""
            return self.conv(torch.relu(self.conv(x)))

    torch.manual_seed(0)
    qnet = quantize(Twice().eval(), FOUR, images(1))
    ptq.fit_acts(qnet, images(8), "minmax")
    with pytest.raises(LowerError, match="runs more than once"):
        round_biases(qnet)
