"""One weight quantizer put in the place of another, and AdaRound on the grid that was there."""

from hq_lib.graph import QuantizedWeight, QuantizeError
from hq_lib.quantizers import AdaRound, Quantizer

ON_GRID = ("grid", "adaround", "minmax", "aciq", "lsq", "lsq_plus")
"""Methods whose grid is in the weight's own units, so that floor and ceil of the weight are its levels."""


def take_place(layer: QuantizedWeight, new: Quantizer) -> None:
    """Make ``new`` the weight quantizer of ``layer``, with the switch, mode and owner of the one before."""
    old = layer.weight_quantizer
    assert isinstance(old, Quantizer)
    new.enabled, new.owner = old.enabled, old.owner
    layer.weight_quantizer = new.train(old.training)


def install(layer: QuantizedWeight, name: str) -> None:
    """Let an ``AdaRound`` quantize ``layer`` on the grid it has, unless one does.

    Raises:
        QuantizeError: names the layer whose method has no grid in the weight's own units (DoReFa's tanh, DSQ's ends),
                       or no level at 0 (1 bit).
    """
    old = layer.weight_quantizer
    assert isinstance(old, Quantizer)
    if isinstance(old, AdaRound):
        return
    if old.method not in ON_GRID:
        raise QuantizeError(
            f"layer {name!r}: rounding cannot be learned on the grid of {old.method!r}; make the policy with "
            f"weight='minmax:{old.bits}' and choose the ranges with ptq.fit_weights"
        )
    grid = old.integers(layer.weight)[1]
    if grid.step != 1:
        raise QuantizeError(
            f"layer {name!r}: {old.method}:1 has no level at 0, so no floor and ceil to choose from; use 2 bits "
            f"or more, or leave the rounding alone (learn_rounding=False)"
        )
    take_place(layer, AdaRound(layer.weight, grid, bits=old.bits, axis=old.axis))
