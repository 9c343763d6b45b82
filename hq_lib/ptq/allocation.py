"""ACIQ's weights: bits shared out among output channels, and the moments that rounding moved put back.

    fit_allocated(qnet)             # per channel min-max grids, wide channels get more bits (average = the policy's)
    correct_moments(qnet, images)   # mean and norm of every output channel restored, integers unchanged

Banner et al., arXiv:1810.05723, sections 4.2 and 5; formulas and departures in ``hq_lib.quantizers.aciq.weights``.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib.graph import QuantConv2d, QuantizeError, QuantLinear, weight_layers
from hq_lib.graph.state import put, refuse_float
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.ptq.ranges import WIDE_BITS, fit_weights
from hq_lib.quantizers import FixedGrid, FrozenWeight, Grid, Quantizer, aciq, dequantize
from hq_lib.quantizers.affine import MIN_SCALE
from hq_lib.quantizers.ranges import minmax_range, per_channel, rows

EDGE = 0.499
"""How far, in steps, a weight may lie beyond its channel's last level and still round to it."""


def fit_allocated(qnet: fx.GraphModule) -> dict[str, Tensor]:
    """Give each weight below 8 bits a min-max grid per channel with ``aciq.allocate_bits`` bits; return those bits.

    The policy's bits become the *average* over a layer's channels, met exactly where the limits of 0 and 8 bits allow;
    numbers made with it are not comparable to plain ones. ``bits`` of the quantizer stays the average, its grid reaches
    as far as the widest channel. A channel of 0 bits is 0 (``correct_moments`` then makes it its mean). Weights of 8
    bits and more get the plain min-max grid.

    Args:
        qnet: from ``graph.quantize`` with one grid per output channel; changed in place. A channel's bits go by its
              standard deviation (the official default).

    Returns:
        (C,) int64 bits by layer, of the layers that were allocated.

    Raises:
        QuantizeError: names the layer that has no grid per output channel.
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
        bits = aciq.allocate_bits(rows(w, 0).std(1), old.bits)
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
    scale = ((high - low) / n_steps.clamp(min=1)).clamp(min=MIN_SCALE)
    zero_point = torch.minimum(torch.round(-low / scale), n_steps)
    scale = torch.maximum(scale, high / (n_steps - zero_point + EDGE))
    scale = torch.maximum(scale, -low / (zero_point + EDGE))
    return Grid(scale.float(), zero_point.float(), 0, 2 ** max(int(bits.max()), 1) - 1)


@torch.no_grad()
def correct_moments(qnet: fx.GraphModule, images: Tensor) -> dict[str, aciq.Correction]:
    """Restore mean and norm of each output channel's weights by scale and bias alone, in place; return what was done.

    gain * w_hat + offset (``aciq.bias_correction``): the gain goes into the channel's scale, the offset times the mean
    window sum of the layer's (quantized) input goes into its bias, layer after layer in one pass, each behind the
    corrected ones before it. The integers stay, as a ``FrozenWeight``, so it survives ``integer.lower``.

    Args:
        qnet:   from ``graph.quantize`` (batch norms folded), grids fitted; its quantizers as they are switched.
        images: (N, C, H, W), normalised; one batch.

    Raises:
        QuantizeError: names the layer whose form has no window sum, whose scale is a power of two, or that runs twice.
    """
    refuse_float(qnet, "ptq.correct_moments")
    done: dict[str, aciq.Correction] = {}
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
        done[name] = aciq.bias_correction(w, dequantize(x_int, grid))
        sums = aciq.window_sum_mean(inputs[0], layer)
        scale, bias = aciq.absorb(done[name], scale=grid.scale.flatten(), bias=layer.bias, window_sum=sums)
        put(qnet, name, FrozenWeight(x_int, grid._replace(scale=per_channel(scale, w, 0)), bits=old.bits, axis=0))
        layer.bias = nn.Parameter(bias)

    with eval_mode(qnet), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(correct, name)))
        qnet(images.to(device_of(qnet)))
    return done
