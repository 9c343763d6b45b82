"""How smooth an image is: six readings of "smooth pixel distribution", one score per image, low = smooth unless stated.

CaPTQ asserts that smooth calibration images help and defines no measure; these are the candidates. They are computed on
exactly the pixels the network sees: after resize and crop, before normalisation, x in [0, 1]. Luma is
Y = 0.299 R + 0.587 G + 0.114 B; a one-channel image is its own luma.
"""

from collections.abc import Callable

import torch
from scipy.fft import dct
from torch import Tensor
from torch.nn.functional import conv2d

from hq_lib.results.hints import check_known

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_CHUNK = 1024  # images held as float at once


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
    return torch.cat([METRICS[metric](unit_images(chunk)) for chunk in images.split(_CHUNK)])
