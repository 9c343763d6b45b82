"""What is done to a quantized network as a whole: fitting its grids, bypassing them, ending batch-norm updates."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib.graph.layers import FoldedNorm, QuantConv2d, QuantizedWeight, QuantLinear
from hq_lib.graph.ops import QUANTIZER_SUFFIX
from hq_lib.graph.spec import QuantizeError
from hq_lib.quantizers import Quantizer
from hq_lib.tracing import NodeWatcher, eval_mode

BUDGET_MIB = 1024


def weight_layers(net: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantized layers of ``net`` by dotted name, those in float (``weight_quantizer`` None) included."""
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantizedWeight)}


def act_quantizers(gm: nn.Module) -> dict[str, nn.Module]:
    """Return the activation quantizers of a quantized graph, or of a block cut from one, by module name."""
    return {name: module for name, module in gm.named_children() if name.endswith(QUANTIZER_SUFFIX)}


def set_quantization(net: nn.Module, *, weights: bool, acts: bool) -> None:
    """Switch all weight and all activation quantizers of ``net`` on (True) or off (False: float values pass).

    Works on a quantized graph and on a block cut from one (which shares them). With both off, the network computes what
    its float net computes. Grids and their parameters stay as they are.
    """
    for layer in weight_layers(net).values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.enabled = weights  # type: ignore[assignment]
    for quantizer in act_quantizers(net).values():
        quantizer.enabled = acts  # type: ignore[assignment]


def calibrate(
    qnet: fx.GraphModule,
    batches: Tensor | Iterable[Tensor],
    *,
    quantized_weights: bool = True,
    budget_MiB: int = BUDGET_MIB,
) -> None:
    """Fit each activation quantizer to the float activations of ``batches``, and each weight's to its weight.

    One-shot calibration: all activation quantizers are bypassed while their inputs are collected (QDrop's way), so no
    grid depends on another's. A quantizer sees its input over all batches, and over all its places in the graph, at
    once. Eval mode and no gradients throughout; no random numbers; modes and switches are restored.

    Args:
        qnet:              from ``quantize``.
        batches:           (B, C, H, W) or several of those, normalised as in training; kept in memory.
        quantized_weights: True: activations as the quantized weights make them; False: as the float weights do.
        budget_MiB:        memory for collected activations; beyond it the batches are run again for the next tensors.

    Raises:
        QuantizeError: no batch; ValueError: NaN or Inf in an activation, naming the quantizer.
    """
    images = [batches] if isinstance(batches, Tensor) else list(batches)
    if not images or not all(len(batch) for batch in images):
        raise QuantizeError("calibrate needs at least one image")
    for name, layer in weight_layers(qnet).items():
        if isinstance(layer.weight_quantizer, Quantizer):
            _fit(layer.weight_quantizer, layer.effective_weight().detach(), f"weight of {name!r}")
    with eval_mode(qnet), torch.no_grad(), _switched(qnet, weights=quantized_weights, acts=False):
        for targets in _portions(qnet, n_images=sum(map(len, images)), budget=budget_MiB * 2**20):
            for target, seen in _collect(qnet, images, targets).items():
                _fit(qnet.get_submodule(target), torch.cat(seen), f"activation quantizer {target!r}")  # type: ignore[arg-type]


def _fit(quantizer: Quantizer, values: Tensor, what: str) -> None:
    try:
        quantizer.init_from(values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


class _switched:
    """A context in which quantizers are on or off as told, and after which each is as it was."""

    def __init__(self, net: nn.Module, *, weights: bool, acts: bool) -> None:
        self.net, self.weights, self.acts = net, weights, acts
        self.before = [(module, module.enabled) for module in net.modules() if hasattr(module, "enabled")]

    def __enter__(self) -> None:
        set_quantization(self.net, weights=self.weights, acts=self.acts)

    def __exit__(self, *_: Any) -> None:
        for module, enabled in self.before:
            module.enabled = enabled


def _portions(qnet: fx.GraphModule, *, n_images: int, budget: int) -> list[set[str]]:
    """Return the activation quantizers in groups whose inputs fit ``budget`` bytes (one alone always does)."""
    sizes: dict[str, int] = {}
    for node in qnet.graph.nodes:
        if node.op == "call_module" and str(node.target).endswith(QUANTIZER_SUFFIX):
            size = 4 * n_images * int(torch.Size(node.meta["shape"][1:]).numel())
            sizes[str(node.target)] = sizes.get(str(node.target), 0) + size
    portions: list[set[str]] = []
    room = 0
    for target, size in sizes.items():
        if size > room or not portions:
            portions.append(set())
            room = budget
        portions[-1].add(target)
        room -= size
    return portions


def _collect(qnet: fx.GraphModule, images: list[Tensor], targets: set[str]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {target: [] for target in sorted(targets)}

    def look(node: fx.Node, value: Any) -> None:
        if node.op == "call_module" and str(node.target) in seen:
            per_tensor = getattr(qnet.get_submodule(str(node.target)), "axis", None) is None
            seen[str(node.target)].append(value.flatten() if per_tensor else value)

    device = next(qnet.parameters()).device
    for batch in images:
        NodeWatcher(qnet, look).run(batch.to(device))
    return seen


def freeze_statistics(net: nn.Module, *, frozen: bool = True) -> None:
    """End (or resume) the running-statistics updates of folded and of plain batch norms; gamma and beta still train.

    The last phase of a training with ``bn="fold_train"``: from here on train and eval mode compute the same. Plain
    batch norms are put in eval mode, so call it again after each ``net.train()``.
    """
    for module in net.modules():
        if isinstance(module, FoldedNorm):
            module.statistics_frozen = frozen
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(net.training and not frozen)


def bake_norms(qnet: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of ``qnet`` whose folded batch norms are constants of plain quantized layers, for lowering.

    ``QuantConvBn2d`` becomes ``QuantConv2d`` with ``weight`` = g w and ``bias`` = g (b - mean) + beta, under the same
    name and weight quantizer; outputs in eval mode are the same.
    """
    baked = copy.deepcopy(qnet)
    for name, layer in weight_layers(baked).items():
        if isinstance(layer, FoldedNorm):
            weight, bias = layer.effective_weight().detach(), layer.effective_bias()
            form = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
            plain = form.from_float(layer, layer.weight_quantizer)
            del plain.bn
            plain.weight = nn.Parameter(weight)
            plain.bias = nn.Parameter(bias.detach()) if bias is not None else None
            parent, _, child = name.rpartition(".")
            setattr(baked.get_submodule(parent), child, plain)
    return baked


def load_state(qnet: fx.GraphModule, state: Mapping[str, Any]) -> None:
    """Load ``state`` (of ``qnet.state_dict()``) into ``qnet``, strictly.

    Raises:
        PolicyError:  the state was saved under other bits; names the first tensors that differ.
        RuntimeError: missing or unexpected keys, as ``load_state_dict`` reports them.
    """
    qnet.load_state_dict(dict(state))
