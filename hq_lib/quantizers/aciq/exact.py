"""The exact mean squared error of a clipped uniform grid on a Laplace or Gauss variable, and its true optimum.

No noise model: the squared distance to the nearest level is integrated in closed form over every cell. At 2 bits the
true optimum differs from ACIQ's table by up to 40 %, and with it the grid that the hardware really has.

Grids, M bits, clip a (in units of b or sigma):
    midpoint       2^M levels at the centres of 2^M bins over [-a, a]            ACIQ's model; zero is no level
    endpoint       2^M levels, the outermost at -a and a, step 2a / (2^M - 1)    min-max affine
    restricted     2^M - 1 levels, zero among them, step a / (2^(M-1) - 1)       symmetric integers
    relu_endpoint  2^M levels from 0 to a of the rectified variable              unsigned activations
"""

from itertools import product
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from hq_lib.quantizers.aciq.clip import PUBLISHED, Prior, check, clip_ratio, noise_mse
from hq_lib.results.hints import check_known

GridKind = Literal["midpoint", "endpoint", "restricted", "relu_endpoint"]
GRIDS: dict[bool, tuple[GridKind, ...]] = {False: ("midpoint", "endpoint", "restricted"), True: ("relu_endpoint",)}
"""ReLU or not -> the grids that there are"""
MAX_BITS = 12  # 4096 levels; beyond it the noise model is exact to 1e-4


def levels(ratio: float, bits: int, grid: GridKind) -> NDArray[np.float64]:
    """The non-negative levels, ascending, of a grid clipped at ``ratio`` (each signed grid mirrors them).

    Raises:
        ValueError: an unknown grid, bits outside 1..12, or the restricted grid at 1 bit (its only level is 0).
    """
    check_known(grid, get_args(GridKind), "grid")
    if bits != int(bits) or not 1 <= bits <= MAX_BITS or (grid == "restricted" and bits < 2):
        raise ValueError(
            f"bits={bits!r}: the {grid} grid needs an integer from {1 + (grid == 'restricted')} to {MAX_BITS}"
        )
    half = 2 ** (int(bits) - 1)
    if grid == "midpoint":
        return ratio * (np.arange(half) + 0.5) / half
    if grid == "endpoint":
        return ratio * (2 * np.arange(half) + 1) / (2 * half - 1)
    n_steps = half - 1 if grid == "restricted" else 2 * half - 1
    return ratio * np.arange(n_steps + 1) / n_steps


def grid_mse(ratio: float, bits: int, prior: Prior, grid: GridKind) -> float:
    """The exact E (x - nearest level)^2 at unit b or sigma, by integration over the cells.

    For ``relu_endpoint`` x = max(0, y): the negative half sits on level 0 and costs nothing.
    """
    check(prior)
    level = levels(ratio, bits, grid)
    edges = np.concatenate([[0.0], (level[1:] + level[:-1]) / 2, [np.inf]])
    m_0, m_1, m_2 = (np.diff(moment) for moment in _partial_moments(edges, prior))
    one_side = float(np.sum(m_2 - 2 * level * m_1 + level**2 * m_0))
    return one_side if grid == "relu_endpoint" else 2 * one_side


def grid_clip_ratio(bits: int, prior: Prior, grid: GridKind) -> float:
    """The true optimum alpha / b or alpha / sigma of ``grid_mse``: a scan, then a bounded search around its best."""
    upper = 2.0 * bits + 8.0 if prior == "laplace" else 0.5 * bits + 4.0
    scan = np.linspace(0.05, upper, 200)
    best = int(np.argmin([grid_mse(x, bits, prior, grid) for x in scan]))
    bracket = (scan[max(best - 1, 0)], scan[min(best + 1, len(scan) - 1)])
    found = minimize_scalar(
        grid_mse, bounds=bracket, args=(bits, prior, grid), method="bounded", options={"xatol": 1e-9}
    )
    return float(found.x)


def _partial_moments(x: NDArray[np.float64], prior: Prior) -> tuple[NDArray[np.float64], ...]:
    """Integrals of y^r f(y) from 0 to x, r = 0, 1, 2, unit scale; x may be infinite."""
    finite = np.where(np.isinf(x), 0.0, x)
    if prior == "laplace":
        decay = np.where(np.isinf(x), 0.0, np.exp(-finite)) / 2
        return 0.5 - decay, 0.5 - (1 + finite) * decay, 1 - (finite**2 + 2 * finite + 2) * decay
    mass, density = norm.cdf(x) - 0.5, norm.pdf(x)
    return mass, norm.pdf(0.0) - density, mass - finite * density


def constants(bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> pd.DataFrame:
    """``tab_aciq_constants``, one row per (prior, relu, bits, grid); ratios are alpha / b (Laplace), / sigma (Gauss).

    Columns: ``published`` the official code's constant (NaN where it has none), ``ours`` the closed form, ``gap`` their
    difference, ``model_mse`` the noise model's error at ``ours`` for unit spread, ``grid_optimum`` the exact optimum of
    ``grid``, ``grid_mse`` its error, ``penalty_pct`` the excess error when ``ours`` clips that grid, per cent.
    """
    priors: tuple[Prior, ...] = ("laplace", "gauss")
    rows = []
    for prior, relu, m in product(priors, (False, True), bits):
        ours, published = clip_ratio(m, prior, relu=relu), PUBLISHED[prior, relu].get(m, float("nan"))
        for grid in GRIDS[relu]:
            if grid == "restricted" and m == 1:
                continue
            optimum = grid_clip_ratio(m, prior, grid)
            best = grid_mse(optimum, m, prior, grid)
            rows.append({
                "prior": prior, "relu": relu, "bits": m, "grid": grid,
                "published": published, "ours": ours, "gap": ours - published,
                "model_mse": noise_mse(ours, m, prior, relu=relu), "grid_optimum": optimum, "grid_mse": best,
                "penalty_pct": 100 * (grid_mse(ours, m, prior, grid) / best - 1),
            })  # fmt: skip
    return pd.DataFrame(rows)
