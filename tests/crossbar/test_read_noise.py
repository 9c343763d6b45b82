"""Read noise: closed forms of its variance over time, its memory over products and read-outs, gains that act on it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from integer_nets import quantized

from hq_lib.crossbar import Adc, Circuit, ConstantRead, CrossbarError, Device, EngineNetwork, Mapping, SimEngine, device
from hq_lib.crossbar.profiles import IDEAL, PCM_NANDAKUMAR
from hq_lib.integer import lower

SIGMAS = 5  # of the test statistic
FLICKER = Device("f", "t", 0.0, 25.0, read=PCM_NANDAKUMAR.read, clip_at_zero=False)
FRESH = replace(FLICKER, read=replace(PCM_NANDAKUMAR.read, per="product"))


def relative_std(t_s: float, g: float = 1.0) -> float:
    return min(0.0088 * g**-0.65, 0.2) * math.sqrt(math.log((t_s + 250e-9) / (2 * 250e-9)))


def test_flicker_noise_by_hand():
    g, t = torch.tensor([2.5, 25.0], dtype=torch.float64), 1000.0
    want = [2.5 * relative_std(t, 0.1), 25 * relative_std(t)]
    np.testing.assert_allclose(PCM_NANDAKUMAR.read_std(g, t, per="readout"), want, rtol=1e-12)
    assert PCM_NANDAKUMAR.read_std(g, t, per="product") is None


def test_flicker_noise_of_a_drifted_cell_is_relative_to_what_was_programmed():
    """aihwkit, PCMLikeNoiseModel: q of the programmed conductance, times the drifted one."""
    g0, t = torch.tensor([2.5, 25.0], dtype=torch.float64), 1e7
    exact = replace(PCM_NANDAKUMAR, error=None)
    g = exact.at(g0, torch.zeros_like(g0), torch.tensor([0.08, 0.05], dtype=torch.float64), t)
    want = g * torch.tensor([relative_std(t, 0.1), relative_std(t)], dtype=torch.float64)
    np.testing.assert_allclose(PCM_NANDAKUMAR.read_std(g, t, per="readout", g0_uS=g0), want, rtol=1e-12)
    noisy = Device("d", "t", 0.0, 25.0, drift=PCM_NANDAKUMAR.drift, read=FRESH.read)
    engine = SimEngine(Circuit(noisy))
    cells = engine.layer(engine.load(np.full((4, 2), 100), 1.0, "a")).cells
    late, spread = cells.conductance(t), cells.fractions(t)[1].sqrt() * 25.0
    q = (0.0088 * (cells.g0_uS / 25.0).clamp_min(1e-6) ** -0.65).clamp_max(0.2)
    np.testing.assert_allclose(spread, late * q * relative_std(t) / 0.0088, rtol=1e-12)


@pytest.mark.parametrize(("noise", "memory"), [(FLICKER, 1.0), (FRESH, 0.0)], ids=["readout", "product"])
@pytest.mark.parametrize("path", ["auto", "converted"])
def test_autocorrelation_over_products_is_one_within_a_read_out_and_zero_for_fresh_noise(noise, memory, path):
    n = 4000
    engine = SimEngine(Circuit(noise, path=path))
    handle = engine.load(np.full((1, n), 100), 1.0, "a")
    engine.set_time(1000.0)
    first, second = (engine.measure(handle, np.array([[255]]))[0].numpy() for _ in range(2))
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(memory, abs=SIGMAS / math.sqrt(n))
    assert first.std() / (100 * 255) == pytest.approx(relative_std(1000.0), rel=SIGMAS / math.sqrt(2 * n))


def test_read_outs_at_different_times_are_independent_and_spread_as_the_source_says():
    n, times = 4000, (20.0, 3600.0, 86_400.0, 3e8)
    engine = SimEngine(Circuit(FLICKER))
    handle = engine.load(np.full((1, n), 100), 1.0, "a")
    errors = []
    for t_s in times:
        engine.set_time(t_s)
        errors.append(engine.measure(handle, np.array([[1]]))[0].numpy() / 100 - 1)
        assert errors[-1].std() == pytest.approx(relative_std(t_s), rel=SIGMAS / math.sqrt(2 * n))
    assert np.abs(np.corrcoef(errors)[np.triu_indices(len(times), 1)]).max() < SIGMAS / math.sqrt(n)
    engine.set_time(times[1])  # reading again at one time, in whatever order, is the same read-out
    np.testing.assert_array_equal(engine.measure(handle, np.array([[1]]))[0].numpy() / 100 - 1, errors[1])


def test_a_read_out_never_makes_a_conductance_negative():
    engine = SimEngine(Circuit(PCM_NANDAKUMAR))
    handle = engine.load(np.full((50, 50), 1), 1.0, "a")
    engine.set_time(3e8)
    assert float(engine.layer(handle).cells.conductance(3e8).min()) >= 0


def test_time_on_cells_that_it_does_not_change_is_refused_with_those_that_it_does():
    for circuit in (Circuit(device("rram")), Circuit(Device("n", "t", 0.0, 25.0, read=ConstantRead(0.01)))):
        engine = SimEngine(circuit)
        engine.set_time(1.0)  # the reference time changes nothing for anybody
        with pytest.raises(CrossbarError, match=r"no model of time.*pcm_drift"):
            engine.set_time(86_400.0)
        assert engine.time_s == 1.0
        assert "t_s" not in engine.describe()  # "rram_1day" is no second old


@pytest.mark.parametrize("scheme", ["pair", "offset"])
def test_converter_gain_acts_on_read_noise_as_on_the_signal(scheme):
    """A converter that reads 10 % too much reads 10 % too much noise; fails with a ratio of 1 where it does not."""
    n, w = 4000, np.full((1, 40), 100)
    spread, mean = {}, {}
    for gain in (0.0, 0.1):
        adc = Adc(16, "max", gain_sigma=gain)
        noisy = replace(IDEAL, read=ConstantRead(0.02))
        engine = SimEngine(Circuit(noisy, Mapping(scheme), adc=adc))
        y = engine.measure(engine.load(w, 1.0, "a"), np.full((n, 1), 100)).numpy()
        spread[gain], mean[gain] = y.std(0), y.mean(0)
    gains, ratios = mean[0.1] / mean[0.0], spread[0.1] / spread[0.0]
    assert np.corrcoef(gains, ratios)[0, 1] > 0.95
    np.testing.assert_allclose(ratios, gains, rtol=SIGMAS / math.sqrt(n))


def test_a_network_ages_where_its_cells_do():
    model = lower(quantized("residual", "w8a8"))
    ageing, still = SimEngine(Circuit(device("pcm_drift"))), SimEngine(Circuit(device("rram")))
    EngineNetwork(model, {"conv1": ageing, "*": still}).set_time(1e6)
    assert (ageing.time_s, still.time_s) == (1e6, 1.0)
    with pytest.raises(CrossbarError, match="no model of time"):
        EngineNetwork(model, SimEngine(Circuit(device("rram")))).set_time(1e6)
