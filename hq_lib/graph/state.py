"""What is done to a quantized network as a whole: fitting its grids, bypassing them, ending batch-norm updates."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib.data import ImageSet, normalize
from hq_lib.graph.layers import QuantizedWeight
from hq_lib.graph.ops import QUANTIZER_SUFFIX
from hq_lib.graph.spec import QuantizeError
from hq_lib.graph.tracing import NodeWatcher, device_of, eval_mode
from hq_lib.quantizers import Quantizer

BUDGET_MIB = 1024
"""Memory for collected activations; beyond it the batches are run again for the next tensors."""
Choice = Callable[[nn.Module], bool]
Fit = Callable[[nn.Module, torch.Tensor], None]


def weight_layers(net: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantized layers of ``net`` by dotted name, those in float (``weight_quantizer`` None) included."""
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantizedWeight)}


def act_quantizers(gm: nn.Module) -> dict[str, nn.Module]:
    """Return the activation quantizers of a quantized graph, or of a block cut from one, by module name."""
    return {name: module for name, module in gm.named_children() if name.endswith(QUANTIZER_SUFFIX)}


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Return every quantizer of ``net`` by name: layers, then activation modules; those in float are left out.

    Raises:
        QuantizeError: names a module in a quantizer's place that is none.
    """
    found: dict[str, Any] = {name: layer.weight_quantizer for name, layer in weight_layers(net).items()}
    found = {name: q for name, q in (found | act_quantizers(net)).items() if not isinstance(q, nn.Identity | None)}
    if odd := [name for name, q in found.items() if not isinstance(q, Quantizer)]:
        raise QuantizeError(f"{odd[0]!r}: a {type(found[odd[0]]).__name__} quantizes it, which no file can describe")
    return found


def put(net: nn.Module, name: str, quantizer: Quantizer) -> None:
    """Make ``quantizer`` that of the layer, or activation module, ``name``, with switch, mode and owner of the old."""
    layer = weight_layers(net).get(name)
    holder, place = (net, name) if layer is None else (layer, "weight_quantizer")
    old = getattr(holder, place)
    quantizer.enabled, quantizer.owner = old.enabled, old.owner
    setattr(holder, place, quantizer.train(old.training))


def refuse_float(net: nn.Module, what: str) -> None:
    """Raise ``QuantizeError`` that names ``what`` where ``net`` has no quantized layer."""
    if not weight_layers(net):
        raise QuantizeError(f"{what} takes a quantized network, and {type(net).__name__} has no quantized layer: "
                            "quantize(net, policy, example) first")  # fmt: skip


class set_quantization:
    """Switch the weight and the activation quantizers of ``net`` on (True), off (False: float values pass), or neither.

    Works on a quantized graph and on a block cut from one (which shares them). With both off, the network computes what
    its float net computes. Grids and their parameters stay as they are. As ``torch.set_grad_enabled`` it acts at once,
    and in a ``with`` statement every switch is restored behind it.

    Args:
        weights, acts: None leaves them as they are.
        only:          leaves those alone for which it is False: ``only=lambda quantizer: quantizer.bits >= 4`` switches
                       what the hybrid rule leaves to PTQ.
    """

    def __init__(self, net: nn.Module, *, weights: bool | None, acts: bool | None, only: Choice | None = None) -> None:
        layers: list[Any] = [q for layer in weight_layers(net).values() if (q := layer.weight_quantizer) is not None]
        chosen = [(q, weights) for q in layers] + [(q, acts) for q in act_quantizers(net).values()]
        chosen = [(q, on) for q, on in chosen if on is not None and (only is None or only(q))]
        self.before = [(q, q.enabled) for q, _ in chosen]
        for quantizer, on in chosen:
            quantizer.enabled = on  # type: ignore[assignment]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for quantizer, on in self.before:
            quantizer.enabled = on


def calibrate(
    qnet: fx.GraphModule,
    batches: Tensor | ImageSet | Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]],
    *,
    only: Choice | None = None,
    quantized_weights: bool = True,
    fit: Fit | None = None,
) -> None:
    """Fit each activation quantizer of ``qnet`` to its input on ``batches``.

    One-shot: the activation quantizers are bypassed while their inputs are collected (QDrop's way), so no
    grid depends on another's. A quantizer sees its input over all batches, and over all its places in the graph, at
    once. Eval mode and no gradients throughout; no random numbers; modes and switches are restored. Weight quantizers
    were fitted by ``quantize`` and are not touched.

    Args:
        qnet:              from ``quantize``.
        batches:           (B, C, H, W) or several of those, float, normalised as in training (which no check can tell:
                           grids follow whatever range comes); or with their labels, which are not looked at: a
                           ``DataLoader``, an ``ImageSet`` (normalised here). Kept in memory.
        only:              which activation quantizers to fit (given the module); the others keep their grid and work as
                           they are switched. ``only=lambda quantizer: not quantizer.initialised`` spares trained ones.
        quantized_weights: True: activations as the quantized weights make them; False: as the float weights do.
        fit:               how a quantizer (given first) takes the values it has seen, flattened where its grid is per
                           tensor; None: its own ``init_from``. ``ptq.fit_acts`` gives range methods here.

    Raises:
        QuantizeError: a float network, no batch, or batches that hold no float images.
        ValueError:    NaN or Inf in an activation, naming the quantizer; images of a size that a layer, which is named,
                       does not accept.
    """
    refuse_float(qnet, "calibrate")
    if isinstance(batches, ImageSet):
        batches = normalize(batches.images, batches.spec)
    each: Iterable[Any] = [batches] if isinstance(batches, Tensor) else batches
    images: list[Any] = [batch[0] if isinstance(batch, tuple | list) and batch else batch for batch in each]
    _check_images(images)
    wanted = {name for name, quantizer in act_quantizers(qnet).items() if only is None or only(quantizer)}
    weights = set_quantization(qnet, weights=None if quantized_weights else False, acts=None)
    acts = set_quantization(qnet, weights=None, acts=False, only=only)
    with eval_mode(qnet), torch.no_grad(), weights, acts:
        for targets in _portions(qnet, wanted, n_images=sum(map(len, images))):
            for target, seen in _collect(qnet, images, targets).items():
                quantizer = qnet.get_submodule(target)
                try:
                    (fit or Quantizer.init_from)(quantizer, torch.cat(seen))  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"activation quantizer {target!r}: {error}") from error


def _check_images(images: list[Tensor]) -> None:
    for batch in images:
        if not isinstance(batch, Tensor):
            raise QuantizeError(f"calibrate takes batches of images, got a {type(batch).__name__} among them")
        if not batch.is_floating_point():
            raise QuantizeError(f"calibrate takes normalised float images, got {batch.dtype}: data.normalize first")
    if not images or not all(len(batch) for batch in images):
        raise QuantizeError("calibrate needs at least one image")


def _portions(qnet: fx.GraphModule, wanted: set[str], *, n_images: int) -> list[list[str]]:
    """Return ``wanted`` in execution order, in groups whose inputs fit the budget (one alone always does)."""
    sizes: dict[str, int] = {}
    for node in qnet.graph.nodes:
        if node.op == "call_module" and str(node.target) in wanted:
            size = 4 * n_images * int(torch.Size(node.meta["shape"][1:]).numel())
            sizes[str(node.target)] = sizes.get(str(node.target), 0) + size
    portions: list[list[str]] = []
    room = 0
    for target, size in sizes.items():
        if size > room or not portions:
            portions.append([])
            room = BUDGET_MIB * 2**20
        portions[-1].append(target)
        room -= size
    return portions


def _collect(qnet: fx.GraphModule, images: list[Tensor], targets: list[str]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {target: [] for target in targets}

    def look(node: fx.Node, value: Any) -> None:
        if node.op == "call_module" and str(node.target) in seen:
            per_tensor = getattr(qnet.get_submodule(str(node.target)), "axis", None) is None
            seen[str(node.target)].append((value.flatten() if per_tensor else value).clone())  # an add may be in place

    device = device_of(qnet)
    for batch in images:
        NodeWatcher(qnet, look).run(batch.to(device))
    return seen
