"""Post-training quantization measured: how far one gets without training (notebook 04).

``hq study ptq_methods --profile full`` quantizes each network by each recipe at each bit width and appends accuracies
to ``ptq_methods.csv``, errors behind each block to ``ptq_errors.csv``; a killed reconstruction goes on behind its last
block. ``hq study ptq_schedule`` compares QDrop's schedules on validation images, ``hq study aciq_mse`` ACIQ's
predicted with the measured error of every tensor.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from hq_lib import data, models, ptq
from hq_lib.graph import quantize
from hq_lib.results import paths
from hq_lib.studies.bench import Bench, net_switch, open_bench, open_imagenet, public_weights
from hq_lib.studies.ptq import recipes
from hq_lib.studies.ptq.recipes import CHOSEN, LEARNED, NEAREST, RECIPES, Recipe
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice
from hq_lib.training import evaluate

ERRORS = "ptq_errors"
PUBLIC, SHIPPED = "public", "shipped"
NETS = {PUBLIC: "resnet20", SHIPPED: "resnet20", **{name: name for name in models.imagenet_names()}}
"""The public ResNet-20 (option A, 91.73 %), the shipped one, and the ImageNet networks by name -> network."""
PUBLIC_FILE = "resnet20_akamaster_9173.th"
FLOAT = "float"
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
    """Of calibration images, batches and dropping; 1005 is that of the official QDrop scripts."""
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
EVERY = (*NEAREST, *LEARNED)
PLANS = {
    "smoke": Plan((SHIPPED,), SMOKE, ((4, 4),), (1005,), 2, 32, 32, n_test=100),
    "quick": Plan((SHIPPED,), EVERY, ((4, 4), (2, 2)), (1005,), 60, 256, 200, n_test=1_000),
    "full": Plan(
        (PUBLIC, SHIPPED), EVERY, ((8, 8), (4, 4), (3, 3), (2, 4), (2, 2)), (1005, 1006, 1007), 500, 1024, 500
    ),
}


@dataclass(frozen=True)
class Quantization(Point):
    """One network quantized by one recipe, or (recipe "float") as it was."""

    plan: Plan
    """What all points share."""
    net: str
    """Key of ``NETS``."""
    recipe: str = FLOAT
    """Key of ``RECIPES``."""
    bits: tuple[int, int] = (32, 32)
    """Of weights and activations."""
    seed: int = -1
    """See ``Plan``."""

    @property
    def name(self) -> str:
        """E.g. ``public_qdrop_w2a2_s1005``."""
        tail = "" if self.recipe == FLOAT else f"_w{self.bits[0]}a{self.bits[1]}_s{self.seed}"
        return f"{self.net}_{self.recipe}{tail}"

    @property
    def bench(self) -> Hashable:
        """The float network."""
        return self.net

    @property
    def after(self) -> tuple[str, ...]:
        """The float network that it starts from."""
        return ("resnet20_float_s0",) if self.net == SHIPPED else ()

    @property
    def iterations(self) -> int:
        """Steps a unit; 0 where nothing is reconstructed."""
        if self.recipe == FLOAT or RECIPES[self.recipe].passes is None:
            return 0
        return RECIPES[self.recipe].settings.get("iterations", self.plan.iterations)

    @property
    def minutes(self) -> float:
        """Rough cost."""
        return 0.5 + 2.0 * self.iterations / 500


def points(plan: Plan) -> list[Quantization]:
    """Network by network its float line, then seed by seed and width by width each recipe; unknown ones are refused."""
    check_choice("ptq_methods", "network", plan.nets, NETS)
    check_choice("ptq_methods", "recipe", plan.recipes, RECIPES)
    found = []
    for net in plan.nets:
        found += [Quantization(plan, net)] + [
            Quantization(plan, net, recipe, (int(w_bits), int(a_bits)), seed)
            for seed in plan.seeds
            for w_bits, a_bits in plan.bits
            for recipe in plan.recipes
            if w_bits < 8 or RECIPES[recipe].passes is None
        ]
    return found


def key(run: Run[Any], point: Quantization) -> Row:
    """What names a measurement: network, recipe with its settings, bits, images, budget and seed."""
    net = PUBLIC if point.net == PUBLIC else SHIPPED
    switches: Row = {"net": net, "recipe": point.recipe, **(_checkpoint() if point.net == SHIPPED else {})}
    if point.net not in (PUBLIC, SHIPPED) and point.plan.root:
        switches["images"] = Path(point.plan.root).name
    named = {"experiment": run.study, "model": NETS[point.net], "metric": "acc_pct"}
    if point.recipe == FLOAT:
        return {**named, "method": FLOAT, "switches": switches}
    recipe = RECIPES[point.recipe]
    return {
        **named, "method": recipe.method, "w_bits": point.bits[0], "a_bits": point.bits[1], "placement": "academic",
        "n_calib": point.plan.n_calib, "seed": point.seed, "iterations": point.iterations,
        "switches": {**switches, "first_last_bits": 8, **recipe.config(point.iterations)},
    }  # fmt: skip


def _checkpoint() -> Row:
    """The switch that tells a later shipped network from the first one."""
    later = net_switch("resnet20")
    return {"checkpoint": later["net"]} if later else {}


def open_net(run: Run[Plan], needed: Hashable) -> Bench | None:
    """The float network with its images; None, after a line that says why, where they cannot be had."""
    plan = run.plan
    if needed not in (PUBLIC, SHIPPED):
        bench = open_imagenet(str(needed), root=plan.root, n_test=plan.n_test, device=run.device)
        return bench and dataclasses.replace(bench, val=bench.test)
    bench = open_bench("resnet20", n_test=plan.n_test, device=run.device)
    if bench is None or needed == SHIPPED:
        return bench
    path = public_weights(PUBLIC_FILE)
    if path is None or bench.dataset != "cifar10":
        print(f"{PUBLIC}: no {PUBLIC_FILE} in {paths.checkpoints_dir()}, or no CIFAR-10, not run")
        return None
    parts = (part.normalized_by(*models.IMAGENET_MEAN_STD) for part in (bench.train, bench.val, bench.test))
    return Bench(models.resnet20_akamaster(path).eval().to(run.device), bench.record, *parts)


def measure(run: Run[Plan], bench: Bench, point: Quantization) -> Iterator[Found]:
    """Accuracy and loss on test images, the CPU time of the quantization, and errors behind each block."""
    if point.recipe == FLOAT:
        score = evaluate(bench.net, bench.test, batch_size=bench.eval_batch)
        yield {"dataset": bench.dataset, "value": score.acc_pct, "unit": "%", "n_test": score.n}
        return
    plan, reporter = point.plan, Reporter()
    x = recipes.calibration(bench.train, plan.n_calib, point.seed)
    folder = _folder(run, point) if point.iterations else None
    started = time.process_time()
    qnet = recipes.quantized(bench.net, x, RECIPES[point.recipe], point.bits, iterations=point.iterations,
                             seed=point.seed, folder=folder, progress=reporter)  # fmt: skip
    cpu = time.process_time() - started
    score = evaluate(qnet, bench.test, batch_size=bench.eval_batch)
    if point.bits in ERROR_BITS:
        yield from _errors(key(run, point), qnet, bench, x, plan.n_errors)
    values = {"loss": (score.loss, "nat"), "calibration_cpu_s": (cpu, "s"), "acc_pct": (score.acc_pct, "%")}
    if reporter.resumed:  # what an earlier process spent is not known
        del values["calibration_cpu_s"]
    for metric, (value, unit) in values.items():
        yield {"dataset": bench.dataset, "metric": metric, "value": value, "unit": unit, "n_test": score.n}


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


def _folder(run: Run[Plan], point: Quantization) -> Path:
    text = json.dumps(key(run, point), sort_keys=True)
    return run.folder / f"{point.name}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _errors(key: Row, qnet: fx.GraphModule, bench: Bench, x: Tensor, n: int) -> Iterator[Found]:
    """Relative squared error behind each block on ``n`` validation images (ImageNet: test images)."""
    images = bench.val.balanced(len(bench.val), 0) if bench.val is not bench.test else bench.val
    images = images.subset(list(range(0, len(images), max(1, len(images) // n)))[:n])
    reference = quantize(bench.net, recipes.policy(key["w_bits"], key["a_bits"]), x[:1])
    for error in ptq.block_errors(qnet, reference, data.normalize(images.images, images.spec)):
        where = {**key["switches"], "block": error.name, "position": error.position}
        yield ERRORS, {"experiment": ERRORS, "dataset": bench.dataset, "metric": "rel_error", "value": error.error,
                       "unit": "1", "n_test": len(images), "switches": where}  # fmt: skip


METHODS = Study("ptq_methods", PLANS, points=points, key=key, open_bench=open_net, measure=measure, gpu=True)


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
    seeds: tuple[int, ...] = (1005,)
    """See ``Plan``."""


MILD = {"travel": 5.0, "beta_start": 20.0}
OTHERS = ({"travel": 25.0, "beta_start": 20.0}, {"travel": 50.0, "beta_start": 8.0}, {**CHOSEN, "step_lr": 5e-4})
SCHEDULES = {
    "smoke": SchedulePlan((CHOSEN,), 2, 32, 100),
    "quick": SchedulePlan((MILD, CHOSEN), 60, 256, 1_000),
    "full": SchedulePlan((MILD, CHOSEN, *OTHERS), 500, 1024),
}


@dataclass(frozen=True)
class Scheduling(Point):
    """The shipped network quantized by QDrop at W2A2 with one schedule."""

    plan: SchedulePlan
    """What all points share."""
    schedule: Mapping[str, float]
    """See ``SchedulePlan``."""
    seed: int
    """See ``Plan``."""

    @property
    def name(self) -> str:
        """E.g. ``schedule_travel25_beta_start8_s1005``."""
        return "_".join(["schedule", *(f"{k}{v:g}" for k, v in self.schedule.items()), f"s{self.seed}"])

    @property
    def after(self) -> tuple[str, ...]:
        """The float network that it starts from."""
        return ("resnet20_float_s0",)


def schedule_points(plan: SchedulePlan) -> list[Scheduling]:
    """Every schedule with every seed."""
    return [Scheduling(plan, schedule, seed) for seed in plan.seeds for schedule in plan.schedules]


def schedule_key(run: Run[SchedulePlan], point: Scheduling) -> Row:
    """What names a schedule in the rows."""
    return {
        "experiment": run.study, "model": "resnet20", "method": "qdrop", "w_bits": 2, "a_bits": 2,
        "placement": "academic", "n_calib": point.plan.n_calib, "seed": point.seed, "metric": "acc_pct",
        "iterations": point.plan.iterations,
        "switches": {"net": SHIPPED, "split": "val", "first_last_bits": 8, **_checkpoint(), **point.schedule},
    }  # fmt: skip


def measure_schedule(run: Run[SchedulePlan], bench: Bench, point: Scheduling) -> Iterator[Found]:
    """Accuracy on validation images, which were held out of the network's training; test images play no part."""
    plan, n = point.plan, point.plan.n_val
    val = bench.val if n is None or n >= len(bench.val) else bench.val.balanced(n, 0)
    settings = recipes.rated(point.schedule, plan.iterations)
    recipe = Recipe("qdrop", "schedule", passes=ptq.qdrop, settings=settings)
    x = recipes.calibration(bench.train, plan.n_calib, point.seed)
    qnet = recipes.quantized(bench.net, x, recipe, (2, 2), iterations=plan.iterations, seed=point.seed)
    score = evaluate(qnet, val)
    yield {"dataset": bench.dataset, "value": score.acc_pct, "unit": "%", "n_test": score.n}


def _shipped(run: Run[Any], _needed: Hashable) -> Bench | None:
    return open_bench("resnet20", n_test=1, device=run.device)


SCHEDULE = Study(
    "ptq_schedule", SCHEDULES, points=schedule_points, key=schedule_key, measure=measure_schedule,
    open_bench=_shipped,
)  # fmt: skip


@dataclass(frozen=True)
class AciqPlan:
    """At which widths ACIQ's prediction is compared with the error of the shipped network's tensors."""

    bits: tuple[int, ...]
    """Of each tensor's grid."""
    n_calib: int = 256
    """Calibration images, whose activations are quantized."""
    seed: int = 1005
    """Of those images."""


ACIQ_PLANS = {"smoke": AciqPlan((2, 4), 32), "quick": AciqPlan((2, 3, 4, 8)), "full": AciqPlan((2, 3, 4, 8))}


@dataclass(frozen=True)
class Predicting(Point):
    """All tensors of the shipped network at one width."""

    plan: AciqPlan
    """What all points share."""
    bits: int
    """Of each tensor's grid."""

    @property
    def name(self) -> str:
        """E.g. ``aciq_4bit``."""
        return f"aciq_{self.bits}bit"

    @property
    def after(self) -> tuple[str, ...]:
        """The network whose tensors they are."""
        return ("resnet20_float_s0",)


def aciq_key(run: Run[AciqPlan], point: Predicting) -> Row:
    """What names a width in the rows: those of its activations stand for all."""
    return {
        "experiment": run.study, "model": "resnet20", "method": "aciq", "w_bits": 32, "a_bits": point.bits,
        "n_calib": point.plan.n_calib, "seed": point.plan.seed, "metric": recipes.MSE[0],
    }  # fmt: skip


def measure_aciq(run: Run[AciqPlan], bench: Bench, point: Predicting) -> Iterator[Found]:
    """Measured and predicted error of every activation after a ReLU and of every weight, norms folded."""
    x = recipes.calibration(bench.train, point.plan.n_calib, point.plan.seed)
    for kind, name, values in recipes.tensors(bench.net, x):
        found = recipes.aciq_errors(values, bits=point.bits, relu=kind == "activation")
        width = {"a_bits": point.bits} if kind == "activation" else {"w_bits": point.bits, "a_bits": 32}
        switches = {"net": SHIPPED, "tensor": kind, "layer": name, "prior": found.pop("prior")}
        for metric in recipes.MSE:
            yield {**width, "dataset": bench.dataset, "metric": metric, "value": found[metric], "unit": "1",
                   "switches": switches}  # fmt: skip


ACIQ = Study("aciq_mse", ACIQ_PLANS, points=lambda plan: [Predicting(plan, b) for b in plan.bits], key=aciq_key,
             open_bench=_shipped, measure=measure_aciq)  # fmt: skip
STUDIES = (ACIQ, SCHEDULE, METHODS)
