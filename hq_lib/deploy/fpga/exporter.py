"""From a float chain with ReLU1 or ReLU to FPGAI's integers, with better scales than seed 002's own exporter.

A ReLU is a ReLU1 of another unit: where t is the largest value behind it, relu(w x + b) / t is clip((w / t) x + b / t,
0, 1) for all inputs seen, and the next layer takes w t. Values beyond t, of inputs not seen, are clipped.

Same files, same arithmetic, other choices: the multiplier has eight significant bits (seed: down to one), weights are
quantized on the grid that the hardware really has, zero is in their range, the zero point is rounded (seed: truncated),
and the biases make up for what the hardware's floors take away.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from hq_lib.deploy.fpga.formats import GAIN, bias_integers
from hq_lib.deploy.fpga.fpgai import MAX_SHIFT, FpgaiError, FpgaiLayer, Stage, need, record_of
from hq_lib.graph import op_name
from hq_lib.graph.folding import fold_bn
from hq_lib.graph.tracing import NodeWatcher

MIN_IMAGES = 32
"""Fewest images from which the range behind a ReLU is taken."""
Weighted = tuple[Stage, np.ndarray, np.ndarray]


def export(
    net: nn.Module,
    example: Tensor,
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> list[FpgaiLayer]:
    """Return ``net`` in FPGAI's integers, to be fed with raw uint8 pixels.

    Args:
        net:     a chain of Conv2d or Linear, each but the last followed by ReLU1 (``nn.Hardtanh(0, 1)``) or ReLU and
                 perhaps one pool; batch norms are folded. ``models.build("lenet")`` is one.
        example: (B, C, H, W) float32, inputs of ``net``; behind a ReLU they are what ranges are taken from: some
                 hundred training images.
        mean:    what was subtracted from pixel / 255 in training, one value or one per channel.
        std:     what it was divided by then, > 0.

    Raises:
        FpgaiError: what FPGAI cannot express (unbounded activations, branches, groups ...); names the layer.
    """
    gm = fold_bn(net, example).eval()
    chain = _in_units(_chain(gm), _largest(gm, example), len(example))
    for stage, _, _ in chain[:-1]:
        need(stage.relu1, f"{stage.name!r} has no ReLU or ReLU1 after it: train with clip(x, 0, 1), e.g. relu1=True")
    need(chain[-1][0].pool is None, f"{chain[-1][0].name!r}: a pool cannot end the network")
    chain[0] = _without_normalization(chain[0], mean, std)
    fpgai = [quantize_layer(stage, w, b, offset=_rounding_offset(stage)) for stage, w, b in chain]
    record_of(fpgai, tuple(example.shape[1:]))  # each layer can read what the one before writes
    return fpgai


def _largest(gm: fx.GraphModule, example: Tensor) -> dict[str, float]:
    """Return for each layer of a plain chain that a ReLU follows the largest value behind it."""
    found: dict[str, float] = {}
    layer = ""

    def see(node: fx.Node, value: Any) -> None:
        nonlocal layer
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer = str(node.target)
        elif isinstance(module, nn.ReLU):
            found[layer] = float(value.max()) or 1.0

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


def quantize_layer(stage: Stage, weight: np.ndarray, bias: np.ndarray, *, offset: float = 0.5) -> FpgaiLayer:
    """Return one layer in integers.

        m 2^-shift near (max(w, 0) - min(w, 0)) / 255,   scale := m 2^-shift
        zp = rint(-min(w, 0) / scale),   q = clip(rint(w / scale) + zp, 0, 255)
        bias_q = rint((255 bias + offset) / scale)

    Args:
        stage:  how the layer is executed.
        weight: of its shape, real units, finite.
        bias:   (C_out,) real units.
        offset: added to the output, in output steps (1/255), in [0, 1): 0.5 turns the shift's floor into rounding.
    """
    name = stage.name
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
    return FpgaiLayer(stage, q, bias_integers(bias.astype(np.float64) + offset / GAIN, quant, GAIN, name), *quant)


def nearest_multiplier(scale: float) -> tuple[int, int]:
    """Return (m, shift), m in [128, 255], with the smallest relative error |m 2^-shift - scale| / scale < 0.4 %.

        m = rint(scale 2^shift),  shift the largest with m <= 255         (ALGORITHMS 10.4)

    A mantissa in [128, 256) is at most half a step off: 0.5 / 128 = 0.39 %.

    Args:
        scale: real units per step, in [2^-24, 255].

    Raises:
        FpgaiError: a scale that no m in [128, 255] and shift in 0..31 is near to.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise FpgaiError(f"scale {scale!r} is not a finite number above 0")
    _, exponent = math.frexp(scale)  # scale in [2^(exponent - 1), 2^exponent)
    shift = 8 - exponent
    m = round(math.ldexp(scale, shift))
    if m == 2**8:  # 255.5 and above: 255 of this shift or 128 of the next
        m, shift = min(((255, shift), (128, shift - 1)), key=lambda pair: relative_error(scale, *pair))
    if not 0 <= shift <= MAX_SHIFT:
        raise FpgaiError(f"scale {scale:.3g} is outside [2^-24, 255], the reach of 8-bit multipliers and shifts 0..31")
    return m, shift


def relative_error(scale: float, multiplier: int, shift: int) -> float:
    """Return |m 2^-shift - scale| / scale, a fraction."""
    return abs(math.ldexp(multiplier, -shift) - scale) / scale


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
            module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d | nn.Linear):
                chain.append(_weighted(str(node.target), module))
            elif isinstance(module, nn.ReLU | nn.Hardtanh | nn.AvgPool2d | nn.MaxPool2d):
                need(bool(chain), f"{node.target!r} follows no convolution or linear layer")
                stage, *rest = chain[-1]
                chain[-1] = (_followed(stage, str(node.target), module), *rest)  # type: ignore[assignment]
            else:
                what = type(module).__name__ if module else op_name(node, gm)
                known = "convolutions, linear layers, ReLU, Hardtanh(0, 1), average and max pools, Flatten, Dropout"
                name = op_name(node, gm)
                need(name in ("identity", "flatten"), f"{node.name!r} is {what}: FPGAI export knows {known}")
                if name == "flatten":
                    told = (*node.args[1:], *node.kwargs.values())
                    ends = (module.start_dim, module.end_dim) if isinstance(module, nn.Flatten) else told
                    need(ends in {(1,), (1, -1)}, f"{node.name!r}: FPGAI flattens everything but the batch")
        previous = node
    need(bool(chain), "the network has no convolution or linear layer")
    return chain


def _weighted(name: str, layer: nn.Conv2d | nn.Linear) -> Weighted:
    geometry: dict[str, Any] = {}
    if isinstance(layer, nn.Conv2d):
        square = len({*layer.stride}) == 1 and not isinstance(layer.padding, str) and len({*layer.padding}) == 1
        plain = square and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        need(
            plain,
            f"{name!r}: FPGAI has equal strides and paddings for rows and columns, no groups, no dilation: {layer}",
        )
        geometry = {"stride": layer.stride[0], "padding": int(layer.padding[0])}
    weight = layer.weight.detach().cpu().double().numpy()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double().numpy()
    return Stage(name, tuple(weight.shape), relu1=False, **geometry), weight, bias


def _followed(stage: Stage, name: str, module: Any) -> Stage:
    """Return ``stage`` with the ReLU, ReLU1 or pool that follows it."""
    if isinstance(module, nn.ReLU | nn.Hardtanh):
        if isinstance(module, nn.Hardtanh):
            ends = (module.min_val, module.max_val)
            need(ends == (0, 1), f"{name!r} clips to {ends[0]}..{ends[1]}; FPGAI to 0..1")
        need(not stage.relu1, f"{name!r} is the second clip of {stage.name!r}: leave one, a ReLU or a ReLU1")
        need(stage.pool is None, f"{name!r}: a ReLU1 follows a convolution or linear layer")
        return replace(stage, relu1=True)
    sizes = {n for size in (module.kernel_size, module.stride) for n in (size if isinstance(size, tuple) else (size,))}
    plain = len(sizes) == 1 and module.padding in (0, (0, 0)) and not module.ceil_mode
    plain = plain and getattr(module, "dilation", 1) in (1, (1, 1))
    plain = plain and getattr(module, "divisor_override", None) is None
    need(plain, f"{name!r}: FPGAI pools square windows that do not overlap, without padding: {module}")
    need(stage.relu1 and stage.pool is None, f"{name!r}: a pool follows a ReLU1")
    return replace(stage, pool="average" if isinstance(module, nn.AvgPool2d) else "max", pool_size=sizes.pop())
