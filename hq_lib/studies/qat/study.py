"""Quantization-aware training from the shipped float networks (notebook 03).

    python -m hq_lib.studies.qat.study --profile full --models resnet20 --methods lsq pact dsq --bits 4,4 2,2 --ship

fine-tunes (or resumes) each method at each bit width, appends rows to ``qat.csv``, the learning curve to
``qat_history.csv`` and every learned PACT clip to ``qat_clips.csv``; ``--ship`` also writes the quantized network with
its run record into ``data/checkpoints``.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import fx, nn

from hq_lib import data, models
from hq_lib.data import ImageSet
from hq_lib.graph import QUANTIZER_SUFFIX, act_quantizers, calibrate, quantize, save_quantized
from hq_lib.quantizers.pact import PACT
from hq_lib.results import paths, provenance, store
from hq_lib.results import rows as rows_schema
from hq_lib.studies.float_training import study as float_training
from hq_lib.training import QatRecipe, evaluate, fit, qat_recipe
from hq_lib.training.bit_lists import list_recipe, widths
from hq_lib.training.distillation import distillation

STUDY, HISTORY, CLIPS = "qat", "qat_history", "qat_clips"
PLAN: dict[str, dict[str, Any]] = {
    "smoke": {"methods": ("pact", "dsq"), "bits": ((4, 4),), "seeds": (0,), "n_test": 200, "n_val": 200},
    "quick": {
        "methods": ("ste", "dorefa", "pact", "lsq", "dsq"), "bits": ((4, 4), (2, 2)), "seeds": (0,),
        "n_test": 2_000, "n_val": 1_000,
    },
    "full": {
        "methods": ("ste", "dorefa", "pact", "mpact", "lsq", "dsq"), "bits": ((8, 8), (4, 4), (3, 3), (2, 2)),
        "seeds": (0, 1, 2), "n_test": None, "n_val": None,
    },
}  # fmt: skip
"""Profile -> what is run by default, and on how many images it is evaluated."""
N_CALIB = 512
"""Training images that the activation quantizers are fitted to before training."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the study."""

    model: str
    """Network, as in ``models.names``."""
    method: str
    """Key of ``qat_recipes.METHODS``."""
    w_bits: int
    """Bits of the weights between first and last layer."""
    a_bits: int
    """Bits of the activations between first and last layer."""
    seed: int = 0
    """Decides batch order, augmentation and the calibration images."""
    distill: float = 0.0
    """Share of the loss that is the distance to the float network's logits, in [0, 1]; 0 in every paper table."""
    lists: str = ""
    """Seed 001's bits for each layer, key of ``bit_lists.BIT_LISTS``; bits above are then the fewest among them."""

    def recipe(self, profile: str) -> QatRecipe:
        """How it is trained."""
        if self.lists:
            net = models.load_checkpoint(_float_path(self.model))[0]
            return list_recipe(net, self.model, self.lists, self.method, profile, seed=self.seed)
        return qat_recipe(self.method, self.w_bits, self.a_bits, profile, seed=self.seed)

    def name(self) -> str:
        """Folder of the run and stem of its checkpoint, e.g. ``resnet20_lsq_w4a4_s0``."""
        tail = f"_kd{self.distill:g}" if self.distill else ""
        tail += f"_{self.lists.replace('*', 'star')}" if self.lists else ""
        return f"{self.model}_{self.method}_w{self.w_bits}a{self.a_bits}_s{self.seed}{tail}"


def run(
    profile: str,
    *,
    names: Sequence[str] = ("resnet20",),
    methods: Sequence[str] | None = None,
    bits: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    distill: float = 0.0,
    lists: Sequence[str] = (),
    device: str = "cpu",
    ship_them: bool = False,
) -> pd.DataFrame:
    """Fine-tunes each network with each method, bits and seed; the study's rows of this profile.

    Args:
        profile: chooses recipe, images and output folders; a run that was killed resumes from its last epoch, and one
            that has its rows is not run again.
        names:   networks with a shipped float checkpoint; others are skipped with a line.
        methods: keys of ``qat_recipes.METHODS``; default: the profile's ``PLAN``.
        bits:    (weight bits, activation bits) pairs; default likewise.
        seeds:   default likewise.
        distill: see ``Point``.
        lists:   configurations of seed 001 in place of ``bits``, those that a network has.
        device:  "cpu" or "cuda".
        ship_them: also write checkpoint and record into ``data/checkpoints``.
    """
    plan = PLAN[paths.check_profile(profile)]
    points = [
        Point(name, method, int(w_bits), int(a_bits), seed, distill, named)
        for name in names
        for named, (w_bits, a_bits) in widths(name, lists, plan["bits"] if bits is None else bits)
        for seed in (plan["seeds"] if seeds is None else seeds)
        for method in (plan["methods"] if methods is None else methods)
    ]
    for i, point in enumerate(points):
        print(f"[{i + 1}/{len(points)}] {point.name()}", flush=True)
        qnet = train_one(point, profile, device=device)
        if ship_them and qnet is not None:
            print(f"shipped {ship(point, qnet, profile).name}", flush=True)
    return store.read(STUDY, profile=profile)


def train_one(point: Point, profile: str, *, device: str = "cpu") -> fx.GraphModule | None:
    """One network fine-tuned (or resumed) and its rows appended; the quantized network.

    None where it was done before (the rows are there, the run's folder is not), where the float network is not shipped,
    or where the embedded data do not fit it.
    """
    if float_training.shipped(point.model) is None:
        print(f"{point.model}: no float checkpoint is shipped, nothing to start from")
        return None
    recipe, folder = point.recipe(profile), run_dir(point, profile)
    if store.done(STUDY, _key(point, recipe), profile=profile) and not folder.exists():
        print(f"{point.name()}: its rows are there already")
        return None
    start = _start(point, recipe, profile)
    if start is None:
        return None
    net, train = start
    n_test, n_val = PLAN[profile]["n_test"], PLAN[profile]["n_val"]
    val, test = (data.load(train.spec.name, split, n=n) for split, n in (("val", n_val), ("test", n_test)))
    qnet = quantized(net, recipe, train, seed=point.seed).to(device)
    common = {
        **_key(point, recipe), "dataset": train.spec.name, "n_train": len(train), "n_calib": min(N_CALIB, len(train)),
        "placement": recipe.policy.placement, **provenance.stamp(device),
    }  # fmt: skip

    def keep_clips(module: nn.Module, epoch: int) -> None:
        if rows := [_clip_row(common, epoch, layer, clip) for layer, clip in _clips(module).items()]:
            store.append(CLIPS, rows, profile=profile)

    before = evaluate(qnet, val)
    teach = distillation(net.to(device), point.distill, recipe.config.label_smoothing) if point.distill else None
    done = fit(qnet, train, val, recipe.config, folder, loss=teach, before_epoch=keep_clips)
    keep_clips(qnet, recipe.config.epochs)
    score = evaluate(qnet, test)
    print(f"{point.name()}: validation {before.acc_pct:.2f} -> {done.val_acc_pct:.2f} %, test {score.acc_pct:.2f} %")
    common["seconds"] = round(done.seconds, 1)
    scores = {
        "test": (score.acc_pct, score.n),
        "val": (done.val_acc_pct, len(val)),
        "start": (before.acc_pct, len(val)),
    }
    store.append(STUDY, [_score_row(common, *item) for item in scores.items()], profile=profile)
    store.append(HISTORY, _history_rows(common, done.history), profile=profile)
    return qnet


def run_dir(point: Point, profile: str) -> Path:
    """The folder of a run: its state, configuration and log."""
    return paths.runs_dir(profile) / STUDY / point.name()


def quantized(net: nn.Module, recipe: QatRecipe, train: ImageSet, *, seed: int) -> fx.GraphModule:
    """``net`` as a quantized graph whose grids are fitted: weights to themselves, activations to training images."""
    few = train.balanced(min(N_CALIB, len(train)), seed)
    images = data.normalize(few.images, train.spec)
    qnet = quantize(net, recipe.policy, images[:1])
    calibrate(qnet, images)
    return qnet


def ship(point: Point, qnet: fx.GraphModule, profile: str) -> Path:
    """Writes the quantized network and its run record into ``data/checkpoints``; returns the path."""
    recipe = point.recipe(profile)
    rows = store.read(STUDY, profile=profile)
    key = {c: v for c, v in _key(point, recipe).items() if c != "switches"}
    mine = rows.loc[(rows[list(key)] == list(key.values())).all(axis=1)].to_dict("records")
    _, float_record = models.read_checkpoint(_float_path(point.model))
    record = {
        **{k: float_record[k] for k in ("model", "options", "n_classes", "in_channels", "dataset")},
        "seed": point.seed, "profile": profile, "method": point.method,
        "in_shape": data.SPECS[float_record["dataset"]].in_shape,
        "config": recipe.config.as_dict(), "n_train": mine[0]["n_train"], "start": _float_path(point.model).name,
        "acc_pct": {_split(row): row["value"] for row in mine},
        "kept": f"{recipe.config.keep} epoch; test was seen once, after training",
        **{k: mine[0][k] for k in rows_schema.PROVENANCE},
    }  # fmt: skip
    path = paths.checkpoints_dir() / f"{point.name()}.safetensors"
    save_quantized(path, qnet, recipe.policy, record)
    return path


def clip_history(profile: str) -> pd.DataFrame:
    """The learned PACT clips: rows of ``qat_clips.csv`` of this profile with columns ``epoch`` and ``layer``."""
    rows = store.read(CLIPS, profile=profile)
    rows = rows.loc[rows["profile"] == profile]
    return rows.assign(**{name: [json.loads(text)[name] for text in rows["switches"]] for name in ("epoch", "layer")})


def _start(point: Point, recipe: QatRecipe, profile: str) -> tuple[nn.Module, ImageSet] | None:
    net, record = models.load_checkpoint(_float_path(point.model))
    train = data.load_or_embedded(record["dataset"], "train", n=recipe.n_train)
    if train.spec.in_shape != data.SPECS[record["dataset"]].in_shape:
        print(f"{point.model}: skipped, {record['dataset']} is not available and the embedded digits do not fit it")
        return None
    return net, train


def _float_path(model: str) -> Path:
    path = float_training.shipped(model)
    if path is None:
        raise models.CheckpointError(f"{model}: no float checkpoint is shipped in {paths.checkpoints_dir()}")
    return path


def _key(point: Point, recipe: QatRecipe) -> dict[str, Any]:
    switches = {
        "first_last_bits": recipe.policy.first_last_bits, "precision": recipe.config.precision, "lr": recipe.config.lr,
        "weight_decay": recipe.config.weight_decay, **({"distill": point.distill} if point.distill else {}),
        **({"lists": point.lists} if point.lists else {}),
    }  # fmt: skip
    return {
        "experiment": STUDY, "model": point.model, "method": point.method, "w_bits": point.w_bits,
        "a_bits": point.a_bits, "seed": point.seed, "epochs": recipe.config.epochs, "switches": switches,
    }  # fmt: skip


def _score_row(common: dict[str, Any], split: str, score: tuple[float, int]) -> dict[str, Any]:
    switches = common["switches"] if split == "test" else {**common["switches"], "split": split}
    return {**common, "metric": "acc_pct", "value": score[0], "unit": "%", "n_test": score[1], "switches": switches}


def _split(row: dict[str, Any]) -> str:
    return json.loads(row["switches"]).get("split", "test")


def _history_rows(common: dict[str, Any], history: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            **common, "experiment": HISTORY, "metric": metric, "value": row[metric], "unit": unit,
            "switches": {**common["switches"], "epoch": int(row["epoch"])}, "seconds": round(row["seconds"], 1),
        }
        for row in history
        for metric, unit in float_training.CURVES.items()
        if metric != "lr"
    ]  # fmt: skip


def _clips(module: nn.Module) -> dict[str, float]:
    quantizers = act_quantizers(module).items()
    return {name.removesuffix(QUANTIZER_SUFFIX): q.clip().item() for name, q in quantizers if isinstance(q, PACT)}


def _clip_row(common: dict[str, Any], epoch: int, layer: str, clip: float) -> dict[str, Any]:
    switches = {**common["switches"], "epoch": epoch, "layer": layer}
    return {**common, "experiment": CLIPS, "metric": "alpha", "value": clip, "unit": "1", "switches": switches}


def _bits(text: str) -> tuple[int, int]:
    try:
        w_bits, a_bits = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write weight and activation bits as 4,4") from None
    return w_bits, a_bits


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.qat.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--models", nargs="+", default=["resnet20"], metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--bits", nargs="+", type=_bits, default=None, metavar="W,A")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, metavar="N")
    parser.add_argument("--distill", type=float, default=0.0, metavar="SHARE", help="teacher's share of the loss")
    parser.add_argument("--lists", nargs="+", default=(), metavar="CFG", help="seed 001's bits by layer, as cfg-1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ship", action="store_true", help="write the checkpoints into data/checkpoints")
    options = parser.parse_args(arguments)
    run(
        options.profile, names=options.models, methods=options.methods, bits=options.bits, seeds=options.seeds,
        distill=options.distill, lists=options.lists, device=options.device, ship_them=options.ship,
    )  # fmt: skip


if __name__ == "__main__":
    main()
