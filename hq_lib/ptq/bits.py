"""Bits per tensor: how much each tensor's quantization hurts, and the assignment that spends a budget best.

    bank = GridBank(net, images, (2, 3, 4, 8))               # every tensor's grid at every number of bits, fitted once
    qnet = bank.assign({"weight conv1": 8, "act conv1": 4})  # the others float; no fitting, a moment each
    found = optimal(losses, size_cost(qnet), budget=100.0)   # integer program over a sensitivity table
    quantize(net, bank.policy(found.bits), images[:1])       # the same bits as a policy, for PTQ, QAT and lowering

Tensors go by the names of ``QuantizedNet.bits_record``: "weight <layer>" and "act <activation>". Assignments solve

    min  sum_t loss[t, b_t]      over b      so that  cost(b) <= budget

The losses of single tensors are taken to add up, the premise of HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680) too, which
solves the same integer program with second-order estimates in place of measured losses. How far it holds is for the
caller to measure. What an assignment costs is storage of the weights, or bit operations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from hq_lib import ptq
from hq_lib.graph import (
    BitPolicy,
    QuantizedNet,
    QuantizeError,
    kinds,
    layer_macs,
    quantize,
    weight_layers,
)
from hq_lib.graph.tracing import eval_mode
from hq_lib.quantizers import FLOAT_BITS
from hq_lib.results.hints import nearest


def uniform_policy(bits: int, *, overrides: Mapping[str, object] | None = None) -> BitPolicy:
    """The policy with ``bits`` for every tensor, first and last layer too; the image stays in float ("academic")."""
    first = {"first_last_bits": None, "placement": "academic", "bn": "fold"}
    return BitPolicy(f"minmax:{bits}", f"lsq_plus:{bits}", overrides=overrides or {}, **first)


def tensors_of(qnet: QuantizedNet) -> list[str]:
    """Names of all tensors that its policy quantizes: weights in execution order, then activations."""
    return [tensor for tensor, spec in qnet.meta["specs"].items() if not spec.is_float]


class GridBank:
    """Fitted quantizers (and corrected biases) of every tensor of a net, at several numbers of bits.

    All of them are fitted to float activations, so that no tensor's grid depends on another's bits: ``assign`` only
    swaps modules. Batch norms are folded, the image stays in float ("academic"); L2.4 ranges and bias correction are
    those of fast PTQ, nothing is learned.
    """

    def __init__(self, net: nn.Module, images: Tensor, bits: Sequence[int]) -> None:
        """Fit all grids.

        Args:
            net:    float; fitted in eval mode, its own is restored.
            images: (N, C, H, W), normalised: the calibration batch.
            bits:   2 to 16 each.
        """
        self.bits = tuple(sorted(set(bits)))
        with eval_mode(net):
            self._nets = {b: quantize(net, uniform_policy(b), images[:1]) for b in (*self.bits, FLOAT_BITS)}
            for qnet in (self._nets[b] for b in self.bits):
                ptq.fit_weights(qnet)
                ptq.fit_acts(qnet, images)  # to the float net's activations, so before its biases change
                ptq.correct_means(qnet, images)
            self.net: QuantizedNet = quantize(net, uniform_policy(self.bits[-1]), images[:1])
        self.tensors = tensors_of(self.net)
        """Names of all tensors that can have bits, weights first, each kind in execution order."""

    def assign(self, bits: Mapping[str, int]) -> QuantizedNet:
        """The net with these bits; tensors that are not named, or named with 32, are float. The next call changes it.

        Raises:
            ValueError: an unknown tensor (with the nearest name), or bits that were not fitted.
        """
        for tensor, b in bits.items():
            if tensor not in self.tensors:
                raise ValueError(f"no tensor {tensor!r}{nearest(tensor, self.tensors)}")
            if b not in (*self.bits, FLOAT_BITS):
                have = f"{self.bits} and {FLOAT_BITS} (float)"
                raise ValueError(f"{tensor}: {b!r} bits were not fitted; there are {have}")
        places = {site.name: site.quantizer for site in self.net.meta["sites"]}
        for tensor in self.tensors:
            kind, name = tensor.split(" ", 1)
            fitted = self._nets[bits.get(tensor, FLOAT_BITS)]
            if kind == "act":
                setattr(self.net, places[name], getattr(fitted, places[name], None) or nn.Identity())
            else:
                layer, like = (weight_layers(qnet)[name] for qnet in (self.net, fitted))
                layer.weight_quantizer, layer.bias = like.weight_quantizer, like.bias
        meta = self.net.meta  # reports and files go by it
        meta["specs"] = {t: replace(spec, bits=bits.get(t, FLOAT_BITS)) for t, spec in meta["specs"].items()}
        meta["policy"] = self.policy(bits)
        return self.net

    def policy(self, bits: Mapping[str, int]) -> BitPolicy:
        """The policy that gives the same bits; tensors that are not named are float in it.

        Tensors that share a grid (joined ones) have the most bits among those of them that are named.
        """
        overrides: dict[str, dict[str, int]] = {}
        groups = {f"act {site.name}": site.group for site in self.net.meta["sites"]}
        for tensor in self.tensors:
            kind, name = tensor.split(" ", 1)
            joined = [other for other in bits if other == tensor or groups.get(other, "") == groups.get(tensor)]
            given = max(bits[other] for other in joined) if tensor in bits else FLOAT_BITS
            overrides.setdefault(name, {})[kind] = given
        return uniform_policy(self.bits[-1], overrides=overrides)


Losses = Mapping[str, Mapping[int, float]]
"""Tensor -> bits -> loss when that tensor alone has these bits, >= 0."""
OBJECTIVE_SCALE = 1e4
"""The least that the largest loss is to the solver, which ignores differences below 1e-6."""
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
    sites = {site.quantizer: f"act {site.name}" for site in reversed(qnet.meta["sites"])}  # the first of a group
    for node in (node for node, kind in kind_of.items() if kind == "layer"):
        name, source = str(node.target), node.all_input_nodes[0]
        while kind_of[source] in ("pass", "relu") and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if kind_of[source] == "input":
            alone[f"weight {name}"] = float(macs[name] * IMAGE_BITS)
        elif kind_of[source] == "quantizer":
            pairs[f"weight {name}", sites[str(source.target)]] = float(macs[name])
        else:
            raise QuantizeError(f"layer {name!r}: its input is not quantized; give that activation bits in the policy")
    return Cost("BOP", alone, pairs)


@dataclass(frozen=True)
class Assignment:
    """Bits for each tensor of a table."""

    bits: dict[str, int]
    """Tensor -> bits."""
    cost: float
    """In the unit of the ``Cost``."""
    predicted: float
    """Sum of the single losses, in their unit."""


def assigned(bits: Mapping[str, int], losses: Losses, cost: Cost) -> Assignment:
    """These bits, with what they cost and what loss is predicted."""
    return Assignment(dict(bits), cost.of(bits), sum(losses[tensor][b] for tensor, b in bits.items()))


def uniform(losses: Losses, cost: Cost, bits: int) -> Assignment:
    """The same bits for every tensor."""
    return assigned(dict.fromkeys(losses, bits), losses, cost)


def optimal(losses: Losses, cost: Cost, budget: float) -> Assignment:
    """The assignment of least predicted loss within ``budget``, proved by an integer program (HiGHS).

    One binary per (tensor, bits). The product of two tensors' bits is linear in the joint choices z(w, b_w, a, b_a),
    whose margins are the single choices; given binary margins, z is 0 or 1 by itself.
    ``losses``: of every tensor that ``cost`` names; ``budget``: in ``cost.unit``.

    Raises:
        ValueError: no assignment is that cheap (the message states the least cost), or a tensor that costs something
                    has no losses.
    """
    _check(losses, cost, budget)
    choices = [(tensor, bits) for tensor, row in losses.items() for bits in row]
    joint = [(w, b_w, a, b_a) for w, a in cost.per_bit_pair for b_w in losses[w] for b_a in losses[a]]
    price = [cost.per_bit.get(tensor, 0.0) * bits for tensor, bits in choices]
    price += [cost.per_bit_pair[w, a] * b_w * b_a for w, b_w, a, b_a in joint]
    largest = max(losses[tensor][bits] for tensor, bits in choices)
    scale = OBJECTIVE_SCALE / min(largest or 1.0, 1.0)
    loss = [scale * losses[tensor][bits] for tensor, bits in choices] + [0.0] * len(joint)
    one_each = [[t == tensor for t, _ in choices] + [False] * len(joint) for tensor in losses]
    bounded = LinearConstraint(np.array([price]) / budget, -np.inf, 1.0)
    limits = [bounded, LinearConstraint(np.array(one_each, float), 1.0, 1.0)]
    limits += [LinearConstraint(_margins(choices, joint), 0.0, 0.0)] if joint else []
    integral, options = np.array([1] * len(choices) + [0] * len(joint)), {"mip_rel_gap": 1e-6}
    found = milp(np.array(loss), integrality=integral, bounds=Bounds(0, 1), constraints=limits, options=options)
    if found.x is None:
        raise RuntimeError(f"the integer program ended without an assignment: {found.message}")
    chosen = {tensor: bits for (tensor, bits), x in zip(choices, found.x[: len(choices)], strict=True) if x > 0.5}
    return assigned(chosen, losses, cost)


def _check(losses: Losses, cost: Cost, budget: float) -> None:
    priced = [*cost.per_bit, *(tensor for pair in cost.per_bit_pair for tensor in pair)]
    if unknown := [tensor for tensor in dict.fromkeys(priced) if not losses.get(tensor)]:
        raise ValueError(
            f"no losses for {unknown[0]!r} (and {len(unknown) - 1} more), which costs {cost.unit}: measure it, or give "
            f"a float tensor its one choice, {{32: 0.0}}"
        )
    least = cost.of({tensor: min(row) for tensor, row in losses.items()})
    if least > budget * (1 + 1e-9):
        raise ValueError(f"budget {budget:g} {cost.unit}: the cheapest assignment already costs {least:g}")


def _margins(choices: list[tuple[str, int]], joint: list[tuple[str, int, str, int]]) -> np.ndarray:
    """Rows sum_b_a z(w, b_w, a, b_a) - x(w, b_w), and likewise for a: each has to be 0."""
    place = {choice: i for i, choice in enumerate(choices)}
    rows: dict[tuple[str, str, str, int], np.ndarray] = {}
    for column, (w, b_w, a, b_a) in enumerate(joint):
        for tensor, bits in ((w, b_w), (a, b_a)):
            row = rows.setdefault((w, a, tensor, bits), np.zeros(len(choices) + len(joint)))
            row[place[tensor, bits]], row[len(choices) + column] = -1.0, 1.0
    return np.array(list(rows.values()))


def greedy(losses: Losses, cost: Cost, budget: float) -> Assignment:
    """The assignment reached from the most bits by taking away, again and again, those that save the most per loss.

    A step lowers one tensor to its next fewer bits; the one with the least added loss per cost saved goes first. What
    ``optimal`` is measured against. Raises ``ValueError`` as ``optimal`` does.
    """
    _check(losses, cost, budget)
    bits = {tensor: max(row) for tensor, row in losses.items()}
    while (now := cost.of(bits)) > budget * (1 + 1e-9):
        steps = []
        for tensor, row in losses.items():
            if fewer := [b for b in row if b < bits[tensor]]:
                saved = now - cost.of({**bits, tensor: max(fewer)})
                added = row[max(fewer)] - row[bits[tensor]]
                steps.append((added / saved if saved > 0 else np.inf, tensor, max(fewer)))
        _, tensor, lower = min(steps)
        bits[tensor] = lower
    return assigned(bits, losses, cost)


def at_random(losses: Losses, cost: Cost, budget: float, generator: np.random.Generator) -> Assignment:
    """A random assignment that uses the budget up: no single tensor could have its next more bits within it.

    Every tensor draws its bits; then tensors drawn at random are lowered until the budget holds, and raised, as long as
    one can be. Raises ``ValueError`` as ``optimal`` does.
    """
    _check(losses, cost, budget)
    tensors = list(losses)
    bits = {tensor: int(generator.choice(sorted(losses[tensor]))) for tensor in tensors}
    while cost.of(bits) > budget * (1 + 1e-9):
        tensor = tensors[generator.integers(len(tensors))]
        bits[tensor] = max((b for b in losses[tensor] if b < bits[tensor]), default=bits[tensor])
    waiting = [str(tensor) for tensor in generator.permutation(tensors)]
    while waiting:
        tensor = waiting.pop()
        more = {**bits, tensor: min((b for b in losses[tensor] if b > bits[tensor]), default=bits[tensor])}
        if more != bits and cost.of(more) <= budget * (1 + 1e-9):
            bits = more
            waiting.insert(0, tensor)
    return assigned(bits, losses, cost)
