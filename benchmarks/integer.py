"""Time of an image through integer networks, executor beside executor in one process and one thread.

    OMP_NUM_THREADS=1 python benchmarks/integer.py [--rounds 7] [--numpy-images 1000] [--batches 1 128] [--kernels]

Rounds alternate between the executors, so that a busy machine slows all of them; a figure is the fastest round's CPU
time per image. Ratios are onnxruntime's time over C's: above 1 C is faster. Networks are the shipped checkpoints, W8A8
after training (min-max), images from the test set; the C runtime takes one image at a time at every batch size. All
integer logits are compared with NumPy's on the way. onnxruntime in float runs the same net.

Measured, one thread with AVX-512 VNNI, time over C's (ResNet-20 0.19 ms an image, LeNet 0.039): onnxruntime int8 3.1 at
batch 1 and 2.3 at batch 128, its float 2.7 and 2.7; LeNet 2.0 and 1.2, its float 0.6 and 0.4 (so small a net is not
worth quantizing for speed here). Without VNNI (``--kernels``) C takes 4.2 times as long. NumPy: 40 s for 10,000 images.
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from hq_lib import data, integer, models
from hq_lib.deploy import c as export_c
from hq_lib.deploy import onnx as export_onnx
from hq_lib.deploy.c.runtime import KERNELS
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.results import paths

Runs = dict[str, Callable[[], Any]]


def network(name: str, n_images: int) -> tuple[nn.Module, Any, np.ndarray]:
    """(float net, its integer record, (n_images, C, H, W) normalised images)."""
    net, record = models.load_checkpoint(paths.checkpoints_dir() / f"{name}_float_s0.safetensors")
    test = data.load(record["dataset"], "test", n=n_images)
    train = data.load(record["dataset"], "train", n=256)
    x = data.normalize(train.images, train.spec)
    qnet = quantize(net, BitPolicy(bn="fold"), x[:1])
    calibrate(qnet, x)
    images = np.ascontiguousarray(data.normalize(test.images, test.spec).numpy())
    return net, integer.lower(qnet.eval(), images=test.spec), images


def float_session(net: nn.Module, image: np.ndarray) -> Any | None:
    """onnxruntime on the float net, batch norms folded by its exporter; None where this torch cannot export it."""
    buffer, example = io.BytesIO(), (torch.from_numpy(image),)
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "N"}}, "opset_version": 17}
    try:
        with warnings.catch_warnings():  # the exporter that needs no further package is a deprecated one
            warnings.simplefilter("ignore")
            torch.onnx.export(net, example, buffer, dynamo=False, **names)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"onnxruntime float left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    return export_onnx.session(onnx.load_model_from_string(buffer.getvalue()))


def fastest(runs: Runs, rounds: int) -> dict[str, float]:
    """Name -> CPU seconds of the fastest of ``rounds`` alternating runs."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds + 1):  # the first warms up
        for name, call in runs.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def compare(name: str, batch: int, options: argparse.Namespace) -> None:
    """Print ms an image of C, onnxruntime int8 and float, PyTorch at one batch size, and the ratios."""
    n = max(batch, options.images)
    net, imodel, x = network(name, n)
    session, runtime = export_onnx.session(export_onnx.export(imodel)), export_c.Runtime(imodel)
    plain = float_session(net, x[:1])
    want = integer.run(imodel, x)
    assert np.array_equal(runtime.run(x), want)
    assert np.array_equal(export_onnx.run(session, x, batch_size=batch), want)
    parts = torch.from_numpy(x).contiguous(memory_format=torch.channels_last).split(batch)
    runs: Runs = {
        f"C int8 ({runtime.kernel})": lambda: runtime.run(x),
        "onnxruntime int8": lambda: export_onnx.run(session, x, batch_size=batch),
        "PyTorch float": lambda: [net(part) for part in parts],
    }
    if plain is not None:
        runs["onnxruntime float"] = lambda: export_onnx.run(plain, x, batch_size=batch)
    with torch.inference_mode():
        found = {key: 1e3 * seconds / n for key, seconds in fastest(runs, options.rounds).items()}
    c, *others = found
    print(f"\n{name}, batch {batch}, {n} images, 0 of {want.size} logits differ")
    print(f"  {c:24s} {found[c]:.4f} ms")
    for key in others:
        print(f"  {key:24s} {found[key]:.4f} ms    x{found[key] / found[c]:.2f}")


def kernels(name: str, options: argparse.Namespace) -> None:
    """Print ms an image of every kernel of the C runtime, with both requantizers."""
    net, _, x = network(name, options.images)
    train = data.load("cifar10" if x.shape[1] == 3 else "fashion_mnist", "train", n=256)
    qnet = quantize(net, BitPolicy(bn="fold"), torch.from_numpy(x[:1]))
    calibrate(qnet, data.normalize(train.images, train.spec))
    for requantizer in ("float32", "fixed"):
        imodel = integer.lower(qnet.eval(), requantizer=requantizer)
        for kernel in KERNELS[1:]:
            try:
                runtime = export_c.Runtime(imodel, kernel=kernel)
            except ValueError:
                continue
            [seconds] = fastest({kernel: lambda runtime=runtime: runtime.run(x)}, options.rounds).values()
            print(f"  {name} C {requantizer:8s} {kernel:12s} {1e3 * seconds / len(x):.4f} ms")
    export_c.Runtime(imodel, kernel="auto")


def numpy_time(options: argparse.Namespace) -> None:
    """Print CPU seconds of the NumPy executor for 10,000 images of ResNet-20, and what it was scaled from."""
    _, imodel, x = network("resnet20", options.numpy_images)
    start = time.process_time()
    integer.run(imodel, x, batch_size=100)
    seconds = (time.process_time() - start) * 10_000 / len(x)
    print(f"\nNumPy, ResNet-20: 10,000 images in {seconds:.0f} s (measured on {len(x)})")


def main() -> None:
    """All comparisons of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "lenet"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--images", type=int, default=128, help="images a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--numpy-images", type=int, default=1000)
    parser.add_argument("--kernels", action="store_true", help="every kernel of the C runtime too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        for batch in options.batches:
            compare(name, batch, options)
        if options.kernels:
            kernels(name, options)
    numpy_time(options)


if __name__ == "__main__":
    main()
