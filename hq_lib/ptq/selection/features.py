"""Scores and selections from what a network computes: pure functions of feature arrays, no network inside.

Features are of a network in evaluation mode, without gradients. Functions named for a score return
(N,) values for ``select``; functions named for a method (``herding``, ``k_center`` ...) return the positions.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor


def _checked(features: Tensor, n: int | None = None) -> Tensor:
    """(N, D) detached float32 features; ``ValueError`` for another shape, NaN, or n outside 1..N."""
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"features have shape {tuple(features.shape)}: one row per image, (N, D), is needed")
    if not torch.isfinite(features).all():
        raise ValueError("features hold NaN or infinity: the network or its input is broken")
    if n is not None and not 1 <= n <= len(features):
        raise ValueError(f"{n} images wanted from a pool of {len(features)}")
    return features.detach().float()


@torch.no_grad()
def reconstruction_error(
    x: Tensor, block: Callable[[Tensor], Tensor], quantized_block: Callable[[Tensor], Tensor], *, batch_size: int = 256
) -> Tensor:
    """(N,) mean squared difference per image between a float block and its rounded-to-nearest twin, on inputs ``x``.

    The quantity that smoothness is supposed to lower. Both callables are to be in evaluation mode
    (``graph.modes.eval_mode``) and must not mix images, else a score depends on its batch.
    """
    errors = [(block(part) - quantized_block(part)).square().flatten(1).mean(1) for part in x.split(batch_size)]
    return torch.cat(errors)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per image and channel, the mean and the mean square over positions: two (N, C), of a BN layer's *input*."""
    flat = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
    return flat.mean(2), flat.square().mean(2)


def bn_distance(mean: Tensor, square: Tensor, bn_mean: Tensor, bn_var: Tensor) -> Tensor:
    """(N,) distance of each image's statistics to the running ones: ||mu_i - mu||^2 + ||sigma_i - sigma||^2.

    Args:
        mean, square:    (N, C) from ``channel_moments``; layers are joined along C with ``torch.cat``.
        bn_mean, bn_var: (C,) running statistics of the same layers, joined alike.
    """
    mean, square = _checked(mean), _checked(square)
    sigma = (square - mean.square()).clamp(min=0).sqrt()
    return (mean - bn_mean).square().sum(1) + (sigma - bn_var.sqrt()).square().sum(1)


def knowledge_distance(layers: Sequence[Tensor], *, n_clusters: int = 10, seed: int = 0) -> Tensor:
    """(N,) SelectQ-like score: an image's distance to its nearest cluster centre, summed over layers.

    Each layer's (N, D_l) features are clustered by k-means; distances are divided by the layer's mean distance, so that
    wide layers do not dominate. Low = near the centres, which SelectQ picks. Departure: plain k-means stands in for its
    dynamic clustering (no code is public).
    """
    if not layers:
        raise ValueError("no layers: give at least one (N, D) feature array")
    total = torch.zeros(len(layers[0]))
    for features in layers:
        values = _checked(features, n_clusters).cpu().numpy()
        n_distinct = len(np.unique(values, axis=0))  # no more centres than that
        clusters = KMeans(min(n_clusters, n_distinct), n_init="auto", random_state=seed).fit(values)
        distance = clusters.transform(values).min(1)
        total += torch.from_numpy(distance / max(float(distance.mean()), 1e-12)).float()
    return total


def herding(features: Tensor, n: int) -> Tensor:
    """(n,) positions whose running mean follows the pool's mean (Welling 2009), without repeats.

    x_t = argmin_x || mu - (1/t) (sum_{j<t} phi(x_j) + phi(x)) ||
    """
    phi = _checked(features, n)
    mu, norms, total = phi.mean(0), phi.square().sum(1), torch.zeros_like(phi[0])
    free, chosen = torch.ones(len(phi), dtype=torch.bool, device=phi.device), []
    for t in range(1, n + 1):
        distance = norms - 2 * phi @ (t * mu - total)  # t^2 times the squared norm, up to a constant
        best = int(torch.where(free, distance, torch.inf).argmin())
        free[best] = False
        chosen.append(best)
        total = total + phi[best]
    return torch.tensor(chosen)


def k_center(features: Tensor, n: int) -> Tensor:
    """(n,) positions by farthest-first traversal from the image nearest the mean (2-approximation of k-center)."""
    phi = _checked(features, n)
    chosen = [int((phi - phi.mean(0)).square().sum(1).argmin())]
    nearest = (phi - phi[chosen[0]]).square().sum(1)
    for _ in range(n - 1):
        nearest[chosen[-1]] = -1.0  # never taken twice, even among equal images
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (phi - phi[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)
