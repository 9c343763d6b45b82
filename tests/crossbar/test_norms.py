"""Batch-norm re-estimation on engines: what a batch norm in training mode does, on measured outputs."""

import numpy as np
import pytest
import torch
from integer_nets import float_net, images
from torch import nn

from hq_lib.crossbar import Circuit, CrossbarError, EngineNetwork, IdealEngine, SimEngine, state_independent
from hq_lib.crossbar.calibration import norm_moments, reestimate_norms
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import lower, run


def made(engine, name="residual"):
    net, x = float_net(name), images(48, seed=5)
    qnet = quantize(net, BitPolicy("minmax:8", "minmax:12", bn="fold"), x[:1])
    calibrate(qnet, torch.cat([x, 3 * x]))  # room for what re-estimation enlarges
    return net, EngineNetwork(lower(qnet), engine), x


def batch_statistics(net, x):
    """Logits of ``net`` with batch norms that use the statistics of ``x`` itself: PyTorch's own re-estimation."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 0.0
    with torch.no_grad():
        return net(x).numpy()


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_without_errors_it_is_a_batch_norm_in_training_mode(name):
    net, network, x = made(IdealEngine(), name)
    x = 0.6 * x  # other statistics than the stored ones, within the input's grid
    stored = run(network.model, x)
    wanted = batch_statistics(net, x)
    reestimate_norms(network, x, norm_moments(float_net(name)))
    got = network.run(x, batch_size=len(x))
    assert np.abs(got - wanted).mean() < 0.4 * np.abs(stored - wanted).mean()
    assert np.abs(got - wanted).mean() < 0.1 * np.abs(wanted).mean()


def test_every_channel_has_its_norm_s_moments_again():
    net, network, x = made(SimEngine(Circuit(state_independent(0.05))))
    moments = norm_moments(net)
    reestimate_norms(network, x, moments)
    seen = {}

    def look(op, x_int, spec):
        acc = network.products(op, x_int, spec)
        if op.name in moments:
            real = (acc + op.bias[:, None, None]) * op.acc_scale[:, None, None]
            seen[op.name] = real.mean((0, 2, 3)), real.std((0, 2, 3))
        return acc

    run(network.model, x, batch_size=len(x), products=look)
    assert set(seen) == set(moments) == {"stem", "conv1", "conv2", "down"}
    for name, (mean, std) in seen.items():
        assert mean == pytest.approx(moments[name].mean.numpy(), abs=1e-3)
        assert std == pytest.approx(moments[name].std.numpy(), rel=1e-3, abs=1e-3)


def test_it_undoes_any_gain_and_shift_of_columns():
    class Tilted(IdealEngine):
        def _measure(self, handle, x):
            y = super()._measure(handle, x).double()
            return y * torch.linspace(0.5, 1.5, y.shape[1]) + 40.0

    net, plain, x = made(IdealEngine())
    _, tilted, _ = made(Tilted())
    for network in (plain, tilted):
        network.reset()
    norms = norm_moments(net)
    first = reestimate_norms(plain, x, norms)["stem"]
    second = reestimate_norms(tilted, x, norms)["stem"]
    slope = torch.linspace(0.5, 1.5, 6).double()
    assert torch.allclose(second.gain * slope, first.gain)
    assert torch.allclose(second.offset + 40 * second.gain, first.offset)


def test_a_dead_column_stays_finite():
    class Dead(IdealEngine):
        def _measure(self, handle, x):
            y = super()._measure(handle, x).double()
            y[:, 0] = 0.0
            return y

    net, network, x = made(Dead())
    found = reestimate_norms(network, x, norm_moments(net))
    assert all(torch.isfinite(c.gain).all() and torch.isfinite(c.offset).all() for c in found.values())
    assert np.isfinite(network.run(x)).all()


def test_networks_without_batch_norms_are_refused():
    with pytest.raises(CrossbarError, match="no batch norm"):
        norm_moments(float_net("joined"))
    net, network, x = made(IdealEngine())
    only_last = EngineNetwork(network.model, {"fc": IdealEngine()})
    with pytest.raises(CrossbarError, match="no layer on an engine"):
        reestimate_norms(only_last, x, norm_moments(net))
