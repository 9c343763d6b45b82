"""ACIQ against its published constants, numerical integration, sampled tensors and the moments it restores."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import laplace, norm

from hq_lib.quantizers import aciq
from hq_lib.quantizers.ranges import grid_from_range

DENSITY = {"laplace": laplace.pdf, "gauss": norm.pdf}
# Optimal ratios and model errors recomputed by golden section, independent of the closed forms here; rows are M = 1..8.
RATIOS = {
    ("laplace", False): [1.86282, 2.83068, 3.89723, 5.02864, 6.20477, 7.41313, 8.64562, 9.89676],
    ("laplace", True): [2.83068, 3.89723, 5.02864, 6.20477, 7.41313, 8.64562, 9.89676, 11.16269],
    ("gauss", False): [1.23991, 1.71064, 2.15159, 2.55914, 2.93620, 3.28691, 3.61511, 3.92404],
    ("gauss", True): [1.71064, 2.15159, 2.55914, 2.93620, 3.28691, 3.61511, 3.92404, 4.21633],
}
MODEL_MSE = {
    "laplace": [0.59964, 0.28488, 0.11970, 0.046022, 0.016572, 5.6788e-3, 1.8725e-3, 5.9885e-4],
    "gauss": [0.21501, 0.087149, 0.031429, 0.010493, 0.0033226, 1.0129e-3, 3.0022e-4, 8.7078e-5],
}
GRID_RATIOS = {  # two decimals; (Laplace, Gauss) at M = 2, 3, 4, 5, 6, 8
    "midpoint": [(3.08, 1.99), (4.13, 2.34), (5.22, 2.68), (6.34, 3.01), (7.50, 3.33), (9.93, 3.94)],
    "endpoint": [(2.31, 1.49), (3.62, 2.05), (4.89, 2.51), (6.14, 2.92), (7.38, 3.28), (9.89, 3.92)],
    "restricted": [(2.00, 1.22), (3.49, 1.95), (4.82, 2.47), (6.10, 2.90), (7.36, 3.27), (9.88, 3.92)],
    "relu_endpoint": [(3.49, 1.95), (4.82, 2.47), (6.10, 2.90), (7.36, 3.27), (8.62, 3.61), (11.16, 4.21)],
}


def sample(prior: str, n: int, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    values = draw.laplace(0, spread, n) if prior == "laplace" else draw.normal(0, spread, n)
    return torch.from_numpy(values)


# ---------------------------------------------------------------- constants


@pytest.mark.parametrize(("prior", "relu"), list(RATIOS))
def test_ratios_agree_with_the_table_to_1e4(prior, relu):
    got = [aciq.clip_ratio(m, prior, relu=relu) for m in range(1, 9)]
    np.testing.assert_allclose(got, RATIOS[prior, relu], atol=1e-5)


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
def test_relu_is_signed_with_one_more_bit(prior):
    for m in range(8):
        assert aciq.clip_ratio(m, prior, relu=True) == aciq.clip_ratio(m + 1, prior)
        assert 8 * aciq.noise_mse(2.0, m, prior, relu=True) == pytest.approx(8 * aciq.noise_mse(2.0, m + 1, prior) / 2)


@pytest.mark.parametrize(("prior", "relu"), list(RATIOS))
def test_published_constants_are_rounded_or_cut_copies(prior, relu):
    for m, published in aciq.PUBLISHED[prior, relu].items():
        assert abs(aciq.clip_ratio(m, prior, relu=relu) - published) < (0.02 if (prior, m) == ("gauss", 8) else 0.01)


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
def test_model_error_table_and_its_integral(prior):
    for m, want in enumerate(MODEL_MSE[prior], start=1):
        x = aciq.clip_ratio(m, prior)
        assert aciq.noise_mse(x, m, prior) == pytest.approx(want, rel=5e-5)
        tail = quad(lambda y, x=x: (y - x) ** 2 * DENSITY[prior](y), x, np.inf)[0]
        assert aciq.noise_mse(x, m, prior) == pytest.approx(2 * tail + x**2 / (3 * 4**m), rel=1e-6)
        assert aciq.noise_mse(x * 1.01, m, prior) > aciq.noise_mse(x, m, prior) < aciq.noise_mse(x * 0.99, m, prior)


@pytest.mark.parametrize("grid", list(GRID_RATIOS))
def test_grid_optima_agree_with_the_table(grid):
    for m, (for_laplace, for_gauss) in zip((2, 3, 4, 5, 6, 8), GRID_RATIOS[grid], strict=True):
        assert aciq.grid_clip_ratio(m, "laplace", grid) == pytest.approx(for_laplace, abs=0.0051)
        assert aciq.grid_clip_ratio(m, "gauss", grid) == pytest.approx(for_gauss, abs=0.0051)


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
@pytest.mark.parametrize(("grid", "bits"), [("midpoint", 2), ("endpoint", 3), ("restricted", 3), ("relu_endpoint", 2)])
def test_exact_error_is_the_integral_of_the_staircase(prior, grid, bits):
    ratio, top = 1.7, 2**bits - 1
    step, low, first = {
        "midpoint": (2 * ratio / 2**bits, -ratio + ratio / 2**bits, 0),
        "endpoint": (2 * ratio / top, -ratio, 0),
        "restricted": (2 * ratio / (top - 1), -ratio, 0),
        "relu_endpoint": (ratio / top, 0.0, 0),
    }[grid]
    x = np.linspace(-40, 40, 2_000_001)
    y = np.maximum(x, 0) if grid == "relu_endpoint" else x
    n = top - 1 if grid == "restricted" else top
    y_hat = low + step * np.clip(np.round((y - low) / step), first, n)
    numeric = np.trapezoid((y - y_hat) ** 2 * DENSITY[prior](x), x)
    assert aciq.grid_mse(ratio, bits, prior, grid) == pytest.approx(numeric, rel=1e-5)


def test_at_two_bits_the_table_costs_what_the_grid_says():
    table = aciq.constants(bits=(2, 3)).set_index(["prior", "relu", "bits", "grid"])
    assert table.loc[("laplace", False, 2, "endpoint"), "penalty_pct"] == pytest.approx(10, abs=0.5)
    assert table.loc[("laplace", False, 2, "restricted"), "penalty_pct"] == pytest.approx(18, abs=0.5)
    assert table.loc[("gauss", False, 2, "restricted"), "penalty_pct"] == pytest.approx(34, abs=0.5)
    assert table.xs(3, level="bits")["penalty_pct"].max() < 4.5
    assert (table["gap"].abs() < 0.02).all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: aciq.clip_ratio(4, "cauchy"), "laplace"), (lambda: aciq.clip_ratio(-1, "gauss"), "0 to 32"),
    (lambda: aciq.noise_mse(math.nan, 4, "gauss"), "NaN"),
    (lambda: aciq.grid_mse(1.0, 4, "gauss", "grid"), "choose one"),
    (lambda: aciq.grid_mse(1.0, 1, "gauss", "restricted"), "from 2"),
    (lambda: aciq.grid_mse(1.0, 13, "gauss", "endpoint"), "12"),
    (lambda: aciq.predicted_mse(1.0, 0.0, bits=4, prior="gauss"), "constant"),
    (lambda: aciq.clip_range(torch.ones(3), bits=4, relu="offical"), "official"),
    (lambda: aciq.clip_range(torch.ones(3), bits=4, relu="theory", grid="endpoint"), "relu_endpoint"),
    (lambda: aciq.clip_range(torch.ones(3), bits=4, prior="normal"), "auto"),
    (lambda: aciq.clip_range(torch.tensor([math.nan]), bits=4), "NaN"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
def test_signed_range_of_a_sample(prior):
    x = sample(prior, 400_000, spread=2.5) + 1.0
    got = aciq.clip_range(x, bits=4, prior="auto")
    alpha = 2.5 * RATIOS[prior, False][3]
    assert got.low.item() == pytest.approx(1.0 - alpha, rel=0.02)
    assert got.high.item() == pytest.approx(1.0 + alpha, rel=0.02)


def test_official_and_theory_differ_after_a_relu_as_derived():
    """ReLU(Laplace(0, b0)): mean b0/2, b = 0.6065 b0, so 'official' stops at 4.26 b0; the optimum is 6.2 b0."""
    x = sample("laplace", 1_000_000, spread=3.0).relu()
    official = aciq.clip_range(x, bits=4, prior="laplace", relu="official")
    theory = aciq.clip_range(x, bits=4, prior="laplace", relu="theory")
    assert official.high.item() / 3 == pytest.approx(0.5 + 0.60653 * 6.20477, rel=0.01)
    assert theory.high.item() / 3 == pytest.approx(6.20477, rel=0.01)
    assert official.low.item() == theory.low.item() == 0.0


def test_theory_reads_the_same_range_before_and_after_the_relu_and_stays_within_the_data():
    x = sample("gauss", 10_000)
    before, after = (aciq.clip_range(v, bits=4, prior="gauss", relu="theory") for v in (x, x.relu()))
    assert before.high == after.high
    assert aciq.clip_range(x[:50], bits=8, prior="laplace", relu="theory").high == x[:50].max()


@pytest.mark.parametrize("bits", [0, 2, 5])
def test_per_channel_is_a_loop_over_channels(bits):
    x = torch.stack([sample("laplace", 3000, 0.5), sample("gauss", 3000, 4.0), torch.zeros(3000).double()])
    got = aciq.clip_range(x, bits=bits, axis=0)
    for c in range(3):
        one = aciq.clip_range(x[c], bits=bits)
        torch.testing.assert_close(torch.cat([got.low[c], got.high[c]]), torch.stack(one), rtol=1e-12, atol=0)
    assert aciq.fit(x, axis=0).is_laplace[:2].tolist() == [True, False]


@pytest.mark.parametrize(("prior", "bits"), [("laplace", 2), ("laplace", 4), ("gauss", 3), ("gauss", 6)])
def test_predicted_error_is_the_measured_error(prior, bits):
    x = sample(prior, 1_000_000, spread=0.7)
    alpha = 0.7 * aciq.grid_clip_ratio(bits, prior, "endpoint")
    step = 2 * alpha / (2**bits - 1)
    x_hat = -alpha + step * torch.clamp(torch.round((x + alpha) / step), 0, 2**bits - 1)
    predicted = aciq.predicted_mse(alpha, 0.7, bits=bits, prior=prior, grid="endpoint")
    assert (x - x_hat).square().mean().item() == pytest.approx(predicted, rel=0.01)


def test_grid_aware_clip_beats_the_table_at_two_bits():
    x = sample("gauss", 200_000).float().relu()

    def error(**options):
        grid = grid_from_range(aciq.clip_range(x, bits=2, prior="gauss", relu="theory", **options), bits=2)
        return (x - grid.scale * torch.clamp(torch.round(x / grid.scale), 0, 3)).square().mean().item()

    assert error(grid="relu_endpoint") < 0.97 * error()
