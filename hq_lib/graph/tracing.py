"""Traced networks: any CNN as a torch.fx graph, or an error that names the line in the way.

A traced network is a ``torch.fx.GraphModule``: it computes what the network computes, and holds the same layers under
the same names, but its order of execution is a list that folding and quantization can read and rewrite.
"""

import copy
import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from hq_lib.graph.layers import is_plain
from hq_lib.graph.modes import (
    changed_by,
    eval_mode,
    follow_modes,
    is_small,
    read_after_change,
    read_modes,
    without_constants,
)
from hq_lib.results.hints import nearest_few

Example = Tensor | tuple[Tensor, ...]
LeafModules = Sequence[str | type[nn.Module]]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_ATOMS = (_ConvNd, nn.Linear, _BatchNorm)
_HIDDEN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")  # not the user's frames


class UntraceableError(ValueError):
    """The network cannot become a graph; the message names the file, the line and the way out."""


def trace(
    net: nn.Module, *, leaf_modules: LeafModules = (), concrete_args: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Return ``net`` as a graph that shares its layers, their names and each one's train/eval mode.

    ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers are looked through, at the top and
    inside. A net that is a graph already is checked, and comes back with a graph of its own (both options then have
    no effect). What ``forward`` asks of ``self.training`` follows the graph's mode; where the network runs other
    operations in the other mode (an auxiliary head), the graph refuses to run there. What is read after an in-place
    change is read from it.

    Args:
        net:           any module whose ``forward`` has no data-dependent control flow.
        leaf_modules:  names ("layer1.0") or classes of modules to keep as one opaque call.
        concrete_args: values for those arguments of ``forward`` that are flags, not tensors; the returned graph no
                       longer takes them.

    Raises:
        UntraceableError: names the module, file and line that cannot be traced, or says what ``net`` is instead.
        ValueError:       a leaf name or an argument that ``net`` does not have, with the nearest that it has.
        TypeError:        ``net`` is no module.
    """
    net = unwrap(net)
    if isinstance(net, fx.GraphModule):
        return _checked(net)
    if isinstance(net, _ATOMS):
        raise UntraceableError(f"{type(net).__name__} is a lone layer, not a network: wrap it, nn.Sequential(layer)")
    fixed = dict(concrete_args or {})
    _check_known(fixed, inspect.signature(net.forward).parameters, f"argument of {type(net).__name__}.forward")

    def traced(more: Sequence[type[nn.Module]]) -> fx.Graph:
        tracer = _Tracer(leaf_modules, dict(net.named_modules()), fixed, more)
        try:
            return tracer.trace(net)
        except Exception as error:
            raise UntraceableError(_explain(net, tracer.failed_in, error)) from error

    with without_constants(net):
        graph, flags, only_here = read_modes(net, traced)
        gm = fx.GraphModule(net, graph, class_name=type(net).__name__)
    for node in gm.graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(size, torch.dtype) for size in (*node.args, *node.kwargs.values())):
            node.target = "reshape"  # the same values, and it takes tensors in channels-last order
            node.kwargs = {"shape" if name == "size" else name: size for name, size in node.kwargs.items()}
    copy_modes_(net, gm)
    follow_modes(gm, net, flags, only_here)
    read_after_change(gm)
    return gm


def unwrap(net: nn.Module) -> nn.Module:
    """Return the network inside ``DataParallel`` and ``torch.compile`` wrappers; refuse what is no Python module."""
    if not isinstance(net, nn.Module):
        ways = {str: "a text: models.build(name) makes a network", dict: "a state: load it into a network first"}
        what = next((way for kind, way in ways.items() if isinstance(net, kind)), "not a torch.nn.Module")
        what = "the class itself: call it first" if inspect.isclass(net) else what
        raise TypeError(f"a network is needed, and {net!r:.80} is {what}")
    while (inner := _inner(net)) is not None:
        net = inner
    if isinstance(net, torch.jit.ScriptModule):
        raise UntraceableError("TorchScript modules hold no Python code to trace: pass the module it was made from")
    return net


def propagate(gm: fx.GraphModule, example: Example) -> Any:
    """Write ``meta["shape"]`` (torch.Size) and ``meta["dtype"]`` on the nodes of ``gm`` that are tensors; its output.

    ``meta["value"]`` on a node that is a size (an int, or some): what a pool over ``y.size(3)`` looks at.
    One forward pass of ``example`` on the network's device without gradients, in eval mode: no running statistic moves,
    nor the CPU's random state; modes are restored.

    Raises:
        ValueError: names the layer that does not accept its input, and that input's shape.
    """
    with eval_mode(gm), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return NodeWatcher(gm, _write_shape).run(*as_inputs(example, gm))


def device_of(net: nn.Module) -> torch.device:
    """Where the network's parameters (else its buffers) live; the CPU where it has none."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def channels_last_(net: nn.Module) -> None:
    """Lay the kernels of ``net``, and what else has four axes, out in channels-last order, in place."""
    net._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)


def has_views(net: nn.Module) -> bool:
    """Return whether ``forward`` calls ``view``, which may fail on tensors in channels-last order; traced graphs have
    reshapes in their place. Of a network that cannot be traced False.
    """
    if isinstance(net, fx.GraphModule):
        return False
    with suppress(Exception):  # of whatever forward is; a copy, for what it may keep
        return bool(fx.Tracer().trace(copy.deepcopy(unwrap(net))).find_nodes(op="call_method", target="view"))
    return False


def as_inputs(example: Example, net: nn.Module) -> tuple[Tensor, ...]:
    """Return ``example`` as the tuple of arguments of ``net.forward``, on the network's device, in plain order."""
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return tree_map_only(Tensor, lambda x: x.to(device_of(net)).contiguous(), inputs)


class NodeWatcher(fx.Interpreter):
    """Runs a graph and shows each node with its value to ``see``; errors name the layer and its input shapes.

    Nothing is changed in place: values shown stay as they are, those of an input too.
    """

    def __init__(self, gm: fx.GraphModule, see: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of node ``n`` after showing it."""
        if (source := changed_by(n, self.module)) is not None and isinstance(self.env[source], Tensor):  # type: ignore[arg-type]
            self.env[source] = self.env[source].clone()
        try:
            value = super().run_node(n)
        except Exception as error:
            shapes = [tuple(v.shape) for v in map(self.env.get, n.all_input_nodes) if isinstance(v, Tensor)]
            raise ValueError(f"layer {str(n.target)!r} does not accept its input of shape {shapes}: {error}") from error
        self.see(n, value)
        return value


def _write_shape(node: fx.Node, value: Any) -> None:
    for key in ("shape", "dtype", "value"):
        node.meta.pop(key, None)
    if isinstance(value, Tensor):
        node.meta |= {"shape": value.shape, "dtype": value.dtype}
    elif isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value)):
        node.meta["value"] = value


class _Tracer(fx.Tracer):
    """fx's tracer that looks through wrappers, keeps named leaves, and remembers in which module it failed."""

    def __init__(
        self,
        leaf_modules: LeafModules = (),
        modules: Mapping[str, nn.Module] | None = None,
        fixed: Mapping[str, Any] | None = None,
        more: Sequence[type[nn.Module]] = (),
    ) -> None:  # all optional: fx makes one without arguments where it unpickles a graph
        vision: Any = sys.modules.get("torchvision.ops")  # its own modules wrap this function, a user's do not
        super().__init__(autowrap_functions=(vision.stochastic_depth,) if vision else ())
        self._autowrap_search += [vision] if vision else []
        modules, self.fixed, self.more = modules or {}, fixed or {}, tuple(more)
        names = [leaf for leaf in leaf_modules if isinstance(leaf, str)]
        _check_known(names, modules, "module")
        self.leaves = [modules[name] for name in names]
        self.leaf_types = tuple(leaf for leaf in leaf_modules if not isinstance(leaf, str))
        self.failed_in: str | None = None

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return ``forward`` and its arguments: the fixed values, and an input node for each of the others."""
        forward, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, fx.Proxy) and (name := str(arg.node.target).lstrip("*")) in self.fixed:
                args[i] = self.fixed[name]
                self.graph.erase_node(arg.node)
        return forward, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether ``m`` stays one call: torch.nn's own, asked for, or a plain subclass of conv, linear or BN."""
        plain = isinstance(m, _ATOMS) and is_plain(m)
        theirs = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _ATOMS)
        return plain or theirs or self._asked(m) or (isinstance(m, self.more) and is_small(m))

    def _asked(self, m: nn.Module) -> bool:
        return isinstance(m, self.leaf_types) or any(m is leaf for leaf in self.leaves)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return the new node with the line of the user's code that made it in ``meta["line"]``."""
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(_HIDDEN):
            frame = frame.f_back
        if frame is not None:
            node.meta["line"] = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict) -> Any:
        """Record the call of ``m``, or of what it wraps."""
        while (inner := _inner(m)) is not None:
            m, forward = inner, inner.forward
        try:
            made = super().call_module(m, forward, args, kwargs)
            if self._asked(m) and isinstance(made, fx.Proxy):
                made.node.meta["opaque"] = True
            return made
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.path_of_module(m) if any(m is x for x in self.root.modules()) else ""
            raise


def _inner(net: nn.Module) -> nn.Module | None:
    if isinstance(net, _PARALLEL):
        return net.module
    return net.__dict__.get("_modules", {}).get("_orig_mod")  # torch.compile


def _checked(gm: fx.GraphModule) -> fx.GraphModule:
    """Return ``gm``'s layers under a copy of its graph, if that graph is whole and still has layers."""
    if any(isinstance(node.target, torch._ops.OpOverload) for node in gm.graph.nodes):
        raise UntraceableError(
            f"{type(gm).__name__} is a graph of ATen operators (torch.export makes those): its layers are gone. "
            "Pass the module it was made from"
        )
    copied = fx.Graph()
    try:
        gm.graph.lint()
        copied.output(copied.graph_copy(gm.graph, {}))
        checked = fx.GraphModule(gm, copied, class_name=type(gm).__name__)
    except Exception as error:
        raise UntraceableError(f"{type(gm).__name__} is a broken graph ({error}): pass the original module") from error
    read_after_change(checked)
    copy_modes_(gm, checked)
    return checked


def copy_modes_(net: nn.Module, gm: fx.GraphModule) -> None:
    """Put every module of ``gm``, made of ``net``'s layers, in its mode there: fx makes the folders between anew."""
    modes = {name: module.training for name, module in net.named_modules()}
    for name, module in gm.named_modules():
        module.training = modes.get(name, net.training)


def _check_known(asked: Iterable[str], known: Iterable[str], what: str) -> None:
    known = [name for name in known if name]
    for name in asked:
        if name not in known:
            raise ValueError(f"there is no {what} named {name!r}; nearest: {nearest_few(name, known)}")


def _explain(net: nn.Module, failed_in: str | None, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HIDDEN)]
    where = "".join(f"\n  at {f.filename}:{f.lineno}, in {f.name}:  {f.line}" for f in frames[-1:])
    flags = [p.name for p in inspect.signature(net.forward).parameters.values() if p.default is not p.empty]
    fix = ", ".join(f"{flag!r}: value" for flag in flags) or "'argument': value"
    leaf = repr(failed_in) if failed_in else "'name of a submodule that holds that line'"
    return (
        f"{type(net).__name__} cannot be traced: {error}{where}\n"
        f"  in module {failed_in or '(the network itself)'}. If that line depends on the data, choose:\n"
        f"  - leaf_modules=({leaf},), of trace, fold_bn and quantize, keeps that module as one call, in float;\n"
        f"  - tracing.trace(net, concrete_args={{{fix}}}) fixes arguments of forward that are flags, not tensors;\n"
        "    pass what it returns in place of the net;\n"
        "  - or rewrite the line so that it does not depend on a tensor's values."
    )
