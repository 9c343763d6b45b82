"""What moves many cells together: shared errors of a column or row, temperature, a curved I-V characteristic."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hq_lib.crossbar import Adc, Circuit, CrossbarError, Device, Drive, Mapping, SimEngine, device, state_independent
from hq_lib.crossbar.profiles import IDEAL

W = np.random.default_rng(0).integers(-7, 8, (40, 3))
X = np.random.default_rng(1).integers(0, 16, (30, 40))


@pytest.mark.parametrize(("by_column", "by_row"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.3), (0.4, 0.3)])
def test_cells_of_a_column_or_row_are_correlated_as_stated_and_keep_their_spread(by_column, by_row):
    """Over 64 x 64 arrays: pairs of one column, of one row, of neither, and of one column but another array."""
    cell = replace(state_independent(0.02), column_correlation=by_column, row_correlation=by_row)
    engine = SimEngine(Circuit(cell, Mapping(tile_rows=64, tile_cols=64)))
    found = []
    for i in range(30):
        cells = engine.layer(engine.load(np.zeros((128, 64), int), 1.0, f"layer{i}")).cells
        found.append(cells.g0_uS.flatten(1) / 0.5)
    e = torch.stack(found)  # 30 layers of 2 x 2 arrays
    tiles = e.view(30, 2, 64, 2, 64).transpose(2, 3).reshape(-1, 64, 64)
    assert float(e.var()) == pytest.approx(1.0, abs=0.1)
    assert float((tiles[:, 1:] * tiles[:, :-1]).mean()) == pytest.approx(by_column, abs=0.05)
    assert float((tiles[..., 1:] * tiles[..., :-1]).mean()) == pytest.approx(by_row, abs=0.05)
    assert float((tiles[:, 1:, 1:] * tiles[:, :-1, :-1]).mean()) == pytest.approx(0.0, abs=0.05)
    assert float((e[:, :64] * e[:, 64:]).mean()) == pytest.approx(0.0, abs=0.05)


def test_temperature_scales_currents_by_its_coefficient():
    warm = replace(IDEAL, temperature_per_K=0.002)
    engine = SimEngine(Circuit(warm))
    handle = engine.load(W, 1.0, "a", w_bits=4, x_bits=4)
    engine.set_temperature(75.0)
    np.testing.assert_allclose(engine.measure(handle, X), 1.1 * (X @ W), rtol=1e-5, atol=1e-3)
    assert engine.describe()["celsius"] == 75.0
    later = SimEngine(Circuit(warm))
    later.set_temperature(75.0)
    np.testing.assert_array_equal(
        later.measure(later.load(W, 1.0, "a", w_bits=4, x_bits=4), X), engine.measure(handle, X)
    )
    engine.set_temperature(25.0)
    np.testing.assert_array_equal(engine.mvm(handle, X), X @ W)
    for cell, celsius in ((device("rram"), 75.0), (warm, -600.0), (warm, float("nan"))):
        with pytest.raises(CrossbarError, match="temperature_per_K"):
            SimEngine(Circuit(cell)).set_temperature(celsius)


@pytest.mark.parametrize("path", ["auto", "converted"])
def test_a_curved_characteristic_bends_inputs_by_its_cubic(path):
    bent = Device("b", "t", 0.0, 25.0, iv_cubic=0.2)
    u = X / 15
    want = 15 * (u * (1 + 0.2 * u**2) / 1.2) @ W
    engine = SimEngine(Circuit(bent, Mapping(tile_rows=16), path=path))
    handle = engine.load(W, 1.0, "a", w_bits=4, x_bits=4)
    np.testing.assert_allclose(engine.measure(handle, X), want, rtol=1e-5, atol=1e-3)
    two = SimEngine(Circuit(bent, Mapping(tile_rows=16), Drive("serial", 2), path=path))
    handle = two.load(W, 1.0, "a", w_bits=4, x_bits=4)
    digits = [X & 3, X >> 2]
    want = sum(f * (3 * (d / 3) * (1 + 0.2 * (d / 3) ** 2) / 1.2) @ W for f, d in zip((1, 4), digits, strict=True))
    np.testing.assert_allclose(two.measure(handle, X), want, rtol=1e-5, atol=1e-3)


def test_one_bit_inputs_and_straight_cells_do_not_bend():
    bent = Device("b", "t", 0.0, 25.0, iv_cubic=0.2)
    engine = SimEngine(Circuit(bent, Mapping(cell_bits=2), Drive("serial"), Adc(9, "exact")))
    np.testing.assert_array_equal(engine.mvm(engine.load(W, 1.0, "a", w_bits=4, x_bits=4), X), X @ W)
    straight = SimEngine(Circuit(replace(bent, iv_cubic=0.0), adc=Adc(16, "exact")))
    np.testing.assert_array_equal(straight.mvm(straight.load(W, 1.0, "a", w_bits=4, x_bits=4), X), X @ W)
