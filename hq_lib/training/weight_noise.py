"""Noise-aware fine-tuning: weights with fresh Gaussian errors in every training step, the clean ones updated.

    w_noisy = w + sigma max|w_column| xi,    xi ~ N(0, 1) once per step         Joshi et al. 2020, "Methods"; Rasch 2023

    x_driven = s round(x / s),   y_read = s round(y / s),    s = max|.| / (2^(bits - 1) - 1), of the batch

The second line, on demand, is what drive and converter do to whatever enters and leaves a layer; its gradient is that
of the identity (straight through). The gradient is taken at the noisy point and moves the clean weights:

    fit(net, train, val, replace(config, weight_noise=0.03), run_dir)

Departure from Joshi et al.: weights are not clipped (theirs are, to a few standard deviations), so one large weight
sets the noise of its whole channel.

``fit`` seeds every epoch, so a run with noise resumes bit-identically too. Evaluation is always of the clean weights.
A training loop of one's own goes into ``with weight_noise(net, 0.03):``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hq_lib.graph.layers import layer_kind


class WeightNoise(nn.Module):
    """A parametrization that adds noise to a weight in training mode, the same until ``renew``.

    Args:
        sigma:      standard deviation as a fraction of the largest |w| of the output channel, in [0, 1).
        transposed: groups of a transposed convolution, whose output channels are on axis 1; 0 of other layers.

    Gradient: that of the identity; the noise's scale is a constant.
    """

    def __init__(self, sigma: float, transposed: int = 0) -> None:
        super().__init__()
        if not 0 <= sigma < 1:
            raise ValueError(f"weight noise sigma must be in [0, 1), got {sigma}")
        self.sigma, self.transposed = float(sigma), transposed
        self.noise: Tensor | None = None

    def renew(self) -> None:
        """Draw anew at the next use."""
        self.noise = None

    def forward(self, w: Tensor) -> Tensor:
        """``w`` (N, ...) with noise in training mode, ``w`` itself in eval mode."""
        if not self.training or self.sigma == 0:
            return w
        if self.noise is None:
            self.noise = self.sigma * self._largest(w.detach().abs()) * torch.randn_like(w)
        return w + self.noise

    def _largest(self, size: Tensor) -> Tensor:
        if not self.transposed:
            return size.flatten(1).amax(1).view(-1, *[1] * (size.ndim - 1))
        grouped = size.unflatten(0, (self.transposed, -1))
        return grouped.amax((1, *range(3, grouped.ndim)), keepdim=True).expand_as(grouped).reshape_as(size)


def _renew(net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for module in net.modules():
        if isinstance(module, WeightNoise):
            module.renew()


def _stepped(x: Tensor, bits: int) -> Tensor:
    """``x`` on the steps of a drive or converter of ``bits``, both signs, whose range its largest fills."""
    step = x.detach().abs().amax().clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    return x + ((x / step).round() * step - x).detach()


@contextmanager
def weight_noise(net: nn.Module, sigma: float, *, drive_bits: int = 0, converter_bits: int = 0) -> Iterator[nn.Module]:
    """``net`` itself, whose convolutions and linear layers have noisy weights while the block lasts and it trains.

    Each call of ``net`` draws anew; a layer that it calls twice is one array, with one draw.

    Args:
        sigma: see ``WeightNoise``: the error of a weight. Where columns fill the window, a pair of cells that each err
            by s of it is a weight that errs by sqrt(2) s: 0.03 stands for cells that err by 2.1 % of the window.
        drive_bits, converter_bits: what inputs and outputs of these layers go through, 2..16, signs included; 0: ideal.

    Errors: no plain convolution or linear layer, or a weight that has a parametrization already.
    """
    if not (sigma or drive_bits or converter_bits):
        yield net
        return
    for what, bits in (("drive_bits", drive_bits), ("converter_bits", converter_bits)):
        if bits and not 2 <= bits <= 16:
            raise ValueError(f"{what} must be 2 to 16, or 0 for ideal ones, got {bits}")
    layers = {name: module for name, module in net.named_modules() if layer_kind(module)}
    if not layers:
        raise ValueError("the network has no plain convolution or linear layer to add noise to")
    taken = [name for name, layer in layers.items() if parametrize.is_parametrized(layer, "weight")]
    if taken:
        raise ValueError(f"the weight of {taken[0]!r} is parametrized already; end that block first")
    for layer in layers.values():
        noise = WeightNoise(sigma, getattr(layer, "transposed", False) and layer.groups)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", noise.train(layer.training))

    def driven(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return _stepped(inputs[0], drive_bits) if layer.training else inputs[0]

    def read(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return _stepped(y, converter_bits) if layer.training else y

    hooks = [net.register_forward_pre_hook(_renew)]
    hooks += [layer.register_forward_pre_hook(driven) for layer in layers.values() if drive_bits]
    hooks += [layer.register_forward_hook(read) for layer in layers.values() if converter_bits]
    try:
        yield net
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            mode = layer.training
            layer.eval()
            parametrize.remove_parametrizations(layer, "weight")
            layer.train(mode)
