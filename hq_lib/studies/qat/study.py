"""Quantization-aware training from the shipped float networks (notebook 03).

``hq study qat --profile full`` fine-tunes (or resumes) each method at each bit width, appends rows to ``qat.csv``, the
learning curve to ``qat_history.csv`` and every learned PACT clip to ``qat_clips.csv``, and leaves the quantized network
with its run record in ``data/checkpoints``. ``hq study qat_integers`` opens those, and says what they keep in integers.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hq_lib import data, graph, integer
from hq_lib.data import ImageSet
from hq_lib.data.sets import SPLIT_SEED
from hq_lib.graph import QUANTIZER_SUFFIX, act_quantizers, calibrate, quantize
from hq_lib.quantizers.pact import PACT
from hq_lib.results import paths, provenance
from hq_lib.results.hints import check
from hq_lib.studies.bench import Bench, net_switch, open_bench, quantized_as, record_of
from hq_lib.studies.float_training import study as float_training
from hq_lib.studies.qat import untrained
from hq_lib.studies.study import Found, Point, Row, Run, Study
from hq_lib.training import QatRecipe, evaluate, fit, qat_recipe
from hq_lib.training.recipes import METHODS, find_lists, list_recipe, widths

HISTORY, CLIPS = "qat_history", "qat_clips"
FLOAT = "float"
EXECUTORS = ("fake_quant", "fake_quant, integer biases", "integers")
N_CALIB = 512
"""Training images that the activation quantizers are fitted to before training."""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    profile: str
    """Which cut of the recipes is trained."""
    methods: tuple[str, ...]
    """Keys of ``recipes.METHODS``."""
    bits: tuple[tuple[int, int], ...]
    """(weights, activations) between first and last layer."""
    models: tuple[str, ...] = ("resnet20",)
    """Networks with a float checkpoint."""
    seeds: tuple[int, ...] = ()
    """Of batch order, augmentation and calibration images; () = 0, and those of ``spread``."""
    lists: tuple[str, ...] = ()
    """Seed 001's configurations, keys of ``recipes.BIT_LISTS``, run besides ``bits`` where a network has them."""
    binary: tuple[str, ...] = ()
    """Methods that are run at one bit; () = all of them."""
    spread: tuple[tuple[str, int, int], ...] = ()
    """(method, weights, activations) of those above that seeds 1 and 2 run as well, where no seeds are given: the
    intervals of the tables."""
    last: tuple[str, ...] = ()
    """Methods whose runs come after all others; a batch engine starts points in this order."""
    distill: float = 0.0
    """Share of the loss that is the distance to the float network's logits, in [0, 1]; 0 in every paper table."""
    epochs: int | None = None
    """In place of the recipe's."""
    lr: float | None = None
    """In place of the recipe's."""
    n_test: int | None = None
    """Test images; None = all."""
    n_val: int | None = None
    """Validation images; None = all."""


PLANS = {
    "smoke": Plan("smoke", ("pact", "dsq"), ((4, 4),), n_test=100, n_val=100),
    "quick": Plan("quick", ("ste", "dorefa", "pact", "lsq", "dsq"), ((4, 4), (2, 2)), n_test=1_000, n_val=500),
    "full": Plan(
        "full",
        ("pact", "lsq", "dsq", "dorefa", "mpact", "ste"),
        ((4, 4), (3, 3), (2, 2), (8, 8), (1, 32), (1, 1)),
        binary=("dsq", "dorefa", "ste"),
        spread=tuple((method, bits, bits) for bits in (4, 2) for method in ("pact", "lsq", "dsq")),
        last=("mpact", "ste"),
    ),
}
GROUP = ("toynet", "mobilenetv2_seed", "resnet20")
GROUP_PLANS = {
    "smoke": Plan("smoke", ("dorefa_hw",), (), ()),
    "quick": Plan("quick", ("dorefa_hw", "mpact"), (), ("toynet",), lists=("cfg-3",), n_test=1_000, n_val=500),
    "full": Plan(
        "full",
        ("dorefa_hw", "pact", "mpact", "mpact_fixed"),
        ((8, 8), (6, 6), (4, 4)),
        GROUP,
        lists=("cfg-1", "cfg-1*", "cfg-2", "cfg-2*", "cfg-3"),
    ),
}
"""The networks and configurations of the group whose tables (seed 001) are filled."""


def settings(plan: Plan, of: Row | Point, net: nn.Module | None = None) -> QatRecipe:
    """Policy and training of a run by its model, method, bits, seed and lists.

    Seed 001's lists need the float network to speak of its layers.
    """
    recipe = qat_recipe(of["method"], of["w_bits"], of["a_bits"], plan.profile, seed=of["seed"])
    if of["lists"] and net is not None:
        lists = find_lists(of["model"], of["lists"])
        recipe = list_recipe(net, lists, of["method"], plan.profile, seed=of["seed"])
    changes = {"epochs": plan.epochs, "lr": plan.lr, "distill": plan.distill}
    config = dataclasses.replace(recipe.config, **{k: v for k, v in changes.items() if v is not None})
    return dataclasses.replace(recipe, config=config)


def points(plan: Plan) -> list[Point]:
    """Every network's float line, then seed by seed and width by width every method; ``ValueError`` for an unknown."""
    check("qat", "method", (*plan.binary, *plan.last, *(method for method, _, _ in plan.spread)), METHODS)
    found = []
    for model in plan.models:
        wanted = [*(("", pair) for pair in plan.bits), *widths(model, plan.lists)]
        trained = [
            (method, int(w_bits), int(a_bits), seed, lists)
            for seed in plan.seeds or (0,)
            for lists, (w_bits, a_bits) in wanted
            for method in plan.methods
            if w_bits > 1 or method in (plan.binary or plan.methods)
        ]
        trained += [
            (method, w_bits, a_bits, seed, "")
            for seed in (() if plan.seeds else (1, 2))
            for method, w_bits, a_bits in plan.spread
            if method in plan.methods and (w_bits, a_bits) in plan.bits
        ]
        trained.sort(key=lambda each: each[0] in plan.last)
        start = f"{model}_float_s0"
        switches = {"checkpoint": f"{start}.safetensors", **net_switch(model)}
        key = {"model": model, "method": FLOAT, "metric": "acc_pct", "switches": switches}
        found += [Point(f"{model}_{FLOAT}_w32a32_s0", key, bench=model, after=(start,))]
        found += [_point(plan, model, *each) for each in trained]
    return found


def group_points(plan: Plan) -> list[Point]:
    """The points of a plan of the group's but those that ``PLANS`` has: no run is trained twice into one checkpoint."""
    theirs = {point.name for point in points(PLANS[plan.profile])}
    return [point for point in points(plan) if point.name not in theirs]


def _point(plan: Plan, model: str, method: str, w_bits: int, a_bits: int, seed: int, lists: str) -> Point:
    """It is called as the folder of the run and its checkpoint, e.g. ``resnet20_lsq_w4a4_s0``."""
    of = {"model": model, "method": method, "w_bits": w_bits, "a_bits": a_bits, "seed": seed}
    recipe = settings(plan, {**of, "lists": lists})
    config, told = recipe.config, {"distill": plan.distill, "lists": lists}
    switches = {
        "first_last_bits": recipe.policy.first_last_bits, "precision": config.precision, "lr": config.lr,
        "weight_decay": config.weight_decay, **{k: v for k, v in told.items() if v}, **net_switch(model),
    }  # fmt: skip
    key = {**of, "metric": "acc_pct", "epochs": config.epochs, "switches": switches}
    changed = {"kd": plan.distill or None, "e": plan.epochs, "lr": plan.lr}
    tail = "".join(f"_{sign}{value:g}" for sign, value in changed.items() if value is not None)
    tail += f"_{lists.replace('*', 'star')}" if lists else ""
    minutes = 1.5 * float_training.MINUTES.get(model, 5.0) * config.epochs
    name = f"{model}_{method}_w{w_bits}a{a_bits}_s{seed}{tail}"
    return Point(name, key, bench=model, after=(f"{model}_float_s0",), minutes=minutes)


def measure(run: Run[Plan], bench: Bench, point: Point) -> Iterator[Found]:
    """Fine-tunes (or resumes) the network; its curve, clips, and accuracies before, after (validation) and on test."""
    if point["method"] == FLOAT:
        yield from float_training.measure_shipped(run, bench, point)
        return
    recipe = settings(run.plan, point, bench.net)
    float_acc = bench.record.get("acc_pct", {}).get("test", "unknown")
    print(f"{point.name}: from the float network {bench.record['sha256'][:8]} (test {float_acc} %)", flush=True)
    train = bench.train.drawn(recipe.n_train or len(bench.train), SPLIT_SEED)
    qnet = quantized(bench.net, recipe, train, seed=point["seed"]).to(run.device)
    common: Row = {
        **point.key, "dataset": bench.dataset, "n_train": len(train), "n_calib": min(N_CALIB, len(train)),
        "placement": recipe.policy.placement,
    }  # fmt: skip

    def keep_clips(module: nn.Module, epoch: int) -> None:
        named = {**common, "experiment": CLIPS, "metric": "alpha"}
        found = []
        for name, quantizer in act_quantizers(module).items():
            if isinstance(quantizer, PACT):
                switches = {**common["switches"], "epoch": epoch, "layer": name.removesuffix(QUANTIZER_SUFFIX)}
                found.append((CLIPS, {**named, "value": quantizer.clip().item(), "switches": switches}))
        run.append(found)

    before = evaluate(qnet, bench.val)
    teacher = bench.net if recipe.config.distill else None
    folder = bench.run_folder(run.folder, point.name)
    done = fit(qnet, train, bench.val, recipe.config, folder, teacher=teacher, before_epoch=keep_clips)
    keep_clips(qnet, recipe.config.epochs)
    score = evaluate(qnet, bench.test)
    common["seconds"] = round(done.seconds, 1)
    compiled = ", compiled" * bool(done.config.compile)
    common["device"] = f"{provenance.device(run.device)}, {done.config.precision}{compiled}"
    if run.profile == "full":
        built = {k: bench.record[k] for k in ("model", "options", "n_classes", "in_channels", "dataset")}
        start = {"method": point["method"], "images": bench.test.spec, "start": bench.record["sha256"]}
        told = float_training.run_record(run, point, common, done, {"test": score.acc_pct, "val": done.val_acc_pct})
        record = {**built, **start, **told}
        float_training.keep(run, point, folder, lambda path: graph.save(qnet, path, form="trainable", record=record))
    yield from ((HISTORY, row) for row in float_training.history_rows(common, done, HISTORY) if row["metric"] != "lr")
    scores = {"start": (before.acc_pct, len(bench.val)), "val": (done.val_acc_pct, len(bench.val))}
    yield from float_training.split_rows(common, {**scores, "test": (score.acc_pct, score.n)})


def quantized(
    net: nn.Module, recipe: QatRecipe, train: ImageSet, *, seed: int, n_calib: int = 0, **tracing: Any
) -> fx.GraphModule:
    """``net`` as a quantized graph whose grids are fitted: weights to themselves, activations to ``n_calib`` (0: 512)
    training images."""
    images = data.normalize(train.drawn(n_calib or N_CALIB, seed).images, train.spec)
    qnet = quantize(net, recipe.policy, images[:1], **tracing)
    calibrate(qnet, images)
    return qnet


def open_net(run: Run[Plan], name: str) -> Bench | None:
    """The float network with its images."""
    return open_bench(name, n_val=run.plan.n_val, n_test=run.plan.n_test, device=run.device)


STUDY, GROUP_STUDY = (
    Study(name, plans, points=listed, open_bench=open_net, measure=measure, gpu=True, unkeyed=("n_test", "n_val"))
    for name, plans, listed in (("qat", PLANS, points), ("qat_group", GROUP_PLANS, group_points))
)


@dataclass(frozen=True)
class IntegersPlan:
    """How many of the trained networks are judged in integers."""

    n_test: int | None = None
    """Test images; None = all."""
    methods: tuple[str, ...] = ()
    """Methods of training; () = of every checkpoint there is."""


def integers_points(plan: IntegersPlan) -> list[Point]:
    """The quantized checkpoints that are there; a key names the training behind one, and the file by its hash."""
    found = []
    for stem in (file.stem for file in sorted(paths.checkpoints_dir().glob("*_w*a*_s*.safetensors"))):
        record = record_of(stem)
        if plan.methods and record["method"] not in plan.methods:
            continue
        named = {f"switches.{name}": value for name, value in net_switch(stem).items()}
        trained = {"seed": record["seed"], "epochs": record["config"]["epochs"]}
        key = {**quantized_as(record), "metric": "acc_pct", **trained, **named}
        found.append(Point(f"integers_{stem}", key, stem, after=(stem,), minutes=10.0))
    return found


def measure_integers(run: Run[IntegersPlan], test: ImageSet, point: Point) -> Iterator[Found]:
    """Accuracy as trained, with the biases that accumulators hold, and in integers; the last two must agree.

    And the share of images to which network and integers give one class.
    """
    qnet = graph.load(paths.checkpoints_dir() / f"{point.what}.safetensors")
    trained = evaluate(qnet, test).acc_pct
    integer.round_biases(qnet, images=test.spec)
    found = integer.agreement(qnet, integer.lower(qnet, images=test.spec), test, batch_size=250)
    common = {"dataset": test.spec.name, "n_train": record_of(point.what)["n_train"], "n_test": len(test)}
    named = net_switch(point.what)
    for executor, value in zip(EXECUTORS, (trained, found.fake_quant_acc_pct, found.integer_acc_pct), strict=True):
        yield {**common, "value": value, "switches": {**named, "executor": executor}}
    yield {**common, "metric": "same_top1_pct", "value": found.same_top1_pct, "switches": named}


INTEGERS = Study(
    "qat_integers",
    {"smoke": IntegersPlan(50, ("lsq",)), "quick": IntegersPlan(200), "full": IntegersPlan()},
    points=integers_points,
    open_bench=lambda run, _: data.load_or_embedded("cifar10", "test", n=run.plan.n_test),
    measure=measure_integers,
)
STUDIES = (STUDY, GROUP_STUDY, INTEGERS, untrained.STUDY)
