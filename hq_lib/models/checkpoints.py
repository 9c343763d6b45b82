"""Weights on disk: the project's own (safetensors beside a run record) and public ones (by key mapping).

Nothing is ever unpickled from a stranger: safetensors hold tensors only, and public ``.th``/``.pt`` files are read with
``weights_only=True``, which refuses anything but tensors and plain containers.
"""

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hq_lib import atomic

REQUIRED = ("model", "options", "dataset", "n_classes", "in_channels")
STRIP_PARALLEL = {r"^module\.": ""}  # the prefix that torch.nn.DataParallel leaves
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


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
    from hq_lib import models  # the package imports this module

    sizes = {"n_classes": record["n_classes"], "in_channels": record["in_channels"]}
    return models.build(record["model"], **sizes, **record["options"])


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


def load_state(net: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Loads a state of exactly this network's keys and shapes, else ``CheckpointError`` listing every difference."""
    own = net.state_dict()
    needed = {key for key in own if not key.endswith("num_batches_tracked")}  # older checkpoints lack these counters
    problems = {
        "missing": sorted(needed - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
    }
    listed = {kind: ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "") for kind, keys in problems.items() if keys}
    found = [f"{kind}: {keys}" for kind, keys in listed.items()]
    if found:
        raise CheckpointError(f"{source} is not a checkpoint of this {type(net).__name__}; {'; '.join(found)}")
    net.load_state_dict({**own, **state})


def load_public(path: Path, net: nn.Module, *, key_map: Mapping[str, str] = STRIP_PARALLEL) -> nn.Module:
    """``net`` with the weights of a public ``.th`` or ``.pt`` file.

    Args:
        path:    holds a state dict, alone or under the key ``state_dict``.
        net:     the network that the file belongs to; changed in place.
        key_map: regular expression -> replacement, applied to every key in this order.

    Raises:
        CheckpointError: unreadable, wants to run code, or a checkpoint of another network (keys listed).
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was refused: loading it could run code") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no state dict: expected names and tensors")
    load_state(net, {_renamed(key, key_map): value for key, value in state.items()}, source=path.name)
    return net


def _renamed(key: str, key_map: Mapping[str, str]) -> str:
    for pattern, replacement in key_map.items():
        key = re.sub(pattern, replacement, key)
    return key


def resnet20_akamaster(path: Path) -> nn.Module:
    """The public ResNet-20 with option-A shortcuts (akamaster/pytorch_resnet_cifar10), eval mode.

    It was trained with ImageNet's mean and standard deviation: on ``test.normalized_by(*IMAGENET_MEAN_STD)`` it gives
    91.73 %.
    """
    from hq_lib.models.resnet import ResNet

    return load_public(path, ResNet(20, option="A")).eval()
