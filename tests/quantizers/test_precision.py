"""Half precision, kernels out of memory, and bounds at zero: what must not go wrong without a word."""

import warnings

import pytest
import torch

from hq_lib.quantizers import DSQ, act_quantizer, straight_through, weight_quantizer
from hq_lib.quantizers.straight_through import Fused
from hq_lib.training import machine

METHODS = ["minmax", "dorefa", "dorefa_hw", "pact", "mpact", "lsq", "lsq_plus", "dsq"]
LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["weight", "act"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_integers_and_values_agree_in_half_precision_dead_channels_included(method, kind, bits, dtype):
    x = torch.randn(6, 40)
    x[2] = 0  # a dead channel
    q = weight_quantizer(method, bits) if kind == "weight" else act_quantizer(method, bits, signed=True)
    assert q is not None
    q.init_from(x)
    q = q.to(dtype).eval()
    low = x.to(dtype)
    x_hat, (x_int, grid) = q(low), q.integers(low)
    assert x_hat.dtype == dtype
    assert torch.isfinite(x_hat).all()
    assert torch.equal(x_hat, (grid.scale * (x_int - grid.zero_point)).to(dtype))
    assert all(t.dtype == torch.float32 for t in q.state_dict().values() if t.is_floating_point())


def test_a_dsq_bound_that_starts_at_zero_learns():
    q = DSQ(4, signed=True, role="act")
    q.init_from(torch.rand(64))  # nothing below 0 in the first batch
    assert float(q.low.detach()) == 0
    x = -torch.rand(64)
    (q(x) - x).square().sum().backward()
    assert q.low.grad is not None
    assert float(q.low.grad) > 0  # descent widens the range downwards, where the values are


def double(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return 2 * x * step


def halve(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return x / step / 2


def test_the_compiler_is_asked_to_divide_as_eager_code_does(monkeypatch):
    """On a GPU it would not by itself; no GPU is needed to see what it is asked for."""
    asked, kernel = [], Fused(halve, n_elementwise=1, apart=False)
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how["options"]) or function)
    monkeypatch.setattr(straight_through, "_state", {"on": True, "failure": None, "said": False})
    kernel(torch.ones(2**17), torch.tensor(0.5))
    machine.compiled(torch.nn.Linear(1, 1))
    assert asked == [{"eager_numerics.division_rounding": True}] * 2


def test_one_call_out_of_memory_leaves_fusion_on_and_says_so_once(monkeypatch):
    state, x, calls = {"on": True, "failure": None, "said": False}, torch.ones(2**17), []
    kernel = Fused(double, n_elementwise=1, apart=False)

    def full(*args):
        calls.append(args)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(kernel, "_compiled", full)
    monkeypatch.setattr(straight_through, "_state", state)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(kernel(x, torch.tensor(1.0)), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kernel(x, torch.tensor(1.0)), 2 * x)
    assert (state["failure"], len(calls)) == (None, 2)
