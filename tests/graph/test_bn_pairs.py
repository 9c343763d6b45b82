"""Which layer can take in a batch norm: every accepted pair is folded and compared, every refusal names its reason."""

import copy

import pytest
import torch
from torch import nn

from hq_lib.graph import folding
from hq_lib.graph.folding import find_layer, find_norms, find_opaque_norms
from hq_lib.graph.layers import layer_kind
from hq_lib.graph.tracing import propagate, trace


class Standardized(nn.Conv2d):
    """A convolution whose weight is not what it multiplies with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with the weight less its mean."""
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def _trained(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_var, module.weight):
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.running_mean, module.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return net.eval()


PAIRS = {
    "conv_bn": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "conv_transpose_bn": (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "linear_bn": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 3)),
    "bn_conv": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (2, 3, 5, 5)),
    "bn_linear": (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), (2, 3)),
}
REFUSED = {
    "pads with zeros": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), (2, 3, 5, 5)),
    "is transposed": (nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)), (2, 3, 5, 5)),
    "track_running_stats": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 3, 5, 5),
    ),
    "no plain convolution": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "axis 1": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 4, 3)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_each_kind_of_pair_is_found_and_folds_exactly(kind: str) -> None:
    net, shape = _trained(copy.deepcopy(PAIRS[kind][0])).double(), PAIRS[kind][1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    graph = trace(net)
    propagate(graph, x)
    (norm,) = find_norms(graph)
    found = find_layer(norm)
    assert not isinstance(found, str), found
    assert found[1] == kind
    folded = folding.fold_bn(net, x)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reason", REFUSED)
def test_a_batch_norm_that_fits_nowhere_says_why(reason: str) -> None:
    net, shape = copy.deepcopy(REFUSED[reason][0]).eval(), REFUSED[reason][1]
    graph = trace(net)
    propagate(graph, torch.zeros(shape))
    (norm,) = find_norms(graph)
    found = find_layer(norm)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv1d(1, 1, 1), "conv"), (nn.Conv3d(1, 1, 1), "conv"), (nn.ConvTranspose1d(1, 1, 1), "conv_transpose"),
        (nn.Linear(1, 1), "linear"), (Standardized(1, 1, 1), ""), (nn.ReLU(), ""), (None, ""),
    ],
)  # fmt: skip
def test_the_kind_of_a_layer_is_that_of_its_forward(module: nn.Module | None, kind: str) -> None:
    assert layer_kind(module) == kind


def test_batch_norms_inside_a_leaf_are_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outside, self.attention = nn.BatchNorm1d(4), nn.TransformerEncoderLayer(4, 1, 4)
            self.attention.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Apply one after the other."""
            return self.attention(self.outside(x))

    graph = trace(Two().eval())
    assert find_opaque_norms(graph) == ["attention.norm"]
