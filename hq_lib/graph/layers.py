"""Layers of a quantized graph: each is its float layer (same parameters, same names) with a quantizer for its weight.

    y = layer(x, Q(w), b)

``QuantConvBn2d`` and ``QuantLinearBn`` also hold the batch norm that followed and fold it in every step, in one pass:

    g = gamma / sqrt(running_var + eps)
    y = conv(x, Q(g w)) + g (b - running_mean) + beta

The gradient reaches w, gamma and beta through the fold; the running statistics are constants to it. In train mode they
are updated from the convolution just computed, conv(x, Q(g w)) / g, so there is no second convolution (Jacob et al.
2018, arXiv:1712.05877, section 3.2, fold batch statistics and run two). Departures: a batch is normalised by statistics
that lag one step, so start from trained ones; the variance includes the weights' rounding error; a channel with |g|
below 1e-6 keeps its statistics. ``freeze_statistics`` ends the updates: the last phase of a training.
"""

from typing import Self

import torch
from torch import Tensor, nn

_G_MIN = 1e-6


class QuantizedWeight(nn.Module):
    """What the quantized layers share: a ``weight_quantizer`` beside the float ``weight``; None leaves it in float."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: nn.Module | None

    def effective_weight(self) -> Tensor:
        """Return the real-valued weight that is quantized: ``weight``, with the batch norm where one is folded."""
        return self.weight

    def effective_bias(self) -> Tensor | None:
        """Return the bias that goes with ``effective_weight``."""
        return self.bias

    def quantized_weight(self) -> Tensor:
        """Return the weight the layer computes with: on its grid, or real where no quantizer is at work."""
        w = self.effective_weight()
        return w if self.weight_quantizer is None else self.weight_quantizer(w)

    @classmethod
    def from_float(cls, layer: nn.Module, weight_quantizer: nn.Module | None = None) -> Self:
        """Return the quantized form of ``layer``, which shares its parameters; the random state is left alone."""
        quantized = cls.__new__(cls)
        nn.Module.__init__(quantized)
        own = {"_parameters", "_buffers", "_modules"}
        quantized.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in own})
        for key in own:
            getattr(quantized, key).update(getattr(layer, key))
        quantized.weight_quantizer = weight_quantizer
        return quantized


class QuantConv2d(QuantizedWeight, nn.Conv2d):
    """``nn.Conv2d`` (grouped and depthwise too) that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return self._conv_forward(input, self.quantized_weight(), self.effective_bias())


class QuantLinear(QuantizedWeight, nn.Linear):
    """``nn.Linear`` that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return nn.functional.linear(input, self.quantized_weight(), self.effective_bias())


class QuantConvTranspose2d(QuantizedWeight, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that computes with its quantized weight (scales on axis 1; grouped: one scale)."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        sizes = (self.stride, self.padding, self.kernel_size)
        padding = self._output_padding(input, output_size, *sizes, 2, self.dilation)  # type: ignore[arg-type]
        return nn.functional.conv_transpose2d(
            input,
            self.quantized_weight(),
            self.effective_bias(),
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            self.groups,
            self.dilation,  # type: ignore[arg-type]
        )


class FoldedNorm(QuantizedWeight):
    """A layer that folds its batch norm ``bn`` in every step; see the module docstring."""

    bn: nn.BatchNorm1d | nn.BatchNorm2d
    statistics_frozen: bool

    @classmethod
    def with_norm(cls, layer: nn.Module, bn: nn.Module, weight_quantizer: nn.Module | None = None) -> Self:
        """Return ``layer`` with ``bn`` inside; both keep their parameters and buffers."""
        folded = cls.from_float(layer, weight_quantizer)
        folded.bn = bn  # type: ignore[assignment]
        folded.statistics_frozen = False
        return folded

    def gain(self) -> Tensor:
        """Return g = gamma / sqrt(running_var + eps), (C_out,)."""
        deviation = torch.sqrt(_statistic(self.bn.running_var) + self.bn.eps)
        return 1 / deviation if self.bn.weight is None else self.bn.weight / deviation

    def effective_weight(self) -> Tensor:
        """Return g w, the shape of ``weight``."""
        return self.weight * self.gain().reshape(-1, *[1] * (self.weight.dim() - 1))

    def effective_bias(self) -> Tensor:
        """Return g (b - running_mean) + beta, (C_out,)."""
        centre = -_statistic(self.bn.running_mean) if self.bias is None else self.bias - self.bn.running_mean
        shift = self.gain() * centre
        return shift if self.bn.bias is None else shift + self.bn.bias

    def _update_statistics(self, y: Tensor) -> None:
        """Move the running statistics toward those of the layer's output before the norm, y / g (+ b)."""
        if not self.training or self.statistics_frozen:
            return
        with torch.no_grad():
            g = self.gain()
            usable = g.abs() > _G_MIN
            safe = torch.where(usable, g, 1.0)
            others = [d for d in range(y.dim()) if d != 1]
            variance, mean = torch.var_mean(y.detach(), dim=others, unbiased=True)
            mean = mean / safe if self.bias is None else mean / safe + self.bias
            rate = torch.where(usable, 0.1 if self.bn.momentum is None else self.bn.momentum, 0.0).to(g.dtype)
            _statistic(self.bn.running_mean).lerp_(mean.to(g.dtype), rate)
            _statistic(self.bn.running_var).lerp_((variance / safe**2).to(g.dtype), rate)


class QuantConvBn2d(FoldedNorm, QuantConv2d):
    """Convolution and batch norm, folded in every step."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        bias = self.effective_bias()  # of the statistics before this batch's update
        y = self._conv_forward(input, self.quantized_weight(), None)
        self._update_statistics(y)
        return y + bias.reshape(1, -1, 1, 1)


class QuantLinearBn(FoldedNorm, QuantLinear):
    """Linear layer and batch norm, folded in every step."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in) -> (B, C_out)."""
        bias = self.effective_bias()
        y = nn.functional.linear(input, self.quantized_weight())
        self._update_statistics(y)
        return y + bias


def _statistic(buffer: Tensor | None) -> Tensor:
    assert buffer is not None, "a batch norm without running statistics cannot be folded"
    return buffer

