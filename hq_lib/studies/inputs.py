"""What a ``Configuration`` names, opened: the network, its images, the ones it is calibrated on."""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hq_lib import data, graph, models
from hq_lib.data import DataSpec, ImageSet
from hq_lib.graph.network_file import OWN
from hq_lib.models.public import load_state
from hq_lib.ptq import selection
from hq_lib.results.hints import check_known
from hq_lib.studies.bench import shipped
from hq_lib.studies.configuration import PICTURES, SIZES, TORCHVISION, Configuration
from hq_lib.training.recipes import RECIPES

N_CALIB = 1024
"""Calibration images where a run says no number."""


def built(run: Configuration, **defaults: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(float network as its constructor leaves it, weights drawn from ``seed``; what its record says of that).

    ``defaults``: options of a network of ours, n_classes and in_channels among them, where ``options`` say none.
    """
    torch.manual_seed(run.seed)
    if run.net:
        return _own(run, run.options), {"model": OWN, "options": run.options}
    given = defaults | run.options
    sizes = {key: given.pop(key) for key in SIZES if key in given}
    return models.build(run.model, **sizes, **given), {"model": run.model, "options": given, **sizes}


def network(run: Configuration) -> tuple[nn.Module, dict[str, Any]]:
    """The float network with its weights, in eval mode, and its run record.

    Raises ``ValueError`` for a network of ours that no weights are known of, and where ``weights`` are of another
    network than ``model`` and ``options`` say, or of a quantized one.
    """
    taken, file = (None, None) if run.net else (models.TAKEN.get(run.model), shipped(run.model))
    theirs, _, which = run.weights.partition(":")
    if theirs == TORCHVISION:
        file = None
    elif run.weights:
        file = models.fetched(run.weights) if "://" in run.weights else Path(run.weights)
    if file is not None and file.suffix == ".safetensors":
        net, record = opened(run, file)
        if "policy" in record:
            raise ValueError(f"weights {file} are of a quantized network: a float one is needed here")
        if not run.net and record["model"] != run.model:
            raise ValueError(f"model is {run.model!r}, and weights {file} are of {record['model']!r}: leave model out")
        held = {**(record.get("options") or {}), **{key: record[key] for key in SIZES if key in record}}
        apart = [key for key, value in run.options.items() if held.get(key) != value]
        if apart and (held or not run.net):
            raise ValueError(f"options: the network of {file} was built with {held or 'none'}: leave {apart[0]} out")
        return net, record
    net, record = built(run)
    if theirs == TORCHVISION:
        state, taken = models.published(run.model, which or "DEFAULT")
        load_state(net, state, source=run.weights)
    elif file is not None:
        net = models.load_public(file, net)
    elif taken is None and not run.net:
        raise ValueError(f"weights: none are shipped for {run.model!r}; train them (hq train --model "
                         f"{run.model} --method float), or name a file")  # fmt: skip
    return net.eval(), {**record, **({} if run.net else {"images": taken})}


def opened(run: Configuration, file: Path) -> tuple[nn.Module, dict[str, Any]]:
    """(network in eval mode, record) of a float or quantized network file."""
    state, record = models.read_checkpoint(file)
    made = _own(run, run.options or record.get("options") or {}) if run.net else None
    if made is None and record.get("model", OWN) == OWN:
        raise ValueError(f"{file.name} holds a network of its maker's own: say which, --net module:Class")
    if "policy" in record:
        return graph.load(file, net=made), record
    if made is None:
        return models.load_checkpoint(file)
    load_state(made, state, source=file.name)
    return made.eval(), record


def _own(run: Configuration, options: Mapping[str, Any]) -> nn.Module:
    try:
        return own(run.net)(**options)
    except TypeError as error:
        raise ValueError(f"options: {run.net} cannot be built with {dict(options) or 'none'}: {error}") from error


def images(run: Configuration, split: str, record: Mapping[str, Any], n: int = 0) -> ImageSet:
    """The first ``n`` (0: all) images of a split, as the network of the record takes them."""
    name = _dataset(run, record)
    if not name:
        raise ValueError(f"data: the network's file does not say; choose one of {', '.join(data.SPECS)}")
    said = {key: value for key, value in record.items() if value}
    spec = normalization(run, {"dataset": name, **said})
    if name == PICTURES:
        spec = dataclasses.replace(spec, name=name, n_val=0, note="")
    found = data.load(name, split, root=run.root or None, n=n or None, spec=spec)
    return found.normalized_by(spec.mean, spec.std)


def validation(run: Configuration, record: Mapping[str, Any]) -> ImageSet | None:
    """``n_val`` (0: all) validation images; None for a folder of pictures, which holds none out of train."""
    if _dataset(run, record) == PICTURES:
        return None
    if record.get("trained_on") == "trainval" and _dataset(run, record) == record.get("dataset"):
        print("the float network was trained on the validation images too: their accuracies flatter", flush=True)
    return images(run, "val", record, run.n_val)


def _dataset(run: Configuration, record: Mapping[str, Any]) -> str:
    return run.data or (PICTURES if run.root else record.get("dataset", ""))


def normalization(run: Configuration, record: Mapping[str, Any]) -> DataSpec:
    """The data set of a network's record, with size, mean and standard deviation that it was trained with."""
    name = record.get("dataset") or _dataset(run, {})
    check_known(name, data.SPECS, "data set")
    told: Any = record.get("images") or {}
    if not isinstance(told, Mapping):
        raise ValueError(f"images: the network's file says {told!r:.60}, not mean, std and in_shape")
    found = {key: told[key] for key in ("mean", "std", "in_shape", "short_side", "classes") if told.get(key)}
    found |= {key: value for key in ("mean", "std") if (value := getattr(run, key))}
    if run.size:
        found |= {"in_shape": (3, run.size, run.size), "short_side": 0}
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return dataclasses.replace(data.SPECS[name], **plain)


def calibration(run: Configuration, record: Mapping[str, Any]) -> ImageSet:
    """The images of the manifest, each hash verified, or ``n_calib`` training images, balanced if that can be."""
    if not run.manifest:
        if run.metric or run.strategy != "random":
            raise ValueError("strategy and metric are of hq select: leave them out, or give the manifest it writes")
        return images(run, "train", record, run.n_train).drawn(run.n_calib or N_CALIB, run.seed)
    listed = selection.read(Path(run.manifest))
    if listed.files and not run.root:
        raise ValueError(f"root: {run.manifest} names files; give the folder that they lie in")
    name = PICTURES if listed.files else listed.dataset
    if not run.data and name != record.get("dataset", name):
        raise ValueError(
            f"manifest {run.manifest} is of {name}, the network of {record['dataset']}: choose images of its own "
            f"data (hq select --set weights=...), or say data={name}"
        )
    spec = normalization(run, {**record, "dataset": name} if listed.files else {"dataset": name, **record})
    found = data.load(name, listed.split, root=run.root or None, spec=spec)
    return selection.take(listed, found).normalized_by(spec.mean, spec.std)


def selected(run: Configuration) -> selection.Manifest:
    """``n_calib`` training images by ``strategy`` and ``metric``, as a manifest."""
    if run.metric and run.strategy == "random":
        raise ValueError(f"metric is {run.metric!r}, and strategy random: choose lowest, highest or trimmed")
    if run.weights.endswith(".safetensors"):
        record = models.read_checkpoint(run.weights)[1]
    else:
        dataset = RECIPES[run.model].dataset if run.model in RECIPES and not run.net else ""
        record = {"dataset": dataset, "images": None if run.net else models.TAKEN.get(run.model)}
    found, n = images(run, "train", record, run.n_train), run.n_calib or N_CALIB
    scores = selection.score(found.images, run.metric) if run.metric else None
    how: Any = {"strategy": run.strategy, "seed": run.seed}
    balanced = found.balances(n)
    if not balanced and n >= found.spec.n_classes:
        print(f"not every class has {n} / {found.spec.n_classes} images: chosen from all alike")
    labels = found.labels if balanced else None
    chosen = selection.select(scores, n, labels=labels, n_images=len(found), **how)
    return selection.from_images(found, chosen, metric=run.metric, balanced=balanced, **how)


def own(name: str) -> Any:
    """The class (or function) of "module:Class", imported from the current folder."""
    module, colon, made = name.partition(":")
    if not (module and colon and made):
        raise ValueError(f"net is {name!r}: write module:Class, as mynet:MyNet for class MyNet of mynet.py")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), made)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"net {name!r} cannot be imported from {Path.cwd()}: {error}") from error
