"""What each operation of a traced CNN means to a quantizer, whatever its spelling.

``nn.ReLU``, ``F.relu``, ``torch.relu`` and ``x.relu_()`` are one operation; so are the quantized and the float form of
a layer. The kind of a node says how the values of its output relate to the grid of its input:

    input     the image                             layer     conv, transposed conv, linear
    norm      batch norm, synchronised or not       relu      keeps the grid of its input (it only drops values)
    clip      ReLU6, hardtanh, clamp                act       any other activation function
    add, mul  two or more tensors in, one out       concat    keeps a grid only if all its inputs share it
              (add: differences too)                pass      max-pool, reshapes, slices, dropout, nearest upsampling:
    avgpool   values between those of its input               grid unchanged
    shape     an integer, not a tensor              quantizer an activation quantizer
    param     a constant of the network             other     anything else that makes a tensor
"""

from typing import Any

from torch import fx, nn

from hq_lib.graph.layers import LAYERS, QUANTIZER_SUFFIX
from hq_lib.graph.modes import FollowsMode, eval_mode, is_small, line_of, module_path, without_constants
from hq_lib.graph.spec import QuantizeError

_DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "featuredropout", "alphadropout", "featurealphadropout",
    "stochasticdepth",
}  # fmt: skip
_SAME = {"identity", "clone", "detach", "contiguous", "droppath", *_DROPOUTS}
"""Operations that give their input back in eval mode; a dropout that is called as a function by its flag alone."""
_AS_IS = {"float", "to", "type", "typeas", "expand", "expandas"}
"""Operations that give their input back where it has that type and shape already."""
_SPELLINGS = {
    "multiply": "mul", "divide": "div", "truedivide": "div", "negative": "neg", "absolute": "abs",
    "swapaxes": "transpose", "swapdims": "transpose",
}  # fmt: skip
_UNSUPPORTED = {"conv1d", "conv3d", "convtranspose1d", "convtranspose3d", "lstm", "gru", "rnn", "bilinear"}
_NAMES = {
    "norm": {"batchnorm1d", "batchnorm2d", "batchnorm3d", "syncbatchnorm"},
    "relu": {"relu"},
    "clip": {"relu6", "hardtanh", "clamp", "clip", "clampmin", "clampmax"},
    "act": {
        *("sigmoid", "hardsigmoid", "silu", "hardswish", "gelu", "elu", "selu", "celu", "leakyrelu", "prelu", "rrelu"),
        *("tanh", "mish", "softplus", "softmax", "logsoftmax", "softsign", "tanhshrink", "logsigmoid", "glu"),
        "threshold",
    },
    "add": {"add", "iadd", "sub", "isub", "subtract"},
    "mul": {"mul", "imul"},
    "concat": {"cat", "concat", "concatenate"},
    "avgpool": {"avgpool1d", "avgpool2d", "adaptiveavgpool1d", "adaptiveavgpool2d", "mean"},
    "pass": {
        *("identity", "maxpool1d", "maxpool2d", "adaptivemaxpool1d", "adaptivemaxpool2d", "amax"),
        *("flatten", "unflatten", "view", "reshape", "permute", "transpose", "movedim", "squeeze"),
        *("unsqueeze", "getitem", "chunk", "split", "tensorsplit", "unbind", "narrow", "select", "expand", "repeat"),
        *("pad", "zeropad2d", "constantpad2d", "reflectionpad2d", "replicationpad2d", "circularpad2d"),
        *("channelshuffle", "pixelshuffle", "pixelunshuffle", "upsamplingnearest2d"),
    },
    "shape": {"size", "dim", "numel", "ndimension"},
}
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names} | dict.fromkeys(LAYERS, "layer")
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_NONNEGATIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus"}


def _called(node: fx.Node, gm: fx.GraphModule) -> tuple[Any, nn.Module | None]:
    """Return the target of ``node`` and the module that it is, None for a function, one that follows a mode too."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return (module.function, None) if isinstance(module, FollowsMode) else (node.target, module)


def op_name(node: fx.Node, gm: fx.GraphModule) -> str:
    """Return the operation of ``node`` in one spelling: lower case without underscores, e.g. "maxpool2d".

    Whatever gives its input back in eval mode is an "identity": dropout, a copy, to add the number 0, noise of a module
    of the user's that it adds in training alone.
    """
    name = _spelled(node, gm)
    if name in ("add", "iadd"):
        same = node.kwargs.get("alpha", 1) == 1 and any(_is_zero(arg) for arg in operands(node))
    elif name in _AS_IS and node.op != "call_module":
        source: Any = node.args[0]
        same = "shape" in node.meta and all(node.meta[key] == source.meta.get(key) for key in ("shape", "dtype"))
    else:
        same = name in _SAME and node.op.startswith("call") and not _drops(node, name, gm)
        same = same or _gives_back(node, gm)
    return "identity" if same else name


def _spelled(node: fx.Node, gm: fx.GraphModule) -> str:
    target, module = _called(node, gm)
    if module is not None:
        classes = (c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules"))
        found = next(classes, nn.Module)
        name = type(module).__name__ if found is nn.Module else found.__name__
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = name.lower().replace("_", "")
    return _SPELLINGS.get(name, name)


def _drops(node: fx.Node, name: str, gm: fx.GraphModule) -> bool:
    """Return whether ``node`` is a dropout called as a function that is at work in eval mode: ``F.dropout(x)``."""
    if name not in _DROPOUTS or _called(node, gm)[1] is not None:
        return False
    given: dict[int | str, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    if node.op == "call_module":  # it follows the mode
        in_training: Any = gm.get_submodule(str(node.target)).in_training
        given |= {place: not value for place, value in in_training.items()}
    if _is_zero(given.get(1, given.get("p"))):
        return False
    places = (3 if name == "stochasticdepth" else 2, "training", "train")
    return bool(next((given[place] for place in places if place in given), "alpha" not in name))


def _gives_back(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Return whether ``node`` is a small module of the user's whose ``forward`` in eval mode is ``return x``."""
    module = _called(node, gm)[1]
    if (
        module is None
        or type(module).__module__.startswith("torch.nn.modules")
        or node.meta.get("opaque")
        or not is_small(module)
        or len(node.all_input_nodes) != 1
    ):
        return False
    with eval_mode(module), without_constants(module):
        try:
            first, *_, last = fx.Tracer().trace(module).nodes
        except Exception:  # of whatever forward is
            return False
    return first.op == "placeholder" and last.args[0] is first


def _is_zero(arg: Any) -> bool:
    return isinstance(arg, int | float) and arg == 0  # Python's sum([a, b]) is 0 + a + b


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
    if node.meta.get("opaque"):  # a leaf that was asked for stays in float, whatever it is
        return "other"
    name = op_name(node, gm)
    _refuse(node, name, gm)
    inputs = [known[n] for n in node.all_input_nodes]
    if inputs and all(kind == "shape" for kind in inputs):
        return "shape"
    if name == "getattr":
        return "shape" if node.args[1] in _SHAPE_ATTRIBUTES else "other"
    if name == "getitem" and inputs[0] == "other" and "shape" not in node.all_input_nodes[0].meta:
        return "other"  # one of several tensors that an operation has made
    kind = _KIND_OF.get(name, "other")
    tensors = [n for n in operands(node) if isinstance(n, fx.Node) and known[n] not in ("shape", "param")]
    if kind in ("add", "mul") and len(tensors) < 2:
        return "other"
    if name in ("interpolate", "upsample"):
        return "pass" if _option(node, gm, "mode", 3, "nearest").startswith("nearest") else "other"
    return "other" if name in ("pad", "constantpad2d") and _option(node, gm, "value", 3, 0) else kind


def _refuse(node: fx.Node, name: str, gm: fx.GraphModule) -> None:
    owner, made = (module_path(node) or [("", "Module")])[-1]
    made = made.rpartition(".")[2]
    who = f"{owner or 'the network'!r}, at {line_of(node)},"
    module = _called(node, gm)[1]
    leave = f"or leave it in float: quantize(..., leaf_modules=({owner!r},))"
    if name in LAYERS and module is None:
        raise QuantizeError(
            f"{who} calls {name} as a function on a weight of its own making, so no layer holds what it multiplies "
            f"with: make it an nn.Conv2d or nn.Linear module, {leave}"
        )
    theirs = module is not None and type(module).__module__.startswith("torch.nn.modules")
    matrices = theirs and any(p.dim() > 1 for p in module.parameters())  # type: ignore[union-attr]
    if name in _UNSUPPORTED or (matrices and name not in _KIND_OF and "norm" not in name):
        raise QuantizeError(
            f"layer {str(node.target)!r}: {name} has no quantized form here (conv2d, linear and convtranspose2d have); "
            f"write it as one of those, {leave.replace(repr(owner), repr(str(node.target)))}"
        )
    if module is None and (name == "batchnorm" or "BatchNorm" in made):
        raise QuantizeError(
            f"{who} normalises by a function ({made}), which can be neither folded nor kept with its layer: "
            f"make it an nn.BatchNorm2d with the same statistics"
        )


def _option(node: fx.Node, gm: fx.GraphModule, name: str, position: int, default: Any) -> Any:
    """Return option ``name`` of a module or of a function, whose argument number ``position`` it is."""
    if node.op == "call_module":
        return getattr(gm.get_submodule(str(node.target)), name, default)
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def operands(node: fx.Node) -> tuple[Any, ...]:
    """Return what an addition or product joins, in its order, by place or by name (``torch.add(a, other=b)``)."""
    return (*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs))[:2]


def is_difference(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Return whether an "add" node subtracts its second tensor: ``a - b``, or ``torch.add`` with a negative alpha."""
    return ("sub" in op_name(node, gm)) != (_option(node, gm, "alpha", 2, 1) < 0)


def lower_bound(node: fx.Node, gm: fx.GraphModule) -> float | None:
    """Return the least value that a clip node can put out, None where it has no lower end known before running."""
    name = op_name(node, gm)
    if name == "relu6":
        return 0.0
    default = node.kwargs.get("min", -1.0 if name == "hardtanh" else None)
    bound = _option(node, gm, "min_val", 99 if name == "clampmax" else 1, default)
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
            keeps = kind in ("pass", "avgpool", "mul", "concat", "quantizer")
            proved[node] = inherited and (keeps or (kind == "add" and not is_difference(node, gm)))
    return proved
