"""What every quantizer module promises, checked for each method, role, bit width and sign alike."""

import copy
import inspect
import io
import math
from collections.abc import Iterator

import pytest
import torch

from hq_lib.quantizers import (
    METHODS,
    Quantizer,
    aciq,
    act_quantizer,
    dequantize,
    quantize_to_int,
    weight_quantizer,
)
from hq_lib.quantizers.affine import next_power_of_two

BITS = (1, 2, 3, 4, 8, 16)
SYMMETRIC_WEIGHTS = {"dorefa", "dorefa_hw", "pact", "mpact"}
ALL_WEIGHTS = [
    (m, b, s, a)
    for m in METHODS
    for b in BITS
    for s in (True, False)
    for a in (None, 0)
    if s or m not in SYMMETRIC_WEIGHTS
]
ALL_ACTS = [(m, b, s) for m in METHODS for b in BITS for s in (True, False)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> torch.Tensor:
    w = 0.1 * randn(6, 4, 3, 3) * torch.linspace(0.2, 2.0, 6).view(-1, 1, 1, 1)
    w[:, 0, 0, 0] = 0.0  # pruned weights: sign(0) and every grid must agree on them
    return w


def acts(signed: bool, seed: int = 0) -> torch.Tensor:
    x = randn(4, 3, 6, 6, seed=seed)
    return x if signed else x.relu()


def build(kind: str, method: str, bits: int, **options) -> Quantizer:
    quantizer = (weight_quantizer if kind == "weight" else act_quantizer)(method, bits, **options)
    assert quantizer is not None
    return quantizer


def every_quantizer() -> Iterator[tuple[Quantizer, torch.Tensor]]:
    for method, bits, signed, axis in ALL_WEIGHTS:
        yield build("weight", method, bits, signed=signed, axis=axis), weights() if signed else weights().abs()
    for method, bits, signed in ALL_ACTS:
        yield build("act", method, bits, signed=signed), acts(signed)


@pytest.mark.parametrize(("method", "bits", "signed", "axis"), ALL_WEIGHTS)
def test_weight_values_are_the_integers_on_the_named_grid(method, bits, signed, axis):
    quantizer, w = build("weight", method, bits, signed=signed, axis=axis), weights()
    check_grid(quantizer, w)
    assert quantizer.grid().scale.numel() == (6 if axis == 0 else 1)


@pytest.mark.parametrize(("method", "bits", "signed"), ALL_ACTS)
def test_activation_values_are_the_integers_on_the_named_grid(method, bits, signed):
    quantizer = build("act", method, bits, signed=signed)
    check_grid(quantizer, acts(signed))
    check_grid(quantizer, acts(signed, seed=1))
    check_grid(quantizer.eval(), 3.0 * acts(signed, seed=2))


def check_grid(quantizer: Quantizer, x: torch.Tensor) -> None:
    x_hat = quantizer(x).detach()
    x_int, grid = quantizer.integers(x)
    assert torch.equal(x_hat, dequantize(x_int, grid))
    assert torch.equal(x_hat, grid.scale * (x_int - grid.zero_point))
    assert int(x_int.min()) >= grid.qmin
    assert int(x_int.max()) <= grid.qmax
    assert bool(((x_int - grid.qmin) % grid.step == 0).all())
    n_levels = (grid.qmax - grid.qmin) // grid.step + 1
    assert n_levels <= 2**quantizer.bits
    assert torch.equal(grid.zero_point, torch.round(grid.zero_point))
    assert x_hat.shape == x.shape
    assert torch.equal(quantize_to_int(x_hat, grid), x_int)  # on the grid, nothing moves


# tanh moves DoReFa's levels above 1 bit, and a clip moves the statistics that ACIQ's next clip follows: these are
# idempotent on their grid only, which check_grid tests
@pytest.mark.parametrize(
    ("method", "bits", "signed", "axis"),
    [case for case in ALL_WEIGHTS if case[:3] != ("aciq", 1, False) and (
        case[1] == 1 or case[0] not in SYMMETRIC_WEIGHTS | {"aciq"})],
)  # fmt: skip
def test_quantizing_weights_twice_changes_nothing(method, bits, signed, axis):
    quantizer = build("weight", method, bits, signed=signed, axis=axis)
    once = quantizer(weights()).detach()
    torch.testing.assert_close(quantizer(once).detach(), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("method", "bits", "signed"), ALL_ACTS)
def test_quantizing_activations_twice_changes_nothing(method, bits, signed):
    quantizer = build("act", method, bits, signed=signed)
    quantizer.init_from(acts(signed))
    quantizer.eval()
    once = quantizer(acts(signed)).detach()
    assert torch.equal(quantizer(once).detach(), once)


@pytest.mark.parametrize(("method", "bits", "signed"), [(m, b, s) for m, b, s, a in ALL_WEIGHTS if a is None])
def test_per_channel_is_a_loop_over_channels(method, bits, signed):
    w = weights()
    together = build("weight", method, bits, signed=signed, axis=0)
    got = together(w).detach()
    for c in range(6):
        alone = build("weight", method, bits, signed=signed, axis=0)
        # rounding of mean and of the range may differ in the last bit; a level never does
        torch.testing.assert_close(alone(w[c : c + 1]).detach(), got[c : c + 1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "bits", "signed"), [(m, b, s) for m, b, s in ALL_ACTS if b in (2, 4, 8)])
def test_real_zero_is_exact_on_every_activation_grid(method, bits, signed):
    quantizer = build("act", method, bits, signed=signed)
    quantizer.init_from(acts(signed))
    assert quantizer(torch.zeros(1, 3)).abs().max().item() == 0.0


def test_error_falls_with_bits():
    for kind in ("weight", "act"):
        for method in METHODS:
            x = weights() if kind == "weight" else 0.3 * acts(True)
            error = []
            for bits in (2, 4, 8):
                quantizer = build(kind, method, bits, signed=True)
                error.append((quantizer(x).detach() - x).square().mean().item())
            assert error[0] > error[1] > error[2], (kind, method, error)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [True, False])
def test_all_zero_activations_stay_zero_and_recover(method, signed):
    quantizer = build("act", method, 4, signed=signed)
    assert torch.equal(quantizer(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert torch.isfinite(quantizer.grid().scale).all()
    y = quantizer(torch.full((2, 8), 0.5, requires_grad=True))
    y.sum().backward()
    assert torch.isfinite(y).all()
    for parameter in quantizer.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_all_zero_and_constant_channels(method, bits):
    w = weights()
    w[1] = 0.0
    w[2] = 0.05
    quantizer = build("weight", method, bits)
    leaf = w.clone().requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(leaf.grad).all()
    scale = quantizer.grid().scale[1].item()
    assert scale > 0
    step = scale * quantizer.grid().step
    assert y[1].abs().max().item() == 0.0 or quantizer.grid().step == 2
    assert y[1].abs().max().item() <= step
    if method in ("minmax", "dorefa_hw", "mpact", "dorefa", "pact"):
        torch.testing.assert_close(y[2], w[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_an_all_zero_channel_of_weights_stays_as_near_zero_as_its_grid_allows(method, bits):
    """Also where no level is 0: a dead channel must not come to life as +-1."""
    w = weights()
    w[1] = 0.0
    quantizer = build("weight", method, bits, axis=0)
    leaf = w.clone().requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    assert y[1].abs().max().item() < 3e-8
    assert torch.isfinite(leaf.grad).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in quantizer.parameters())


def test_nan_and_inf_are_refused_by_every_fit():
    for bad in (float("nan"), float("inf")):
        for kind in ("weight", "act"):
            for method in METHODS:
                x = weights()
                x[0, 0, 0, 0] = bad
                with pytest.raises(ValueError, match="NaN or Inf"):
                    build(kind, method, 4, signed=True).init_from(x)


def test_nan_propagates_and_has_no_integer():
    for quantizer, x in every_quantizer():
        quantizer.init_from(x)
        x = x.clone()
        x.view(-1)[0] = float("nan")
        try:
            x_hat = quantizer.eval()(x)
        except ValueError:  # its clip follows the statistics of the weight, which NaN leaves without a range
            assert quantizer.method == "aciq", quantizer
            continue
        assert torch.isnan(x_hat.view(-1)[0]), quantizer
        with pytest.raises(ValueError, match="NaN"):
            quantizer.to_int(x)


@pytest.mark.parametrize("bits", [0, 17, -1, 33, 4.0, True])
@pytest.mark.parametrize("method", METHODS)
def test_impossible_bits_name_method_and_bits(method, bits):
    name = {"dorefa_hw": "dorefa"}.get(method, method)
    with pytest.raises(ValueError, match=f"{name} cannot do {bits}".replace(".", r"\.")):
        act_quantizer(method, bits, signed=True)
    with pytest.raises(ValueError, match="cannot do"):
        weight_quantizer(method, bits)


def test_thirty_two_bits_mean_no_quantizer():
    assert weight_quantizer("lsq", 32) is None
    assert act_quantizer("dsq", 32, signed=False) is None


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ValueError, match=r"lsqplus.*did you mean 'lsq_plus'"):
        weight_quantizer("lsqplus", 4)
    with pytest.raises(ValueError, match=r"no option 'innit'.*did you mean 'init'"):
        act_quantizer("pact", 4, signed=False, innit=3)
    with pytest.raises(ValueError, match="unsigned"):
        weight_quantizer("dorefa", 4, signed=False)
    with pytest.raises(ValueError, match="axis"):
        act_quantizer("pact", 4, signed=False, axis=0)


def test_activations_fit_on_the_first_training_batch_only():
    for method in METHODS:
        quantizer = build("act", method, 4, signed=False)
        if bool(quantizer.initialised):
            continue  # a fixed clip needs no data
        quantizer.eval()
        with pytest.raises(RuntimeError, match="never fitted"):
            quantizer(acts(False))
        with pytest.raises(RuntimeError, match="init_from"):
            quantizer.grid()
        quantizer.train()(acts(False))
        assert bool(quantizer.initialised)
        quantizer.eval()
        before = quantizer.grid().scale
        quantizer(100 * acts(False))
        assert torch.equal(quantizer.grid().scale, before)


def test_state_dict_round_trip_keeps_the_fit():
    for quantizer, x in every_quantizer():
        quantizer.init_from(x)
        fresh = type(quantizer)(**constructor(quantizer))
        buffer = io.BytesIO()
        torch.save(quantizer.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        fresh.eval()
        assert torch.equal(fresh(x), quantizer.eval()(x)), quantizer
        for mine, theirs in zip(fresh.grid(), quantizer.grid(), strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


def constructor(quantizer: Quantizer) -> dict:
    known = inspect.signature(type(quantizer)).parameters
    have = {"bits": quantizer.bits, "signed": quantizer.signed, "axis": quantizer.axis, "role": quantizer.role}
    return {name: value for name, value in have.items() if name in known}


def test_a_state_of_other_bits_is_refused():
    quantizer = build("act", "lsq", 4, signed=False)
    quantizer(acts(False))
    with pytest.raises(ValueError, match=r"4 bits.*3 bits.*graph\.load"):
        build("act", "lsq", 3, signed=False).load_state_dict(quantizer.state_dict())


def test_a_copy_is_independent():
    quantizer = build("act", "minmax", 4, signed=False)
    quantizer(acts(False))
    twin = copy.deepcopy(quantizer)
    before = quantizer.grid().scale
    twin(100 * acts(False))
    assert torch.equal(quantizer.grid().scale, before)
    assert twin.grid().scale > before


def test_disabled_is_the_identity():
    quantizer = build("act", "lsq", 2, signed=True)
    quantizer.enabled = False
    x = acts(True)
    assert quantizer(x) is x


def test_every_learned_parameter_has_a_tag_and_gets_a_gradient():
    for quantizer, x in every_quantizer():
        upstream = randn(*x.shape, seed=3)
        leaf = x.clone().requires_grad_()
        (quantizer(leaf) * upstream).sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        for name, parameter in quantizer.named_parameters():
            assert name in quantizer.tags
            if parameter.requires_grad:
                assert parameter.grad is not None, (quantizer, name)
                assert parameter.grad.shape == parameter.shape
                assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("method", ["pact", "mpact", "lsq", "lsq_plus", "dsq"])
def test_learned_grids_get_better_by_training(method):
    x = acts(False)
    quantizer = build("act", method, 3, signed=False)
    quantizer(x)
    with torch.no_grad():
        for name in ("alpha", "step_size", "high"):
            if hasattr(quantizer, name):
                getattr(quantizer, name).mul_(0.3)
    optimiser = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (quantizer(x) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.5 * losses[0]
    assert math.isfinite(losses[-1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["weight", "act"])
def test_power_of_two_scales_are_the_next_ones_up_and_cover_the_range(kind, signed, bits):
    make = weight_quantizer if kind == "weight" else act_quantizer
    x = torch.randn(6, 50) if signed else torch.rand(6, 50)
    plain, ours = (make("minmax", bits, signed=signed, power_of_two=two) for two in (False, True))
    assert plain is not None
    assert ours is not None
    scales = []
    for q in (plain, ours):
        q.init_from(x)
        x_hat, (x_int, grid) = q.eval()(x), q.integers(x)
        assert torch.equal(x_hat, grid.scale * (x_int - grid.zero_point))
        scales.append(grid.scale)
    assert torch.equal(scales[1], 2.0 ** torch.ceil(torch.log2(scales[0])))
    if bits > 1:
        assert ((ours(x) - x).abs() <= scales[1] * (0.5 + 1e-6) + scales[1] * (not signed) / 2).all()


def test_powers_of_two_are_kept_exactly():
    exact = 2.0 ** torch.arange(-26.0, 20.0)
    assert torch.equal(next_power_of_two(exact), exact)
    assert torch.equal(next_power_of_two(exact * 1.001), 2 * exact)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_aciq_quantizers_take_the_range_of_the_analytic_clip(bits):
    w, x = torch.distributions.Laplace(0.0, 0.1).sample((4, 500)), torch.randn(4000).clamp(min=0)
    weight, act = weight_quantizer("aciq", bits), act_quantizer("aciq", bits, signed=False)
    assert weight is not None
    assert act is not None
    weight.init_from(w)
    act.init_from(x)
    grid = "restricted" if bits < 3 else None
    for c in range(4):
        low, high = aciq.clip_range(w[c], bits=bits, grid=grid)
        torch.testing.assert_close(weight.grid().scale[c, 0] * weight.grid().qmax, torch.maximum(-low, high))
    found = aciq.clip_range(x, bits=bits, relu="theory", grid="relu_endpoint" if bits < 3 else None)
    torch.testing.assert_close(act.grid().scale * act.grid().qmax, found.high)
