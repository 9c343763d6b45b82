"""Devices: errors, drift and read noise have the published means and variances; bad tables and rates are refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    CrossbarError,
    Device,
    Drift,
    Drive,
    Faults,
    LogClamp,
    Mapping,
    Polynomial,
    Proportional,
    SimEngine,
    device,
    proportional,
    state_independent,
)
from hq_lib.crossbar.mapping import OK
from hq_lib.crossbar.native import Normals, _normal_points, stream
from hq_lib.crossbar.profiles import (
    DEVICES,
    IDEAL,
    PCM_JOSHI,
    PCM_NANDAKUMAR,
    RRAM_WAN_1S,
)

SIGMAS = 5  # of the test statistic


def sample(dev: Device, g: float, n: int = 20_000) -> torch.Tensor:
    xi = torch.randn(n, generator=stream(0, dev.name, g), dtype=torch.float64)
    return dev.program(torch.full((n,), g, dtype=torch.float64), xi)


def test_a_weight_on_a_pair_errs_by_the_root_of_two_of_its_cells():
    """What noise in training has to be compared with: 3 % of the window a cell are 4.2 % of the largest weight."""
    w = torch.randint(-127, 128, (2000, 10), generator=torch.Generator().manual_seed(0))
    w[0] = 127
    engine = SimEngine(Circuit(state_independent(0.03)))
    errors = (engine.layer(engine.load(w, 1.0, "a")).weight.double() - w) / 127
    assert float(errors.std()) == pytest.approx(0.03 * math.sqrt(2), rel=SIGMAS / math.sqrt(2 * w.numel()))


@pytest.mark.parametrize(
    ("dev", "g", "sigma"),
    [
        (PCM_JOSHI, 25.0, 0.286 + 0.0759 * 25 - 0.00179 * 625),
        (PCM_NANDAKUMAR, 12.5, 0.263 + 1.965 / 2 - 1.173 / 4),
        (RRAM_WAN_1S, 40.0, 1.098),
        (device("rram_1day"), 40.0, 2.671),
        (device("rram_crosssim"), 12.0, 2.487),
        (device("rram_lowratio"), 225.0, 2.7345),
        (state_independent(0.02), 10.0, 0.5),
        (proportional(0.1), 10.0, 1.0),
    ],
)
def test_programming_error_has_the_published_spread(dev, g, sigma):
    found = sample(dev, g)
    n = len(found)
    assert abs(float(found.mean()) - g) < SIGMAS * sigma / math.sqrt(n)
    assert float(found.std()) == pytest.approx(sigma, rel=SIGMAS / math.sqrt(2 * n) + 1e-3)


def test_the_two_fits_of_one_measurement_differ_near_zero():
    zero = torch.zeros(1, dtype=torch.float64)
    assert RRAM_WAN_1S.error.sigma(zero).item() == pytest.approx(0.348)
    assert device("rram_crosssim").error.sigma(zero).item() == pytest.approx(1.053)


def test_clipping_rectifies_idle_cells_as_stated():
    sigma = float(PCM_NANDAKUMAR.error.sigma(torch.zeros(1, dtype=torch.float64)))
    found = sample(PCM_NANDAKUMAR, 0.0)
    assert float(found.min()) == 0
    assert float(found.mean()) == pytest.approx(sigma / math.sqrt(2 * math.pi), rel=0.05)
    assert float(sample(state_independent(0.02), 0.0).min()) < 0


@pytest.mark.parametrize("dev", DEVICES.values(), ids=DEVICES)
def test_published_curves_are_positive_over_their_window(dev):
    if dev.error is not None:
        window = torch.linspace(dev.g_min_uS, dev.g_max_uS, 200, dtype=torch.float64)
        assert float(dev.error.sigma(window).min()) > 0
    assert dev.source


def test_drift_exponents_follow_the_published_statistics():
    for g in (0.05, 0.5, 1.0):
        nu = PCM_NANDAKUMAR.exponents(torch.full((20_000,), 25.0 * g, dtype=torch.float64), stream(1, g))
        mu = min(max(-0.0155 * math.log(g) + 0.0244, 0.049), 0.1)
        spread = min(max(-0.0125 * math.log(g) - 0.0059, 0.008), 0.045)
        assert abs(float(nu.mean()) - mu) < SIGMAS * spread / math.sqrt(20_000) + 1e-4
        assert float(nu.std()) == pytest.approx(spread, rel=0.05)


def test_drift_exponents_are_never_negative():
    wide = Device("d", "test", 0.0, 25.0, drift=Drift(LogClamp(0, 0, 0, 0), LogClamp(0, 0.1, 0.1, 0.1), 20.0))
    nu = wide.exponents(torch.full((20_000,), 10.0, dtype=torch.float64), stream(0))
    assert float(nu.min()) >= 0
    assert float(nu.mean()) == pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=0.03)


def test_drift_is_a_power_law_and_the_identity_at_its_reference_time():
    narrow = Device("d", "test", 0.0, 25.0, drift=Drift(LogClamp(0, 0.06, 0.06, 0.06), LogClamp(0, 0, 0, 0), 20.0))
    g0 = torch.full((100,), 10.0, dtype=torch.float64)
    nu, still = narrow.exponents(g0, stream(0)), torch.zeros_like(g0)
    assert torch.equal(narrow.at(g0, still, nu, 20.0), g0)
    assert torch.equal(narrow.at(g0, still, torch.zeros_like(nu), 1e6), g0)
    times = np.array([20.0, 2e2, 2e4, 2e7])
    means = [float(narrow.at(g0, still, nu, t).mean()) for t in times]
    assert np.polyfit(np.log(times), np.log(means), 1)[0] == pytest.approx(-0.06, abs=1e-9)
    assert means == sorted(means, reverse=True)
    with pytest.raises(CrossbarError, match="reference"):
        narrow.at(g0, still, nu, 1.0)


def test_time_moves_the_engine_and_back():
    w = np.random.default_rng(0).integers(-127, 128, (50, 4))
    x = np.random.default_rng(1).integers(0, 256, (20, 50))
    engine = SimEngine(Circuit(Device("d", "t", 0.0, 25.0, drift=PCM_NANDAKUMAR.drift)))
    handle = engine.load(w, 1.0, "a")
    fresh = engine.mvm(handle, x)
    engine.set_time(86_400.0)
    later = engine.mvm(handle, x)
    assert 0.4 < np.abs(later).mean() / np.abs(fresh).mean() < 0.8
    engine.set_time(20.0)
    np.testing.assert_array_equal(engine.mvm(handle, x), fresh)
    for bad in (1.0, float("nan"), float("inf")):
        with pytest.raises(CrossbarError, match="reference"):
            engine.set_time(bad)


CIRCUITS = [
    Circuit(Device("n", "t", 1.0, 25.0, read=ConstantRead(0.02)), Mapping(tile_rows=16)),
    Circuit(Device("n", "t", 1.0, 25.0, read=ConstantRead(0.02)), Mapping(tile_rows=16), path="converted"),
    Circuit(Device("n", "t", 1.0, 25.0, read=ConstantRead(0.02)), Mapping(cell_bits=3), Drive("serial", 2)),
    Circuit(
        Device("n", "t", 1.0, 25.0, read=ConstantRead(0.02)), Mapping(cell_bits=3), Drive("serial", 2), path="converted"
    ),
    Circuit(Device("n", "t", 1.0, 25.0, read=ConstantRead(0.02)), Mapping("offset", subtract="digital")),
]


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_read_noise_of_the_output_is_exact_and_uncorrelated(circuit):
    """Variance sum x^2 sigma^2(G) from cells and steps, written out here independently of the engine."""
    random = np.random.default_rng(0)
    w, x = random.integers(-7, 8, (40, 3)), random.integers(0, 16, 40)
    engine = SimEngine(circuit)
    handle = engine.load(w, 1.0, "a", w_bits=4, x_bits=4)
    plan = engine.layer(handle).plan
    power = sum((s.factor * s.digits(torch.from_numpy(x)).double()) ** 2 for s in circuit.drive.steps(4, False))
    per_cell = (0.02 * 25.0 / 24.0) ** 2  # of the window
    slices = np.repeat(plan.weight.abs().numpy(), 2) if plan.mapping.scheme == "pair" else plan.weight.numpy()
    if plan.mapping.subtract == "digital" and plan.mapping.scheme == "pair":
        slices = plan.weight.abs().numpy()
    want = float(power.sum()) * per_cell * (slices**2).sum() * (plan.span[:3] / plan.gain).numpy() ** 2
    n = 20_000
    y = engine.measure(handle, np.tile(x, (n, 1))).numpy()
    np.testing.assert_allclose(y.var(0), want, rtol=SIGMAS * math.sqrt(2 / n) + 2e-3)
    assert (np.abs(y.mean(0) - x @ w) < SIGMAS * np.sqrt(want / n) + 1e-3).all()
    correlation = np.corrcoef(y.T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < SIGMAS / math.sqrt(n)


@pytest.mark.parametrize("path", ["auto", "converted"])
@pytest.mark.parametrize("drive", [Drive(), Drive("serial")], ids=["analog", "serial"])
def test_state_dependent_read_noise_has_its_own_variance_per_cell(path, drive):
    """Flicker noise of two cells by hand: one at the top of the window, one idle, in a column of one weight."""
    fresh = Device("f", "t", 0.0, 25.0, read=replace(PCM_NANDAKUMAR.read, per="product"))
    circuit = Circuit(fresh, drive=drive, path=path)
    engine = SimEngine(circuit)
    handle = engine.load(np.array([[7], [3]]), 1.0, "a", w_bits=4, x_bits=4)
    engine.set_time(1000.0)
    g_uS = torch.tensor([25.0, 25 * 3 / 7], dtype=torch.float64)
    sigma = fresh.read_std(g_uS, 1000.0, per="product") / 25 * 7
    power = [5**2, 9**2] if drive.mode == "analog" else [1 + 4**2, 1 + 8**2]
    n = 20_000
    y = engine.measure(handle, np.tile([5, 9], (n, 1)))
    want = float(sum(p * s**2 for p, s in zip(power, sigma, strict=True)))
    assert float(y.var()) == pytest.approx(want, rel=SIGMAS * math.sqrt(2 / n))


def test_a_shared_reference_column_correlates_all_outputs():
    w, x = np.array([[3, -2]]), np.full((20_000, 1), 7)
    for path in ("auto", "converted"):
        circuit = Circuit(Device("n", "t", 0.0, 25.0, read=ConstantRead(0.02)), Mapping("offset"), path=path)
        engine = SimEngine(circuit)
        y = engine.measure(engine.load(w, 1.0, "a", w_bits=4, x_bits=4), x).numpy()
        cell = (7 * 0.02) ** 2
        np.testing.assert_allclose(y.var(0), [cell * 2 * 6**2, cell * 2 * 4**2], rtol=0.06)
        assert np.corrcoef(y.T)[0, 1] == pytest.approx(0.5, abs=0.03)


def test_noise_is_fresh_and_programming_is_fixed():
    w, x = np.full((10, 2), 5), np.full((4, 10), 9)
    noisy = SimEngine(Circuit(Device("n", "t", 0.0, 25.0, PCM_JOSHI.error, read=ConstantRead(0.01))))
    handle = noisy.load(w, 1.0, "a")
    first = noisy.measure(handle, x)
    assert not torch.equal(first, noisy.measure(handle, x))
    noisy.reset_noise()
    assert torch.equal(first, noisy.measure(handle, x))
    still = SimEngine(Circuit(PCM_JOSHI))
    handle = still.load(w, 1.0, "a")
    assert torch.equal(still.measure(handle, x), still.measure(handle, x))


def test_fast_normals_are_normal_and_do_not_depend_on_how_they_are_drawn():
    whole, parts = Normals(stream(0, "n")), Normals(stream(0, "n"))
    z = whole.draw(3000, 37)
    assert torch.equal(z, torch.cat([parts.draw(rows, 37) for rows in (1, 0, 999, 2000)]))
    flat = z.flatten().double()
    n = flat.numel()
    assert abs(float(flat.mean())) < SIGMAS / math.sqrt(n)
    assert abs(float(flat.var()) - 1) < SIGMAS * math.sqrt(2 / n)
    assert abs(float(flat.pow(4).mean()) - 3) < SIGMAS * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4, 37, 16_384):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < SIGMAS / math.sqrt(n - lag)


def test_points_of_the_fast_normals_have_the_moments_of_a_normal_of_half_the_variance():
    z = _normal_points().double()
    assert float(z.mean().abs()) < 1e-6
    assert float(z.square().mean()) == pytest.approx(0.5, abs=1e-6)
    assert float(z.pow(4).mean() / 0.25) == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Faults(2, 0), "low_fraction = 2 .*5 % is 0.05"),
        (lambda: Faults(0.6, 0.6), "fraction"),
        (lambda: Faults(-0.1), "fraction"),
        (lambda: Faults(maps={"a": np.full((2, 2, 2), 3, np.uint8)}), "codes 0, 1, 2"),
        (lambda: state_independent(5), "fraction = 5 .*5 % is 0.05"),
        (lambda: proportional(20), "fraction = 20 .*5 % is 0.05"),
        (lambda: Device("d", "t", 5.0, 5.0), "must exceed"),
        (lambda: Device("d", "t", -1.0, 5.0), "g_min_uS"),
        (lambda: device("rramm"), "did you mean 'rram'"),
        (lambda: Polynomial(()), "one or more"),
        (lambda: ConstantRead(1), "fraction"),
        (lambda: Device("d", "t", 0.0, 5.0, column_correlation=0.6, row_correlation=0.6), "correlation"),
        (lambda: Device("d", "t", 0.0, 5.0, iv_cubic=-0.5), "iv_cubic"),
        (lambda: Device("d", "t", 0.0, 5.0, error=0.02), "Device.error = 0.02 must be of type Curve"),
    ],
)
def test_bad_devices_are_refused(make, message):
    with pytest.raises(CrossbarError, match=message):
        make()


def test_idle_cells_keep_proportional_error_small():
    """Proportional errors vanish with the weight: the pair's idle cell adds nothing (finding of Xiao et al. 2022)."""
    assert Proportional(0.2).sigma(torch.zeros(3)).tolist() == [0, 0, 0]
    w = np.zeros((5, 2), int)
    engine = SimEngine(Circuit(proportional(0.2), adc=Adc(8, "whole")))
    assert not engine.mvm(engine.load(w, 1.0, "a"), np.full((1, 5), 255)).any()
    assert IDEAL.window_uS == 25.0
    assert OK == 0
