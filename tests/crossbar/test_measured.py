"""A device of one's own: tables read and followed, bad ones refused by name, a fit judged on cells it has not seen."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from hq_lib.crossbar import Circuit, CrossbarError, SimEngine, device, fit_report
from hq_lib.crossbar.profiles import clipped
from hq_lib.results import paths

TABLE = """# chip 7, 25 C
target_uS, mean_uS, sigma_uS, time_s, read_sigma_uS
0, 0, 0.2, 1, 0.1
10, 11, 1.0, 1, 0.3
20, 19, 0.6, 1, 0.5
20, 17, 0.8, 100, 0.7
10, 9, 1.4, 100, 0.3
0, 1, 0.4, 100, 0.1
"""
G = torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0], dtype=torch.float64)


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.csv").write_text(TABLE)
    return device(tmp_path / "own.csv")


def test_a_table_is_linear_in_target_and_in_the_logarithm_of_time(own):
    one, none = torch.ones_like(G), torch.zeros_like(G)
    assert (own.g_min_uS, own.g_max_uS, own.t0_s, own.ages) == (0.0, 20.0, 1.0, True)
    np.testing.assert_allclose(own.program(G, none), [0, 5.5, 11, 15, 19], rtol=1e-12)
    np.testing.assert_allclose(own.program(G, one) - own.program(G, none), [0.2, 0.6, 1.0, 0.8, 0.6], rtol=1e-9)
    np.testing.assert_allclose(own.at(G, none, None, 10.0), [0.5, 5.25, 10, 14, 18], rtol=1e-12)
    np.testing.assert_allclose(own.at(G, one, None, 100.0), [1.4, 5.9, 10.4, 14.1, 17.8], rtol=1e-12)
    now = torch.tensor([0.0, 11.0, 15.0], dtype=torch.float64)
    np.testing.assert_allclose(own.read_std(now, 1.0, per="product"), [0.1, 0.3, 0.4], rtol=1e-12)


def test_cells_follow_their_table(own):
    n = 20_000
    engine = SimEngine(Circuit(own))
    handle = engine.load(np.full((1, n), 1), 1.0, "a")
    for t_s, mean, sigma, read in ((1.0, 19.0, 0.6, 0.5), (100.0, 17.0, 0.8, 0.7)):
        engine.set_time(t_s)
        plus = engine.layer(handle).cells.conductance(t_s)[..., 0]
        assert float(plus.mean()) == pytest.approx(mean, abs=5 * sigma / n**0.5)
        assert float(plus.std()) == pytest.approx(sigma, rel=0.05)
        pair = engine.measure(handle, np.array([[1]])) - engine.layer(handle).weight
        assert float(pair.std()) * 20 == pytest.approx((read**2 + 0.1**2) ** 0.5, rel=0.05)
    with pytest.raises(CrossbarError, match="measured were 1 to 100 s"):
        engine.set_time(1000.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g_uS,sigma_uS\n0,1\n", "columns target_uS, mean_uS, sigma_uS"),
        ("target_uS,mean_uS,sigma_uS,volts\n0,0,1,1\n", "columns"),
        ("target_uS,mean_uS,sigma_uS\n0,0,1\n5,5\n", "sigma_uS of data line 2"),
        ("target_uS,mean_uS,sigma_uS\n0,0,1\n5,abc,1\n", "mean_uS of data line 2 is 'abc'"),
        ("target_uS,mean_uS,sigma_uS\n0,0,-1\n5,5,1\n", "sigma_uS of data line 1 is '-1'"),
        ("target_uS,mean_uS,sigma_uS\n0,3,1\n5,2,1\n", "ascend"),
        ("target_uS,mean_uS,sigma_uS\n0,0,1\n0,0,1\n", "0 uS stands there twice"),
        ("target_uS,mean_uS,sigma_uS,time_s\n0,0,1,1\n5,5,1,1\n5,5,1,9\n", "every time needs every target"),
        ("target_uS,mean_uS,sigma_uS\n", "columns"),
        ("", "no CSV table"),
    ],
)
def test_bad_tables_name_the_file_and_the_place(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(CrossbarError, match=message) as error:
        device(tmp_path / "bad.csv")
    assert "bad.csv" in str(error.value)


def test_a_fit_is_judged_on_held_out_cells_and_a_wrong_model_is_seen(tmp_path):
    random = np.random.default_rng(0)
    rows = [(g, g + 0.5 + (0.3 + 0.05 * g) * z) for g in (5.0, 10.0, 20.0) for z in random.standard_normal(400)]
    pd.DataFrame(rows, columns=["target_uS", "g_uS"]).to_csv(tmp_path / "cells.csv", index=False)
    own, report = fit_report(tmp_path / "cells.csv")
    assert list(report["n_fit"] + report["n_held_out"]) == [400] * 3
    np.testing.assert_allclose(report["mean_uS"], [5.5, 10.5, 20.5], atol=5 * 1.3 / 300**0.5)
    np.testing.assert_allclose(report["sigma_uS"], [0.55, 0.8, 1.3], rtol=5 / 600**0.5)
    assert report["mean_z"].abs().max() < 5
    assert report["p_normal"].min() > 1e-4
    assert own.window_uS == 15.0
    two_humps = [(g, g + 2 * np.sign(z)) for g in (5.0, 10.0) for z in random.standard_normal(400)]
    pd.DataFrame(two_humps, columns=["target_uS", "g_uS"]).to_csv(tmp_path / "cells.csv", index=False)
    assert fit_report(tmp_path / "cells.csv")[1]["p_normal"].max() < 1e-4
    with pytest.raises(CrossbarError, match="held_out"):
        fit_report(tmp_path / "cells.csv", held_out=0.99)


@pytest.mark.parametrize("mean", [0.0, 0.3, 5.0])
def test_the_report_tells_what_is_drawn_where_draws_are_clipped_at_zero(tmp_path, mean):
    """Of mean 0 and spread s a clipped cell has mean s / sqrt(2 pi) and variance s^2 (1 / 2 - 1 / (2 pi))."""
    random = np.random.default_rng(0)
    rows = [(0.0, max(mean + 0.5 * z, 0.0)) for z in random.standard_normal(4000)]
    rows += [(20.0, 20 + z) for z in random.standard_normal(4000)]
    pd.DataFrame(rows, columns=["target_uS", "g_uS"]).to_csv(tmp_path / "cells.csv", index=False)
    own, report = fit_report(tmp_path / "cells.csv")
    xi = torch.from_numpy(random.standard_normal(400_000))
    drawn = own.program(torch.zeros(len(xi), dtype=torch.float64), xi)
    assert float(drawn.mean()) == pytest.approx(report["mean_uS"][0], abs=5 * 0.5 / len(xi) ** 0.5)
    assert float(drawn.std()) == pytest.approx(report["sigma_uS"][0], rel=5 / len(xi) ** 0.5)
    spread = 0.5 / math.sqrt(2 * math.pi), 0.5 * math.sqrt(0.5 - 0.5 / math.pi)
    assert clipped(0.0, 0.5) == pytest.approx(spread)
    assert clipped(3.0, 0.0) == (3.0, 0.0)


def test_the_shipped_examples_are_read():
    folder = paths.ROOT / "data" / "devices"
    assert device(folder / "example.csv").ages
    own, report = fit_report(folder / "example_cells.csv")
    assert own.window_uS == 40.0
    assert len(report) == 12
    assert device(folder / "example_cells.csv") == own
