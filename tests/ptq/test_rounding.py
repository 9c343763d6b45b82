"""AdaRound's quantizer against its closed form, and ranges against the L_p search."""

import pytest
import torch
from graph_nets import Tiny, images, trained_like

from hq_lib import ptq
from hq_lib.graph import BitPolicy, QuantizeError, act_quantizers, calibrate, quantize, weight_layers
from hq_lib.graph.tracing import trace
from hq_lib.quantizers import AdaRound, FixedGrid, Grid, dequantize
from hq_lib.quantizers.lp_grid import lp_search

WEIGHT = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
GRID = Grid(torch.linspace(0.2, 0.4, 5).reshape(5, 1, 1, 1), torch.tensor(3.0).expand(5, 1, 1, 1), 0, 7)


def between(low, high):
    return (WEIGHT / GRID.scale > low) & (WEIGHT / GRID.scale < high)


def test_it_starts_at_the_float_weight_where_that_is_not_clipped():
    q = AdaRound(WEIGHT, GRID, bits=3)
    q.soft = True
    inside = between(-3.0, 4.0)
    assert inside.float().mean() > 0.5
    assert torch.allclose(q(WEIGHT)[inside], WEIGHT[inside], atol=1e-6)
    below = between(-99.0, -3.0)
    assert torch.equal(q(WEIGHT)[below], (GRID.scale * -3).expand_as(WEIGHT)[below])


def test_before_learning_the_hard_weight_is_rounded_to_nearest():
    assert torch.equal(AdaRound(WEIGHT, GRID, bits=3)(WEIGHT), FixedGrid(GRID, bits=3)(WEIGHT))


def test_hard_rounding_is_floor_or_ceil_by_the_sign_of_v():
    q = AdaRound(WEIGHT, GRID, bits=3)
    up = torch.rand(WEIGHT.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    q.v.data = torch.where(up, 0.3, -0.3)
    wanted = torch.where(up, torch.floor(WEIGHT / GRID.scale) + 1, torch.floor(WEIGHT / GRID.scale)) + 3
    assert torch.equal(q.to_int(WEIGHT), wanted.clamp(0, 7).to(torch.int32))


def test_values_are_exactly_the_integers_on_the_named_grid():
    q = AdaRound(WEIGHT, GRID, bits=3)
    x_int, grid = q.integers(WEIGHT)
    assert torch.equal(q(WEIGHT), dequantize(x_int, grid))
    q.soft = True
    with pytest.raises(RuntimeError, match="still soft"):
        q.to_int(WEIGHT)


def of_fractions(h: list[float]) -> AdaRound:
    return AdaRound(torch.tensor(h), Grid(torch.tensor(1.0), torch.tensor(0.0), 0, 3), bits=2, axis=None)


def test_logits_start_where_the_rectified_sigmoid_is_the_fraction():
    h = torch.linspace(0, 1, 21)[:-1]
    assert torch.allclose(of_fractions(h.tolist()).h(), h, atol=1e-6)
    assert of_fractions([0.5]).v.item() == pytest.approx(0.0, abs=1e-6)  # sigmoid(0) = 1/2


@pytest.mark.parametrize("beta", [2.0, 5.0, 20.0])
def test_gradient_of_the_regulariser_is_the_closed_form(beta):
    q = of_fractions([0.05, 0.3, 0.5, 0.8, 0.97])
    h = q.h()
    h.retain_grad()
    q.h = lambda: h
    q.regulariser(beta).backward()
    d = 2 * h.detach() - 1
    assert torch.allclose(h.grad, -2 * beta * d.abs() ** (beta - 1) * d.sign(), atol=1e-5)
    assert of_fractions([0.5]).regulariser(beta).item() == pytest.approx(1)
    q.v.data = torch.tensor([-9.0, 9.0])
    del q.h
    assert q.regulariser(beta).item() == 0  # all decided


def test_the_logits_gradient_is_the_step_times_the_sigmoids_slope():
    q = AdaRound(WEIGHT, GRID, bits=3)
    q.soft = True
    q(WEIGHT).sum().backward()
    inside = between(-2.9, 3.9)
    s = torch.sigmoid(q.v.detach())
    assert torch.allclose(q.v.grad[inside], (GRID.scale * 1.2 * s * (1 - s))[inside], rtol=1e-4)
    assert (q.v.grad[between(5.0, 99.0)] == 0).all()


def test_all_zero_weights_stay_zero_and_are_decided():
    qnet = quantize(trained_like(Tiny()), BitPolicy("minmax:4", "float", bn="keep"), images(1))
    torch.nn.init.zeros_(qnet.get_submodule("fc").weight)
    ptq.fit_weights(qnet)
    layer = weight_layers(qnet)["fc"]
    q = AdaRound(layer.weight, layer.weight_quantizer.grid(), bits=8)
    assert torch.equal(q(layer.weight), torch.zeros_like(layer.weight))
    assert q.undecided() == 0


def test_another_weight_or_a_nan_is_refused():
    q = AdaRound(WEIGHT, GRID, bits=3)
    with pytest.raises(ValueError, match="made for a weight of shape"):
        q(WEIGHT[:2])
    with pytest.raises(ValueError, match="NaN or Inf"):
        AdaRound(torch.full_like(WEIGHT, torch.nan), GRID, bits=3)


def test_weight_ranges_are_the_searchs_per_channel():
    qnet = quantize(trained_like(Tiny()), BitPolicy("minmax:3", "float", bn="fold"), images(1))
    ptq.fit_weights(qnet, "mse")
    layer = weight_layers(qnet)["blocks.1.project"]
    found = lp_search(layer.weight, bits=3, axis=0)
    grid = layer.weight_quantizer.grid()
    assert torch.equal(grid.scale, found.scale)
    assert torch.equal(grid.zero_point, found.zero_point)
    assert weight_layers(qnet)["fc"].weight_quantizer.grid().qmin == -127


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "aciq"])
@pytest.mark.parametrize("act", ["lsq_plus:4", "lsq:4", "minmax:4"])
def test_every_range_method_reaches_every_activation_quantizer(method, act):
    x = images(6)
    qnet = quantize(trained_like(Tiny()), BitPolicy("float", act, bn="fold"), x[:1])
    ptq.fit_acts(qnet, x, method)
    for quantizer in act_quantizers(qnet).values():
        assert "_fit" not in quantizer.__dict__
        assert quantizer.grid().scale > 0
        assert quantizer.initialised
    assert torch.isfinite(qnet.eval()(x)).all()


@pytest.mark.parametrize("act", ["lsq_plus:8", "lsq:8", "minmax:8"])
def test_activations_of_any_size_keep_their_levels_or_it_is_said(act, recwarn):
    x, net = images(6), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.ReLU())
    qnet = quantize(net, BitPolicy("float", act, bn="fold"), x[:1]).eval()
    for size in (1.0, 1e-9, 1e-12):
        ptq.fit_acts(qnet, size * x)
        assert (qnet(size * x) - net(size * x)).norm() < 0.03 * net(size * x).norm()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="few levels are left"):
        ptq.fit_acts(qnet, 1e-20 * x)


def test_minmax_of_a_relu_output_is_its_maximum():
    x, net = images(6), trained_like(Tiny())
    qnet = quantize(net, BitPolicy("float", "lsq_plus:4", bn="fold"), x[:1])
    ptq.fit_acts(qnet, x, "minmax")
    highest = torch.relu(net.bn(net.stem(x))).max().item()
    grid = act_quantizers(qnet)["relu_act_quantizer"].grid()
    assert float(grid.scale * grid.qmax) == pytest.approx(highest, rel=1e-5)


@pytest.mark.parametrize("prior", ["Laplace", "Normal"])
def test_at_two_bits_the_clip_of_three_levels_is_the_best_one(prior):
    torch.manual_seed(0)
    x = getattr(torch.distributions, prior)(0.0, 1.0).sample((20_000,))

    def error(scale):
        return (scale * torch.clamp(torch.round(x / scale), -1, 1) - x).square().mean().item()

    found = {m: ptq.find_grid(x, bits=2, method=m, scheme="symmetric_restricted") for m in ("aciq", "aciq_official")}
    best = min(error(scale) for scale in torch.linspace(0.5, 4, 200))
    assert error(found["aciq"].scale) < 1.01 * best
    assert error(found["aciq_official"].scale) > 1.15 * best


def test_unsuitable_methods_are_named():
    net, x = trained_like(Tiny()), images(2)
    qnet = quantize(net, BitPolicy("dorefa:4", "pact:4", bn="fold"), x[:1])
    with pytest.raises(QuantizeError, match=r"'stem'.*dorefa:8"):
        ptq.fit_weights(qnet)
    with pytest.raises(QuantizeError, match=r"PACT.*act='lsq_plus'"):
        ptq.fit_acts(qnet, x)
    with pytest.raises(ValueError, match="did you mean 'mse'"):
        ptq.fit_weights(qnet, "mes")


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "aciq", "aciq_official"])
@pytest.mark.parametrize("act", ["minmax", "lsq"])
def test_activations_with_a_grid_per_channel_keep_it(method, act):
    net, x = trained_like(Tiny()), images(8)
    policy = BitPolicy("minmax:4", {"method": act, "bits": 4, "axis": 1}, first_last_bits=None, pool_bits=32)
    qnet = quantize(net, policy, x[:1])
    ptq.fit_acts(qnet, x, method)
    name = "relu_act_quantizer"
    scale = act_quantizers(qnet)[name].grid().scale
    assert scale.shape == (1, 8, 1, 1)
    values = torch.relu(net.bn(net.stem(x)))
    alone = [ptq.find_grid(values[:, c], bits=4, method=method, signed=False).scale for c in range(8)]
    torch.testing.assert_close(scale.flatten(), torch.stack(alone))
    assert torch.isfinite(qnet(x)).all()


def test_pooled_channels_are_searched_without_a_warning(request):
    """What PyTorch says once a process is said, and an error, each time."""
    torch.set_warn_always(True)
    request.addfinalizer(lambda: torch.set_warn_always(False))
    pooled = torch.randn(16, 4, 1, 1)
    scale = ptq.find_grid(pooled, bits=4, method="mse", axis=1).scale.flatten()
    alone = [ptq.find_grid(pooled[:, c], bits=4, method="mse").scale for c in range(4)]
    torch.testing.assert_close(scale, torch.stack(alone))


@pytest.mark.parametrize("call", [
    lambda net, x: ptq.fit_weights(net), lambda net, x: ptq.fit_acts(net, x), lambda net, x: calibrate(net, x),
    lambda net, x: ptq.correct_moments(net, x), lambda net, x: ptq.reconstruct(net, x, ptq.qdrop(n_images=None)),
], ids=["fit_weights", "fit_acts", "calibrate", "correct_moments", "reconstruct"])  # fmt: skip
def test_a_float_network_is_refused(call):
    with pytest.raises(QuantizeError, match=r"Tiny has no quantized layer.*quantize\("):
        call(trace(Tiny().eval()), images(4))


def test_the_published_range_takes_laplace_whatever_the_data_look_like():
    """relu(N(0, 1)) at 4 bits: mean 0.399, E|x - mean| 0.462, the table's 6.20: 3.26; a Gauss fit gives 2.11."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).clamp(min=0)
    found = ptq.find_grid(x, bits=4, method="aciq_official", signed=False)
    assert float(found.scale * found.qmax) == pytest.approx(0.3989 + 6.2048 * 0.4616, rel=5e-3)
