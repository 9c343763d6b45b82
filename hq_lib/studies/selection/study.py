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
from hq_lib.studies.bench import net_switch, open_bench, pictures_switch
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
WIDTHS: tuple[Bits, ...] = ((4, 4), (3, 3), (2, 4))
"""where QDrop and BRECQ compare smoothest with random besides"""
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
    n_draws_bits: int = 0
    """Draws of that comparison."""
    ns: tuple[int, ...] = ()
    """Numbers of images compared; the candidates are as many as the largest."""
    ns_replaced: tuple[int, ...] = ()
    """Those of them that are drawn with replacement too: images, and batches."""
    n_draws_n: int = 0
    """Draws of that comparison."""
    budgets: tuple[int, ...] = ()
    """Iterations compared on validation images: how the study's own were fixed."""
    n_reseeds: int = 0
    """Other seeds of the reconstruction of one set: the luck that is not the draw's."""
    ranges: tuple[tuple[str, Bits, int], ...] = ()
    """(ranges, bits, draws): smoothest against random without reconstruction."""
    n_common: int = 0
    """Validation images, none of which calibrates, on which the losses of all sets are compared."""
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


def points(plan: Plan) -> list[Point]:
    """Every point once, those of one pool adjoining, by draw, so that a cut run is whole; unknown names are refused."""
    check_choice("selection", "way of choosing", plan.choices, CHOICES)
    check_choice("selection", "network", plan.nets, (SHIPPED, *models.IMAGENET))
    found = []
    for net in plan.nets:
        known = net_switch(SHIPPED) if net == SHIPPED else pictures_switch(plan.root)
        key = {"model": net, "method": FLOAT, "metric": "acc_pct", "switches": known}
        whole = _point(f"{net}_{FLOAT}", key, {}, (net, plan.n_pool, 0), 0.2)
        sets = {each.name: each for each in _sets(plan, net, known)}
        found += sorted([whole, *sets.values()], key=lambda point: (point.bench[2], -point.bench[1]))
    return found


def set_point(
    net: str, known: Row, choice: str, draw: int, *, n_calib: int, n_pool: int, iterations: int,
    method: str = "qdrop", bits: Bits = LOWEST, **altered: Any,
) -> Point:  # fmt: skip
    """One calibration set, quantized with once, e.g. ``resnet20_qdrop_w2a2_tv_lowest_n256_of4096_i100_d0``.

    Args:
        known:           the switches that name network and images.
        choice:          key of ``CHOICES``.
        draw:            seed of pool, choice and reconstruction.
        n_calib, n_pool: images, and the candidates that they are chosen from.
        iterations:      steps a block (BRECQ: and a quarter more for the activation steps).
        method:          "qdrop", "brecq", or ranges alone: "mse", "minmax".
        altered:         in what it departs from the main comparison, ``what`` of the point: ``batch_sampling``
                         "with_replacement"; ``run_seed`` of the reconstruction alone; ``split`` "common", images that
                         something is chosen by.
    """
    switches = {**known, "choice": choice, "n_pool": n_pool, **SETTINGS, **altered}
    if iterations:
        switches |= {**STEPS, "rounding_lr": recipes.rated(SCHEDULE, iterations)["rounding_lr"]}
    key = {
        "model": net, "method": method, "metric": "acc_pct", "w_bits": bits[0], "a_bits": bits[1],
        "placement": "academic", "n_calib": n_calib, "seed": draw, "iterations": iterations, "switches": switches,
    }  # fmt: skip
    how = f"{net}_{method}_w{bits[0]}a{bits[1]}_{choice}_n{n_calib}_of{n_pool}"
    name = "_".join([how, f"i{iterations}", f"d{draw}", *map(str, altered.values())])
    return _point(name, key, altered, (net, n_pool, draw), 0.2 + iterations / 200)


def _point(name: str, key: Row, altered: Row, pool: tuple[str, int, int], minutes: float) -> Point:
    """All points of one pool are a unit, so that its scores and features are computed once."""
    net, n_pool, draw = pool
    after = (f"{SHIPPED}_float_s0",) if net == SHIPPED else ()
    return Point(name, key, altered, pool, f"{net}_draw{draw}_of{n_pool}", after, minutes)


def _sets(plan: Plan, net: str, known: Row) -> Iterator[Point]:
    def made(choice: str, draw: int, **changes: Any) -> Point:
        main = {"n_calib": plan.n_calib, "n_pool": plan.n_pool, "iterations": plan.iterations}
        return set_point(net, known, choice, draw, **{**main, **changes})

    for iterations in plan.budgets:
        yield made("random", 0, iterations=iterations, method="qdrop" if iterations else "mse", split="common")
    for draw in range(max(plan.n_draws, plan.n_random)):
        for choice in plan.choices if draw < plan.n_draws else ("random",):
            yield made(choice, draw)
    for draw, method, bits, choice in product(range(plan.n_draws_bits), METHODS, (LOWEST, *WIDTHS), PAIR):
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
    n_val = None if net == SHIPPED else plan.n_common
    bench = open_bench(net, root=plan.root, n_val=n_val, n_test=plan.n_test, device=run.device)
    if bench is not None and n_pool > len(bench.train):
        print(f"{net}: {n_pool} candidates wanted, {bench.dataset} has {len(bench.train)} images, draw {draw} not run")
        return None
    return bench and Pool(bench, n_pool, draw, n_common=plan.n_common)


def measure(run: Run[Plan], pool: Pool, point: Point) -> Iterator[Found]:
    """Accuracy, then the squared error of the logits on a set's own and on common images."""
    bench, method, bits = pool.bench, point["method"], (point["w_bits"], point["a_bits"])
    if method == FLOAT:
        yield bench.accuracy(bench.net)
        return
    chosen = calibration_set(run, pool, point)
    x = data.normalize(chosen.images, chosen.spec).contiguous().to(run.device)
    steps = {"batch_size": min(BATCH_SIZE, len(x)), **recipes.rated(SCHEDULE, point["iterations"])}
    seeded = {"seed": point["run_seed"] or point["seed"]}
    seeded |= {name: how for name, how in point.what.items() if name == "batch_sampling"}
    qnet = recipes.quantized(bench.net, x, RECIPES[method], bits, iterations=point["iterations"], **seeded, **steps)
    if method == "qdrop" and bits == LOWEST and not point.what and point["choice"] != "random_repeated":
        yield from _scores(pool, point)
    judged = pool.common if point["split"] == "common" else bench.test
    score = evaluate(qnet, judged, batch_size=bench.eval_batch)
    yield {"dataset": bench.dataset, "metric": "acc_pct", "value": score.acc_pct, "n_test": score.n}
    for metric, images in (("loss_own", chosen), ("loss_common", pool.common)):
        loss = logit_loss(pool, qnet, images)
        yield {"dataset": bench.dataset, "metric": metric, "value": loss, "n_test": len(images)}


def calibration_set(run: Run[Plan], pool: Pool, point: Point) -> ImageSet:
    """The images of a set, taken through its manifest: hashes verified, short or repeated sets refused.

    Each network has manifests of its own, and of each folder of pictures: scores are of what it sees. Draws with
    replacement have no manifest; their rows say so.
    """
    choice, n = point["choice"], point["n_calib"]
    chosen = pool.choose(choice, n)
    if choice == "random_repeated":
        return pool.images.subset(chosen)
    folder = pool.bench.run_folder(run.folder, "manifests")
    seen = "_".join(filter(None, [pool.bench.model, pool.bench.dataset, point["pictures"]]))
    file = folder / f"{seen}_{choice}_n{n}_of{pool.n_pool}_s{pool.draw}.json"
    if not file.exists():
        selection.write(pool.manifest(choice, chosen), file)
    return selection.take(selection.read(file), pool.bench.train)


def logit_loss(pool: Pool, qnet: nn.Module, images: ImageSet) -> float:
    """Mean over images of sum_classes (logit of ``qnet`` - float logit)^2: the last layer's reconstruction loss."""
    net, size = pool.bench.net, pool.bench.eval_batch
    target = pool.common_logits if images is pool.common else predict(net, images, batch_size=size)
    return (predict(qnet, images, batch_size=size) - target).square().sum(1).mean().item()


def _scores(pool: Pool, point: Point) -> Iterator[Found]:
    """The mean score of a set's images in every metric, for ``SETS``."""
    plain = {"experiment": SETS, "dataset": pool.bench.dataset, "method": FLOAT, "w_bits": 32, "a_bits": 32}
    stated = {name: value for name, value in point.key["switches"].items() if name in ("net", "choice", "n_pool")}
    plain |= {"placement": "-", "iterations": 0, "switches": stated}
    chosen = pool.choose(point["choice"], point["n_calib"])
    for metric in (*selection.METRICS, *NETWORK_METRICS):
        unit = "nat" if metric == "entropy" else "1"
        value = pool.scores(metric)[chosen].mean().item()
        yield SETS, {**plain, "metric": f"set_{metric}", "value": value, "unit": unit}


STUDY, IMAGENET = (
    Study(name, plans, points=points, open_bench=open_pool, measure=measure, gpu=True, unkeyed=("n_test", "n_common"))
    for name, plans in (("selection_study", PLANS), ("selection_imagenet", IMAGENET_PLANS))
)
STUDIES = (STUDY, IMAGENET)
