"""A calibration set as a file: which images, their hashes, and how they were chosen, so that it can be had again.

The JSON names a data set and split with indices (positions in the raw file), or files under a folder; one SHA-256 per
image; metric, strategy and seed. Reading checks form, taking checks every hash: a short, repeated or altered
calibration set is an error, never a silent 500 images of 1,024.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.data import ImageSet
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
        """One hash an image, images named in exactly one way, none twice, no path that leaves the folder."""
        named: tuple[object, ...] = self.indices or self.files
        if self.version != VERSION:
            raise ManifestError(f"version {self.version!r}: this code reads version {VERSION}")
        if bool(self.indices) == bool(self.files):
            raise ManifestError("images are named by 'indices' or by 'files': give exactly one, not empty")
        if len(named) != len(self.hashes):
            raise ManifestError(f"{len(named)} images and {len(self.hashes)} hashes: the set is short or damaged")
        if bad := [i for i in self.indices if type(i) is not int or i < 0]:
            raise ManifestError(f"index {bad[0]!r} is not a position: need integers from 0")
        for name in self.files:
            _check_path(name)
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


def from_images(images: ImageSet, positions: Tensor | Sequence[int], **how: Any) -> Manifest:
    """The manifest of the images at ``positions`` of a set; ``how``: metric, strategy, seed, balanced."""
    chosen = images.subset(torch.as_tensor(positions, dtype=torch.int64))
    hashes = tuple(pixel_hash(image) for image in chosen.images)
    indices = tuple(int(i) for i in chosen.indices)
    return Manifest(images.spec.name, images.split, hashes, indices=indices, **how)


def from_files(root: Path, files: Sequence[str], *, dataset: str, split: str = "train", **how: Any) -> Manifest:
    """The manifest of image files below ``root``; ``files`` are relative, with forward slashes; ``how`` as there."""
    hashes = tuple(_file_hash(_inside(root, name)) for name in files)
    return Manifest(dataset, split, hashes, files=tuple(files), **how)


def write(manifest: Manifest, path: Path | str) -> None:
    """Write the JSON to ``path``, whole or not at all."""
    atomic.write_text(Path(path), manifest.to_json())


def read(path: Path | str) -> Manifest:
    """The manifest in a file; ``ManifestError`` names the file and what is wrong in it."""
    try:
        return parse(Path(path).read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from error


def parse(raw: bytes | str) -> Manifest:
    """The manifest in JSON text; anything that is not one raises ``ManifestError``."""
    try:
        record = json.loads(raw)
        n = record.pop("n")
        lists = {key: tuple(record.get(key, ())) for key in ("hashes", "indices", "files")}
        manifest = Manifest(**{**record, **lists})
    except ManifestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"this is no calibration set as hq select writes it ({error}): make it again") from error
    if n != len(manifest):
        raise ManifestError(f"the manifest promises n={n!r} images and lists {len(manifest)}")
    return manifest


def take(manifest: Manifest, images: ImageSet) -> ImageSet:
    """The manifest's images out of a loaded set, in its order, every pixel hash verified.

    Raises:
        ManifestError: another data set or split, an index the set does not have, or an image that differs.
    """
    if not manifest.indices:
        raise ManifestError("this manifest names files: use take_files")
    if (manifest.dataset, manifest.split) != (images.spec.name, images.split):
        have = f"{images.spec.name}/{images.split}"
        raise ManifestError(f"the manifest is for {manifest.dataset}/{manifest.split}, the images are {have}")
    position = {int(raw): i for i, raw in enumerate(images.indices)}
    if absent := [i for i in manifest.indices if i not in position]:
        raise ManifestError(
            f"index {absent[0]} (and {len(absent) - 1} more) is not in {images.spec.name}/{images.split}"
        )
    chosen = images.subset([position[i] for i in manifest.indices])
    for index, image, want in zip(manifest.indices, chosen.images, manifest.hashes, strict=True):
        if pixel_hash(image) != want:
            raise ManifestError(f"image {index} differs from the one that was selected: its SHA-256 does not match")
    return chosen


def take_files(manifest: Manifest, root: Path) -> list[Path]:
    """The manifest's files below ``root``, in its order, every file hash verified."""
    if not manifest.files:
        raise ManifestError("this manifest names indices: use take")
    paths = [_inside(root, name) for name in manifest.files]
    for path, want in zip(paths, manifest.hashes, strict=True):
        if _file_hash(path) != want:
            raise ManifestError(f"{path} differs from the file that was selected: its SHA-256 does not match")
    return paths


def _check_path(name: object) -> None:
    """A relative path of plain parts; anything that could leave the folder is refused."""
    plain = isinstance(name, str) and name != "" and name.isprintable() and not set(name) & {"\\", ":"}
    parts = PurePosixPath(name) if isinstance(name, str) else PurePosixPath(".")
    if not plain or str(parts) != name or parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ManifestError(f"path {name!r}: need a relative path inside the folder, with forward slashes, no '..'")


def _inside(root: Path, name: str) -> Path:
    """``root / name``, refused where it (or a link in it) leads out of ``root`` or is no file."""
    _check_path(name)
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except OSError as error:
        raise ManifestError(f"path {name!r:.80} is none ({error.strerror})") from error
    if not path.is_relative_to(root.resolve()):
        raise ManifestError(f"path {name!r} leads out of {root}")
    if not is_file:
        raise ManifestError(f"file {name!r} does not exist in {root}: the calibration set would be short")
    return path


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
