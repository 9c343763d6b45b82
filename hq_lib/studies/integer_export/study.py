"""Integer networks in five executors: do they agree, and what does each cost (notebook 07).

    python -m hq_lib.studies.integer_export.study --profile full --models resnet20 --bits 8,8 4,4

quantizes each shipped network after training, writes one file per executor and runs the test set through all of them.
``integer_export.csv`` has accuracy, agreement, file size, time and memory; ``integer_layers.csv`` how far the integers
of each tensor are from the fake-quantized network's. A point that is there already is not run again.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import fx

from hq_lib import integer
from hq_lib.results import paths, provenance, store
from hq_lib.studies.integer_export import executors
from hq_lib.studies.integer_export import files as files_of
from hq_lib.studies.integer_export.files import PLAN, STUDY, Job, parts, switches

LAYERS = "integer_layers"
BITS = ((8, 8), (4, 4))
UNITS = {
    "acc_pct": "%", "same_top1_pct": "%", "n_logit_mismatches": "count", "file_KiB": "KiB", "cpu_ms": "ms",
    "peak_MiB": "MiB", "unavailable": "count",
}  # fmt: skip


def run(profile: str, *, names: Sequence[str] | None = None, bits: Sequence[Sequence[int]] = BITS) -> pd.DataFrame:
    """Measures every executor of every network at every bit width; the study's rows.

    Args:
        profile: chooses images, networks and folders.
        names:   networks; default the profile's. One without a shipped checkpoint is skipped with a line.
        bits:    (weights, activations) pairs.
    """
    for name in PLAN[paths.check_profile(profile)].models if names is None else names:
        for w_bits, a_bits in bits:
            job = files_of.job(name, profile, w_bits, a_bits)
            if job is not None:
                _measure(job)
    return store.read(STUDY, profile=profile)


def _measure(job: Job) -> None:
    title = f"{job.model} W{job.w_bits}A{job.a_bits}"
    todo = [point for point in files_of.points() if not _is_done(job, point)]
    if not todo and _layers_done(job):
        print(f"{title}: done already")
        return
    print(f"{title}: quantizing on {len(job.train)} images of {job.train.spec.name}", flush=True)
    qnet = files_of.quantized(job)
    files = files_of.write(job, qnet)
    for point in todo:
        _measure_point(job, point, files)
    if not _layers_done(job):
        _compare_layers(job, qnet)


def _is_done(job: Job, point: str) -> bool:
    row = job.row(point.split()[0], switches=switches(job, point))
    return store.done(STUDY, {**row, "metric": "acc_pct"}, profile=job.profile)


def _measure_point(job: Job, point: str, files: dict[str, Path]) -> None:
    executor = point.split()[0]
    common = job.row(executor, switches=switches(job, point), **provenance.stamp())
    try:
        with provenance.stopwatch() as watch:
            logits, cpu_ms = executors.measure(executors.opened(executor, files[point]), parts(job.test))
    except executors.UnavailableError as error:
        print(f"  {point}: {error}", flush=True)
        reason = {**common, "switches": {**common["switches"], "reason": str(error)}}
        store.append(STUDY, [_value(reason, "unavailable", 1)], profile=job.profile)
        return
    acc_pct = 100 * float((logits.argmax(1) == job.test.labels.numpy()).mean())
    found = {"acc_pct": acc_pct, "cpu_ms": cpu_ms, "file_KiB": files[point].stat().st_size / 1024}
    found |= _agreement(job, point, logits, files)
    if PLAN[job.profile].memory:
        peak = executors.peak_MiB(executor, files[point], next(parts(job.test))[:1])
        found |= {} if peak is None else {"peak_MiB": peak}
    common["seconds"] = watch.seconds
    store.append(STUDY, [_value(common, metric, value) for metric, value in found.items()], profile=job.profile)
    print(f"  {point}: " + ", ".join(f"{metric} {value:.5g}" for metric, value in found.items()), flush=True)


def _value(common: dict[str, Any], metric: str, value: float) -> dict[str, Any]:
    return {**common, "metric": metric, "value": value, "unit": UNITS[metric]}


def _agreement(job: Job, point: str, logits: np.ndarray, files: dict[str, Path]) -> dict[str, float]:
    """Against NumPy: logits that differ (other integer executors), or the share of equal predictions (PyTorch)."""
    executor, *form = point.split()
    reference = f"numpy {(form or ['float32'])[0]}"
    kept = files[reference].with_suffix(f".{_digest(files[reference])}.{len(job.test)}.npy")
    if executor == "numpy":
        np.save(kept, logits)
        return {}
    if not kept.exists():
        np.save(kept, executors.measure(executors.opened("numpy", files[reference]), parts(job.test))[0])
    wanted = np.load(kept)
    if executor in ("c", "onnx"):
        return {"n_logit_mismatches": int((logits != wanted).sum())}
    return {"same_top1_pct": 100 * float((logits.argmax(1) == wanted.argmax(1)).mean())}


def _digest(file: Path) -> str:
    """A name for the integers in a record, whatever its provenance."""
    return hashlib.sha256(integer.to_bytes(replace(integer.load(file), meta={}))).hexdigest()[:12]


def _layers_done(job: Job) -> bool:
    n_test = min(PLAN[job.profile].n_layers, len(job.test))
    row = job.row("numpy", experiment=LAYERS, n_test=n_test, metric="largest_LSB")
    return store.done(LAYERS, row, profile=job.profile)


def _compare_layers(job: Job, qnet: fx.GraphModule) -> None:
    images = job.test.subset(torch.arange(min(PLAN[job.profile].n_layers, len(job.test))))
    imodel, rows = integer.lower(qnet), []
    common = job.row("numpy", experiment=LAYERS, n_test=len(images), **provenance.stamp())
    for forced in (False, True):
        found = integer.agreement(qnet, imodel, images, forced=forced).tensors
        for place, tensor in enumerate(found):
            where = {"tensor": tensor.name, "place": place, "inputs": "the graph's" if forced else "its own"}
            own = {**common, "switches": where}
            rows += [
                {**own, "metric": "mismatch_pct", "value": tensor.mismatch_pct, "unit": "%"},
                {**own, "metric": "largest_LSB", "value": tensor.largest, "unit": "LSB"},
            ]
    store.append(LAYERS, rows, profile=job.profile)
    print(f"  {len(rows) // 4} tensors compared on {len(images)} images", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.integer_export.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--models", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--bits", nargs="+", default=["8,8", "4,4"], metavar="W,A")
    options = parser.parse_args(arguments)
    bits = [tuple(int(b) for b in pair.split(",")) for pair in options.bits]
    run(options.profile, names=options.models, bits=bits)


if __name__ == "__main__":
    main()
