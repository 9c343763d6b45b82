"""1/f noise of phase-change cells: closed forms, fresh and drifted."""

import math

import numpy as np
import torch

from hq_lib.crossbar import Circuit, Device, SimEngine
from hq_lib.crossbar.profiles import PCM_NANDAKUMAR


def test_flicker_noise_by_hand():
    g, t = torch.tensor([2.5, 25.0], dtype=torch.float64), 1000.0
    root = math.sqrt(math.log((t + 250e-9) / (2 * 250e-9)))
    want = [2.5 * 0.0088 * 0.1**-0.65 * root, 25 * 0.0088 * root]
    np.testing.assert_allclose(PCM_NANDAKUMAR.read_variance(g, t).sqrt(), want, rtol=1e-12)


def test_flicker_noise_of_a_drifted_cell_is_relative_to_what_was_programmed():
    """aihwkit, PCMLikeNoiseModel: q of the programmed conductance, times the drifted one."""
    g0, t = torch.tensor([2.5, 25.0], dtype=torch.float64), 1e7
    g = PCM_NANDAKUMAR.at(g0, torch.tensor([0.08, 0.05], dtype=torch.float64), t)
    root = math.sqrt(math.log((t + 250e-9) / (2 * 250e-9)))
    want = g * 0.0088 * (g0 / 25.0) ** -0.65 * root
    np.testing.assert_allclose(PCM_NANDAKUMAR.read_variance(g, t, g0).sqrt(), want, rtol=1e-12)
    device = Device("d", "t", 0.0, 25.0, drift=PCM_NANDAKUMAR.drift, read=PCM_NANDAKUMAR.read)
    engine = SimEngine(Circuit(device))
    cells = engine.layer(engine.load(np.full((4, 2), 100), 1.0, "a")).cells
    late, spread = cells.conductance(t), cells.fractions(t)[1].sqrt() * 25.0
    want = late * (0.0088 * (cells.g0_uS / 25.0).clamp_min(1e-6) ** -0.65).clamp_max(0.2) * root
    np.testing.assert_allclose(spread, want, rtol=1e-12)
