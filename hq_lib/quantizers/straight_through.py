"""The one differentiable staircase under every straight-through quantizer, with closed-form gradients, and its kernels.

    x_hat = delta * snap(clip(x / delta, low, high)),    low = qmin - zero, high = qmax - zero, in steps of ``delta``

It saves the input only (usually the ReLU's output, which autograd holds anyway) and recomputes masks in the backward
pass: two streams in, one out, and the parameter gradients as sums of the same pass.

Its elementwise kernels are fused by ``torch.compile`` where a compiler is at hand and run op by op where not. A
quantizer on activations is memory bound: run op by op it reads and writes the tensor six times, fused once. Only large
tensors are worth a compiled call; what a user trains with ``torch.compile`` as a whole net is inlined instead.
"""

import os
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hq_lib.quantizers.affine import snap

MIN_NUMEL = 2**17
"""Elements from which a compiled kernel is used; below, Python's and dynamo's overhead eat the gain."""

AS_EAGER: dict[str, Any] = {"eager_numerics.division_rounding": True}
"""Options of the compiler: on a GPU its division is else approximate, and values half-way between two steps part."""

_state: dict[str, Any] = {"on": os.environ.get("HQ_FUSE", "1") != "0", "failure": None, "said": False}
"""Whether kernels are fused (environment variable HQ_FUSE=0: not), why none can be, whether lack of memory was said."""


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
    return (x.permute(0, 2, 3, 1) if _channels_last(like) else x).reshape(-1)


def unflat(values: Tensor, like: Tensor) -> Tensor:
    """Return 1-D ``values`` from ``flat`` in the shape and memory order of ``like``."""
    if _channels_last(like):
        n, c, h, w = like.shape
        return values.view(n, h, w, c).permute(0, 3, 1, 2)
    return values.view(like.shape)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class Slope(Enum):
    """What the backward pass gives to the input and to ``delta``; a member per published rule."""

    ROUND = "round first: dx = 1 where the rounded value was not clipped; delta is a constant"
    CLIP = "clip first: dx = 1 where low <= x / delta < high; delta is a constant"
    PACT = "dx as CLIP; d delta = low or high where clipped, nothing inside (PACT's straight-through)"
    LSQ = "dx as CLIP; d delta = low or high where clipped, round(v) - v inside (LSQ, eq. 3)"
    LSQ_PLUS = "as LSQ, and the zero gets -delta where clipped (LSQ+, eq. 5)"


def _offset(low: Tensor, odd: bool) -> Tensor | float:
    return low - torch.floor(low) if odd else 0.0


def _forward(x: Tensor, delta: Tensor, low: Tensor, high: Tensor, odd: bool) -> Tensor:
    clipped = torch.clamp(x / delta, low, high)
    return delta * (snap(clipped, _offset(low, odd)) if odd else torch.round(clipped))


def sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` summed to the shape of ``like``: the gradient of what was broadcast."""
    return values.sum() if like.ndim == 0 else values.sum_to_size(like.shape)


def _mask_backward(
    grad: Tensor, x: Tensor, delta: Tensor, low: Tensor, high: Tensor, odd: bool, rounded: bool
) -> Tensor:
    v = x / delta
    if rounded:
        v = snap(v, _offset(low, odd))
        return torch.where((v >= low) & (v <= high), grad, 0.0)
    return torch.where((v >= low) & (v < high), grad, 0.0)


def _clip_backward(grad: Tensor, x: Tensor, delta: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    v = x / delta
    below, above = v < low, v >= high
    grad_delta = sum_to(grad * torch.where(below, low, torch.where(above, high, 0.0)), delta)
    return torch.where((v >= low) & (v < high), grad, 0.0), grad_delta


def _step_backward(
    grad: Tensor, x: Tensor, delta: Tensor, low: Tensor, high: Tensor, odd: bool
) -> tuple[Tensor, Tensor, Tensor]:
    v = x / delta
    inside = (v >= low) & (v < high)
    level = snap(torch.clamp(v, low, high), _offset(low, odd))
    grad_x = torch.where(inside, grad, 0.0)
    grad_delta = sum_to(grad * (level - torch.where(inside, v, 0.0)), delta)
    return grad_x, grad_delta, -delta * sum_to(grad - grad_x, delta)


forward_kernel = Fused(_forward, n_elementwise=1, apart=False)
mask_kernel = Fused(_mask_backward, n_elementwise=2, apart=True)
clip_kernel = Fused(_clip_backward, n_elementwise=2, apart=True)
step_kernel = Fused(_step_backward, n_elementwise=2, apart=True)


class _Staircase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, zero: Tensor, ends: Tensor, odd: bool, slope: Slope) -> Tensor:
        low, high = ends[0] - zero, ends[1] - zero
        ctx.save_for_backward(x, delta, low, high)
        ctx.odd, ctx.slope = odd, slope
        return forward_kernel(x, delta, low, high, odd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, low, high = ctx.saved_tensors
        if ctx.slope in (Slope.ROUND, Slope.CLIP):
            grad_x = mask_kernel(grad, x, delta, low, high, ctx.odd, ctx.slope is Slope.ROUND)
            return grad_x, None, None, None, None, None
        if ctx.slope is Slope.PACT:
            return *clip_kernel(grad, x, delta, low, high), None, None, None, None
        grad_x, grad_delta, grad_zero = step_kernel(grad, x, delta, low, high, ctx.odd)
        return grad_x, grad_delta, grad_zero if ctx.slope is Slope.LSQ_PLUS else None, None, None, None


def staircase(x: Tensor, delta: Tensor, zero: Tensor, ends: Tensor, *, odd: bool = False, slope: Slope) -> Tensor:
    """Snap ``x`` to the levels ``delta * (k - zero)``, k = ends[0] ... ends[1], and return it in real units.

    Args:
        x: (*shape), real units, float32 or float64.
        delta: real units between neighbouring levels, > 0, ``()`` or broadcastable to ``x``.
        zero: position of real 0 in steps, of ``delta``'s shape or ``()``; integer, or half-integer with ``odd``.
        ends: (2,), the first and the last k, integers (or, with ``odd``, half-integers).
        odd: True where ``ends - zero`` may be no integers, that is real 0 is no level.
        slope: which gradient the backward pass gives (see Slope).

    Returns:
        (*shape), ``x``'s dtype and memory order. NaN stays NaN and passes no gradient; +-Inf is clipped.
    """
    return _Staircase.apply(x, delta, zero, ends, odd, slope)
