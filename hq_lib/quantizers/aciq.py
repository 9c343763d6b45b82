"""ACIQ (Banner et al., arXiv:1810.05723): the clip that balances clipping against rounding noise. Seed 000: "AICQ".

Ratios are alpha / b (Laplace, b = E|x - mean|) or alpha / sigma (Gauss). The paper's model: 2^M bins of width
Delta = 2 alpha / 2^M over [-alpha, alpha], noise Delta^2 / 12 in each, everything beyond clipped. It ignores where the
grid's levels lie; at 2 bits the true optimum differs by up to 40 %, and with it the grid that the hardware really has.
So ``grid_mse`` integrates the squared distance to the nearest level in closed form over every cell. M bits, clip a
(bits per channel and bias correction are in ``hq_lib.ptq.allocation``):

    midpoint       2^M levels at the centres of 2^M bins over [-a, a]            ACIQ's model; zero is no level
    endpoint       2^M levels, the outermost at -a and a, step 2a / (2^M - 1)    min-max affine
    restricted     2^M - 1 levels, zero among them, step a / (2^(M-1) - 1)       symmetric integers
    relu_endpoint  2^M levels from 0 to a of the rectified variable              unsigned activations
"""

import math
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar, root_scalar
from scipy.special import lambertw
from scipy.stats import norm
from torch import Tensor

from hq_lib.quantizers.ranges import Range, per_channel, rows
from hq_lib.results.hints import check_known

Prior = Literal["laplace", "gauss"]

PUBLISHED: dict[tuple[Prior, bool], dict[int, float]] = {
    ("laplace", False): {0: 1.05, 1: 1.86, 2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89},
    ("laplace", True): {0: 1.86, 1: 2.83, 2: 3.89, 3: 5.02, 4: 6.2, 5: 7.41, 6: 8.64, 7: 9.89, 8: 11.16},
    ("gauss", False): {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92},
    ("gauss", True): {1: 1.71, 2: 2.15, 3: 2.55, 4: 2.93, 5: 3.28, 6: 3.61, 7: 3.92, 8: 4.2},
}
"""Table of the official code (two decimals, some cut and some rounded), by prior and ReLU, then bits M."""


def check(prior: str, bits: float = 0) -> None:
    """Nothing for a known prior and 0 <= bits <= 32; else ``ValueError``."""
    check_known(prior, get_args(Prior), "prior")
    if not 0 <= bits <= 32:
        raise ValueError(f"bits={bits!r}: the analytic clip needs 0 to 32 bits")


def clip_ratio(bits: float, prior: Prior, *, relu: bool = False) -> float:
    """The optimal alpha / b (Laplace) or alpha / sigma (Gauss) of the noise model.

        Laplace:  x / (3 * 4^M) = e^-x                so  x = W(3 * 4^M), Lambert's W
        Gauss:    phi(x) - x (1 - Phi(x)) = x / (6 * 4^M), one root, by bracketing
        ReLU:     the same with M + 1: half the range, half the mass

    Args:
        bits: M, 0..32; fractions are allowed (bit allocation meets them).
        relu: True for the positive half of a zero-mean variable, range [0, alpha].
    """
    check(prior, bits)
    m = bits + 1 if relu else bits
    if prior == "laplace":
        return float(lambertw(3.0 * 4.0**m).real)

    def slope(x: float) -> float:
        return float(norm.pdf(x) - x * norm.sf(x)) - x / (6.0 * 4.0**m)

    return float(root_scalar(slope, bracket=(0.0, 12.0), method="brentq", xtol=1e-13).root)


def noise_mse(ratio: float, bits: float, prior: Prior, *, relu: bool = False) -> float:
    """The noise model's mean squared error at unit b or sigma: clipping plus rounding.

        Laplace:  2 e^-x + x^2 / (3 * 4^M)
        Gauss:    2 [(1 + x^2)(1 - Phi(x)) - x phi(x)] + x^2 / (3 * 4^M)
        ReLU:     half the clipping, x^2 / (24 * 4^M) for the rounding

    Multiply by b^2 (sigma^2) for real units.
    """
    check(prior, bits)
    if not ratio >= 0:
        raise ValueError(f"ratio={ratio!r}: alpha / spread cannot be negative or NaN")
    if prior == "laplace":
        one_tail = math.exp(-ratio)
    else:
        one_tail = float((1 + ratio**2) * norm.sf(ratio) - ratio * norm.pdf(ratio))
    rounding = ratio**2 / (3.0 * 4.0**bits)
    return one_tail + rounding / 8 if relu else 2 * one_tail + rounding


GridKind = Literal["midpoint", "endpoint", "restricted", "relu_endpoint"]
GRIDS: dict[bool, tuple[GridKind, ...]] = {False: ("midpoint", "endpoint", "restricted"), True: ("relu_endpoint",)}
"""ReLU or not -> the grids that there are"""
MAX_BITS = 12  # 4096 levels; beyond it the noise model is exact to 1e-4


def levels(ratio: float, bits: int, grid: GridKind) -> NDArray[np.float64]:
    """The non-negative levels, ascending, of a grid clipped at ``ratio`` (each signed grid mirrors them).
    ``ValueError``: an unknown grid, bits outside 1..12, or the restricted grid at 1 bit (its only level is 0).
    """
    check_known(grid, get_args(GridKind), "grid")
    fewest = 2 if grid == "restricted" else 1
    if bits != int(bits) or not fewest <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits!r}: the {grid} grid needs an integer from {fewest} to {MAX_BITS}")
    half = 2 ** (int(bits) - 1)
    if grid == "midpoint":
        return ratio * (np.arange(half) + 0.5) / half
    if grid == "endpoint":
        return ratio * (2 * np.arange(half) + 1) / (2 * half - 1)
    n_steps = half - 1 if grid == "restricted" else 2 * half - 1
    return ratio * np.arange(n_steps + 1) / n_steps


def grid_mse(ratio: float, bits: int, prior: Prior, grid: GridKind) -> float:
    """The exact E (x - nearest level)^2 at unit b or sigma.

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
    of, options = (bits, prior, grid), {"xatol": 1e-9}
    found = minimize_scalar(grid_mse, bounds=bracket, args=of, method="bounded", options=options)
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
    table = []
    for prior, relu, m in product(get_args(Prior), (False, True), bits):
        ours, published = clip_ratio(m, prior, relu=relu), PUBLISHED[prior, relu].get(m, float("nan"))
        for grid in GRIDS[relu]:
            if grid == "restricted" and m == 1:
                continue
            optimum = grid_clip_ratio(m, prior, grid)
            best = grid_mse(optimum, m, prior, grid)
            table.append({
                "prior": prior, "relu": relu, "bits": m, "grid": grid,
                "published": published, "ours": ours, "gap": ours - published,
                "model_mse": noise_mse(ours, m, prior, relu=relu), "grid_optimum": optimum, "grid_mse": best,
                "penalty_pct": 100 * (grid_mse(ours, m, prior, grid) / best - 1),
            })  # fmt: skip
    return pd.DataFrame(table)


ReluVariant = Literal["official", "theory"]


class Fit(NamedTuple):
    """Location and spread of a tensor under both priors, and which prior is likelier."""

    mean: Tensor
    """(C,), real units; 0 where only the positive half was fitted."""
    b: Tensor
    """(C,), real units, Laplace spread: E|x - mean|."""
    sigma: Tensor
    """(C,), real units, Gauss spread: unbiased standard deviation (sqrt E x^2 for a positive half)."""
    is_laplace: Tensor
    """(C,) bool: the Laplace maximum likelihood is at least the Gauss one, ln 2b + 1 <= ln(2 pi sigma^2)/2 + 1/2."""


def fit(x: Tensor, *, axis: int | None = None, positive_half: bool = False) -> Fit:
    """Laplace and Gauss fits per row.

    Args:
        x:             (*shape), real units.
        axis:          channel axis; None = the whole tensor as one row.
        positive_half: True = only elements > 0 are used, as the upper half of a zero-mean variable: its conditional
                       moments give b0 = E[x | x > 0] and sigma0^2 = E[x^2 | x > 0], from pre- or post-ReLU values.

    Returns:
        ``Fit`` of (C,) (C = 1 for axis None). A row without spread gives 0. No gradient.
    """
    values = rows(x, axis).double()
    if positive_half:
        positive, n = values.clamp(min=0), (values > 0).sum(1).clamp(min=1)
        b, sigma = positive.sum(1) / n, (positive.square().sum(1) / n).sqrt()
        mean = torch.zeros_like(b)
    else:
        mean = values.mean(1)
        b = (values - mean.unsqueeze(1)).abs().mean(1)
        sigma = values.std(1, correction=min(1, values.shape[1] - 1))
    tiny = torch.finfo(torch.float64).tiny
    gap = torch.log(2 * b + tiny) + 0.5 - torch.log(sigma + tiny) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return Fit(mean, b, sigma, gap <= 0)


def clip_range(
    x: Tensor,
    *,
    bits: int,
    prior: Prior | Literal["auto"] = "auto",
    relu: ReluVariant | None = None,
    grid: GridKind | None = None,
    axis: int | None = None,
) -> Range:
    """ACIQ's range of a tensor: [mean - alpha, mean + alpha], or [0, alpha] after a ReLU; it always contains 0.

    relu=None:        signed; low = max(min x, mean - alpha), high = low + 2 alpha (official code).
    relu="official":  the published method: b from the *rectified* tensor, high = max(mean, 0) + alpha, ReLU table.
                      For ReLU(Laplace(0, b0)) it stops at 4.26 b0 at 4 bits, where the optimum is 6.2 b0.
    relu="theory":    b0 of the variable before the ReLU, from the positive elements (zero-mean assumption), and
                      high = min(alpha_relu * b0, max x): what the derivation asks for. Departure: the cap at max x.

    Args:
        x:     (*shape), real units; for a ReLU variant pre- or post-ReLU values ("official" rectifies them first).
        bits:  M.
        prior: "auto" takes the likelier one, channel by channel.
        grid:  None = the published noise model; a grid kind = that grid's exact optimum (advised below 3 bits).
               With a ReLU variant only "relu_endpoint" makes sense.

    Returns:
        ``Range``, dtype of ``x``. No gradient.
    """
    check_known(relu, (None, *get_args(ReluVariant)), "ReLU variant")
    if grid is not None and (relu is not None) != (grid == "relu_endpoint"):
        raise ValueError(
            f"grid={grid!r} with relu={relu!r}: 'relu_endpoint' is the grid of a ReLU variant, and only of it"
        )
    values = rows(x, axis).clamp(min=0) if relu else rows(x, axis)
    spread = fit(values, axis=0, positive_half=relu == "theory")
    alpha = _alpha(spread, bits, prior, relu is not None, grid)
    if relu == "official":
        low, high = torch.zeros_like(alpha), spread.mean.clamp(min=0) + alpha
    elif relu == "theory":
        low, high = torch.zeros_like(alpha), torch.minimum(alpha, values.amax(1).double())
    else:
        low = torch.maximum(values.amin(1).double(), spread.mean - alpha)
        high = low + 2 * alpha
    low, high = (per_channel(end.to(x.dtype), x, axis) for end in (low, high))
    return Range(low.clamp(max=0.0), high.clamp(min=0.0))


def advised_range(x: Tensor, *, bits: int, signed: bool, axis: int | None = None, restricted: bool = False) -> Range:
    """``clip_range`` as it is best used: "theory" after a ReLU, and below 3 bits the optimum of grids that differ.

    Those are the grid after a ReLU and, with ``restricted``, the symmetric one of 2^b - 1 levels; on signed grids of
    2^b levels with 0 among them the table's error is within 2 % of the least.
    """
    if signed:
        return clip_range(x, bits=bits, axis=axis, grid="restricted" if restricted and bits < 3 else None)
    return clip_range(x, bits=bits, axis=axis, relu="theory", grid="relu_endpoint" if bits < 3 else None)


def _alpha(spread: Fit, bits: int, prior: str, relu: bool, grid: GridKind | None) -> Tensor:
    """(C,) alpha in real units: ratio(bits, prior) times that prior's spread, channel by channel."""
    check_known(prior, (*get_args(Prior), "auto"), "prior")
    laplace = spread.is_laplace if prior == "auto" else torch.full_like(spread.is_laplace, prior == "laplace")
    ratios = [_ratio(bits, "laplace" if lap else "gauss", relu, grid) for lap in laplace.tolist()]
    size = torch.where(laplace, spread.b, spread.sigma)
    return torch.tensor(ratios, dtype=torch.float64, device=size.device) * size


@cache
def _ratio(bits: int, prior: Prior, relu: bool, grid: GridKind | None) -> float:
    return clip_ratio(bits, prior, relu=relu) if grid is None or bits == 0 else grid_clip_ratio(bits, prior, grid)


def predicted_mse(
    alpha: float, spread: float, *, bits: int, prior: Prior, relu: bool = False, grid: GridKind | None = None
) -> float:
    """The mean squared error that theory expects of a clip, in squared real units.

    Args:
        alpha:  clip, real units; spread: b (Laplace) or sigma (Gauss), real units, > 0.
        grid:   None = ACIQ's noise model; a grid kind = exact integration on that grid (it implies ``relu``).
    """
    if not spread > 0:
        raise ValueError(f"spread={spread!r}: a constant tensor has no predicted error; skip it")
    ratio = alpha / spread
    unit = noise_mse(ratio, bits, prior, relu=relu) if grid is None else grid_mse(ratio, bits, prior, grid)
    return spread**2 * unit
