"""BN folding: a convolution or linear layer and its batch norm become one layer, on the graph, out of place.

In eval mode BN is one multiplier and one shift per channel c (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2):

    y = g x + (beta - g mean),    g = gamma / sqrt(var + eps)

so BN after a layer scales the layer's output channels, and BN before a layer scales its input channels. What goes with
what is read from the order of execution, never from the order of registration, about one batch norm at a time, since
each fold changes the graph for the next. A fold that would not be exact is refused by name.
"""

import copy
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hq_lib.graph.agreement import compare, traced
from hq_lib.graph.layers import layer_kind, make_plain_
from hq_lib.graph.modes import eval_mode
from hq_lib.graph.operations import op_name
from hq_lib.graph.tracing import Example, LeafModules, trace, unwrap
from hq_lib.results.hints import check_known

Kind = Literal["conv_bn", "linear_bn", "conv_transpose_bn", "bn_conv", "bn_linear"]
Layer = _ConvNd | nn.Linear
OnRefusal = Literal["raise", "keep"]

_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def find_norms(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that run a batch norm, modules and functional ones, in order of execution."""
    nodes = gm.graph.nodes
    return [n for n in nodes if "batch_norm" in getattr(n.target, "__name__", "") or isinstance(_module(n), _BatchNorm)]


def find_opaque_norms(gm: fx.GraphModule) -> list[str]:
    """Return the names of the batch norms inside leaf modules, which no graph shows."""
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    return [name for name, m in gm.named_modules() if isinstance(m, _BatchNorm) and name not in called]


def find_layer(norm: fx.Node) -> tuple[fx.Node, Kind] | str:
    """Return the node of the layer that can take in batch norm ``norm``, and how; or the reason why none can.

    The layer before it comes first; the layer after it can do only where no padding lets unshifted zeros in.
    """
    bn = _module(norm)
    if not isinstance(bn, _BatchNorm):
        return "it is a functional batch_norm; make it a module, nn.BatchNorm2d"
    if bn.running_mean is None or bn.running_var is None:
        return "track_running_stats=False: it uses the statistics of each batch, in eval mode too"
    if type(bn).forward not in _NORM_FORWARDS:
        return f"its class {type(bn).__name__} has a forward of its own"
    if reason := _entangled(norm):
        return reason
    before = _layer_before(norm, bn)
    if not isinstance(before, str):
        return before
    after = _layer_after(norm, bn)
    return f"{before}, and {after}" if isinstance(after, str) else after


def _layer_before(norm: fx.Node, bn: _BatchNorm) -> tuple[fx.Node, Kind] | str:
    chain = [norm.all_input_nodes[0]]
    while _is_identity(chain[-1]):
        chain.append(chain[-1].all_input_nodes[0])
    node, shared = chain[-1], next((n for n in reversed(chain) if len(n.users) > 1), None)
    kind = layer_kind(_module(node))
    if not kind:
        return f"{_name(node)!r} before it is no plain convolution or linear layer"
    if shared is not None:
        others = [repr(_name(user)) for user in shared.users if user is not norm and not _leads_to(user, norm)]
        return f"the output of {_name(node)!r} before it is used by {', '.join(others) or 'it twice'} too"
    return _misfit(node, node, bn, outputs=True) or (node, f"{kind}_bn")  # pyright: ignore[reportReturnType]


def _layer_after(norm: fx.Node, bn: _BatchNorm) -> tuple[fx.Node, Kind] | str:
    node = norm
    while True:
        if len(node.users) != 1:
            return f"its output goes to {len(node.users)} places"
        last, node = node, next(iter(node.users))
        if not _is_identity(node):
            break
    layer, kind = _module(node), layer_kind(_module(node))
    if not kind:
        return f"{_name(node)!r} after it is no plain convolution or linear layer"
    if kind == "conv_transpose":
        return f"{_name(node)!r} after it is transposed: not all its outputs see all of its kernel"
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
        return f"{_name(node)!r} after it pads with zeros, which the batch norm would not have shifted"
    return _misfit(node, last, bn, outputs=False) or (node, f"bn_{kind}")  # pyright: ignore[reportReturnType]


def _misfit(node: fx.Node, between: fx.Node, bn: _BatchNorm, *, outputs: bool) -> str:
    """Return why the channels of the layer at ``node`` are not those of ``bn``, which meet in the value ``between``."""
    layer = _module(node)
    assert isinstance(layer, Layer)
    names = ("out_channels", "out_features") if outputs else ("in_channels", "in_features")
    n_channels = getattr(layer, names[isinstance(layer, nn.Linear)])
    shape = between.meta.get("shape")
    if bn.num_features != n_channels:
        return f"{_name(node)!r} has {n_channels} channels and it has {bn.num_features}"
    if shape is not None and len(shape) != layer.weight.dim():
        return f"in shape {tuple(shape)} the channels of {_name(node)!r} are not on the batch norm's axis 1"
    return _entangled(node)


def _entangled(node: fx.Node) -> str:
    """Return what else depends on the module at ``node`` as it is: a second call, a hook, a look at its tensors."""
    module, who = _module(node), repr(_name(node))
    assert module is not None
    calls = [n for n in node.graph.nodes if _module(n) is module]
    if len(calls) > 1:
        return f"{who} is called {len(calls)} times"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{who} has forward hooks"
    if any(n.op == "get_attr" and str(n.target).startswith(f"{node.target}.") for n in node.graph.nodes):
        return f"forward reads the tensors of {who} directly"
    return ""


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None and node.op == "call_module" else None


def _is_identity(node: fx.Node) -> bool:
    """Say whether ``node`` passes its input on in eval mode."""
    owner = node.graph.owning_module
    return owner is not None and op_name(node, owner) == "identity"


def _leads_to(node: fx.Node, norm: fx.Node) -> bool:
    return _is_identity(node) and any(user is norm or _leads_to(user, norm) for user in node.users)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


class FoldError(ValueError):
    """A BN cannot be folded exactly; the message lists every such layer with its reason and the way out."""


class Fold(NamedTuple):
    """What became of one BN."""

    bn: str
    """Name of the BN (of the node, for a functional one)."""
    layer: str
    """Name of the layer that took the BN in; "" where the BN still runs."""
    kind: Kind | Literal[""]
    """Which of the folds, named in order of execution; "" where none."""
    reason: str
    """Why it was kept; "" when folded."""


def fold_bn(
    net: nn.Module, example: Example | None = None, *, on_refusal: OnRefusal = "raise", leaf_modules: LeafModules = ()
) -> fx.GraphModule:
    """Return a copy of ``net`` as a graph in eval mode whose batch norms are folded into their neighbours.

    Weights are computed in float64 and stored in the layer's own dtype. Dropout, inactive in eval mode, and identities
    between a layer and its BN are seen through. ``net`` itself, its mode included, is not touched. The account of each
    batch norm, in order of execution, is ``meta["folds"]`` of the graph, ``Fold`` by ``Fold``.

    Args:
        net:        the network, a plain module or a graph, in any mode.
        example:    an input (or tuple of inputs), for shapes and to compare with the original layer by layer, on the
                    CPU (no TF32); without it nothing is compared, and a linear layer is taken to have (N, C) outputs.
        on_refusal: "raise", or "keep" the batch norms that cannot be folded exactly.
        leaf_modules: see ``tracing.trace``.

    Raises:
        FoldError: names each BN that cannot be folded exactly, if ``on_refusal`` is "raise".
        agreement.DisagreementError: names the first layer whose error is more than rounding explains, or says how the
                                     graph is another network than ``net``.
        tracing.UntraceableError: names the line that cannot be traced.
    """
    check_known(on_refusal, get_args(OnRefusal), "on_refusal")
    with eval_mode(unwrap(net)):
        original = traced(net, example, leaf_modules=leaf_modules)
    original.graph.eliminate_dead_code()  # an auxiliary head in eval mode, a value that only training reads
    original.delete_all_unused_submodules()
    original.recompile()
    folded = trace(original)  # shares all layers; those that change are replaced by copies
    order = [*(_name(n) for n in find_norms(folded)), *find_opaque_norms(folded)]
    folds = {bn: Fold(bn, "", "", "it is inside a leaf module, one opaque call") for bn in order}
    same_value: dict[str, str] = {}  # layer changed -> the node of the original that has the value which it now has
    progress = True
    while progress:  # a fold can make the next one possible: BN, BN, conv
        progress = False
        for norm in find_norms(folded):
            fold = folds[_name(norm)] = _fold_one(folded, norm, same_value)
            progress |= not fold.reason
    folded.graph.lint()
    folded.recompile()
    kept = [fold for fold in folds.values() if fold.reason]
    if kept and on_refusal == "raise":
        lines = "\n".join(f"  - {fold.bn!r}: {fold.reason}" for fold in kept)
        raise FoldError(
            f"{type(net).__name__} has batch norms that cannot be folded exactly; fold_bn(net, x, on_refusal='keep') "
            f"and quantize(net, policy, x, on_refusal='keep') leave them running:\n{lines}"
        )
    if example is not None:
        compare(original, folded, example, same_value)
    folded.meta["folds"] = tuple(folds.values())
    return folded


def folded_weight_bias(layer: Any, bn: Any, *, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the one layer that equals ``layer`` and its BN ``bn`` in eval mode.

        g = gamma / sqrt(var + eps),  h = beta - g mean
        BN after:    W'_c = g_c W_c,                      b'_c = g_c b_c + h_c          (c: output channel)
        BN before:   W'_oi = W_oi g_i,                    b'_o = b_o + sum_ik W_oik h_i (i: input, k: position)

    The second needs every output to see all k, so no zero padding. The weight is shaped as given, (C_out, C_in /
    groups, *k) or, transposed, (C_in, C_out / groups, *k); bias (C_out,); float64, on the CPU (some devices have none).
    ``kind``: order and layer, e.g. "conv_bn": the convolution first.
    """
    given = (layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    wide: Any = [None if v is None else v.detach().cpu().double() for v in given]
    weight, bias, mean, var, gamma, beta = wide
    groups = getattr(layer, "groups", 1)
    g = torch.rsqrt(var + bn.eps) if gamma is None else gamma * torch.rsqrt(var + bn.eps)
    h = -g * mean if beta is None else beta - g * mean
    # (groups, C_out / groups, C_in / groups, positions), of a transposed convolution C_in first
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if kind in ("conv_bn", "linear_bn"):
        folded = weight * g.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        folded = (blocks * g.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    if kind.startswith("bn_"):
        return folded, (blocks * h.reshape(groups, 1, -1, 1)).sum((2, 3)).flatten() + (0.0 if bias is None else bias)
    return folded, h if bias is None else g * bias + h


def per_channel_ranges(net: nn.Module) -> pd.DataFrame:
    """Return the weight range of every output channel of every convolution and linear layer, by layer name.

    Columns: layer, channel (from 0), max_abs = max |w|. Folding changes no name, so the tables of a network before and
    after it can be joined.
    """
    rows = []
    for name, layer in net.named_modules():
        if isinstance(layer, Layer):
            weight = layer.weight.detach()
            if isinstance(layer, _ConvTransposeNd):  # (groups, C_in / groups, C_out / groups, *k) by output channel
                weight = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
            rows += [(name, c, top) for c, top in enumerate(weight.flatten(1).abs().amax(1).tolist())]
    return pd.DataFrame(rows, columns=["layer", "channel", "max_abs"])


def _fold_one(gm: fx.GraphModule, norm: fx.Node, same_value: dict[str, str]) -> Fold:
    bn, found = _name(norm), find_layer(norm)
    if isinstance(found, str):
        return Fold(bn, "", "", found)
    node, kind = found
    name = str(node.target)
    layer: Any = copy.deepcopy(gm.get_submodule(name))
    grad = layer.weight.requires_grad
    weight, bias = (v.to(layer.weight) for v in folded_weight_bias(layer, gm.get_submodule(bn), kind=kind))
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return Fold(bn, "", "", "the folded weights are not finite: look at its statistics and at the weights' dtype")
    make_plain_(layer)
    layer.weight, layer.bias = nn.Parameter(weight, grad), nn.Parameter(bias, grad)
    if kind.endswith("_bn"):
        same_value[name] = norm.name
    else:
        same_value.setdefault(name, node.name)
    gm.set_submodule(name, layer)
    norm.replace_all_uses_with(norm.all_input_nodes[0])
    gm.graph.erase_node(norm)
    gm.delete_submodule(bn)
    return Fold(bn, name, kind, "")
