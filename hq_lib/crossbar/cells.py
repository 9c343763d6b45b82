"""Cells of one layer: targets, what programming made of them, and what they are at a later time, through wires too.

Arrays are float64 (K, C, P) in *physical* row order until `fractions` puts the rows back into logical order.

Wire resistance: the effective conductances of a tile with resistive rows and columns, by one direct solve.

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

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from torch import Generator, Tensor

from hq_lib.crossbar.checks import CrossbarError
from hq_lib.crossbar.circuit import Circuit, Wires
from hq_lib.crossbar.mapping import OK, STUCK_HIGH, Plan, partner_levels, row_order
from hq_lib.crossbar.native import stream

_OHM_uS = 1e-6  # ohm times microsiemens


@dataclass(frozen=True, eq=False)
class Cells:
    """The programmed cells of one layer."""

    plan: Plan
    """Wanted levels and their recombination."""
    circuit: Circuit
    """The kind of cell, its wires, and the seed of the random streams."""
    name: str
    """Layer name; with the circuit's seed the key of the random streams."""
    target_uS: Tensor
    """Targets, uS."""
    g0_uS: Tensor
    """Programmed conductances at the device's reference time, uS."""
    xi: Tensor
    """Standard normals behind the programming errors."""
    nu: Tensor | None
    """Drift exponents, dimensionless, or None."""
    codes: Tensor
    """uint8 fault codes."""
    order: Tensor
    """int64 (K,): logical row held by each physical row."""
    n_pulses: int
    """Programming pulses of all cells."""

    @classmethod
    def program(cls, plan: Plan, circuit: Circuit, name: str) -> "Cells":
        """Cells programmed with the random streams of (seed, ``name``); remapped around their faults if asked."""
        device, seed, verify = circuit.device, circuit.seed, circuit.verify
        codes = circuit.faults.codes(name, tuple(plan.levels.shape), stream(seed, name, "faults"))
        order = torch.arange(len(plan.levels))
        if circuit.remap in ("rows", "both"):
            order = row_order(plan, codes, partner=circuit.remap == "both")
        placed = plan.rows(order)
        levels = partner_levels(placed, codes) if circuit.remap in ("partner", "both") else placed.levels
        target = device.g_min_uS + levels / plan.span[None, :, None] * device.window_uS
        pulses = stream(seed, name, "program")
        xi, n_pulses = _normals(circuit, target.shape, pulses), target.numel()
        near = verify.tolerance * device.window_uS if verify else 0.0
        stuck, works = _stuck(circuit, codes, target), codes == OK
        for _ in range(verify.max_pulses - 1 if verify else 0):
            off = (torch.where(works, device.program(target, xi), stuck) - target).abs() > near
            if not bool(off.any()):
                break
            xi, n_pulses = torch.where(off, _normals(circuit, target.shape, pulses), xi), n_pulses + int(off.sum())
        nu = device.exponents(target, stream(seed, name, "drift"))
        return cls(plan, circuit, name, target, device.program(target, xi), xi, nu, codes, order, n_pulses)

    def conductance(self, t_s: float, celsius: float = 25.0) -> Tensor:
        """float64 (K, C, P), uS, physical order, as read at ``t_s`` seconds: drifted, stuck cells where they are stuck,
        with the noise of that read-out. Reading again at one time gives the same; noise per product is apart."""
        g, device = self._settled(t_s), self.circuit.device
        g = device.read_out(*g, t_s, stream(self.circuit.seed, self.name, "readout", float(t_s)))
        return g * device.warmth(celsius) if celsius != 25.0 else g

    def _settled(self, t_s: float) -> tuple[Tensor, Tensor]:
        """(conductance at ``t_s``, what it was when programmed), uS, before any read noise."""
        device, works = self.circuit.device, self.codes == OK
        g = device.at(self.target_uS, self.xi, self.nu, t_s)
        if bool(works.all()):
            return g, self.g0_uS
        stuck = _stuck(self.circuit, self.codes, g)
        return torch.where(works, g, stuck), torch.where(works, self.g0_uS, stuck)

    def fractions(self, t_s: float, celsius: float = 25.0) -> tuple[Tensor, Tensor | None]:
        """(fractions, variance) in logical order, (K, C, P): place in the window, and variance per product.

        Through wires both are seen: variances scale with (G_eff / G)^2, first order in the noise.
        """
        device, wires = self.circuit.device, self.circuit.wires
        g, (settled, g0) = self.conductance(t_s, celsius), self._settled(t_s)
        std = device.read_std(settled, t_s, per="product", g0_uS=g0)
        variance = None if std is None else (std * device.warmth(celsius)).square()
        if wires is not None and not wires.ideal:
            seen = self._through_wires(g)
            if variance is not None:
                variance = variance * torch.where(g > 0, seen / g.clamp_min(1e-30), 0.0).square()
            g = seen
        window, inverse = device.window_uS, torch.argsort(self.order)
        fractions = ((g - device.g_min_uS) / window)[inverse]
        return fractions, None if variance is None else (variance / window**2)[inverse]

    def _through_wires(self, g: Tensor) -> Tensor:
        """Effective conductances, tile by tile; the planes of one output are neighbours in a tile."""
        wires = self.circuit.wires
        assert wires is not None
        if bool((g < 0).any()):
            raise CrossbarError("wires need conductances >= 0: use a device with clip_at_zero=True")
        flat = g.flatten(1)
        seen = torch.empty_like(flat)
        for tile in self.circuit.mapping.tiles(flat.shape):
            seen[tile] = torch.from_numpy(effective_conductance(flat[tile].numpy(), wires))
        return seen.view(g.shape)


def _stuck(circuit: Circuit, codes: Tensor, like: Tensor) -> Tensor:
    """What stuck cells hold, uS, in the dtype of ``like``; G_min where cells work."""
    return torch.where(codes == STUCK_HIGH, circuit.device.g_max_uS, circuit.device.g_min_uS).to(like.dtype)


def _normals(circuit: Circuit, shape: torch.Size, generator: Generator) -> Tensor:
    """float64 ``shape`` standard normals; cells of one column or row of an array share a part, as the device says."""
    xi = torch.randn(shape, generator=generator, dtype=torch.float64)
    by_column, by_row = circuit.device.column_correlation, circuit.device.row_correlation
    if by_column == by_row == 0:
        return xi
    n_rows, n_columns = shape[0], shape[1] * shape[2]
    tile_of_row = torch.arange(n_rows) // circuit.mapping.tile_rows
    tile_of_column = torch.arange(n_columns) // circuit.mapping.tile_cols
    columns = torch.randn(int(tile_of_row[-1]) + 1, n_columns, generator=generator, dtype=torch.float64)
    rows = torch.randn(n_rows, int(tile_of_column[-1]) + 1, generator=generator, dtype=torch.float64)
    shared = by_column**0.5 * columns[tile_of_row] + by_row**0.5 * rows[:, tile_of_column]
    return (1 - by_column - by_row) ** 0.5 * xi + shared.view(shape)


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
    admittance, transfer = np.zeros((len(g), len(g))), np.zeros_like(g)  # as seen from the row nodes of a column
    for j in range(g.shape[1] - 1, -1, -1):
        if j < g.shape[1] - 1 and wires.row_ohm:
            rest = transfer[:, j + 1 :]
            admittance, transfer[:, j + 1 :] = _series(admittance, rest, wires.row_ohm * _OHM_uS)
        own, transfer[:, j] = _column(g[:, j], wires)
        admittance = admittance + own
    admittance, transfer = _series(admittance, transfer, (wires.source_ohm + wires.row_ohm) * _OHM_uS)
    return transfer, admittance


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
    steps, wire = np.diff(inverse, axis=1), np.zeros_like(inverse)  # the inverse times the chain's Laplacian
    wire[:, :-1] -= steps
    wire[:, 1:] += steps
    wire[:, -1] += r / load * inverse[:, -1]
    own = g[:, None] * wire
    return (own + own.T) / 2, g * inverse[:, -1] * (r / load)
