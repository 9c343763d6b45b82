"""Quantized layers: equal to their float layer."""

import pytest
import torch
from torch import nn

from hq_lib.graph.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from hq_lib.quantizers import weight_quantizer


@pytest.mark.parametrize(
    ("form", "layer", "shape"),
    [
        (QuantConv2d, nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (2, 4, 9, 9)),
        (QuantConv2d, nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 9, 9)),
        (QuantLinear, nn.Linear(4, 6), (2, 5, 4)),
        (QuantConvTranspose2d, nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    ],
)
def test_without_a_quantizer_a_layer_equals_its_float_layer(form, layer, shape):
    x = torch.randn(shape)
    quantized = form.from_float(layer)
    assert torch.equal(quantized(x), layer(x))
    assert quantized.weight is layer.weight
    assert repr(layer).split("(")[1] in repr(quantized)


def test_a_quantized_layer_computes_with_its_quantized_weight():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    quantizer = weight_quantizer("minmax", 3)
    quantized = QuantConv2d.from_float(layer, quantizer)
    want = nn.functional.conv2d(x, quantizer(layer.weight), layer.bias)
    assert torch.equal(quantized(x), want)
    assert not torch.equal(quantized(x), layer(x))
