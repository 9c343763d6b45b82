"""What a forward does besides computing: it asks ``self.training``, and it changes tensors where they lie.

A network is traced as it is and again with every module in its other mode, so that the graph does the right thing in
both. Calls that differ in a flag alone (``F.dropout(x, training=self.training)``) become modules that follow the mode;
small modules that do something else altogether in the other mode (a DropPath) stay one call. What differs beyond that
runs in the traced mode only.

``F.relu_(y)``, ``y += z`` and ``nn.ReLU(inplace=True)`` change ``y`` itself. In a graph that is rewritten, where a
quantizer or a copy comes between, a later reader of ``y`` would see the value before the change: what is read after
such a change must be read from it.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

Place = int | str
Traced = Callable[[Sequence[type[nn.Module]]], fx.Graph]
Pair = tuple[fx.Node | None, fx.Node | None]
Flags = tuple[fx.Node, dict[Place, bool]]


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[nn.Module]:
    """Put every module of ``net`` in eval mode inside the ``with`` block and restore each one's own mode after it.

    What a GPU computes there is ``repeatable``.
    """
    modes = [(module, module.training) for module in net.modules()]
    try:
        with repeatable():
            yield net.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside the block a GPU's convolutions take whole float32 numbers and give the same bits each time.

    Left alone, cuDNN rounds float32 to the 10 bits of TF32, and adds gradients up in whatever order they come.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


class FollowsMode(nn.Module):
    """A function some of whose flags are ``self.training``, or its opposite, of the module that called it."""

    def __init__(self, function: Callable[..., Any] | str, in_training: dict[Place, bool]) -> None:
        """``function``: or a tensor's method by name; ``in_training``: flag (position or name) -> value in training."""
        super().__init__()
        self.function, self.in_training = function, in_training

    def extra_repr(self) -> str:
        """Return the function and its flags, for ``print``."""
        return f"{getattr(self.function, '__name__', self.function)}, {self.in_training}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function does in this module's mode."""
        values = {place: value == self.training for place, value in self.in_training.items()}
        args = tuple(values.get(i, arg) for i, arg in enumerate(args))
        kwargs = {key: values.get(key, arg) for key, arg in kwargs.items()}
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)


class OneMode(nn.Identity):
    """An identity that refuses the mode in which the network runs other operations than the graph it stands in."""

    def __init__(self, net: str, traced_in_training: bool, where: str) -> None:
        """``net``: its class; ``where``: the first line that differs in the other mode."""
        super().__init__()
        self.net, self.traced_in_training, self.where = net, traced_in_training, where

    def extra_repr(self) -> str:
        """Return the mode that it allows, for ``print``."""
        return f"training={self.traced_in_training}"

    def forward(self, input: Any) -> Any:
        """Return ``input``; RuntimeError in the other mode."""
        if self.training != self.traced_in_training:
            now, then = ("training", "eval") if self.training else ("eval", "training")
            raise RuntimeError(
                f"{self.net} was traced in {then} mode, and runs other operations in {now} mode (first {self.where}): "
                f"trace or quantize it in {now} mode, or switch that part off before"
            )
        return input


def read_modes(net: nn.Module, traced: Traced) -> tuple[fx.Graph, list[Flags], str | None]:
    """Return the graph of ``net`` in its own modes, in which it is left, and how the other modes differ.

    That is the calls of which the other mode turns flags over, with their values as traced, and where the network runs
    other operations there; None where it does not.

    Args:
        net:    the network.
        traced: makes a graph of ``net`` that keeps small modules of the classes given as one call.
    """
    leaves: list[type[nn.Module]] = []
    while True:
        graph = traced(leaves)
        try:
            with _other_mode(net):
                other = traced(leaves)
        except ValueError as error:  # of the tracer
            return graph, [], f"cannot be traced there: {error}".splitlines()[0]
        found = _compared(graph, other)
        if isinstance(found, list):
            return graph, found, None
        small = _small_module(net, found, leaves)
        if small is None:
            node = found[1] or found[0]
            return graph, [], "in its output" if node is None else f"at {line_of(node)}"
        leaves.append(small)


def follow_modes(gm: fx.GraphModule, net: nn.Module, flags: Sequence[Flags], only_here: str | None) -> None:
    """Make ``gm``, with what ``read_modes`` found, follow modes as ``net`` does, in place; or refuse the other mode."""
    for node, in_training in flags:
        owner = (module_path(node) or [("", "")])[-1][0]
        training = net.get_submodule(owner).training
        module = FollowsMode(node.target, {place: value == training for place, value in in_training.items()})  # type: ignore[arg-type]
        name = node.name + "_of_mode" * hasattr(net.get_submodule(owner), node.name)  # a module of theirs may be there
        node.op, node.target = "call_module", f"{owner}.{name}".lstrip(".")
        gm.add_submodule(node.target, module.train(training))
    if only_here is not None:
        image = next(node for node in gm.graph.nodes if node.op == "placeholder")
        gm.add_submodule("one_mode", OneMode(type(net).__name__, net.training, only_here).train(net.training))
        with gm.graph.inserting_after(image):
            guard = gm.graph.call_module("one_mode", (image,))
        image.replace_all_uses_with(guard, delete_user_cb=lambda user: user is not guard)
    gm.recompile()


@contextmanager
def _other_mode(net: nn.Module) -> Iterator[None]:
    modules = list(net.modules())
    try:
        for module in modules:
            module.training = not module.training
        with without_constants(net):
            yield
    finally:
        for module in modules:
            module.training = not module.training


@contextmanager
def without_constants(net: nn.Module) -> Iterator[None]:
    """Take from ``net`` the constants that a tracer leaves on it inside the block."""
    before = set(net.__dict__) | set(net._buffers)
    try:
        yield
    finally:
        for name in (set(net.__dict__) | set(net._buffers)) - before:
            delattr(net, name)


def _compared(own: fx.Graph, other: fx.Graph) -> list[Flags] | Pair:
    """Return the nodes that differ in flags alone, with those; or the first two nodes that differ otherwise."""
    ours, theirs = [*own.nodes, None], [*other.nodes, None]
    back: dict[Any, fx.Node] = {}
    found = []
    for a, b in zip(ours, theirs, strict=False):
        if a is None or b is None:
            return found if a is b else (a, b)
        args, kwargs = (map_arg(arg, lambda n: back.get(n, n)) for arg in (b.args, b.kwargs))
        constants = all(n.op == "get_attr" and "_tensor_constant" in str(n.target) for n in (a, b))
        same_call = a.op == b.op and (a.target == b.target or constants)
        flags = _flags(a, args, kwargs) if same_call else None
        if flags is None:
            return a, b
        found += [(a, flags)] if flags else []
        back[b] = a
    return found


def _flags(node: fx.Node, args: Any, kwargs: Any) -> dict[Place, bool] | None:
    """Return the flags of ``node`` that (args, kwargs) turn over, with its own value; None where more differs."""
    mine, theirs = ({**dict(enumerate(a)), **k} for a, k in ((node.args, node.kwargs), (args, kwargs)))
    if mine.keys() != theirs.keys():
        return None
    apart: dict[Place, Any] = {place: value for place, value in mine.items() if repr(value) != repr(theirs[place])}
    return apart if all(isinstance(v, bool) and isinstance(theirs[place], bool) for place, v in apart.items()) else None


def is_small(module: nn.Module) -> bool:
    """Return whether ``module`` holds neither weights nor modules."""
    return not (module._parameters or module._buffers or module._modules)


def _small_module(net: nn.Module, apart: Pair, leaves: Sequence[type[nn.Module]]) -> type[nn.Module] | None:
    """Return the class of the innermost small module behind two differing nodes."""
    for node in apart:
        stack = module_path(node) if node is not None else []
        for module in (net.get_submodule(path) for path, _ in reversed(stack)):
            if type(module) not in leaves and is_small(module):
                return type(module)
    return None


def module_path(node: fx.Node) -> list[tuple[str, str]]:
    """Return (dotted path, name of the class) of the modules whose ``forward`` made ``node``, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(path, kind if isinstance(kind, str) else torch.typename(kind)) for path, kind in stack.values() if path]


def line_of(node: fx.Node) -> str:
    """Return the line of the user's code that made ``node`` where ``tracing.trace`` saw it, else the node's name."""
    return node.meta.get("line") or f"node {node.name!r}"


_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor"}


def changed_by(node: fx.Node, gm: fx.GraphModule) -> fx.Node | None:
    """Return the node whose tensor ``node`` changes in place, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if _works_in_place(node, gm) else None


def _works_in_place(node: fx.Node, gm: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED:
        return True
    if callable(target) and target.__module__ == F.__name__:
        named = dict(zip(inspect.signature(target).parameters, node.args, strict=False)) | dict(node.kwargs)
        return named.get("inplace", False) is True
    return node.kwargs.get("inplace", False) is True


def read_after_change(gm: fx.GraphModule) -> None:
    """Let every reader of a tensor that comes after an in-place change of it read the change's result, in place.

    The graph then computes the same with or without the changes being in place, unless a view of the tensor that was
    made before is read after (which ``agreement.traced`` finds by comparing).
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    moved = False
    for node, place in position.items():
        if (source := changed_by(node, gm)) is not None:
            for user in [user for user in source.users if position[user] > place]:
                user.replace_input_with(source, node)
                moved = True
    if moved:
        gm.recompile()
