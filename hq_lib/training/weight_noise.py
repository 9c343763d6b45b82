"""Noise-aware fine-tuning: weights with fresh Gaussian errors in every training step, the clean ones updated.

    w_noisy = w + sigma max|w_column| xi,    xi ~ N(0, 1) once per step         Joshi et al. 2020, "Methods"; Rasch 2023

The gradient is taken at the noisy point and moves the clean weights:

    fit(net, train, val, replace(config, weight_noise=0.03), run_dir)

``fit`` seeds every epoch, so a run with noise resumes bit-identically too. Evaluation is always of the clean weights.
A training loop of one's own goes into ``with weight_noise(net, 0.03):``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hq_lib.graph.bn_pairs import layer_kind


class WeightNoise(nn.Module):
    """A parametrization that adds noise to a weight in training mode.

    Args:
        sigma: standard deviation as a fraction of the largest |w| of the output channel, in [0, 1).

    Gradient: that of the identity; the noise's scale is a constant.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not 0 <= sigma < 1:
            raise ValueError(f"weight noise sigma must be in [0, 1), got {sigma}")
        self.sigma = float(sigma)

    def forward(self, w: Tensor) -> Tensor:
        """``w`` (N, ...) with noise in training mode, ``w`` itself in eval mode."""
        if not self.training or self.sigma == 0:
            return w
        largest = w.detach().flatten(1).abs().amax(1).view(-1, *[1] * (w.ndim - 1))
        return w + self.sigma * largest * torch.randn_like(w)


@contextmanager
def weight_noise(net: nn.Module, sigma: float) -> Iterator[nn.Module]:
    """``net`` itself, whose convolutions and linear layers have noisy weights while the block lasts and it trains.

    Args:
        sigma: see ``WeightNoise``; 0.03 is 3 % of the conductance window when columns fill it.

    Errors: no plain convolution or linear layer, or a weight that has a parametrization already.
    """
    layers = {name: module for name, module in net.named_modules() if layer_kind(module)}
    if not layers:
        raise ValueError("the network has no plain convolution or linear layer to add noise to")
    taken = [name for name, layer in layers.items() if parametrize.is_parametrized(layer, "weight")]
    if taken:
        raise ValueError(f"the weight of {taken[0]!r} is parametrized already; end that block first")
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", WeightNoise(sigma).train(layer.training))
    try:
        yield net
    finally:
        for layer in layers.values():
            mode = layer.training
            layer.eval()
            parametrize.remove_parametrizations(layer, "weight")
            layer.train(mode)
