"""The points of the calibration study as data: which sets, with which method, at which width, in which profile.

A point is one calibration set, reconstructed and judged once. Ways of choosing are paired by draw: same candidates,
same seed of the reconstruction. Parts:

    budget      iterations, judged on held-out images: how the study's 100 were fixed
    strategies  every way of choosing, QDrop at W2A2
    bits        QDrop and BRECQ, smoothest against random, at every width
    n_calib     how many images, with and without replacement (of images, and of batches)
    reseed      one set, several seeds of the reconstruction: the luck that is not the draw's
    ranges      no reconstruction, ranges alone: what a large net on a CPU can afford
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hq_lib.results import paths
from hq_lib.studies.selection import bench as benches
from hq_lib.studies.selection.bench import Bits
from hq_lib.studies.selection.sets import SMOOTH

LOWEST: Bits = (2, 2)
"""of the main comparison: the width most sensitive to the calibration set"""
WIDTHS: tuple[Bits, ...] = ((4, 4), (3, 3), (2, 4))
"""the paper's other widths"""


@dataclass(frozen=True)
class Size:
    """How much of the study a profile runs."""

    n_calib: int
    """images of a set"""
    n_pool: int
    """candidates of a draw"""
    iterations: int
    """reconstruction steps a block"""
    n_draws: int
    """draws of every way of choosing at ``LOWEST``"""
    n_random: int
    """draws of the random baseline there"""
    n_draws_bits: int
    """draws at the other widths, and of BRECQ at all"""
    choices: tuple[str, ...]
    """the ways compared"""
    ns: tuple[int, ...]
    """numbers of images of ``n_calib``; its candidates are as many as the largest"""
    ns_replaced: tuple[int, ...]
    """those of them that are drawn with replacement too"""
    n_draws_n: int
    """draws there"""
    budgets: tuple[int, ...]
    """iterations of ``budget``"""
    n_reseeds: int
    """seeds of ``reseed``"""
    ranges: tuple[tuple[str, Bits, int], ...]
    """(method, bits, draws) of ``ranges``, random and smoothest"""
    n_common: int
    """held-out images on which losses are compared"""
    n_test: int | None
    """test images, None = all"""


SIX = ("random", "tv_lowest", "tv_highest", "roughness_lowest", "block_error_lowest", "herding")
ALL = (*SIX, "random_unbalanced", "tv_trimmed", "knowledge_lowest", "k_center")
SIZES = {
    "cifar10": {
        "smoke": Size(16, 64, 1, 2, 2, 0, ("random", "tv_lowest"), (16, 32), (16,), 1, (0, 1), 0,
                      (("mse", (4, 8), 1),), 50, 100),
        "quick": Size(64, 640, 20, 2, 3, 1, SIX, (16, 64, 256), (64,), 1, (0, 5, 20), 0, (("mse", (4, 8), 1),),
                      250, 500),
        "full": Size(256, 4096, 100, 5, 10, 3, ALL, (32, 64, 128, 256, 1024), (64, 1024), 3,
                     (0, 25, 50, 100, 200, 400), 3, (("mse", (4, 8), 5),), 1000, None),
    },
    "imagenet": {
        "smoke": Size(16, 40, 2, 2, 2, 1, ("random", "tv_lowest"), (16,), (), 1, (0, 2), 1,
                      (("minmax", (8, 8), 1),), 10, 20),
        "quick": Size(32, 200, 10, 2, 2, 1, ("random", "tv_lowest"), (32,), (), 1, (0, 10), 1,
                      (("minmax", (4, 8), 1),), 20, 50),
        "full": Size(1024, 8192, 20_000, 3, 5, 3, SIX, (64, 256, 1024), (), 3, (0, 2_000, 20_000), 3,
                     (("minmax", (8, 8), 1), ("minmax", (4, 8), 1), ("mse", (8, 8), 1),
                      ("mse", (4, 8), 3), ("mse", (4, 4), 1)), 50, None),
    },
}  # fmt: skip
RANGE_SETS = {"smoke": (16, 40), "quick": (32, 200), "full": (64, 400)}
"""(images, candidates) of ``ranges``: they fit half of the ImageNet sample"""


@dataclass(frozen=True)
class Point:
    """One calibration set, reconstructed once."""

    choice: str
    """key of ``CHOICES``"""
    n_calib: int
    """images"""
    n_pool: int
    """candidates that it is chosen from"""
    draw: int
    """seed of pool, choice and (unless ``run_seed`` says otherwise) reconstruction"""
    iterations: int
    """steps a block (BRECQ: and a quarter more for the activation steps)"""
    method: str = "qdrop"
    """"qdrop", "brecq", or ranges alone: "mse", "minmax" """
    bits: Bits = LOWEST
    """of weights and activations"""
    batch_sampling: str = "without_replacement"
    """how batches are drawn from the set"""
    run_seed: int | None = None
    """seed of the reconstruction alone"""
    split: str = "test"
    """what it is judged on: "test", or "common" where something is chosen by it"""

    @property
    def switches(self) -> dict[str, Any]:
        """What identifies its row beyond the columns."""
        made: dict[str, Any] = {"choice": self.choice, "n_pool": self.n_pool, **benches.SETTINGS}
        if self.iterations:
            made |= {**benches.STEPS, "rounding_lr": benches.rounding_rate(self.iterations)}
        given = (("batch_sampling", "without_replacement"), ("run_seed", None), ("split", "test"))
        return made | {key: getattr(self, key) for key, usual in given if getattr(self, key) != usual}


def _budget(size: Size, _profile: str) -> Iterator[Point]:
    for iterations in size.budgets:
        method = "qdrop" if iterations else "mse"
        yield Point("random", size.n_calib, size.n_pool, 0, iterations, method, split="common")


def _strategies(size: Size, _profile: str) -> Iterator[Point]:
    for draw in range(size.n_random):
        for choice in size.choices if draw < size.n_draws else ("random",):
            yield Point(choice, size.n_calib, size.n_pool, draw, size.iterations)


def _bits(size: Size, _profile: str) -> Iterator[Point]:
    for draw in range(size.n_draws_bits):
        for method in ("qdrop", "brecq"):
            for bits in (LOWEST, *WIDTHS):
                for choice in ("random", SMOOTH):
                    yield Point(choice, size.n_calib, size.n_pool, draw, size.iterations, method, bits)


def _n_calib(size: Size, _profile: str) -> Iterator[Point]:
    for draw in range(size.n_draws_n):
        for n in size.ns:
            yield Point("random_unbalanced", n, max(size.ns), draw, size.iterations)
            if n in size.ns_replaced:
                yield Point("random_repeated", n, max(size.ns), draw, size.iterations)
                yield Point("random_unbalanced", n, max(size.ns), draw, size.iterations,
                            batch_sampling="with_replacement")  # fmt: skip


def _reseed(size: Size, _profile: str) -> Iterator[Point]:
    for seed in range(size.n_reseeds):
        yield Point("random", size.n_calib, size.n_pool, 0, size.iterations, run_seed=1000 + seed)


def _ranges(size: Size, profile: str) -> Iterator[Point]:
    for method, bits, n_draws in size.ranges:
        for draw in range(n_draws):
            for choice in ("random", SMOOTH):
                yield Point(choice, *RANGE_SETS[profile], draw, 0, method, bits)


_PARTS: dict[str, Callable[[Size, str], Iterator[Point]]] = {
    "budget": _budget, "strategies": _strategies, "bits": _bits, "n_calib": _n_calib, "reseed": _reseed,
    "ranges": _ranges,
}  # fmt: skip
PARTS = tuple(_PARTS)


def size_of(dataset: str, profile: str) -> Size:
    """The size of a profile; the embedded digits have CIFAR-10's."""
    return SIZES["imagenet" if dataset == "imagenet" else "cifar10"][paths.check_profile(profile)]


def points(dataset: str, profile: str, parts: Sequence[str]) -> list[Point]:
    """The points of some parts, each once, in the order in which they are run: by draw, so that a cut run is whole."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    found = dict.fromkeys(p for part in parts for p in _PARTS[part](size_of(dataset, profile), profile))
    return sorted(found, key=lambda point: point.draw)
