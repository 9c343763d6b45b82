"""Ranges by method name, put onto the quantizers of a quantized graph.

    minmax       the smallest range that holds every value
    percentile   99.99 % of the values
    mse          the L_p-optimal grid, p = 2.4 (BRECQ, QDrop)
    aciq         the analytic clip (arXiv:1810.05723), see ``aciq.advised_range``
    aciq_official  as its authors run it: Laplace throughout, spread of the rectified values, the published constants at
                   every width; theirs is per channel (an activation's ``axis: 1`` in the policy), and clips no weights

Weights get a grid of their own per output channel (``FixedGrid``), activations keep their quantizer and get its scale.
"""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from hq_lib.graph import QuantizeError, act_quantizers, calibrate, weight_layers
from hq_lib.graph.state import put, refuse_float
from hq_lib.ptq.units import ON_GRID
from hq_lib.quantizers import LSQ, FixedGrid, Grid, LSQPlusAct, MinMaxAct, Quantizer, aciq
from hq_lib.quantizers.lp_grid import lp_search
from hq_lib.quantizers.ranges import Scheme, grid_from_range, minmax_range, percentile_range
from hq_lib.results.hints import check_known

Method = Literal["minmax", "percentile", "mse", "aciq", "aciq_official"]
PERCENT = 99.99
"""Of the values that "percentile" holds."""
WIDE_BITS = 8
"""From these bits up a weight grid is symmetric and restricted, so that its integers fit int8 with zero point 0."""


def find_grid(
    x: Tensor, *, bits: int, method: Method, scheme: Scheme = "affine", axis: int | None = None,
    signed: bool = True,
) -> Grid:  # fmt: skip
    """Return the grid of ``x`` that ``method`` chooses; per channel its scales broadcast to ``x``.

    Args:
        x:       (*shape), real units, finite.
        bits:    1..16.
        scheme:  of the grid; see ``quantizers.ranges.grid_from_range``.
        axis:    channel axis; None = one grid.
        signed:  False: values below 0 count as 0, and the zero point is 0.
    """
    check_known(method, get_args(Method), "range method")
    x = x if signed else x.clamp(min=0.0)
    if method == "mse":
        return lp_search(x, bits=bits, scheme=scheme, axis=axis)
    if method == "minmax":
        found = minmax_range(x, axis=axis)
    elif method == "percentile":
        found = percentile_range(x, PERCENT, axis=axis)
    elif method == "aciq_official":
        found = aciq.clip_range(x, bits=bits, axis=axis, prior="laplace", relu=None if signed else "official")
    else:
        restricted = scheme == "symmetric_restricted"
        found = aciq.advised_range(x, bits=bits, signed=signed, axis=axis, restricted=restricted)
    return grid_from_range(found, bits=bits, scheme=scheme)


def fit_weights(
    qnet: fx.GraphModule,
    method: Method = "mse",
    *,
    scheme: Scheme = "affine",
    only: Callable[[torch.nn.Module], bool] | None = None,
) -> None:
    """Give each quantized weight of ``qnet`` the grid that ``method`` chooses; its quantizer becomes a ``FixedGrid``.

    Args:
        qnet:   from ``graph.quantize``; changed in place. Axes and bits are those of its policy.
        scheme: of grids below 8 bits: "affine" is BRECQ's and QDrop's (a zero point per channel), "symmetric" has zero
                point 0. From 8 bits up the grid is "symmetric_restricted", so that its integers fit int8.
        only:   which weight quantizers (given the module); the others, trained ones say, keep their grid.

    Weights with scales that are powers of two (``power_of_two`` of "minmax") keep their grid under "minmax".

    Raises:
        QuantizeError: names the layer whose method transforms its weight (DoReFa), has 1 bit, or fails to be fitted;
                       whose scale is a power of two, under another method; a float network.
    """
    check_known(method, get_args(Method), "range method")
    refuse_float(qnet, "ptq.fit_weights")
    for name, layer in weight_layers(qnet).items():
        old = layer.weight_quantizer
        if old is None or (only is not None and not only(old)):
            continue
        assert isinstance(old, Quantizer)
        if getattr(old, "power_of_two", False):
            if method == "minmax":
                continue  # as quantize has fitted it
            raise QuantizeError(f"layer {name!r} has a power-of-two scale, which {method!r} does not keep: take "
                                "minmax, or leave the layer out by only=")  # fmt: skip
        if old.method not in ON_GRID or old.bits == 1:
            raise QuantizeError(
                f"layer {name!r}: {old.method}:{old.bits} has no grid to choose; use weight='minmax' and 2 bits or more"
            )
        w = layer.weight.detach()
        try:
            chosen = "symmetric_restricted" if old.bits >= WIDE_BITS else scheme
            found = find_grid(w, bits=old.bits, method=method, scheme=chosen, axis=old.axis)
        except ValueError as error:
            raise QuantizeError(f"weight of layer {name!r}: {error}") from error
        put(qnet, name, FixedGrid(found, bits=old.bits, axis=old.axis))


def fit_acts(
    qnet: fx.GraphModule,
    batches: Tensor | Iterable[Tensor],
    method: Method = "mse",
    *,
    quantized_weights: bool = False,
    only: Callable[[torch.nn.Module], bool] | None = None,
) -> None:
    """Fit each activation quantizer of ``qnet`` to its input on ``batches`` by ``method``, in place.

    As ``graph.calibrate`` collects: one-shot, activation quantizers bypassed; eval mode, no gradients, no randomness.

    Args:
        qnet:              its policy's activations are "lsq_plus" (advised), "lsq" or "minmax".
        batches:           (B, C, H, W) or several, normalised; QDrop takes one batch of 256 images.
        quantized_weights: False: activations of the float net (QDrop); True: as the quantized weights make them.
        only:              which quantizers; the others keep their grid.

    Raises:
        QuantizeError: names the quantizer whose method takes no range, or no image; ValueError: NaN or Inf.
    """
    check_known(method, get_args(Method), "range method")
    chosen = {name: q for name, q in act_quantizers(qnet).items() if only is None or only(q)}
    for name, quantizer in chosen.items():
        if type(quantizer) not in (LSQ, LSQPlusAct, MinMaxAct) or quantizer.bits == 1:
            raise QuantizeError(
                f"activation quantizer {name!r} ({type(quantizer).__name__}) takes no range from outside; make the "
                f"policy with act='lsq_plus' and 2 bits or more"
            )

    def fit(quantizer: torch.nn.Module, x: Tensor) -> None:
        assert isinstance(quantizer, LSQ | MinMaxAct)
        signed = bool(quantizer.signed)
        scheme: Scheme = "symmetric" if signed and type(quantizer) is LSQ else "affine"
        if not x.any():  # a step of 1e-8 would make all that comes later 0
            quantizer.init_from(x)
            return
        found = find_grid(x, bits=quantizer.bits, axis=quantizer.axis, method=method, scheme=scheme, signed=signed)
        scale, zero_point = found.scale.float(), found.zero_point.float()
        quantizer.mark_fitted()
        if isinstance(quantizer, MinMaxAct):
            quantizer.low, quantizer.high = -scale * zero_point, scale * (found.qmax - zero_point)
        else:
            quantizer.step_size.data = scale
        if isinstance(quantizer, LSQPlusAct):
            quantizer.beta.data = -scale * zero_point
        quantizer.warn_if_held(x)

    calibrate(qnet, batches, only=only, quantized_weights=quantized_weights, fit=fit)
