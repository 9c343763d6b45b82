"""What is kept of a run: the record in the file that it writes, the folder in which a killed run goes on."""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hq_lib import models
from hq_lib.data import ImageSet
from hq_lib.data.folder import Pictures
from hq_lib.graph.network_file import OWN
from hq_lib.results import paths
from hq_lib.studies.configuration import SIZES, Configuration

BUILD = ("model", "options", *SIZES)
"""What a record says of how a network is built."""
AFTERWARDS = ("output", "device", "n_test", "requantizer", "crossbar")
"""Keys that no weight depends on: a killed run goes on with others."""


def record(run: Configuration, source: Mapping[str, Any], images: ImageSet, **more: Any) -> dict[str, Any]:
    """What a network file says of this run, besides what ``graph.save`` adds; ``start``: the digits of the file of
    the network that it began with."""
    facts = {key: source[key] for key in BUILD if key in source}
    facts |= {"model": OWN, "options": run.options or source.get("options") or {}} if run.net else {}
    facts |= {"start": source["sha256"]} if "sha256" in source else {}
    asked = {key: value for key, value in dataclasses.asdict(run).items() if key != "output"}
    return {
        **facts, "dataset": images.spec.name, "images": dataclasses.asdict(images.spec), "method": run.method,
        "seed": run.seed, "configuration": asked, **more,
    }  # fmt: skip


def folder(run: Configuration, net: nn.Module, source: Mapping[str, Any], train: ImageSet) -> Path:
    """Where the run is kept: none resumes what began elsewhere, from other weights or images, or otherwise.

    What ``net`` computes is told by two digits of its logits on noise, which another machine's are too.
    """
    told = record(run, source, train)
    told["configuration"] = {k: v for k, v in told["configuration"].items() if k not in AFTERWARDS}
    pictures = train.images.names if isinstance(train.images, Pictures) else []
    computed = [re.sub(" at 0x[0-9a-f]+", "", repr(net)), *_digits(net, train.spec.in_shape)]
    text = json.dumps([str(Path.cwd()), told, pictures, computed], sort_keys=True)
    tensors = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    digits = models.digest(text, {**tensors, "labels": train.labels, "indices": train.indices})
    return paths.runs_dir(run.profile) / "hq" / f"{run.name}_{digits[:8]}"


def _digits(net: nn.Module, in_shape: tuple[int, ...]) -> list[str]:
    """Two digits of some logits on noise; none of a network that cannot take it, which is refused in words later."""
    noise = torch.randn(2, *in_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits = copy.deepcopy(net).cpu().eval()(noise)
    except Exception:  # a network of the user's own may raise anything
        return []
    return [f"{value:.2g}" for value in logits.flatten()[:20].tolist()] if isinstance(logits, Tensor) else []
