"""ACIQ's analytic clip: the alpha that balances clipping against rounding noise for a Laplace or Gauss tensor.

Paper: Banner et al., arXiv:1810.05723. Model: 2^M bins of width Delta = 2 alpha / 2^M over [-alpha, alpha], noise
Delta^2 / 12 in each, everything beyond clipped. Ratios are alpha / b (Laplace, b = E|x - mean|), alpha / sigma (Gauss).
The model ignores where the grid's levels lie; below 3 bits that matters: see ``hq_lib.quantizers.aciq.exact``.
"""

import math
from typing import Literal, get_args

from scipy.optimize import root_scalar
from scipy.special import lambertw
from scipy.stats import norm

from hq_lib.results.hints import check_known

Prior = Literal["laplace", "gauss"]

# Table of the official code (two decimals, some cut and some rounded), by prior and ReLU, then bits M.
PUBLISHED: dict[tuple[Prior, bool], dict[int, float]] = {
    ("laplace", False): {0: 1.05, 1: 1.86, 2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89},
    ("laplace", True): {0: 1.86, 1: 2.83, 2: 3.89, 3: 5.02, 4: 6.2, 5: 7.41, 6: 8.64, 7: 9.89, 8: 11.16},
    ("gauss", False): {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92},
    ("gauss", True): {1: 1.71, 2: 2.15, 3: 2.55, 4: 2.93, 5: 3.28, 6: 3.61, 7: 3.92, 8: 4.2},
}


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
