"""Agreement of two networks that must compute the same: run both on one example and name the first layer that differs.

A graph with its network (``traced``), a changed graph with the one before (``compare``).
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._pytree import tree_leaves, tree_map_only

from hq_lib.graph.modes import changed_by, eval_mode, line_of, module_path
from hq_lib.graph.operations import op_name
from hq_lib.graph.spec import QuantizeError
from hq_lib.graph.tracing import Example, LeafModules, NodeWatcher, as_inputs, propagate, trace, unwrap

# largest error that rounding explains, as a part of the largest |y| of the layer
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
OUTPUT = "output"


class DisagreementError(RuntimeError):
    """Two networks that must agree do not; the message names the first layer where they part."""


def traced(net: nn.Module, example: Example | None, *, leaf_modules: LeafModules = ()) -> fx.GraphModule:
    """Return a copy of ``net`` as a graph that knows its shapes and computes what ``net`` does on ``example``.

    Args:
        example: an input, or tuple of inputs; None: shapes stay unknown and nothing is compared. Arguments of
                 ``forward`` that it leaves at their defaults are fixed there.
        leaf_modules: see ``tracing.trace``, and its errors.

    Raises:
        DisagreementError: names the first layer that gives another value than in ``net`` (both in eval mode), and the
                           lines that change tensors in place.
        QuantizeError:     a layer whose weight a hook computes, which a copy would lose.
    """
    net = unwrap(net)
    _refuse_weight_hooks(net)
    gm = trace(copy.deepcopy(net), leaf_modules=leaf_modules, concrete_args=_left_out(net, example))
    if example is not None:
        got = _seeded(propagate, gm, example)
        with eval_mode(net), torch.no_grad():
            want = _seeded(net, *tree_map_only(Tensor, Tensor.clone, as_inputs(example, net)))
        try:
            _compare(OUTPUT, *([t.nan_to_num() for t in _tensors(value)] for value in (got, want)))
        except (DisagreementError, ValueError) as error:
            changing = [line_of(node) for node in gm.graph.nodes if changed_by(node, gm) is not None]
            cause = (
                f"tensors change in place at {'; '.join(changing)}" if changing else "it has a state or draws numbers"
            )
            raise DisagreementError(
                f"{type(net).__name__} as a graph is another network ({error}): {cause}; make its output a function of "
                f"its input alone, out of place"
            ) from error
    return gm


def refuse_draws(gm: fx.GraphModule, example: Example) -> None:
    """Raise ``QuantizeError`` that names the first operation of ``gm`` that draws random numbers in eval mode."""
    states: list[Tensor] = []

    def look(node: fx.Node, value: Any) -> None:
        states.append(torch.get_rng_state())
        if not torch.equal(states[0], states[-1]):
            raise QuantizeError(
                f"{(module_path(node) or [('the network', '')])[-1][0]!r}, at {line_of(node)}, draws random numbers in "
                f"eval mode ({op_name(node, gm)}), which no file or executor would repeat: give a dropout "
                f"training=self.training, draw what else there is while self.training only"
            )

    _run(gm, example, look)


def _left_out(net: nn.Module, example: Example | None) -> dict[str, Any]:
    """Return the arguments of ``forward`` behind those that ``example`` gives which have a default, with it.

    Of ``*args`` and ``**kwargs`` that is nothing.
    """
    arguments = [*inspect.signature(net.forward).parameters.values()]
    n_given = len(arguments) if example is None else len(example) if isinstance(example, tuple | list) else 1
    nothing: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: (), inspect.Parameter.VAR_KEYWORD: {}}
    defaults = {arg.name: nothing.get(arg.kind, arg.default) for arg in arguments[n_given:]}
    return {name: default for name, default in defaults.items() if default is not inspect.Parameter.empty}


def _refuse_weight_hooks(net: nn.Module) -> None:
    for name, module in net.named_modules():
        for hook in module._forward_pre_hooks.values():
            which = f"layer {name!r}: a hook of {type(hook).__module__} computes its weight in every call; take it off"
            if isinstance(hook, BasePruningMethod):
                raise QuantizeError(f"{which} first: torch.nn.utils.prune.remove(layer, {hook._tensor_name!r})")
            if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
                raise QuantizeError(
                    f"{which} first (remove_weight_norm, remove_spectral_norm), or use torch.nn.utils.parametrizations"
                )


def _seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return function(*args, **kwargs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def compare(original: fx.GraphModule, changed: fx.GraphModule, example: Example, same_value: Mapping[str, str]) -> None:
    """Run both graphs and raise where a named layer of ``changed``, or its output, is not as in ``original``.

    Both run on the CPU (a copy, if they are elsewhere), where float32 is float32 (no TF32), in eval mode and from one
    random seed.

    Args:
        same_value: for each layer of ``changed`` to look at, by name, the node of ``original`` with the value it must
                    have.
        example:    an input, or tuple of inputs.

    Raises:
        DisagreementError: names the first layer that differs by more than ``TOLERANCE`` of its largest output, or
                           whose value in ``original`` is not finite.
    """
    wanted: dict[str, list[Tensor]] = {}
    _run(original, example, lambda node, value: wanted.update({node.name: _tensors(value)}))

    def check(node: fx.Node, value: Any) -> None:
        if node.op == OUTPUT or (node.op == "call_module" and node.target in same_value):
            _compare(str(node.target), _tensors(value), wanted[same_value.get(str(node.target), OUTPUT)])

    _run(changed, example, check)


def _run(gm: fx.GraphModule, example: Example, see: Any) -> None:
    if any(tensor.device.type != "cpu" for tensor in gm.state_dict().values()):
        gm = copy.deepcopy(gm).cpu()
    with torch.no_grad(), eval_mode(gm):
        _seeded(NodeWatcher(gm, see).run, *as_inputs(example, gm))


def _compare(layer: str, got: list[Tensor], want: list[Tensor]) -> None:
    """Raise where two lists of tensors differ by more than rounding."""
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise DisagreementError(f"{layer!r} has shape {tuple(a.shape)}, not {tuple(b.shape)} as in the original")
        if not b.isfinite().all():
            raise DisagreementError(f"{layer!r} is not finite on this example in the original network already")
        max_abs, top = ((a.double() - b.double()).abs().max().item(), b.abs().max().item()) if b.numel() else (0.0, 0.0)
        rel = max_abs / top if top else (float("inf") if max_abs else 0.0)
        if not rel <= TOLERANCE.get(b.dtype, 0.0):  # also where it is NaN
            raise DisagreementError(
                f"the changed network differs from the original, first at {layer!r}: max|error| = {max_abs:.3g}, "
                f"{rel:.3g} of the largest value; rounding of {b.dtype} explains {TOLERANCE.get(b.dtype, 0.0):g}"
            )
