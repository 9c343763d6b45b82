"""Post-training methods measured: accuracy at each bit width, and the error behind each block (notebook 04).

    python -m hq_lib.studies.ptq.study --profile full --nets public --recipes qdrop --bits 4,4 2,2

appends rows to ``ptq_methods.csv`` and ``ptq_errors.csv`` point by point; a point that has its rows is skipped, one
that was killed goes on behind its last finished block.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, fx

from hq_lib import data, models, ptq
from hq_lib.data import ImageSet
from hq_lib.graph import quantize
from hq_lib.results import paths, provenance, store
from hq_lib.studies.ptq.recipes import LEARNED, NEAREST, RECIPES, calibration, quantized
from hq_lib.studies.selection import bench as selection_bench
from hq_lib.training import evaluate

STUDY, ERRORS = "ptq_methods", "ptq_errors"
PUBLIC, SHIPPED = "public", "shipped"
NETS = (PUBLIC, SHIPPED)
"""the public ResNet-20 (option A, 91.73 %; optional folder ../shared/data) and the one that the repository ships"""
PUBLIC_FILE = "resnet20_akamaster_9173.th"
BITS = ((8, 8), (4, 4), (3, 3), (2, 4), (2, 2))
ERROR_BITS = ((4, 4), (2, 2))
"""widths at which the error behind each block is kept"""
PLAN: dict[str, dict[str, Any]] = {
    "smoke": {"iterations": 2, "n_calib": 32, "n_test": 100, "n_errors": 32, "bits": ((4, 4),), "seeds": (1005,),
              "nets": (SHIPPED,), "recipes": ("minmax", "mse", "aciq_allocated", "brecq_fisher", "qdrop")},
    "quick": {"iterations": 60, "n_calib": 256, "n_test": 1_000, "n_errors": 200, "bits": ((4, 4), (2, 2)),
              "seeds": (1005,), "nets": (SHIPPED,)},
    "full": {"iterations": 500, "n_calib": 1024, "n_test": None, "n_errors": 500, "bits": BITS,
             "seeds": (1005, 1006, 1007), "nets": NETS},
}  # fmt: skip
"""Profile -> iterations a unit, images, widths, seeds (1005 is that of the official QDrop scripts) and nets."""
IMAGENET: dict[str, Any] = {"bits": ((8, 8), (4, 8), (4, 4)), "n_errors": 48, "nets": (SHIPPED,)}
"""what replaces this on ImageNet, where the net is EfficientNet-Lite0 and ranges alone are the default"""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    net: str
    """"public" or "shipped" """
    recipe: str
    """key of ``RECIPES``"""
    bits: tuple[int, int]
    """of weights and activations; first and last layer 8"""
    seed: int
    """draws the calibration images, and drives batches and dropping"""


def open_net(net: str, profile: str, *, dataset: str = "cifar10", n_test: int | None = None) -> selection_bench.Bench:
    """The float net with its images; its ``common`` are validation images (None on ImageNet).

    Raises:
        FileNotFoundError: the public checkpoint (``open_nets`` skips it) or the image folder is absent.
    """
    n_val = 0 if dataset == "imagenet" else 5_000
    bench = selection_bench.open_bench(dataset, profile, root=None, n_common=n_val, n_test=n_test)
    if net == SHIPPED:
        return bench
    path = public_file()
    if path is None or bench.dataset != "cifar10":
        raise FileNotFoundError(f"no {PUBLIC_FILE} in ../shared/data/checkpoints, or no CIFAR-10")
    assert bench.common is not None
    train, common, test = (s.normalized_by(*models.IMAGENET_MEAN_STD) for s in (bench.train, bench.common, bench.test))
    return selection_bench.Bench(bench.model, models.resnet20_akamaster(path).eval(), train, common, test)


def public_file() -> Path | None:
    """The optional public checkpoint, or None where it is absent."""
    folder = paths.shared_data()
    path = folder / "checkpoints" / PUBLIC_FILE if folder else None
    return path if path is not None and path.exists() else None


def run(
    profile: str,
    *,
    nets: Sequence[str] | None = None,
    recipes: Sequence[str] | None = None,
    bits: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    dataset: str = "cifar10",
) -> pd.DataFrame:
    """Measures each recipe on each net at each width with each seed; the study's rows of this profile.

    Args:
        profile: chooses budget, images and output folders; what is there already is not measured again.
        nets:    "public" (skipped with a line where it is absent) and "shipped"; default the profile's.
        recipes: keys of ``RECIPES``; default: those to nearest and, on CIFAR-10, AdaRound, BRECQ (both losses), QDrop
                 (a few of them in smoke).
        bits:    (weights, activations) pairs; default the profile's. At 8 bits nothing is reconstructed.
        seeds:   default the profile's.
        dataset: "cifar10", or "imagenet" with the folder of ``selection_bench``.
    """
    plan = plan_of(profile, dataset)
    default = plan.get("recipes", NEAREST if dataset == "imagenet" else (*NEAREST, *LEARNED))
    for net in nets or plan["nets"]:
        try:
            bench = open_net(net, profile, dataset=dataset, n_test=plan["n_test"])
        except FileNotFoundError as error:
            print(f"{net}: skipped, {error}")
            continue
        points = [
            Point(net, name, (int(width[0]), int(width[1])), seed)
            for seed in (plan["seeds"] if seeds is None else seeds)
            for width in (plan["bits"] if bits is None else bits)
            for name in recipes or default
            if width[0] < 8 or RECIPES[name].passes is None
        ]
        _float_row(bench, net, profile)
        for i, point in enumerate(points):
            print(f"[{i + 1}/{len(points)}] {_title(point)}", flush=True)
            measure(point, bench, profile)
    return store.read(STUDY, profile=profile)


def plan_of(profile: str, dataset: str) -> dict[str, Any]:
    """The sizes of a profile on a data set."""
    return {**PLAN[paths.check_profile(profile)], **(IMAGENET if dataset == "imagenet" else {})}


def _title(point: Point) -> str:
    return f"{point.net} W{point.bits[0]}A{point.bits[1]} {point.recipe}, seed {point.seed}"


def measure(point: Point, bench: selection_bench.Bench, profile: str) -> None:
    """Quantizes and evaluates one point and appends its rows, unless they are there."""
    plan, recipe = plan_of(profile, bench.dataset), RECIPES[point.recipe]
    iterations = plan["iterations"] if recipe.passes else 0
    x = calibration(bench, plan["n_calib"], point.seed)
    common = _common(point, bench, len(x), iterations)
    if store.done(STUDY, {**common, "metric": "acc_pct"}, profile=profile):
        return
    clock, cpu, reporter = time.perf_counter(), time.process_time(), Reporter()
    qnet = quantized(bench.net, x, recipe, point.bits, iterations=iterations, seed=point.seed,
                     folder=_folder(common, profile) if recipe.passes else None, progress=reporter)  # fmt: skip
    cpu = time.process_time() - cpu
    score = evaluate(qnet, bench.test, batch_size=selection_bench.eval_batch(bench))
    common |= {"seconds": round(time.perf_counter() - clock, 1), **provenance.stamp()}
    if point.bits in ERROR_BITS:
        _append_errors(common, qnet, bench, x, plan["n_errors"], profile)
    values = {"acc_pct": (score.acc_pct, "%"), "loss": (score.loss, "nat"), "calibration_cpu_s": (cpu, "s")}
    if reporter.resumed:  # what an earlier process spent is not known
        del values["calibration_cpu_s"]
    rows = [{**common, "metric": m, "value": v, "unit": unit, "n_test": score.n} for m, (v, unit) in values.items()]
    store.append(STUDY, rows, profile=profile)
    print(f"{_title(point)}: {score.acc_pct:.2f} %, {cpu:.0f} CPU s", flush=True)


class Reporter:
    """Prints a finished unit, at most one line in ten seconds."""

    def __init__(self) -> None:
        self.last, self.resumed = time.perf_counter(), False

    def __call__(self, report: ptq.UnitReport) -> None:
        """Show ``report`` where the last line is old enough; remember whether any unit came from an earlier run."""
        self.resumed |= report.resumed
        if time.perf_counter() - self.last > 10:
            self.last = time.perf_counter()
            print(f"  {report}", flush=True)


def _common(point: Point, bench: selection_bench.Bench, n_calib: int, iterations: int) -> dict[str, Any]:
    recipe = RECIPES[point.recipe]
    switches = {"net": point.net, "recipe": point.recipe, "first_last_bits": 8, **recipe.config(iterations)}
    return {
        "experiment": STUDY, "model": bench.model, "dataset": bench.dataset, "method": recipe.method,
        "w_bits": point.bits[0], "a_bits": point.bits[1], "placement": "academic", "n_calib": n_calib,
        "seed": point.seed, "iterations": iterations, "switches": switches,
    }  # fmt: skip


def _folder(common: Mapping[str, Any], profile: str) -> Path:
    key = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:10]
    stem = f"{common['switches']['net']}_{common['switches']['recipe']}_w{common['w_bits']}a{common['a_bits']}"
    return paths.runs_dir(profile) / STUDY / f"{stem}_s{common['seed']}_{key}"


def _append_errors(
    common: Mapping[str, Any], qnet: fx.GraphModule, bench: selection_bench.Bench, x: Tensor, n: int, profile: str
) -> None:
    images: ImageSet = bench.common or bench.test
    images = images.subset(list(range(0, len(images), max(1, len(images) // n)))[:n])
    reference = quantize(bench.net, selection_bench.policy(common["w_bits"], common["a_bits"]), x[:1])
    found = ptq.block_errors(qnet, reference, data.normalize(images.images, images.spec))
    rows = [
        {**common, "experiment": ERRORS, "metric": "rel_error", "value": e.error, "unit": "1", "n_test": len(images),
         "switches": {**common["switches"], "block": e.name, "position": e.position}}
        for e in found
    ]  # fmt: skip
    store.append(ERRORS, rows, profile=profile)


def _float_row(bench: selection_bench.Bench, net: str, profile: str) -> None:
    common = {"experiment": STUDY, "model": bench.model, "dataset": bench.dataset, "method": "float",
              "switches": {"net": net, "recipe": "float"}, "metric": "acc_pct"}  # fmt: skip
    if not store.done(STUDY, common, profile=profile):
        score = evaluate(bench.net, bench.test, batch_size=selection_bench.eval_batch(bench))
        store.append(STUDY, [{**common, "value": score.acc_pct, "unit": "%", "n_test": score.n}], profile=profile)


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.ptq.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--nets", nargs="+", default=None, choices=NETS)
    parser.add_argument("--recipes", nargs="+", default=None, choices=list(RECIPES))
    parser.add_argument("--bits", nargs="+", default=None, metavar="W,A")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, metavar="N")
    parser.add_argument("--dataset", default="cifar10", choices=["cifar10", "imagenet"])
    options = parser.parse_args(arguments)
    bits = [tuple(map(int, width.split(","))) for width in options.bits] if options.bits else None
    run(options.profile, nets=options.nets, recipes=options.recipes, bits=bits, seeds=options.seeds,
        dataset=options.dataset)  # fmt: skip


if __name__ == "__main__":
    main()
