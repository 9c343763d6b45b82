"""Everything that only a GPU can show, in one run of a few minutes: python benchmarks/gpu.py > gpu_report.txt

The tests marked `gpu` (integers equal to the CPU's at ties, resuming bit for bit, either precision, reconstruction),
then the time of a step in float, through LSQ and compiled, and of a reconstruction. Send the report back.
"""

import copy
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hq_lib import models, ptq
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.results import paths, provenance
from hq_lib.training import TrainConfig, machine
from hq_lib.training.config import set_lr, sgd

CONFIG = TrainConfig(epochs=1, lr=0.01)
BATCH, STEPS, DEVICE = 256, 50, torch.device("cuda")


def ms(step: Callable[[], object]) -> float:
    """Mean time of a call after ten to warm up, milliseconds."""
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started) / STEPS


def trained(net: torch.nn.Module, precision: str, compile_it: bool) -> float:
    """Milliseconds of a training step on random images."""
    net = copy.deepcopy(net).to(DEVICE).train().to(memory_format=torch.channels_last)  # pyright: ignore
    x, y = torch.randn(BATCH, 3, 32, 32, device=DEVICE), torch.randint(10, (BATCH,), device=DEVICE)
    optimizer, forward = sgd(net, CONFIG), machine.compiled(net) if compile_it else net
    set_lr(optimizer, CONFIG.lr)

    def step() -> None:
        with machine.autocast(DEVICE, precision):
            loss = F.cross_entropy(forward(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return ms(step)


def main() -> None:
    """Prints the report; exit code 1 where a test failed or there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("no GPU with CUDA here: nothing to report")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {provenance.git_sha()}", flush=True)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/quantizers", "tests/training", "tests/ptq"]
    failed = subprocess.run(tests, cwd=paths.ROOT).returncode
    torch.manual_seed(0)
    net, x = models.build("resnet20"), torch.randn(256, 3, 32, 32)
    qnet = quantize(net, BitPolicy("lsq:4", "lsq:4", placement="academic"), x[:1])
    calibrate(qnet, x)
    for name, one in (("float", net), ("lsq W4A4", qnet)):
        for precision in ("float32", "bfloat16"):
            for compile_it in (False, True):
                took = trained(one, precision, compile_it)
                how = "compiled" if compile_it else "eager"
                print(f"ResNet-20 {name}, {precision}, {how}: {took:.2f} ms a step of {BATCH} images", flush=True)
    fixed = quantize(net, BitPolicy("minmax:4", "minmax:4", placement="academic", bn="fold"), x[:1]).to(DEVICE)
    calibrate(fixed, x.to(DEVICE))
    started = time.perf_counter()
    ptq.reconstruct(fixed, x, ptq.ReconstructionConfig(iterations=100, n_images=len(x)))
    print(f"QDrop, 100 iterations a block, 256 images: {time.perf_counter() - started:.1f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
