"""Folders of pictures, read when they are asked for: class index = place among the sorted class folders of all splits.

    train/ val/     splits train and test; ``sel/`` (calibration images, as the group keeps them) stands in for train
    class folders   alone (a sample): even positions of the sorted list are "train", odd ones "test"

Pictures that lie in ``train/`` or ``sel/`` without class folders have no class (label -1): they calibrate. A class's
pictures may lie in folders of its own, as torchvision's ``ImageFolder`` reads them. Hidden entries (names that begin
with a dot) are passed over, and files with other endings than ``EXTENSIONS``.
"""

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of pictures, those of ``ImageFolder``."""
UNLABELLED = -1
TURN = Image.Transpose
UPRIGHT = {
    2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE, 8: TURN.ROTATE_90,
}  # fmt: skip
"""EXIF's orientation of a stored picture -> what turns it upright."""
EIGHT_BITS = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "La", "RGBa")
"""Modes of pictures; Pillow cuts those of 16 or 32 bits off at 255."""
LONGEST = 100
"""Long side over short side of a picture, at most: the short one is enlarged, and a line would fill the memory."""
_FOLDERS = {"train": ("train", "sel"), "trainval": ("train", "sel"), "test": ("val",)}
"""Split -> the folders that may hold it, the first that is there"""


class Pictures:
    """The images of files, as a uint8 tensor (N, 3, size, size) that is decoded anew wherever it is indexed.

    ``pictures[i]``, ``pictures[positions]``, ``pictures[mask]``, ``pictures[:, 0]`` are tensors, decoded in threads;
    ``subset`` is files.
    """

    dtype, ndim, device = torch.uint8, 4, torch.device("cpu")

    def __init__(self, root: Path, files: Sequence[Path], *, size: int, short_side: int) -> None:
        """``files`` lie below ``root``; their shorter side becomes ``short_side`` pixels before the centre crop."""
        self.root, self.files, self.size, self.short_side = root, list(files), size, short_side

    @property
    def names(self) -> list[str]:
        """The files below the folder, with forward slashes."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> torch.Size:
        """(N, 3, size, size)."""
        return torch.Size((len(self), 3, self.size, self.size))

    def subset(self, positions: Tensor) -> "Pictures":
        """The pictures at these positions, unread."""
        return Pictures(self.root, [self.files[i] for i in positions], size=self.size, short_side=self.short_side)

    def split(self, n: int) -> Iterator[Tensor]:
        """``n`` images after the other."""
        return (self[start : start + n] for start in range(0, len(self), n))

    def __getitem__(self, at: Any) -> Tensor:
        first, *rest = at if isinstance(at, tuple) else (at,)
        if first is Ellipsis:
            return self[:][at]
        chosen = torch.arange(len(self))[first] if isinstance(first, slice) else positions(first, len(self))
        if chosen.ndim == 0:
            return self._read(self.files[chosen])[*rest]
        with ThreadPoolExecutor() as pool:
            read = [*pool.map(self._read, [self.files[i] for i in chosen])]
        return (torch.stack(read) if read else torch.empty(0, *self.shape[1:], dtype=self.dtype))[:, *rest]

    def _read(self, file: Path) -> Tensor:
        return torch.from_numpy(read_image(file, size=self.size, short_side=self.short_side)).permute(2, 0, 1)


def positions(chosen: Any, n: int) -> Tensor:
    """(k,) or () int64: whole numbers as they are, a mask of ``n`` as where it is True; ``IndexError`` for the rest."""
    try:
        found = torch.as_tensor(chosen)
    except (TypeError, ValueError, RuntimeError):
        raise IndexError(f"images go by whole numbers, or a mask of {n}, not by {chosen!r:.60}") from None
    if found.dtype == torch.bool and found.shape == (n,):
        return found.nonzero().flatten()
    if found.numel() and (found.dtype == torch.bool or found.is_floating_point() or found.ndim > 1):
        kind = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
        raise IndexError(f"images go by whole numbers, or a mask of {n}, not by {kind}")
    return found.long()


def list_folder(
    root: Path | str, split: str, known: tuple[str, ...] = ()
) -> tuple[list[Path], list[int], tuple[str, ...], list[Path]]:
    """(files, labels, names of the classes, files passed over) of a split; errors name the folder and what it lacks.

    Passed over is what lies in class folders and is no picture, and pictures beside them.
    ``known``: the classes that a network was trained on, in the order of its outputs; () = those of the folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist: give the folder that holds the class folders")
    if split not in _FOLDERS:
        raise ValueError("an image folder has no split 'val': choose 'train' or 'test'")
    splits = [folder for name in ("train", "sel", "val") if (folder := root / name).is_dir()] or [root]
    base = next((root / name for name in _FOLDERS[split] if root / name in splits), root)
    if base not in splits:
        raise FileNotFoundError(f"{root} has no {' or '.join(_FOLDERS[split])}/ for split {split!r}")
    names = {c.name for folder in splits for c in _visible(folder) if c.is_dir()}
    classes = known or tuple(sorted(names))
    if strange := sorted(names - {*classes}):
        raise ValueError(f"{root} has a class {strange[0]!r}, the network was trained on {', '.join(classes[:8])} "
                         f"({len(classes)} in all): take its folder out")  # fmt: skip
    found = [(f, i) for i, name in enumerate(classes) if (base / name).is_dir() for f in _files(base / name)]
    loose = [(f, UNLABELLED) for f in _visible(base) if _is_picture(f)]
    labelled, passed = [(f, i) for f, i in found if _is_picture(f)], [f for f, _ in found if not _is_picture(f)]
    if labelled or split == "test":
        passed += [f for f, _ in loose]
    else:
        labelled = loose
    if not labelled:
        raise FileNotFoundError(f"{base} has no images in class folders (*{', *'.join(EXTENSIONS)})")
    if base == root and split != "trainval":
        labelled = labelled[0::2] if split == "train" else labelled[1::2]
    return [f for f, _ in labelled], [i for _, i in labelled], classes, passed


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS


def _files(folder: Path) -> list[Path]:
    """The files of a folder, then those of the folders in it; a link back to a folder around it is none."""
    entries = _visible(folder)
    inner = [entry for entry in entries if not _is_picture(entry) and entry.is_dir()]
    inner = [entry for entry in inner if not folder.resolve().is_relative_to(entry.resolve())]
    return [entry for entry in entries if entry not in inner] + [f for each in inner for f in _files(each)]


def _orientation(image: Image.Image) -> Any:
    """EXIF's tag; None where it has none, or no EXIF that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return None


def read_image(path: Path, *, size: int, short_side: int) -> np.ndarray:
    """(size, size, 3) uint8: upright as its EXIF says, bilinear resize of the short side, then the centre crop.

    A bad file is named.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) > LONGEST * min(image.size):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are a line, not a picture")
            if image.mode not in EIGHT_BITS:
                raise ValueError(f"its pixels are of mode {image.mode}: convert it to 8 bits a channel")
            rgb, turn = image.convert("RGB"), UPRIGHT.get(_orientation(image))
            rgb = rgb if turn is None else rgb.transpose(turn)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    factor = short_side / min(rgb.size)
    width, height = (max(short_side, round(v * factor)) for v in rgb.size)
    rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(rgb.crop((left, top, left + size, top + size)))
