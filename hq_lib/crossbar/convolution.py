"""Convolutions on engines: integer images in, integer accumulators out, every product done by an engine.

    acc[b, n, y, x] = sum_k w[n, k] (patch[b, y, x, k] - z)  =  engine(patch) - z sum_k w[n, k]

Padding is done with the zero point z, so padded places contribute nothing; the z term is exact and digital. Rows of a
matrix are ordered (channel, kernel row, kernel column), as ``weight.flatten(1)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar.checks import CrossbarError, as_tensor, check_range
from hq_lib.crossbar.engine import Engine, Handle
from hq_lib.crossbar.operands import Patches, Stencil


@dataclass(frozen=True, eq=False)
class ConvHandle:
    """A convolution (or linear layer) loaded into an engine: one matrix per group, and its geometry."""

    name: str
    """Layer name."""
    groups: tuple[Handle, ...]
    """One engine handle per group, in channel order."""
    shape: tuple[int, int, int, int]
    """(N, C / groups, kernel height, kernel width)."""
    window: Stencil
    """Kernel, stride and dilation; its padding is that of a zero point 0 with equal sides."""
    padding: tuple[int, int, int, int]
    """(top, left, bottom, right) places to fill with the zero point first."""
    x_zero_point: int
    """Integer that stands for real 0 in the inputs."""
    weight_sum: Tensor
    """float64 (N,), sum of each output's weights."""


class ConvEngine:
    """Convolutions and linear layers of any geometry on any engine.

    Args:
        engine: does the multiplications. The simulator multiplies patches without unfolding them; a bench or a
            recorder writes the rows out, 64 MiB at a time.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def load(
        self,
        w_int: np.ndarray | Tensor,
        w_scale: object,
        name: str,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        x_zero_point: int = 0,
        w_bits: int = 8,
        x_bits: int = 8,
        x_signed: bool = False,
    ) -> ConvHandle:
        """The handle of ``w_int`` (N, C / groups, kh, kw), or (N, C) for a linear layer, loaded as ``name``.

        ``padding`` is one number, (rows, columns) or (top, left, bottom, right). Groups become matrices of their own,
        ``name[g]`` (each its own small array). Errors: padding with a zero point outside the declared input range, a
        geometry that does not fit; and whatever the engine refuses.
        """
        weight = as_tensor(w_int)
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        if weight.ndim != 4 or groups < 1 or weight.shape[0] % groups:
            raise CrossbarError(f"{name}: weights {tuple(weight.shape)} cannot be a convolution of {groups} groups")
        scale = np.broadcast_to(np.asarray(w_scale, np.float64), (weight.shape[0],))
        n = weight.shape[0] // groups
        handles = tuple(
            self.engine.load(
                weight[g * n : (g + 1) * n].flatten(1).T,
                scale[g * n : (g + 1) * n],
                f"{name}[{g}]" if groups > 1 else name,
                w_bits=w_bits,
                x_bits=x_bits,
                x_signed=x_signed,
            )
            for g in range(groups)
        )
        top, left, bottom, right = sides = _sides(padding)
        if any(sides):
            check_range(torch.tensor([x_zero_point]), *handles[0].x_range, f"zero point of {name}")
        n_out, c_in, kh, kw = weight.shape
        window = Stencil((kh, kw), _pair(stride, 1, "stride"), dilation=_pair(dilation, 1, "dilation"))
        if x_zero_point == 0 and (top, left) == (bottom, right):
            window, sides = replace(window, padding=(top, left)), (0, 0, 0, 0)
        weight_sum = weight.flatten(1).sum(1, dtype=torch.int64).to(torch.float64)
        return ConvHandle(name, handles, (n_out, c_in, kh, kw), window, sides, int(x_zero_point), weight_sum)

    @overload
    def conv(self, handle: ConvHandle, x: np.ndarray) -> np.ndarray: ...

    @overload
    def conv(self, handle: ConvHandle, x: Tensor) -> Tensor: ...

    def conv(self, handle: ConvHandle, x: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """float64 (B, N, H', W') accumulators of integer images ``x`` (B, C, H, W); (B, N) of rows ``x`` (B, C)."""
        images, flat = _images(x), x.ndim == 2
        parts = self._patches(handle, images)
        y = self._grouped(handle, parts)
        if y is None:
            done = [self.engine.mvm(group, part) for group, part in zip(handle.groups, parts, strict=True)]
            y = done[0] if len(done) == 1 else torch.cat(done, 1)
        if handle.x_zero_point:
            y -= handle.x_zero_point * handle.weight_sum
        size = parts[0].window.out_size(*parts[0].values.shape[2:])
        y = y if flat else y.view(len(images), *size, -1).permute(0, 3, 1, 2)
        return y.numpy() if isinstance(x, np.ndarray) else y

    def rows(self, handle: ConvHandle, x: np.ndarray | Tensor) -> list[Tensor]:
        """One (B H' W', K) integer tensor per group: the rows that `conv` multiplies, for calibration."""
        return [part.rows() for part in self._patches(handle, _images(x))]

    def measure(self, handle: ConvHandle, x: np.ndarray | Tensor) -> list[Tensor]:
        """One (B H' W', N / groups) float64 tensor per group: what the engine reads, uncorrected, zero point's share
        included."""
        patches = self._patches(handle, _images(x))
        return [self.engine.measure(group, part) for group, part in zip(handle.groups, patches, strict=True)]

    def _grouped(self, handle: ConvHandle, parts: list[Patches]) -> Tensor | None:
        """float64 (rows, N) of all groups by one grouped convolution where the engine is linear, else None."""
        if len(parts) == 1:
            return None
        weights = [w for w in map(self.engine.effective_weight, handle.groups) if w is not None]
        if len(weights) < len(parts) or any(w.dtype is not torch.float32 for w in weights):
            return None
        kernel = torch.cat([w.T for w in weights]).view(handle.shape)
        images, window = torch.cat([part.values for part in parts], 1), parts[0].window
        check_range(images, *handle.groups[0].x_range, f"inputs of {handle.name}")
        with torch.backends.nnpack.flags(enabled=False):
            y = functional.conv2d(
                images.float(),
                kernel,
                stride=window.stride,
                padding=window.padding,
                dilation=window.dilation,
                groups=len(parts),
            )
        raw = y.permute(0, 2, 3, 1).flatten(0, 2).chunk(len(parts), 1)
        done = torch.empty(raw[0].shape[0], handle.shape[0], dtype=torch.float64)
        for g, part, r, out in zip(handle.groups, parts, raw, done.chunk(len(parts), 1), strict=True):
            self.engine.finish(g, self.engine.add_noise_(g, part, r.contiguous()), out)
        return done

    def _patches(self, handle: ConvHandle, x: Tensor) -> list[Patches]:
        """Per group, the images as patches; padded here unless the zero point is 0."""
        n_channels = handle.shape[1] * len(handle.groups)
        if x.dtype.is_floating_point or x.ndim != 4 or x.shape[1] != n_channels:
            wanted = f"{handle.name}: wants integers (B, {n_channels}, H, W)"
            raise CrossbarError(f"{wanted}, not {x.dtype} {tuple(x.shape)}")
        top, left, bottom, right = handle.padding
        if any(handle.padding):
            x = functional.pad(x, (left, right, top, bottom), value=handle.x_zero_point)
        if min(handle.window.out_size(*x.shape[2:])) < 1:
            raise CrossbarError(f"{handle.name}: the kernel is larger than the padded image {tuple(x.shape[2:])}")
        return [Patches(part, handle.window) for part in x.chunk(len(handle.groups), 1)]


def _images(x: np.ndarray | Tensor) -> Tensor:
    """(B, C, H, W) tensor of images, or of rows (B, C) as 1 x 1 images."""
    images = as_tensor(x)
    return images[:, :, None, None] if images.ndim == 2 else images


def _sides(padding: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right)."""
    if not isinstance(padding, int) and len(padding) not in (2, 4):
        raise CrossbarError(f"padding = {padding} must be one, two or four numbers")
    if not isinstance(padding, int) and len(padding) == 4:
        top, left, bottom, right = (int(side) for side in padding)
    else:
        top, left = bottom, right = _pair(padding, 0, "padding")
    if min(top, left, bottom, right) < 0:
        raise CrossbarError(f"padding = {padding} must be 0 or more")
    return top, left, bottom, right


def _pair(value: int | tuple[int, ...], least: int, what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
    if min(pair) < least:
        raise CrossbarError(f"{what} = {pair} must be {least} or more")
    return pair
