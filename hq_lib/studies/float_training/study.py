"""Float training: the networks that everything else starts from (notebook 01).

    python -m hq_lib.studies.float_training.study --profile full --models resnet20 --seeds 0

trains (or resumes) the recipe of a profile, appends rows to ``float_training.csv`` and the learning curve to
``float_history.csv``; ``--ship`` also writes the checkpoint with its run record into ``data/checkpoints``.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from hq_lib import data, models
from hq_lib.results import figures, labels, paths, provenance, published, store, tables
from hq_lib.results import rows as rows_schema
from hq_lib.training import FitResult, evaluate, fit, recipe
from hq_lib.training.recipes import find

STUDY, HISTORY, REFERENCE = "float_training", "float_history", "float_reference"
MODELS = ("resnet20", "lenet", "toynet")
SEEDS = {"smoke": (0,), "quick": (0,), "full": (0, 1, 2)}
N_TEST = {"smoke": 200, "quick": None, "full": None}
MAX_BYTES = 4_000_000  # of a checkpoint in float32; a larger one is stored in float16
CURVES = {"train_loss": "nat", "val_acc_pct": "%", "lr": "1"}


def run(
    profile: str, *, names: Sequence[str] = MODELS, seeds: Sequence[int] | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """Trains each network with each seed from scratch; the study's rows.

    Args:
        profile: chooses recipe, images and output folders; a run that was killed resumes from its last epoch.
        names:   networks, as in ``recipes.RECIPES``.
        seeds:   default: one in smoke and quick, three in full.
        device:  "cpu" or "cuda".
    """
    for name in names:
        for seed in SEEDS[paths.check_profile(profile)] if seeds is None else seeds:
            train_one(name, profile, seed, device=device)
    return store.read(STUDY, profile=profile)


def train_one(name: str, profile: str, seed: int, *, device: str = "cpu", short: bool = False) -> nn.Module | None:
    """One network trained (or resumed) and its rows appended; None where the embedded data do not fit the network.

    ``short`` takes the few-epoch recipe, with its own run folder and network options.
    """
    dataset, config, n_train = recipe(name, profile, seed=seed, short=short)
    train = data.load_or_embedded(dataset, "train", n=n_train)
    if train.spec.name != dataset and train.spec.in_shape != data.SPECS[dataset].in_shape:
        print(f"{name}: skipped, {dataset} is not available and the embedded digits do not fit it")
        return None
    val = data.load(train.spec.name, "val")
    test = data.load(train.spec.name, "test", n=N_TEST[profile])
    torch.manual_seed(seed)
    options = find(name, short=short).options
    net = models.build(name, n_classes=train.spec.n_classes, in_channels=train.spec.in_shape[0], **options).to(device)
    print(f"{name}, seed {seed}: {config.epochs} epochs on {len(train)} images of {train.spec.name}", flush=True)
    done = fit(net, train, val, config, run_dir(name, profile, seed, short=short))
    score = evaluate(net, test)
    print(f"{name}, seed {seed}: test {score.acc_pct:.2f} % of {score.n} images", flush=True)
    common = {
        "experiment": STUDY, "model": name, "dataset": train.spec.name, "method": "float", "seed": seed,
        "epochs": config.epochs, "n_train": len(train), "switches": _switches(config.precision, options, short),
        "seconds": round(done.seconds, 1), **provenance.stamp(device),
    }  # fmt: skip
    store.append(STUDY, _score_rows(common, done, score.acc_pct, score.n, len(val)), profile=profile)
    store.append(HISTORY, _history_rows(common, done), profile=profile)
    return net


def run_dir(name: str, profile: str, seed: int, *, short: bool = False) -> Path:
    """The folder of a run: its state, configuration and log."""
    return paths.runs_dir(profile) / STUDY / f"{name}{'_short' * short}_s{seed}"


def _is_short(switches: str) -> bool:
    return json.loads(switches).get("recipe") == "short"


def _switches(precision: str, options: Mapping[str, Any], short: bool) -> dict[str, Any]:
    return {"precision": precision, **({"recipe": "short", **options} if short else {})}


def _score_rows(common: dict, done: FitResult, test_acc_pct: float, n_test: int, n_val: int) -> list[dict]:
    val = {**common, "switches": {**common["switches"], "split": "val"}}
    return [
        {**common, "metric": "acc_pct", "value": test_acc_pct, "unit": "%", "n_test": n_test},
        {**val, "metric": "acc_pct", "value": done.val_acc_pct, "unit": "%", "n_test": n_val},
    ]


def _history_rows(common: dict, done: FitResult) -> list[dict]:
    return [
        {
            **common, "experiment": HISTORY, "metric": metric, "value": row[metric], "unit": unit,
            "switches": {**common["switches"], "epoch": int(row["epoch"])},
            "seconds": round(row["seconds"], 1),
        }
        for row in done.history
        for metric, unit in CURVES.items()
    ]  # fmt: skip


def history(profile: str) -> pd.DataFrame:
    """The learning curves of a profile: columns model, dataset, seed, epoch, train_loss, val_acc_pct, lr.

    Of a network trained by both recipes, the full one's.
    """
    rows = store.read(HISTORY, profile=profile)
    rows = rows.loc[rows["profile"] == profile]
    rows = rows.assign(epoch=[json.loads(s)["epoch"] for s in rows["switches"]], short=rows["switches"].map(_is_short))
    rows = rows.loc[rows["short"] == rows.groupby(["model", "dataset", "seed"])["short"].transform("min")]
    wide = rows.pivot_table(index=["model", "dataset", "seed", "epoch"], columns="metric", values="value")
    return wide.reset_index().rename_axis(columns=None)


def reference(profile: str, *, names: Sequence[str] = MODELS, device: str = "cpu") -> pd.DataFrame:
    """The shipped checkpoints evaluated on test; rows of ``float_reference.csv``.

    Skips, with a line, a network that ships no checkpoint or whose data set is not available.
    """
    for name in names:
        path = shipped(name)
        if path is None:
            print(f"{name}: no checkpoint is shipped")
            continue
        net, record = models.load_checkpoint(path)
        try:
            test = data.load(record["dataset"], "test", n=N_TEST[profile])
        except data.DataUnavailableError:
            print(f"{name}: {record['dataset']} is not available, its checkpoint is not evaluated")
            continue
        with provenance.stopwatch(device) as watch:
            score = evaluate(net.to(device), test)
        row = {
            "experiment": REFERENCE, "model": name, "dataset": record["dataset"], "method": "float",
            "seed": record["seed"], "epochs": record["config"]["epochs"], "n_train": record["n_train"],
            "n_test": score.n, "metric": "acc_pct", "value": score.acc_pct, "unit": "%", "seconds": watch.seconds,
            "switches": {"checkpoint": path.name}, **provenance.stamp(device),
        }  # fmt: skip
        store.append(REFERENCE, [row], profile=profile)
    return store.read(REFERENCE, profile=profile)


def shipped(name: str, *, seed: int = 0) -> Path | None:
    """The committed float checkpoint of a network, or None."""
    path = paths.checkpoints_dir() / f"{name}_float_s{seed}.safetensors"
    return path if path.exists() else None


def ship(name: str, net: nn.Module, profile: str, seed: int, *, short: bool = False) -> Path:
    """Writes the trained network and its run record into ``data/checkpoints``; returns the path.

    A network beyond ``MAX_BYTES`` in float32 is stored in float16, and the record's accuracies are those of the weights
    as stored.
    """
    dataset, config, _ = recipe(name, profile, seed=seed, short=short)
    rows, options = store.read(STUDY, profile=profile), dict(find(name, short=short).options)
    rows = rows.loc[(rows["model"] == name) & (rows["seed"] == seed) & (rows["epochs"] == config.epochs)]
    scores = [row for row in rows.to_dict("records") if _is_short(row["switches"]) == short]
    acc_pct = {"val" if "split" in row["switches"] else "test": row["value"] for row in scores}
    record: dict[str, Any] = {
        "model": name, "options": options, "n_classes": data.SPECS[dataset].n_classes,
        "in_channels": data.SPECS[dataset].in_shape[0], "dataset": dataset, "seed": seed, "profile": profile,
        "recipe": "short" if short else "full", "config": config.as_dict(), "n_train": scores[0]["n_train"],
        "acc_pct": acc_pct, "kept": f"{config.keep} epoch; test was seen once, after training",
        **{key: scores[0][key] for key in rows_schema.PROVENANCE},
    }  # fmt: skip
    dtype = torch.float16 if sum(4 * value.numel() for value in net.state_dict().values()) > MAX_BYTES else None
    if dtype is not None:
        net = models.rounded_to(net, dtype)
        stored = {split: evaluate(net, data.load(dataset, split)).acc_pct for split in ("val", "test")}
        record |= {"acc_pct": stored, "stored_as": "float16", "acc_pct_before_rounding": acc_pct}
    path = paths.checkpoints_dir() / f"{name}_float_s{seed}.safetensors"
    models.save_checkpoint(path, net, record, dtype=dtype)
    return path


def table(profile: str) -> pd.DataFrame:
    """tab_float_training: the shipped networks, size, epochs and test accuracy beside the group's published one."""
    rows = store.read(REFERENCE, profile=profile)
    if rows.empty:
        return pd.DataFrame({"model": list(MODELS), "ours": tables.NOT_RUN})
    compared = published.load().query("table == 'seed001' and method == 'float' and model in @rows.model.unique()")
    out = tables.build(rows, compared, index=["model", "dataset"])
    sizes = {labels.printed("model", name): _parameters(name) for name in set(rows["model"])}
    out.insert(2, "parameters", [sizes.get(name, tables.NOT_RUN) for name in out["model"]])
    epochs = {labels.printed("model", row["model"]): str(row["epochs"]) for row in rows.to_dict("records")}
    out.insert(3, "epochs", [epochs.get(name, tables.NOT_RUN) for name in out["model"]])
    return out


def _parameters(name: str) -> str:
    path = shipped(name)
    return tables.NOT_RUN if path is None else f"{models.count_parameters(models.load_checkpoint(path)[0]):,}"


def caption(profile: str) -> str:
    """What tab_float_training shows, with profile, images and seeds."""
    rows = store.read(REFERENCE, profile=profile)
    counted = " and ".join(sorted({f"{n:,} test images" for n in rows["n_test"]})) or tables.NOT_RUN
    claim = "Float test accuracy in percent of the shipped checkpoints, beside the group's published one"
    return figures.caption(claim, profile=profile, n=counted, seeds=sorted(set(rows["seed"])))


def findings(profile: str) -> list[str]:
    """The sentences that the rows of a profile support."""
    lines = []
    for row in store.read(REFERENCE, profile=profile).to_dict("records"):
        share = row["value"] / 100
        error = 100 * (share * (1 - share) / row["n_test"]) ** 0.5
        lines.append(
            f"{row['model']}: {row['value']:.2f} % of {row['n_test']:,} {row['dataset']} test images "
            f"(standard error {error:.2f}), one seed, {row['epochs']} epochs on {row['n_train']:,} images"
        )
    for _, curve in history(profile).groupby(["model", "dataset", "seed"]):
        first, last = curve.to_dict("records")[0], curve.to_dict("records")[-1]
        lines.append(
            f"{last['model']}, seed {last['seed']}, trained here for {last['epoch']} epochs on {last['dataset']}: "
            f"loss {first['train_loss']:.3f} -> {last['train_loss']:.3f}, "
            f"validation {first['val_acc_pct']:.2f} -> {last['val_acc_pct']:.2f} %"
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.float_training.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="the few-epoch recipe (networks of recipes.SHORT)")
    parser.add_argument("--ship", action="store_true", help="write data/checkpoints/<model>_float_s<seed>.safetensors")
    options = parser.parse_args(arguments)
    for name in options.models:
        for seed in options.seeds or SEEDS[options.profile]:
            net = train_one(name, options.profile, seed, device=options.device, short=options.short)
            if options.ship and net is not None:
                print(f"shipped {ship(name, net, options.profile, seed, short=options.short).name}")


if __name__ == "__main__":
    main()
