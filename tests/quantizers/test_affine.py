"""The affine grid: hand-computed rows, PyTorch's own operators, float64 finite differences."""

import pytest
import torch

from hq_lib.quantizers import (
    Grid,
    Slope,
    act_quantizer,
    dequantize,
    quantize_to_int,
    staircase,
    straight_through,
)
from hq_lib.quantizers.affine import (
    FINEST_SCALE,
    MIN_SCALE,
    affine_from_range,
    check_finite,
    integer_range,
    max_abs,
    mean_abs,
    min_max,
    round_ste,
    usable,
)
from hq_lib.quantizers.straight_through import flat, unflat

S, Z = torch.tensor(0.5), torch.tensor(0.0)
GRID = {"qmin": -8, "qmax": 7}
ENDS = torch.tensor((-8.0, 7.0))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fake_quantize(x, scale, zero_point, *, qmin, qmax):
    """The composed form, x_hat = s (clip(round(x / s) + z, qmin, qmax) - z), whose gradient is autograd's."""
    x_int = round_ste(x / scale) + zero_point
    inside = (x_int >= qmin) & (x_int <= qmax)  # torch.clamp alone has slope 0 *at* its bounds since torch 2.14
    return scale * (torch.where(inside, x_int, x_int.detach().clamp(qmin, qmax)) - zero_point)


def test_hand_computed_row():
    x = torch.tensor([-9.0, -0.30, 0.24, 0.26, 3.6])
    assert torch.equal(fake_quantize(x, S, Z, **GRID), torch.tensor([-4.0, -0.5, 0.0, 0.5, 3.5]))


def test_ties_go_to_even_and_the_zero_point_is_added_after_rounding():
    x = torch.tensor([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25])  # -2.5 -1.5 -0.5 0.5 1.5 2.5 steps
    want = torch.tensor([-2, -2, 0, 0, 2, 2]) + 3
    assert torch.equal(quantize_to_int(x, Grid(S, torch.tensor(3.0), -8, 7)), want.to(torch.int32))


def test_quantizing_twice_changes_nothing():
    once = fake_quantize(randn(64), S, Z, **GRID)
    assert torch.equal(fake_quantize(once, S, Z, **GRID), once)


@pytest.mark.parametrize(("scale", "zero", "qmin", "qmax"), [(0.1, 0, -8, 7), (0.037, 5, 0, 15), (0.02, 131, 0, 255)])
def test_values_and_gradient_agree_with_torch(scale, zero, qmin, qmax):
    ours, theirs = randn(1000).requires_grad_(), randn(1000).requires_grad_()
    upstream = randn(1000, seed=1)
    fake_quantize(ours, torch.tensor(scale), torch.tensor(float(zero)), qmin=qmin, qmax=qmax).backward(upstream)
    want = torch.fake_quantize_per_tensor_affine(theirs, scale, zero, qmin, qmax)
    want.backward(upstream)
    got = fake_quantize(ours, torch.tensor(scale), torch.tensor(float(zero)), qmin=qmin, qmax=qmax)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_per_channel_agrees_with_torch_and_is_a_loop_over_channels():
    w, scale = randn(6, 3, 2, 2), torch.linspace(0.05, 0.3, 6)
    got = fake_quantize(w, scale.view(-1, 1, 1, 1), Z, **GRID)
    want = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(6, dtype=torch.int32), 0, -8, 7)
    torch.testing.assert_close(got, want)
    loop = torch.stack([fake_quantize(w[c], scale[c], Z, **GRID) for c in range(6)])
    assert torch.equal(got, loop)


@pytest.mark.parametrize(("value", "slope"), [(0.3, 1.0), (100.0, 0.0), (-100.0, 0.0)])
def test_gradient_is_one_inside_and_zero_when_clipped(value, slope):
    x = torch.tensor(value, requires_grad=True)
    fake_quantize(x, S, Z, **GRID).backward()
    assert x.grad is not None
    assert x.grad.item() == slope


@pytest.mark.parametrize(("value", "want"), [(0.3, 1 - 0.6), (100.0, 7.0), (-100.0, -8.0)])
def test_scale_gradient_by_the_piecewise_formula(value, want):
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(torch.tensor(value), scale, Z, **GRID).backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(want, abs=1e-6)


def test_round_ste_is_exact_and_has_slope_one():
    x = (randn(1000) * 1000).requires_grad_()
    y = round_ste(x)
    y.sum().backward()
    assert torch.equal(y, torch.round(x))
    assert torch.equal(x.grad, torch.ones(1000))


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "want"),
    [
        (1, False, False, (0, 1, 1)),
        (8, False, False, (0, 255, 1)),
        (16, False, False, (0, 65535, 1)),
        (1, True, False, (-1, 1, 2)),
        (2, True, True, (-1, 1, 1)),
        (8, True, False, (-128, 127, 1)),
        (8, True, True, (-127, 127, 1)),
    ],
)
def test_integer_range(bits, signed, narrow, want):
    assert integer_range(bits, signed=signed, narrow=narrow) == want


def test_ranges_hold_zero_exactly():
    scale, zero = affine_from_range(torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([2.0, 3.0, -1.0]), n_steps=15)
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2, 0.2]))
    assert zero.tolist() == [5.0, 0.0, 15.0]


def test_all_zero_and_constant_tensors():
    zero = torch.zeros(4)
    scale, z = affine_from_range(*min_max(zero), n_steps=255)
    assert scale.item() == pytest.approx(MIN_SCALE)
    assert torch.equal(fake_quantize(zero, scale, z, qmin=0, qmax=255), zero)
    for constant in (torch.full((4,), 2.5), torch.full((4,), -2.5)):
        scale, z = affine_from_range(*min_max(constant), n_steps=255)
        torch.testing.assert_close(fake_quantize(constant, scale, z, qmin=0, qmax=255), constant)


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-12])
def test_a_tensor_of_small_values_keeps_its_levels(size):
    x = torch.randn(1000) * size
    for bits in (8, 16):
        scale, zero = affine_from_range(*min_max(x), n_steps=2**bits - 1)
        error = (fake_quantize(x, scale, zero, qmin=0, qmax=2**bits - 1) - x).abs().max().item()
        assert error <= 0.51 * (x.max() - x.min()).item() / (2**bits - 1)


def test_a_channel_beside_much_larger_ones_has_the_floor_that_it_always_had():
    assert usable(torch.tensor([0.01, 1e-20, 0.0])).tolist() == torch.tensor([0.01, MIN_SCALE, MIN_SCALE]).tolist()
    assert usable(torch.tensor([1e-9, 1e-20, 0.0])).tolist() == pytest.approx([1e-9, 1e-9 / 1024, 1e-9 / 1024])
    assert usable(torch.zeros(3)).tolist() == torch.full((3,), MIN_SCALE).tolist()
    assert usable(torch.tensor(1e-30)).item() == pytest.approx(FINEST_SCALE)


@pytest.mark.parametrize("options", [{"method": "lsq"}, {"method": "pact"}, {"method": "minmax", "power_of_two": True}])
def test_a_step_that_is_held_at_its_floor_is_said_by_name(options, recwarn):
    quantizer = act_quantizer(bits=8, signed=True, **options)
    quantizer.owner = "layer1.conv"
    quantizer.init_from(torch.zeros(100))
    quantizer.init_from(torch.randn(100))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"'layer1\.conv'.*scale the tensor up"):
        quantizer.init_from(torch.randn(100) * 1e-19)


def test_half_step_levels():
    delta, zero = affine_from_range(torch.tensor(-1.5), torch.tensor(1.5), n_steps=3, half_steps=True)
    assert (delta.item(), zero.item()) == (1.0, 1.5)
    delta, zero = affine_from_range(torch.tensor(-1.4), torch.tensor(1.6), n_steps=3)
    assert (delta.item(), zero.item()) == (1.0, 1.0)


def test_channel_statistics():
    w = randn(3, 4, 5)
    assert min_max(w, axis=0)[1].shape == (3, 1, 1)
    assert torch.equal(max_abs(w, axis=1).flatten(), w.abs().amax((0, 2)))
    torch.testing.assert_close(mean_abs(w), w.abs().mean())


def test_bad_data_is_refused_by_name():
    with pytest.raises(ValueError, match="layer3: 2 of 4 values are NaN or Inf"):
        check_finite(torch.tensor([1.0, float("nan"), float("inf"), 0.0]), "layer3")
    with pytest.raises(ValueError, match=r"layer3.*empty"):
        check_finite(torch.empty(0), "layer3")
    with pytest.raises(ValueError, match="NaN"):
        quantize_to_int(torch.tensor([float("nan")]), Grid(S, Z, -8, 7))


def test_nan_propagates_and_inf_is_clipped():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], requires_grad=True)
    for slope in Slope:
        y = staircase(x, S, Z, ENDS, slope=slope)
        assert torch.isnan(y[0])
        assert y[1:].tolist() == [3.5, -4.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("scale", "zero"), [(S, Z), (torch.tensor(0.031), torch.tensor(-3.0)), (torch.tensor(0.1), torch.tensor(2.0))]
)
def test_staircase_has_the_values_and_gradients_of_the_composed_form(scale, zero):
    x = randn(2000)
    composed = [t.clone().requires_grad_() for t in (x, scale, zero)]
    fast = [t.clone().requires_grad_() for t in (x, scale, zero)]
    upstream = randn(2000, seed=1)
    want = fake_quantize(*composed, **GRID)
    got = staircase(*fast, ENDS, slope=Slope.LSQ_PLUS)
    want.backward(upstream)
    got.backward(upstream)
    assert torch.equal(got, want)
    x_hat = dequantize(quantize_to_int(x, Grid(scale, zero, -8, 7)), Grid(scale, zero, -8, 7))
    assert torch.equal(got, x_hat)
    edge = ((x / scale + zero) < -7.9) & ((x / scale + zero) > -8.6) | ((x / scale + zero) > 6.9) & (
        (x / scale + zero) < 7.6
    )  # clip-first and round-first differ half a step beyond the ends
    torch.testing.assert_close(fast[0].grad[~edge], composed[0].grad[~edge])


def test_lsq_slope_equals_autograd_of_the_clip_first_form():
    x, scale, zero = randn(500), torch.tensor(0.1), torch.tensor(3.0)
    tensors = [t.clone().requires_grad_() for t in (x, scale, zero)]
    fast = [t.clone().requires_grad_() for t in (x, scale, zero)]
    upstream = randn(500, seed=1)
    v = torch.clamp(tensors[0] / tensors[1], -8 - tensors[2], 7 - tensors[2])
    (tensors[1] * round_ste(v)).backward(upstream)
    staircase(*fast, ENDS, slope=Slope.LSQ_PLUS).backward(upstream)
    for mine, want in zip(fast, tensors, strict=True):
        torch.testing.assert_close(mine.grad, want.grad, rtol=1e-4, atol=1e-4)


def test_odd_grid_has_levels_on_both_sides_of_zero():
    x = torch.tensor([-3.0, -0.9, -0.1, 0.0, 0.1, 0.9, 3.0])
    got = staircase(x, torch.tensor(1.0), torch.tensor(0.0), torch.tensor((-1.5, 1.5)), odd=True, slope=Slope.CLIP)
    assert got.tolist() == [-1.5, -0.5, -0.5, 0.5 if got[3] > 0 else -0.5, 0.5, 0.5, 1.5]
    grid = Grid(torch.tensor(0.5), torch.tensor(0.0), -3, 3, 2)
    assert torch.equal(dequantize(quantize_to_int(x, grid), grid), got)
    assert quantize_to_int(x, grid).tolist()[:3] == [-3, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert staircase(randn(8).to(dtype), S, Z, ENDS, slope=Slope.CLIP).dtype == dtype


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flat_and_unflat_are_inverse(memory_format):
    x = randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    back = unflat(flat(x, x), x)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    assert flat(x, x).data_ptr() == x.data_ptr()
    other = randn(2, 3, 4, 5)
    assert torch.equal(unflat(flat(other, x), x), other)


@pytest.mark.slow
@pytest.mark.parametrize("slope", list(Slope))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_kernels_equal_the_plain_ones(slope, memory_format, monkeypatch):
    x = randn(8, 32, 32, 32).contiguous(memory_format=memory_format)
    upstream = randn(8, 32, 32, 32, seed=1)
    results = []
    for on in (True, False):
        monkeypatch.setattr(straight_through, "_state", {"on": on, "failure": None, "said": False})
        tensors = [t.clone().requires_grad_() for t in (x, torch.tensor(0.13), torch.tensor(2.0))]
        y = staircase(*tensors, ENDS, slope=slope)
        y.backward(upstream)
        results.append((y.detach(), *(t.grad for t in tensors)))
    fused, plain = results
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    assert fused[0].stride() == x.stride()
    for mine, want in zip(fused[2:], plain[2:], strict=True):
        assert (mine is None) == (want is None)
        if mine is not None:
            torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-2)


def test_a_failing_compiler_falls_back_silently(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no C++ compiler here")

    state = {"on": True, "failure": None, "said": False}
    monkeypatch.setattr(straight_through, "_state", state)
    monkeypatch.setattr(torch, "compile", broken)
    double = straight_through.Fused(times, n_elementwise=1, apart=False)
    large = torch.ones(2**17)
    assert torch.equal(double(large, torch.tensor(2.0)), 2.0 * large)
    assert state["failure"] == "RuntimeError: no C++ compiler here"
    assert torch.equal(double(large, torch.tensor(3.0)), 3.0 * large)


def times(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return x * step
