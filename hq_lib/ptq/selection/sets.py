"""Calibration sets: which images to take, given a score per image, and a set as a file, so that it can be had again.

Choices are deterministic in (scores, labels, seed); ties go to the lower position; no image is taken twice.

The JSON of a set names a data set and split with indices (positions in the raw file), or files under a folder; one
SHA-256 per image; metric, strategy and seed. Reading checks form, taking checks every hash: a short, repeated or
altered calibration set is an error, never a silent 500 images of 1,024.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hq_lib.data import ImageSet
from hq_lib.data.folder import Pictures
from hq_lib.results import atomic
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


VERSION = 1


class ManifestError(ValueError):
    """A manifest that is malformed, or that the images at hand do not match."""


@dataclass(frozen=True)
class Manifest:
    """One calibration set; ``ManifestError`` on construction where its parts contradict each other."""

    dataset: str
    """Name as in ``hq_lib.data.load``, or of the image folder."""
    split: str
    """train, val, trainval or test; calibration takes training images."""
    hashes: tuple[str, ...]
    """SHA-256 per image: of the uint8 pixels in (C, H, W) order with their shape, or of the file."""
    indices: tuple[int, ...] = ()
    """Positions in the raw file of the data set; empty where ``files`` names the images."""
    files: tuple[str, ...] = ()
    """Paths below the image folder, with forward slashes; empty where ``indices`` does."""
    metric: str = ""
    """Name of the score, empty for a random draw."""
    strategy: str = "random"
    """lowest, highest, trimmed, random, or the name of a feature method."""
    seed: int = 0
    """Seed of the draw and of the pool."""
    balanced: bool = False
    """Whether classes were balanced."""
    version: int = VERSION
    """Of this format."""

    def __post_init__(self) -> None:
        """One hash an image, images named in exactly one way, none twice."""
        named: tuple[object, ...] = self.indices or self.files
        if self.version != VERSION:
            raise ManifestError(f"version {self.version!r}: this code reads version {VERSION}")
        if bool(self.indices) == bool(self.files):
            raise ManifestError("images are named by 'indices' or by 'files': give exactly one, not empty")
        if len(named) != len(self.hashes):
            raise ManifestError(f"{len(named)} images and {len(self.hashes)} hashes: the set is short or damaged")
        if bad := [i for i in self.indices if type(i) is not int or i < 0]:
            raise ManifestError(f"index {bad[0]!r} is not a position: need integers from 0")
        if len(set(named)) != len(named):
            raise ManifestError("an image is named twice: a repeated image is no larger calibration set")

    def __len__(self) -> int:
        return len(self.hashes)

    def to_json(self) -> str:
        """The manifest as JSON text, stable key order, one trailing newline."""
        return json.dumps({"n": len(self), **asdict(self)}, indent=1) + "\n"


def pixel_hash(image: Tensor) -> str:
    """SHA-256 of one uint8 image (C, H, W): its shape, then its bytes, whatever its memory layout."""
    if image.dtype != torch.uint8:
        raise ManifestError(f"hashes are taken of uint8 pixels, got {image.dtype}: hash before normalisation")
    digest = hashlib.sha256(repr(tuple(image.shape)).encode())
    digest.update(np.ascontiguousarray(image.cpu().numpy()).tobytes())
    return digest.hexdigest()


def _hashes(images: ImageSet) -> list[str]:
    if isinstance(images.images, Pictures):
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in images.images.files]
    return [pixel_hash(image) for image in images.images]


def _named(images: ImageSet) -> dict[str, tuple[Any, ...]]:
    """What a manifest calls these images: files below their folder, or positions in the raw file."""
    if isinstance(images.images, Pictures):
        return {"files": tuple(images.images.names)}
    return {"indices": tuple(images.indices.tolist())}


def from_images(images: ImageSet, positions: Tensor | Sequence[int], **how: Any) -> Manifest:
    """The manifest of the images at ``positions`` of a set; ``how``: metric, strategy, seed, balanced.

    Of a folder of pictures it names files below it and holds their hashes, and bears the folder's name.
    """
    chosen = images.subset(torch.as_tensor(positions, dtype=torch.int64))
    name = images.images.root.name if isinstance(images.images, Pictures) else images.spec.name
    return Manifest(name, images.split, tuple(_hashes(chosen)), **_named(chosen), **how)


def write(manifest: Manifest, path: Path | str) -> None:
    """Write the JSON to ``path``, whole or not at all."""
    atomic.write_text(Path(path), manifest.to_json())


def read(path: Path | str) -> Manifest:
    """The manifest in a file; ``ManifestError`` names the file and what is wrong in it."""
    try:
        record = json.loads(Path(path).read_bytes())
        n = record.pop("n")
        lists = {key: tuple(record.get(key, ())) for key in ("hashes", "indices", "files")}
        manifest = Manifest(**{**record, **lists})
        if n != len(manifest):
            raise ManifestError(f"the manifest promises n={n!r} images and lists {len(manifest)}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path} is no calibration set as hq select writes it ({error}): make it again") from error
    return manifest


def take(manifest: Manifest, images: ImageSet) -> ImageSet:
    """The manifest's images out of a set, every hash verified; in its order, mixed by its seed if class by class.

    Raises:
        ManifestError: another data set or split, an image the set does not have (so no path leads out of a folder, but
                       links that lie in it), or one that differs.
    """
    ((key, names),) = _named(images).items()
    wanted = getattr(manifest, key)
    if not wanted or (key == "indices" and (manifest.dataset, manifest.split) != (images.spec.name, images.split)):
        have = f"{images.spec.name}/{images.split}, named by {key}"
        raise ManifestError(f"the manifest is for {manifest.dataset}/{manifest.split}, the images are {have}")
    position = {name: i for i, name in enumerate(names)}
    if absent := [name for name in wanted if name not in position]:
        raise ManifestError(f"image {absent[0]!r} (and {len(absent) - 1} more) is not in {images.spec.name}/"
                            f"{images.split}: the calibration set would be short")  # fmt: skip
    chosen = images.subset([position[name] for name in wanted])
    for name, found, want in zip(wanted, _hashes(chosen), manifest.hashes, strict=True):
        if found != want:
            raise ManifestError(f"image {name!r} differs from the one that was selected: its SHA-256 does not match")
    return chosen.mixed(manifest.seed)
