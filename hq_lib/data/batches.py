"""Batches of normalised, augmented images, computed on whole tensors (no per-image work).

All randomness comes from a ``torch.Generator`` on the CPU, so that an epoch is the same on every device and can be
replayed from its seed alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hq_lib.data.sets import DataSpec, ImageSet


def normalize(images: Tensor, spec: DataSpec) -> Tensor:
    """(x / 255 - mean) / std per channel; (B, C, H, W) uint8 -> the same shape, float32, channels-last."""
    images = images[:]  # read, where they are files
    mean, std = (
        (torch.tensor(each).view(1, -1, 1, 1) * 255).to(images.device, non_blocking=True)
        for each in (spec.mean, spec.std)
    )
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor, generator: torch.Generator, *, pad: int = 4, flip: bool = True, n_drawn: int | None = None,
    part: slice = slice(None),
) -> Tensor:  # fmt: skip
    """A random crop after zero padding by ``pad`` pixels, and a random left-right flip, drawn per image.

    Args:
        images:    (B, C, H, W) uint8; padded pixels are black (0) before normalisation.
        generator: CPU generator; consumes 2 B integers and, with ``flip``, B bits more.
        pad:       pixels added on each side, >= 0.
        flip:      whether half of the images are mirrored.
        n_drawn:   images that crops and flips are drawn for, of which ``images`` are ``part``; None = these alone.

    Returns:
        (B, C, H, W) uint8, on the device of ``images``.
    """
    n, _, height, width = images.shape
    drawn = (n if n_drawn is None else n_drawn, 1)
    rows = torch.randint(0, 2 * pad + 1, drawn, generator=generator)[part] + torch.arange(height)
    cols = torch.randint(0, 2 * pad + 1, drawn, generator=generator)[part] + torch.arange(width)
    if flip:
        mirrored = torch.randint(0, 2, drawn, generator=generator)[part].bool()
        cols = torch.where(mirrored, cols.flip(1), cols)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # (B, H, W, C)
    each = torch.arange(n, device=images.device).view(n, 1, 1)
    rows, cols = (each.to(images.device, non_blocking=True) for each in (rows, cols))
    return padded[each, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    pad: int = 0,
    flip: bool = False,
    device: torch.device | str = "cpu",
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (normalised images (B, C, H, W) float32, labels (B,) int64).

    Args:
        images:     the set; walked in order without a generator (evaluation), in a fresh permutation with one
                    (training).
        batch_size: images per batch. The last, smaller batch is kept in evaluation and dropped in training (unless
                    it is the only one), as batch norm wants batches of one size.
        generator:  CPU generator that draws permutation and augmentation; its state alone decides the epoch.
        pad, flip:  augmentation, see ``augment``; need a generator. Flips only where ``DataSpec.flip`` allows them.
        device:     where the batch is wanted.
        part:       the share of each batch that is yielded, augmented as it is in the whole batch.
    """
    if generator is None and (pad or flip):
        raise ValueError("augmentation needs a generator: pass generator=torch.Generator().manual_seed(seed)")
    n = len(images)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    stop = n if generator is None or n < batch_size else n - n % batch_size
    for start in range(0, stop, batch_size):
        chosen = order[start : min(start + batch_size, stop)]
        at = chosen[part].to(images.images.device, non_blocking=True)
        x = images.images[at]
        if generator is not None and (pad or flip):
            x = augment(x, generator, pad=pad, flip=flip and images.spec.flip, n_drawn=len(chosen), part=part)
        yield normalize(x.to(device), images.spec), images.labels[at].to(device)
