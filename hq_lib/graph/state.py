"""A quantized network as a whole: its layers and quantizers, fitting its grids, bypassing them, and its report."""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn

from hq_lib.data import ImageSet, normalize
from hq_lib.graph.layers import QUANTIZER_SUFFIX, QuantizedWeight, is_norm
from hq_lib.graph.operations import kinds
from hq_lib.graph.spec import QuantizeError, Spec, of_kind
from hq_lib.graph.tracing import NodeWatcher, device_of, eval_mode
from hq_lib.quantizers import Quantizer

BUDGET_MIB = 1024
"""Memory for collected activations; beyond it the batches are run again for the next tensors."""
PASS_NUMBERS = 3 * 2**22
"""Of the images of one pass, whose activations are up to forty times as many: 64 images of 224 x 224 pixels"""
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
    """Make ``quantizer`` that of the layer, or activation module, ``name``; mode, switch, owner, places as before."""
    layer = weight_layers(net).get(name)
    holder, place = (net, name) if layer is None else (layer, "weight_quantizer")
    old = getattr(holder, place)
    quantizer.enabled, quantizer.owner, quantizer.places = old.enabled, old.owner, old.places
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
                    (fit or Quantizer.init_from)(quantizer, _joined(seen))  # type: ignore[arg-type]
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
        for part in passes(batch):
            NodeWatcher(qnet, look).run(part.to(device))
    return seen


def _joined(parts: list[Tensor]) -> Tensor:
    """Return ``parts`` as one tensor and empty the list, so that the memory does not hold them twice."""
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    return joined


def passes(images: Tensor) -> tuple[Tensor, ...]:
    """Return ``images`` in parts of ``PASS_NUMBERS``, of whole 32 images where that many fit; at once where all do.

    A part of 8 gave other last digits than all at once in EfficientNet's depthwise convolutions, parts of 32 the same.
    """
    most = PASS_NUMBERS // max(1, images[0].numel())
    return images.split(max(1, most // 32 * 32 or most))


COLUMNS = (
    *("layer", "tensor", "method", "bits", "signed", "scale", "scale_min", "scale_max", "n_scales"),
    *("macs", "n_params", "n_elements", "size_KiB"),
)


def report(qnet: fx.GraphModule) -> pd.DataFrame:
    """Return one row per layer weight and per activation of ``qnet``, float ones included; see ``BitPolicy.report``.

    So are weights that a function or a module kept as one call multiplies with (a layer's own once more): "float" rows
    without ``macs``, counted in the average.

    Columns: ``layer``; ``tensor`` ("weight" or "activation"); ``method`` and ``bits`` ("float", 32 where none);
    ``signed``; ``scale`` (mean), ``scale_min``, ``scale_max`` in real units per step and ``n_scales`` (NaN and 0
    before calibration or in float); ``macs`` of the layer for one image; ``n_params`` (weight elements; biases stay in
    float); ``n_elements`` of the activation for one image; ``size_KiB`` of the weight at its bits. In ``attrs``:
    ``avg_w_bits`` (weighted by parameters), ``avg_a_bits`` (by elements), ``n_macs`` of the layers known, ``hidden``
    (names of those weights), ``policy`` (one line).
    """
    meta, macs, hidden = qnet.meta, layer_macs(qnet), hidden_weights(qnet)
    rows = []
    for name, spec in of_kind(meta["specs"], "weight").items():
        layer: Any = qnet.get_submodule(name)
        rows.append(_row(name, spec, layer.weight_quantizer, n_params=layer.weight.numel(), macs=macs[name]))
    rows += [_row(name, Spec(), None, n_params=w.numel(), macs=float("nan")) for name, w in hidden.items()]
    for site in meta["sites"]:
        n, quantizer = torch.Size(site.shape).numel(), getattr(qnet, site.quantizer, None)
        rows.append(_row(site.name, meta["specs"][f"act {site.name}"], quantizer, n_elements=n, signed=site.signed))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    weights, acts = table[table.tensor == "weight"], table[table.tensor == "activation"]
    table.attrs = {
        "avg_w_bits": _average(weights.bits, weights.n_params),
        "avg_a_bits": _average(acts.bits, acts.n_elements),
        "n_macs": int(weights.macs.sum()),
        "hidden": list(hidden),
        "policy": meta["policy"].describe(),
    }
    return table


def _average(bits: pd.Series, amounts: pd.Series) -> float:
    return float((bits * amounts).sum() / amounts.sum()) if amounts.sum() else float("nan")


ABOUT = (getattr, "size", "dim")
"""What asks a tensor for its shape, type or device alone."""


def hidden_weights(qnet: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return by name the matrices and kernels of ``qnet`` that are no quantized layer's, so that they stay in float.

    Or that something reads beside their layer, in float.
    """
    others = [m for m in qnet.modules() if isinstance(m, QuantizedWeight | Quantizer) or is_norm(m)]
    taken = [n for n in qnet.graph.nodes if n.op == "get_attr" and not all(user.target in ABOUT for user in n.users)]
    read = {id(attrgetter(str(node.target))(qnet)) for node in taken}
    known = {id(p) for module in others for p in module.parameters()} - read
    return {
        name: p
        for name, p in qnet.named_parameters()
        if p.dim() > 1 and id(p) not in known and "bias" not in name.rpartition(".")[2]
    }


def _row(
    name: str, spec: Spec, quantizer: nn.Module | None, *, n_params: int = 0, n_elements: int | None = None,
    macs: float = 0, signed: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the values of ``COLUMNS`` for a weight of ``n_params``, or an activation of ``n_elements``."""
    scales: tuple[float, ...] = (float("nan"), float("nan"), float("nan"), 0)
    if isinstance(quantizer, Quantizer) and quantizer.initialised:
        scale = quantizer.grid().scale
        scales = (scale.mean().item(), scale.min().item(), scale.max().item(), scale.numel())
    tensor, method = "weight" if n_elements is None else "activation", "float" if spec.is_float else spec.method
    sizes = (macs, n_params, n_elements or 0, n_params * spec.bits / 8192)
    return name, tensor, method, spec.bits, signed, *scales, *sizes


def layer_macs(gm: fx.GraphModule) -> dict[str, int]:
    """Return multiply-accumulates per image of each layer (all its calls together); the graph needs known shapes."""
    macs: dict[str, int] = {}
    for node, kind in kinds(gm).items():
        if kind == "layer":
            layer: Any = gm.get_submodule(str(node.target))
            counted = node.all_input_nodes[0] if isinstance(layer, nn.ConvTranspose2d) else node
            shape = counted.meta["shape"]
            per_element = layer.weight.numel() // layer.weight.shape[0]
            macs[str(node.target)] = macs.get(str(node.target), 0) + torch.Size(shape[1:]).numel() * per_element
    return macs
