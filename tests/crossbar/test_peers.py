"""Beside aihwkit on the same cells: its PCM model and ours draw from one distribution, conductances and products alike.

aihwkit is no dependency: ``pip install --no-deps aihwkit==1.1.0`` (a wheel for Python 3.11) lets these run.
"""

import math

import pytest
import torch

from hq_lib.crossbar import Circuit, SimEngine
from hq_lib.crossbar.profiles import PCM_NANDAKUMAR

TIMES_S = (25.0, 3600.0, 86_400.0, 3.156e7)
N = 40_000


@pytest.fixture(scope="module")
def peer():
    inference = pytest.importorskip("aihwkit.inference", reason="aihwkit is not installed (1.1.0 has a cp311 wheel)")
    return inference.PCMLikeNoiseModel(g_max=25.0)


def read(peer, target_uS, t_s):
    """(N,) conductances of aihwkit ``t_s`` seconds after programming; its own clock starts at its t_0."""
    programmed = peer.apply_programming_noise_to_conductance(target_uS)
    nu = peer.generate_drift_coefficients(target_uS)
    return peer.apply_drift_noise_to_conductance(programmed, nu, t_s - peer.t_0).double()


def assert_same(ours, theirs, n):
    """Mean and standard deviation of two samples of ``n`` agree within five standard errors of their difference."""
    spread = float(theirs.std())
    assert abs(float(ours.mean() - theirs.mean())) < 5 * spread * math.sqrt(2 / n)
    kurtosis = float(((theirs - theirs.mean()) / spread).pow(4).mean())
    assert float(ours.std()) == pytest.approx(spread, rel=5 * math.sqrt((kurtosis - 1) / 4 * 2 / n))


@pytest.mark.parametrize("t_s", TIMES_S)
@pytest.mark.parametrize("level", [0, 3, 30, 90, 127])
def test_conductances_spread_and_drift_as_aihwkits(peer, level, t_s):
    engine = SimEngine(Circuit(PCM_NANDAKUMAR))
    weights = torch.cat([torch.full((1, N), level), torch.full((1, N), 127)])  # the second row fills the window
    handle = engine.load(weights, 1.0, f"level {level}")
    cells = engine.layer(handle).cells
    ours = cells.conductance(t_s)[0, :, 0]
    assert_same(ours, read(peer, torch.full((N,), 25.0 * level / 127), t_s), N)


@pytest.mark.parametrize("t_s", TIMES_S)
def test_ten_thousand_products_agree_in_mean_and_variance(peer, t_s):
    """One column of 32 weights and one row of inputs, on 10,000 draws of the cells."""
    n = 10_000
    w, x = torch.randint(-127, 128, (32,)), torch.randint(0, 256, (1, 32))
    w[0] = 127
    engine = SimEngine(Circuit(PCM_NANDAKUMAR))
    handle = engine.load(w[:, None].expand(32, n), 1.0, "a")
    engine.set_time(t_s)
    ours = engine.measure(handle, x).flatten()
    target = w.abs().float()[:, None].expand(32, n) * 25.0 / 127
    plus, minus = (read(peer, torch.where((sign * w > 0)[:, None], target, 0.0), t_s) for sign in (1, -1))
    theirs = (x.double() @ (plus - minus)).flatten() * 127 / 25
    assert_same(ours, theirs, n)
