"""Quantizers inside a net that ``torch.compile`` takes as a whole: same values, same gradients, no graph break."""

import shutil
import warnings

import pytest
import torch
from torch import nn

from hq_lib.quantizers import act_quantizer, weight_quantizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
    ),
]


class QuantizedConv(nn.Module):
    """A convolution with quantized weights between two activation quantizers."""

    def __init__(self, method: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.2 * torch.randn(16, 8, 3, 3, generator=generator))
        self.before, self.after = (act_quantizer(method, 4, signed=signed) for signed in (True, False))
        self.of_weight = weight_quantizer(method, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8, H, W) -> (B, 16, H, W)."""
        return self.after(nn.functional.conv2d(self.before(x), self.of_weight(self.weight), padding=1).relu())


@pytest.mark.parametrize("method", ["minmax", "pact", "lsq_plus", "dsq"])
def test_a_compiled_net_trains_like_the_plain_one(method):
    x = torch.randn(16, 8, 32, 32, generator=torch.Generator().manual_seed(1))  # above the size that is fused
    results = []
    for compiled in (False, True):
        net = QuantizedConv(method)
        net(x)  # the first batch fits the activations
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations
            forward = torch.compile(net, fullgraph=True) if compiled else net
            y = forward(x)
            (y * y).mean().backward()
        results.append((y.detach(), {name: p.grad for name, p in net.named_parameters()}))
    (want, wanted), (got, gradients) = results
    same = torch.isclose(got, want, atol=1e-5).float().mean().item()
    assert same > 0.999  # a sum in another order may push a value over a threshold, rarely
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-2, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
