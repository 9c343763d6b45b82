"""Scores of calibration images, of their pixels and of what a network computes, and what one choice has over another.

CaPTQ asserts that smooth calibration images help and defines no measure; the six readings of "smooth pixel
distribution" here are candidates, one score per image, low = smooth unless stated. They are computed on exactly the
pixels the network sees: after resize and crop, before normalisation, x in [0, 1]. Luma is
Y = 0.299 R + 0.587 G + 0.114 B; a one-channel image is its own luma.

Features are of a network in evaluation mode, without gradients; no network is inside. Functions named for a score
return (N,) values for ``select``; functions named for a method (``herding``, ``k_center``) return the positions.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from scipy.fft import dct
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import conv2d

from hq_lib.results.hints import check_known

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_PIXELS = 2**20  # a channel, held as float at once: 1,024 images of 32 x 32


def unit_images(images: Tensor) -> Tensor:
    """(N, C, H, W) float32 in [0, 1], from uint8 or from floats that are already there.

    Raises:
        ValueError: another shape, channel count or range, images under 3 x 3 pixels, NaN.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 3:
        raise ValueError(f"images have shape {tuple(images.shape)}: (N, 1 or 3, H, W) with H, W >= 3 is needed")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give uint8 pixels, or floats in [0, 1]")
    if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("float images leave [0, 1] or hold NaN: score them before normalisation")
    return images.float()


def luma(x: Tensor) -> Tensor:
    """(N, 1, H, W) luma of (N, C, H, W) images in [0, 1]."""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def total_variation(images: Tensor) -> Tensor:
    """(N,) TV = mean |D_h Y| + mean |D_v Y|, forward differences."""
    y = luma(images)
    return y.diff(dim=3).abs().mean((1, 2, 3)) + y.diff(dim=2).abs().mean((1, 2, 3))


def gradient_energy(images: Tensor) -> Tensor:
    """(N,) GE = mean (Sobel_x Y)^2 + (Sobel_y Y)^2, 3 x 3 Sobel without normalisation, interior pixels."""
    sobel = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gradients = conv2d(luma(images), torch.stack([sobel, sobel.T]).unsqueeze(1))
    return gradients.square().sum(1).mean((1, 2))


def laplacian_variance(images: Tensor) -> Tensor:
    """(N,) LV = Var(Y * [[0, 1, 0], [1, -4, 1], [0, 1, 0]]), interior pixels, population variance."""
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    return conv2d(luma(images), kernel).var((1, 2, 3), correction=0)


def high_frequency_ratio(images: Tensor) -> Tensor:
    """(N,) HF = sum_{u+v>=4} C_uv^2 / (sum_{(u,v)!=(0,0)} C_uv^2 + 1e-8), orthonormal 8 x 8 DCT-II of Y.

    Sums run over all whole 8 x 8 blocks from the top left; rows and columns that fill no block are left out.
    ``ValueError`` for images under 8 x 8.
    """
    if min(images.shape[2:]) < 8:
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels hold no 8 x 8 block: the DCT ratio needs one")
    basis = torch.from_numpy(dct(torch.eye(8).double().numpy(), norm="ortho", axis=0)).to(images)
    blocks = luma(images)[:, 0].unfold(1, 8, 8).unfold(2, 8, 8)  # (N, H/8, W/8, 8, 8)
    energy = (basis @ blocks @ basis.T).square().sum((1, 2))
    order = torch.arange(8, device=images.device)
    high = (order.unsqueeze(1) + order) >= 4
    return energy[:, high].sum(1) / (energy.sum((1, 2)) - energy[:, 0, 0] + 1e-8)


def histogram(images: Tensor) -> Tensor:
    """(N, n_bins) share of each image's pixel values (all channels) per bin; every bin holds 256 / n_bins grey levels.

    64 bins for images up to 32 x 32, else 256.
    """
    n_bins = 64 if images.shape[2] * images.shape[3] <= 32 * 32 else 256
    index = ((images.flatten(1) * 255 + 0.5) * (n_bins / 256)).long().clamp_(0, n_bins - 1)
    counts = images.new_zeros(len(images), n_bins).scatter_add_(1, index, torch.ones_like(images.flatten(1)))
    return counts / index.shape[1]


def histogram_roughness(images: Tensor) -> Tensor:
    """(N,) Rg = sum_k (p_{k+1} - 2 p_k + p_{k-1})^2 over the interior bins; low = a smooth distribution of values."""
    return histogram(images).diff(n=2, dim=1).square().sum(1)


def histogram_entropy(images: Tensor) -> Tensor:
    """(N,) H = -sum p ln p, nats; HIGH = values spread over many grey levels."""
    p = histogram(images)
    return -torch.special.xlogy(p, p).sum(1)


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "tv": total_variation,
    "gradient_energy": gradient_energy,
    "laplacian_variance": laplacian_variance,
    "high_frequency": high_frequency_ratio,
    "roughness": histogram_roughness,
    "entropy": histogram_entropy,
}
"""Name -> function of images (N, C, H, W) in [0, 1], float."""


@torch.no_grad()
def score(images: Tensor, metric: str) -> Tensor:
    """(N,) float32 scores by metric name of any images, checked and taken in slices.

    An unknown name raises ``ValueError`` with the nearest valid one.
    """
    check_known(metric, METRICS, "metric")
    if len(images) == 0:
        raise ValueError("no images to score")
    n_images = max(1, _PIXELS // max(1, math.prod(images.shape[2:])))
    return torch.cat([METRICS[metric](unit_images(chunk)) for chunk in images.split(n_images)])


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


def paired_difference(a: list[float], b: list[float]) -> dict[str, float]:
    """Mean of a - b over pairs (the same seed each) with its 95 % Student interval: mean, low, high, n.

    Raises:
        ValueError: unequal lengths or fewer than 2 pairs. Equal differences throughout give an interval of no width.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values: a paired difference needs the same seeds, at least 2")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean = float(difference.mean())
    found = stats.ttest_1samp(difference, 0.0).confidence_interval() if difference.std() else (mean, mean)
    return {"mean": mean, "low": float(found[0]), "high": float(found[1]), "n": len(a)}
