"""Quantized networks on disk: state and run record beside it, with the policy that rebuilds the graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from hq_lib.graph.policy import BitPolicy
from hq_lib.graph.rewrite import quantize
from hq_lib.graph.state import load_state
from hq_lib.models import CheckpointError, build_recorded, read_checkpoint, save_checkpoint


def save_quantized(path: Path, qnet: fx.GraphModule, policy: BitPolicy, record: Mapping[str, Any]) -> None:
    """Writes a quantized network to ``path`` (.safetensors), its record with the policy to the same name with .json.

    Args:
        path:   ends in ``.safetensors``.
        qnet:   from ``quantize(models.build(...), policy, ...)``, fitted or trained.
        policy: the policy it was quantized with.
        record: as for ``models.save_checkpoint``, and ``in_shape``, the (C, H, W) of an image.

    Raises:
        CheckpointError: the record lacks a key.
    """
    if "in_shape" not in record:
        raise CheckpointError(f"the record of {path.name} lacks in_shape")
    save_checkpoint(path, qnet, {**record, "policy": policy.to_dict()})


def load_quantized(path: Path) -> tuple[fx.GraphModule, dict[str, Any]]:
    """(quantized network in eval mode, run record) of a checkpoint that ``save_quantized`` wrote.

    Raises ``CheckpointError`` for a missing or damaged file, or one of a float network.
    """
    state, record = read_checkpoint(path)
    absent = [key for key in ("policy", "in_shape") if key not in record]
    if absent:
        lacking = ", ".join(absent)
        raise CheckpointError(f"{path.name} holds no quantized network (no {lacking}): models.load_checkpoint reads it")
    qnet = quantize(build_recorded(record), BitPolicy.from_dict(record["policy"]), torch.zeros(1, *record["in_shape"]))
    try:
        load_state(qnet, state)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path.name} does not fit the policy in its record: {error}") from error
    return qnet.eval(), record
