"""Each method against its paper: rows computed by hand, gradients by formula, DSQ by finite differences in float64."""

import math

import pytest
import torch

from hq_lib.quantizers import (
    DSQ,
    LSQ,
    MPACT,
    PACT,
    DoReFaAct,
    DoReFaHardwareWeight,
    DoReFaWeight,
    FixedMPACT,
    LSQPlusAct,
    LSQPlusWeight,
    MinMaxAct,
    MinMaxWeight,
    dsq_quantize,
    dsq_slope,
    dsq_soft,
)
from hq_lib.quantizers.ranges import best_shrink, least_error_clip, sample, three_sigma, widest_range


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grads(quantizer: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor | None = None) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    assert leaf.grad is not None
    return leaf.grad


# --- min-max ---------------------------------------------------------------------------------------------------------


def test_minmax_weight_row_per_channel():
    w = torch.tensor([[-0.7, 0.26, 0.1], [1.4, -0.5, 0.3]])
    got = MinMaxWeight(4)(w)  # scales 0.1 and 0.2
    torch.testing.assert_close(got, torch.tensor([[-0.7, 0.3, 0.1], [1.4, -0.4, 0.4]]))
    assert torch.equal(grads(MinMaxWeight(4), w), torch.ones(2, 3))


def test_minmax_weight_unsigned_and_binary():
    got = MinMaxWeight(2, signed=False, axis=None)(torch.tensor([-1.0, 0.4, 2.0]))  # s = 1, z = 1
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 2.0]))
    binary = MinMaxWeight(1, axis=None)
    assert torch.equal(binary(torch.tensor([-1.0, 0.0, 2.0])), torch.tensor([-1.0, 1.0, 1.0]))
    assert torch.equal(grads(binary, torch.tensor([-1.0, 0.0, 2.0])), torch.ones(3))


def test_minmax_weight_agrees_with_torch():
    w = randn(8, 4, 3, 3)
    scale = (w.abs().amax((1, 2, 3)) / 7).clamp(min=1e-8)
    want = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(8, dtype=torch.int32), 0, -7, 7)
    torch.testing.assert_close(MinMaxWeight(4)(w), want)


def test_minmax_act_keeps_a_running_range():
    quantizer = MinMaxAct(8, signed=False)
    quantizer(torch.tensor([0.0, 2.0]))
    assert quantizer.grid().scale.item() == pytest.approx(2 / 255)
    quantizer(torch.tensor([0.0, 12.0]))
    assert quantizer.grid().scale.item() == pytest.approx(3 / 255)  # 0.9 * 2 + 0.1 * 12
    quantizer.observing = False
    quantizer(torch.tensor([0.0, 400.0]))
    assert quantizer.grid().scale.item() == pytest.approx(3 / 255)
    assert grads(quantizer, torch.tensor([1.0, 3.0, 9.0])).tolist() == [1.0, 1.0, 0.0]


def test_minmax_act_agrees_with_torch_on_a_signed_tensor():
    x = randn(1000)
    quantizer = MinMaxAct(6, signed=True)
    got, grid = quantizer(x), quantizer.grid()
    want = torch.fake_quantize_per_tensor_affine(x, grid.scale.item(), int(grid.zero_point), 0, 63)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert grid.scale.item() == pytest.approx((x.max() - x.min()).item() / 63)


# --- DoReFa ----------------------------------------------------------------------------------------------------------


def paper_dorefa(w: torch.Tensor, k: int) -> torch.Tensor:
    n = 2**k - 1
    r = torch.tanh(w) / (2 * torch.tanh(w).abs().max()) + 0.5
    return 2 * torch.round(n * r) / n - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dorefa_weights_are_the_papers(bits):
    w = randn(64, 9)
    quantizer = DoReFaWeight(bits, keep_magnitude=False)
    torch.testing.assert_close(quantizer(w), paper_dorefa(w, bits))
    grid = quantizer.grid()
    assert (grid.qmin, grid.qmax, grid.step) == (-(2**bits - 1), 2**bits - 1, 2)
    assert bool((quantizer.to_int(w) % 2 == 1).all())  # zero is not a level


def test_dorefa_two_bits_by_hand():
    w = torch.atanh(torch.tensor([-0.9, -0.29, 0.1, 0.62]))  # tanh / max = -1, -0.322, 0.111, 0.689
    got = DoReFaWeight(2, keep_magnitude=False)(w)
    torch.testing.assert_close(got, torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))
    kept = DoReFaWeight(2)(w)
    torch.testing.assert_close(kept, w.abs().max() * got)


@pytest.mark.parametrize("make", [DoReFaWeight, DoReFaHardwareWeight])
@pytest.mark.parametrize("keep", [True, False])
def test_dorefa_gradient_is_the_chain_rule_through_tanh(make, keep):
    w, upstream = randn(5, 7), randn(5, 7, seed=1)
    c = w.abs().max() if keep else torch.tensor(1.0)
    want = upstream * c * (1 - torch.tanh(w) ** 2) / torch.tanh(w).abs().max()
    torch.testing.assert_close(grads(make(3, keep_magnitude=keep), w, upstream), want)


def test_dorefa_hardware_is_symmetric_with_zero_and_ternary_at_two_bits():
    w = torch.atanh(torch.tensor([-0.8, -0.3, 0.1, 0.5]))  # t = -1, -0.375, 0.125, 0.625
    ternary = DoReFaHardwareWeight(2, keep_magnitude=False)
    assert ternary(w).tolist() == [-1.0, 0.0, 0.0, 1.0]
    assert DoReFaHardwareWeight(4).to_int(w).tolist() == [-7, -3, 1, 4]


@pytest.mark.parametrize("make", [DoReFaWeight, DoReFaHardwareWeight])
def test_dorefa_one_bit_is_sign_times_mean(make):
    w = torch.tensor([[-0.5, 0.25, 0.75], [-2.0, -4.0, 0.0]])
    torch.testing.assert_close(make(1, axis=0)(w), torch.tensor([[-0.5, 0.5, 0.5], [-2.0, -2.0, 2.0]]))
    torch.testing.assert_close(make(1)(w), 1.25 * torch.tensor([[-1.0, 1, 1], [-1, -1, 1]]))
    assert torch.equal(grads(make(1), w), torch.ones(2, 3))


def test_dorefa_activation_row_and_gradient():
    x = torch.tensor([-0.2, 0.1, 0.4, 0.6, 1.7])
    quantizer = DoReFaAct(2, signed=False)
    torch.testing.assert_close(quantizer(x), torch.tensor([0, 0, 1 / 3, 2 / 3, 1]))
    assert grads(quantizer, x).tolist() == [0, 1, 1, 1, 0]
    assert DoReFaAct(1, signed=True)(torch.tensor([-0.2, 3.0])).tolist() == [-1.0, 1.0]
    for clip in (0.0, float("nan"), "largest"):
        with pytest.raises(ValueError, match="clip"):
            DoReFaAct(2, signed=False, clip=clip)


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (1, False), (2, False), (4, True), (8, False)])
def test_a_fitted_clip_is_that_of_the_first_batch_and_stays(bits, signed):
    x = 3.0 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    quantizer = DoReFaAct(bits, signed=signed, clip="least_error")
    error = ((quantizer(x) - x) ** 2).mean()
    for factor in (0.9, 1.1):
        other = DoReFaAct(bits, signed=signed, clip=factor * quantizer.clip().item())
        assert ((other(x) - x) ** 2).mean() > error
    clip = quantizer.clip().clone()
    quantizer(10 * x)
    assert quantizer.clip() == clip > 1
    again = DoReFaAct(bits, signed=signed, clip="least_error")
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.eval()(x), quantizer(x))


# --- PACT and mPACT --------------------------------------------------------------------------------------------------


def test_pact_row_and_gradients():
    x = torch.tensor([-1.0, 0.2, 0.9, 1.6, 3.0, 3.1, 9.0])
    quantizer = PACT(2, signed=False, init=3.0)
    assert quantizer(x).tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert grads(quantizer, x).tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert quantizer.alpha.grad is not None
    assert quantizer.alpha.grad.item() == 3.0  # the count of x >= alpha


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_alpha_gradient_counts_the_clipped(bits):
    x = 3.0 * randn(1000).abs()
    quantizer = PACT(bits, signed=False, init=2.0)
    grads(quantizer, x)
    assert quantizer.alpha.grad.item() == pytest.approx((x >= 2.0).sum().item())


def test_pact_agrees_with_autograd_of_equation_one():
    x, upstream = 2 * randn(500), randn(500, seed=1)
    alpha = torch.tensor(1.5, requires_grad=True)
    leaf = x.clone().requires_grad_()
    (0.5 * (leaf.abs() - (leaf - alpha).abs() + alpha)).backward(upstream)
    quantizer = PACT(4, signed=False, init=1.5)
    torch.testing.assert_close(grads(quantizer, x, upstream), leaf.grad)
    torch.testing.assert_close(quantizer.alpha.grad, alpha.grad, rtol=1e-4, atol=1e-4)


def test_pact_agrees_with_torch():
    x = 2 * randn(500)
    want = torch.fake_quantize_per_tensor_affine(x, 1.5 / 15, 0, 0, 15)
    torch.testing.assert_close(PACT(4, signed=False, init=1.5)(x), want)


def test_a_negative_alpha_counts_as_its_size_with_the_right_gradient():
    x = torch.tensor([0.5, 5.0])
    quantizer = PACT(4, signed=False, init=-2.0)
    assert quantizer(x).max().item() == pytest.approx(2.0)
    grads(quantizer, x)
    assert quantizer.alpha.grad.item() == pytest.approx(-1.0)  # descending -alpha widens the clip


def test_mpact_learned_form_is_signed_and_counts_both_ends():
    x = torch.tensor([-5.0, -1.2, 0.4, 1.1, 4.0, 6.0])
    quantizer = MPACT(3, init=3.0)  # levels -3 ... 3
    assert quantizer(x).tolist() == [-3.0, -1.0, 0.0, 1.0, 3.0, 3.0]
    assert grads(quantizer, x, torch.tensor([1.0, 1, 1, 1, 10, 100])).tolist() == [0, 1, 1, 1, 0, 0]
    assert quantizer.alpha.grad.item() == pytest.approx(110 - 1)


def test_mpact_after_a_relu_is_symmetric_as_in_the_seed():
    assert MPACT(4, signed=False, init=1.0).grid()[2:] == (-7, 7, 1)


def test_mpact_fixed_form_scales_there_and_back():
    x = torch.tensor([-1.0, 0.9, 3.2, 7.0])
    quantizer = FixedMPACT(2, signed=False, clip=6.0)
    assert quantizer(x).tolist() == [0.0, 0.0, 4.0, 6.0]
    assert grads(quantizer, x).tolist() == [0, 1, 1, 0]
    assert not list(quantizer.parameters())


def test_pact_first_clip():
    x = randn(4000).relu()
    fitted = PACT(2, signed=False)
    fitted.init_from(x)
    errors = [(PACT(2, signed=False, init=a / 50)(x) - x).square().mean().item() for a in range(10, 250)]
    assert (fitted(x) - x).square().mean().item() < 1.02 * min(errors)
    for init in (0.0, float("nan"), float("inf")):  # at 0 the clip has no gradient either and would stay there
        with pytest.raises(ValueError, match="pact: init is"):
            PACT(4, signed=False, init=init)


# --- LSQ and LSQ+ ----------------------------------------------------------------------------------------------------


def lsq_with(step: float, bits: int, *, signed: bool = True) -> LSQ:
    quantizer = LSQ(bits, signed=signed, role="weight")
    quantizer.init_from(torch.ones(1))
    quantizer.step_size.data.fill_(step)
    return quantizer


def test_lsq_row():
    x = torch.tensor([-9.0, -0.30, 0.24, 0.26, 3.6])
    assert lsq_with(0.5, 4)(x).tolist() == [-4.0, -0.5, 0.0, 0.5, 3.5]
    assert lsq_with(0.5, 2, signed=False)(x).tolist() == [0.0, 0.0, 0.0, 0.5, 1.5]
    assert lsq_with(0.5, 1)(x).tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "want_x", "want_s"),
    [(0.3, 1.0, 1 - 0.6), (-0.2, 1.0, 0.4), (9.0, 0.0, 7.0), (-9.0, 0.0, -8.0), (3.6, 0.0, 7.0), (3.4, 1.0, 7 - 6.8)],
)
def test_lsq_gradients_by_the_piecewise_formula(value, want_x, want_s):
    quantizer = lsq_with(0.5, 4)
    assert grads(quantizer, torch.tensor([value])).item() == want_x
    assert quantizer.step_size.grad.item() == pytest.approx(want_s / math.sqrt(1 * 7), rel=1e-5)


def test_lsq_agrees_with_torchs_learnable_op():
    # half a step beyond the ends torch rounds first, LSQ clips first: keep clear of that strip
    x = randn(2000)
    x = x[((x / 0.2 - 7).abs() > 0.6) & ((x / 0.2 + 8).abs() > 0.6)]
    upstream = randn(x.numel(), seed=1)
    leaf, scale = x.clone().requires_grad_(), torch.tensor([0.2], requires_grad=True)
    zero = torch.zeros(1, requires_grad=True)
    want = torch._fake_quantize_learnable_per_tensor_affine(leaf, scale, zero, -8, 7, 1.0)
    want.backward(upstream)
    quantizer = lsq_with(0.2, 4)
    torch.testing.assert_close(grads(quantizer, x, upstream), leaf.grad)
    torch.testing.assert_close(quantizer(x), want)
    got = quantizer.step_size.grad * math.sqrt(x.numel() * 7)
    torch.testing.assert_close(got, scale.grad[0], rtol=1e-4, atol=1e-3)


def test_lsq_gradient_factor_counts_features_without_the_batch():
    x = torch.zeros(32, 8, 5, 5)
    assert LSQ(4, signed=False, role="act").gradient_factor(x, 15) == 1 / math.sqrt(200 * 15)
    assert LSQ(4, signed=True, role="weight").gradient_factor(x, 7) == 1 / math.sqrt(6400 * 7)
    assert LSQ(4, signed=True, role="weight", axis=0).gradient_factor(x, 7) == 1 / math.sqrt(200 * 7)
    assert LSQ(1, signed=True, role="weight").gradient_factor(torch.zeros(9), 1) == 1 / 3


def test_lsq_first_step():
    w = randn(6, 50)
    quantizer = LSQ(4, signed=True, role="weight", axis=0)
    quantizer.init_from(w)
    torch.testing.assert_close(quantizer.grid().scale, 2 * w.abs().mean(1, keepdim=True) / math.sqrt(7))
    plus = LSQPlusWeight(4)
    plus.init_from(w)
    want = min((w.mean().abs() + 3 * w.std(correction=0)).item(), w.abs().max().item()) / 8
    assert plus.grid().scale.item() == pytest.approx(want)


def test_a_step_that_crosses_zero_is_reflected():
    quantizer = lsq_with(-0.5, 4)
    assert quantizer.grid().scale.item() == 0.5
    assert torch.equal(quantizer(torch.tensor([0.6])).detach(), torch.tensor([0.5]))


def lsq_plus_with(step: float, beta: float, bits: int) -> LSQPlusAct:
    quantizer = LSQPlusAct(bits, signed=True)
    quantizer.init_from(randn(100))
    quantizer.step_size.data.fill_(step)
    quantizer.beta.data.fill_(beta)
    return quantizer


def test_lsq_plus_row_and_gradients():
    x = torch.tensor([-5.0, -0.7, 0.2, 2.0, 9.0])
    quantizer = lsq_plus_with(1.0, -1.2, 2)  # z = 1: levels -1 0 1 2
    assert quantizer(x).tolist() == [-1.0, -1.0, 0.0, 2.0, 2.0]
    upstream = torch.tensor([1.0, 10.0, 100.0, 0.0, 1000.0])
    assert grads(quantizer, x, upstream).tolist() == [0.0, 10.0, 100.0, 0.0, 0.0]
    g = quantizer.gradient_factor(x, quantizer.qmax)
    assert quantizer.beta.grad.item() == pytest.approx(g * 1001.0)
    # eq. 5: round(v) - v inside, 0 below, 3 above, up to beta's rounding error (z + beta / s = -0.2 per clipped unit)
    inside = 10 * (-1 + 0.7) + 100 * (0 - 0.2)
    want = inside + 1 * (0 - 1 + 1.2) + 1000 * (3 - 1 + 1.2)
    assert quantizer.step_size.grad.item() == pytest.approx(g * want, rel=1e-4)


def test_lsq_plus_gradients_are_the_papers_where_beta_is_on_the_grid():
    x, upstream = 2 * randn(300), randn(300, seed=1)
    s, beta = torch.tensor(0.25, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    v = (x - beta) / s
    clipped = torch.where(v < 0, torch.zeros(()), torch.where(v >= 15, torch.full((), 15.0), v))
    (s * (clipped + (torch.round(clipped) - clipped).detach()) + beta).backward(upstream)
    quantizer = lsq_plus_with(0.25, -1.0, 4)
    grads(quantizer, x, upstream)
    g = quantizer.gradient_factor(x, quantizer.qmax)
    torch.testing.assert_close(quantizer.step_size.grad / g, s.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quantizer.beta.grad / g, beta.grad, rtol=1e-3, atol=1e-3)


# --- DSQ -------------------------------------------------------------------------------------------------------------

SLOPES = [
    (0.5, 1.0986, 1.099, 0.824),
    (0.4, 1.3863, 1.155, 0.739),
    (0.2, 2.1972, 1.373, 0.494),
    (0.1, 2.9444, 1.636, 0.311),
    (0.05, 3.6636, 1.928, 0.188),
    (0.01, 5.2933, 2.673, 0.053),
]


@pytest.mark.parametrize(("alpha", "c", "steepest", "flattest"), SLOPES)
def test_dsq_slope_table(alpha, c, steepest, flattest):
    got = dsq_slope(torch.tensor(alpha))
    assert got.item() == pytest.approx(c, abs=1e-4)
    x = torch.tensor([0.5, 1e-4, 1.0 - 1e-4], requires_grad=True)  # a threshold, and next to two levels
    zero, three = torch.tensor(0.0), torch.tensor(3.0)
    dsq_quantize(x, zero, three, torch.tensor(alpha), bits=2).sum().backward()
    assert x.grad.tolist() == pytest.approx([steepest, flattest, flattest], abs=1e-3)


def test_dsq_gradients_at_the_reference_point():
    x, low, high = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.37, -0.9, 1.1))
    alpha = torch.tensor(1 - math.tanh(2.5 / 2), dtype=torch.float64, requires_grad=True)  # a slope of 2.5
    dsq_quantize(x, low, high, alpha, bits=2).backward()
    assert x.grad.item() == pytest.approx(0.607148, abs=1e-6)
    assert low.grad.item() == pytest.approx(0.127735, abs=1e-6)
    assert high.grad.item() == pytest.approx(0.265117, abs=1e-6)
    dc_dalpha = -2 / (alpha.item() * (2 - alpha.item()))
    assert alpha.grad.item() / dc_dalpha == pytest.approx(0.0157700, abs=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.4, 0.2, 0.03])
def test_dsq_gradients_equal_finite_differences_of_the_soft_function(bits, alpha):
    values = {
        "x": torch.linspace(-1.4, 1.7, 97, dtype=torch.float64),
        "low": torch.tensor(-0.93, dtype=torch.float64),
        "high": torch.tensor(1.21, dtype=torch.float64),
        "a": torch.tensor(alpha, dtype=torch.float64),
    }
    upstream = randn(97, seed=2, dtype=torch.float64)
    leaves = {k: v.clone().requires_grad_() for k, v in values.items()}
    dsq_quantize(*leaves.values(), bits=bits).backward(upstream)

    def loss(**changed: torch.Tensor) -> torch.Tensor:
        return dsq_soft(*(values | changed).values(), bits=bits) * upstream

    h = 1e-6
    want_x = (loss(x=values["x"] + h) - loss(x=values["x"] - h)) / (2 * h)
    torch.testing.assert_close(leaves["x"].grad, want_x, rtol=1e-5, atol=1e-5)
    for name in ("low", "high", "a"):
        want = (loss(**{name: values[name] + h}) - loss(**{name: values[name] - h})).sum() / (2 * h)
        torch.testing.assert_close(leaves[name].grad, want, rtol=1e-5, atol=1e-5)


def test_soft_dsq_autograd_agrees_with_the_closed_form():
    x, upstream = randn(400, dtype=torch.float64), randn(400, seed=1, dtype=torch.float64)
    start = [x, *(torch.tensor(v, dtype=torch.float64) for v in (-1.1, 0.8, 0.15))]
    soft, hard = ([t.clone().requires_grad_() for t in start] for _ in range(2))
    dsq_soft(*soft, bits=3).backward(upstream)
    dsq_quantize(*hard, bits=3).backward(upstream)
    for mine, want in zip(hard, soft, strict=True):
        torch.testing.assert_close(mine.grad, want.grad)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_hard_dsq_is_the_uniform_endpoint_quantizer(bits):
    x, low, high = randn(500), torch.tensor(-0.9), torch.tensor(1.1)
    n = 2**bits - 1
    want = low + (high - low) / n * torch.round((x.clamp(-0.9, 1.1) - low) / ((high - low) / n))
    got = dsq_quantize(x, low, high, torch.tensor(0.2), bits=bits)
    torch.testing.assert_close(got, want)
    soft = dsq_soft(x, low, high, torch.tensor(1e-6), bits=bits)  # nearly hard: off at the thresholds only
    steps = (x.clamp(-0.9, 1.1) - low) / (2.0 / n)
    clear = (steps - torch.floor(steps) - 0.5).abs() > 0.3
    torch.testing.assert_close(soft[clear], want[clear], atol=1e-3, rtol=0)


def test_dsq_row_with_zero_on_the_grid():
    quantizer = DSQ(2, signed=True, role="act")
    quantizer.init_from(randn(100))
    quantizer.low.data.fill_(-0.9)
    quantizer.high.data.fill_(2.1)  # Delta = 1, z = round(0.9) = 1: levels -1 0 1 2
    assert quantizer(torch.tensor([-4.0, -0.4, 0.6, 1.7])).tolist() == [-1.0, 0.0, 1.0, 2.0]


def test_dsq_weights_of_few_bits_may_have_no_zero():
    quantizer = DSQ(2, signed=True, role="weight")
    quantizer.init_from(randn(100))
    quantizer.low.data.fill_(-1.5)
    quantizer.high.data.fill_(1.5)
    assert quantizer(torch.tensor([-4.0, -0.1, 0.1, 1.1])).tolist() == [-1.5, -0.5, 0.5, 1.5]
    grid = quantizer.grid()
    assert (grid.scale.item(), grid.zero_point.item(), *grid[2:]) == (0.5, 3.0, 0, 6, 2)


def test_dsq_module_gradient_is_the_functions_at_its_own_grid():
    x, upstream = randn(300), randn(300, seed=1)
    quantizer = DSQ(3, signed=True, role="act")
    quantizer.init_from(x)
    grid = quantizer.grid()
    low = grid.scale * (grid.qmin - grid.zero_point)
    high = grid.scale * (grid.qmax - grid.zero_point)
    leaves = [t.clone().requires_grad_() for t in (x, low, high, quantizer.dsq_alpha().detach())]
    dsq_quantize(*leaves, bits=3).backward(upstream)
    torch.testing.assert_close(grads(quantizer, x, upstream), leaves[0].grad, rtol=1e-4, atol=1e-5)
    g = 1 / math.sqrt(300 * 7)
    torch.testing.assert_close(quantizer.low.grad / g, leaves[1].grad, rtol=1e-3, atol=1e-3)  # its own mirror below 0
    torch.testing.assert_close(quantizer.high.grad / g, leaves[2].grad, rtol=1e-3, atol=1e-3)
    share = (quantizer.dsq_alpha().item() - 1e-3) / 0.499
    want = leaves[3].grad * 0.499 * share * (1 - share)
    torch.testing.assert_close(quantizer.dsq_alpha_raw.grad / g, want, rtol=1e-3, atol=1e-3)


def test_dsq_alpha_starts_as_asked_and_stays_inside():
    quantizer = DSQ(4, signed=False, role="act", dsq_alpha=0.3)
    assert quantizer.dsq_alpha().item() == pytest.approx(0.3)
    for raw in (-100.0, 100.0):
        quantizer.dsq_alpha_raw.data.fill_(raw)
        assert 1e-3 <= quantizer.dsq_alpha().item() <= 0.5
    with pytest.raises(ValueError, match="dsq_alpha"):
        DSQ(4, signed=False, role="act", dsq_alpha=0.5)
    with pytest.raises(ValueError, match="role"):
        DSQ(4, signed=False, role="bias")  # type: ignore[arg-type]


# --- first fits ------------------------------------------------------------------------------------------------------


def test_ranges_by_hand():
    x = torch.tensor([-2.0, 0.5, 3.0])
    assert [t.item() for t in widest_range(x, signed=True)] == [-2.0, 3.0]
    assert [t.item() for t in widest_range(x, signed=False)] == [0.0, 3.0]
    assert [t.item() for t in widest_range(torch.zeros(3), signed=True)] == [-1.0, 1.0]
    assert three_sigma(torch.tensor([-1.0, 1.0])).item() == 1.0
    assert sample(torch.arange(1000), n=100).numel() in range(50, 201)


def test_best_shrink_finds_the_least_error_and_the_known_gaussian_clip():
    x = randn(20000)
    grid = LSQ(4, signed=False, role="act")
    grid.init_from(x.abs())
    clip = least_error_clip(x.relu(), grid.grid())
    assert clip.item() == pytest.approx(2.90, abs=0.15)  # ReLU of a Gaussian at 4 bit, end-point grid (ALGORITHMS 6)

    def lattice(_: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return high / 7, torch.tensor(7.0)

    low, high = best_shrink(x, -x.abs().max(), x.abs().max(), lattice, n_steps=14)
    assert high.item() == pytest.approx(2.47, abs=0.12)  # symmetric restricted grid at 4 bit, same table
    assert low.item() == -high.item()
