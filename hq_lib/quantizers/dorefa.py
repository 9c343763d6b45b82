"""DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160): weights through tanh, activations through a fixed clip.

Two weight grids: the paper's, with 2^k levels and no zero, and seed 001's hardware form, with 2^k - 1 levels and zero.
"""

from typing import ClassVar

import torch
from torch import Tensor

from hq_lib.quantizers.affine import max_abs, mean_abs, round_ste, usable
from hq_lib.quantizers.minmax import FollowingQuantizer
from hq_lib.quantizers.pact import FixedClip


class DoReFaHardwareWeight(FollowingQuantizer):
    """DoReFa weights in the form that integer hardware likes: symmetric, with an exact zero (seed 001).

        t = tanh(w) / max|tanh(w)|,   x_int = round(t n),   w_hat = c x_int / n,   n = 2^(k-1) - 1

    2 bits are the ternary {-c, 0, c}; 1 bit is sign(w) E|w|. c = 1 with ``keep_magnitude=False`` (the published form).
    By default c = max|w|, detached: small weights keep their size, so layers without a BN behind them and float
    checkpoints survive; a BN behind the layer cancels any c exactly, in values and gradients.

    Gradient: d w_hat / d w = c (1 - tanh(w)^2) / max|tanh(w)|; the maxima are constants (1 bit: identity).
    An all-zero channel stays 0. Not idempotent: tanh moves levels. ``to_int`` takes the real weight.
    """

    method = "dorefa_hw"
    has_zero: ClassVar[bool] = True
    """Whether real 0 is one of the levels."""

    def __init__(self, bits: int, *, signed: bool = True, axis: int | None = None, keep_magnitude: bool = True) -> None:
        """``axis``: None for the paper's one maximum per layer, 0 per output channel. ``keep_magnitude``: see class.

        Raises ValueError for ``signed=False``: tanh maps weights symmetrically about 0.
        """
        if not signed:
            raise ValueError(f"{self.method} cannot do {bits} bits unsigned: its weight grid is symmetric about 0")
        super().__init__(bits, signed=True, axis=axis)
        if not self.has_zero:
            self.use_integers(1 - 2**bits, 2**bits - 1, 2)
        self.keep_magnitude = keep_magnitude

    def _found(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            return usable(mean_abs(w, axis=self.axis)), w.new_zeros(())
        size = max_abs(w, axis=self.axis)
        size = size if self.keep_magnitude else torch.ones_like(size)
        return usable(size / self.qmax), w.new_zeros(())

    def _snap(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return scale * self._index(x)

    def _index(self, w: Tensor) -> Tensor:
        t = torch.tanh(w)
        position = t / usable(max_abs(t.detach(), axis=self.axis)) * (self.qmax / self.step)
        half = 0.0 if self.has_zero else 0.5
        return self.step * (round_ste(position - half) + half)


class DoReFaWeight(DoReFaHardwareWeight):
    """DoReFa weights as published: 2^k levels, symmetric about 0, which itself is none of them.

        w_hat = c (2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1)          eq. 9
        = c / N * x_int,   N = 2^k - 1,   x_int odd in [-N, N]

    so ``grid()`` is Grid(c / N, 0, -N, N, step=2) and needs k + 1 bits of storage. c and the gradient, 1 bit and
    ``to_int`` are as in the hardware form; 1 bit is sign(w) E|w| (eq. 7). An all-zero channel becomes +-MIN_SCALE.
    """

    method = "dorefa"
    has_zero = False


class DoReFaAct(FixedClip):
    """DoReFa activations: a_hat = quantize_k(clip(x, 0, 1)), gradient 1 inside the clip, 0 outside (section 2.4).

    ``clip`` is 1 in the paper, for nets trained with it from the start; another value scales there and back. A float
    net with ReLUs wants "least_error": most of its activations lie above 1, where no gradient passes.
    Signed: [-clip, clip] with 2^(k-1) - 1 levels on each side, for tensors without a ReLU; 1 bit {-clip, clip}.
    """

    method = "dorefa"
    published = 1.0
