"""Wires: closed forms, a sparse nodal solve as independent truth, reciprocity and current conservation."""

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse import linalg

from hq_lib.crossbar import Circuit, CrossbarError, Device, Mapping, SimEngine, Wires
from hq_lib.crossbar.cells import effective_conductance, solve_tile
from hq_lib.crossbar.profiles import IDEAL

RNG = np.random.default_rng(0)


def nodal(g_uS: np.ndarray, wires: Wires) -> np.ndarray:
    """Effective conductances by one sparse system of 2 R C node equations."""
    g, (n_rows, n_columns) = g_uS * 1e-6, g_uS.shape
    row, column = np.arange(2 * g.size).reshape(2, n_rows, n_columns)
    y_source, y_load = 1 / (wires.source_ohm + wires.row_ohm), 1 / (wires.load_ohm + wires.col_ohm)
    links = [
        (row, column, g),
        (row[:, :-1], row[:, 1:], np.full((n_rows, n_columns - 1), 1 / wires.row_ohm)),
        (column[:-1], column[1:], np.full((n_rows - 1, n_columns), 1 / wires.col_ohm)),
    ]
    a, b, y = (np.concatenate([np.ravel(link[i]) for link in links]) for i in range(3))
    matrix = sparse.coo_matrix((np.r_[y, y, -y, -y], (np.r_[a, b, a, b], np.r_[a, b, b, a])), shape=(2 * g.size,) * 2)
    ground = np.zeros(2 * g.size)
    ground[row[:, 0]] += y_source
    ground[column[-1]] += y_load
    solved = linalg.splu((matrix + sparse.diags(ground)).tocsc()).solve(np.eye(2 * g.size)[:, row[:, 0]] * y_source)
    return (solved[column[-1]] * y_load).T * 1e6


def column_current(g_uS: float, n: int, r_ohm: float) -> float:
    """uA per volt of a column of equal cells with ideal drivers, sensed at its grounded end (CROSSBAR model 1.5)."""
    theta = np.arccosh(1 + r_ohm * g_uS * 1e-6 / 2)
    return 1e6 / r_ohm * (1 - np.cosh((n - 0.5) * theta) / np.cosh((n + 0.5) * theta))


@pytest.mark.parametrize("n", [1, 2, 64, 256])
@pytest.mark.parametrize("g", [10.0, 100.0])
def test_one_column_has_its_closed_form(n, g):
    current = effective_conductance(np.full((n, 1), g), Wires(0.0, 1.0)).sum()
    assert current == pytest.approx(column_current(g, n, 1.0), rel=1e-9)


def test_size_of_the_effect():
    """Current over ideal at 1 ohm: 0.826 for 256 cells of 10 uS, 0.384 for 100 uS."""
    assert column_current(10, 256, 1) / 2560 == pytest.approx(0.826, abs=5e-4)
    assert column_current(100, 256, 1) / 25600 == pytest.approx(0.384, abs=5e-4)


def test_one_row_is_a_column_seen_from_the_other_side():
    n, g = 64, 30.0
    row = effective_conductance(np.full((1, n), g), Wires(2.0, 0.0))
    assert row.sum() == pytest.approx(column_current(g, n, 2.0), rel=1e-9)
    assert (np.diff(row[0]) < 0).all(), "cells further from the driver get less"


def test_single_cell_formula():
    wires = Wires(3.0, 4.0, 50.0, 70.0)
    assert effective_conductance(np.array([[40.0]]), wires).item() == pytest.approx(
        40.0 / (1 + 40e-6 * (50 + 3 + 4 + 70)), rel=1e-12
    )


@pytest.mark.parametrize("wires", [Wires(1.3, 0.7, 5.0, 3.0), Wires(20.0, 30.0), Wires(1.0, 2.0, 1e4, 1e3)])
def test_elimination_equals_the_sparse_nodal_solve(wires):
    g = RNG.uniform(0, 40, (13, 9))
    np.testing.assert_allclose(effective_conductance(g, wires), nodal(g, wires), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero", ["row_ohm", "col_ohm"])
def test_a_vanishing_resistance_is_the_limit_of_a_small_one(zero):
    g, rest = RNG.uniform(1, 40, (8, 6)), {"row_ohm": 2.0, "col_ohm": 3.0, "source_ohm": 4.0, "load_ohm": 5.0}
    limit = effective_conductance(g, Wires(**(rest | {zero: 0.0})))
    np.testing.assert_allclose(effective_conductance(g, Wires(**(rest | {zero: 1e-6}))), limit, rtol=1e-7)


def test_ideal_wires_change_nothing():
    g = RNG.uniform(1, 40, (5, 4))
    np.testing.assert_array_equal(effective_conductance(g, Wires(0, 0)), g)
    np.testing.assert_allclose(effective_conductance(g, Wires(1e-7, 1e-7)), g, rtol=1e-7)


def test_reciprocity():
    """Driving the sense ends and sensing the drive ends of the same tile gives the transposed map."""
    g, wires = RNG.uniform(1, 40, (7, 5)), Wires(2.0, 3.0, 10.0, 20.0)
    turned = effective_conductance(g[::-1, ::-1].T, Wires(3.0, 2.0, 20.0, 10.0))
    np.testing.assert_allclose(turned[::-1, ::-1].T, effective_conductance(g, wires), rtol=1e-10)


def test_current_is_conserved():
    volts = RNG.uniform(0, 1, 20)
    effective, admittance = solve_tile(RNG.uniform(1, 40, (20, 15)), Wires(5.0, 5.0, 100.0, 100.0))
    assert (volts @ effective).sum() == pytest.approx((volts @ admittance).sum(), rel=1e-12)


def test_loss_grows_with_the_tile_as_measured():
    """1..40 uS, 1 ohm: 5 % for 64 x 64, 18 % for 128 x 128 (CROSSBAR model 1.5)."""
    for n, loss in ((64, 0.05), (128, 0.18)):
        g = RNG.uniform(1, 40, (n, n))
        assert 1 - effective_conductance(g, Wires()).sum() / g.sum() == pytest.approx(loss, abs=0.01)


def test_engine_with_wires_is_superposition_of_its_effective_tiles():
    w, x = RNG.integers(-127, 128, (40, 5)), RNG.integers(0, 256, (9, 40))
    wires, mapping = Wires(30.0, 30.0), Mapping(tile_rows=16, tile_cols=4)
    engine = SimEngine(Circuit(IDEAL, mapping, wires=wires, precision="float64"))
    handle = engine.load(w, 1.0, "a")
    cells = engine.layer(handle).cells.g0_uS.flatten(1).numpy()
    seen = np.block(
        [
            [effective_conductance(cells[r : r + 16, c : c + 4], wires) for c in range(0, 10, 4)]
            for r in range(0, 40, 16)
        ]
    )
    want = x @ (seen[:, 0::2] - seen[:, 1::2]) / 25.0 * np.abs(w).max(0)
    np.testing.assert_allclose(engine.measure(handle, x), want, rtol=1e-5, atol=0.5)
    assert np.abs(want - x @ w).max() > 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wires(-1.0), "row_ohm"),
        (lambda: effective_conductance(np.array([[-1.0]]), Wires()), "conductances >= 0"),
        (lambda: effective_conductance(np.ones(3), Wires()), "conductances"),
        (lambda: Wires(load_ohm=float("nan")), "load_ohm"),
    ],
)
def test_bad_wires_are_refused(make, message):
    with pytest.raises(CrossbarError, match=message):
        make()


def test_unclipped_cells_and_wires_do_not_go_together():
    device = Device("d", "t", 0.0, 25.0, error=SimEngine().circuit.device.error, clip_at_zero=False)
    with pytest.raises(CrossbarError, match="clip_at_zero"):
        SimEngine(Circuit(device, wires=Wires())).load(np.zeros((30, 4), int), 1.0, "a")
