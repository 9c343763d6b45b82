"""Does choosing smooth calibration images help beyond the luck of a random draw (notebook 05).

A point is one calibration set, taken from the candidates of a draw, reconstructed and judged once. Ways of choosing are
paired by draw: same candidates, same seed of the reconstruction. ``hq study selection_study --profile full`` measures
the shipped ResNet-20 and appends to ``selection_study.csv``, what a set scores to ``selection_sets.csv``, its manifest
into the folder of runs; ``hq study selection_imagenet`` does so for ImageNet networks, by default their ranges alone,
which is what a large net on a CPU can afford.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
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
METHODS, PAIR = ("qdrop", "brecq"), ("random", SMOOTH)
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
    "smoke": Plan((SHIPPED,), 16, 40, 1, n_draws=1, n_random=1, ns=(16, 32), n_draws_n=1, budgets=(1,), n_common=20,
                  n_test=40),
    "quick": Plan((SHIPPED,), 64, 320, 10, SIX, 2, 2, n_draws_bits=1, ns=(16, 64, 256), n_draws_n=1,
                  budgets=(0, 10), n_common=100, n_test=250),
    "full": Plan((SHIPPED,), 256, 4096, 100, ALL, 5, 10, n_draws_bits=3, ns=(32, 64, 128, 256, 1024),
                 ns_replaced=(64, 1024), n_draws_n=3, budgets=(0, 25, 50, 100, 200, 400), n_reseeds=3, n_common=1000),
}  # fmt: skip
IMAGENET_PLANS = {
    "smoke": Plan(LITE, 8, 16, 2, ranges=(("minmax", (8, 8), 1),), n_common=4, n_test=8),
    "quick": Plan(LITE, 16, 64, 10, ranges=(("minmax", (4, 8), 1),), n_common=10, n_test=40),
    "full": Plan(LITE, 64, 400, 20_000, ranges=(("minmax", (8, 8), 1), ("minmax", (4, 8), 1), ("mse", (8, 8), 1),
                                                ("mse", (4, 8), 3), ("mse", (4, 4), 1)), n_common=50),
}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """One calibration set, quantized with once."""

    net: str
    """See ``Plan``."""
    choice: str
    """Key of ``CHOICES``."""
    n_calib: int
    """Images."""
    n_pool: int
    """Candidates that it is chosen from."""
    draw: int
    """Seed of pool, choice and (unless ``run_seed`` says otherwise) reconstruction."""
    iterations: int
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

    def point(self, known: Row) -> Point:
        """``known``: the switches that name network and images. All points of one pool are a unit, so that its scores
        and features are computed once; the name is e.g. ``resnet20_qdrop_w2a2_tv_lowest_n256_of4096_i100_d0``."""
        switches = {**known, "choice": self.choice, "n_pool": self.n_pool, **SETTINGS, **self.altered}
        if self.iterations:
            switches |= {**STEPS, "rounding_lr": recipes.rated(SCHEDULE, self.iterations)["rounding_lr"]}
        w_bits, a_bits = self.bits
        key = {
            "model": self.net, "method": self.method, "metric": "acc_pct", "w_bits": w_bits, "a_bits": a_bits,
            "placement": "academic", "n_calib": self.n_calib, "seed": self.draw, "iterations": self.iterations,
            "switches": switches,
        }  # fmt: skip
        how = f"{self.net}_{self.method}_w{w_bits}a{a_bits}_{self.choice}_n{self.n_calib}_of{self.n_pool}"
        name = "_".join([how, f"i{self.iterations}", f"d{self.draw}", *map(str, self.altered.values())])
        return _point(name, key, self, (self.net, self.n_pool, self.draw), 0.2 + self.iterations / 200)


def _point(name: str, key: Row, what: Calibration | None, pool: tuple[str, int, int], minutes: float) -> Point:
    net, n_pool, draw = pool
    after = (f"{SHIPPED}_float_s0",) if net == SHIPPED else ()
    return Point(name, key, what, pool, f"{net}_draw{draw}_of{n_pool}", after, minutes)


def points(plan: Plan) -> list[Point]:
    """Every point once, those of one pool adjoining, by draw, so that a cut run is whole; unknown names are refused."""
    check_choice("selection", "way of choosing", plan.choices, CHOICES)
    check_choice("selection", "network", plan.nets, (SHIPPED, *models.imagenet_names()))
    found = []
    for net in plan.nets:
        images = {"images": plan.root.rstrip("/").rsplit("/", 1)[-1]} if plan.root else {}
        known = net_switch(SHIPPED) if net == SHIPPED else images
        key = {"model": net, "method": FLOAT, "metric": "acc_pct", "switches": known}
        sets = [each.point(known) for each in dict.fromkeys(_sets(plan, net))]
        whole = _point(f"{net}_{FLOAT}", key, None, (net, plan.n_pool, 0), 0.2)
        found += sorted([whole, *sets], key=lambda point: (point.bench[2], -point.bench[1]))
    return found


def _sets(plan: Plan, net: str) -> Iterator[Calibration]:
    def made(choice: str, draw: int, **changes: Any) -> Calibration:
        main = {"n_calib": plan.n_calib, "n_pool": plan.n_pool, "iterations": plan.iterations}
        return Calibration(net, choice, draw=draw, **{**main, **changes})

    for iterations in plan.budgets:
        yield made("random", 0, iterations=iterations, method="qdrop" if iterations else "mse", split="common")
    for draw in range(plan.n_random):
        for choice in plan.choices if draw < plan.n_draws else ("random",):
            yield made(choice, draw)
    for draw, method, bits, choice in product(range(plan.n_draws_bits), METHODS, (LOWEST, *plan.widths), PAIR):
        yield made(choice, draw, method=method, bits=bits)
    for draw, n in product(range(plan.n_draws_n), plan.ns):
        of = {"n_calib": n, "n_pool": max(plan.ns)}
        yield made("random_unbalanced", draw, **of)
        if n in plan.ns_replaced:
            yield made("random_repeated", draw, **of)
            yield made("random_unbalanced", draw, **of, batch_sampling="with_replacement")
    for seed in range(plan.n_reseeds):
        yield made("random", 0, run_seed=1000 + seed)
    for method, bits, n_draws in plan.ranges:
        for draw, choice in product(range(n_draws), PAIR):
            yield made(choice, draw, iterations=0, method=method, bits=bits)


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


def measure(run: Run[Plan], pool: Pool, point: Point) -> Iterator[Found]:
    """Accuracy, then the squared error of the logits on a set's own and on common images."""
    bench, what = pool.bench, point.what
    if what is None:
        score = evaluate(bench.net, bench.test, batch_size=bench.eval_batch)
        yield {"dataset": bench.dataset, "value": score.acc_pct, "n_test": score.n}
        return
    chosen = calibration_set(run, pool, what)
    x = data.normalize(chosen.images, chosen.spec).contiguous().to(run.device)
    qnet = recipes.quantized(
        bench.net, x, RECIPES[what.method], what.bits, iterations=what.iterations,
        seed=what.draw if what.run_seed is None else what.run_seed, batch_sampling=what.batch_sampling,
        batch_size=min(BATCH_SIZE, len(x)), **recipes.rated(SCHEDULE, what.iterations),
    )  # fmt: skip
    if what.method == "qdrop" and what.bits == LOWEST and not what.altered and what.choice != "random_repeated":
        yield from _scores(pool, what)
    score = evaluate(qnet, bench.test if what.split == "test" else pool.common, batch_size=bench.eval_batch)
    yield {"dataset": bench.dataset, "metric": "acc_pct", "value": score.acc_pct, "n_test": score.n}
    for metric, images in (("loss_own", chosen), ("loss_common", pool.common)):
        loss = logit_loss(pool, qnet, images)
        yield {"dataset": bench.dataset, "metric": metric, "value": loss, "n_test": len(images)}


def calibration_set(run: Run[Plan], pool: Pool, what: Calibration) -> ImageSet:
    """The images of a set, taken through its manifest: hashes verified, short or repeated sets refused.

    Draws with replacement have no manifest; their rows say so.
    """
    chosen = pool.choose(what.choice, what.n_calib)
    if what.choice == "random_repeated":
        return pool.images.subset(chosen)
    name = f"{pool.bench.dataset}_{what.choice}_n{what.n_calib}_of{what.n_pool}_s{what.draw}.json"
    file = run.folder / "manifests" / name
    if not file.exists():
        selection.write(pool.manifest(what.choice, chosen), file)
    return selection.take(selection.read(file), pool.bench.train)


def logit_loss(pool: Pool, qnet: nn.Module, images: ImageSet) -> float:
    """Mean over images of sum_classes (logit of ``qnet`` - float logit)^2: the last layer's reconstruction loss."""
    net, size = pool.bench.net, pool.bench.eval_batch
    target = pool.common_logits if images is pool.common else predict(net, images, batch_size=size)
    return (predict(qnet, images, batch_size=size) - target).square().sum(1).mean().item()


def _scores(pool: Pool, what: Calibration) -> Iterator[Found]:
    """The mean score of a set's images in every metric, for ``SETS``."""
    plain = {"experiment": SETS, "dataset": pool.bench.dataset, "method": FLOAT, "w_bits": 32, "a_bits": 32}
    plain |= {"placement": "-", "iterations": 0, "switches": {"choice": what.choice, "n_pool": what.n_pool}}
    chosen = pool.choose(what.choice, what.n_calib)
    for metric in (*selection.METRICS, *NETWORK_METRICS):
        unit = "nat" if metric == "entropy" else "1"
        value = pool.scores(metric)[chosen].mean().item()
        yield SETS, {**plain, "metric": f"set_{metric}", "value": value, "unit": unit}


STUDY, IMAGENET = (
    Study(name, plans, points=points, open_bench=open_pool, measure=measure)
    for name, plans in (("selection_study", PLANS), ("selection_imagenet", IMAGENET_PLANS))
)
STUDIES = (STUDY, IMAGENET)
