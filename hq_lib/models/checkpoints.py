"""The project's own files of weights: safetensors, which hold tensors only, with the run record and a hash inside."""

import copy
import hashlib
import json
import os
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
_RECORD = "hq_record"
"""Key of the file's metadata: 64 hexadecimal digits of SHA-256, then the record as JSON."""


def save_checkpoint(path: str | os.PathLike, net: nn.Module, record: Mapping[str, Any]) -> None:
    """Writes the float network's state and its run record to ``path``.

    Args:
        path:   ends in ``.safetensors``.
        net:    any network of ``models.build``; of ``rounded_to``, in half the bytes. Loading gives float32 again.
        record: how the weights came about; needs ``REQUIRED`` so that the network can be built again.
    """
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        raise CheckpointError(f"the record of {Path(path).name} lacks {', '.join(missing)}")
    write_checkpoint(path, net.state_dict(), {key: value for key, value in record.items() if key != "sha256"})


def write_checkpoint(path: str | os.PathLike, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes tensors, a record of plain data and the SHA-256 of both to ``path`` (.safetensors), whole or not at all.

    Raises ``CheckpointError`` for another ending, a tensor that is none, or a record that is no plain data.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.name}: the file's name has to end in .safetensors")
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path.name}: {odd[0]!r} of the state is a {type(state[odd[0]]).__name__}, no tensor")
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    try:
        text = json.dumps(dict(record), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: its record has to be plain data that JSON holds: {error}") from error
    atomic.write_bytes(path, safetensors.torch.save(plain, {_RECORD: digest(text, plain) + text}))


def digest(text: str, state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and tensors with their names, 64 hexadecimal digits."""
    sha = hashlib.sha256(text.encode())
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def rounded_to(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``net`` in ``dtype``, running statistics included (to nearest); its ``float()`` is what will be loaded.

    Raises ``CheckpointError`` naming a tensor that would overflow.
    """
    rounded = copy.deepcopy(net).to(dtype)
    for key, value in rounded.state_dict().items():
        if not value.isfinite().all():
            raise CheckpointError(f"{key} has values beyond {dtype}: store it as float32")
    return rounded


def load_checkpoint(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """(float network in eval mode, run record) of a checkpoint written by ``save_checkpoint``.

    Raises ``CheckpointError`` where the file is missing or damaged, of a quantized network, or the weights are those of
    another network.
    """
    path = Path(path)
    state, record = read_checkpoint(path)
    if "policy" in record:
        raise CheckpointError(f"{path.name} holds a quantized network ({record.get('form')}): graph.load opens it")
    if absent := [key for key in REQUIRED if key not in record]:
        raise CheckpointError(f"the record of {path.name} lacks {', '.join(absent)}: no network can be built from it")
    net = build_recorded(record, state)
    load_state(net, state, source=path.name)
    return net.eval(), record


def build_recorded(record: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The untrained float network that a run record speaks of, of no more weights than the file of ``state`` has bits.

    Raises ``CheckpointError`` where there is none of that name, of those sizes or options, or it would be larger: the
    record of a stranger's small file fills no memory.
    """
    sizes = {"n_classes": record.get("n_classes"), "in_channels": record.get("in_channels")}
    n_left = 8 * sum(value.nbytes for value in state.values())

    def count(_: nn.Module, key: str, parameter: nn.Parameter | None) -> None:  # before a value is drawn for it
        nonlocal n_left
        n_left -= 0 if parameter is None else parameter.numel()
        if n_left < 0:
            raise ValueError(f"it has more weights than the file holds, with a {key!r} of {tuple(parameter.shape)}")  # type: ignore[union-attr]

    counting = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        return build(record["model"], **sizes, **record.get("options") or {})
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the network of the record cannot be built: {error}") from error
    finally:
        counting.remove()


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of a file written by ``write_checkpoint``, float or quantized, certain to be what was written.

    The record's ``sha256`` is that of the content; files shipped before the record was inside keep that of their first
    form, by which rows know them.

    Raises ``CheckpointError`` naming a file that is missing, damaged, or of another kind.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        state = safetensors.torch.load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} is missing, damaged or no safetensors file ({error}): write it again") from error
    found = header.get("__metadata__", {}).get(_RECORD)
    if found is None:
        raise CheckpointError(f"{path.name} holds tensors without a record of how to build their network: build the "
                              "net, then net.load_state_dict(safetensors.torch.load_file(path))")  # fmt: skip
    sha, text = found[:64], found[64:]
    if sha != digest(text, state):
        raise CheckpointError(f"{path.name} is damaged: its content does not match its SHA-256; write it again")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the record of {path.name} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"the record of {path.name} is no mapping but {type(record).__name__}")
    return state, {"sha256": sha, **record}
