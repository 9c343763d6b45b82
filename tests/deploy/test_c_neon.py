"""The C runtime on 64-bit ARM, cross-compiled and emulated: NumPy's bits from the scalar and the NEON kernels.

A machine with such a processor runs NEON in ``test_c.py`` itself, for every policy and requantizer.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from integer_nets import NETS, all_pairs, images, quantized, random_layer

from hq_lib.deploy.c import program, to_bytes
from hq_lib.integer import lower, run
from hq_lib.integer.record import IntegerModel

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
if not COMPILER or not EMULATOR:
    pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (qemu-user)", allow_module_level=True)


@pytest.fixture(scope="module")
def hqm(tmp_path_factory) -> tuple[str, str]:
    """Emulator and command-line program for ARM, linked statically, with the flags of every other build."""
    empty = tmp_path_factory.mktemp("empty") / "empty.c"
    empty.write_text("#include <stdio.h>\nint main(void) { return 0; }\n")
    words = [COMPILER, "-static", empty, "-o", empty.with_suffix("")]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip(f"{COMPILER} has no static C library (Debian: libc6-dev-arm64-cross)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-static")
        return EMULATOR, str(program(cc=COMPILER))


def call(hqm: tuple[str, str], folder: Path, *words: str) -> dict[str, str]:
    """What the program says of the container and images in ``folder``; logits lie there afterwards."""
    files = ["net.hqm", "--raw-f32", "x.f32", "--logits", "logits.f32"]
    done = subprocess.run([*hqm, *files, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def n_wrong(hqm: tuple[str, str], folder: Path, imodel: IntegerModel, x: np.ndarray, kernel: str) -> int:
    """Logits of ``kernel`` that differ from NumPy's."""
    (folder / "net.hqm").write_bytes(to_bytes(imodel))
    (folder / "x.f32").write_bytes(x.tobytes())
    assert call(hqm, folder, "--kernel", kernel)["kernel"] == kernel
    want = run(imodel, x)
    found = np.fromfile(folder / "logits.f32", np.float32)
    return int((found.view(np.int32) != want.ravel().view(np.int32)).sum())


@pytest.mark.parametrize("policy", ["w8a8", "w4a4"])
@pytest.mark.parametrize("net", NETS)
def test_networks(net, policy, hqm, tmp_path):
    qnet, x = quantized(net, policy), images(12, seed=5).numpy()
    for requantizer in ("float32", "fixed"):
        imodel = lower(qnet, requantizer=requantizer)
        for kernel in ("scalar", "neon"):
            assert n_wrong(hqm, tmp_path, imodel, x, kernel) == 0, (requantizer, kernel)


@pytest.mark.parametrize("residual", [None, "uint8"])
@pytest.mark.parametrize("conv", [True, False])
def test_layers_of_awkward_sizes(conv, residual, hqm, tmp_path):
    for seed in range(16):
        imodel, x = random_layer(
            seed, conv=conv, x_dtype="uint8", w_dtype="int8", residual=residual, requantizer="float32"
        )
        assert n_wrong(hqm, tmp_path, imodel, x, "neon") == 0, seed


@pytest.mark.parametrize("add", [True, False])
def test_ties_are_rounded_alike(add, hqm, tmp_path):
    for seed in range(8 if add else 2):
        imodel, x = all_pairs(seed, requantizer="float32", add=add)
        assert n_wrong(hqm, tmp_path, imodel, x, "neon") == 0, seed


def test_neon_is_what_arm_gets_unasked_and_x86_kernels_are_not_there(hqm, tmp_path):
    (tmp_path / "net.hqm").write_bytes(to_bytes(lower(quantized("residual", "w8a8"))))
    (tmp_path / "x.f32").write_bytes(images(1).numpy().tobytes())
    assert call(hqm, tmp_path)["kernel"] == "neon"
    done = subprocess.run([*hqm, "net.hqm", "--raw-f32", "x.f32", "--kernel", "avx2"], cwd=tmp_path, check=False)
    assert done.returncode == 2
