"""Post-training quantization measured: how far one gets without training (notebook 04).

``hq study ptq_methods --profile full`` quantizes each network by each recipe at each bit width and appends accuracies
to ``ptq_methods.csv``, errors behind each block to ``ptq_errors.csv``; a killed reconstruction goes on behind its last
block. ``hq study ptq_schedule`` compares QDrop's schedules on validation images, ``hq study aciq_mse`` ACIQ's
predicted with the measured error of every tensor.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, fx

from hq_lib import data, models, ptq
from hq_lib.graph import quantize
from hq_lib.results import paths
from hq_lib.studies.bench import PUBLIC, SHIPPED, Bench, net_switch, open_bench, pictures_switch, public_weights
from hq_lib.studies.ptq import recipes
from hq_lib.studies.ptq.recipes import CHOSEN, RECIPES
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice, metric_rows
from hq_lib.training import evaluate

ERRORS = "ptq_errors"
NETS = {PUBLIC: "resnet20", SHIPPED: "resnet20", **{name: name for name in models.IMAGENET}}
"""The public ResNet-20 (option A, 91.73 %), the shipped one, and the ImageNet networks by name -> network."""
PUBLIC_FILE = "resnet20_akamaster_9173.th"
FLOAT = "float"
FIRST = ("resnet20_float_s0",)
"""The training of the shipped network, which points stand on."""
SEED = 1005
"""Of calibration images, batches and dropping in the official QDrop scripts, and here where one is enough."""
ERROR_BITS = ((4, 4), (2, 2))
"""Widths at which the error behind each block is kept."""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    nets: tuple[str, ...]
    """Keys of ``NETS``; one whose file or images are absent is n/r."""
    recipes: tuple[str, ...]
    """Keys of ``RECIPES``."""
    bits: tuple[tuple[int, int], ...]
    """(weights, activations); first and last layer have 8. At 8 bits nothing is reconstructed."""
    seeds: tuple[int, ...]
    """Of calibration images, batches and dropping."""
    iterations: int
    """Reconstruction steps a unit."""
    n_calib: int
    """Calibration images."""
    n_errors: int
    """Validation images on which the error behind each block is measured."""
    n_test: int | None = None
    """Test images; None = all."""
    root: str = ""
    """Folder of ImageNet, for its networks; "" = the sample in ``../shared/data``."""


SMOKE = ("minmax", "mse", "aciq_allocated", "brecq_fisher", "qdrop")
LIKE_OFFICIAL = ("brecq_official", "qdrop_official", "qdrop_undropped", "qdrop_adapted", "qdrop_2000")
"""Schedules that the official code was run with, for a comparison like for like; they are asked for by name."""
EVERY = tuple(name for name in RECIPES if name not in LIKE_OFFICIAL)
PLANS = {
    "smoke": Plan((SHIPPED,), SMOKE, ((4, 4),), (SEED,), 2, 32, 32, n_test=50),
    "quick": Plan((SHIPPED,), EVERY, ((4, 4), (2, 2)), (SEED,), 20, 128, 50, n_test=500),
    "full": Plan(
        (PUBLIC, SHIPPED), EVERY, ((8, 8), (4, 4), (3, 3), (2, 4), (2, 2)), (SEED, 1006, 1007), 500, 1024, 500
    ),
}


def points(plan: Plan) -> list[Point]:
    """Network by network its float line, then seed by seed and width by width each recipe; unknown ones are refused."""
    check_choice("ptq_methods", "network", plan.nets, NETS)
    check_choice("ptq_methods", "recipe", plan.recipes, RECIPES)
    found = []
    for net in plan.nets:
        named = {"model": NETS[net], "metric": "acc_pct"}
        known: Row = {"net": PUBLIC if net == PUBLIC else SHIPPED, **(_checkpoint() if net == SHIPPED else {})}
        if net not in (PUBLIC, SHIPPED):
            known |= pictures_switch(plan.root)
        after = FIRST if net == SHIPPED else ()
        key = {**named, "method": FLOAT, "switches": {**known, "recipe": FLOAT}}
        found.append(Point(f"{net}_{FLOAT}", key, bench=net, after=after, minutes=0.5))
        for seed, (w_bits, a_bits), name in product(plan.seeds, plan.bits, plan.recipes):
            recipe = RECIPES[name]
            if w_bits >= 8 and recipe.passes:
                continue
            iterations = recipe.settings.get("iterations", plan.iterations) if recipe.passes else 0
            key = {
                **named, "method": recipe.method, "w_bits": w_bits, "a_bits": a_bits, "placement": "academic",
                "n_calib": plan.n_calib, "seed": seed, "iterations": iterations,
                "switches": {**known, "recipe": name, "first_last_bits": 8, **recipe.config(iterations)},
            }  # fmt: skip
            called, minutes = f"{net}_{name}_w{w_bits}a{a_bits}_s{seed}", 0.5 + 2.0 * iterations / 500
            found.append(Point(called, key, bench=net, after=after, minutes=minutes))
    return found


def _checkpoint() -> Row:
    """The switch that tells a later shipped network from the first one."""
    later = net_switch("resnet20")
    return {"checkpoint": later["net"]} if later else {}


def open_net(run: Run[Plan], needed: Any) -> Bench | None:
    """The float network with its images; None, after a line that says why, where they cannot be had."""
    bench = open_bench(NETS[needed], n_test=run.plan.n_test, root=run.plan.root, device=run.device)
    if bench is None or needed != PUBLIC:
        return bench
    path = public_weights(PUBLIC_FILE)
    if path is None or bench.dataset != "cifar10":
        print(f"{PUBLIC}: no {PUBLIC_FILE} in {paths.checkpoints_dir()}, or no CIFAR-10, not run")
        return None
    parts = (part.normalized_by(*models.IMAGENET_MEAN_STD) for part in (bench.train, bench.val, bench.test))
    return Bench(models.resnet20_akamaster(path).eval().to(run.device), bench.record, *parts)


def measure(run: Run[Plan], bench: Bench, point: Point) -> Iterator[Found]:
    """Accuracy and loss on test images, the CPU time of the quantization, and errors behind each block."""
    if point["method"] == FLOAT:
        yield bench.accuracy(bench.net)
        return
    bits, iterations, seed = (point["w_bits"], point["a_bits"]), point["iterations"], point["seed"]
    x = recipes.calibration(bench.train, point["n_calib"], seed)
    identity = json.dumps({"experiment": run.study, **point.key}, sort_keys=True).encode()
    folder = run.folder / f"{point.name}_{hashlib.sha256(identity).hexdigest()[:10]}" if iterations else None
    started = time.process_time()
    qnet = quantize(bench.net, recipes.policy(*bits), x[:1])
    reports = recipes.fit_recipe(qnet, x, RECIPES[point["recipe"]], iterations=iterations, seed=seed, folder=folder)
    spent = {} if any(report.resumed for report in reports) else {"calibration_cpu_s": time.process_time() - started}
    score = evaluate(qnet, bench.test, batch_size=bench.eval_batch)
    if bits in ERROR_BITS:
        yield from _errors(point.key, qnet, bench, x, run.plan.n_errors)
    values = {"loss": score.loss, **spent, "acc_pct": score.acc_pct}  # unknown is what an earlier process has spent
    yield from metric_rows(values, dataset=bench.dataset, n_test=score.n)


def _errors(key: Row, qnet: fx.GraphModule, bench: Bench, x: Tensor, n: int) -> Iterator[Found]:
    """Relative squared error behind each block on ``n`` validation images (ImageNet: test images)."""
    images = bench.val or bench.test
    images = images.subset(list(range(0, len(images), max(1, len(images) // n)))[:n])
    reference = quantize(bench.net, recipes.policy(key["w_bits"], key["a_bits"]), x[:1])
    errors = ptq.block_errors(qnet, reference, data.normalize(images.images, images.spec))
    for position, (name, error) in enumerate(errors):
        where = {**key["switches"], "block": name, "position": position}
        yield ERRORS, {"experiment": ERRORS, "dataset": bench.dataset, "metric": "rel_error", "value": error,
                       "n_test": len(images), "switches": where}  # fmt: skip


METHODS = Study(
    "ptq_methods", PLANS, points=points, open_bench=open_net, measure=measure, gpu=True, unkeyed=("n_test", "n_errors")
)


@dataclass(frozen=True)
class SchedulePlan:
    """Which of QDrop's schedules are compared, at W2A2."""

    schedules: tuple[Mapping[str, float], ...]
    """travel (rounding rate x iterations; published: 1e-3 x 20,000 = 20), beta_start (first exponent), others."""
    iterations: int
    """See ``Plan``."""
    n_calib: int
    """Calibration images."""
    n_val: int | None = None
    """Validation images; None = all."""


MILD = {"travel": 5.0, "beta_start": 20.0}
OTHERS = ({"travel": 25.0, "beta_start": 20.0}, {"travel": 50.0, "beta_start": 8.0}, {**CHOSEN, "step_lr": 5e-4})
SCHEDULES = {
    "smoke": SchedulePlan((CHOSEN,), 2, 32, 50),
    "quick": SchedulePlan((MILD, CHOSEN), 20, 128, 500),
    "full": SchedulePlan((MILD, CHOSEN, *OTHERS), 500, 1024),
}


def schedule_points(plan: SchedulePlan) -> list[Point]:
    """Every schedule, called e.g. ``schedule_travel25_beta_start8_s1005``."""
    found = []
    for schedule in plan.schedules:
        switches = {"net": SHIPPED, "split": "val", "first_last_bits": 8, **_checkpoint(), **schedule}
        key = {
            "model": "resnet20", "method": "qdrop", "w_bits": 2, "a_bits": 2, "placement": "academic",
            "n_calib": plan.n_calib, "seed": SEED, "metric": "acc_pct", "iterations": plan.iterations,
            "switches": switches,
        }  # fmt: skip
        name = "_".join(["schedule", *(f"{k}{v:g}" for k, v in schedule.items()), f"s{SEED}"])
        found.append(Point(name, key, schedule, after=FIRST))
    return found


def measure_schedule(run: Run[SchedulePlan], bench: Bench, point: Point) -> Iterator[Found]:
    """Accuracy on validation images, none of which calibrates; today's float network was trained on them.

    Test images play no part.
    """
    plan = run.plan
    x = recipes.calibration(bench.train, plan.n_calib, SEED)
    how = {"iterations": plan.iterations, "seed": SEED, **recipes.rated(point.what, plan.iterations)}
    qnet = recipes.quantized(bench.net, x, RECIPES["qdrop"], (2, 2), **how)
    score = evaluate(qnet, bench.val.drawn(plan.n_val or len(bench.val), 0))
    yield {"dataset": bench.dataset, "value": score.acc_pct, "n_test": score.n}


def _shipped(run: Run[Any], _needed: Any) -> Bench | None:
    return open_bench("resnet20", n_test=1, device=run.device)


SCHEDULE = Study(
    "ptq_schedule",
    SCHEDULES,
    points=schedule_points,
    open_bench=_shipped,
    measure=measure_schedule,
    gpu=True,
    unkeyed=("n_val",),
)


@dataclass(frozen=True)
class AciqPlan:
    """At which widths ACIQ's prediction is compared with the error of the shipped network's tensors."""

    bits: tuple[int, ...]
    """Of each tensor's grid."""
    n_calib: int = 256
    """Calibration images, whose activations are quantized."""


ACIQ_PLANS = {"smoke": AciqPlan((2, 4), 32), "quick": AciqPlan((2, 3, 4, 8)), "full": AciqPlan((2, 3, 4, 8))}


def aciq_points(plan: AciqPlan) -> list[Point]:
    """All tensors at each width; the rows of the activations stand for all."""
    key = {
        "model": "resnet20", "method": "aciq", "n_calib": plan.n_calib, "seed": SEED, "metric": recipes.MSE[0],
        "w_bits": 32, **{f"switches.{name}": value for name, value in _checkpoint().items()},
    }  # fmt: skip
    return [Point(f"aciq_{bits}bit", {**key, "a_bits": bits}, after=FIRST) for bits in plan.bits]


def measure_aciq(run: Run[AciqPlan], bench: Bench, point: Point) -> Iterator[Found]:
    """Measured and predicted error of every activation after a ReLU and of every weight, norms folded."""
    bits = point["a_bits"]
    x = recipes.calibration(bench.train, run.plan.n_calib, SEED)
    for kind, name, values in recipes.tensors(bench.net, x):
        found = recipes.aciq_errors(values, bits=bits, relu=kind == "activation")
        width = {"a_bits": bits} if kind == "activation" else {"w_bits": bits, "a_bits": 32}
        switches = {"net": SHIPPED, **_checkpoint(), "tensor": kind, "layer": name, "prior": found.pop("prior")}
        yield from metric_rows(found, **width, dataset=bench.dataset, switches=switches)


ACIQ = Study("aciq_mse", ACIQ_PLANS, points=aciq_points, open_bench=_shipped, measure=measure_aciq, gpu=True)
STUDIES = (ACIQ, SCHEDULE, METHODS)
