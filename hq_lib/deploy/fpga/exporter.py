"""From a float chain with ReLU1 or ReLU to FPGAI's integers, with better scales than seed 002's own exporter.

A ReLU is a ReLU1 of another unit: where t is the largest value behind it, relu(w x + b) / t is clip((w / t) x + b / t,
0, 1) for all inputs seen, and the next layer takes w t. Values beyond t, of inputs not seen, are clipped.

Same files, same arithmetic, other choices: the multiplier has eight significant bits (seed: down to one), weights are
quantized on the grid that the hardware really has, zero is in their range, the zero point is rounded (seed: truncated),
and the biases make up for what the hardware's floors take away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from hq_lib.deploy.fpga.layers import FpgaiError, FpgaiLayer, FpgaiNet, Stage, need
from hq_lib.deploy.fpga.multiplier import nearest_multiplier
from hq_lib.deploy.fpga.semantics import run
from hq_lib.deploy.fpga.tuple_file import GAIN, bias_integers
from hq_lib.graph.folding import fold_bn
from hq_lib.graph.tracing import NodeWatcher

Rounding = Literal["nearest", "floor"]
MIN_IMAGES = 32
"""Fewest images from which the range behind a ReLU is taken."""
Weighted = tuple[Stage, np.ndarray, np.ndarray]


def export(
    net: nn.Module,
    example: Tensor,
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    rounding: Rounding = "nearest",
) -> FpgaiNet:
    """Return ``net`` in FPGAI's integers, to be fed with raw uint8 pixels.

    Args:
        net:      a chain of Conv2d or Linear, each but the last followed by ReLU1 (``nn.Hardtanh(0, 1)``) or ReLU and
                  perhaps one pool; batch norms are folded. ``models.build("lenet")`` is one.
        example:  (B, C, H, W) float32, inputs of ``net``; behind a ReLU they are what ranges are taken from: some
                  hundred training images.
        mean:     what was subtracted from pixel / 255 in training, one value or one per channel.
        std:      what it was divided by then, > 0.
        rounding: "nearest" puts into the biases what the floor of the shift and the truncation of an average pool take
                  away on average; "floor" leaves them as the seed has them.

    Raises:
        FpgaiError: what FPGAI cannot express (unbounded activations, branches, groups ...); names the layer.
    """
    need(rounding in ("nearest", "floor"), f"rounding {rounding!r}: 'nearest' or 'floor'")
    gm = fold_bn(net, example).eval()
    chain = _in_units(_chain(gm), _largest(gm, example), len(example))
    for stage, _, _ in chain[:-1]:
        need(stage.relu1, f"{stage.name!r} has no ReLU or ReLU1 after it: train with clip(x, 0, 1), e.g. relu1=True")
    need(chain[-1][0].pool is None, f"{chain[-1][0].name!r}: a pool cannot end the network")
    chain[0] = _without_normalization(chain[0], mean, std)
    offset = _rounding_offset if rounding == "nearest" else lambda stage: 0.0
    layers = tuple(quantize_layer(stage.name, w, b, offset=offset(stage)) for stage, w, b in chain)
    fpgai = FpgaiNet(tuple(stage for stage, _, _ in chain), layers)
    run(fpgai, np.zeros((1, *example.shape[1:]), np.uint8))  # each layer can read what the one before writes
    return fpgai


def _largest(gm: fx.GraphModule, example: Tensor) -> dict[str, float]:
    """Return for each layer followed by a ReLU the largest value behind it."""
    found: dict[str, float] = {}

    def see(node: fx.Node, value: Any) -> None:
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.ReLU):
            found[str(node.all_input_nodes[0].target)] = float(value.max()) or 1.0

    with torch.no_grad():
        NodeWatcher(gm, see).run(example)
    return found


def _in_units(chain: list[Weighted], largest: dict[str, float], n_images: int) -> list[Weighted]:
    """Return ``chain`` with the values behind each ReLU in units of the largest of them."""
    asked = f"give at least {MIN_IMAGES} training images, or train with ReLU1 (clip(x, 0, 1))"
    first = next(iter(largest), None)
    need(first is None or n_images >= MIN_IMAGES, f"{first!r} has a ReLU, whose range the example tells: {asked}")
    scaled, before = [], 1.0
    for stage, weight, bias in chain:
        unit = largest.get(stage.name, 1.0)
        scaled.append((stage, weight * before / unit, bias / unit))
        before = unit
    return scaled


def quantize_layer(name: str, weight: np.ndarray, bias: np.ndarray, *, offset: float = 0.5) -> FpgaiLayer:
    """Return one layer in integers.

        m 2^-shift near (max(w, 0) - min(w, 0)) / 255,   scale := m 2^-shift
        zp = rint(-min(w, 0) / scale),   q = clip(rint(w / scale) + zp, 0, 255)
        bias_q = rint((255 bias + offset) / scale)

    Args:
        name:   layer name, for errors.
        weight: (C_out, ...) real units, finite.
        bias:   (C_out,) real units.
        offset: added to the output, in output steps (1/255), in [0, 1): 0.5 turns the shift's floor into rounding.
    """
    need(bool(np.isfinite(weight).all() and np.isfinite(bias).all()), f"layer {name!r}: weight or bias not finite")
    low, high = min(float(weight.min()), 0.0), max(float(weight.max()), 0.0)
    try:
        m, shift = nearest_multiplier((high - low) / 255 or 2.0**-8)  # all-zero weights: any scale will do
    except FpgaiError as error:
        raise FpgaiError(f"layer {name!r}: weights in [{low:.3g}, {high:.3g}]: {error}") from error
    scale = math.ldexp(m, -shift)
    zero_point = min(round(-low / scale), 255)
    q = np.clip(np.rint(weight.astype(np.float64) / scale) + zero_point, 0, 255).astype(np.uint8)
    quant = (m, shift, zero_point)
    return FpgaiLayer(name, q, bias_integers(bias.astype(np.float64) + offset / GAIN, quant, GAIN, name), *quant)


def _rounding_offset(stage: Stage) -> float:
    """Return what a stage's floors take away on average, in output steps: always below 1, so that 0 stays 0."""
    n = stage.pool_size**2 if stage.pool == "average" else 1
    return 0.5 + 0.5 * (n - 1) / n


def _without_normalization(first: Weighted, mean: tuple[float, ...], std: tuple[float, ...]) -> Weighted:
    """Return the first layer for raw pixels: w / std, and mean moved into the bias."""
    stage, weight, bias = first
    plain = not any(mean) and all(s == 1 for s in std)
    if plain:
        return first
    need(weight.ndim == 4, f"{stage.name!r}: mean and std belong to a convolution's channels")
    need(all(s > 0 for s in std), f"std {std}: must be above 0")
    need(not any(mean) or stage.padding == 0, f"{stage.name!r} pads with 0 after a mean was subtracted, FPGAI with "
         "pixel 0: train with mean 0, or without padding")  # fmt: skip
    channels = weight.shape[1]
    need({len(mean), len(std)} <= {1, channels}, f"mean {mean} and std {std} for {channels} channels")
    scaled = weight / np.broadcast_to(std, channels)[:, None, None]
    return stage, scaled, bias - (scaled * np.broadcast_to(mean, channels)[:, None, None]).sum((1, 2, 3))


def _chain(gm: fx.GraphModule) -> list[Weighted]:
    """Return stages with their float64 weights and biases, in execution order."""
    chain: list[Weighted] = []
    previous: fx.Node | None = None
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            need(previous is None, "FPGAI nets have one input")
        elif node.op != "output":
            need(node.all_input_nodes == [previous], f"{node.name!r} makes a branch: FPGAI export takes plain chains")
            _read_node(gm, node, chain)
        previous = node
    need(bool(chain), "the network has no convolution or linear layer")
    return chain


def _read_node(gm: fx.GraphModule, node: fx.Node, chain: list[Weighted]) -> None:
    if _is_flatten(node):
        return
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    read: Callable[[str, Any, list[Weighted]], None] | None = _READERS.get(type(module))
    if read is None:
        what = type(module).__name__ if module is not None else node.target
        known = ", ".join(sorted(kind.__name__ for kind in _READERS))
        raise FpgaiError(f"{node.name!r} is {what}: FPGAI export knows {known}")
    read(str(node.target), module, chain)


def _is_flatten(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_function", "call_method") and name == "flatten" and node.args[1:2] == (1,)


def _weighted(name: str, layer: Any, chain: list[Weighted], **geometry: Any) -> None:
    weight = layer.weight.detach().cpu().double().numpy()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double().numpy()
    chain.append((Stage(name, tuple(weight.shape), relu1=False, **geometry), weight, bias))


def _conv(name: str, conv: nn.Conv2d, chain: list[Weighted]) -> None:
    square = len({*conv.stride}) == 1 and not isinstance(conv.padding, str) and len({*conv.padding}) == 1
    plain = square and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    need(plain, f"{name!r}: FPGAI has equal strides and paddings for rows and columns, no groups, no dilation: {conv}")
    _weighted(name, conv, chain, stride=conv.stride[0], padding=int(conv.padding[0]))


def _relu(name: str, act: nn.ReLU | nn.Hardtanh, chain: list[Weighted]) -> None:
    if isinstance(act, nn.Hardtanh):
        need((act.min_val, act.max_val) == (0, 1), f"{name!r} clips to {act.min_val}..{act.max_val}; FPGAI to 0..1")
    need(bool(chain) and chain[-1][0].pool is None, f"{name!r}: a ReLU1 follows a convolution or linear layer")
    stage, *rest = chain[-1]
    chain[-1] = (replace(stage, relu1=True), *rest)  # type: ignore[assignment]


def _pool(name: str, pool: Any, chain: list[Weighted]) -> None:
    kind: Literal["average", "max"] = "average" if isinstance(pool, nn.AvgPool2d) else "max"
    sizes = {n for size in (pool.kernel_size, pool.stride) for n in (size if isinstance(size, tuple) else (size,))}
    plain = len(sizes) == 1 and pool.padding in (0, (0, 0)) and not pool.ceil_mode
    plain = plain and (kind == "average" or pool.dilation in (1, (1, 1)))
    plain = plain and getattr(pool, "divisor_override", None) is None
    need(plain, f"{name!r}: FPGAI pools square windows that do not overlap, without padding: {pool}")
    need(bool(chain) and chain[-1][0].relu1 and chain[-1][0].pool is None, f"{name!r}: a pool follows a ReLU1")
    stage, *rest = chain[-1]
    chain[-1] = (replace(stage, pool=kind, pool_size=sizes.pop()), *rest)  # type: ignore[assignment]


def _nothing(name: str, module: nn.Module, chain: list[Weighted]) -> None:
    """Leave the chain as it is."""


def _flatten(name: str, module: nn.Flatten, chain: list[Weighted]) -> None:
    need((module.start_dim, module.end_dim) == (1, -1), f"{name!r}: FPGAI flattens everything but the batch")


_READERS: dict[Any, Callable[[str, Any, list[Weighted]], None]] = {
    nn.Conv2d: _conv,
    nn.Linear: _weighted,
    nn.Hardtanh: _relu,
    nn.ReLU: _relu,
    nn.AvgPool2d: _pool,
    nn.MaxPool2d: _pool,
    nn.Flatten: _flatten,
    nn.Dropout: _nothing,
    nn.Identity: _nothing,
}
