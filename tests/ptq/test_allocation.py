"""ACIQ's weights in a graph: bits per channel on their grids, moments through the integers; errors by block."""

import pytest
import torch
from graph_nets import Branches, Tiny, images, trained_like
from torch import nn

from hq_lib import integer, ptq
from hq_lib.graph import BitPolicy, QuantizeError, act_quantizers, quantize, save, weight_layers
from hq_lib.models import read_checkpoint
from hq_lib.ptq import allocation
from hq_lib.ptq.allocation import channel_grid
from hq_lib.ptq.units import as_float


class Net(nn.Module):
    """Convolution, depthwise convolution, linear; channels of very different widths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)
        with torch.no_grad():
            self.b.weight *= torch.logspace(-2, 1, 8, base=2).view(-1, 1, 1, 1)

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def made(bits=3, **policy):
    x = images(16, size=8)
    qnet = quantize(Net().eval(), BitPolicy(f"minmax:{bits}", "lsq_plus:8", **policy), x[:1]).eval()
    ptq.fit_acts(qnet, x)
    return qnet, x


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 6])
def test_a_channels_values_round_to_its_own_levels_and_no_more(bits):
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(50, 9, generator=generator) + torch.linspace(-3, 3, 50).view(-1, 1)
    widths = torch.full((50,), bits)
    widths[-1] = 8
    grid = channel_grid(w, widths)
    levels = torch.round(w / grid.scale) + grid.zero_point
    assert levels.min() >= 0
    assert levels[:-1].max() <= 2**bits - 1
    assert grid.qmax == 255
    inside = (grid.scale * (levels - grid.zero_point) - w).abs() <= 0.5 * grid.scale * (1 + 1e-5)
    assert inside.all()


def test_wide_channels_get_more_bits_and_the_average_is_the_policys():
    qnet, _ = made(first_last_bits=8)
    found = ptq.fit_allocated(qnet)
    assert list(found) == ["b"]
    assert found["b"].double().mean() == 3
    assert torch.equal(found["b"].sort().values, found["b"])  # the widths were made to grow
    layer = weight_layers(qnet)["b"]
    for channel, bits in zip(layer.quantized_weight(), found["b"], strict=True):
        assert len(channel.unique()) <= 2 ** int(bits)
    assert weight_layers(qnet)["fc"].weight_quantizer.grid().qmax == 127


def test_the_integers_count_the_bits_that_a_file_takes(tmp_path):
    qnet, x = made(bits=3, placement="deploy")
    ptq.fit_allocated(qnet)
    ptq.fit_acts(qnet, x)
    save(qnet, tmp_path / "net.safetensors", form="frozen", record={})
    file, _ = read_checkpoint(tmp_path / "net.safetensors")
    for op in integer.lower(qnet).layers():
        packed = file[f"{op.name}.weight_quantizer.x_int"]
        assert packed.numel() == -(-op.weight.size * op.weight_bits // 8)


def test_allocation_beats_equal_bits_in_squared_error():
    equal, _ = made()
    ptq.fit_weights(equal, "minmax")
    shared, _ = made()
    ptq.fit_allocated(shared)
    errors = [
        (weight_layers(net)["b"].quantized_weight() - Net().b.weight).square().sum().item() for net in (equal, shared)
    ]
    assert errors[1] < errors[0]


def test_correction_restores_each_channels_mean_output_and_its_weights_norm():
    qnet, x = made(bits=2)
    ptq.fit_allocated(qnet)
    found = ptq.correct_moments(qnet, x)
    assert list(found) == ["a", "b", "fc"]
    layer, net = weight_layers(qnet)["fc"], Net().eval()
    seen = []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    qnet(x)
    handle.remove()
    inputs, y = seen[0]
    with torch.no_grad():
        # mean and norm of the weights are restored, so the mean output is the float layer's wherever mean input is flat
        rounded = layer.weight_quantizer(layer.weight) / found["fc"].gain.view(-1, 1).float()
        w = (found["fc"].gain.view(-1, 1) * rounded + found["fc"].offset.view(-1, 1)).float()
    assert torch.allclose(w.mean(1), net.fc.weight.mean(1), atol=1e-6)
    assert torch.allclose(w.std(1), net.fc.weight.std(1), atol=1e-6)
    assert torch.allclose(y.mean(0), nn.functional.linear(inputs, w, net.fc.bias).mean(0), atol=1e-5)


@pytest.mark.parametrize("correct", [False, True])
def test_the_integers_say_the_same(correct):
    qnet, x = made(bits=3, placement="deploy")
    ptq.fit_allocated(qnet)
    if correct:
        before = {name: layer.weight_quantizer.to_int(layer.weight) for name, layer in weight_layers(qnet).items()}
        ptq.correct_moments(qnet, x)
        for name, layer in weight_layers(qnet).items():
            assert torch.equal(layer.weight_quantizer.to_int(layer.weight), before[name])
    logits = torch.from_numpy(integer.run(integer.lower(qnet), x.numpy()))
    with torch.no_grad():
        assert torch.equal(logits.argmax(1), qnet(x).argmax(1))
        assert torch.allclose(logits, qnet(x), atol=0.05)


def test_what_cannot_be_corrected_is_named():
    x = images(4)
    qnet = quantize(trained_like(Branches()), BitPolicy("minmax:4", "float"), x[:1])
    with pytest.raises(QuantizeError, match=r"'up' .*only convolutions and linear"):
        ptq.correct_moments(qnet, x)
    whole = quantize(Net().eval(), BitPolicy({"method": "minmax", "bits": 4, "axis": None}, "float"), x[:1])
    with pytest.raises(QuantizeError, match="one grid for all"):
        ptq.fit_allocated(whole)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.gates = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, groups=3)

    def forward(self, x):
        return self.gates(self.shared(self.shared(x).relu()))


def test_what_would_be_done_wrong_without_a_word_is_named():
    """A layer that runs twice has two shifts and one bias; one weight has no spread that bits could go by."""
    qnet = quantize(Twice().eval(), BitPolicy("minmax:4", "lsq_plus:8", first_last_bits=None), images(4))
    with pytest.raises(QuantizeError, match="'shared' runs twice"):
        ptq.correct_means(qnet, images(4))
    with pytest.raises(QuantizeError, match="'gates': its channels have one weight"):
        ptq.fit_allocated(qnet)


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "aciq"])
def test_a_tensor_that_is_all_0_in_calibration_keeps_a_step_that_holds_numbers(method):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    qnet = quantize(net.eval(), BitPolicy("minmax:8", "lsq_plus:8"), images(4))
    with torch.no_grad():
        qnet.get_submodule("0").bias.fill_(-1e6)
    ptq.fit_acts(qnet, images(4), method)
    steps = [float(q.step_size.detach()) for q in act_quantizers(qnet).values() if hasattr(q, "step_size")]
    assert min(steps) > 1e-3, steps


def test_block_errors_are_the_relative_squared_errors_and_0_without_quantization():
    qnet, x = made(bits=2)
    found = ptq.block_errors(qnet, qnet, x)
    assert [name for name, _ in found] == ["a", "b", "fc"]
    with torch.no_grad():
        y, target = qnet(x), Net().eval()(x)
    assert found[-1][1] == pytest.approx(float((y - target).square().sum() / target.square().sum()), rel=1e-5)
    with as_float(qnet):
        assert all(error < 1e-12 for _, error in ptq.block_errors(qnet, qnet, x))
    with pytest.raises(ValueError, match="other blocks"):
        ptq.block_errors(qnet, quantize(trained_like(Tiny()), BitPolicy(), x[:1]), x)


def test_bit_allocation_example():
    bits = allocation.allocate_bits(torch.tensor([1.0, 1.0, 8.0]), 4).tolist()
    assert (sorted(bits[:2]), bits[2]) == ([3, 4], 5)  # the formula's (3, 3, 5) and one bit more to meet the average


def test_bit_allocation_meets_its_limits():
    assert allocation.allocate_bits(torch.ones(5), 3).tolist() == [3] * 5
    assert allocation.allocate_bits(torch.tensor([0.0, 0.0]), 4).tolist() == [0, 0]
    assert allocation.allocate_bits(torch.tensor([0.0, 1.0]), 4).tolist() == [0, 8]
    wide = torch.tensor([1e-9, 1.0, 1e9])
    assert allocation.allocate_bits(wide, 2).tolist() == [0, 0, 6]  # no bit for the negligible
    spreads = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 5
    assert int(allocation.allocate_bits(spreads, 4).sum()) == 256
    for bad in ({"spreads": -spreads, "bits": 4}, {"spreads": spreads, "bits": 9}):
        with pytest.raises(ValueError, match=r"negative|need 0\.\.8"):
            allocation.allocate_bits(**bad)


def coarse(w: torch.Tensor, levels: int = 3) -> torch.Tensor:
    scale = w.abs().amax(tuple(range(1, w.dim())), keepdim=True) / levels
    return scale * torch.clamp(torch.round(w / scale.clamp(min=1e-9)), -levels, levels)


def corrected(correction: allocation.Correction, w_hat: torch.Tensor) -> torch.Tensor:
    shape = (-1, *[1] * (w_hat.dim() - 1))
    return (correction.gain.view(shape) * w_hat.double() + correction.offset.view(shape)).to(w_hat.dtype)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (5, 40), (6, 1, 3, 3)])
def test_bias_correction_restores_mean_and_norm(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    w_hat = coarse(w)
    fixed = corrected(allocation.bias_correction(w, w_hat), w_hat.double()).flatten(1)
    real = w.double().flatten(1)
    torch.testing.assert_close(fixed.mean(1), real.mean(1), rtol=1e-6, atol=0)
    centred, want = fixed - fixed.mean(1, keepdim=True), real - real.mean(1, keepdim=True)
    torch.testing.assert_close(centred.norm(dim=1), want.norm(dim=1), rtol=1e-6, atol=0)
    assert ((coarse(w) - w).flatten(1).mean(1).abs() > 1e-4).any()  # it had something to restore


def test_bias_correction_of_constant_channels():
    w = torch.stack([torch.zeros(9), torch.full((9,), 0.2), torch.linspace(-0.01, 0.01, 9)])
    w_hat = torch.stack([torch.zeros(9), torch.full((9,), 0.25), torch.zeros(9)])
    correction = allocation.bias_correction(w, w_hat)
    assert correction.gain.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(corrected(correction, w_hat).mean(1), w.mean(1))
    with pytest.raises(ValueError, match="differ in shape"):
        allocation.bias_correction(w, w_hat[:2])


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"stride": 2, "padding": 1, "groups": 2}, {"dilation": 2}])
def test_correction_survives_the_integer_form(geometry):
    """Same integers, new scale and bias: the mean output per channel is that of the exactly corrected weight."""
    generator = torch.Generator().manual_seed(2)
    layer = nn.Conv2d(4, 6, 3, **geometry).double()
    x = torch.rand(16, 4, 9, 9, generator=generator).double()
    scale = layer.weight.detach().abs().amax((1, 2, 3)) / 3
    w_int = torch.clamp(torch.round(layer.weight.detach() / scale.view(-1, 1, 1, 1)), -3, 3)
    correction = allocation.bias_correction(layer.weight, scale.view(-1, 1, 1, 1) * w_int)
    new_scale, new_bias = allocation.absorb(
        correction, scale=scale, bias=layer.bias, window_sum=allocation.window_sum_mean(x, layer)
    )
    with torch.no_grad():
        exact = layer._conv_forward(x, corrected(correction, scale.view(-1, 1, 1, 1) * w_int), layer.bias)
        integer = layer._conv_forward(x, w_int, None) * new_scale.view(1, -1, 1, 1) + new_bias.view(1, -1, 1, 1)
    torch.testing.assert_close(integer.mean((0, 2, 3)), exact.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    assert (correction.offset.abs() > 1e-6).any()


def test_absorb_creates_a_bias_and_window_sums_of_a_linear_layer():
    layer, x = nn.Linear(3, 2, bias=False), torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    sums = allocation.window_sum_mean(x, layer)
    assert sums.tolist() == [6.0, 6.0]
    correction = allocation.Correction(torch.tensor([2.0, 1.0]).double(), torch.tensor([0.5, 0.0]).double())
    scale, bias = allocation.absorb(correction, scale=torch.tensor(0.1), bias=None, window_sum=sums)
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.1]))
    torch.testing.assert_close(bias, torch.tensor([3.0, 0.0]))
    with pytest.raises(ValueError, match="zero padding"):
        allocation.window_sum_mean(torch.ones(1, 1, 4, 4), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
