"""Noise-aware fine-tuning: noise of the stated size in training only, gradients at the noisy point, resumable."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from hq_lib import data
from hq_lib.training import TrainConfig, fit
from hq_lib.training.weight_noise import WeightNoise, weight_noise


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def tiny(n, seed=0):
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=random, dtype=torch.uint8)
    return data.ImageSet(pixels, torch.arange(n) % 3, data.SPECS["digits"], "train", torch.arange(n))


def test_noise_has_its_size_per_channel_and_no_bias():
    torch.manual_seed(0)
    w = torch.tensor([[1.0, -0.5], [10.0, 2.0]]).expand(20_000, 2, 2).permute(1, 2, 0).reshape(2, -1)
    errors = WeightNoise(0.05)(w) - w
    n = errors.shape[1]
    for channel, largest in enumerate((1.0, 10.0)):
        sd = 0.05 * largest
        assert abs(float(errors[channel].mean())) < 5 * sd / n**0.5
        assert abs(float(errors[channel].var()) / sd**2 - 1) < 5 * (2 / n) ** 0.5
    assert torch.equal(WeightNoise(0.05).eval()(w), w)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_channels_of_a_transposed_convolution_are_its_outputs(groups):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 40, groups=groups)
    n, sizes = 6 // groups, torch.logspace(0, 2, 6)
    with torch.no_grad():
        for out in range(6):
            layer.weight.view(groups, 4 // groups, n, 40, 40)[out // n, :, out % n] = sizes[out]
    clean = layer.weight.detach().clone()
    with weight_noise(layer, 0.03):
        errors = ((layer.weight - clean) / clean).detach().view(groups, 4 // groups, 6 // groups, -1)
    for channel in errors.movedim(2, 1).reshape(6, -1):
        assert abs(float(channel.var()) / 0.03**2 - 1) < 5 * (2 / channel.numel()) ** 0.5


def test_a_layer_called_twice_in_a_pass_is_one_array():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) - self.layer(x), self.layer(x)

    model, x = Twice(), torch.randn(2, 3)
    with weight_noise(model, 0.1):
        (apart, first), (_, second) = model(x), model(x)
    assert not apart.any()
    assert not torch.equal(first, second)


def test_clean_weights_stay_and_come_back():
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    with weight_noise(model.train(), 0.1) as noisy:
        assert noisy is model
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
        model.train()
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before if "weight" in key)


def test_drive_and_converter_round_what_enters_and_leaves_a_layer_in_training_only():
    layer, x = nn.Linear(3, 2), torch.randn(50, 3, requires_grad=True)

    def stepped(values, bits):
        step = float(values.detach().abs().max()) / (2 ** (bits - 1) - 1)
        return (values / step).round() * step

    with weight_noise(layer, 0.0, drive_bits=4, converter_bits=3):
        y = layer(x)
        y.sum().backward()
        ideal = layer.eval()(x)
    wanted = stepped(nn.functional.linear(stepped(x, 4), layer.weight, layer.bias), 3)
    assert torch.allclose(y, wanted, atol=1e-6)
    assert len(y.unique()) <= 7
    assert torch.equal(ideal, nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(50, 3))  # type: ignore[arg-type]
    assert not torch.allclose(layer(x), stepped(layer(x), 3))
    with pytest.raises(ValueError, match="converter_bits must be 2 to 16"), weight_noise(layer, 0.0, converter_bits=1):
        pass


def test_the_gradient_is_that_of_the_noisy_point():
    layer = nn.Linear(3, 2, bias=False)
    x = torch.randn(5, 3)
    with weight_noise(layer, 0.2):
        torch.manual_seed(3)
        (layer(x) ** 2).sum().backward()
        got = layer.parametrizations["weight"].original.grad.clone()  # type: ignore[index]
    torch.manual_seed(3)
    noise = 0.2 * layer.weight.detach().abs().amax(1, keepdim=True) * torch.randn_like(layer.weight)
    point = (layer.weight.detach() + noise).requires_grad_()
    ((x @ point.T) ** 2).sum().backward()
    assert torch.allclose(got, point.grad)  # type: ignore[arg-type]


def test_training_with_noise_resumes_bit_identically(tmp_path):
    config = TrainConfig(epochs=2, batch_size=10, lr=0.05)
    images = tiny(30)

    def trained(folder, stops=()):
        model = net()
        for _ in (*stops, None):

            def stop(module, epoch, stops=stops):
                if epoch in stops and not (folder / "stopped").exists():
                    (folder / "stopped").touch()
                    raise KeyboardInterrupt

            try:
                with weight_noise(model, 0.05):
                    fit(model, images, images, config, folder, before_epoch=stop, say=None)
            except KeyboardInterrupt:
                model = net(seed=9)
        return model.state_dict()

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts", stops=(1,))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_fit_takes_the_noise_as_an_option():
    images, states = tiny(30), {}
    config = TrainConfig(epochs=1, batch_size=10, lr=0.05)
    for name, sigma in (("clean", 0.0), ("option", 0.05), ("by hand", 0.0)):
        model = net()
        with weight_noise(model, 0.05) if name == "by hand" else nullcontext():
            fit(model, images, images, replace(config, weight_noise=sigma), say=None)
        states[name] = model.state_dict()
    assert states["option"].keys() == states["clean"].keys()
    assert all(torch.equal(states["option"][key], states["by hand"][key]) for key in states["option"])
    assert not torch.equal(states["option"]["0.weight"], states["clean"]["0.weight"])
    with pytest.raises(ValueError, match=r"TrainConfig\.weight_noise = 3"):
        TrainConfig(epochs=1, lr=0.05, weight_noise=3)


@pytest.mark.parametrize("sigma", [-0.1, 5.0])
def test_percent_for_a_fraction_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma"), weight_noise(net(), sigma):
        pass


def test_networks_without_layers_and_nested_blocks_are_refused():
    with pytest.raises(ValueError, match="no plain convolution"), weight_noise(nn.ReLU(), 0.1):
        pass
    model = net()
    with weight_noise(model, 0.1), pytest.raises(ValueError, match="parametrized already"), weight_noise(model, 0.1):
        pass
