"""Convolutions on engines: integer images in, integer accumulators out, every product done by an engine.

    acc[b, n, y, x] = sum_k w[n, k] (patch[b, y, x, k] - z)  =  engine(patch) - z sum_k w[n, k]

Padding is done with the zero point z, so padded places contribute nothing; the z term is exact and digital. Rows of a
matrix are ordered (channel, kernel row, kernel column), as ``weight.flatten(1)``.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar.checks import CrossbarError, Numbers, as_tensor, check_range
from hq_lib.crossbar.engine import Answers, Engine
from hq_lib.crossbar.operands import Operand, Stencil


class Convolution:
    """A convolution or linear layer of any geometry on any engine: one loaded matrix per group.

    The simulator multiplies patches without unfolding them; benches and recorders write rows out, 64 MiB at a time.

    Args:
        engine: does the multiplications.
        w_int: (N, C / groups, kh, kw) integers, or (N, C) of a linear layer.
        w_scale, bits: w_bits, x_bits and x_signed too, as of `Engine.load`.
        name: what it is loaded as; groups become matrices of their own, ``name[g]`` (each its own small array).
        padding: one number, (rows, columns) or (top, left, bottom, right), filled with ``x_zero_point``.

    Errors: padding with a zero point outside the declared input range, a geometry that does not fit; and whatever the
    engine refuses.
    """

    def __init__(
        self,
        engine: Engine,
        w_int: Numbers,
        w_scale: object,
        name: str,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        x_zero_point: int = 0,
        **bits: Any,
    ) -> None:
        weight = as_tensor(w_int)
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        if weight.ndim != 4 or groups < 1 or len(weight) % groups:
            raise CrossbarError(f"{name}: weights {tuple(weight.shape)} cannot be a convolution of {groups} groups")
        w_scale = w_scale.detach().cpu() if isinstance(w_scale, Tensor) else w_scale
        scales = np.split(np.broadcast_to(np.asarray(w_scale, np.float64), (len(weight),)), groups)
        self.engine, self.name, self.shape, self.x_zero_point = engine, name, tuple(weight.shape), int(x_zero_point)
        self.groups = tuple(
            engine.load(part.flatten(1).T, scale, f"{name}[{g}]" if groups > 1 else name, **bits)
            for g, (part, scale) in enumerate(zip(weight.chunk(groups), scales, strict=True))
        )
        sides = _numbers(padding, 0, "padding")
        if any(sides):
            check_range(torch.tensor([x_zero_point]), *self.groups[0].x_range, f"zero point of {name}")
        (top, left, bottom, right), kernel = sides, (weight.shape[2], weight.shape[3])
        window = Stencil(kernel, _numbers(stride, 1, "stride")[:2], (0, 0), _numbers(dilation, 1, "dilation")[:2])
        if x_zero_point == 0 and (top, left) == (bottom, right):
            window, sides = replace(window, padding=(top, left)), (0, 0, 0, 0)
        self._window, self._sides = window, sides  # of the window the padding with zeros, before it that of any other
        self.weight_sum = weight.flatten(1).sum(1, dtype=torch.int64).to(torch.float64)

    def __call__(self, x: Answers) -> Answers:
        """float64 (B, N, H', W') accumulators of integer images ``x`` (B, C, H, W); (B, N) of rows ``x`` (B, C)."""
        parts = self._patches(x)
        y = self._grouped(parts)
        if y is None:
            done = [self.engine.mvm(group, part) for group, part in zip(self.groups, parts, strict=True)]
            y = done[0] if len(done) == 1 else torch.cat(done, 1)
        if self.x_zero_point:
            y -= self.x_zero_point * self.weight_sum
        y = y if x.ndim == 2 else y.view(len(x), *parts[0].size, -1).permute(0, 3, 1, 2)
        return y.numpy() if isinstance(x, np.ndarray) else y.to(x.device)  # type: ignore[return-value]

    def rows(self, x: Numbers) -> list[Tensor]:
        """One (B H' W', K) integer tensor per group: the rows that are multiplied, for calibration."""
        return [part.rows() for part in self._patches(x)]

    def measure(self, x: Numbers) -> list[Tensor]:
        """One (B H' W', N / groups) float64 tensor per group: what the engine reads, uncorrected, zero point's share
        included."""
        return [self.engine.measure(group, part) for group, part in zip(self.groups, self._patches(x), strict=True)]

    def _grouped(self, parts: list[Operand]) -> Tensor | None:
        """float64 (rows, N) of all groups by one grouped convolution where the engine is linear, else None."""
        if len(parts) == 1:
            return None
        weights = [w for w in map(self.engine.effective_weight, self.groups) if w is not None]
        if len(weights) < len(parts) or any(w.dtype is not torch.float32 for w in weights):
            return None
        kernel = torch.cat([w.T for w in weights]).view(self.shape)
        images = torch.cat([part.values for part in parts], 1)
        check_range(images, *self.groups[0].x_range, f"inputs of {self.name}")
        y = self._window.convolved(images.float(), kernel, len(parts))
        raw = y.permute(0, 2, 3, 1).flatten(0, 2).chunk(len(parts), 1)
        done = torch.empty(raw[0].shape[0], self.shape[0], dtype=torch.float64)
        for group, part, r, out in zip(self.groups, parts, raw, done.chunk(len(parts), 1), strict=True):
            self.engine.finish(group, self.engine.add_noise_(group, part, r.contiguous()), out)
        return done

    def _patches(self, x: Numbers) -> list[Operand]:
        """Per group, the images (rows are images of one place) as patches; padded here unless the zero point is 0."""
        images = as_tensor(x)
        images = images[:, :, None, None] if images.ndim == 2 else images
        n_channels = self.shape[1] * len(self.groups)
        if images.dtype.is_floating_point or images.ndim != 4 or images.shape[1] != n_channels:
            wanted = f"{self.name}: wants integers (B, {n_channels}, H, W)"
            raise CrossbarError(f"{wanted}, not {images.dtype} {tuple(images.shape)}")
        top, left, bottom, right = self._sides
        if any(self._sides):
            images = functional.pad(images, (left, right, top, bottom), value=self.x_zero_point)
        if min(self._window.out_size(*images.shape[2:])) < 1:
            raise CrossbarError(f"{self.name}: the kernel is larger than the padded image {tuple(images.shape[2:])}")
        return [Operand(part, self._window) for part in images.chunk(len(self.groups), 1)]


def _numbers(value: int | tuple[int, ...], least: int, what: str) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of one, two or four numbers."""
    given = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(given) not in (1, 2, 4):
        raise CrossbarError(f"{what} = {value} must be one, two or four numbers")
    if min(given) < least:
        raise CrossbarError(f"{what} = {value} must be {least} or more")
    top, left, bottom, right = given * (4 // len(given))
    return top, left, bottom, right
