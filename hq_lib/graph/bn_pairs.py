"""Pairs of a batch norm and the layer that can take it in exactly, read from the order of execution.

Folding asks ``find_layer`` about one batch norm at a time, since each fold changes the graph for the next.
"""

from typing import Literal

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from hq_lib.graph.layers import is_plain
from hq_lib.graph.modes import FollowsMode

Kind = Literal["conv_bn", "linear_bn", "conv_transpose_bn", "bn_conv", "bn_linear"]
Layer = _ConvNd | nn.Linear

_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def layer_kind(module: nn.Module | None) -> str:
    """Return "conv", "conv_transpose" or "linear", or "" for any other module, one that is not ``is_plain`` too."""
    if not isinstance(module, Layer) or not is_plain(module):
        return ""
    return "linear" if isinstance(module, nn.Linear) else f"conv{'_transpose' * module.transposed}"


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
    node = norm.all_input_nodes[0]
    shared = node if len(node.users) > 1 else None
    while _is_identity(node):
        node = node.all_input_nodes[0]
        shared = node if len(node.users) > 1 else shared
    kind = layer_kind(_module(node))
    if not kind:
        return f"{_say(node)} before it is no plain convolution or linear layer"
    if shared is not None:
        others = [_say(user) for user in shared.users if user is not norm and not _leads_to(user, norm)]
        return f"the output of {_say(node)} before it is used by {', '.join(others) or 'it twice'} too"
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
        return f"{_say(node)} after it is no plain convolution or linear layer"
    if kind == "conv_transpose":
        return f"{_say(node)} after it is transposed: not all its outputs see all of its kernel"
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
        return f"{_say(node)} after it pads with zeros, which the batch norm would not have shifted"
    return _misfit(node, last, bn, outputs=False) or (node, f"bn_{kind}")  # pyright: ignore[reportReturnType]


def _misfit(node: fx.Node, between: fx.Node, bn: _BatchNorm, *, outputs: bool) -> str:
    """Return why the channels of the layer at ``node`` are not those of ``bn``, which meet in the value ``between``."""
    layer = _module(node)
    assert isinstance(layer, Layer)
    names = ("out_channels", "out_features") if outputs else ("in_channels", "in_features")
    n_channels = getattr(layer, names[isinstance(layer, nn.Linear)])
    shape = between.meta.get("shape")
    if bn.num_features != n_channels:
        return f"{_say(node)} has {n_channels} channels and it has {bn.num_features}"
    if shape is not None and len(shape) != layer.weight.dim():
        return f"in shape {tuple(shape)} the channels of {_say(node)} are not on the batch norm's axis 1"
    return _entangled(node)


def _entangled(node: fx.Node) -> str:
    """Return what else depends on the module at ``node`` as it is: a second call, a hook, a look at its tensors."""
    module, who = _module(node), _say(node)
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
    if node.op == "call_function" and node.target in _DROPOUTS:
        return node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is False
    module = _module(node)
    if isinstance(module, FollowsMode):
        return module.function in _DROPOUTS
    return isinstance(module, nn.Identity | _DropoutNd)


def _leads_to(node: fx.Node, norm: fx.Node) -> bool:
    return _is_identity(node) and any(user is norm or _leads_to(user, norm) for user in node.users)


def _say(node: fx.Node) -> str:
    return repr(str(node.target) if node.op == "call_module" else node.name)
