"""The report of a quantized network: one row per tensor, and the averages that a table prints."""

from typing import Any

import pandas as pd
import torch
from torch import fx, nn

from hq_lib.graph.layers import QuantizedWeight
from hq_lib.graph.ops import kinds
from hq_lib.graph.spec import PolicyError, Spec, of_kind
from hq_lib.quantizers import Quantizer

COLUMNS = (
    *("layer", "tensor", "method", "bits", "signed", "scale", "scale_min", "scale_max", "n_scales"),
    *("macs", "n_params", "n_elements", "size_KiB"),
)


def report(qnet: fx.GraphModule) -> pd.DataFrame:
    """Return one row per layer weight and per activation of ``qnet``, float ones included.

    So are weights that no quantized layer holds, since a function or a module kept as one call multiplies with them:
    "float" rows without ``macs``, counted in the average.

    Columns: ``layer``; ``tensor`` ("weight" or "activation"); ``method`` and ``bits`` ("float", 32 where none);
    ``signed``; ``scale`` (mean), ``scale_min``, ``scale_max`` in real units per step and ``n_scales`` (NaN and 0
    before calibration or in float); ``macs`` of the layer for one image; ``n_params`` (weight elements; biases stay in
    float); ``n_elements`` of the activation for one image; ``size_KiB`` of the weight at its bits. In ``attrs``:
    ``avg_w_bits`` (weighted by parameters), ``avg_a_bits`` (by elements), ``n_macs`` of the layers known, ``hidden``
    (names of the weights that no quantized layer holds), ``policy`` (one line).

    Raises:
        PolicyError: ``qnet`` is not from ``quantize``.
    """
    meta = qnet.meta
    if "sites" not in meta:
        raise PolicyError("report: the network has no policy; pass what quantize(net, policy, example) returned")
    macs, hidden = layer_macs(qnet), hidden_weights(qnet)
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


def hidden_weights(qnet: nn.Module) -> dict[str, torch.Tensor]:
    """Return by name the matrices and kernels of ``qnet`` that are no quantized layer's, so that they stay in float."""
    others = [m for m in qnet.modules() if isinstance(m, QuantizedWeight | Quantizer) or "Norm" in type(m).__name__]
    known = {id(p) for module in others for p in module.parameters()}
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
