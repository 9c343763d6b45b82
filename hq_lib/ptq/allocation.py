"""ACIQ's weights: bits shared out among output channels, and the moments that rounding moved put back.

    fit_allocated(qnet)             # per channel min-max grids, wide channels get more bits (average = the policy's)
    correct_moments(qnet, images)   # mean and norm of every output channel restored, integers unchanged

Banner et al., arXiv:1810.05723, sections 4.2 and 5. Bias correction replaces w_hat by gain * w_hat + offset per output
channel, so that mean and norm equal the float weight's. What survives an integer export:
    gain    goes into the channel's scale. The integers stay as they are, nothing is lost.
    offset  adds offset * (sum of the inputs under the window) to every output. An integer grid with zero point 0 cannot
            hold it; three honest ways: (a) its expectation over calibration images goes into the layer's bias
            (``absorb``; what remains is the zero-mean fluctuation of the window sum), (b) one extra window sum per
            position, shared by all channels of a group, exact, (c) a weight zero point, exact only where offset / scale
            is an integer. We use (a). Rounding the offset into a zero point throws away up to half a step.
"""

import math
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hq_lib.graph import QuantConv2d, QuantizeError, QuantLinear, weight_layers
from hq_lib.graph.state import put, refuse_float
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.ptq.ranges import WIDE_BITS, fit_weights
from hq_lib.quantizers import FixedGrid, FrozenWeight, Grid, Quantizer, dequantize
from hq_lib.quantizers.affine import usable
from hq_lib.quantizers.ranges import minmax_range, per_channel, rows

MAX_BITS = 8
"""Of a channel."""


class Correction(NamedTuple):
    """w_corrected = gain * w_hat + offset, per output channel."""

    gain: Tensor
    """(C,) float64, > 0, dimensionless: the paper's xi."""
    offset: Tensor
    """(C,) float64, real units of the weight."""


def allocate_bits(spreads: Tensor, bits: int) -> Tensor:
    """Bits per channel that minimise total rounding noise under a quota of n * 2^M bins.

        bins_i = B r_i^(2/3) / sum_j r_j^(2/3),   B = n 2^M,   bits_i = round(log2 bins_i), clipped to 0..``MAX_BITS``

    The average of these may miss M; then single bits move, largest rounding residual first, until sum(bits) = n M (or
    every channel is at its limit). Departure: the official code shifts the target of all channels in up to ten steps.
    Spreads (1, 1, 8) at M = 4: bins (8, 8, 32), bits (3, 3, 5), then a fourth for one of the first two.

    Args:
        spreads: (n,), >= 0: range, sigma or b of each channel (the official default is sigma).
        bits:    M, the average asked for.

    Returns:
        (n,) int64; 0 bits = the channel is a constant (its spread is 0 or negligible).
    """
    spreads = rows(spreads).flatten().double()
    if (spreads < 0).any():
        raise ValueError("spreads are ranges or deviations: none may be negative")
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: need 0..{MAX_BITS}")
    if not (spreads > 0).any():
        return torch.zeros(len(spreads), dtype=torch.int64)
    share = (spreads / spreads.max()) ** (2 / 3)
    wanted = torch.log2(len(spreads) * 2.0**bits * share / share.sum())
    allocated = wanted.round().clamp(0, MAX_BITS).long()
    while (missing := len(spreads) * bits - int(allocated.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = (allocated < MAX_BITS) & torch.isfinite(wanted) if step > 0 else allocated > 0
        if not free.any():
            break
        residual = torch.where(free, step * (wanted - allocated), -torch.inf)
        allocated[residual.argmax()] += step
    return allocated


def bias_correction(w: Tensor, w_hat: Tensor) -> Correction:
    """The per-channel (gain, offset) that restores the weight's mean and norm exactly.

        xi_c = ||w_c - E w_c||_2 / ||w_hat_c - E w_hat_c||_2
        w_c  <- xi_c (w_hat_c - E w_hat_c) + E w_c           so offset_c = E w_c - xi_c E w_hat_c

    Departure: the paper's xi (w_hat + mu) leaves the mean scaled by xi; this form restores both moments.
    A channel whose w_hat is constant has nothing to stretch, one whose w is constant nothing to match: gain 1 for both.

    Args:
        w, w_hat: (C, ...), real units: float weight and its quantized values, output channels first.
    """
    if w.shape != w_hat.shape:
        raise ValueError(f"weight {tuple(w.shape)} and quantized weight {tuple(w_hat.shape)} differ in shape")
    real, quantized = rows(w, 0).double(), rows(w_hat, 0).double()
    mean, mean_hat = real.mean(1), quantized.mean(1)
    norm = (real - mean.unsqueeze(1)).norm(dim=1)
    norm_hat = (quantized - mean_hat.unsqueeze(1)).norm(dim=1)
    floor = 1e-12 * math.sqrt(real.shape[1])
    usable = (norm_hat > floor * mean_hat.abs()) & (norm > floor * mean.abs()) & (norm_hat > 0) & (norm > 0)
    gain = torch.where(usable, norm / norm_hat.clamp(min=1e-300), torch.ones_like(norm))
    return Correction(gain, mean - gain * mean_hat)


@torch.no_grad()
def window_sum_mean(x: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """(C_out,) float64: the mean, over images and positions, of the summed inputs under a layer's window (padded).

    Args:
        x:     (N, C_in, H, W) or (N, ..., C_in), real units, as the deployed layer receives it (so quantized).
        layer: gives geometry and groups; its weights are not used.
    """
    x = x.detach().double()
    if isinstance(layer, nn.Linear):
        return x.sum(-1).mean().expand(layer.out_features).clone()
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode={layer.padding_mode!r}: window sums are defined for zero padding only")
    ones = x.new_ones(layer.groups, layer.in_channels // layer.groups, *layer.kernel_size)
    sums = nn.functional.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return sums.mean((0, 2, 3)).repeat_interleave(layer.out_channels // layer.groups)


def absorb(correction: Correction, *, scale: Tensor, bias: Tensor | None, window_sum: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, bias) of a layer whose integers stay unchanged and whose mean output is the corrected weight's.

        scale_c <- gain_c scale_c        bias_c <- bias_c + offset_c E[window sum]_c

    The mean over the calibration inputs of every output channel equals that of gain * w_hat + offset exactly; single
    outputs differ by offset_c * (window sum - its mean).

    Args:
        scale:      () or (C,), real units per step of the weight's grid (a per-tensor scale becomes per channel).
        bias:       (C,) or None (then it is created).
        window_sum: (C,) from ``window_sum_mean``.
    """
    extra = correction.offset * window_sum
    start = torch.zeros_like(extra) if bias is None else bias.detach().double()
    new_scale = (scale.detach().double() * correction.gain).to(scale.dtype)
    return new_scale, (start + extra).to(scale.dtype if bias is None else bias.dtype)


EDGE = 0.499
"""How far, in steps, a weight may lie beyond its channel's last level and still round to it."""


def fit_allocated(qnet: fx.GraphModule) -> dict[str, Tensor]:
    """Give each weight below 8 bits a min-max grid per channel with ``allocate_bits`` bits; return those bits.

    The policy's bits become the *average* over a layer's channels, met exactly where the limits of 0 and 8 bits allow;
    numbers made with it are not comparable to plain ones. ``bits`` of the quantizer stays the average, its grid reaches
    as far as the widest channel, at whose bits files hold all of them. A channel of 0 bits is 0 (``correct_moments``
    then makes it its mean). Weights of 8 bits and more get the plain min-max grid.

    Args:
        qnet: from ``graph.quantize`` with one grid per output channel; changed in place. A channel's bits go by its
              standard deviation (the official default).

    Returns:
        (C,) int64 bits by layer, of the layers that were allocated.

    Raises:
        QuantizeError: names the layer that has no grid per output channel, or one weight in each.
    """
    fit_weights(qnet, "minmax")
    found: dict[str, Tensor] = {}
    for name, layer in weight_layers(qnet).items():
        old = layer.weight_quantizer
        if not isinstance(old, Quantizer) or old.bits >= WIDE_BITS:
            continue
        if old.axis != 0:
            raise QuantizeError(f"layer {name!r}: bits are shared out among output channels; it has one grid for all")
        w = layer.weight.detach()
        if w[0].numel() == 1:
            raise QuantizeError(f"layer {name!r}: its channels have one weight each, whose spread tells no bits")
        bits = allocate_bits(rows(w, 0).std(1), old.bits)
        put(qnet, name, FixedGrid(channel_grid(w, bits), bits=old.bits, axis=0))
        found[name] = bits
    return found


def channel_grid(w: Tensor, bits: Tensor) -> Grid:
    """Return min-max grids with ``bits`` (C,) per output channel of ``w`` (C, ...), in one range of integers.

    Each channel's values round to its own 2^bits levels, 0 among them, without being clipped to them: the step is
    widened where its outermost value would round to a level more.
    """
    low, high = (end.double() for end in minmax_range(w, axis=0))
    n_steps = per_channel(2.0 ** bits.double() - 1, w, 0)
    scale = usable((high - low) / n_steps.clamp(min=1))
    zero_point = torch.minimum(torch.round(-low / scale), n_steps)
    scale = torch.maximum(scale, high / (n_steps - zero_point + EDGE))
    scale = torch.maximum(scale, -low / (zero_point + EDGE))
    return Grid(scale.float(), zero_point.float(), 0, 2 ** max(int(bits.max()), 1) - 1)


@torch.no_grad()
def correct_moments(qnet: fx.GraphModule, images: Tensor) -> dict[str, Correction]:
    """Restore mean and norm of each output channel's weights by scale and bias alone, in place; return what was done.

    gain * w_hat + offset (``bias_correction``): the gain goes into the channel's scale, the offset times the mean
    window sum of the layer's (quantized) input goes into its bias, layer after layer in one pass, each behind the
    corrected ones before it. The integers stay, as a ``FrozenWeight``, so it survives ``integer.lower``.

    Args:
        qnet:   from ``graph.quantize`` (batch norms folded), grids fitted; its quantizers as they are switched.
        images: (N, C, H, W), normalised; one batch.

    Raises:
        QuantizeError: names the layer whose form has no window sum, whose scale is a power of two, or that runs twice.
    """
    refuse_float(qnet, "ptq.correct_moments")
    done: dict[str, Correction] = {}
    layers = {name: layer for name, layer in weight_layers(qnet).items() if layer.weight_quantizer is not None}
    for name, layer in layers.items():
        if not isinstance(layer, (QuantConv2d, QuantLinear)):
            raise QuantizeError(f"layer {name!r} ({type(layer).__name__}) cannot be corrected: only convolutions and "
                                "linear layers can")  # fmt: skip
        if getattr(layer.weight_quantizer, "power_of_two", False):
            raise QuantizeError(f"layer {name!r}: a correction stretches its scale, which is a power of two: leave one "
                                "of them out")  # fmt: skip

    def correct(name: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if name in done:
            raise QuantizeError(f"layer {name!r} runs twice: its two window sums share one bias")
        w, old = layer.weight, layer.weight_quantizer
        x_int, grid = old.integers(w)
        done[name] = bias_correction(w, dequantize(x_int, grid))
        sums = window_sum_mean(inputs[0], layer)
        scale, bias = absorb(done[name], scale=grid.scale.flatten(), bias=layer.bias, window_sum=sums)
        put(qnet, name, FrozenWeight(x_int, grid._replace(scale=per_channel(scale, w, 0)), bits=old.bits, axis=0))
        layer.bias = nn.Parameter(bias)

    with eval_mode(qnet), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(correct, name)))
        qnet(images.to(device_of(qnet)))
    return done
