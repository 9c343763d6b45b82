"""Which images to take, given a score per image: lowest, highest, trimmed or random; balanced or not; never twice.

Everything is deterministic in (scores, labels, pool, seed). Ties go to the lower position.
"""

import difflib
from typing import Literal, TypedDict, Unpack, get_args

import numpy as np
import torch
from torch import Tensor

Strategy = Literal["lowest", "highest", "trimmed", "random"]


class Options(TypedDict, total=False):
    """The keyword options of ``disjoint_sets``, explained there."""

    strategy: Strategy
    labels: Tensor | None
    n_classes: int | None
    pool: Tensor | None
    seed: int
    trim: float


def select(scores: Tensor | None, n: int, **options: Unpack[Options]) -> Tensor:
    """(n,) int64 positions, ascending: the one set of ``disjoint_sets(scores, n, 1, **options)``."""
    return disjoint_sets(scores, n, 1, **options)[0]


def disjoint_sets(
    scores: Tensor | None,
    n: int,
    n_sets: int,
    *,
    strategy: Strategy = "lowest",
    labels: Tensor | None = None,
    n_classes: int | None = None,
    pool: Tensor | None = None,
    seed: int = 0,
    trim: float = 0.05,
) -> list[Tensor]:
    """``n_sets`` sets of n positions; no image occurs twice within or across them.

    Images are ranked once and the sets are consecutive slices: set 0 holds the n best, set 1 the next. "random" ranks
    by one seeded permutation, so its sets are the chunks of a draw without replacement. "trimmed" is "lowest" after the
    lowest share ``trim`` is dropped (extremely smooth images shrink activation ranges).

    Args:
        scores:    (N,), real; None is enough for "random" with labels or pool.
        n:         images per set.
        labels:    (N,) int64: ranks within class and takes n / n_classes of each (one more of the first n % n_classes),
                   since a plain smoothness ranking is mostly a ranking of classes. None = not balanced.
        n_classes: how many classes have to occur; default max(labels) + 1.
        pool:      positions allowed, without repeats; None = all. A seeded pool per draw gives deterministic strategies
                   their spread.
        seed:      of "random".
        trim:      [0, 1), of "trimmed", per class where balanced.

    Returns:
        list of (n,) int64, each ascending.

    Raises:
        ValueError: more images wanted than the pool (or a class) has, an empty class, NaN scores, repeats in the pool.
    """
    n_images = _size(scores, labels, pool)
    values = _values(scores, n_images, strategy)
    allowed = _allowed(pool, n_images)
    _check_sizes(n, n_sets, trim, len(allowed))
    if strategy == "random":
        values = np.random.default_rng(seed).permutation(n_images).astype(float)
    signed, cut = (-values if strategy == "highest" else values), (trim if strategy == "trimmed" else 0.0)
    groups = _groups(labels, n_classes, allowed, n)
    ranked = [(_rank(signed, group, cut), quota, name) for group, quota, name in groups]
    return _slices(ranked, n_sets)


def _check_sizes(n: int, n_sets: int, trim: float, n_allowed: int) -> None:
    if n < 1 or n_sets < 1 or not 0 <= trim < 1:
        raise ValueError(f"n={n}, n_sets={n_sets}, trim={trim}: need n >= 1, n_sets >= 1 and 0 <= trim < 1")
    if n * n_sets > n_allowed:
        raise ValueError(f"{n_sets} x {n} images wanted from a pool of {n_allowed}: take fewer, or a larger pool")


def _slices(ranked: list[tuple[np.ndarray, int, str]], n_sets: int) -> list[Tensor]:
    """Consecutive slices of the ranked groups, each set ascending; a group that runs short is an error naming it."""
    for order, quota, name in ranked:
        if len(order) < quota * n_sets:
            raise ValueError(f"{name} has {len(order)} images to choose from, {quota * n_sets} wanted")
    sets = [np.concatenate([order[i * quota : (i + 1) * quota] for order, quota, _ in ranked]) for i in range(n_sets)]
    return [torch.from_numpy(np.sort(chosen)) for chosen in sets]


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


def _size(scores: Tensor | None, labels: Tensor | None, pool: Tensor | None) -> int:
    """How many images there are; scores and labels have to agree."""
    sizes = {len(t) for t in (scores, labels) if t is not None}
    if len(sizes) > 1:
        raise ValueError(f"{len(scores)} scores for {len(labels)} labels")  # type: ignore[arg-type]
    if sizes:
        return sizes.pop()
    if pool is None:
        raise ValueError("give scores, labels or a pool: nothing says how many images there are")
    return int(pool.max()) + 1 if len(pool) else 0


def _values(scores: Tensor | None, n_images: int, strategy: str) -> np.ndarray:
    """(N,) float64 scores; zeros for a random draw without scores."""
    if strategy not in get_args(Strategy):
        near = difflib.get_close_matches(str(strategy), get_args(Strategy), n=1, cutoff=0.0)
        raise ValueError(f"unknown strategy {strategy!r}: did you mean {near[0]!r}?")
    if scores is None:
        if strategy != "random":
            raise ValueError(f"strategy {strategy!r} needs scores: only 'random' works without")
        return np.zeros(n_images)
    values = scores.detach().cpu().double().numpy()
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(
            f"scores of shape {values.shape} with {int(np.isnan(values).sum())} NaN: need one number per image"
        )
    return values


def _allowed(pool: Tensor | None, n_images: int) -> np.ndarray:
    """The pool as positions, checked for range and repeats."""
    if pool is None:
        return np.arange(n_images)
    positions = pool.cpu().numpy()
    if len(positions) and (positions.min() < 0 or positions.max() >= n_images):
        raise ValueError(f"the pool names position {int(positions.max())} (or below 0) of {n_images} images")
    if len(np.unique(positions)) != len(positions):
        raise ValueError("the pool names an image twice: sets would repeat it")
    return np.sort(positions)


def _groups(
    labels: Tensor | None, n_classes: int | None, allowed: np.ndarray, n: int
) -> list[tuple[np.ndarray, int, str]]:
    """(positions, images per set, name) of every class, or of the whole pool."""
    if labels is None:
        return [(allowed, n, "the pool")]
    classes = labels.cpu().numpy()
    n_classes = n_classes or int(classes.max()) + 1
    members = [allowed[classes[allowed] == c] for c in range(n_classes)]
    for c, group in enumerate(members):
        if len(group) == 0:
            raise ValueError(f"class {c} of {n_classes} has no image in the pool: balance is impossible")
    return [(group, n // n_classes + (c < n % n_classes), f"class {c}") for c, group in enumerate(members)]


def _rank(values: np.ndarray, group: np.ndarray, trim: float) -> np.ndarray:
    """The group's positions by ascending value, ties by position, without the lowest share ``trim``."""
    order = group[np.argsort(values[group], kind="stable")]
    return order[int(trim * len(order)) :]
