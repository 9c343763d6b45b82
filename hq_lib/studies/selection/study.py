"""Does choosing smooth calibration images help beyond the luck of a random draw (notebook 05).

A point is one calibration set, taken from the candidates of a draw, reconstructed and judged once. Ways of choosing are
paired by draw: same candidates, same seed of the reconstruction. ``hq study selection_study --profile full`` measures
the shipped ResNet-20 and appends to ``selection_study.csv``, what a set scores to ``selection_sets.csv``, its manifest
into the folder of runs; ``hq study selection_imagenet`` does so for ImageNet networks, by default their ranges alone,
which is what a large net on a CPU can afford.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hq_lib import data, models
from hq_lib.data import ImageSet
from hq_lib.ptq import selection
from hq_lib.studies.bench import net_switch, open_bench, open_imagenet
from hq_lib.studies.ptq import recipes
from hq_lib.studies.ptq.recipes import RECIPES
from hq_lib.studies.selection.sets import CHOICES, NETWORK_METRICS, SMOOTH, Pool
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice
from hq_lib.training import evaluate, predict

Bits = tuple[int, int]
SETS = "selection_sets"
SHIPPED, FLOAT = "resnet20", "float"
LOWEST: Bits = (2, 2)
"""of the main comparison: the width most sensitive to the calibration set"""
METHODS = ("qdrop", "brecq")
SCHEDULE = {"travel": 20.0, "beta_start": 8.0}
"""rounding rate x iterations as published (1e-3 x 20,000), kept for short budgets"""
BATCH_SIZE = 16
SETTINGS = {"first_last_bits": 8, "range_images": recipes.RANGE_IMAGES}
"""switches that every row shares"""
STEPS = {"batch_size": BATCH_SIZE, "beta_start": SCHEDULE["beta_start"]}
"""switches of a reconstruction"""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    nets: tuple[str, ...]
    """"resnet20" (shipped, CIFAR-10) or ImageNet networks by name; one whose weights or images are absent is n/r."""
    n_calib: int
    """Images of a set."""
    n_pool: int
    """Candidates of a draw."""
    iterations: int
    """Reconstruction steps a block."""
    choices: tuple[str, ...] = ("random", SMOOTH)
    """Ways of choosing (keys of ``CHOICES``) that QDrop compares at ``LOWEST``."""
    n_draws: int = 0
    """Draws of each of them."""
    n_random: int = 0
    """Draws of the random baseline there."""
    widths: tuple[Bits, ...] = ((4, 4), (3, 3), (2, 4))
    """Where QDrop and BRECQ compare smoothest with random, besides ``LOWEST``."""
    n_draws_bits: int = 0
    """Draws of that comparison."""
    ns: tuple[int, ...] = ()
    """Numbers of images compared; the candidates are as many as the largest."""
    ns_replaced: tuple[int, ...] = ()
    """Those of them that are drawn with replacement too: images, and batches."""
    n_draws_n: int = 0
    """Draws of that comparison."""
    budgets: tuple[int, ...] = ()
    """Iterations compared on held-out images: how the study's own were fixed."""
    n_reseeds: int = 0
    """Other seeds of the reconstruction of one set: the luck that is not the draw's."""
    ranges: tuple[tuple[str, Bits, int], ...] = ()
    """(ranges, bits, draws): smoothest against random without reconstruction."""
    n_common: int = 0
    """Held-out images on which the losses of all sets are compared."""
    n_test: int | None = None
    """Test images; None = all."""
    root: str = ""
    """Folder of ImageNet, for its networks; "" = the sample in ``../shared/data``."""


SIX = ("random", SMOOTH, "tv_highest", "roughness_lowest", "block_error_lowest", "herding")
ALL = (*SIX, "random_unbalanced", "tv_trimmed", "knowledge_lowest", "k_center")
LITE = ("efficientnet_lite0",)
PLANS = {
    "smoke": Plan((SHIPPED,), 16, 64, 1, n_draws=1, n_random=1, ns=(16, 32), n_draws_n=1, budgets=(1,), n_common=50,
                  n_test=100),
    "quick": Plan((SHIPPED,), 64, 640, 20, SIX, 2, 3, n_draws_bits=1, ns=(16, 64, 256), ns_replaced=(64,),
                  n_draws_n=1, budgets=(0, 5, 20), n_common=250, n_test=500),
    "full": Plan((SHIPPED,), 256, 4096, 100, ALL, 5, 10, n_draws_bits=3, ns=(32, 64, 128, 256, 1024),
                 ns_replaced=(64, 1024), n_draws_n=3, budgets=(0, 25, 50, 100, 200, 400), n_reseeds=3, n_common=1000),
}  # fmt: skip
IMAGENET_PLANS = {
    "smoke": Plan(LITE, 16, 40, 2, ranges=(("minmax", (8, 8), 1),), n_common=10, n_test=20),
    "quick": Plan(LITE, 32, 200, 10, ranges=(("minmax", (4, 8), 1),), n_common=20, n_test=50),
    "full": Plan(LITE, 64, 400, 20_000, ranges=(("minmax", (8, 8), 1), ("minmax", (4, 8), 1), ("mse", (8, 8), 1),
                                                ("mse", (4, 8), 3), ("mse", (4, 4), 1)), n_common=50),
}  # fmt: skip


@dataclass(frozen=True)
class Calibration(Point):
    """One calibration set, quantized with once; or (method "float") the network as it was."""

    plan: Plan = field(repr=False, compare=False)
    """What all points share."""
    net: str
    """See ``Plan``."""
    choice: str = ""
    """Key of ``CHOICES``."""
    n_calib: int = 0
    """Images."""
    n_pool: int = 0
    """Candidates that it is chosen from."""
    draw: int = 0
    """Seed of pool, choice and (unless ``run_seed`` says otherwise) reconstruction."""
    iterations: int = 0
    """Steps a block (BRECQ: and a quarter more for the activation steps)."""
    method: str = "qdrop"
    """"qdrop", "brecq", or ranges alone: "mse", "minmax"."""
    bits: Bits = LOWEST
    """Of weights and activations."""
    batch_sampling: str = "without_replacement"
    """How batches are drawn from the set."""
    run_seed: int | None = None
    """Seed of the reconstruction alone."""
    split: str = "test"
    """What it is judged on: "test", or "common" where something is chosen by it."""

    @property
    def altered(self) -> Row:
        """The switches in which it departs from the main comparison."""
        usual = {"batch_sampling": "without_replacement", "run_seed": None, "split": "test"}
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    @property
    def name(self) -> str:
        """E.g. ``resnet20_qdrop_w2a2_tv_lowest_n256_of4096_i100_d0``."""
        if self.method == FLOAT:
            return f"{self.net}_{FLOAT}"
        how = f"{self.net}_{self.method}_w{self.bits[0]}a{self.bits[1]}_{self.choice}_n{self.n_calib}_of{self.n_pool}"
        return "_".join([how, f"i{self.iterations}", f"d{self.draw}", *map(str, self.altered.values())])

    @property
    def unit(self) -> str:
        """All points of one pool of candidates, so that its scores and features are computed once."""
        return f"{self.net}_draw{self.draw}_of{self.n_pool}"

    @property
    def bench(self) -> Hashable:
        """Network and candidates."""
        return self.net, self.n_pool, self.draw

    @property
    def after(self) -> tuple[str, ...]:
        """The network that is quantized."""
        return (f"{SHIPPED}_float_s0",) if self.net == SHIPPED else ()

    @property
    def minutes(self) -> float:
        """Rough cost."""
        return 0.2 + self.iterations / 200


def points(plan: Plan) -> list[Calibration]:
    """Every point once, those of one pool adjoining, by draw, so that a cut run is whole; unknown names are refused."""
    check_choice("selection", "way of choosing", plan.choices, CHOICES)
    check_choice("selection", "network", plan.nets, (SHIPPED, *models.imagenet_names()))
    found: list[Calibration] = []
    for net in plan.nets:
        made = dict.fromkeys(_points_of(plan, net))
        found += sorted(made, key=lambda point: (point.draw, -point.n_pool))
    return found


def _points_of(plan: Plan, net: str) -> Iterator[Calibration]:
    def made(choice: str, draw: int, **changes: Any) -> Calibration:
        main = {"n_calib": plan.n_calib, "n_pool": plan.n_pool, "iterations": plan.iterations}
        return Calibration(plan, net, choice, draw=draw, **{**main, **changes})

    yield Calibration(plan, net, n_pool=plan.n_pool, method=FLOAT, bits=(32, 32))
    for iterations in plan.budgets:
        yield made("random", 0, iterations=iterations, method="qdrop" if iterations else "mse", split="common")
    for draw in range(plan.n_random):
        for choice in plan.choices if draw < plan.n_draws else ("random",):
            yield made(choice, draw)
    for draw in range(plan.n_draws_bits):
        for method in METHODS:
            for bits in (LOWEST, *plan.widths):
                for choice in ("random", SMOOTH):
                    yield made(choice, draw, method=method, bits=bits)
    for draw in range(plan.n_draws_n):
        for n in plan.ns:
            of = {"n_calib": n, "n_pool": max(plan.ns)}
            yield made("random_unbalanced", draw, **of)
            if n in plan.ns_replaced:
                yield made("random_repeated", draw, **of)
                yield made("random_unbalanced", draw, **of, batch_sampling="with_replacement")
    for seed in range(plan.n_reseeds):
        yield made("random", 0, run_seed=1000 + seed)
    for method, bits, n_draws in plan.ranges:
        for draw in range(n_draws):
            for choice in ("random", SMOOTH):
                yield made(choice, draw, iterations=0, method=method, bits=bits)


def key(run: Run[Plan], point: Calibration) -> Row:
    """What names a set's rows: network, method, bits, images, draw, budget, and how it was chosen."""
    images = {"images": run.plan.root.rstrip("/").rsplit("/", 1)[-1]} if run.plan.root else {}
    switches: Row = {**(net_switch(SHIPPED) if point.net == SHIPPED else images)}
    named = {"experiment": run.study, "model": point.net, "method": point.method, "metric": "acc_pct"}
    if point.method == FLOAT:
        return {**named, "switches": switches}
    switches |= {"choice": point.choice, "n_pool": point.n_pool, **SETTINGS, **point.altered}
    if point.iterations:
        switches |= {**STEPS, "rounding_lr": recipes.rated(SCHEDULE, point.iterations)["rounding_lr"]}
    return {
        **named, "w_bits": point.bits[0], "a_bits": point.bits[1], "placement": "academic", "n_calib": point.n_calib,
        "seed": point.draw, "iterations": point.iterations, "switches": switches,
    }  # fmt: skip


def open_pool(run: Run[Plan], needed: Any) -> Pool | None:
    """Network, images and the candidates of a draw; None, after a line that says why, where they cannot be had."""
    (net, n_pool, draw), plan = needed, run.plan
    if net == SHIPPED:
        bench = open_bench(net, n_test=plan.n_test, device=run.device)
    else:
        bench = open_imagenet(net, root=plan.root, n_val=plan.n_common, n_test=plan.n_test, device=run.device)
    if bench is not None and n_pool > len(bench.train):
        print(f"{net}: {n_pool} candidates wanted, {bench.dataset} has {len(bench.train)} images, draw {draw} not run")
        return None
    return bench and Pool(bench, n_pool, draw, n_common=plan.n_common)


def measure(run: Run[Plan], pool: Pool, point: Calibration) -> Iterator[Found]:
    """Accuracy, then the squared error of the logits on a set's own and on common images."""
    bench = pool.bench
    if point.method == FLOAT:
        score = evaluate(bench.net, bench.test, batch_size=bench.eval_batch)
        yield {"dataset": bench.dataset, "value": score.acc_pct, "unit": "%", "n_test": score.n}
        return
    chosen = calibration_set(run, pool, point)
    x = data.normalize(chosen.images, chosen.spec).contiguous().to(run.device)
    seed = point.draw if point.run_seed is None else point.run_seed
    qnet = recipes.quantized(
        bench.net, x, RECIPES[point.method], point.bits, iterations=point.iterations, seed=seed,
        batch_sampling=point.batch_sampling, batch_size=min(BATCH_SIZE, len(x)),
        **recipes.rated(SCHEDULE, point.iterations),
    )  # fmt: skip
    if point.method == "qdrop" and point.bits == LOWEST and not point.altered and point.choice != "random_repeated":
        yield from _scores(pool, point)
    score = evaluate(qnet, bench.test if point.split == "test" else pool.common, batch_size=bench.eval_batch)
    own, common = logit_loss(pool, qnet, chosen), logit_loss(pool, qnet, pool.common)
    values = {
        "acc_pct": (score.acc_pct, "%", score.n),
        "loss_own": (own, "1", len(chosen)),
        "loss_common": (common, "1", len(pool.common)),
    }
    for metric, (value, unit, n) in values.items():
        yield {"dataset": bench.dataset, "metric": metric, "value": value, "unit": unit, "n_test": n}


def calibration_set(run: Run[Plan], pool: Pool, point: Calibration) -> ImageSet:
    """The images of a point, taken through its manifest: hashes verified, short or repeated sets refused.

    Draws with replacement have no manifest; their rows say so.
    """
    chosen = pool.choose(point.choice, point.n_calib)
    if point.choice == "random_repeated":
        return pool.images.subset(chosen)
    name = f"{pool.bench.dataset}_{point.choice}_n{point.n_calib}_of{point.n_pool}_s{point.draw}.json"
    file = run.folder / "manifests" / name
    if not file.exists():
        selection.write(pool.manifest(point.choice, chosen), file)
    return selection.take(selection.read(file), pool.bench.train)


def logit_loss(pool: Pool, qnet: nn.Module, images: ImageSet) -> float:
    """Mean over images of sum_classes (logit of ``qnet`` - float logit)^2: the last layer's reconstruction loss."""
    net, size = pool.bench.net, pool.bench.eval_batch
    target = pool.common_logits if images is pool.common else predict(net, images, batch_size=size)
    return (predict(qnet, images, batch_size=size) - target).square().sum(1).mean().item()


def _scores(pool: Pool, point: Calibration) -> Iterator[Found]:
    """The mean score of a set's images in every metric, for ``SETS``."""
    plain = {"experiment": SETS, "dataset": pool.bench.dataset, "method": FLOAT, "w_bits": 32, "a_bits": 32}
    plain |= {"placement": "-", "iterations": 0, "unit": "1"}
    switches = {"choice": point.choice, "n_pool": point.n_pool}
    chosen = pool.choose(point.choice, point.n_calib)
    for metric in (*selection.METRICS, *NETWORK_METRICS):
        unit = {"unit": "nat"} if metric == "entropy" else {}
        value = pool.scores(metric)[chosen].mean().item()
        yield SETS, {**plain, **unit, "metric": f"set_{metric}", "value": value, "switches": switches}


STUDY, IMAGENET = (
    Study(name, plans, points=points, key=key, open_bench=open_pool, measure=measure)
    for name, plans in (("selection_study", PLANS), ("selection_imagenet", IMAGENET_PLANS))
)
STUDIES = (STUDY, IMAGENET)
