"""Everything that only a GPU can show, in one run of a few minutes: python benchmarks/gpu.py > gpu_report.txt

The tests marked `gpu`, room by room (integers equal to the CPU's at ties, nothing waited for in a step, resuming bit
for bit, either precision, reconstruction, exports, arrays, the verbs), then times: batches, a step in float, through
LSQ and compiled, an epoch of ``fit``, evaluation, ranges, a reconstruction, integers, arrays. Send the report back.

What has not begun after 7 minutes is left out, by name. `--device cpu` rehearses it where there is no GPU, in small
sizes and without compiling: the tests on a device that stands in for one.
"""

import argparse
import copy
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from hq_lib import integer, models
from hq_lib.crossbar import Circuit, EngineNetwork, SimEngine, device
from hq_lib.data import SPECS, ImageSet, batches
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.ptq import selection
from hq_lib.results import paths, provenance
from hq_lib.studies.ptq.recipes import RECIPES, fit_recipe
from hq_lib.training import TrainConfig, evaluate, fit, machine
from hq_lib.training.config import set_lr, sgd

CONFIG = TrainConfig(epochs=1, lr=0.01, batch_size=128)
TESTS_S, MOST_S = 300.0, 420.0


@dataclass(frozen=True)
class Sizes:
    """How much of everything; a rehearsal takes little."""

    device: torch.device
    ends: float
    n_images: int
    batch: int
    steps: int
    iterations: int

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def report(self, what: str, took: Callable[[], float], unit: str) -> None:
        """A line with the number that ``took`` gives."""
        print(f"{what}: {f'{took():.2f} {unit}' if time.perf_counter() < self.ends else 'left out'}", flush=True)

    def timed(self, what: str, work: Callable[[], object]) -> None:
        """A line with the seconds of ``work``."""
        self.report(what, lambda: self.seconds(work), "s")

    def seconds(self, work: Callable[[], object]) -> float:
        """What ``work`` takes, s."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def ms(self, step: Callable[[], object]) -> float:
        """Mean time of a call after a few to warm up, milliseconds."""
        for _ in range(max(2, self.steps // 5)):
            step()
        return 1000 * self.seconds(lambda: [step() for _ in range(self.steps)]) / self.steps


def train_step(sizes: Sizes, net: torch.nn.Module, precision: str, compile_it: bool) -> float:
    """Milliseconds of a training step on random images."""
    net = copy.deepcopy(net).to(sizes.device).train().to(memory_format=torch.channels_last)  # pyright: ignore
    x = torch.randn(sizes.batch, 3, 32, 32, device=sizes.device)
    y = torch.randint(10, (sizes.batch,), device=sizes.device)
    optimizer, forward = sgd(net, CONFIG), machine.compiled(net) if compile_it else net
    set_lr(optimizer, CONFIG.lr)

    def step() -> None:
        with machine.autocast(sizes.device, precision):
            loss = F.cross_entropy(forward(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return sizes.ms(step)


def measure(sizes: Sizes) -> None:
    """Prints the times, room by room."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (sizes.n_images, 3, 32, 32), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(sizes.n_images) % 10, SPECS["cifar10"], "train")
    there = replace(images, images=pixels.to(sizes.device), labels=images.labels.to(sizes.device))
    walk = partial(batches, there, 128, generator=torch.Generator().manual_seed(0), pad=4, flip=True)
    sizes.timed(f"data: {len(images)} images augmented", lambda: list(walk(device=sizes.device)))
    net, x = models.build("resnet20"), torch.randn(256, 3, 32, 32)
    qnet = quantize(net, BitPolicy("lsq:4", "lsq:4", placement="academic"), x[:1])
    calibrate(qnet, x)
    for name, one in (("float", net), ("lsq W4A4", qnet)):
        for precision in ("float32", "bfloat16"):
            for compile_it in (False, True) if sizes.device.type == "cuda" else (False,):
                how = f"{precision}, {'compiled' if compile_it else 'eager'}"
                what = f"training: ResNet-20 {name}, {how}, {sizes.batch} images a step"
                sizes.report(what, partial(train_step, sizes, one, precision, compile_it), "ms")
    qnet = qnet.to(sizes.device)
    sizes.timed(f"training: fit, {len(images)} images", lambda: fit(qnet, images, None, CONFIG, say=None))
    sizes.timed(f"training: evaluate, {len(images)} images", lambda: evaluate(qnet, images))
    x = x.to(sizes.device)
    for name in ("mse", "aciq_corrected", "qdrop"):
        fixed = quantize(net, BitPolicy("minmax:4", "lsq_plus:4", placement="academic", bn="fold"), x[:1])
        fixed = fixed.to(sizes.device)
        size = {"iterations": sizes.iterations, "n_images": len(x)} if RECIPES[name].passes is not None else {}
        fitting = partial(fit_recipe, fixed, x, RECIPES[name], seed=0, **size)
        sizes.timed(f"ptq: {name}, {len(x)} images, {sizes.iterations} iterations a block", fitting)
    sizes.timed(
        f"ptq: all {len(selection.METRICS)} scores of {len(images)} images",
        lambda: [selection.score(there.images, metric) for metric in selection.METRICS],
    )
    w8a8 = quantize(net, BitPolicy("minmax:8", "minmax:8", bn="fold"), x[:1]).to(sizes.device)
    calibrate(w8a8, x)
    record = integer.lower(w8a8)
    few = x[:8].cpu().contiguous().numpy()
    logits = torch.from_numpy(integer.run(record, few))
    same = (logits.argmax(1) == w8a8.eval()(x[:8]).argmax(1).cpu()).sum()
    print(f"integer: {int(same)} of 8 classes are the fake-quantized network's", flush=True)
    on_arrays = EngineNetwork(record, SimEngine(Circuit(device("rram"))))
    sizes.timed("crossbar: 8 images on simulated RRAM (CPU)", lambda: on_arrays.run(few))


def main() -> None:
    """Prints the report; exit code 1 where a test failed or there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    rehearsed = parser.parse_args().device == "cpu"
    if not rehearsed and not torch.cuda.is_available():
        sys.exit("no GPU with CUDA here: nothing to report (--device cpu rehearses)")
    started = time.perf_counter()
    where = provenance.device("cpu" if rehearsed else "cuda")
    print(f"{where}, torch {torch.__version__}, commit {provenance.git_sha()}", flush=True)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_devices.py"]
    told = {**os.environ, "HQ_DEVICE": "pretend", "HQ_FUSE": "0"} if rehearsed else dict(os.environ)
    try:
        found = subprocess.run(tests, cwd=paths.ROOT, env=told, timeout=None if rehearsed else TESTS_S).returncode
        how = "failed" if found else "passed"
    except subprocess.TimeoutExpired:
        how = "stopped"
    print(f"tests: {how} after {time.perf_counter() - started:.0f} s", flush=True)
    if rehearsed:
        measure(Sizes(torch.device("cpu"), math.inf, n_images=256, batch=8, steps=2, iterations=2))
    else:
        measure(Sizes(torch.device("cuda"), started + MOST_S, n_images=45_000, batch=256, steps=50, iterations=100))
    print(f"all: {time.perf_counter() - started:.0f} s", flush=True)
    sys.exit(how != "passed")


if __name__ == "__main__":
    main()
