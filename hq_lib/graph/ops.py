"""Kinds of graph nodes: what each operation of a traced CNN means to a quantizer, whatever its spelling.

``nn.ReLU``, ``F.relu``, ``torch.relu`` and ``x.relu_()`` are one operation; so are the quantized and the float form of
a layer. A kind says how the values of a node's output relate to the grid of its input:

    input     the image                             layer     conv, transposed conv, linear
    norm      batch norm                            relu      keeps the grid of its input (it only drops values)
    clip      ReLU6, hardtanh, clamp                act       any other activation function
    add, mul  two or more tensors in, one out       concat    keeps a grid only if all its inputs share it
    avgpool   values between those of its input     pass      max-pool, reshapes, slices, dropout: grid unchanged
    shape     an integer, not a tensor              quantizer an activation quantizer
    param     a constant of the network             other     anything else that makes a tensor
"""

from torch import fx, nn

from hq_lib.graph.spec import QuantizeError

QUANTIZER_SUFFIX = "_act_quantizer"
LAYERS = {"conv2d", "linear", "convtranspose2d"}
_UNSUPPORTED = {"conv1d", "conv3d", "convtranspose1d", "convtranspose3d", "lstm", "gru", "rnn", "bilinear"}
_NAMES = {
    "norm": {"batchnorm1d", "batchnorm2d", "batchnorm3d"},
    "relu": {"relu"},
    "clip": {"relu6", "hardtanh", "clamp", "clip", "clampmin", "clampmax", "threshold"},
    "act": {
        *("sigmoid", "hardsigmoid", "silu", "hardswish", "gelu", "elu", "selu", "celu", "leakyrelu", "prelu", "rrelu"),
        *("tanh", "mish", "softplus", "softmax", "logsoftmax", "softsign", "tanhshrink", "logsigmoid", "glu"),
    },
    "add": {"add", "iadd"},
    "mul": {"mul", "imul"},
    "concat": {"cat", "concat", "concatenate"},
    "avgpool": {"avgpool1d", "avgpool2d", "adaptiveavgpool1d", "adaptiveavgpool2d", "mean"},
    "pass": {
        *("maxpool1d", "maxpool2d", "adaptivemaxpool1d", "adaptivemaxpool2d", "amax", "identity", "clone", "detach"),
        *("flatten", "unflatten", "view", "reshape", "permute", "transpose", "movedim", "contiguous", "squeeze"),
        *("unsqueeze", "getitem", "chunk", "split", "tensorsplit", "unbind", "narrow", "select", "expand", "repeat"),
        *("dropout", "dropout1d", "dropout2d", "featuredropout", "stochasticdepth", "pad", "zeropad2d"),
        *("channelshuffle", "pixelshuffle", "pixelunshuffle"),
    },
    "shape": {"size", "dim", "numel", "ndimension"},
}
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names} | dict.fromkeys(LAYERS, "layer")
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_NONNEGATIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus"}


def op_name(node: fx.Node, gm: fx.GraphModule) -> str:
    """Return the operation of ``node`` in one spelling: lower case without underscores, e.g. "maxpool2d"."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        classes = (c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules"))
        found = next(classes, nn.Module)
        name = type(module).__name__ if found is nn.Module else found.__name__
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.lower().replace("_", "")


def kinds(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Return the kind (see the module docstring) of every node of ``gm``, in execution order.

    Raises:
        QuantizeError: a layer called as a function on weights that no module holds, or a layer type that has no
            quantized form (1-d and 3-d convolutions, recurrent layers), with its name and the way out.
    """
    found: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        found[node] = _kind(node, gm, found)
    return found


def _kind(node: fx.Node, gm: fx.GraphModule, known: dict[fx.Node, str]) -> str:
    fixed = {"placeholder": "input", "get_attr": "param", "output": "output"}.get(node.op)
    if fixed is not None:
        return fixed
    if str(node.target).endswith(QUANTIZER_SUFFIX):
        return "quantizer"
    name = op_name(node, gm)
    _refuse(node, name)
    inputs = [known[n] for n in node.all_input_nodes]
    if inputs and all(kind == "shape" for kind in inputs):
        return "shape"
    if name == "getattr":
        return "shape" if node.args[1] in _SHAPE_ATTRIBUTES else "other"
    kind = _KIND_OF.get(name, "other")
    if kind in ("add", "mul") and _n_tensors(node, known) < 2:
        return "other"
    return "other" if name == "pad" and _pads_with_a_value(node) else kind


def _refuse(node: fx.Node, name: str) -> None:
    if name in LAYERS and node.op != "call_module":
        raise QuantizeError(
            f"node {node.name!r} calls {name} as a function, so no layer holds its weight: make it an nn.Conv2d or "
            f"nn.Linear module, or pass a net traced with leaf_modules naming its owner to leave it in float"
        )
    if name in _UNSUPPORTED:
        raise QuantizeError(
            f"layer {node.target!r}: {name} has no quantized form here (conv2d, linear and convtranspose2d have); "
            f"write it as one of those, or pass a net traced with leaf_modules naming its owner to leave it in float"
        )


def _n_tensors(node: fx.Node, known: dict[fx.Node, str]) -> int:
    return sum(isinstance(arg, fx.Node) and known[arg] not in ("shape", "param") for arg in node.args)


def _pads_with_a_value(node: fx.Node) -> bool:
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else 0)
    return bool(value)


def lower_bound(node: fx.Node, gm: fx.GraphModule) -> float | None:
    """Return the least value that a clip node can put out, None where it has no lower end known before running."""
    name = op_name(node, gm)
    if name == "relu6":
        return 0.0
    if node.op == "call_module":
        bound = getattr(gm.get_submodule(str(node.target)), "min_val", None)
    else:
        default = -1.0 if name == "hardtanh" else None
        position = node.args[1] if len(node.args) > 1 and name not in ("clampmax", "threshold") else default
        bound = node.kwargs.get("min_val", node.kwargs.get("min", position))
    return float(bound) if isinstance(bound, int | float) else None


def nonnegative(gm: fx.GraphModule, kind_of: dict[fx.Node, str]) -> dict[fx.Node, bool]:
    """Return for every node whether its values can be proved >= 0 from the graph alone (so an unsigned grid fits)."""
    proved: dict[fx.Node, bool] = {}
    for node, kind in kind_of.items():
        inputs = [n for n in node.all_input_nodes if kind_of[n] not in ("shape", "param")]
        inherited = bool(inputs) and all(proved[n] for n in inputs)
        if kind in ("relu", "act"):
            proved[node] = op_name(node, gm) in _NONNEGATIVE
        elif kind == "clip":
            bound = lower_bound(node, gm)
            proved[node] = inherited or (bound is not None and bound >= 0)
        else:
            proved[node] = inherited and kind in ("pass", "avgpool", "add", "mul", "concat", "quantizer")
    return proved
