"""A net's layer outputs on calibration images, always in evaluation mode and without gradients."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(net: nn.Module) -> Iterator[nn.Module]:
    """``net`` in evaluation mode without gradients; every module's own mode is restored on leaving."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield net
    finally:
        for module, training in modes:
            module.training = training


def record(net: nn.Module, names: Sequence[str], x: Tensor, *, batch_size: int = 256) -> dict[str, Tensor]:
    """Outputs of the named modules on ``x``, by name, concatenated over batches.

    Args:
        net:   any module; batch-norm statistics and modes are left as they were.
        names: module names as in ``net.named_modules()``; each must run once per forward pass.
        x:     (N, *in_shape), float, as the net takes it (normalised).

    Raises:
        ValueError: an unknown name (with the nearest valid one), a module that ran never or more than once, no images.
    """
    if len(x) == 0:
        raise ValueError("no images to record on: give at least one")
    modules = dict(net.named_modules())
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
            raise ValueError(f"the net has no module {name!r}; the nearest name is {near[0]!r}")
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [modules[name].register_forward_hook(_keeper(seen[name])) for name in names]
    try:
        with evaluating(net):
            batches = x.split(batch_size)
            for batch in batches:
                net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, outputs in seen.items():
        if len(outputs) != len(batches):
            runs = f"ran {len(outputs)} times in {len(batches)} batches"
            raise ValueError(f"module {name!r} {runs}: record a module that runs once per forward pass")
    return {name: torch.cat(outputs) for name, outputs in seen.items()}


def _keeper(outputs: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    """A forward hook that appends each output to ``outputs``."""

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs.append(output.detach())

    return keep
