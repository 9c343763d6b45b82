"""Layers of a quantized graph: each is its float layer (same parameters, same names) with a quantizer for its weight.

    y = layer(x, Q(w), b)

``QuantConvBn2d`` and ``QuantLinearBn`` also hold the batch norm that followed and fold it in every step, in one pass:

    g = gamma / sqrt(running_var + eps)
    training:       y = BN(conv(x, Q(g w)) / g + b)                       normalised by the batch, as without folding
    frozen or eval: y = conv(x, Q(g w)) + g (b - running_mean) + beta     what is deployed

The weight that is quantized is the deployed one from the first step; the output of its one convolution, taken back by
g, is both what the batch norm normalises and what moves its running statistics. ``freeze_statistics`` begins the last
phase of a training: statistics stop, and train mode computes what eval mode does. This is "correction and freeze" of
Krishnamoorthi (2018, arXiv:1806.08342). Folding batch statistics into the weight instead (Jacob et al. 2018,
arXiv:1712.05877, section 3.2) takes two convolutions a step; folding running ones without taking the output back leaves
the batch without a norm, and training slows down. Departure: while the batch is normalised, |g| is kept above 1e-6, so
that a channel switched off by gamma = 0 can come back.
"""

from typing import Self

import torch
from torch import Tensor, nn

_MIN_GAIN = 1e-6


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
        """Return g = gamma / sqrt(running_var + eps), (C_out,); away from 0 while the batch norm normalises."""
        deviation = torch.sqrt(_statistic(self.bn.running_var) + self.bn.eps)
        g = 1 / deviation if self.bn.weight is None else self.bn.weight / deviation
        return torch.where(g < 0, g.clamp(max=-_MIN_GAIN), g.clamp(min=_MIN_GAIN)) if self._normalises() else g

    def effective_weight(self) -> Tensor:
        """Return g w, the shape of ``weight``."""
        return self.weight * self.gain().reshape(-1, *[1] * (self.weight.dim() - 1))

    def effective_bias(self) -> Tensor:
        """Return g (b - running_mean) + beta, (C_out,)."""
        mean = _statistic(self.bn.running_mean)
        shift = self.gain() * (-mean if self.bias is None else self.bias - mean)
        return shift if self.bn.bias is None else shift + self.bn.bias

    def _normalises(self) -> bool:
        return self.training and not self.statistics_frozen

    def _taken_back(self, y: Tensor) -> Tensor:
        """Return the layer's output before the norm, y / g + b."""
        shape = (1, -1, *[1] * (y.dim() - 2))
        raw = y / self.gain().reshape(shape)
        return raw if self.bias is None else raw + self.bias.reshape(shape)


class QuantConvBn2d(FoldedNorm, QuantConv2d):
    """Convolution and batch norm, folded in every step."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        if self._normalises():
            return self.bn(self._taken_back(self._conv_forward(input, self.quantized_weight(), None)))
        return self._conv_forward(input, self.quantized_weight(), self.effective_bias())


class QuantLinearBn(FoldedNorm, QuantLinear):
    """Linear layer and batch norm, folded in every step."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in) -> (B, C_out)."""
        if self._normalises():
            return self.bn(self._taken_back(nn.functional.linear(input, self.quantized_weight())))
        return nn.functional.linear(input, self.quantized_weight(), self.effective_bias())


def _statistic(buffer: Tensor | None) -> Tensor:
    assert buffer is not None, "a batch norm without running statistics cannot be folded"
    return buffer
