"""A calibration set as a file: which images, their hashes, and how they were chosen, so that it can be had again.

The JSON names a data set and split with indices (positions in the raw file), or files under a folder; one SHA-256 per
image; metric, strategy and seed. Reading checks form, taking checks every hash: a short, repeated or altered
calibration set is an error, never a silent 500 images of 1,024.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.data import ImageSet
from hq_lib.data.folder import Pictures
from hq_lib.results import atomic

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
        return parse(Path(path).read_bytes())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path} is no calibration set as hq select writes it ({error}): make it again") from error


def parse(raw: bytes | str) -> Manifest:
    """The manifest in JSON text; what is none raises any of the errors that ``read`` turns into one."""
    record = json.loads(raw)
    n = record.pop("n")
    lists = {key: tuple(record.get(key, ())) for key in ("hashes", "indices", "files")}
    manifest = Manifest(**{**record, **lists})
    if n != len(manifest):
        raise ManifestError(f"the manifest promises n={n!r} images and lists {len(manifest)}")
    return manifest


def take(manifest: Manifest, images: ImageSet) -> ImageSet:
    """The manifest's images out of a set, in its order, every hash verified.

    Raises:
        ManifestError: another data set or split, an image the set does not have, a link out of its folder, or one that
                       differs.
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
    if isinstance(chosen.images, Pictures):
        root = chosen.images.root.resolve()
        if out := [file for file in chosen.images.files if not file.resolve().is_relative_to(root)]:
            raise ManifestError(f"image {out[0].name!r} leads out of {root}: put the picture itself there")
    for name, found, want in zip(wanted, _hashes(chosen), manifest.hashes, strict=True):
        if found != want:
            raise ManifestError(f"image {name!r} differs from the one that was selected: its SHA-256 does not match")
    return chosen
