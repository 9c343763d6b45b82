"""ResNet-20 on analog crossbars: accuracy against what is wrong with the arrays, and what repairs it (notebook 08).

    python -m hq_lib.studies.crossbar.study --profile full --studies recovery drift

Measures each `Point` of ``crossbar_points`` on test images and appends its rows to ``crossbar.csv`` at once; what is
there already is not measured again. Calibration images are training images; nothing is chosen on test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from hq_lib import data, models, ptq
from hq_lib.crossbar import Circuit, EngineNetwork, IdealEngine, SimEngine
from hq_lib.crossbar.compensation import Reference
from hq_lib.crossbar.norms import Moments, norm_moments, reestimate_norms
from hq_lib.data import ImageSet, normalize
from hq_lib.graph import BitPolicy, quantize
from hq_lib.integer import IntegerModel, lower
from hq_lib.results import paths, provenance, store
from hq_lib.results import rows as rows_schema
from hq_lib.studies.bench import shipped
from hq_lib.studies.crossbar.points import SIZES, STUDIES, Point, Size, points
from hq_lib.training.evaluation import evaluation_of

STUDY, MODEL = "crossbar", "resnet20"
N_PTQ = 256
"""Training images that the activation grids of the integer network are fitted to."""


SAY_EVERY_S = 10.0
_VARYING = ("dataset", "w_bits", "n_calib", "seed", "n_test", "switches")


@dataclass(frozen=True, eq=False)
class CrossbarBench:
    """The integer network that is put on arrays, and the images it is judged on."""

    model: IntegerModel
    """ResNet-20, quantized after training."""
    moments: dict[str, Moments]
    """What its batch norms want, by layer."""
    test: ImageSet
    """Images that accuracies are measured on."""
    train: ImageSet
    """Images for calibration."""
    logits: np.ndarray
    """float32 (n_test, n_classes): the exact integer network's answers."""
    size: Size
    """Sizes of the profile."""

    def calibration(self, n: int, seed: int) -> torch.Tensor:
        """(n, C, H, W) normalised training images, balanced over classes, drawn by ``seed``."""
        n = min(n, len(self.train))
        return normalize(self.train.balanced(n, seed).images, self.train.spec)


@cache
def crossbar_bench(profile: str, bits: int = 8, per_layer: bool = False) -> CrossbarBench:
    """The shipped float ResNet-20, batch norms folded, in integers of ``bits`` bits (ranges of least squared error).

    ``per_layer`` gives the weights one scale per layer instead of one per output channel. Without CIFAR-10 the images
    are the embedded digits: the program runs, but accuracies mean nothing, and the rows name the data set.
    """
    size = SIZES[paths.check_profile(profile)]
    path = shipped(MODEL)
    if path is None:
        raise FileNotFoundError(f"no float checkpoint of {MODEL} in {paths.checkpoints_dir()}: run notebook 01 in full")
    net, record = models.load_checkpoint(path)
    train = data.load_or_embedded(record["dataset"], "train")
    test = data.load_or_embedded(record["dataset"], "test", n=size.n_test)
    x = normalize(train.balanced(min(N_PTQ, len(train)), 0).images, train.spec)
    weight = {"method": "minmax", "bits": bits, "axis": None if per_layer else 0}
    policy = BitPolicy(weight, f"minmax:{bits}", bn="fold")
    qnet = quantize(net.eval(), policy, x[:1])
    ptq.fit_weights(qnet, "mse")
    ptq.fit_acts(qnet, x, "mse")
    model = lower(qnet)
    logits = EngineNetwork(model, IdealEngine()).run(normalize(test.images, test.spec))
    return CrossbarBench(model, norm_moments(net), test, train, logits, size)


def run(profile: str, *, studies: Sequence[str] = STUDIES, n_draws: int | None = None) -> pd.DataFrame:
    """All rows of the study after measuring what is missing: the first draw of every point, then the second."""
    paths.check_profile(profile)
    draws = range(SIZES[profile].n_draws if n_draws is None else n_draws)
    todo = [(point, draw) for draw in draws for point in points(profile, tuple(studies)) if point.drawn or draw == 0]
    started = said = time.perf_counter()
    for i, (point, draw) in enumerate(todo):
        rows = measure(crossbar_bench(profile, point.bits, point.per_layer), point, draw, profile)
        if rows:
            store.append(STUDY, rows, profile=profile)
        if rows and (i == 0 or time.perf_counter() - said > SAY_EVERY_S):
            said = time.perf_counter()
            shown = ", ".join(f"{row['value']:.1f}" for row in rows if row["metric"] == "acc_pct")
            print(f"[{i + 1}/{len(todo)}, {said - started:.0f} s] {point.study}: {point.effect}, {point.x:g}, "
                  f"draw {draw}: {shown} %", flush=True)  # fmt: skip
    return store.read(STUDY, profile=profile)


def measure(bench: CrossbarBench, point: Point, draw: int, profile: str) -> list[dict[str, Any]]:
    """The rows of one point and draw that are not there yet: accuracy and logit error of each correction."""
    keys = {kind: _key(bench, point, kind, draw) for kind in point.corrections}
    known = _known(profile)
    missing = [kind for kind, key in keys.items() if _short(key) not in known]
    if not missing:
        return []
    network, references = programmed(bench, point, draw)
    rows = []
    for kind in missing:
        with provenance.stopwatch() as watch:
            correct(network, bench, kind, draw, references)
            acc_pct, logit_error = judged(network, bench)
        for metric, value, unit in (("acc_pct", acc_pct, "%"), ("logit_error", logit_error, "1")):
            row = {"metric": metric, "value": value, "unit": unit, "seconds": watch.seconds}
            rows.append({**keys[kind], **row, **provenance.stamp()})
    return rows


def programmed(bench: CrossbarBench, point: Point, draw: int) -> tuple[EngineNetwork, dict[str, Reference] | None]:
    """The network on freshly programmed cells, at the point's time, and for a drifting device its readings at t0."""
    network = EngineNetwork(bench.model, SimEngine(replace(point.circuit, seed=draw)))
    images = bench.calibration(bench.size.n_calib, draw)
    if point.circuit.adc is not None and point.circuit.adc.range == "calibrated":
        network.calibrate(images, kind=None)
    if point.circuit.device.drift is None or not point.t_s:
        return network, None
    references = network.references(images)
    network.set_time(point.t_s)
    return network, references


def correct(
    network: EngineNetwork, bench: CrossbarBench, kind: str, draw: int, references: dict[str, Reference] | None
) -> None:
    """Puts one correction in force, and takes out all others; read noise starts from its first draw."""
    network.reset()
    for engine in network.engines:
        if isinstance(engine, SimEngine):
            engine.reset_noise()
    images = bench.calibration(bench.size.n_norm if kind == "bn" else bench.size.n_calib, draw)
    if kind == "bn":
        reestimate_norms(network, images, bench.moments)
    elif kind == "global" and references is not None:
        network.compensate(references, per="layer")
    elif kind != "none":
        kinds = {"global": "gain", "column": "column", "column_open": "column"}
        network.calibrate(images, kind=kinds[kind], loop="open" if kind == "column_open" else "closed")


def judged(network: EngineNetwork, bench: CrossbarBench) -> tuple[float, float]:
    """(accuracy in percent, relative L2 distance of all logits to the exact integer network's)."""
    logits = network.run(normalize(bench.test.images, bench.test.spec))
    acc_pct = evaluation_of(torch.from_numpy(logits), bench.test.labels).acc_pct
    return acc_pct, float(np.linalg.norm(logits - bench.logits) / np.linalg.norm(bench.logits))


def circuit_settings(circuit: Circuit) -> dict[str, Any]:
    """What of ``describe()`` differs from the default circuit, and its device in full; the seed is the row's own."""
    described, plain = (SimEngine(c).describe() for c in (circuit, Circuit()))
    named = {key: value for key, value in described.items() if key.startswith("device") and value is not None}
    other = {key: value for key, value in described.items() if plain.get(key, "-") != value}
    return {key: value for key, value in (other | named).items() if key not in ("seed", "t_s", "device.source")}


def _key(bench: CrossbarBench, point: Point, kind: str, draw: int) -> dict[str, Any]:
    """The columns that name one measurement."""
    n_calib = {"none": 0, "bn": bench.size.n_norm}.get(kind, bench.size.n_calib)
    fitted = point.circuit.adc is not None and point.circuit.adc.range == "calibrated"
    switches = {"study": point.study, "effect": point.effect, "x": point.x, "correction": kind, "t_s": point.t_s}
    return {
        "experiment": STUDY, "model": MODEL, "dataset": bench.test.spec.name, "method": "mse",
        "w_bits": point.bits, "a_bits": point.bits, "placement": "deploy",
        "n_calib": min(max(n_calib, bench.size.n_calib if fitted else 0), len(bench.train)),
        "seed": draw if point.drawn else -1, "n_test": len(bench.test),
        "switches": {**switches, **circuit_settings(point.circuit)},
    }  # fmt: skip


def _known(profile: str) -> set[tuple[Any, ...]]:
    """The measurements of a profile that are there."""
    return {_short(row) for row in store.read(STUDY, profile=profile).query("profile == @profile").to_dict("records")}


def _short(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What of a row tells measurements of this study apart."""
    cells = {column: rows_schema.clean_cell(column, row[column]) for column in _VARYING}
    return tuple(cells.values())


def study_rows(profile: str, study: str) -> pd.DataFrame:
    """The rows of one study with its switches as columns: study, effect, x, correction, t_s."""
    rows = unpacked(store.read(STUDY, profile=profile), "study", "effect", "x", "correction", "t_s")
    return rows.loc[rows["study"] == study].reset_index(drop=True)


def unpacked(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """``rows`` with these keys of their switches as columns."""
    found = [json.loads(text) for text in rows["switches"]]
    return rows.assign(**{name: [switches.get(name) for switches in found] for name in names})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=paths.PROFILES, default="quick")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--draws", type=int, help="draws per point (default: the profile's)")
    args = parser.parse_args()
    run(args.profile, studies=args.studies, n_draws=args.draws)


if __name__ == "__main__":
    main()
