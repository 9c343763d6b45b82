"""What every quantizer module owes: a forward pass on a grid it can name, integers on that grid, and a first fit.

The promise, tested for each method in float32: after ``x_hat = q(x)``, with ``grid = q.grid()``,
``x_hat == grid.scale * (q.to_int(x) - grid.zero_point)`` to the last bit.
"""

import math
import warnings
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from hq_lib.quantizers.affine import (
    FINEST_SCALE,
    MIN_SCALE,
    Grid,
    check_bits,
    check_finite,
    next_power_of_two,
    quantize_to_int,
)
from hq_lib.quantizers.straight_through import Slope, staircase
from hq_lib.results.hints import check_known

Role = Literal["weight", "act"]
LOW_PRECISION = (torch.float16, torch.bfloat16)


class Tag(NamedTuple):
    """How an optimiser should treat one learned quantizer parameter (see ``training.config.parameter_groups``)."""

    lr_factor: float
    """Learning rate relative to the weights'."""
    decay: bool
    """Whether the weights' decay applies too."""


class Quantizer(nn.Module):
    """Abstract: a differentiable map of real tensors onto a grid. Subclasses name the method.

    A weight quantizer fits itself on its first use. An activation quantizer fits itself on its first *training* batch
    and raises RuntimeError when it is evaluated before that; so does one of several tensors, which would be fitted to
    the first of them. NaN and Inf raise ValueError in every fit; later, forward
    propagates NaN and clips Inf (a grid that follows its tensor becomes NaN or Inf with it). The state dict remembers
    the fit and refuses another kind of quantizer, other bits or another sign.
    """

    method: ClassVar[str] = ""
    """Name of the method, as in ``weight_quantizer`` and ``act_quantizer``."""
    tags: ClassVar[dict[str, Tag]] = {}
    """Parameter name to optimiser treatment; every learned parameter has one."""
    slope: ClassVar[Slope] = Slope.ROUND
    """What its backward pass gives."""
    initialised: Tensor
    ends: Tensor  # (2,), qmin / step and qmax / step
    spec: Tensor  # what it is, as text: two kinds may share all their other keys

    def __init__(self, bits: int, *, signed: bool, axis: int | None, role: Role) -> None:
        """Remember ``bits`` (1 to 16), ``signed`` (the data has negative values), ``axis`` (None per tensor, else the
        channel axis) and ``role``. Raises ValueError for other bits, naming the method."""
        super().__init__()
        check_known(role, get_args(Role), "role")
        self.bits, self.signed, self.axis, self.role = check_bits(self.method, bits), signed, axis, role
        self.binary = signed and bits == 1
        """Whether its levels are -s and +s alone."""
        self.enabled = True
        """False makes forward the identity (for calibration); to_int and grid still answer."""
        self.owner = ""
        """The layer or activation it belongs to, for messages; ``graph.quantize`` sets it."""
        self.places = 1
        """Tensors that it quantizes in each pass, as those of a concatenation do; ``graph.quantize`` sets it."""
        self._ready = False
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("spec", as_bytes(f"{type(self).__name__} of {bits} bits, signed={signed}"))

    def use_integers(self, qmin: int, qmax: int, step: int) -> None:
        """Run the grid on the integers qmin, qmin + step, ..., qmax."""
        self.qmin, self.qmax, self.step = qmin, qmax, step
        self.register_buffer("ends", torch.tensor((qmin / step, qmax / step)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid: (*shape), real units, ``x``'s dtype; the gradient is the method's own.

        float16 and bfloat16 are quantized in float32, as ``to_int`` does, and the result rounded to ``x``'s dtype.
        """
        if not self.enabled:
            return x
        self.make_ready(x)
        return self._quantize(x.float()).to(x.dtype) if x.dtype in LOW_PRECISION else self._quantize(x)

    def to_int(self, x: Tensor) -> Tensor:
        """Return the int32 integers of ``x`` (*shape), the *real* tensor that forward takes (a weight before tanh).

        Raises ValueError for NaN. Where the grid follows the data (a weight's maximum), ``grid()`` is the grid of the
        tensor that came last, here or in forward.
        """
        self.make_ready(x)
        return self._to_int(x.detach().float() if x.dtype in LOW_PRECISION else x.detach())

    def integers(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Return ``(to_int(x), grid())``, certain to belong together."""
        x_int = self.to_int(x)
        return x_int, self.grid()

    def grid(self) -> Grid:
        """Return the exact grid, detached. Raises RuntimeError before the first fit."""
        if not (self._ready or bool(self.initialised)):
            raise RuntimeError(f"{self}: no grid yet; call graph.calibrate(qnet, images) or init_from(tensor) first")
        with torch.no_grad():
            grid = self._grid()
        return grid._replace(scale=grid.scale.detach().clone(), zero_point=grid.zero_point.detach().clone())

    def init_from(self, x: Tensor) -> None:
        """Fit the grid to ``x`` (*shape, real units), forgetting any earlier fit.

        Raises ValueError if ``x`` is empty or holds NaN or Inf; warns where it is too small for its levels.
        """
        check_finite(x, str(self))
        with torch.no_grad():
            self._fit(x.detach().float())
        self.mark_fitted()
        self.warn_if_held(x)

    def warn_if_held(self, x: Tensor) -> None:
        """Warn where ``x``, to which the grid was fitted, is too small for its levels."""
        scale = self.grid().scale.max()
        finest = scale.new_tensor(FINEST_SCALE)
        finest = next_power_of_two(finest) if getattr(self, "power_of_two", False) else finest
        if bool(((scale == scale.new_tensor(MIN_SCALE)) | (scale <= finest)) & x.any()):
            warnings.warn(
                f"{self}: of a tensor up to {x.abs().max().item():.3g} a step of {scale.item():.3g} is the finest that "
                f"it can have: few levels are left; scale the tensor up",
                stacklevel=3,
            )

    def mark_fitted(self) -> None:
        """Take the grid as it is for the fitted one: what follows setting it from outside."""
        self.initialised.fill_(True)
        self._ready = True

    def make_ready(self, x: Tensor) -> None:
        """Fit to ``x`` on the first use only; RuntimeError for an activation in eval mode."""
        if not self._ready:
            _first_fit(self, x)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move grids with the network, but never to float16 or bfloat16: a step of 1e-8 would be 0 there."""

        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if new.dtype in LOW_PRECISION else new

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Return bits, sign, axis and role for ``print``, and the owner where it is known."""
        text = f"{self.bits} bit, signed={self.signed}, axis={self.axis}, role={self.role}"
        return f"{text}, of {self.owner!r}" if self.owner else text

    def gradient_factor(self, x: Tensor, n_steps: int) -> float:
        """Return g = 1 / sqrt(n n_steps), n the elements of ``x`` that share a grid, without the batch for activations.

        LSQ's (Esser et al. 2020, section 2.2): with it one learning rate serves all layers.
        """
        n = x.numel() if self.axis is None else x.numel() // x.shape[self.axis]
        if self.role == "act" and x.ndim > 1 and self.axis != 0:
            n = max(1, n // x.shape[0])
        return 1.0 / math.sqrt(n * n_steps)

    def _quantize(self, x: Tensor) -> Tensor:
        return self._snap(x, *self._scale_and_zero())

    def _snap(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        delta, zero = scale * self.step, zero_point / self.step
        return staircase(x, delta, zero, self.ends, odd=self.step == 2, slope=self.slope)

    def _to_int(self, x: Tensor) -> Tensor:
        return quantize_to_int(x, self._grid())

    def _grid(self) -> Grid:
        return Grid(*self._scale_and_zero(), self.qmin, self.qmax, self.step)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _fit(self, x: Tensor) -> None:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        theirs = state_dict.get(prefix + "spec")
        if theirs is not None and theirs.tolist() != self.spec.tolist():
            said = bytes(theirs.tolist()).decode() if theirs.dtype == torch.uint8 else "quantizer of an older version"
            raise ValueError(
                f"{prefix}: the state holds a {said}, this one is a {bytes(self.spec.tolist()).decode()}: their equal "
                f"keys mean other things. Make the net as the saved one was made, or use graph.save and graph.load"
            )
        for name, own in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape and own.ndim == 0:
                own.data = own.data.new_empty(saved.shape)  # a per-channel grid that was not fitted here yet
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.initialised)


def parameter_tags(net: nn.Module) -> dict[str, Tag]:
    """Return by full name (``layer.act.alpha``) how an optimiser should treat each learned quantizer parameter."""
    return {
        f"{path}.{name}" if path else name: module.tags[name]
        for path, module in net.named_modules()
        if isinstance(module, Quantizer)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


@_disable_dynamo  # torch.compiler.disable, but that it imports the compiler (seconds) only where something is compiled
def _first_fit(quantizer: Quantizer, x: Tensor) -> None:
    if bool(quantizer.initialised):  # a copy whose state was filled tensor by tensor, as a moving average's is
        quantizer.mark_fitted()
        return
    if quantizer.role == "act" and not quantizer.training:
        raise RuntimeError(
            f"{quantizer} was never fitted: call graph.calibrate(qnet, images), run one batch in training mode, or "
            f"call init_from(batch), before evaluating"
        )
    if quantizer.places > 1:
        raise RuntimeError(
            f"{quantizer} quantizes {quantizer.places} tensors on one grid, which the first of them would decide: call "
            f"graph.calibrate(qnet, images) before training"
        )
    quantizer.init_from(x)


def as_bytes(text: str) -> Tensor:
    """Return ``text`` as UTF-8 in a uint8 tensor, which every state dict and file format can hold."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def positive(value: Tensor, *, floor: float) -> Tensor:
    """Return ``max(|value|, floor)``: a learned size that crosses 0 is reflected, gradient included."""
    return value.abs().clamp(min=floor)


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """Return finite ``value`` unchanged to the last bit; its gradient is multiplied by ``factor``."""
    return value.detach() + factor * (value - value.detach())
