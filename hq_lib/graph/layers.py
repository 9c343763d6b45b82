"""Quantized layers: a float layer (same parameters, same names) with a quantizer, y = layer(x, Q(w), b)."""

import re
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize


def is_plain(layer: nn.Module) -> bool:
    """Whether ``layer`` computes as its class in torch does.

    A subclass with a ``forward`` of its own (weight standardization, say) does not: its weight is not what it
    multiplies with.
    """
    own = (type(layer).forward, getattr(type(layer), "_conv_forward", nn.Module.forward))
    return all(f.__module__.startswith("torch.nn.modules") for f in own)


def layer_kind(module: nn.Module | None) -> str:
    """Return "conv", "conv_transpose" or "linear", or "" for any other module, one that is not ``is_plain`` too."""
    if not isinstance(module, _ConvNd | nn.Linear) or not is_plain(module):
        return ""
    return "linear" if isinstance(module, nn.Linear) else f"conv{'_transpose' * module.transposed}"


def is_norm(module: nn.Module) -> bool:
    """Whether the name of its class ends as those of norms do: BatchNorm2d, LayerNorm, a user's RMSNorm."""
    return re.search(r"Norm(\dd)?$", type(module).__name__) is not None and not layer_kind(module)


def make_plain_(layer: nn.Module) -> None:
    """Give a parametrized ``layer`` (weight norm, spectral norm) the plain weight that it computes with in its mode.

    Not ``parametrize.remove_parametrizations``: that strips the class which a copy shares with its original.
    """
    if parametrize.is_parametrized(layer):
        values = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}  # type: ignore[union-attr]
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value))


class QuantizedWeight(nn.Module):
    """What the quantized layers share: a ``weight_quantizer`` beside the float ``weight``; None leaves it in float."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: nn.Module | None

    def quantized_weight(self) -> Tensor:
        """Return the weight the layer computes with: on its grid, or real where no quantizer is at work."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

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
        return self._conv_forward(input, self.quantized_weight(), self.bias)


class QuantLinear(QuantizedWeight, nn.Linear):
    """``nn.Linear`` that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return nn.functional.linear(input, self.quantized_weight(), self.bias)


class QuantConvTranspose2d(QuantizedWeight, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that computes with its quantized weight (scales on axis 1; grouped: one scale)."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        sizes = (self.stride, self.padding, self.kernel_size)
        padding = self._output_padding(input, output_size, *sizes, 2, self.dilation)  # type: ignore[arg-type]
        rest: Any = (self.stride, self.padding, padding, self.groups, self.dilation)
        return nn.functional.conv_transpose2d(input, self.quantized_weight(), self.bias, *rest)


QUANTIZER_SUFFIX = "_act_quantizer"
LAYERS = {"conv2d": QuantConv2d, "linear": QuantLinear, "convtranspose2d": QuantConvTranspose2d}
"""Operation -> the quantized form of its layer."""
