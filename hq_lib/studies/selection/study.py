"""Does choosing smooth calibration images help beyond the luck of a random draw (notebook 05).

    python -m hq_lib.studies.selection.study --profile full
    python -m hq_lib.studies.selection.study --profile full --dataset imagenet --root FOLDER --parts ranges

measures the points of ``selection_points``: rows go to ``selection_study.csv`` as each one ends, what a set scores to
``selection_sets.csv``, its manifest into the folder of runs. Points that are already there are skipped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from hq_lib import data
from hq_lib.data import ImageSet
from hq_lib.ptq import selection
from hq_lib.results import paths, provenance, store
from hq_lib.studies.selection import bench as benches
from hq_lib.studies.selection.bench import Bench
from hq_lib.studies.selection.points import LOWEST, PARTS, Point, points, size_of
from hq_lib.studies.selection.sets import NETWORK_METRICS, Pool
from hq_lib.training import evaluate

STUDY, SETS = "selection_study", "selection_sets"
SET_UNITS = {"entropy": "nat"}


def run(
    profile: str,
    *,
    dataset: str = "cifar10",
    root: Path | None = None,
    parts: Sequence[str] = PARTS[:-1],
    device: str = "cpu",
) -> pd.DataFrame:
    """Every point that has no row yet is measured; the study's rows of all data sets.

    Args:
        profile: chooses sizes and folders.
        dataset: "cifar10" or "imagenet".
        root:    the image folder of "imagenet"; default the sample in ../shared/data.
        parts:   of ``PARTS``; all but "ranges" where none are given.
        device:  "cpu" or "cuda".
    """
    size, wanted = size_of(dataset, profile), points(dataset, profile, parts)
    bench = benches.open_bench(dataset, profile, root=root, n_common=size.n_common, n_test=size.n_test, device=device)
    _float_row(bench, profile)
    _measure_all(bench, _possible(wanted, bench), profile)
    return store.read(STUDY, profile=profile)


def _possible(wanted: list[Point], bench: Bench) -> list[Point]:
    """The points whose candidates there are (the embedded digits are few); how many are left out is printed."""
    kept = [p for p in wanted if p.n_pool <= len(bench.train)]
    if len(kept) < len(wanted):
        print(f"{bench.dataset}: {len(wanted) - len(kept)} points need more than {len(bench.train)} images: not run")
    return kept


def _measure_all(bench: Bench, wanted: list[Point], profile: str) -> None:
    pool: Pool | None = None  # one at a time: it keeps its activations
    missing = [p for p in wanted if not store.done(STUDY, _key(p, bench), profile=profile)]
    print(f"{bench.dataset}: {len(missing)} of {len(wanted)} points to measure", flush=True)
    for i, point in enumerate(missing):
        if pool is None or (pool.n_pool, pool.draw) != (point.n_pool, point.draw):
            pool = Pool(bench, point.n_pool, point.draw)
        with provenance.stopwatch(bench.device.type) as watch:
            values = measure(pool, point, profile)
        common = {**_row(point, bench), "seconds": watch.seconds, **provenance.stamp(bench.device.type)}
        store.append(STUDY, [{**common, **value} for value in values], profile=profile)
        named = f"{point.method} W{point.bits[0]}A{point.bits[1]}, {point.choice}, n = {point.n_calib}"
        print(f"{i + 1}/{len(missing)} {named}, draw {point.draw}: {values[0]['value']:.2f} %, {watch.seconds:.0f} s",
              flush=True)  # fmt: skip


def measure(pool: Pool, point: Point, profile: str) -> list[dict[str, Any]]:
    """Metric, value, unit and n_test of one point: accuracy, then the logits' loss on its own and on common images."""
    bench = pool.bench
    chosen = calibration_set(pool, point, profile)
    x = data.normalize(chosen.images, chosen.spec).contiguous().to(bench.device)
    seed = point.draw if point.run_seed is None else point.run_seed
    qnet = benches.reconstructed(bench, x, point.bits, point.method, iterations=point.iterations, seed=seed,
                                 batch_sampling=point.batch_sampling)  # fmt: skip
    score = evaluate(qnet, _judges(bench, point), batch_size=benches.eval_batch(bench))
    losses = {
        "loss_own": (benches.logit_loss(bench, qnet, chosen), len(chosen)),
        "loss_common": (benches.logit_loss(bench, qnet, bench.common, bench.common_logits), len(bench.common)),
    }
    found = [{"metric": "acc_pct", "value": score.acc_pct, "unit": "%", "n_test": score.n}]
    return found + [{"metric": k, "value": v, "unit": "1", "n_test": n} for k, (v, n) in losses.items()]


def _judges(bench: Bench, point: Point) -> ImageSet:
    return bench.test if point.split == "test" else bench.common


def calibration_set(pool: Pool, point: Point, profile: str) -> ImageSet:
    """The images of a point, taken through its manifest: hashes verified, short or repeated sets refused.

    Draws with replacement have no manifest; their rows say so.
    """
    chosen = pool.choose(point.choice, point.n_calib)
    if point.choice == "random_repeated":
        return pool.images.subset(chosen)
    if point.method == "qdrop" and point.bits == LOWEST:
        _score_set(pool, point, chosen, profile)
    name = f"{pool.bench.dataset}_{point.choice}_n{point.n_calib}_of{point.n_pool}_s{point.draw}.json"
    file = paths.runs_dir(profile) / STUDY / "manifests" / name
    if not file.exists():
        selection.write(pool.manifest(point.choice, chosen), file)
    return selection.take(selection.read(file), pool.bench.train)


def _score_set(pool: Pool, point: Point, chosen: Tensor, profile: str) -> None:
    common: dict[str, Any] = {
        "experiment": SETS, "model": pool.bench.model, "dataset": pool.bench.dataset, "method": "float",
        "n_calib": point.n_calib, "seed": point.draw, "switches": {"choice": point.choice, "n_pool": point.n_pool},
    }  # fmt: skip
    if store.done(SETS, {**common, "metric": "set_tv"}, profile=profile):
        return
    scores = pool.set_metrics(chosen, (*selection.METRICS, *NETWORK_METRICS))
    rows = [
        {**common, "metric": f"set_{name}", "value": value, "unit": SET_UNITS.get(name, "1")}
        for name, value in scores.items()
    ]
    store.append(SETS, rows, profile=profile)


def _row(point: Point, bench: Bench) -> dict[str, Any]:
    return {
        "experiment": STUDY, "model": bench.model, "dataset": bench.dataset, "method": point.method,
        "w_bits": point.bits[0], "a_bits": point.bits[1], "placement": "academic", "n_calib": point.n_calib,
        "seed": point.draw, "iterations": point.iterations, "switches": point.switches,
    }  # fmt: skip


def _key(point: Point, bench: Bench) -> dict[str, Any]:
    return _row(point, bench) | {"metric": "acc_pct", "n_test": len(_judges(bench, point))}


def _float_row(bench: Bench, profile: str) -> None:
    row: dict[str, Any] = {
        "experiment": STUDY, "model": bench.model, "dataset": bench.dataset, "method": "float", "metric": "acc_pct",
        "n_test": len(bench.test),
    }  # fmt: skip
    if not store.done(STUDY, row, profile=profile):
        score = evaluate(bench.net, bench.test, batch_size=benches.eval_batch(bench))
        store.append(STUDY, [{**row, "value": score.acc_pct, "unit": "%"}], profile=profile)
        print(f"{bench.model}, float: {score.acc_pct:.2f} % of {score.n} {bench.dataset} images", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.selection.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--dataset", default="cifar10", choices=["cifar10", "imagenet"])
    parser.add_argument("--root", type=Path, default=None, help="image folder of imagenet")
    parser.add_argument("--parts", nargs="+", default=list(PARTS[:-1]), choices=PARTS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    run(options.profile, dataset=options.dataset, root=options.root, parts=options.parts, device=options.device)


if __name__ == "__main__":
    main()
