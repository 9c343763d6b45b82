"""Which grid a weight is on, and AdaRound put in the place of its quantizer."""

from __future__ import annotations

from hq_lib.graph import QuantizedWeight, QuantizeError
from hq_lib.quantizers import AdaRound, FixedGrid, Grid, Quantizer

ON_GRID = ("grid", "adaround", "minmax", "aciq", "lsq", "lsq_plus")
"""Methods whose grid is in the weight's own units, so that floor and ceil of the weight are its levels."""


def fixed_grid(layer: QuantizedWeight, name: str) -> tuple[Grid, Quantizer]:
    """Return the grid that ``layer``'s weight is on, and its quantizer.

    Raises:
        QuantizeError: names the layer whose method has no grid in the weight's own units (DoReFa's tanh, DSQ's ends),
                       or no level at 0 (1 bit).
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    if quantizer.method not in ON_GRID:
        raise QuantizeError(
            f"layer {name!r}: rounding cannot be learned on the grid of {quantizer.method!r}; make the policy with "
            f"weight='minmax:{quantizer.bits}' and choose the ranges with ptq.fit_weights"
        )
    quantizer.make_ready(layer.weight)
    if isinstance(quantizer, FixedGrid):
        return quantizer.grid(), quantizer
    grid = quantizer.integers(layer.weight)[1]
    if grid.step != 1:
        raise QuantizeError(
            f"layer {name!r}: {quantizer.method}:1 has no level at 0, so no floor and ceil to choose from; use 2 bits "
            f"or more, or leave the rounding alone (learn_rounding=False)"
        )
    return grid, quantizer


def take_place(layer: QuantizedWeight, new: Quantizer) -> None:
    """Make ``new`` the weight quantizer of ``layer``, with the switch, mode and owner of the one before."""
    old = layer.weight_quantizer
    assert isinstance(old, Quantizer)
    new.enabled, new.owner = old.enabled, old.owner
    layer.weight_quantizer = new.train(old.training)


def install(layer: QuantizedWeight, name: str) -> AdaRound:
    """Return the ``AdaRound`` that now quantizes ``layer`` on the grid it had (the one it has, if it has one)."""
    grid, old = fixed_grid(layer, name)
    if isinstance(old, AdaRound):
        return old
    new = AdaRound(layer.weight, grid, bits=old.bits, axis=old.axis)
    take_place(layer, new)
    return new
