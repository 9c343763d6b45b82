"""From a tensor's statistics to ACIQ's clipped range, signed or after a ReLU, per tensor or per channel."""

from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hq_lib.quantizers.aciq.clip import Prior, clip_ratio, noise_mse
from hq_lib.quantizers.aciq.exact import GridKind, grid_clip_ratio, grid_mse
from hq_lib.quantizers.ranges import Range, per_channel, rows
from hq_lib.results.hints import check_known

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
    likelihood_gap = (
        torch.log(2 * b + tiny) + 0.5 - torch.log(sigma + tiny) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    )
    return Fit(mean, b, sigma, likelihood_gap <= 0)


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
    return torch.tensor(ratios, dtype=torch.float64, device=spread.b.device) * torch.where(
        laplace, spread.b, spread.sigma
    )


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
