"""Functions of one element: the graph's own operation at every real value that a grid has, for a table of integers."""

import operator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from hq_lib.graph import op_name
from hq_lib.graph.modes import module_path
from hq_lib.graph.tracing import device_of
from hq_lib.integer import geometry
from hq_lib.integer.geometry import LowerError

RESIZES = {"interpolate", "upsample", "upsamplingbilinear2d"}
"""Operations that are no function of one element but of one tensor: see ``moves``."""
_OF_ONE = {
    "sigmoid", "hardsigmoid", "silu", "hardswish", "gelu", "elu", "selu", "celu", "leakyrelu", "prelu", "rrelu",
    "tanh", "mish", "softplus", "softsign", "tanhshrink", "logsigmoid", "threshold", "add", "iadd", "sub", "isub",
    "rsub", "mul", "imul", "div", "truediv", "itruediv", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "pow",
    "square", "reciprocal", "sin", "cos", "erf", "sign", "round", "floor", "ceil", "relu6", "hardtanh", "clamp",
}  # fmt: skip
"""Operations of one tensor (and numbers) that work element by element."""
_INSTEAD = {
    **dict.fromkeys(("softmax", "logsoftmax"), (
        "as the last step leave it out of the network (the largest logit is the largest probability); attention inside "
        "stays in float, outside"
    )),
    **dict.fromkeys(("layernorm", "groupnorm", "instancenorm2d", "rmsnorm"), (
        "it measures each image anew; train with batch norm, which the layer before it absorbs"
    )),
    **dict.fromkeys(("matmul", "bmm", "scaleddotproductattention", "multiheadattention", "einsum"), (
        "products of two activations across positions stay in float: lower the parts before and behind it"
    )),
}  # fmt: skip
"""Operations without an integer form -> the way out."""


def source_of(node: fx.Node, gm: fx.GraphModule, kinds: dict[fx.Node, str]) -> fx.Node:
    """Return the one tensor that ``node``, a function of one element or a resampling, reads.

    Raises:
        LowerError: the operation works across elements, reads two tensors, or has a constant per channel; with the
                    layer's name and the way out.
    """
    name, read = op_name(node, gm), [n for n in node.all_input_nodes if "shape" in n.meta or kinds[n] == "param"]
    constants = [n for n in read if kinds[n] == "param"]
    tensors = [n for n in read if n not in constants]
    held = [_parameter(n, gm) for n in constants]
    held += [*gm.get_submodule(str(node.target)).parameters()] if node.op == "call_module" else []
    if len(tensors) == 1 and (name in RESIZES or (name in _OF_ONE and all(p.numel() == 1 for p in held))):
        return tensors[0]
    way_out = "compute it outside of the network, or write it with layers, sums, products, pools and such functions"
    if name in _OF_ONE and held:
        way_out = "it holds a constant per channel; fold it into the layer before it, or make it one number"
    raise LowerError(f"{_where(node)!r} ({name}) has no integer form: {_INSTEAD.get(name, way_out)}")


def computed(node: fx.Node, gm: fx.GraphModule, source: fx.Node, real: np.ndarray) -> np.ndarray:
    """Return float32 (n,): what ``node`` makes of the values ``real`` (n,) of the tensor ``source``.

    Raises:
        LowerError: it is not a number at one of them; with the layer's name.
    """
    device = device_of(gm)
    x = torch.from_numpy(real.astype(np.float32)).to(device)

    def given(n: fx.Node) -> Any:
        if n is source:
            return x
        return _parameter(n, gm).reshape(()) if n.op == "get_attr" else geometry.known_sizes(n)

    args, kwargs = map_arg((node.args, node.kwargs), given)
    with torch.no_grad():
        if node.op == "call_module":
            y = gm.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            y = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            y = node.target(*args, **kwargs)  # type: ignore[operator]
    values = y.cpu().numpy().astype(np.float32)
    if np.isnan(values).any():
        at = float(real[int(np.isnan(values).argmax())])
        raise LowerError(f"{_where(node)!r} ({op_name(node, gm)}) is not a number at {at:.4g}, which its input can be")
    return values


def _parameter(node: fx.Node, gm: fx.GraphModule) -> torch.Tensor:
    return operator.attrgetter(str(node.target))(gm)


def _where(node: fx.Node) -> str:
    """Return the layer's dotted name, or for a function the module that calls it and the node."""
    path = module_path(node)
    return str(node.target) if node.op == "call_module" else f"{path[-1][0]}.{node.name}" if path else node.name
