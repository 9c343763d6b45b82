"""Wire resistance: the effective conductances of a tile with resistive rows and columns, by one direct solve.

Every row i is driven at its left end through R_s, every column j is sensed at its bottom end through R_l at virtual
ground; each crossing adds a row segment r_row and a column segment r_col. The network is linear, so I = V @ G_eff holds
for every input once G_eff is known. Instead of one sparse system of 2 R C nodes, columns are eliminated from the right:
seen from row node i of column j, everything to the right is an R x R admittance B, built without any subtraction,

    B_j = S_j + B_(j+1) (1 + r_row B_(j+1))^-1,      S_j = G T^-1 L,   T = L + G,

with L the Laplacian of the column wire (load included) and G the cells of the column. Cost R^3 C in BLAS, R^2 memory.

Closed forms (tests): a column of n equal cells with ideal drivers, theta = arccosh(1 + r G / 2):
    I = (V / r) (1 - cosh((n - 1/2) theta) / cosh((n + 1/2) theta))
Limits: cells are linear. A gated 1T1R array makes the map input dependent; `Wires.active` is its linearisation at the
mean input, and `effective_conductance` of the driven rows alone the exact map of one input.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from scipy import linalg

from hq_lib.crossbar.checks import OPTION, CrossbarError, check_positive

_OHM_uS = 1e-6  # ohm times microsiemens


@dataclass(frozen=True)
class Wires:
    """Resistances of one tile; leave it out (``wires=None``) for ideal wires."""

    row_ohm: float = 1.0
    """Row wire per cell, ohm, >= 0; about 0.35 (aihwkit) to 1..3 in narrow wires."""
    col_ohm: float = 1.0
    """Column wire per cell, ohm, >= 0."""
    source_ohm: float = 0.0
    """Driver output R_s, ohm, >= 0."""
    load_ohm: float = 0.0
    """Sense input R_l, ohm, >= 0."""
    active: float = field(default=1.0, metadata=OPTION)
    """Share of rows that are driven at one time, (0, 1], where cells of undriven rows are gated off (1T1R): wires then
    carry the current of that share. The map is that of the mean, G_eff(active G) / active, since the exact one depends
    on which rows they are; 1: all cells are connected."""

    def __post_init__(self) -> None:
        for name in ("row_ohm", "col_ohm", "source_ohm", "load_ohm"):
            check_positive(getattr(self, name), name, zero=True)
        if not 0 < self.active <= 1:
            raise CrossbarError(f"Wires.active = {self.active} is a share of rows in (0, 1]")

    @property
    def ideal(self) -> bool:
        """Whether every resistance is zero."""
        return self.row_ohm == self.col_ohm == self.source_ohm == self.load_ohm == 0


def effective_conductance(g_uS: np.ndarray, wires: Wires) -> np.ndarray:
    """float64 (R, C) in uS: current into column j per volt on row i, all other rows at 0 V."""
    return solve_tile(np.asarray(g_uS, np.float64) * wires.active, wires)[0] / wires.active


def solve_tile(g_uS: np.ndarray, wires: Wires) -> tuple[np.ndarray, np.ndarray]:
    """(G_eff, Y_in): ``V @ G_eff`` are the column currents, ``V @ Y_in`` the currents out of the drivers.

    Args:
        g_uS: (R, C) cell conductances in uS, >= 0.
        wires: resistances in ohm.

    Returns:
        G_eff (R, C) and Y_in (R, R, symmetric), float64, uS.
    """
    g = np.asarray(g_uS, np.float64)
    if g.ndim != 2 or g.size == 0 or not np.isfinite(g).all() or (g < 0).any():
        raise CrossbarError("a tile needs (R, C) finite conductances >= 0 uS; clip programmed cells at zero for wires")
    if wires.ideal:
        return g.copy(), np.diag(g.sum(1))
    admittance, transfer = _eliminate(g, wires)
    source = (wires.source_ohm + wires.row_ohm) * _OHM_uS
    admittance, transfer = _series(admittance, transfer, source)
    return transfer, admittance


def _eliminate(g: np.ndarray, wires: Wires) -> tuple[np.ndarray, np.ndarray]:
    """Admittance (R, R) and column-current transfer (R, C) as seen from the row nodes of column 0."""
    n_rows, n_columns = g.shape
    admittance, transfer = np.zeros((n_rows, n_rows)), np.zeros((n_rows, n_columns))
    for j in range(n_columns - 1, -1, -1):
        if j < n_columns - 1 and wires.row_ohm:
            rest = transfer[:, j + 1 :]
            admittance, transfer[:, j + 1 :] = _series(admittance, rest, wires.row_ohm * _OHM_uS)
        own, transfer[:, j] = _column(g[:, j], wires)
        admittance = admittance + own
    return admittance, transfer


def _series(admittance: np.ndarray, transfer: np.ndarray, r: float) -> tuple[np.ndarray, np.ndarray]:
    """Both maps as seen through a resistance ``r`` (1/uS) in every row: X -> (1 + r B)^-1 X."""
    if r == 0:
        return admittance, transfer
    loaded = r * admittance
    loaded[np.diag_indices_from(loaded)] += 1.0
    joined = np.concatenate([admittance, transfer], axis=1)
    factor = linalg.cho_factor(loaded, lower=True, overwrite_a=True, check_finite=False)
    solved = linalg.cho_solve(factor, joined, overwrite_b=True, check_finite=False)
    n = len(admittance)
    return (solved[:, :n] + solved[:, :n].T) / 2, solved[:, n:]


def _column(g: np.ndarray, wires: Wires) -> tuple[np.ndarray, np.ndarray]:
    """Admittance (R, R) of one column seen from its row nodes, and (R,) its sensed current per volt on each."""
    n, r = len(g), wires.col_ohm * _OHM_uS
    load = (wires.load_ohm + wires.col_ohm) * _OHM_uS
    if load == 0:
        return np.diag(g), g.copy()
    if r == 0 or n == 1:  # the column is one node behind the load: v = sum(g u) / (sum(g) + 1/load)
        sensed = g / (1.0 + load * g.sum())
        return np.diag(g) - np.outer(g, sensed) * load, sensed
    banded = np.zeros((2, n))  # upper form of r T, T = L + G
    banded[1] = 2.0 + r * g
    banded[1, 0] -= 1.0
    banded[1, -1] += r / load - 1.0
    banded[0, 1:] = -1.0
    inverse = linalg.solveh_banded(banded, np.eye(n), check_finite=False)  # (r T)^-1
    wire = _times_laplacian(inverse, r / load)
    own = g[:, None] * wire
    return (own + own.T) / 2, g * inverse[:, -1] * (r / load)


def _times_laplacian(matrix: np.ndarray, last: float) -> np.ndarray:
    """``matrix`` (n, n) times the chain Laplacian with ``last`` to ground at its end."""
    steps = np.diff(matrix, axis=1)
    product = np.zeros_like(matrix)
    product[:, :-1] -= steps
    product[:, 1:] += steps
    product[:, -1] += last * matrix[:, -1]
    return product


class WireCache:
    """Solved tiles by a hash of their conductances: one solve per tile and time point, in memory."""

    def __init__(self, wires: Wires) -> None:
        self.wires = wires
        self._solved: dict[str, np.ndarray] = {}

    def effective(self, g_uS: np.ndarray) -> np.ndarray:
        """`effective_conductance` of the tile, solved once for equal conductances."""
        key = hashlib.sha256(repr(g_uS.shape).encode() + np.ascontiguousarray(g_uS, np.float64).tobytes()).hexdigest()
        if key not in self._solved:
            self._solved[key] = effective_conductance(g_uS, self.wires)
        return self._solved[key]
