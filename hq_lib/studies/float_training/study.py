"""Float training: the networks that everything else starts from (notebook 01).

``hq study float_training --profile full`` trains (or resumes) each network's recipe and leaves its checkpoint and run
record in ``data/checkpoints``, where the other studies find it; ``hq study float_reference`` evaluates what is shipped.
Rows go to ``float_training.csv``, ``float_history.csv`` and ``float_reference.csv``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hq_lib import data, models
from hq_lib.data import ImageSet
from hq_lib.results import atomic, paths, provenance
from hq_lib.results.hints import check
from hq_lib.studies.bench import Bench, net_switch, open_bench, shipped
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice, metric_rows
from hq_lib.training import FitResult, evaluate, fit, recipe
from hq_lib.training.recipes import RECIPES, find

HISTORY = "float_history"
MODELS = ("resnet20", "lenet", "toynet", "vgg11", "mobilenetv2_seed")
LENETS = ("lenet_relu1", "lenet_mnist")
MAX_BYTES = 4_000_000  # of a checkpoint in float32; a larger one is stored in float16
CURVES = ("train_loss", "val_acc_pct", "lr")
MINUTES = {"resnet20": 4.5, "toynet": 3.5, "mobilenetv2_seed": 10.0, "vgg11": 2.0} | dict.fromkeys(
    ("lenet", *LENETS), 0.2
)
"""Rough cost of an epoch on one thread."""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    profile: str
    """Which cut of the recipes is trained."""
    models: tuple[str, ...] = ("resnet20", "lenet")
    """Networks, keys of ``recipes.RECIPES``."""
    seeds: tuple[int, ...] = (0,)
    """Of weights, order and augmentation."""
    repeated: tuple[str, ...] = ()
    """Networks that are trained with every seed, the others with the first alone; () = all of them."""
    n_test: int | None = None
    """Test images; None = all."""
    n_val: int | None = None
    """Validation images; None = all."""


PLANS = {
    "smoke": Plan("smoke", n_test=100, n_val=100),
    "quick": Plan("quick", n_test=2_000, n_val=1_000),
    "full": Plan(
        "full",
        models=("resnet20", "toynet", "mobilenetv2_seed", "vgg11", "lenet", *LENETS),
        seeds=(0, 1, 2),
        repeated=("resnet20",),
    ),
}


def points(plan: Plan) -> list[Point]:
    """Every network with its first seed, then the other seeds; ``ValueError`` for one without a recipe.

    A bench is (data set, training images or None for all, split); of split "trainval" nothing is left to validate on.
    """
    check("float_training", "network", plan.repeated, RECIPES)
    found = []
    for model, seed in ((m, s) for s in plan.seeds for m in plan.models):
        if seed != plan.seeds[0] and model not in (plan.repeated or plan.models):
            continue
        dataset, config, n_train = recipe(model, plan.profile, seed=seed)
        if plan.profile == "full" and seed:
            config = replace(config, epochs=find(model).later_epochs or config.epochs)
        key = {"model": model, "method": "float", "seed": seed, "epochs": config.epochs, "metric": "acc_pct"}
        images = dataset, n_train, find(model).split if plan.profile == "full" else "train"
        minutes = MINUTES.get(model, 5.0) * config.epochs
        found.append(Point(f"{model}_float_s{seed}", key, config, bench=images, minutes=minutes))
    return found


def open_images(run: Run[Plan], needed: Any) -> tuple[ImageSet, ImageSet | None, ImageSet] | None:
    """Training, validation (where any are set aside) and test images, or the embedded digits where they fit."""
    dataset, n_train, split = needed
    train = data.load_or_embedded(dataset, split, n=n_train)
    if train.spec.in_shape != data.SPECS[dataset].in_shape:
        print(f"{dataset} is not available and the embedded digits do not fit its networks: not run")
        return None
    val = None if split == "trainval" else data.load(train.spec.name, "val", n=run.plan.n_val)
    return train, val, data.load(train.spec.name, "test", n=run.plan.n_test)


def measure(run: Run[Plan], images: tuple[ImageSet, ImageSet | None, ImageSet], point: Point) -> Iterator[Found]:
    """Trains (or resumes) the network; its learning curve, and accuracies on validation and, once, on test images."""
    (train, val, test), config, found = images, point.what, find(point["model"])
    torch.manual_seed(config.seed)
    built = {"model": found.network or point["model"], "options": dict(found.options)}
    sizes = {"n_classes": train.spec.n_classes, "in_channels": train.spec.in_shape[0]}
    net = models.build(built["model"], **sizes, **found.options).to(run.device)
    print(f"{point.name}: {config.epochs} epochs on {len(train)} images of {train.spec.name}", flush=True)
    folder = run.folder / point.name
    done = fit(net, train, val, config, folder)
    score = evaluate(net, test)
    common: Row = {
        "dataset": train.spec.name, "n_train": len(train), "seconds": round(done.seconds, 1),
        "switches": {"precision": done.config.precision, "compile": done.config.compile, **found.options},
    }  # fmt: skip
    accuracies = {"test": (score.acc_pct, score.n), **({} if val is None else {"val": (done.val_acc_pct, len(val))})}
    if run.profile == "full":
        told = {split: acc_pct for split, (acc_pct, _) in accuracies.items()}
        record = {**built, **sizes, "dataset": train.spec.name, "trained_on": point.bench[2]}
        record |= run_record(run, point, common, done, told)
        keep(run, point, folder, lambda path: _write(net, path, record))
    yield from ((HISTORY, row) for row in history_rows(common, done, HISTORY))
    yield from split_rows(common, accuracies)


def split_rows(common: Row, accuracies: Mapping[str, tuple[float, int]]) -> Iterator[Row]:
    """A row for each split's accuracy in percent and number of images; all but test say which."""
    for split, (acc_pct, n) in accuracies.items():
        where = {} if split == "test" else {"split": split}
        yield {**common, "value": acc_pct, "n_test": n, "switches": {**common["switches"], **where}}


def history_rows(common: Row, done: FitResult, experiment: str) -> Iterator[Row]:
    """The learning curve, one row an epoch and number."""
    for row in done.history:
        values = {metric: row[metric] for metric in CURVES if metric in row}  # without validation images less
        switches = {**common["switches"], "epoch": int(row["epoch"])}
        own = {"experiment": experiment, "switches": switches, "seconds": round(row["seconds"], 1)}
        yield from metric_rows(values, **{**common, **own})


def checkpoint(run: Run[Any], point: Point) -> Path:
    """Where the other studies look for the network of a training."""
    return paths.out_dir(run.profile) / "data" / "checkpoints" / f"{point.name}.safetensors"


def keep(run: Run[Any], point: Point, folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes the network of a finished training where the other studies look for it; the same weights as one file.

    From a later commit they would be another file, and every row that names the first would wait: the run's folder
    keeps what it wrote, which goes out again as long as its weights are these.
    """
    path, kept = checkpoint(run, point), folder / "network.safetensors"
    write(path)
    states = [models.read_checkpoint(file)[0] if file.exists() else {} for file in (path, kept)]
    if states[0].keys() == states[1].keys() and all(torch.equal(states[1][key], t) for key, t in states[0].items()):
        atomic.write_bytes(path, kept.read_bytes())
    else:
        atomic.write_bytes(kept, path.read_bytes())


def run_record(run: Run[Any], point: Point, common: Row, done: FitResult, acc_pct: dict[str, float]) -> Row:
    """What a checkpoint says of its training, beside the network."""
    return {
        "seed": point["seed"], "profile": run.profile, "config": asdict(done.config), "n_train": common["n_train"],
        "acc_pct": acc_pct, "kept": "last epoch; test was seen once, after training", "seconds": common["seconds"],
        **provenance.stamp(run.device),
    }  # fmt: skip


def _write(net: nn.Module, path: Path, record: Row) -> None:
    """Writes the trained network and its run record.

    A network beyond ``MAX_BYTES`` in float32 is stored in float16, and the record's accuracies are those of the weights
    as stored.
    """
    if sum(4 * value.numel() for value in net.state_dict().values()) > MAX_BYTES:
        net, before = models.rounded_to(net, torch.float16), record["acc_pct"]
        kept = copy.deepcopy(net).float()
        stored = {split: evaluate(kept, data.load(record["dataset"], split)).acc_pct for split in before}
        record |= {"acc_pct": stored, "stored_as": "float16", "acc_pct_before_rounding": before}
    models.save_checkpoint(path, net, record)


STUDY = Study(
    "float_training",
    PLANS,
    points=points,
    open_bench=open_images,
    measure=measure,
    gpu=True,
    unkeyed=("n_test", "n_val"),
)


def shipped_points(plan: Plan) -> list[Point]:
    """The networks of a plan; a key has the file's own hash, once it is not the first one."""
    check_choice("float_reference", "network", plan.models, models.names())
    found = []
    for model in plan.models:
        path = shipped(model)
        file = {} if path is None else {"switches": {"checkpoint": path.name, **net_switch(model)}}
        found.append(Point(model, {"model": model, "method": "float", "metric": "acc_pct", **file}, bench=model))
    return found


def measure_shipped(run: Run[Any], bench: Bench, point: Point) -> Iterator[Row]:
    """Test accuracy of the checkpoint."""
    score, record = evaluate(bench.net, bench.test), bench.record
    yield {
        "dataset": bench.dataset, "seed": record["seed"], "epochs": record["config"]["epochs"],
        "n_train": record["n_train"], "n_test": score.n, "value": score.acc_pct,
    }  # fmt: skip


REFERENCE = Study(
    "float_reference",
    {
        "smoke": Plan("smoke", MODELS, n_test=100),
        "quick": Plan("quick", MODELS, n_test=2_000),
        "full": Plan("full", MODELS),
    },
    points=shipped_points,
    open_bench=lambda run, name: open_bench(name, n_test=run.plan.n_test, device=run.device),
    measure=measure_shipped,
    gpu=True,
)
STUDIES = (STUDY, REFERENCE)
