"""Seed 002's ``{name}_quant.tuple``, ``torch.save((state_dict, quant_list))``, by torch's reader of plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hq_lib.deploy.fpga.formats import Quant, read_file
from hq_lib.deploy.fpga.layers import FpgaiError, FpgaiLayer, Stage, check_quant, need
from hq_lib.models.public import CheckpointError, unpickled

GAIN = 255
"""Activation steps per unit. The seed's last Python uses 255; its NumPy program and its shipped files use 256."""


def read_tuple(path: Path | str, stages: Sequence[Stage], *, gain: int = GAIN) -> list[FpgaiLayer]:
    """Return the network in the file ``path``; tensors saved on a GPU are read like any.

    Args:
        path:   holds "c1.weight" int32 (values 0..255) and "c1.bias" float32 real units in layer order, and the list of
                each layer's multiplier, shift and zero point; bias = rint(bias_real gain / (m 2^-shift)).
        stages: shapes and order; layers are matched by position, and called as the stages are.
        gain:   255 (exact), or 256 as in the seed's NumPy program and shipped ``lenet_bias.bin``.

    Raises:
        FpgaiError: not such a file, truncated, or a pickle that asks for anything but tensors and numbers (torch.load
                    with weights_only=True runs none); another number of layers, other shapes, weights outside 0..255;
                    names file and layer.
    """
    content = read_file(Path(path))
    try:
        return _layers(*_contents(unpickled(content, path)), stages, gain)
    except CheckpointError as error:
        raise FpgaiError(str(error)) from error
    except FpgaiError as error:
        raise FpgaiError(f"{path}: {error}") from error


def _contents(result: Any) -> tuple[dict[str, np.ndarray], list[Quant]]:
    """Return the arrays by name and the quant triples of what was unpickled."""
    sound = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], dict) and type(result[1]) is list
    need(sound, "it holds no (state_dict, list)")
    state, numbers = result
    plain = all(isinstance(k, str) and isinstance(v, torch.Tensor) and v.is_cpu for k, v in state.items())
    need(plain, "its state dict holds more than tensors")
    need(all(type(n) is int for n in numbers) and len(numbers) % 3 == 0, "its list is not made of integer triples")
    try:
        arrays = {key: value.detach().numpy() for key, value in state.items()}
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse
        raise FpgaiError(f"its state dict holds a tensor that is no plain array ({error})") from error
    return arrays, [(m, s, z) for m, s, z in zip(*[iter(numbers)] * 3, strict=True)]


def _layers(state: dict[str, np.ndarray], quants: list[Quant], stages: Sequence[Stage], gain: int) -> list[FpgaiLayer]:
    weights = [key for key in state if key.endswith(".weight")]
    counts = (len(weights), len(state) - len(weights), len(quants))
    need(set(counts) == {len(stages)}, f"{counts} weights, biases and quant triples for {len(stages)} stages")
    layers = []
    for stage, key, quant in zip(stages, weights, quants, strict=True):
        check_quant(*quant, f"layer {stage.name!r}")
        w, b = state[key], state.get(f"{key.removesuffix('.weight')}.bias")
        is_byte = w.dtype.kind in "iu" and w.min(initial=0) >= 0 and w.max(initial=0) <= 255
        need(is_byte, f"{key!r}: weights that are not integers in 0..255")
        if b is None or b.shape != stage.shape[:1] or w.shape != stage.shape:
            found = "no bias" if b is None else f"bias {b.shape}"
            raise FpgaiError(f"{key!r} is {w.shape} with {found}; stage {stage.name!r} needs {stage.shape}")
        layers.append(FpgaiLayer(stage, w.astype(np.uint8), bias_integers(b, quant, gain, key), *quant))
    return layers


def bias_integers(bias: np.ndarray, quant: Quant, gain: float, what: str) -> np.ndarray:
    """Return rint(bias gain / (m 2^-shift)), int32 (C_out,), of real biases; ``FpgaiError`` beyond int32."""
    steps = np.rint(np.ldexp(bias.astype(np.float64) * gain / quant[0], quant[1]))
    fits = bool(np.all(np.isfinite(steps))) and np.abs(steps).max(initial=0) < 2**31
    need(fits, f"{what!r}: a bias is not finite or exceeds int32 accumulator steps")
    return steps.astype(np.int32)
