"""ImageNet-style folders: one sub-folder per class; class index = place among the sorted names of all splits.

A root with ``train/`` and ``val/`` uses them for the splits train and test. A root of class folders alone (a sample)
is cut by alternating files within the sorted list: even positions are "train", odd ones "test". Hidden entries
(names that begin with a dot) are passed over.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

EXTENSIONS = {".jpg", ".jpeg", ".png"}


def list_folder(root: Path | str, split: str) -> tuple[list[Path], list[int], int]:
    """(files, labels, n_classes) of a split; errors name the folder and what was expected in it."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist: give the folder that holds the class folders")
    named = {"train": "train", "trainval": "train", "test": "val"}.get(split)
    if named is None:
        raise ValueError("an image folder has no split 'val': choose 'train' or 'test'")
    base = root / named if (root / named).is_dir() else root
    splits = [folder for name in ("train", "val") if (folder := root / name).is_dir()] if base != root else [root]
    classes = sorted({c.name for folder in splits for c in _visible(folder) if c.is_dir()})
    files = [
        (f, i)
        for i, name in enumerate(classes)
        if (base / name).is_dir()
        for f in _visible(base / name)
        if f.suffix.lower() in EXTENSIONS
    ]
    if not files:
        raise FileNotFoundError(f"{base} has no images in class folders (*.jpg, *.jpeg, *.png)")
    if base == root and split != "trainval":
        files = files[0::2] if split == "train" else files[1::2]
    return [f for f, _ in files], [i for _, i in files], len(classes)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def read_image(path: Path, *, size: int, short_side: int) -> np.ndarray:
    """(size, size, 3) uint8: bilinear resize of the short side, then the centre crop; a bad file is named."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    factor = short_side / min(rgb.size)
    width, height = (max(short_side, round(v * factor)) for v in rgb.size)
    rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def load_folder(
    root: Path | str, split: str, *, size: int = 224, n: int | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images (N, 3, size, size) uint8, labels (N,), positions in the file list (N,), number of classes.

    ``n`` keeps n files spread evenly over the sorted list. Decoding runs in threads with a progress bar.
    """
    root = Path(root)
    files, labels, n_classes = list_folder(root, split)
    if n is not None and n > len(files):
        raise ValueError(f"{root} has {len(files)} images in split {split!r}; {n} were asked for")
    chosen = np.arange(len(files)) if n is None else np.linspace(0, len(files) - 1, n).round().astype(int)

    def read(i: int) -> np.ndarray:
        return read_image(files[i], size=size, short_side=round(size * 256 / 224))

    with ThreadPoolExecutor() as pool:
        pixels = list(tqdm(pool.map(read, chosen), total=len(chosen), desc=f"reading {root.name}", mininterval=5))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images, torch.tensor(labels)[chosen], torch.from_numpy(chosen), n_classes
