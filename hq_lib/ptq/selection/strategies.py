"""Which images to take, given a score per image: lowest, highest, trimmed or random; balanced or not; never twice.

Everything is deterministic in (scores, labels, seed). Ties go to the lower position.
"""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hq_lib.results.hints import check_known

Strategy = Literal["lowest", "highest", "trimmed", "random"]


def select(
    scores: Tensor | None,
    n: int,
    *,
    strategy: Strategy = "lowest",
    labels: Tensor | None = None,
    n_classes: int | None = None,
    n_images: int | None = None,
    seed: int = 0,
    trim: float = 0.05,
) -> Tensor:
    """(n,) int64 positions, ascending, none twice: the n best, or a random draw.

    "random" ranks by one seeded permutation. "trimmed" is "lowest" after the lowest share ``trim`` is dropped
    (extremely smooth images shrink activation ranges).

    Args:
        scores:    (N,), real; None is enough for "random" with labels or n_images.
        n:         images.
        labels:    (N,) int64: ranks within class and takes n / n_classes of each (one more of the first n % n_classes),
                   since a plain smoothness ranking is mostly a ranking of classes. None = not balanced.
        n_classes: how many classes have to occur; default max(labels) + 1.
        n_images:  N, where neither scores nor labels say it.
        seed:      of "random".
        trim:      [0, 1), of "trimmed", per class where balanced.

    Raises:
        ValueError: more images wanted than there are (in all or of a class), an empty class, NaN scores.
    """
    check_known(strategy, get_args(Strategy), "strategy")
    sizes = {len(t) for t in (scores, labels) if t is not None} | (set() if n_images is None else {n_images})
    if len(sizes) != 1:
        raise ValueError(f"scores, labels and n_images speak of {sorted(sizes) or 'no number of'} images: give one N")
    (size,) = sizes
    if n < 1 or not 0 <= trim < 1:
        raise ValueError(f"n={n}, trim={trim}: need n >= 1 and 0 <= trim < 1")
    if n > size:
        raise ValueError(f"{n} images wanted from a pool of {size}: take fewer, or a larger pool")
    ranks = np.random.default_rng(seed).permutation(size) if strategy == "random" else _ranks(scores, strategy)
    chosen = []
    for members, quota, name in groups(labels, n_classes, size, n):
        order = members[np.argsort(ranks[members], kind="stable")]
        order = order[int(trim * len(order)) :] if strategy == "trimmed" else order
        if len(order) < quota:
            raise ValueError(f"{name} has {len(order)} images to choose from, {quota} wanted")
        chosen.append(order[:quota])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def draw_pool(n_images: int, n_pool: int, *, seed: int, replacement: bool = False) -> Tensor:
    """(n_pool,) ascending positions, a seeded draw: the candidates of one draw of a study, or a random set itself.

    replacement=False: no position twice. replacement=True: independent draws, so n of N positions hold about
    N (1 - (1 - 1 / N)^n) different ones; only for studying what that costs: ``select`` and manifests refuse repeats.
    """
    if n_images < 1 or n_pool < 1 or (n_pool > n_images and not replacement):
        raise ValueError(f"a pool of {n_pool} cannot be drawn from {n_images} images")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, n_images, n_pool) if replacement else rng.permutation(n_images)[:n_pool]
    return torch.from_numpy(np.sort(drawn))


def check_set(positions: Tensor, n: int) -> Tensor:
    """``positions`` itself where it is n different ones; ``ValueError`` for a short or repeated calibration set."""
    if positions.dim() != 1 or len(positions) != n:
        raise ValueError(f"the set has shape {tuple(positions.shape)}, {n} images were promised: it is short or long")
    n_distinct = len(positions.unique())
    if n_distinct != n:
        raise ValueError(f"only {n_distinct} of {n} images are different: a repeated image is no larger set")
    return positions


def _ranks(scores: Tensor | None, strategy: str) -> np.ndarray:
    """(N,) float64, the best lowest."""
    if scores is None:
        raise ValueError(f"strategy {strategy!r} needs scores: only 'random' works without")
    values = scores.detach().cpu().double().numpy()
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(
            f"scores of shape {values.shape} with {int(np.isnan(values).sum())} NaN: need one number per image"
        )
    return -values if strategy == "highest" else values


def groups(labels: Tensor | None, n_classes: int | None, size: int, n: int) -> list[tuple[np.ndarray, int, str]]:
    """(positions, images per set, name) of every class of ``size`` images, or of all of them."""
    if labels is None:
        return [(np.arange(size), n, "the pool")]
    classes = labels.cpu().numpy()
    n_classes = n_classes or int(classes.max()) + 1
    members = [np.flatnonzero(classes == c) for c in range(n_classes)]
    if empty := [c for c, group in enumerate(members) if len(group) == 0]:
        raise ValueError(f"class {empty[0]} of {n_classes} has no image in the pool: balance is impossible")
    return [(group, n // n_classes + (c < n % n_classes), f"class {c}") for c, group in enumerate(members)]
