"""Quantization-aware training from the shipped float networks (notebook 03).

``hq study qat --profile full`` fine-tunes (or resumes) each method at each bit width, appends rows to ``qat.csv``, the
learning curve to ``qat_history.csv`` and every learned PACT clip to ``qat_clips.csv``, and leaves the quantized network
with its run record in ``data/checkpoints``.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from hq_lib import data, graph
from hq_lib.data import ImageSet
from hq_lib.data.sets import SPLIT_SEED
from hq_lib.graph import QUANTIZER_SUFFIX, act_quantizers, calibrate, quantize
from hq_lib.quantizers.pact import PACT
from hq_lib.results import paths, provenance
from hq_lib.studies.bench import Bench, net_switch, open_bench
from hq_lib.studies.float_training.study import MINUTES, history_rows, measure_shipped
from hq_lib.studies.qat import integers, untrained
from hq_lib.studies.study import Found, Point, Row, Run, Study
from hq_lib.training import FitResult, QatRecipe, evaluate, fit, qat_recipe
from hq_lib.training.bit_lists import find_lists, list_recipe, widths

HISTORY, CLIPS = "qat_history", "qat_clips"
FLOAT = "float"
N_CALIB = 512
"""Training images that the activation quantizers are fitted to before training."""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    profile: str
    """Which cut of the recipes is trained."""
    methods: tuple[str, ...]
    """Keys of ``qat_recipes.METHODS``."""
    bits: tuple[tuple[int, int], ...]
    """(weights, activations) between first and last layer."""
    models: tuple[str, ...] = ("resnet20",)
    """Networks with a float checkpoint."""
    seeds: tuple[int, ...] = (0,)
    """Of batch order, augmentation and calibration images."""
    lists: tuple[str, ...] = ()
    """Seed 001's configurations, keys of ``bit_lists.BIT_LISTS``, run besides ``bits`` where a network has them."""
    binary: tuple[str, ...] = ()
    """Methods that are run at one bit; () = all of them."""
    spread: tuple[tuple[str, int, int], ...] = ()
    """(method, weights, activations) of those above that seeds 1 and 2 run as well: the intervals of the tables."""
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
        ("dorefa_hw", "pact", "mpact"),
        ((8, 8), (6, 6), (4, 4)),
        GROUP,
        lists=("cfg-1", "cfg-1*", "cfg-2", "cfg-2*", "cfg-3"),
    ),
}
"""The networks and configurations of the group whose tables (seed 001) are filled."""


@dataclass(frozen=True)
class Training:
    """One run of the study."""

    plan: Plan
    """What all share."""
    model: str
    """Network, as in ``models.names``."""
    method: str
    """Key of ``qat_recipes.METHODS``."""
    w_bits: int
    """Bits of the weights between first and last layer."""
    a_bits: int
    """Bits of the activations there."""
    seed: int
    """See ``Plan``."""
    lists: str = ""
    """Seed 001's bits for each layer; bits above are then the fewest among them."""

    def settings(self, net: nn.Module | None = None) -> QatRecipe:
        """Policy and training; seed 001's lists need the float network to speak of its layers."""
        plan = self.plan
        recipe = qat_recipe(self.method, self.w_bits, self.a_bits, plan.profile, seed=self.seed)
        if self.lists and net is not None:
            lists = find_lists(self.model, self.lists)
            recipe = list_recipe(net, lists, self.method, plan.profile, seed=self.seed)
        changes = {"epochs": plan.epochs, "lr": plan.lr, "distill": plan.distill}
        config = dataclasses.replace(recipe.config, **{k: v for k, v in changes.items() if v is not None})
        return dataclasses.replace(recipe, config=config)

    def point(self) -> Point:
        """It is called as the folder of the run and its checkpoint, e.g. ``resnet20_lsq_w4a4_s0``."""
        recipe = self.settings()
        config, policy = recipe.config, recipe.policy
        more = {"distill": self.plan.distill, "lists": self.lists}
        switches = {
            "first_last_bits": policy.first_last_bits, "precision": config.precision, "lr": config.lr,
            "weight_decay": config.weight_decay, **{k: v for k, v in more.items() if v}, **net_switch(self.model),
        }  # fmt: skip
        key = {
            "model": self.model, "method": self.method, "metric": "acc_pct", "w_bits": self.w_bits,
            "a_bits": self.a_bits, "seed": self.seed, "epochs": config.epochs, "switches": switches,
        }  # fmt: skip
        tail = f"_kd{self.plan.distill:g}" if self.plan.distill else ""
        tail += f"_{self.lists.replace('*', 'star')}" if self.lists else ""
        name = f"{self.model}_{self.method}_w{self.w_bits}a{self.a_bits}_s{self.seed}{tail}"
        minutes = 1.5 * MINUTES.get(self.model, 5.0) * config.epochs
        return Point(name, key, self, self.model, after=(f"{self.model}_float_s0",), minutes=minutes)


def points(plan: Plan) -> list[Point]:
    """Every network's float line, then seed by seed and width by width every method; ``ValueError`` for an unknown."""
    found = []
    for model in plan.models:
        wanted = [("", pair) for pair in plan.bits] + (widths(model, plan.lists, ()) if plan.lists else [])
        trained = [
            Training(plan, model, method, int(w_bits), int(a_bits), seed, lists)
            for seed in plan.seeds
            for lists, (w_bits, a_bits) in wanted
            for method in plan.methods
            if w_bits > 1 or method in (plan.binary or plan.methods)
        ]
        trained += [
            Training(plan, model, method, w_bits, a_bits, seed)
            for seed in (1, 2)
            for method, w_bits, a_bits in plan.spread
            if seed not in plan.seeds and method in plan.methods and (w_bits, a_bits) in plan.bits
        ]
        trained.sort(key=lambda each: each.method in plan.last)
        start = f"{model}_float_s0"
        switches = {"checkpoint": f"{start}.safetensors", **net_switch(model)}
        key = {"model": model, "method": FLOAT, "metric": "acc_pct", "switches": switches}
        found += [Point(f"{model}_{FLOAT}_w32a32_s0", key, bench=model, after=(start,))]
        found += [each.point() for each in trained]
    return found


def measure(run: Run[Plan], bench: Bench, point: Point) -> Iterator[Found]:
    """Fine-tunes (or resumes) the network; its curve, clips, and accuracies before, after (validation) and on test."""
    if point.what is None:
        yield from measure_shipped(run, bench, point)
        return
    recipe = point.what.settings(bench.net)
    train, few = bench.train, recipe.n_train
    train = train if few is None or few >= len(train) else train.balanced(few, SPLIT_SEED)
    qnet = quantized(bench.net, recipe, train, seed=point.what.seed).to(run.device)
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
    done = fit(qnet, train, bench.val, recipe.config, run.folder / point.name, teacher=teacher, before_epoch=keep_clips)
    keep_clips(qnet, recipe.config.epochs)
    score = evaluate(qnet, bench.test)
    common["seconds"] = round(done.seconds, 1)
    compiled = ", compiled" * bool(done.config.compile)
    common["device"] = f"{provenance.device(run.device)}, {done.config.precision}{compiled}"
    if run.profile == "full":
        _keep(run, bench, point, qnet, common, done, {"test": score.acc_pct, "val": done.val_acc_pct})
    yield from ((HISTORY, row) for row in history_rows(common, done, HISTORY) if row["metric"] != "lr")
    scores = {"start": (before.acc_pct, len(bench.val)), "val": (done.val_acc_pct, len(bench.val))}
    for split, (acc_pct, n) in {**scores, "test": (score.acc_pct, score.n)}.items():
        switches = {**common["switches"], **({} if split == "test" else {"split": split})}
        yield {**common, "value": acc_pct, "n_test": n, "switches": switches}


def quantized(net: nn.Module, recipe: QatRecipe, train: ImageSet, *, seed: int) -> fx.GraphModule:
    """``net`` as a quantized graph whose grids are fitted: weights to themselves, activations to training images."""
    few = train.balanced(min(N_CALIB, len(train)), seed)
    images = data.normalize(few.images, train.spec)
    qnet = quantize(net, recipe.policy, images[:1])
    calibrate(qnet, images)
    return qnet


def _keep(
    run: Run[Plan], bench: Bench, point: Point, qnet: fx.GraphModule, common: Row, done: FitResult,
    acc_pct: dict[str, float],
) -> None:  # fmt: skip
    """Writes the quantized network and its run record where the other studies look for it."""
    record = {
        **{k: bench.record[k] for k in ("model", "options", "n_classes", "in_channels", "dataset")},
        "seed": point.what.seed, "profile": run.profile, "method": point.what.method, "images": bench.test.spec,
        "config": done.config.as_dict(), "n_train": common["n_train"], "start": bench.record["sha256"],
        "acc_pct": acc_pct, "kept": "last epoch; test was seen once, after training",
        "seconds": common["seconds"], **provenance.stamp(run.device),
    }  # fmt: skip
    path = paths.out_dir(run.profile) / "data" / "checkpoints" / f"{point.name}.safetensors"
    graph.save(qnet, path, form="trainable", record=record)


def open_net(run: Run[Plan], name: str) -> Bench | None:
    """The float network with its images."""
    return open_bench(name, n_val=run.plan.n_val, n_test=run.plan.n_test, device=run.device)


STUDY, GROUP_STUDY = (
    Study(name, plans, points=points, open_bench=open_net, measure=measure, gpu=True)
    for name, plans in (("qat", PLANS), ("qat_group", GROUP_PLANS))
)
STUDIES = (STUDY, GROUP_STUDY, integers.STUDY, untrained.STUDY)
