"""QDrop's schedule for a short budget, chosen on validation images (notebook 04).

    python -m hq_lib.studies.ptq.schedule --profile full

appends rows to ``ptq_schedule.csv`` one by one and skips those that are there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hq_lib import ptq
from hq_lib.results import paths, provenance, store
from hq_lib.studies.ptq.recipes import Recipe, calibration, quantized
from hq_lib.studies.ptq.study import PLAN, SHIPPED, open_net
from hq_lib.training import evaluate

STUDY = "ptq_schedule"
CANDIDATES: dict[str, tuple[dict[str, Any], ...]] = {
    "smoke": ({"travel": 25.0, "beta_start": 8.0},),
    "quick": ({"travel": 5.0, "beta_start": 20.0}, {"travel": 25.0, "beta_start": 8.0}),
    "full": (
        {"travel": 5.0, "beta_start": 20.0}, {"travel": 25.0, "beta_start": 20.0}, {"travel": 25.0, "beta_start": 8.0},
        {"travel": 50.0, "beta_start": 8.0}, {"travel": 25.0, "beta_start": 8.0, "step_lr": 5e-4},
    ),
}  # fmt: skip
"""schedules compared: travel = rounding rate x iterations (published: 1e-3 x 20,000 = 20), first exponent, others"""


def run(
    profile: str, *, candidates: Sequence[Mapping[str, Any]] | None = None, bits: tuple[int, int] = (2, 2),
    seeds: Sequence[int] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """QDrop's schedules compared on validation images of the shipped net, which were held out of its training; rows.

    Test images play no part. The first seed of the profile unless ``seeds`` says more; candidates likewise.
    """
    plan = PLAN[paths.check_profile(profile)]
    bench = open_net(SHIPPED, profile, n_test=1)
    assert bench.common is not None
    val = bench.common if plan["n_test"] is None else bench.common.balanced(min(plan["n_test"], len(bench.common)), 0)
    for seed in plan["seeds"][:1] if seeds is None else seeds:
        x = calibration(bench, plan["n_calib"], seed)
        for candidate in candidates or CANDIDATES[profile]:
            key = {
                "experiment": STUDY, "model": bench.model, "dataset": bench.dataset, "method": "qdrop",
                "w_bits": bits[0], "a_bits": bits[1], "placement": "academic", "n_calib": len(x), "seed": seed,
                "iterations": plan["iterations"], "n_test": len(val), "metric": "acc_pct",
                "switches": {"net": SHIPPED, "split": "val", "first_last_bits": 8, **candidate},
            }  # fmt: skip
            if store.done(STUDY, key, profile=profile):
                continue
            with provenance.stopwatch() as watch:
                recipe = Recipe("qdrop", "schedule", passes=ptq.qdrop, settings=settings(candidate, plan["iterations"]))
                qnet = quantized(bench.net, x, recipe, bits, iterations=plan["iterations"], seed=seed)
                acc_pct = evaluate(qnet, val).acc_pct
            store.append(STUDY, [{**key, "value": acc_pct, "unit": "%", "seconds": watch.seconds}], profile=profile)
            print(f"{candidate}, seed {seed}: validation {acc_pct:.2f} %, {watch.seconds:.0f} s", flush=True)
    return store.read(STUDY, profile=profile)


def settings(candidate: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """The reconstruction settings of a candidate: its travel becomes a rate, at most 0.5."""
    others = {key: value for key, value in candidate.items() if key != "travel"}
    return {"rounding_lr": min(0.5, candidate["travel"] / max(1, iterations)), **others}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy by schedule, best first: columns schedule, mean, count."""
    names = [_named(json.loads(switches)) for switches in rows["switches"]]
    table = rows.assign(schedule=names).groupby("schedule")["value"].agg(["mean", "count"]).reset_index()
    return table.sort_values("mean", ascending=False, ignore_index=True)


def _named(switches: Mapping[str, Any]) -> str:
    others = [f"{k} {v:g}" for k, v in switches.items() if k not in ("net", "split", "first_last_bits", "travel")]
    return ", ".join([f"rate x iterations {switches['travel']:g}", *others])


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.ptq.schedule", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--seeds", nargs="+", type=int, default=None, metavar="N")
    options = parser.parse_args(arguments)
    run(options.profile, seeds=options.seeds)


if __name__ == "__main__":
    main()
