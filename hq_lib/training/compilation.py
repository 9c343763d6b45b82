"""``torch.compile`` where a compiler is at hand, the plain network where not."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiled(net: nn.Module, say: Callable[[str], None]) -> Callable[[Tensor], Tensor]:
    """``net`` as a function that runs compiled, and from the first failure to compile on runs the network op by op.

    An error of the network itself comes from the plain network then, as it would without compilation.

    Args:
        net: any network; its weights are used, not copied.
        say: told once, with the reason, where compilation is not to be had.
    """
    state: dict[str, Any] = {"forward": torch.compile(net)}

    def forward(x: Tensor) -> Tensor:
        if state["forward"] is net:
            return net(x)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own deprecations are not the user's concern
                return state["forward"](x)
        except Exception as error:  # no C++ compiler, no headers, unsupported device: all mean "not here"
            state["forward"] = net
            reason = (str(error).splitlines() or [""])[0]
            say(f"torch.compile is not to be had here ({type(error).__name__}: {reason[:120]}); training without it")
            return net(x)

    return forward
