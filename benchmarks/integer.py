"""Time of an image through integer networks: the C runtime beside onnxruntime and OpenVINO, in one process.

    OMP_NUM_THREADS=1 python benchmarks/integer.py [--networks resnet20 ...] [--policies w8a8 w4a4] [--batches 1 128]
                                                   [--threads 1 2] [--rounds 7] [--images 128] [--kernels] [--keep]

Every peer reads the ONNX file that ``deploy.onnx`` exports; ranges come from 256 training images, images from the test
set. The executors take turns, round after round, so that a busy machine slows all of them; a ratio is the peer's time
over C's of the same round (above 1 C is faster), printed as the median over the rounds and, in brackets, its extremes.
Time is the processor's on one thread and the clock's on more. Each is called once a batch. The C runtime takes one
image at a time at every batch size; more threads share a batch's images, or a single image's rows.

"onnxruntime" is ``deploy.onnx.session``, whose logits must equal C's. Without VNNI that session has the option that
keeps onnxruntime from saturating, and onnxruntime "as it comes", whose logits then differ, has a line of its own.
OpenVINO promises no bits. Predictions that differ from the integer network's are counted. The first line names the
processor: figures of one say little of another. ``--keep`` writes the figures to ``data/results/integer_speed.csv``.
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from hq_lib import data, integer, models
from hq_lib.deploy import c as export_c
from hq_lib.deploy import onnx as export_onnx
from hq_lib.deploy.c.container import plan_arena
from hq_lib.deploy.c.runtime import KERNELS
from hq_lib.deploy.onnx.model import VNNI
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer.record import REQUANTIZERS, IntegerModel, Requantizer
from hq_lib.results import paths, provenance, store

try:
    import openvino
except ImportError:
    openvino = None

NETWORKS = ("lenet", "resnet20", "vgg11", "toynet", "mobilenetv2_seed")
POLICIES = {
    "w8a8": BitPolicy(bn="fold"),
    "w4a4": BitPolicy(weight="minmax:4", act="minmax:4", bn="fold"),
    "dorefa8": BitPolicy(weight="dorefa:8", act="minmax:8", bn="fold"),
}
Call = Callable[[], Any]


def network(
    name: str, policy: str, n_images: int, requantizer: Requantizer = "float32"
) -> tuple[nn.Module, IntegerModel, np.ndarray]:
    """Return (float net, its integer record, (n_images, C, H, W) normalised test images)."""
    net, record = models.load_checkpoint(paths.checkpoints_dir() / f"{name}_float_s0.safetensors")
    test = data.load(record["dataset"], "test", n=n_images)
    train = data.load(record["dataset"], "train", n=256)
    x = data.normalize(train.images, train.spec)
    qnet = quantize(net, POLICIES[policy], x[:1])
    calibrate(qnet, x)
    images = np.ascontiguousarray(data.normalize(test.images, test.spec).numpy())
    return net, integer.lower(qnet.eval(), requantizer=requantizer), images


def float_session(net: nn.Module, image: np.ndarray, n_threads: int) -> Any | None:
    """Return onnxruntime on the float net, batch norms folded by its exporter; None where torch cannot export it."""
    buffer, example = io.BytesIO(), (torch.from_numpy(image),)
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "N"}}, "opset_version": 17}
    try:
        with warnings.catch_warnings():  # the exporter that needs no further package is a deprecated one
            warnings.simplefilter("ignore")
            torch.onnx.export(net, example, buffer, dynamo=False, **names)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"onnxruntime float left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    return export_onnx.session(onnx.load_model_from_string(buffer.getvalue()), n_threads=n_threads)


def as_it_comes(model: onnx.ModelProto, n_threads: int) -> Any:
    """Return an onnxruntime session with no option set but its threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def parts(x: np.ndarray, batch: int) -> list[np.ndarray]:
    """Return ``x`` cut into batches."""
    return [x[i : i + batch] for i in range(0, len(x), batch)]


def openvino_call(model: onnx.ModelProto, x: np.ndarray, batch: int, n_threads: int) -> Call:
    """Return a call that gives OpenVINO's logits of ``x``, compiled for this batch size."""
    assert openvino is not None
    read = openvino.Core().read_model(model.SerializeToString(), b"")
    read.reshape([batch, *x.shape[1:]])
    settings = {"INFERENCE_NUM_THREADS": n_threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(read, "CPU", settings).create_infer_request()
    return lambda: np.concatenate([request.infer([part])[0] for part in parts(x, batch)])


def executors(net: nn.Module, imodel: IntegerModel, x: np.ndarray, batch: int, n_threads: int) -> dict[str, Call]:
    """Return what each executor makes of ``x``, C first."""
    model, runtime = export_onnx.export(imodel), export_c.Runtime(imodel, n_threads=n_threads)
    sessions = {"onnxruntime": export_onnx.session(model, n_threads=n_threads)}
    if not provenance.cpu_flags() & VNNI:
        sessions["onnxruntime as it comes"] = as_it_comes(model, n_threads)
    if (plain := float_session(net, x[:1], n_threads)) is not None:
        sessions["onnxruntime float"] = plain
    first = f"C ({runtime.kernel})"
    calls: dict[str, Call] = {first: lambda: np.concatenate([runtime.run(p) for p in parts(x, batch)])}
    for key, session in sessions.items():
        calls[key] = lambda session=session: export_onnx.run(session, x, batch_size=batch)
    if openvino is not None:
        calls["OpenVINO"] = openvino_call(model, x, batch, n_threads)
    return calls


def times(calls: dict[str, Call], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return seconds of ``rounds`` alternating runs of each call."""
    found: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = clock()
            call()
            found[key].append(clock() - start)
    return found


def peers() -> str:
    """Return the versions of what C is compared with."""
    return f"onnxruntime {onnxruntime.__version__}; openvino {getattr(openvino, '__version__', 'absent')}"


def compare(name: str, policy: str, batch: int, n_threads: int, options: argparse.Namespace) -> None:
    """Print ms an image of C and its peers at one batch size, their ratios, and how many predictions differ."""
    net, imodel, x = network(name, policy, -(-max(batch, options.images) // batch) * batch)
    calls = executors(net, imodel, x, batch, n_threads)
    want = integer.run(imodel, x)
    logits = {key: call() for key, call in calls.items()}  # and warms up
    first = next(iter(calls))
    assert np.array_equal(logits[first], want)
    assert np.array_equal(logits["onnxruntime"], want)
    found = times(calls, options.rounds, time.process_time if n_threads == 1 else time.perf_counter)
    print(f"\n{name} {policy}, batch {batch}, {n_threads} thread{'s' * (n_threads > 1)}, {len(x)} images", flush=True)
    bits, dataset = 4 if policy == "w4a4" else 8, "cifar10" if x.shape[1] == 3 else "fashion_mnist"
    about = {
        "experiment": "integer_speed", "model": name, "dataset": dataset, "w_bits": bits, "a_bits": bits,
        "n_calib": 256, "n_test": len(x),
        "switches": {
            "batch": batch, "threads": n_threads, "policy": policy, "rounds": options.rounds, "peers": peers(),
            "kernel": first.removeprefix("C (").rstrip(")"),
        },
    }  # fmt: skip
    for key, seconds in found.items():
        ratios = sorted(peer / c for peer, c in zip(seconds, found[first], strict=True))
        spread = f"x{statistics.median(ratios):5.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]" if key != first else ""
        other = (logits[key].argmax(1) != want.argmax(1)).sum()
        note = f"  {other} of {len(x)} predictions differ" if other else ""
        print(f"  {key:24s} {1e3 * min(seconds) / len(x):8.4f} ms  {spread}{note}", flush=True)
        values = {"time_ms": 1e3 * min(seconds) / len(x), "over_c": statistics.median(ratios)}
        values |= {"over_c_least": ratios[0], "over_c_most": ratios[-1]}
        rows = [
            about | {"method": key, "metric": metric, "value": value, "unit": "ms" if metric == "time_ms" else "x"}
            for metric, value in values.items()
        ]
        if options.keep:
            store.append("integer_speed", rows, profile="full")


def kernels(name: str, policy: str, options: argparse.Namespace) -> None:
    """Print ms an image of every kernel of the C runtime, with both requantizers by turns, and bytes of its arena."""
    records = {requantizer: network(name, policy, options.images, requantizer) for requantizer in REQUANTIZERS}
    x = records["float32"][2]
    arena = plan_arena(records["float32"][1])[2]
    for kernel in KERNELS[1:]:
        try:
            runtimes = {key: export_c.Runtime(imodel, kernel=kernel) for key, (_, imodel, _) in records.items()}
        except ValueError:
            continue
        calls: dict[str, Call] = {key: functools.partial(runtime.run, x) for key, runtime in runtimes.items()}
        found = times(calls, options.rounds, time.process_time)
        ms = {key: 1e3 * min(seconds) / len(x) for key, seconds in found.items()}
        ratio = statistics.median(b / a for a, b in zip(found["float32"], found["fixed"], strict=True))
        told = ", ".join(f"{key} {value:.4f} ms" for key, value in ms.items())
        print(f"  {name} {policy} {kernel:12s} {told}, fixed x{ratio:.2f}; arena {arena:,} bytes", flush=True)
    export_c.Runtime(records["float32"][1], kernel="auto")


def main() -> None:
    """All comparisons of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--policies", nargs="+", default=["w8a8", "w4a4"], choices=POLICIES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--images", type=int, default=128, help="images a round, at least")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", action="store_true", help="every kernel of the C runtime, without its peers")
    parser.add_argument("--keep", action="store_true", help="write the rows that documents quote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = sorted(flag for flag in provenance.cpu_flags() if flag.startswith(("avx", "sse4", "fma", "amx")))
    print(f"{provenance.cpu_name()}: {' '.join(sets)}\n{provenance.versions()}; {peers()}")
    for name in options.networks:
        for policy in options.policies:
            if options.kernels:
                kernels(name, policy, options)
                continue
            for n_threads in options.threads:
                for batch in options.batches:
                    compare(name, policy, batch, n_threads, options)


if __name__ == "__main__":
    main()
