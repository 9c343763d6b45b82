"""``quantize``: one pass that turns any traced CNN into its quantized graph."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib.graph.folding import fold_bn
from hq_lib.graph.layers import QuantConv2d, QuantConvTranspose2d, QuantizedWeight, QuantLinear
from hq_lib.graph.ops import QUANTIZER_SUFFIX, kinds, op_name
from hq_lib.graph.placement import Site, find_sites, share_bits
from hq_lib.graph.policy import BitPolicy
from hq_lib.graph.spec import PolicyError, QuantizeError, Spec, make_quantizer
from hq_lib.graph.tracing import Example, propagate, trace
from hq_lib.quantizers import Quantizer

_FORMS: dict[str, type[QuantizedWeight]] = {
    "conv2d": QuantConv2d,
    "linear": QuantLinear,
    "convtranspose2d": QuantConvTranspose2d,
}


class QuantizedNet(fx.GraphModule):
    """A quantized network as a graph. Its state dict carries its bits, and refuses a state with other bits.

    What the policy became is in ``meta``: "policy", "sites" (tuple of ``Site``), "weights" and "acts" (name -> Spec).
    """

    @property
    def policy(self) -> BitPolicy:
        """The policy that made this network."""
        return self.meta["policy"]

    def bits_record(self) -> dict[str, str]:
        """Return "weight <layer>" and "act <tensor>" -> spec as text: what a saved state must agree with."""
        acts = {f"act {site.name}": f"{self.meta['acts'][site.name]}" for site in self.meta["sites"]}
        return {f"weight {name}": str(spec) for name, spec in self.meta["weights"].items()} | acts

    def get_extra_state(self) -> Tensor:
        """Return ``bits_record`` as UTF-8 bytes in a uint8 tensor, which every checkpoint format can hold."""
        text = json.dumps(self.bits_record(), sort_keys=True)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check a loaded record against this network's; ``PolicyError`` names the first tensors that differ."""
        theirs = json.loads(bytes(state.cpu().tolist()).decode())
        ours = self.bits_record()
        differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if differing:
            pairs = [f"{key}: saved {theirs.get(key, 'none')}, here {ours.get(key, 'none')}" for key in differing[:3]]
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise PolicyError(
                f"the state was saved under another policy ({'; '.join(pairs)}{more}): "
                f"quantize the float net with the policy it was saved with, then load"
            )


def quantize(net: nn.Module, policy: BitPolicy, example: Example) -> QuantizedNet:
    """Return ``net`` quantized by ``policy``: a new graph in the mode of ``net``, which is left as it was.

    Layers become ``QuantConv2d``, ``QuantLinear``, ... under their own names, each with a ``weight_quantizer`` (None =
    float) fitted to its weight. Activation quantizers are modules and nodes named ``<node>_act_quantizer``, not fitted
    yet: ``calibrate`` does that, or the first training batch. With all bits 32 the result equals ``net`` bit for bit.

    Args:
        net:     any traceable CNN, see ``hq_lib.graph.tracing.trace``.
        policy:  method and bits per tensor.
        example: (B, C, H, W), an input that ``net`` accepts, for shapes and operation counts; its values do not matter.

    Raises:
        PolicyError:                  names the key of the policy that cannot be carried out.
        QuantizeError:                the net is quantized already, or has a layer without a quantized form.
        tracing.UntraceableError:     names the line that cannot be traced.
        ValueError:                   the example does not fit the network.
    """
    _refuse_quantized(net)
    gm = trace(copy.deepcopy(net))
    if policy.bn == "fold":
        gm = fold_bn(gm, example).train(net.training)
    propagate(gm, example)
    sites = find_sites(gm, placement=policy.placement)
    weights, acts = policy.resolve(_layer_names(gm), sites)
    share_bits(sites, acts)
    _replace_layers(gm, weights)
    _insert_quantizers(gm, sites, acts)
    return _finished(gm, policy=policy, sites=tuple(sites), weights=weights, acts=acts)


def _refuse_quantized(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, QuantizedWeight | Quantizer):
            raise QuantizeError(
                f"the net is quantized already (module {name!r} is a {type(module).__name__}): "
                f"quantize its float net, with one policy for all bits"
            )


def _layer_names(gm: fx.GraphModule) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node, kind in kinds(gm).items() if kind == "layer"))


def _replace_layers(gm: fx.GraphModule, weights: Mapping[str, Spec]) -> None:
    forms = {str(node.target): _FORMS[op_name(node, gm)] for node, kind in kinds(gm).items() if kind == "layer"}
    for name, spec in weights.items():
        layer = gm.get_submodule(name)
        key = f"policy, weight of {name!r}"
        quantizer = make_quantizer(spec, "weight", key, **_weight_axis(layer))
        quantized = forms[name].from_float(layer)
        if quantizer is not None:
            quantizer.owner = name
            quantizer.to(quantized.weight.device).train(layer.training).init_from(quantized.weight)
        quantized.weight_quantizer = quantizer
        _set_submodule(gm, name, quantized)


def _weight_axis(layer: nn.Module) -> dict[str, Any]:
    """Return the option that puts per-channel scales of a transposed convolution on its output channels."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return {}
    return {"axis": 1 if layer.groups == 1 else None}


def _set_submodule(gm: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(gm.get_submodule(parent), child, module)


def _insert_quantizers(gm: fx.GraphModule, sites: list[Site], acts: Mapping[str, Spec]) -> None:
    nodes = {node.name: node for node in gm.graph.nodes}
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    for site in sites:
        spec = acts[site.name]
        if spec.is_float:
            continue
        node = nodes[site.node]
        target = f"{site.group}{QUANTIZER_SUFFIX}"
        if not hasattr(gm, target):
            quantizer = make_quantizer(spec, "act", f"policy, activation {site.name!r}", signed=site.signed)
            assert quantizer is not None  # 32 bits, which were sorted out above
            quantizer.owner = site.name
            gm.add_submodule(target, quantizer.to(device).train(gm.training))
        with gm.graph.inserting_after(node):
            inserted = gm.graph.create_node("call_module", target, (node,), name=f"{site.node}{QUANTIZER_SUFFIX}")
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user, new=inserted: user is not new)
        inserted.meta = {key: node.meta[key] for key in ("nn_module_stack", "shape", "dtype") if key in node.meta}


def _finished(gm: fx.GraphModule, **meta: Any) -> QuantizedNet:
    gm.graph.lint()
    modes = {name: module.training for name, module in gm.named_modules()}
    qnet = QuantizedNet(gm, gm.graph, class_name=f"Quantized{type(gm).__name__}")
    for name, module in qnet.named_modules():
        module.training = modes[name]
    qnet.meta = {**gm.meta, **meta}
    return qnet
