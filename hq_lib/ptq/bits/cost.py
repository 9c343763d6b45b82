"""What an assignment of bits costs: storage of the weights, or bit operations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from hq_lib.graph import QUANTIZER_SUFFIX, QuantizedNet, QuantizeError, kinds, layer_macs, weight_layers

IMAGE_BITS = 8
"""Bits of an image that has no quantizer: its pixels are bytes."""


@dataclass(frozen=True)
class Cost:
    """A sum over tensors of bits, and over pairs of tensors of the product of their bits."""

    unit: str
    """"KiB" or "BOP"."""
    per_bit: Mapping[str, float] = field(default_factory=dict)
    """Tensor -> cost of each of its bits; tensors that are not named cost nothing."""
    per_bit_pair: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(weight, its input activation) -> cost of bits x bits."""

    def of(self, bits: Mapping[str, float]) -> float:
        """The cost of an assignment, in ``unit``; it has to name every tensor that costs something."""
        alone = sum(rate * bits[tensor] for tensor, rate in self.per_bit.items())
        return alone + sum(rate * bits[w] * bits[a] for (w, a), rate in self.per_bit_pair.items())

    def everywhere(self, bits: float) -> float:
        """The cost of the same bits for every tensor, in ``unit``; fractions are allowed, as budgets."""
        return bits * sum(self.per_bit.values()) + bits**2 * sum(self.per_bit_pair.values())


def size_cost(qnet: QuantizedNet) -> Cost:
    """Storage of the weights, KiB: elements x bits / 8192; biases and scales are not counted."""
    layers = weight_layers(qnet)
    return Cost("KiB", {f"weight {name}": layer.weight.numel() / 8192 for name, layer in layers.items()})


def bop_cost(qnet: QuantizedNet) -> Cost:
    """Bit operations per image: multiply-accumulates x weight bits x bits of the layer's input, summed over layers.

    An image without quantizer counts as ``IMAGE_BITS``.

    Raises:
        QuantizeError: names the layer whose input is neither the image nor quantized, so that it has no bits.
    """
    macs, alone, pairs = layer_macs(qnet), {}, {}
    kind_of = kinds(qnet)
    for node in (node for node, kind in kind_of.items() if kind == "layer"):
        name, source = str(node.target), _source(node, kind_of)
        if source is None:
            raise QuantizeError(f"layer {name!r}: its input is not quantized; give that activation bits in the policy")
        if source == "":
            alone[f"weight {name}"] = float(macs[name] * IMAGE_BITS)
        else:
            pairs[f"weight {name}", f"act {_site(qnet, source)}"] = float(macs[name])
    return Cost("BOP", alone, pairs)


def _source(layer: fx.Node, kind_of: Mapping[fx.Node, str]) -> str | None:
    """The quantizer module whose output ``layer`` reads, "" for the image, None for a float tensor."""
    node = layer.all_input_nodes[0]
    while kind_of[node] in ("pass", "relu") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if str(node.target).endswith(QUANTIZER_SUFFIX):
        return str(node.target)
    return "" if kind_of[node] == "input" else None


def _site(qnet: QuantizedNet, target: str) -> str:
    return next(site.name for site in qnet.meta["sites"] if site.quantizer == target)
