"""The project's own weights on disk: safetensors, which hold tensors only, beside a run record."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hq_lib.models.public import CheckpointError, load_state
from hq_lib.models.zoo import build
from hq_lib.results import atomic

REQUIRED = ("model", "options", "dataset", "n_classes", "in_channels")


def save_checkpoint(path: Path, net: nn.Module, record: Mapping[str, Any], *, dtype: torch.dtype | None = None) -> None:
    """Writes the network's state to ``path`` (.safetensors) and its run record to the same name with .json.

    Args:
        path:   ends in ``.safetensors``.
        net:    any network of ``models.build``.
        record: how the weights came about; needs ``REQUIRED`` so that the network can be built again.
        dtype:  what real numbers are stored in; None = as they are. Loading gives float32 again, so ``net`` should be
                ``rounded_to(net, dtype)`` already: what was evaluated is then what is stored.
    """
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        raise CheckpointError(f"the record of {path.name} lacks {', '.join(missing)}")
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    if dtype is not None:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    weights = safetensors.torch.save(state)
    atomic.write_bytes(path, weights)
    full = {**record, "sha256": hashlib.sha256(weights).hexdigest()}  # ties the two files together
    atomic.write_text(path.with_suffix(".json"), json.dumps(full, indent=1) + "\n")


def rounded_to(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``net`` whose real numbers, running statistics included, ``dtype`` holds exactly (round to nearest).

    Raises ``CheckpointError`` naming a tensor that would overflow.
    """
    rounded = copy.deepcopy(net)
    for key, value in rounded.state_dict().items():
        if value.is_floating_point():
            value.copy_(value.to(dtype))
            if not value.isfinite().all():
                raise CheckpointError(f"{key} has values beyond {dtype}: store it as float32")
    return rounded


def load_checkpoint(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """(network in eval mode, run record) of a checkpoint written by ``save_checkpoint``.

    Raises ``CheckpointError`` where a file is missing or damaged, or the weights are those of another network.
    """
    state, record = read_checkpoint(path)
    net = build_recorded(record)
    load_state(net, state, source=path.name)
    return net.eval(), record


def build_recorded(record: Mapping[str, Any]) -> nn.Module:
    """The untrained float network that a run record speaks of."""
    sizes = {"n_classes": record["n_classes"], "in_channels": record["in_channels"]}
    return build(record["model"], **sizes, **record["options"])


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, run record) of a checkpoint, certain to belong together; ``CheckpointError`` as ``load_checkpoint``."""
    record_path = path.with_suffix(".json")
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        absent = [key for key in (*REQUIRED, "sha256") if key not in record]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{record_path} is missing or not JSON: restore it from the repository") from error
    if absent:
        raise CheckpointError(f"{record_path} lacks {', '.join(absent)}: it is no run record")
    try:
        weights = path.read_bytes()
        state = safetensors.torch.load(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}): restore it from the repository") from error
    if hashlib.sha256(weights).hexdigest() != record["sha256"]:
        raise CheckpointError(f"{path.name} and {record_path.name} are of different runs: restore both, or ship again")
    return state, record
