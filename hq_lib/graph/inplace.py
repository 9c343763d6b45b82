"""Operations that change a tensor where it lies: what is read after them must be read from them.

``F.relu_(y)``, ``y += z`` and ``nn.ReLU(inplace=True)`` change ``y`` itself. In a graph that is rewritten, where a
quantizer or a copy comes between, a later reader of ``y`` would see the value before the change.
"""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import fx

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
