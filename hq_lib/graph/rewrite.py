"""``quantize``: one pass that turns any traced CNN into its quantized graph."""

import importlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from hq_lib.graph.agreement import refuse_draws, traced
from hq_lib.graph.folding import OnRefusal, fold_bn
from hq_lib.graph.layers import LAYERS, QUANTIZER_SUFFIX, QuantizedWeight, make_plain_
from hq_lib.graph.modes import eval_mode, module_path
from hq_lib.graph.operations import kinds, op_name
from hq_lib.graph.placement import Site, find_sites, layer_types, share_bits
from hq_lib.graph.policy import BitPolicy
from hq_lib.graph.spec import PolicyError, QuantizeError, make_quantizer, of_kind
from hq_lib.graph.state import hidden_weights
from hq_lib.graph.tracing import Example, LeafModules, copy_modes_, device_of, propagate, unwrap
from hq_lib.quantizers import Quantizer
from hq_lib.quantizers.base import as_bytes


class QuantizedNet(fx.GraphModule):
    """A quantized network as a graph. Its state dict carries its bits, and refuses a state with other bits.

    What it was made of is in ``meta``: "network" (its class), how it was traced ("traced_training",
    "leaf_modules", "on_refusal"), "policy", "sites" (tuple of ``Site``) and "specs" ("weight <layer>" or
    "act <activation>" -> Spec). It can be copied and pickled.
    """

    @property
    def policy(self) -> BitPolicy:
        """The policy that made this network."""
        return self.meta["policy"]

    @property
    def record(self) -> dict[str, Any]:
        """What the file says that this network was loaded from (see ``graph.save``); {} where there was none."""
        return self.meta.get("record", {})

    def bits_record(self) -> dict[str, str]:
        """Return tensor ("weight <layer>", "act <activation>") -> spec as text: what a saved state must agree with."""
        return {tensor: str(spec) for tensor, spec in self.meta["specs"].items()}

    def get_extra_state(self) -> Tensor:
        """Return ``bits_record`` as UTF-8 bytes in a uint8 tensor, which every checkpoint format can hold."""
        return as_bytes(json.dumps(self.bits_record(), sort_keys=True))

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

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the ``state_dict()`` of a network made alike: same policy, same steps of PTQ.

        Raises:
            PolicyError: the state was saved under other bits, or has other keys, as another ``bn`` mode or ``ptq``
                         makes them; names the first tensors that differ.
            ValueError:  it holds a quantizer of another kind, which is named.
        """
        if (record := state_dict.get("_extra_state")) is not None:
            self.set_extra_state(record)  # only compares the bits: they say more than the keys below
        ours = self.state_dict().keys()
        if strict and (apart := ours ^ state_dict.keys()):
            raise PolicyError(
                f"the state is of another network, another policy.bn or placement, or of quantizers that ptq has "
                f"replaced: {min(apart)!r} and {len(apart) - 1} more keys are in one of the two only; load it into a "
                f"network made alike, or save the network itself by graph.save"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph as it is: fx would trace its code anew, and lose names and shapes."""
        body = {key: value for key, value in self.__dict__.items() if key not in ("_graph", "_code", "_tracer_cls")}
        nodes = [
            (n.op, _place(n.target), fx.map_arg(n.args, _named), fx.map_arg(n.kwargs, _named), n.name, _plain_meta(n))
            for n in self.graph.nodes
        ]
        return _unpickled, (body, nodes, type(self).__name__)


class _Named(str):
    """The name of a node, in place of the node, while a graph is pickled."""

    __slots__ = ()


def _place(target: Any) -> Any:
    """Return where a function is found; some of torch's are local to the function that made them, for pickle."""
    place = getattr(target, "__module__", None), getattr(target, "__name__", None)
    return place if getattr(sys.modules.get(place[0] or ""), place[1] or "", None) is target else target


def _named(node: fx.Node) -> Any:
    return _Named(node.name)


def _plain_meta(node: fx.Node) -> dict[str, Any]:
    """Return the meta that this library reads; classes by name, so that a notebook's own need not be importable."""
    known = {key: node.meta[key] for key in ("shape", "dtype", "value", "line") if key in node.meta}
    return known | {"nn_module_stack": {path: (path, name) for path, name in module_path(node)}}


def _unpickled(body: dict[str, Any], nodes: list[tuple[Any, ...]], class_name: str) -> QuantizedNet:
    root, graph = nn.Module(), fx.Graph()
    root.__dict__.update(body)
    made: dict[str, fx.Node] = {}
    for op, target, args, kwargs, name, meta in nodes:
        args, kwargs = (
            map_aggregate(part, lambda v: made[v] if isinstance(v, _Named) else v) for part in (args, kwargs)
        )
        target = getattr(importlib.import_module(target[0]), target[1]) if isinstance(target, tuple) else target
        made[name] = graph.create_node(op, target, args, kwargs, name=name)  # type: ignore[arg-type]
        made[name].meta = meta
    return _with_graph(root, graph, class_name, body["meta"])


def quantize(
    net: nn.Module, policy: BitPolicy, example: Example, *, leaf_modules: LeafModules = (),
    on_refusal: OnRefusal = "raise",
) -> QuantizedNet:  # fmt: skip
    """Return ``net`` quantized by ``policy``: a new graph in the mode of ``net``, which is left as it was.

    Layers become ``QuantConv2d``, ``QuantLinear``, ... under their own names, each with a ``weight_quantizer`` (None =
    float) fitted to its weight. Activation quantizers are modules and nodes named ``<node>_act_quantizer``, not fitted
    yet: ``calibrate`` does that, or the first training batch where no two tensors share a grid. With all bits 32 the
    result equals ``net`` bit for bit.

    Args:
        net:     any traceable CNN, see ``hq_lib.graph.tracing.trace``.
        policy:  method and bits per tensor.
        example: (B, C, H, W), an input that ``net`` accepts, for shapes, operation counts and a comparison of the graph
                 with ``net``.
        leaf_modules: names or classes of modules that stay one call, in float; ``policy.report`` counts their weights.
        on_refusal:   with ``bn="fold"``: "keep" leaves batch norms running that cannot be folded exactly.

    Raises:
        PolicyError:                  names the key of the policy that cannot be carried out.
        QuantizeError:                the net is quantized already, has a layer without a quantized form, or draws
                                      random numbers in eval mode.
        folding.FoldError:            names each batch norm that cannot be folded, and why.
        agreement.DisagreementError:  the graph computes something else than ``net``; names the line.
        tracing.UntraceableError:     names the line that cannot be traced.
        ValueError:                   the example does not fit the network.
        TypeError:                    ``net`` is no network, or ``policy`` no ``BitPolicy``.
    """
    net = unwrap(net)
    qnet = unfitted(net, policy, example, leaf_modules=leaf_modules, on_refusal=on_refusal)
    for layer in qnet.modules():
        if isinstance(layer, QuantizedWeight) and isinstance(layer.weight_quantizer, Quantizer):
            layer.weight_quantizer.init_from(layer.weight)
    if (hidden := hidden_weights(qnet)) and not leaf_modules and not policy.weight.is_float:
        constants = [node for node in qnet.graph.nodes if node.op == "get_attr" and node.target in hidden]
        readers = {op_name(user, qnet) for node in constants for user in node.users}
        warnings.warn(
            f"{len(hidden)} weights ({sum(w.numel() for w in hidden.values())} numbers, first {next(iter(hidden))!r}) "
            f"stay in float, read by {', '.join(sorted(readers)) or 'no layer'}: policy.report(qnet) counts them",
            stacklevel=2,
        )
    return qnet


def unfitted(
    net: nn.Module, policy: BitPolicy, example: Example, *, leaf_modules: LeafModules = (),
    on_refusal: OnRefusal = "raise",
) -> QuantizedNet:  # fmt: skip
    """As ``quantize``, with weight quantizers that are not fitted yet: what ``graph.load`` fills."""
    if not isinstance(policy, BitPolicy):
        raise TypeError(f"policy is {policy!r:.60}: give a BitPolicy, BitPolicy(weight='lsq:4', act='lsq:4') say")
    for name, module in net.named_modules():
        if isinstance(module, QuantizedWeight | Quantizer):
            raise QuantizeError(
                f"the net is quantized already (module {name!r} is a {type(module).__name__}): "
                f"quantize its float net, with one policy for all bits"
            )
    taken = dir(QuantizedNet(nn.Module(), fx.Graph()))
    for name, _ in itertools.chain(net.named_modules(), net.named_parameters(), net.named_buffers()):
        if name.partition(".")[0] in taken or name.endswith(QUANTIZER_SUFFIX):
            raise QuantizeError(f"the name {name!r} means something else in a quantized network: rename it in the net")
    if policy.bn == "fold":
        gm = fold_bn(net, example, on_refusal=on_refusal, leaf_modules=leaf_modules).train(net.training)
        propagate(gm, example)
    else:
        gm = traced(net, example, leaf_modules=leaf_modules)
    refuse_draws(gm, example)
    with eval_mode(gm):
        for module in gm.modules():
            make_plain_(module)
    sites = find_sites(gm, placement=policy.placement)
    specs, origins = policy.resolve(layer_types(gm), sites)
    in_float = [name for name, spec in of_kind(specs, "act").items() if spec.is_float]
    sites = find_sites(gm, placement=policy.placement, in_float=in_float)
    share_bits(sites, specs, origins)
    kept = [leaf for leaf in leaf_modules if isinstance(leaf, str)]
    classes = tuple(leaf for leaf in leaf_modules if not isinstance(leaf, str))
    kept += [name for name, module in net.named_modules() if isinstance(module, classes)]
    gm.meta |= {
        "policy": policy, "sites": tuple(sites), "specs": specs, "network": type(net).__name__,
        "traced_training": net.training, "leaf_modules": kept, "on_refusal": on_refusal,
    }  # fmt: skip
    quantizers = fresh_quantizers(gm)
    for node, kind in kinds(gm).items():
        name = str(node.target)
        if kind == "layer" and not isinstance(layer := gm.get_submodule(name), QuantizedWeight):
            gm.set_submodule(name, LAYERS[op_name(node, gm)].from_float(layer, quantizers.get(name)))
    _insert_act_quantizers(gm, sites, quantizers)
    return _with_graph(gm, gm.graph, f"Quantized{type(net).__name__}", gm.meta)


def _with_graph(root: nn.Module, graph: fx.Graph, class_name: str, meta: dict[str, Any]) -> QuantizedNet:
    graph.lint()
    qnet = QuantizedNet(root, graph, class_name=class_name)
    copy_modes_(root, qnet)
    qnet.meta = meta
    return qnet


def fresh_quantizers(gm: fx.GraphModule) -> dict[str, Quantizer]:
    """Return an unfitted quantizer for every tensor that ``meta`` quantizes, by the name of its layer or module."""
    found: dict[str, Quantizer] = {}
    for name, spec in of_kind(gm.meta["specs"], "weight").items():
        layer: Any = gm.get_submodule(name)
        if isinstance(layer, nn.ConvTranspose2d) and spec.options.get("axis", 0) == 0:  # per output channel
            spec = replace(spec, options={**spec.options, "axis": 1 if layer.groups == 1 else None})
        quantizer = make_quantizer(spec, "weight", f"policy, weight of {name!r}")
        if quantizer is not None:
            quantizer.owner = name
            found[name] = quantizer.to(layer.weight.device).train(layer.training)
    device = device_of(gm)
    for site in gm.meta["sites"]:
        key = f"policy, activation {site.name!r}"
        quantizer = make_quantizer(gm.meta["specs"][f"act {site.name}"], "act", key, signed=site.signed)
        if quantizer is not None and site.quantizer in found:  # those of a group share the first one's
            found[site.quantizer].places += 1
        elif quantizer is not None:
            quantizer.owner = site.name
            found[site.quantizer] = quantizer.to(device).train(gm.training)
    return found


def _insert_act_quantizers(gm: fx.GraphModule, sites: Iterable[Site], quantizers: Mapping[str, Quantizer]) -> None:
    nodes = {node.name: node for node in gm.graph.nodes}
    for site in sites:
        if site.quantizer not in quantizers:
            continue
        node = nodes[site.node]
        gm.add_submodule(site.quantizer, quantizers[site.quantizer])
        with gm.graph.inserting_after(node):
            inserted = gm.graph.create_node(
                "call_module", site.quantizer, (node,), name=f"{site.node}{QUANTIZER_SUFFIX}"
            )
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user, new=inserted: user is not new)
        inserted.meta = {key: node.meta[key] for key in ("nn_module_stack", "shape", "dtype") if key in node.meta}
