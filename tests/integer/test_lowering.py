"""Lowering: agreement with the fake-quantized graph, what is fused into what, proofs, errors that name the place."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from integer_nets import NETS, POLICIES, float_net, images, quantized
from torch import nn

from hq_lib import data
from hq_lib.graph import BitPolicy, calibrate, quantize, set_quantization
from hq_lib.graph.spec import of_kind
from hq_lib.integer import LowerError, RecordError, agreement, lower, pixel_table, run
from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import accumulator_bound
from hq_lib.integer.check import check


def small(net: nn.Module, policy: BitPolicy, size: int = 8, requantizer="float32"):
    """``net`` quantized, calibrated on noise and lowered."""
    x = images(16, size)
    qnet = quantize(net.eval(), policy, x[:1])
    calibrate(qnet, x)
    return qnet, lower(qnet, requantizer=requantizer)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_integers_are_at_most_one_step_from_the_fake_quantized_graph(net, policy):
    qnet = quantized(net, policy)
    found = agreement(qnet, lower(qnet), images(40, seed=99), forced=True)
    assert {t.name for t in found.tensors} == {site.name for site in qnet.meta["sites"] if site.name in TENSORS(qnet)}
    if policy != "a16":  # at 16 bits a step is near float32's own error in the graph
        assert max(t.largest for t in found.tensors) <= 1
        assert max(t.mismatch_pct for t in found.tensors) <= 4.0
    assert found.same_top1_pct >= 95.0


@pytest.mark.parametrize("bits", [3, 4])
def test_behind_a_rounded_bias_outputs_of_16_bits_part_by_half_a_multiplier(bits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 2))
    policy = BitPolicy(f"minmax:{bits}", "minmax:16", first_last_bits=None, input_bits=4)
    qnet, model = small(net, policy)
    found = {t.name: t.largest for t in agreement(qnet, model, images(16, 8), forced=True).tensors}
    half = float(model.op("0").requant.multiplier.max()) / 2
    assert 2 < found["0"] <= half + 1


def TENSORS(qnet) -> set[str]:
    return {name for name, spec in of_kind(qnet.meta["specs"], "act").items() if not spec.is_float}


def test_batch_norms_kept_or_folded_give_the_same_real_function():
    logits = []
    for bn in ("keep", "fold"):
        policy = BitPolicy(weight="minmax:16", act="minmax:8", first_last_bits=None, bn=bn)
        logits.append(run(lower(quantized("residual", policy)), images(20)))
    assert np.allclose(logits[0], logits[1], atol=0.02 * np.abs(logits[0]).max())


def test_a_norm_with_negative_gain_is_absorbed_by_the_weights_sign():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2)
            self.bn.weight.data = torch.tensor([-0.7, 0.0])
            self.bn.bias.data = torch.tensor([0.1, 0.4])

        def forward(self, x):
            return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    qnet, model = small(Net(), BitPolicy())
    conv = model.op("conv")
    assert (conv.requant.multiplier >= 0).all()
    assert (conv.weight[1] == 0).all()  # gain 0: a constant channel
    assert agreement(qnet, model, images(8, 8), forced=True).tensors[1].largest <= 1


@pytest.mark.parametrize("n_out", [9, 7])
def test_a_norm_over_tokens_is_named(n_out):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, n_out)
            self.bn, self.fc = nn.BatchNorm1d(9), nn.Linear(9 * n_out, 2)

        def forward(self, x):
            y = self.linear(self.conv(x).flatten(2).transpose(1, 2))  # (B, 9 tokens, n_out channels)
            return self.fc(F.relu(self.bn(y)).flatten(1))

    with pytest.raises(LowerError, match=rf"'bn' reads \(9, {n_out}\).*norms the tokens.*'linear' a 1x1"):
        small(Tokens(), BitPolicy())


def test_ops_of_the_two_placements():
    deploy, academic = lower(quantized("residual", "w8a8")), lower(quantized("residual", "academic"))
    assert sum(isinstance(op, r.Add) for op in deploy.ops) == 2
    assert not any(isinstance(op, r.Add) for op in academic.ops)
    fused = [op for op in academic.layers() if op.residual is not None]
    assert [op.name for op in fused] == ["conv2", "conv3"]
    assert academic.tensors[fused[0].residual.tensor].dtype == "int32"
    assert academic.tensors[fused[1].residual.tensor].dtype == "uint8"


def test_low_bit_weights_fill_int8_and_remember_their_step():
    qnet = quantized("residual", "w4a4")
    layer, quantizer = lower(qnet).op("conv1"), qnet.get_submodule("conv1").weight_quantizer
    assert layer.weight.dtype == np.int8
    assert np.abs(layer.weight).max() >= 64
    trained = quantizer.to_int(qnet.get_submodule("conv1").weight).numpy()
    stored = layer.weight // layer.weight_step
    signs = np.sign(stored * trained).reshape(len(trained), -1)
    assert np.array_equal(np.abs(stored), np.abs(trained))
    assert all(len(set(row[row != 0])) <= 1 for row in signs)  # a norm may flip a whole channel, no single weight


def test_the_least_integer_of_int8_does_not_widen_a_layer():
    qnet, model = small(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), BitPolicy(weight="lsq_plus:8", first_last_bits=None)
    )
    weight = qnet.get_submodule("1").weight
    with torch.no_grad():
        weight[:, 0] = -2 * weight.abs().max()  # beyond the calibrated range: the outermost step, -128
    model = lower(qnet)
    assert model.op("1").weight.min() == -128
    assert model.op("1").weight.dtype == np.int8


def test_a_grid_without_zero_is_stored_in_int16():
    model = lower(quantized("residual", "dorefa"))
    assert model.op("conv1").weight.dtype == np.int16
    assert model.op("conv1").weight_bits == 8


def test_relu6_and_clips_are_the_ends_of_the_output_range():
    model = lower(quantized("mobile", "w8a8"))
    grouped = model.tensors["grouped"]
    ends = [float(grouped.scale) * (q - grouped.zero_point) for q in (grouped.qmin, grouped.qmax)]
    assert ends == pytest.approx([-0.5, 0.75], abs=float(grouped.scale))
    assert model.tensors["depth"].qmin == 0


def test_a_dead_channel_keeps_its_bias():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    with torch.no_grad():
        net[0].weight[0] = 0.0
        net[0].weight[1] *= 1e-9
        net[0].bias.copy_(torch.tensor([0.5, 0.25, 0.0]))
    qnet, model = small(net, BitPolicy(), size=4)
    out, values = model.tensors["0"], {}
    run(model, images(2, 4), watch=lambda op, v: values.update({op.output: v}))
    for channel, bias in ((0, 0.5), (1, 0.25)):
        assert np.unique(values["0"][:, channel]).tolist() == [round(bias / float(out.scale))]
    assert agreement(qnet, model, images(8, 4)).same_top1_pct == 100.0


def test_fixed_logits_have_one_scale_so_that_integers_alone_decide():
    model = lower(quantized("residual", "w8a8"), requantizer="fixed")
    out, values = model.tensors[model.output], {}
    logits = run(model, images(20), watch=lambda op, v: values.update({op.output: v}))
    assert out.scale.shape == ()
    assert np.array_equal(values[model.output].argmax(1), logits.argmax(1))


def test_accumulators_never_exceed_their_proved_bound():
    model, worst = lower(quantized("mobile", "w8a8")), {}
    from hq_lib.integer.arithmetic import products

    def engine(op, x, spec):
        acc = products(op, x, spec)
        worst[op.name] = (np.abs(acc).max(), accumulator_bound(op, spec).max())
        return acc

    run(model, images(50) * 100, products=engine)
    assert all(seen <= bound < 2**31 for seen, bound in worst.values())


def test_an_accumulator_that_could_overflow_is_refused_with_layer_and_bound():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(net[1].weight, 1.0)
    policy = BitPolicy(weight="minmax:16", act="minmax:16", first_last_bits=16, input_bits=16)
    with pytest.raises(RecordError, match=r"'1'.*channel \d can reach [\d,]+.*int32"):
        small(net, policy)


@pytest.mark.parametrize("named", ["layer", "add"])
def test_a_multiplier_that_no_shift_holds_is_refused_with_its_operation(named):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2)

        def forward(self, x):
            y = self.layer(x)
            return self.fc((y + x if named == "add" else F.relu(y)).amax((2, 3)))

    net, x = Net().eval(), torch.zeros(4, 3, 4, 4)  # of an image of zeros every grid is that of [-1, 1]
    with torch.no_grad():
        net.layer.weight.fill_(1e14)
    policy = BitPolicy(placement="academic" if named == "add" else "deploy", input_bits=8)
    qnet = quantize(net, policy, x)
    calibrate(qnet, x)
    with pytest.raises(RecordError, match=rf"'{named}': a multiplier of .* is too large.*calibrate"):
        lower(qnet)


@pytest.mark.parametrize("size", [1e-4, 1e-7])
def test_a_network_of_small_numbers_lowers_with_all_its_levels(size):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.mul_(size)
        net[0].bias.mul_(size**2)
    x = images(8, 8) * size
    qnet = quantize(net, BitPolicy(), x[:1])
    calibrate(qnet, x)
    want = net(x).detach().numpy()
    assert np.abs(run(lower(qnet), x) - want).max() < 0.05 * np.abs(want).max()


def test_scales_whose_product_float32_does_not_hold_are_refused_by_layer():
    _, model = small(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), BitPolicy())
    layer = model.op("1")
    scale = np.full(2, 1e-38, np.float32)
    fine = dataclasses.replace(
        layer, weight_scale=scale, acc_scale=np.float32(model.tensors[layer.inputs[0]].scale) * scale
    )
    ops = tuple(fine if op is layer else op for op in model.ops)
    tensors = {**model.tensors, layer.output: dataclasses.replace(model.tensors[layer.output], scale=fine.acc_scale)}
    with pytest.raises(RecordError, match=r"'1': its input's scale times its weights' is below float32's"):
        check(dataclasses.replace(model, ops=ops, tensors=tensors))


def _uneven(layer: nn.Module, axis: int) -> nn.Module:
    """An 8-to-8 layer between two others whose weights differ a hundredfold along ``axis``."""
    shape = [-1 if d == axis else 1 for d in range(4)]
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 8).view(shape))  # type: ignore[operator]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize(("groups", "n_scales"), [(1, 8), (2, 1)])
def test_axis_0_is_the_output_channel_of_transposed_convolutions_too(groups, n_scales):
    net = _uneven(nn.ConvTranspose2d(8, 8, 2, 2, groups=groups), axis=0)
    qnet, model = small(net, BitPolicy({"method": "minmax", "bits": 8, "axis": 0}, "minmax:8"))
    assert qnet.get_submodule("2").weight_quantizer.grid().scale.numel() == n_scales
    x = images(16, 8)
    wanted, logits = qnet(x).detach(), torch.tensor(run(model, x))
    assert float((logits - wanted).norm() / wanted.norm()) < 0.01


def test_scales_of_input_channels_are_refused_by_layer():
    policy = BitPolicy({"method": "minmax", "bits": 8}, overrides={"2": {"weight": {"axis": 1}}})
    with pytest.raises(LowerError, match=r"layer '2': weight scales of shape \(1, 8, 1, 1\) are not one per output"):
        small(_uneven(nn.Conv2d(8, 8, 3), axis=1), policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (BitPolicy(placement="academic"), "'x'.*no quantizer.*policy.input_bits"),
        (BitPolicy(overrides={"conv1": {"weight": "float"}}), "layer 'conv1'.*weight is in float"),
        (BitPolicy(overrides={"conv1": {"act": "float"}}), "no quantizer.*conv2.*overrides={'conv1': {'act': 8}}"),
        (BitPolicy(act="lsq:1", first_last_bits=8), "1-bit grid"),
    ],
)
def test_what_stands_in_the_way_is_named(policy, message):
    with pytest.raises(LowerError, match=message):
        lower(quantized("residual", policy))


def test_a_quantizer_that_is_switched_off_is_named():
    qnet = quantized("residual", "w8a8")
    set_quantization(qnet, weights=True, acts=False)
    with pytest.raises(LowerError, match=r"'x'.*switched off"):
        lower(qnet)


def test_no_policy_is_asked_for_a_tensor_that_none_knows():
    qnet = quantized("residual", BitPolicy(overrides={"conv1": {"act": "float"}}))
    qnet.meta["sites"] = tuple(site for site in qnet.meta["sites"] if site.name != "conv1")
    with pytest.raises(LowerError, match=r"no policy gives it one here.*placement='deploy'"):
        lower(qnet)


def test_a_float_network_is_told_to_be_quantized_first():
    with pytest.raises(LowerError, match=r"Residual is no quantized graph: make one with graph\.quantize"):
        lower(float_net("residual"))


def test_unknown_requantizers_are_refused():
    with pytest.raises(LowerError, match="'float64'"):
        lower(quantized("residual", "w8a8"), requantizer="float64")  # type: ignore[arg-type]


def test_pictures_are_compared_batch_by_batch(pictures_read):
    pictures, read = pictures_read
    qnet, model = small(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)), BitPolicy(), 12)
    found = agreement(qnet, model, pictures, batch_size=4)
    assert read == [4, 4, 2]
    assert found[:2] == agreement(qnet, model, data.normalize(pictures.images, pictures.spec), batch_size=4)[:2]
    assert found.integer_acc_pct is not None


def test_raw_pixels_by_table_equal_normalised_images(digits):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10))
    x = data.normalize(digits.images[:64], digits.spec)
    qnet = quantize(net.eval(), BitPolicy(), x[:1])
    calibrate(qnet, x)
    model = lower(qnet, images=digits.spec)
    from hq_lib.integer import quantize as to_integers
    from hq_lib.integer.execute import normalized

    table, pixels, wanted = pixel_table(model), digits.images[:64].numpy(), to_integers(model, x)
    assert table.shape == (3, 256)
    assert all(np.array_equal(table[c][pixels[:, c]], wanted[:, c]) for c in range(3))
    assert np.array_equal(normalized(model, pixels), x.numpy())
    found = agreement(qnet, model, digits.subset(list(range(64))))
    assert abs(found.fake_quant_acc_pct - found.integer_acc_pct) <= 100 / 64
    with pytest.raises(RecordError, match="images=spec"):
        pixel_table(lower(qnet))
