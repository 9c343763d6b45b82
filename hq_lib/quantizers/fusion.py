"""Elementwise kernels, fused by ``torch.compile`` where a compiler is at hand and run op by op where not.

A quantizer on activations is memory bound: run op by op it reads and writes the tensor six times, fused once. Only
large tensors are worth a compiled call; what a user trains with ``torch.compile`` as a whole net is inlined instead.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_NUMEL = 2**17
"""Elements from which a compiled kernel is used; below, Python's and dynamo's overhead eat the gain."""

AS_EAGER: dict[str, Any] = {"eager_numerics.division_rounding": True}
"""Options of the compiler: on a GPU its division is else approximate, and values half-way between two steps part."""

_state: dict[str, Any] = {"on": os.environ.get("HQ_FUSE", "1") != "0", "failure": None, "said": False}


def enable_fusion_(on: bool = True) -> None:
    """Switch fused kernels on or off for this process (environment variable HQ_FUSE=0 starts with them off)."""
    _state.update(on=on, failure=None, said=False)


def fusion_status() -> str:
    """Return "on", "off", or "unavailable: <why>" after a compilation failed and the plain kernels took over."""
    if _state["failure"] is not None:
        return f"unavailable: {_state['failure']}"
    return "on" if _state["on"] else "off"


class Fused:
    """A pure tensor function, fused by the compiler on large tensors; falls back to plain PyTorch without one.

    Where memory runs out inside, that call alone is run plainly, and the first such call says so.

    Inside a net that is compiled as a whole it is traced into the caller's graph, except that on a CPU a kernel marked
    ``apart`` stays an operator of its own. Backward kernels do: fused with batch norm's sums, masks are recomputed for
    each of them, and a ResNet-20 step takes 1.4 to 1.8 times the float net's instead of about 1.
    """

    def __init__(self, kernel: Callable[..., Any], *, n_elementwise: int, apart: bool) -> None:
        """Wrap ``kernel``: no side effects (it may run twice), its first ``n_elementwise`` arguments of one shape.

        The next argument is the step: only if that is a scalar is the call fused, on flattened tensors. The first
        (or only) result has the shape of the elementwise arguments. ``apart``: see the class.
        """
        self.kernel, self.n_elementwise, self.apart = kernel, n_elementwise, apart
        self._compiled: Callable[..., Any] | None = None
        name = f"hq_lib::{kernel.__module__.rsplit('.', 1)[-1]}{kernel.__name__}"
        schema = torch.library.infer_schema(kernel, mutates_args=())
        self.operator = torch.library.custom_op(name, self._run, mutates_args=(), schema=schema)
        self.operator.register_fake(kernel)

    def __call__(self, *args: Any) -> Any:
        """Return ``kernel(*args)``, from one fused kernel where that pays and can be built."""
        x, step = args[0], args[self.n_elementwise]
        usable = _state["on"] and _state["failure"] is None
        if not usable or step.ndim > 0 or x.numel() < MIN_NUMEL:
            return self.kernel(*args)
        if torch.compiler.is_compiling():
            return self.operator(*args) if self.apart and x.device.type == "cpu" else self.kernel(*args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        elementwise, rest = args[: self.n_elementwise], args[self.n_elementwise :]
        like = elementwise[-1]
        result = self._call(*(flat(x, like) for x in elementwise), *rest)
        if isinstance(result, Tensor):
            return unflat(result, like)
        return unflat(result[0], like), *result[1:]

    def _call(self, *args: Any) -> Any:
        if _state["failure"] is not None:
            return self.kernel(*args)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.kernel, dynamic=True, fullgraph=True, options=AS_EAGER)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own deprecations are not the user's concern
                return self._compiled(*args)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if not _state["said"]:
                _state["said"] = True
                warnings.warn(f"a fused kernel ran out of memory ({error}); such calls run op by op", stacklevel=2)
            return self.kernel(*args)
        except Exception as error:  # no C++ compiler, no headers, unsupported device: all mean "not here"
            _state["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return self.kernel(*args)


def flat(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` as 1-D in the memory order of ``like`` (same shape): a view if that is dense and ``x``'s own."""
    order = like
    if x.ndim == 4 and not order.is_contiguous() and order.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)


def unflat(values: Tensor, like: Tensor) -> Tensor:
    """Return 1-D ``values`` from ``flat`` in the shape and memory order of ``like``."""
    if like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return values.view(n, h, w, c).permute(0, 3, 1, 2)
    return values.view(like.shape)
