"""Quantization-aware training from the shipped float networks (notebook 03).

``hq study qat --profile full`` fine-tunes (or resumes) each method at each bit width, appends rows to ``qat.csv``, the
learning curve to ``qat_history.csv`` and every learned PACT clip to ``qat_clips.csv``, and leaves the quantized network
with its run record in ``data/checkpoints``.
"""

import dataclasses
from collections.abc import Hashable, Iterator
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
from hq_lib.studies.qat import integers
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
    "smoke": Plan("smoke", ("pact", "dsq"), ((4, 4),), n_test=200, n_val=200),
    "quick": Plan("quick", ("ste", "dorefa", "pact", "lsq", "dsq"), ((4, 4), (2, 2)), n_test=2_000, n_val=1_000),
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
    "quick": Plan("quick", ("dorefa_hw", "mpact"), (), ("toynet",), lists=("cfg-3",), n_test=2_000, n_val=1_000),
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
class Training(Point):
    """One run of the study, or (method "float") the network that it starts from, judged on the same images."""

    plan: Plan
    """What all points share."""
    model: str
    """Network, as in ``models.names``."""
    method: str
    """Key of ``qat_recipes.METHODS``, or "float"."""
    w_bits: int = 32
    """Bits of the weights between first and last layer."""
    a_bits: int = 32
    """Bits of the activations there."""
    seed: int = 0
    """See ``Plan``."""
    lists: str = ""
    """Seed 001's bits for each layer; bits above are then the fewest among them."""

    @property
    def name(self) -> str:
        """Folder of the run and stem of its checkpoint, e.g. ``resnet20_lsq_w4a4_s0``."""
        tail = f"_kd{self.plan.distill:g}" if self.plan.distill else ""
        tail += f"_{self.lists.replace('*', 'star')}" if self.lists else ""
        return f"{self.model}_{self.method}_w{self.w_bits}a{self.a_bits}_s{self.seed}{tail}"

    @property
    def bench(self) -> Hashable:
        """The float network and the images that its recipe trains on."""
        return self.model

    @property
    def after(self) -> tuple[str, ...]:
        """The float network that it starts from."""
        return (f"{self.model}_float_s0",)

    @property
    def minutes(self) -> float:
        """Rough cost: twice a float epoch's."""
        return 1.0 if self.method == FLOAT else 1.5 * MINUTES.get(self.model, 5.0) * self.settings().config.epochs

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


def points(plan: Plan) -> list[Training]:
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
        trained.sort(key=lambda point: point.method in plan.last)
        for point in trained:
            point.settings()
        found += [Training(plan, model, FLOAT), *trained]
    return found


def key(run: Run[Plan], point: Training) -> Row:
    """What names a run in the rows: network, method, bits, seed, length, and what else a table could mix up."""
    named = {"experiment": run.study, "model": point.model, "method": point.method, "metric": "acc_pct"}
    if point.method == FLOAT:
        return {**named, "switches": {"checkpoint": f"{point.model}_float_s0.safetensors", **net_switch(point.model)}}
    recipe = point.settings()
    return {
        **named, "w_bits": point.w_bits, "a_bits": point.a_bits, "seed": point.seed, "epochs": recipe.config.epochs,
        "switches": {
            "first_last_bits": recipe.policy.first_last_bits, "precision": recipe.config.precision,
            "lr": recipe.config.lr, "weight_decay": recipe.config.weight_decay,
            **({"distill": point.plan.distill} if point.plan.distill else {}),
            **({"lists": point.lists} if point.lists else {}), **net_switch(point.model),
        },
    }  # fmt: skip


def measure(run: Run[Plan], bench: Bench, point: Training) -> Iterator[Found]:
    """Fine-tunes (or resumes) the network; its curve, clips, and accuracies before, after (validation) and on test."""
    if point.method == FLOAT:
        yield from measure_shipped(run, bench, point)
        return
    recipe = point.settings(bench.net)
    train, few = bench.train, recipe.n_train
    train = train if few is None or few >= len(train) else train.balanced(few, SPLIT_SEED)
    qnet = quantized(bench.net, recipe, train, seed=point.seed).to(run.device)
    common: Row = {
        **key(run, point), "dataset": bench.dataset, "n_train": len(train), "n_calib": min(N_CALIB, len(train)),
        "placement": recipe.policy.placement,
    }  # fmt: skip

    def keep_clips(module: nn.Module, epoch: int) -> None:
        named = {**common, "experiment": CLIPS, "metric": "alpha", "unit": "1"}
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
    common["device"] = (
        f"{provenance.device(run.device)}, {done.config.precision}{', compiled' * bool(done.config.compile)}"
    )
    if run.profile == "full":
        _keep(run, bench, point, recipe, qnet, common, done, {"test": score.acc_pct, "val": done.val_acc_pct})
    yield from ((HISTORY, row) for row in history_rows(common, done, HISTORY) if row["metric"] != "lr")
    scores = {"start": (before.acc_pct, len(bench.val)), "val": (done.val_acc_pct, len(bench.val))}
    for split, (acc_pct, n) in {**scores, "test": (score.acc_pct, score.n)}.items():
        switches = {**common["switches"], **({} if split == "test" else {"split": split})}
        yield {**common, "value": acc_pct, "unit": "%", "n_test": n, "switches": switches}


def quantized(net: nn.Module, recipe: QatRecipe, train: ImageSet, *, seed: int) -> fx.GraphModule:
    """``net`` as a quantized graph whose grids are fitted: weights to themselves, activations to training images."""
    few = train.balanced(min(N_CALIB, len(train)), seed)
    images = data.normalize(few.images, train.spec)
    qnet = quantize(net, recipe.policy, images[:1])
    calibrate(qnet, images)
    return qnet


def _keep(
    run: Run[Plan], bench: Bench, point: Training, recipe: QatRecipe, qnet: fx.GraphModule, common: Row,
    done: FitResult, acc_pct: dict[str, float],
) -> None:  # fmt: skip
    """Writes the quantized network and its run record where the other studies look for it."""
    record = {
        **{k: bench.record[k] for k in ("model", "options", "n_classes", "in_channels", "dataset")},
        "seed": point.seed, "profile": run.profile, "method": point.method, "images": bench.test.spec,
        "config": done.config.as_dict(), "n_train": common["n_train"], "start": bench.record["sha256"],
        "acc_pct": acc_pct, "kept": "last epoch; test was seen once, after training",
        "seconds": common["seconds"], **provenance.stamp(run.device),
    }  # fmt: skip
    path = paths.out_dir(run.profile) / "data" / "checkpoints" / f"{point.name}.safetensors"
    graph.save(qnet, path, form="trainable", record=record)


def open_net(run: Run[Plan], name: Hashable) -> Bench | None:
    """The float network with its images."""
    return open_bench(str(name), n_val=run.plan.n_val, n_test=run.plan.n_test, device=run.device)


STUDY, GROUP_STUDY = (
    Study(name, plans, points=points, key=key, open_bench=open_net, measure=measure, gpu=True)
    for name, plans in (("qat", PLANS), ("qat_group", GROUP_PLANS))
)
STUDIES = (STUDY, GROUP_STUDY, integers.STUDY)
