"""Ranges and the L_p search against numpy, hand-computed grids, and a literal loop over every published candidate."""

import itertools

import numpy as np
import pytest
import torch

from hq_lib.quantizers import Grid, lp_grid
from hq_lib.quantizers.lp_grid import lp_search
from hq_lib.quantizers.ranges import grid_from_range, minmax_range, percentile_range


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(*shape: int, seed: int = 0, shift: float = 0.2) -> torch.Tensor:
    x = torch.randn(*shape, generator=generator(seed))
    return x.sign() * x.abs() ** 1.7 + shift


def literal_search(x, *, bits, p=2.4, mode):
    """The official loops, one quantized copy of x per candidate, float64; returns (error, scale, zero_point)."""
    x = x.double()
    low, high, n = min(float(x.min()), 0.0), max(float(x.max()), 0.0), 2**bits - 1
    best = (np.inf, 0.0, 0)
    for i in range(100):
        fraction = (i + 1) / 100
        width = 2 * max(-low, high) if mode.startswith("symmetric") else high - low
        half = 2 ** (bits - 1)
        ends = {"symmetric": (-half, half - 1), "symmetric_restricted": (1 - half, half - 1)}
        qmin, qmax = ends.get(mode, (0, n))
        scale = fraction * width / (qmax - qmin)
        zeros = {"both": range(n + 1), "negative": [n]}
        for zero_point in zeros.get(mode, [0]):
            x_int = torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)
            error = float((x - scale * (x_int - zero_point)).abs().pow(p).mean())
            if error < best[0]:
                best = (error, scale, zero_point)
    return best


# ---------------------------------------------------------------- ranges


def test_minmax_row_and_grid_by_hand():
    low_high = minmax_range(torch.tensor([-1.0, 0.5, 2.0]))
    grid = grid_from_range(low_high, bits=2)
    assert (low_high.low.item(), low_high.high.item()) == (-1.0, 2.0)
    assert (grid.scale.item(), grid.zero_point.item(), grid.qmin, grid.qmax) == (1.0, 1.0, 0, 3)


@pytest.mark.parametrize(
    ("scheme", "scale", "ends"), [("symmetric", 2 / 1.5, (-2, 1)), ("symmetric_restricted", 2.0, (-1, 1))]
)
def test_symmetric_grids_by_hand(scheme, scale, ends):
    grid = grid_from_range(minmax_range(torch.tensor([-1.0, 2.0])), bits=2, scheme=scheme)
    assert grid.scale.item() == pytest.approx(scale)
    assert (grid.zero_point.item(), (grid.qmin, grid.qmax)) == (0.0, ends)


@pytest.mark.parametrize("x", [torch.tensor([3.0, 5.0]), torch.tensor([-5.0, -3.0]), torch.zeros(4)])
def test_zero_is_always_a_level(x):
    grid = grid_from_range(minmax_range(x), bits=4)
    assert grid.scale > 0
    assert grid.qmin <= grid.zero_point <= grid.qmax
    assert grid.zero_point == grid.zero_point.round()
    covered = grid.scale * (torch.tensor([grid.qmin, grid.qmax]) - grid.zero_point)
    assert covered[0] <= x.min() + 1e-6
    assert covered[1] >= x.max() - 1e-6


def test_per_channel_is_a_loop_over_channels():
    x = heavy_tailed(5, 3, 4, 4)
    for axis in (0, 1):
        for function in (minmax_range, percentile_range):
            per_channel = function(x, axis=axis)
            for c in range(x.shape[axis]):
                one = function(x.select(axis, c))
                assert (per_channel.low.flatten()[c], per_channel.high.flatten()[c]) == (one.low, one.high)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.9, 100.0])
def test_percentile_is_numpys_order_statistic(percent):
    x = heavy_tailed(1001)
    clip = np.quantile(x.abs().numpy(), percent / 100, method="inverted_cdf")
    got = percentile_range(x, percent)
    assert got.high.item() == pytest.approx(min(clip, x.max().item()))
    assert got.low.item() == pytest.approx(max(-clip, x.min().item()))
    relu = percentile_range(x.relu(), percent)
    assert relu.high.item() == pytest.approx(np.quantile(x.relu().numpy(), percent / 100, method="inverted_cdf"))
    assert relu.low.item() == 0.0


def test_percentile_beyond_the_size_where_torch_quantile_stops():
    n = 2**24 + 1000
    x = torch.arange(n, dtype=torch.float32).flip(0)
    assert percentile_range(x, 50.0).high.item() == pytest.approx(n / 2, abs=2)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")]), torch.tensor([])])
def test_unusable_values_are_refused(bad):
    for function in (minmax_range, percentile_range, lambda x: lp_search(x, bits=4)):
        with pytest.raises(ValueError, match=r"NaN or Inf|empty"):
            function(bad)


@pytest.mark.parametrize(("options", "message"), [
    ({"bits": 0}, "int from 1"), ({"bits": 4.0}, "int from 1"),
    ({"bits": 4, "scheme": "affin"}, "did you mean 'affine'"),
    ({"bits": 1, "scheme": "symmetric_restricted"}, "binary"), ({"bits": 4, "p": 0.5}, "p >= 1"),
])  # fmt: skip
def test_bad_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        lp_search(torch.tensor([-1.0, 1.0]), **options)


def test_integer_tensors_and_bad_percentages_are_refused():
    with pytest.raises(ValueError, match="real values"):
        minmax_range(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="percentage"):
        percentile_range(torch.ones(3), 0.999 * 101 + 1)


def test_nothing_carries_a_gradient():
    x = heavy_tailed(64).requires_grad_()
    parts = [*minmax_range(x), *percentile_range(x), *lp_search(x, bits=3)[:2]]
    assert not any(part.requires_grad for part in parts)


# ---------------------------------------------------------------- L_p search


def _apply(x, grid):
    return grid.scale * (
        torch.clamp(torch.round(x / grid.scale) + grid.zero_point, grid.qmin, grid.qmax) - grid.zero_point
    )


def _error(x, grid, p=2.4):
    return float((x.double() - _apply(x, grid).double()).abs().pow(p).mean())


def assert_finds(wanted, x, **options):
    """(error, scale, zero point) of ``x``, found in its own precision, and without any rounding in double."""
    error, scale, zero_point = wanted
    got, exact = lp_search(x, **options), lp_search(x.double(), **options)
    assert _error(x.double(), exact, options.get("p", 2.4)) == pytest.approx(error, rel=1e-9)
    assert (exact.scale.item(), exact.zero_point.item()) == (pytest.approx(scale, rel=1e-9), zero_point)
    assert (got.scale, got.zero_point) == (exact.scale.to(x.dtype), exact.zero_point)


@pytest.mark.parametrize(
    ("bits", "p"), [(1, 2.4), (2, 2.4), (3, 2.0), (4, 2.4), (4, 1.0), (4, 1.5), (3, 4.0), (6, 2.4)]
)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_two_sided_search_is_the_literal_loop(bits, p, shift):
    x = heavy_tailed(700, seed=bits, shift=shift)
    assert_finds(literal_search(x, bits=bits, p=p, mode="both"), x, bits=bits, p=p)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mode", ["positive", "negative", "symmetric", "symmetric_restricted"])
def test_one_dimensional_searches_are_the_literal_loop(bits, mode):
    x = heavy_tailed(900, seed=bits)
    x = {"positive": x.relu(), "negative": -x.relu()}.get(mode, x)
    options = {"scheme": mode} if mode.startswith("symmetric") else {}
    assert_finds(literal_search(x, bits=bits, mode=mode), x, bits=bits, **options)


@pytest.mark.parametrize(("bits", "mode"), [(3, "both"), (4, "positive"), (8, "positive"), (8, "symmetric")])
def test_the_histogram_path_is_exact_too(bits, mode):
    x = heavy_tailed(100_000, seed=1)  # more values than bins
    x = x.relu() if mode == "positive" else x
    wanted, scheme = literal_search(x, bits=bits, mode=mode), mode if mode == "symmetric" else "affine"
    assert_finds(wanted, x, bits=bits, scheme=scheme)
    assert _error(x, lp_search(x, bits=bits, scheme=scheme, exact=False)) <= wanted[0] * 1.005


def test_eight_bit_two_sided_search_on_small_data_is_the_literal_loop():
    x = heavy_tailed(150, seed=3)
    assert_finds(literal_search(x, bits=8, mode="both"), x, bits=8)


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_search_is_a_loop_over_channels(axis):
    w = heavy_tailed(6, 5, 3, 3) * torch.logspace(-2, 1, 6).view(6, 1, 1, 1)
    got = lp_search(w, bits=4, axis=axis)
    for c in range(w.shape[axis]):
        one = lp_search(w.select(axis, c), bits=4)
        assert got.scale.flatten()[c] == one.scale
        assert got.zero_point.flatten()[c] == one.zero_point


@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_per_channel_meets_its_tensor(axis):
    w = heavy_tailed(6, 5, 3, 3)
    grid = lp_search(w, bits=4, axis=axis)
    x_hat = _apply(w, grid)
    for c in range(w.shape[axis]):
        one = Grid(grid.scale.flatten()[c], grid.zero_point.flatten()[c], grid.qmin, grid.qmax)
        assert torch.equal(x_hat.select(axis, c), _apply(w.select(axis, c), one))


def test_many_channels_are_searched_in_pieces(monkeypatch):
    w = heavy_tailed(40, 30)
    whole = lp_search(w, bits=4, axis=0)
    monkeypatch.setattr("hq_lib.quantizers.lp_grid._MAX_CELLS", 5 * 100 * 16)
    assert torch.equal(lp_search(w, bits=4, axis=0).scale, whole.scale)


@pytest.mark.parametrize("least", [0.1, -0.1])
def test_zeros_and_constants_have_a_grid(least):
    """Where every channel is one-sided, and where one of them is not."""
    w = torch.stack([torch.zeros(9), torch.full((9,), 0.3), torch.linspace(least, 1.0, 9)])
    got = lp_search(w, bits=4, axis=0)
    assert (got.scale > 0).all()
    assert (_apply(w, got) - w)[:2].abs().amax(1).tolist() == [0, pytest.approx(0.0, abs=1e-5)]
    assert _error(torch.zeros(4), lp_search(torch.zeros(4), bits=8)) == 0


def test_data_already_on_a_grid_is_found_with_no_error():
    x = 0.25 * torch.arange(-3, 13).float().repeat(50)
    assert _error(x, lp_search(x, bits=4)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("p", "n_bins"), list(itertools.product([1.0, 1.7, 2.0, 2.4, 3.0], [64, 512, 8192])))
def test_bounds_never_exceed_the_error(p, n_bins):
    """The proof behind ``exact=True``, sampled: bins of any width, every step, every window; and from above."""
    x = heavy_tailed(9000, seed=7)
    bins = lp_grid.make_bins(x.unsqueeze(0), n_bins)
    steps = (float(x.max() - x.min()) * torch.tensor([0.02, 0.2, 0.5, 1.0]) / 15).double().unsqueeze(0)
    k_min = -torch.arange(16.0).double().view(1, 1, -1)
    bound = lp_grid.window_bounds(bins, steps, k_min, n_codes=16, p=p)[0]
    for i, j in itertools.product(range(4), range(16)):
        grid = {"step": steps[:, i].view(1, 1, 1), "k_min": k_min[:, :, j].view(1, 1, 1), "n_codes": 16, "p": p}
        on_bins = lp_grid.grid_error(
            bins.mean.unsqueeze(1), bins.count.unsqueeze(1), spread=bins.spread.unsqueeze(1), **grid
        )
        x64 = x.double().view(1, 1, -1)
        truth = lp_grid.grid_error(x64, torch.ones_like(x64), spread=torch.zeros(1, 1, 1), **grid)
        assert bound[i, j] <= truth * (1 + 1e-9)
        assert on_bins <= truth * (1 + 1e-9)
        assert truth <= lp_grid._largest_error(bins, **grid) * (1 + 1e-9)


def test_bins_keep_count_and_mean():
    x = heavy_tailed(2, 5000)
    bins = lp_grid.make_bins(x, 100)
    assert bins.count.sum(1).tolist() == [5000.0, 5000.0]
    torch.testing.assert_close((bins.count * bins.mean).sum(1), x.double().sum(1))
    assert (bins.mean.diff(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_searched_like_their_values(dtype):
    x = heavy_tailed(70_000).to(dtype)
    before = x.clone()
    got, want = lp_search(x, bits=4), lp_search(x.double(), bits=4)
    assert torch.equal(x, before)
    assert got.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.scale.item() == pytest.approx(want.scale.item(), rel=1e-6)
    assert got.zero_point == want.zero_point
