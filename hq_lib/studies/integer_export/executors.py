"""The five executors of one network, each opened from its own file, with what they cost: time, file size, memory.

    float       models.load_checkpoint, PyTorch
    fake_quant  the quantized graph, PyTorch
    numpy       integer.load (.npz), NumPy alone
    c           c.Runtime (.hqm), compiled by the system's compiler
    onnx        onnx.session (.onnx), onnxruntime

Nothing heavy is imported before an executor is opened, so that a process which runs one holds only what that one needs.
``python -m hq_lib.studies.integer_export.executors EXECUTOR FILE IMAGE.npy`` prints the memory that one image takes.
"""

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from hq_lib.results import provenance

EXECUTORS = ("float", "fake_quant", "numpy", "c", "onnx")
ENDINGS = {"float": "safetensors", "fake_quant": "safetensors", "numpy": "npz", "c": "hqm", "onnx": "onnx"}
VERSIONS = {"numpy": 2, "c": 3, "onnx": 3}
NARROW_VERSIONS = {"numpy": 3, "c": 3, "onnx": 4}
"""Executor -> switch "version" of its rows, raised when its time or file changes; the second: weights of up to 4 bits.

Rows without it are of the first; the newest are those of smaller ``.npz`` and ONNX files, and of C in tiles of 2x2
outputs, in 16-bit sums and with moves in runs."""
BATCH = 100  # images at once; C takes one at a time
LIBRARIES = {
    "float": ("torch", "hq_lib.models"), "fake_quant": ("torch", "hq_lib.models", "hq_lib.graph", "hq_lib.ptq"),
    "numpy": ("hq_lib.integer",), "c": ("hq_lib.deploy.c",), "onnx": ("hq_lib.deploy.onnx",),
}  # fmt: skip
Run = Callable[[np.ndarray], np.ndarray]


class UnavailableError(RuntimeError):
    """An executor that this machine does not have; the message says what is missing, in a few words."""


def opened(executor: str, file: Path) -> Run:
    """The network in ``file`` as a function: normalised images (N, C, H, W) float32 -> logits (N, n_classes) float32.

    Raises:
        UnavailableError: no C compiler, or no onnxruntime.
    """
    if executor in ("float", "fake_quant"):
        return _opened_torch(executor, file)
    try:
        room = importlib.import_module(LIBRARIES[executor][0])
    except ImportError as error:
        raise UnavailableError("no onnxruntime") from error
    if executor == "c":
        try:
            return room.Runtime(file).run
        except room.CompilerError as error:
            raise UnavailableError("no C compiler") from error
    network = room.load(file) if executor == "numpy" else room.session(file)
    return lambda x: room.run(network, x, batch_size=BATCH)


def version(executor: str, w_bits: float) -> int | None:
    """The switch "version" of today's rows of an executor; None = they have none."""
    return (NARROW_VERSIONS if w_bits <= 4 else VERSIONS).get(executor)


def how(executor: str, file: Path) -> list[str]:
    """What an executor's time depends on besides the processor: C's kernels, ONNX Runtime's session option."""
    if executor == "c":
        from hq_lib.deploy.c import Runtime

        return [f"{Runtime(file).kernel} kernels"]
    if executor == "onnx":
        from hq_lib.deploy.onnx.model import VNNI

        return [] if provenance.cpu_flags() & VNNI else ["x64quantprecision"]
    return []


def _opened_torch(executor: str, file: Path) -> Run:
    import torch

    from hq_lib import graph, models

    net = models.load_checkpoint(file)[0] if executor == "float" else graph.load(file)

    @torch.inference_mode()
    def run(x: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(x).contiguous(memory_format=torch.channels_last).split(BATCH)
        return torch.cat([net(part) for part in parts]).numpy()

    return run


def measure(run: Run, images: Iterable[np.ndarray]) -> tuple[np.ndarray, float]:
    """(logits (N, n_classes), CPU time per image in ms, summed over threads) of images that come in parts.

    One batch is run beforehand, untimed.
    """
    logits, seconds, n = [], 0.0, 0
    for part in images:
        if not logits:
            run(part[:BATCH])
        start = time.process_time()
        logits.append(run(part))
        seconds, n = seconds + time.process_time() - start, n + len(part)
    return np.concatenate(logits), 1e3 * seconds / n


def peak_MiB(executor: str, file: Path, image: np.ndarray) -> float | None:
    """Memory that opening ``file`` and running one image (1, C, H, W) takes, MiB; None where the system does not tell.

    The growth of a fresh process's resident memory to its peak, libraries being loaded beforehand.
    """
    place = file.with_suffix(".image.npy")
    np.save(place, image)
    command = [sys.executable, "-m", __name__, executor, str(file), str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    finally:
        place.unlink()
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else found / 1024


def _growth_KiB(executor: str, file: Path, image: np.ndarray) -> int | None:
    for library in LIBRARIES[executor]:
        importlib.import_module(library)
    if executor in ("float", "fake_quant"):
        import torch

        torch.nn.functional.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3))  # the library's own set-up
    before = _resident_KiB("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    except OSError:
        return None
    if before is None:
        return None
    opened(executor, file)(image)
    return (_resident_KiB("VmHWM") or before) - before


def _resident_KiB(key: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(found.group(1)) if found else None


if __name__ == "__main__":
    print(json.dumps(_growth_KiB(sys.argv[1], Path(sys.argv[2]), np.load(sys.argv[3]))))
