"""Which data sets there are, and how they split into train, val and test.

The validation split is cut from *train*: the same number of images of every class, by a fixed permutation. Only final
evaluations load ``test``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.data import fetch, folder, sources
from hq_lib.data.folder import Pictures
from hq_lib.results.hints import check_known

LARGEST = 2**20  # classes, channels or pixels along an axis that a file may ask for
SPLITS = ("train", "val", "trainval", "test")
SPLIT_SEED = 20260101  # fixes the validation split for good; changing it invalidates every result


@dataclass(frozen=True)
class DataSpec:
    """What a network needs to know of a data set."""

    name: str
    """Identifier, as in ``load(name, split)`` and in the column ``dataset`` of every result."""
    n_classes: int
    """Number of labels; labels are 0 .. n_classes - 1."""
    in_shape: tuple[int, int, int]
    """(channels, height, width) of an image, pixels."""
    mean: tuple[float, ...]
    """Per-channel mean of the training images, in units of full scale (255 = 1)."""
    std: tuple[float, ...]
    """Per-channel standard deviation of the training images, same units."""
    n_val: int = 0
    """Images cut from train for validation; a multiple of n_classes."""
    flip: bool = False
    """Whether a mirrored image is still the same class (digits are not); training flips only where it is."""
    note: str = ""
    """What a caption must say of this data set."""
    short_side: int = 0
    """Pixels that the shorter side of a picture is resized to before the centre crop; 0 = 256/224 of the height."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a folder of pictures, in the order of their labels."""

    def __post_init__(self) -> None:
        sizes = (*_numbers(self.in_shape, 3), *_numbers((self.n_classes, self.short_side + 1), 2))
        if not all(isinstance(n, int) and 0 < n <= LARGEST for n in sizes):
            raise ValueError(f"{self.name}: n_classes, in_shape or short_side is no whole number up to {LARGEST:,}")
        mean, std = (_numbers(values, 1, self.in_shape[0]) for values in (self.mean, self.std))
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(f"{self.name}: mean {mean} and std {std}: finite, std > 0, in units of full scale")


def _numbers(values: object, *counts: int) -> tuple[int | float, ...]:
    if not isinstance(values, tuple) or len(values) not in counts or not all(type(v) in (int, float) for v in values):
        raise ValueError(
            f"an image's size, mean or std is {values!r:.60}: {' or '.join(map(str, counts))} numbers belong there"
        )
    return values


@dataclass(frozen=True)
class ImageSet:
    """Images and labels; ValueError for images that are no bytes, or not as many as labels and indices."""

    images: Tensor
    """(N, C, H, W) uint8; channels-last in memory. Of a folder ``Pictures``, which are read when they are indexed:
    ``images[:]`` is a tensor either way."""
    labels: Tensor
    """(N,) int64."""
    spec: DataSpec
    """The data set they come from."""
    split: str = ""
    """train, val, trainval or test, with what was cut from it."""
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(N,) int64: position of every image in the raw training (or test) file; left out: 0 ... N - 1."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images are {self.images.dtype} {tuple(self.images.shape)}: uint8 (N, C, H, W), 0 to 255, is needed, "
                "(x * 255).round().to(torch.uint8) where x lies in [0, 1]"
            )
        if not len(self.indices):
            object.__setattr__(self, "indices", torch.arange(len(self.labels)))
        sizes = {"images": len(self.images), "labels": len(self.labels), "indices": len(self.indices)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"as many images as labels and indices are needed, not {sizes}")

    def __len__(self) -> int:
        return len(self.labels)

    def normalized_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "ImageSet":
        """The same images for a network that was trained with another mean and standard deviation (full scale = 1)."""
        return replace(self, spec=replace(self.spec, mean=mean, std=std))

    def subset(self, chosen: Tensor | Sequence[int]) -> "ImageSet":
        """The images at these positions, in that order, or where a mask of N is True; ``IndexError`` for others."""
        chosen = folder.positions(chosen, len(self)).flatten()
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"{self.spec.name} {self.split} has {len(self)} images; asked for {int(chosen.max())}")
        images = self.images.subset(chosen) if isinstance(self.images, Pictures) else self.images[chosen]
        return replace(self, images=images, labels=self.labels[chosen], indices=self.indices[chosen])

    def balanced(self, n: int, seed: int) -> "ImageSet":
        """A seeded subset of n images, as equal per class as n allows (a remainder goes to the first classes).

        Raises ``ValueError`` where a class has too few images: a short set is never returned silently.
        """
        mixed = self.mixed(seed)
        return mixed.subset(balanced_positions(mixed.labels, n, self.spec.n_classes, seed))

    def mixed(self, seed: int) -> "ImageSet":
        """The same images; in a seeded random order where they lie class by class (or have none), as in a folder.

        The first images of a set then stand for all of it, as its ranges are taken of them.
        """
        steps = self.labels.diff()
        if bool((steps < 0).any()) and bool((steps > 0).any()):
            return self
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)))

    def balances(self, n: int) -> bool:
        """Whether n images can be as many of each class: no fewer than classes, and each class has its share."""
        counts = torch.bincount(self.labels.clamp(min=0), minlength=self.spec.n_classes)
        share = -(-n // self.spec.n_classes)
        return share <= int(counts.min()) and n >= self.spec.n_classes and folder.UNLABELLED not in self.labels

    def drawn(self, n: int, seed: int) -> "ImageSet":
        """A seeded subset of n images: all there are (n or fewer), else balanced where each class can have one.

        Fewer images than classes, classes with less than their share, or pictures without a class: drawn from all.
        Never class by class (``mixed``).
        """
        if n >= len(self):
            return self.mixed(seed)
        if self.balances(n):
            return self.balanced(n, seed)
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n])


def balanced_positions(labels: Tensor, n: int, n_classes: int, seed: int) -> Tensor:
    """(n,) int64 positions, sorted, with n // n_classes of each class (one more for the first n % n_classes)."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(n_classes):
        want = n // n_classes + (label < n % n_classes)
        pool = np.flatnonzero(labels.numpy() == label)
        if len(pool) < want:
            raise ValueError(f"class {label} has {len(pool)} images, {want} wanted: ask for fewer images")
        chosen.append(rng.permutation(pool)[:want])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


SPECS = {
    spec.name: spec
    for spec in (
        DataSpec("cifar10", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 5000, True),
        DataSpec("mnist", 10, (1, 28, 28), (0.1307,), (0.3081,), 5000),
        DataSpec("fashion_mnist", 10, (1, 28, 28), (0.2860,), (0.3530,), 5000, True),
        DataSpec(
            "digits", 10, (3, 32, 32), (0.3053,) * 3, (0.3760,) * 3, 150,
            note="the embedded 1,797 scanned digits (8x8 scaled to 32x32), not the data set of the paper",
        ),
        DataSpec("imagenet", 1000, (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), flip=True),
    )
}  # fmt: skip


def load(
    name: str, split: str, *, root: Path | str | None = None, n: int | None = None, spec: DataSpec | None = None
) -> ImageSet:
    """The images of one split.

    Args:
        name:  one of ``SPECS``.
        split: "train" (without the validation images), "val", "trainval" or "test".
        root:  for "imagenet": the folder of class folders (see ``hq_lib.data.folder``); else unused. Its pictures are
               read when they are asked for, never all at once.
        n:     keep n images: of a folder spread evenly over its list, else seeded and class-balanced; default all.
        spec:  for "imagenet": size, mean and standard deviation that a network takes, in place of the usual ones.

    Raises:
        ValueError: unknown data set or split.
        DataUnavailableError: no source could deliver it; lists what was tried.
    """
    check_known(split, SPLITS, "split")
    if n is not None and n < 1:
        raise ValueError(f"{n} images of {name} were asked for: 1 or more")
    if name == "imagenet":
        return _load_folder(spec or SPECS[name], split, root, n)
    check_known(name, SPECS, "data set")
    spec = SPECS[name]
    part = "test" if split == "test" else "train"
    arrays = sources.embedded_digits() if name == "digits" else fetch.obtain(sources.DATA_SETS[name])
    pixels, labels = (torch.from_numpy(arrays[f"{part}_{kind}"]) for kind in ("images", "labels"))
    whole = ImageSet(pixels.permute(0, 3, 1, 2), labels.long(), spec, split)  # files hold (N, H, W, C)
    if split in ("train", "val") and spec.n_val:
        held_out = balanced_positions(whole.labels, spec.n_val, spec.n_classes, SPLIT_SEED)
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[held_out] = False
        whole = whole.subset(held_out if split == "val" else keep.nonzero().flatten())
    return whole if n is None else whole.balanced(n, SPLIT_SEED)


def load_or_embedded(name: str, split: str, *, n: int | None = None) -> ImageSet:
    """``load``, or the embedded digits where no source can deliver the data set; says so on the way.

    The returned spec's name and note tell which it was: every caption and result row carries them. Of the digits there
    may be fewer than n.
    """
    try:
        return load(name, split, n=n)
    except fetch.DataUnavailableError as error:
        print(f"{error}\n-> going on with the embedded data set 'digits'; rows of it stand until they are deleted "
              f"(dataset = digits in data/results), even when {name} can be had", flush=True)  # fmt: skip
    embedded = load("digits", split)
    return embedded if n is None or n >= len(embedded) else embedded.balanced(n, SPLIT_SEED)


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")


def _load_folder(spec: DataSpec, split: str, root: Path | str | None, n: int | None) -> ImageSet:
    if root is None:
        raise ValueError("imagenet needs root=<folder of class folders> (hq: --root FOLDER): it is never downloaded")
    files, labels, classes, passed = folder.list_folder(root, split, spec.classes)
    held = {*labels}
    absent = [name for i, name in enumerate(classes) if not held & {i, folder.UNLABELLED}]
    said = [f"{len(passed):,} files are passed over ({_few([file.name for file in passed])})"] if passed else []
    said += [f"{len(absent):,} of {len(classes):,} classes have no picture ({_few(absent)})"] if absent else []
    if said:
        print(f"{root}, split {split!r}: {'; '.join(said)}", flush=True)
    if n is not None and n > len(files):
        raise ValueError(f"{root} has {len(files)} images in split {split!r}; {n} were asked for")
    size = spec.in_shape[1]
    images: Any = Pictures(Path(root), files, size=size, short_side=spec.short_side or round(size * 256 / 224))
    named = replace(spec, n_classes=len(classes) or spec.n_classes, classes=classes)
    whole = ImageSet(images, torch.tensor(labels), named, split)
    return whole if n is None else whole.subset(np.linspace(0, len(files) - 1, n).round().astype(int).tolist())
