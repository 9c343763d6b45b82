"""Elementwise kernels, fused by ``torch.compile`` where a compiler is at hand and run op by op where not.

A quantizer on activations is memory bound: run op by op it reads and writes the tensor six times, fused once. Only
large tensors are worth a compiled call; what a user trains with ``torch.compile`` as a whole net is inlined instead.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_NUMEL = 2**17
"""Elements from which a compiled kernel is used; below, Python's and dynamo's overhead eat the gain."""

_state: dict[str, Any] = {"on": os.environ.get("HQ_FUSE", "1") != "0", "failure": None}


def enable_fusion_(on: bool = True) -> None:
    """Switch fused kernels on or off for this process (environment variable HQ_FUSE=0 starts with them off)."""
    _state.update(on=on, failure=None)


def fusion_status() -> str:
    """Return "on", "off", or "unavailable: <why>" after a compilation failed and the plain kernels took over."""
    if _state["failure"] is not None:
        return f"unavailable: {_state['failure']}"
    return "on" if _state["on"] else "off"


def worth_fusing(x: Tensor) -> bool:
    """Return whether ``x`` is large enough, and the moment right, for a compiled kernel."""
    return (not torch.compiler.is_compiling() and x.numel() >= MIN_NUMEL
            and _state["on"] and _state["failure"] is None)


class Fused:
    """A pure tensor function that runs compiled on request and falls back, once and silently, to plain PyTorch."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        """Wrap ``kernel``: tensors in, tensors out, no side effects (it may be run twice if its compilation fails)."""
        self.kernel = kernel
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Return ``kernel(*args)``, op by op; inside ``torch.compile`` it is traced into the caller's graph."""
        return self.kernel(*args)

    def compiled(self, *args: Any) -> Any:
        """Return ``kernel(*args)`` from one fused kernel; where that cannot be built, op by op."""
        if _state["failure"] is not None:
            return self.kernel(*args)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.kernel, dynamic=True, fullgraph=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own deprecations are not the user's concern
                return self._compiled(*args)
        except Exception as error:  # no C++ compiler, no headers, unsupported device: all mean "not here"
            _state["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return self.kernel(*args)


def flat(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``x`` as 1-D in memory order (a view if it is dense), in the memory order of ``like`` if that is given."""
    order = x if like is None else like
    if x.ndim == 4 and not order.is_contiguous() and order.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)


def unflat(values: Tensor, like: Tensor) -> Tensor:
    """Return 1-D ``values`` from ``flat`` in the shape and memory order of ``like``."""
    if like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return values.view(n, h, w, c).permute(0, 3, 1, 2)
    return values.view(like.shape)
