"""Calibration, switches and the report: determinism, what is fitted to what, and numbers counted by hand."""

import math

import pytest
import torch
from graph_nets import Branches, Tiny, images, trained_like
from torch import nn

from hq_lib import data, models
from hq_lib.graph import (
    BitPolicy,
    PolicyError,
    QuantizeError,
    act_quantizers,
    calibrate,
    quantize,
    set_quantization,
    state,
    weight_layers,
)
from hq_lib.quantizers import act_quantizer

POLICY = BitPolicy("lsq:4", "lsq:4")


def grids(qnet) -> dict[str, float]:
    return {name: quantizer.grid().scale.item() for name, quantizer in act_quantizers(qnet).items()}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(Tiny())


def test_calibration_is_the_same_in_one_batch_in_many_and_in_little_memory(net, monkeypatch):
    x, found = images(8), []
    ways = (x, 1024, 8), (x.split(3), 1024, 8), (iter(x.split(2)), 1024, 8), (x, 1024, 3), (x, 0, 8)
    for batches, budget, together in ways:
        monkeypatch.setattr(state, "BUDGET_MIB", budget)
        monkeypatch.setattr(state, "PASS_NUMBERS", together * x[0].numel())
        qnet = quantize(net, POLICY, x[:1])
        calibrate(qnet, batches)
        found.append(grids(qnet))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert found[0] == pytest.approx(found[3], rel=1e-5)
    assert found[0] == found[4]


def test_images_pass_together_up_to_a_number_and_large_ones_by_32():
    assert [len(part) for part in state.passes(torch.zeros(1024, 3, 32, 32))] == [1024]
    assert [len(part) for part in state.passes(torch.empty(150, 3, 224, 224))] == [64, 64, 22]
    assert [len(part) for part in state.passes(torch.empty(5, 3, 1500, 1500))] == [1] * 5


def test_calibration_sees_float_activations_and_leaves_modes_switches_and_statistics(net):
    x = images(8)
    qnet = quantize(net, BitPolicy("minmax:8", "minmax:2", input_bits=2), x).train()
    before = qnet.bn.running_mean.clone()
    calibrate(qnet, x, quantized_weights=False)
    assert torch.equal(qnet.bn.running_mean, before)
    assert all(module.training for module in qnet.modules())
    assert all(quantizer.enabled for quantizer in act_quantizers(qnet).values())
    assert all(layer.weight_quantizer.enabled for layer in weight_layers(qnet).values())
    stem = torch.relu(net.bn(net.stem(x)))  # not of a 2-bit image
    assert qnet.relu_act_quantizer.grid().scale.item() == pytest.approx(stem.max().item() / 3, rel=1e-6)


def test_quantized_weights_make_other_activations(net):
    x, scales = images(8), []
    for quantized_weights in (True, False):
        qnet = quantize(net, BitPolicy("minmax:2", "minmax:8"), x)
        calibrate(qnet, x, quantized_weights=quantized_weights)
        scales.append(grids(qnet))
    assert scales[0] != scales[1]
    assert scales[0]["x_act_quantizer"] == scales[1]["x_act_quantizer"]


def test_a_shared_grid_is_fitted_to_all_its_tensors():
    net, x = Branches().eval(), images(8)
    nn.init.constant_(net.b.bias, 7.0)
    qnet = quantize(net, BitPolicy("minmax:8", "minmax:8"), x)
    calibrate(qnet, x, quantized_weights=False)
    a = torch.relu(net.a(x))
    both = torch.cat([a.flatten(), net.b(a).flatten(), torch.zeros(1)])
    want = (both.max() - both.min()) / 255
    assert qnet.relu_act_quantizer.grid().scale.item() == pytest.approx(want.item(), rel=1e-5)


class Joined(nn.Module):
    """Two branches of very different size on one grid."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(8, 2)
        with torch.no_grad():
            self.b.weight.mul_(20)

    def branches(self, x):
        return torch.relu(self.a(x)), torch.relu(self.b(x))

    def forward(self, x):
        return self.fc(torch.cat(self.branches(x), 1).amax((2, 3)))


@pytest.mark.parametrize("method", ["minmax", "lsq", "pact"])
def test_a_shared_grid_is_not_fitted_to_its_first_tensor_alone(method):
    x = images(2)
    qnet = quantize(Joined(), BitPolicy("minmax:8", f"{method}:8"), x).train()
    with pytest.raises(RuntimeError, match=r"of 'a'\) quantizes 2 tensors on one grid.*graph\.calibrate"):
        qnet(x)
    calibrate(qnet, x)
    qnet(x)


@pytest.mark.parametrize(("method", "bits"), [("minmax", 8), ("minmax", 1), ("aciq", 8)])
def test_the_running_range_of_a_shared_grid_is_that_of_all_its_tensors(method, bits):
    torch.manual_seed(0)
    net, x, new = Joined(), images(4), 3 * images(4, seed=2)
    qnet = quantize(net, BitPolicy("minmax:8", f"{method}:{bits}", input_bits=32), x)
    calibrate(qnet, x, quantized_weights=False)
    before = qnet.relu_act_quantizer.high.clone()
    fresh = act_quantizer(method, bits, signed=False)
    fresh.init_from(torch.cat([y.flatten() for y in net.branches(new)]))
    qnet.train().relu_act_quantizer(100 * new)  # a pass that broke off
    with set_quantization(qnet, weights=False, acts=None):
        for _ in range(2):
            qnet.train()(new)
    wanted = before + (1 - 0.9**2) * (fresh.high - before)
    torch.testing.assert_close(qnet.relu_act_quantizer.high, wanted)


def test_operations_in_place_do_not_reach_what_was_collected():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = torch.relu_(self.a(x))
            out = self.b(y)
            out += y
            return self.fc(torch.relu_(out))

    net, x = InPlace().eval(), images(8)
    qnet = quantize(net, BitPolicy("minmax:8", "minmax:8"), x)
    calibrate(qnet, x, quantized_weights=False)
    out = net.b(torch.relu(net.a(x)))
    want = (out.max().clamp(min=0) - out.min().clamp(max=0)) / 255
    assert qnet.b_act_quantizer.grid().scale.item() == pytest.approx(want.item(), rel=1e-5)
    qnet.train()(x).square().sum().backward()
    assert torch.isfinite(qnet.a.weight.grad).all()


def test_only_some_quantizers_can_be_fitted(net):
    qnet = quantize(net, BitPolicy.hybrid(2, 8, overrides={"blocks.1.*": {"act": 2}}), images())
    calibrate(qnet, images(8))
    before = grids(qnet)
    calibrate(qnet, 2 * images(8), only=lambda quantizer: quantizer.bits >= 4)
    after = grids(qnet)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name, q in act_quantizers(qnet).items() if q.bits == 8}


def test_batches_with_labels_and_image_sets_calibrate_like_their_images(net):
    pixels = torch.randint(0, 256, (8, *images().shape[1:]), dtype=torch.uint8)
    few = data.ImageSet(pixels, torch.zeros(8, dtype=torch.int64), data.SPECS["digits"])
    x = data.normalize(few.images, few.spec)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, few.labels), batch_size=3)
    found = []
    for batches in (x, few, loader, [x[:5], x[5:]]):
        qnet = quantize(net, POLICY, images())
        calibrate(qnet, batches)
        found.append(grids(qnet))
    assert found[0] == found[1] == found[2] == found[3]


def test_bad_calibration_data_is_refused(net):
    qnet = quantize(net, POLICY, images())
    with pytest.raises(QuantizeError, match="at least one image"):
        calibrate(qnet, [])
    with pytest.raises(QuantizeError, match="at least one image"):
        calibrate(qnet, images()[:0])
    with pytest.raises(QuantizeError, match=r"got a dict among them"):
        calibrate(qnet, [{"x": images()}])  # type: ignore[list-item]
    with pytest.raises(QuantizeError, match=r"torch\.uint8: data\.normalize"):
        calibrate(qnet, (images() * 50).to(torch.uint8))
    with pytest.raises(ValueError, match="layer 'stem' does not accept"):
        calibrate(qnet, images()[:, :1])
    with pytest.raises(ValueError, match=r"activation quantizer 'x_act_quantizer'.*NaN"):
        calibrate(qnet, images() * math.nan)


def test_switches_give_float_weights_only_and_activations_only(net):
    x = images(8)
    qnet = quantize(net, BitPolicy("minmax:2", "minmax:2"), x)
    calibrate(qnet, x)
    outputs = {}
    for switches in ((False, False), (True, False), (False, True), (True, True)):
        set_quantization(qnet, weights=switches[0], acts=switches[1])
        outputs[switches] = qnet(x)
    assert torch.equal(outputs[False, False], net(x))
    weights_only = quantize(net, BitPolicy("minmax:2", 32), x)
    assert torch.equal(outputs[True, False], weights_only(x))
    assert len({o.sum().item() for o in outputs.values()}) == 4


def test_switches_can_be_limited(net):
    qnet = quantize(net, BitPolicy.hybrid(2, 8, overrides={"fc": {"weight": 8}}), images())
    set_quantization(qnet, weights=False, acts=False, only=lambda quantizer: quantizer.bits >= 4)
    on = [name for name, layer in weight_layers(qnet).items() if layer.weight_quantizer.enabled]
    assert "fc" not in on
    assert len(on) == 10
    assert not any(q.enabled for q in act_quantizers(qnet).values())


def test_the_report_counts_what_can_be_counted_by_hand():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 100, 5)), images(2)
    policy = BitPolicy("minmax:4", "minmax:2", first_last_bits=None, overrides={"3": {"weight": 8}})
    qnet = quantize(net.eval(), policy, x)
    table = policy.report(qnet).set_index(["layer", "tensor"])
    assert table.loc[("0", "weight"), "macs"] == 4 * 100 * 27
    assert table.loc[("3", "weight"), "macs"] == 400 * 5
    assert table.loc[("0", "weight"), "n_params"] == 108
    assert table.loc[("3", "weight"), "size_KiB"] == 2000 * 8 / 8192
    assert list(table.loc[("input", "activation"), ["bits", "n_elements", "signed"]]) == [8, 432, True]
    assert list(table.loc[("0", "activation"), ["bits", "n_elements", "signed"]]) == [2, 400, False]
    assert table.attrs["avg_w_bits"] == pytest.approx((108 * 4 + 2000 * 8) / 2108)
    assert table.attrs["avg_a_bits"] == pytest.approx((432 * 8 + 400 * 2) / 832)
    assert table.attrs["n_macs"] == 12800
    assert "W minmax:4" in table.attrs["policy"]


def test_the_report_shows_scales_once_they_exist(net):
    qnet = quantize(net, BitPolicy("minmax:4", "minmax:8", overrides={"stem": {"weight": 32}}), images())
    before = qnet.policy.report(qnet).set_index(["layer", "tensor"])
    assert before.loc[("blocks.0.expand", "weight"), "n_scales"] == 16
    assert before.loc[("stem", "weight"), "method"] == "float"
    assert math.isnan(before.loc[("stem", "weight"), "scale"])
    assert math.isnan(before.loc[("stem", "activation"), "scale"])
    calibrate(qnet, images())
    after = qnet.policy.report(qnet).set_index(["layer", "tensor"])
    assert after.loc[("stem", "activation"), "scale"] == qnet.relu_act_quantizer.grid().scale.item()


def test_macs_and_parameters_of_resnet20_are_the_published_ones():
    qnet = quantize(models.build("resnet20"), BitPolicy(), torch.zeros(1, 3, 32, 32))
    table = qnet.policy.report(qnet)
    assert table.attrs["n_macs"] == 40_813_184
    assert len(table[table.tensor == "weight"]) == 22


def test_reports_want_a_quantized_net_and_its_own_policy(net):
    with pytest.raises(PolicyError, match="another policy"):
        BitPolicy().report(quantize(net, POLICY, images()))
    with pytest.raises(PolicyError, match="or by none"):
        POLICY.report(torch.fx.symbolic_trace(net))
