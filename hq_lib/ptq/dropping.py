"""Element-wise dropping of quantization (QDrop, Wei et al. 2022, arXiv:2203.05740, eq. 6 and its code)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hq_lib.graph import act_quantizers

_LANES = 4  # 16-bit numbers in one int64 draw


def keep_mask(like: Tensor, keep_probability: float, generator: torch.Generator) -> Tensor:
    """Return bool of ``like``'s shape: True, element by element, with ``keep_probability`` (to 2^-16).

    One 64-bit draw serves four elements.
    """
    n = like.numel()
    draws = torch.empty(-(-n // _LANES), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)  # type: ignore[call-overload]
    lanes = draws.view(torch.int16)[:n].view(like.shape)
    return lanes < round(keep_probability * 2**16) - 2**15 if keep_probability < 1 else torch.ones_like(lanes).bool()


def drop(x_hat: Tensor, x: Tensor, keep_probability: float, generator: torch.Generator) -> Tensor:
    """Return ``x_hat`` where a fresh mask keeps it and ``x`` elsewhere; exactly one of them at probabilities 1 and 0.

    Gradient: that of ``x_hat`` where kept, the identity to ``x`` elsewhere (the step gets none from there).
    """
    if keep_probability in (0, 1):
        return x_hat if keep_probability == 1 else x
    kept = keep_mask(x, keep_probability, generator).to(x.dtype)
    return torch.lerp(x, x_hat, kept)  # exact at weights 0 and 1; ``where`` is many times slower on random masks


@contextmanager
def dropping(net: nn.Module, keep_probability: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, each activation quantizer of ``net`` keeps its result element by element with ``keep_probability``."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return drop(output, args[0], keep_probability, generator)

    with ExitStack() as hooks:
        for quantizer in act_quantizers(net).values() if keep_probability < 1 else ():
            hooks.enter_context(quantizer.register_forward_hook(hook))
        yield
