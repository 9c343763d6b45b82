"""Drive: how integer inputs reach the rows, all bits at once or a few bits at a time.

x = sum_b factor_b digit_b,   digit_b = (x >> shift_b) & mask_b     two's complement: the sign bit's factor is < 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hq_lib.crossbar.checks import check_bit_width, check_choice


@dataclass(frozen=True)
class Step:
    """One input step: which bits of x it drives, and the digital factor of what is read."""

    shift: int
    """Lowest bit of the digit."""
    mask: int
    """Largest digit, 2^v - 1; 0 means the whole integer, sign included."""
    factor: float
    """Digital factor, +-2^shift."""

    def digits(self, x: Tensor) -> Tensor:
        """Integer tensor of ``x``'s shape: the digit of this step."""
        if not self.mask:
            return x
        return (x >> self.shift).bitwise_and_(self.mask) if self.shift else x & self.mask


@dataclass(frozen=True)
class Drive:
    """Input scheme of the rows."""

    mode: str = "analog"
    """"analog": one step with a multi-bit level or pulse width. "serial": ``step_bits`` bits at a time, ADC each."""
    step_bits: int = 1
    """Bits v per step of the serial mode, 1..8."""

    def __post_init__(self) -> None:
        check_choice(self.mode, ("analog", "serial"), "Drive.mode")
        check_bit_width(self.step_bits, "Drive.step_bits", high=8)

    def steps(self, x_bits: int, x_signed: bool) -> list[Step]:
        """The steps that carry integers of ``x_bits`` bits; a sign bit is a step of its own in serial mode."""
        if self.mode == "analog":
            return [Step(0, 0, 1.0)]
        steps, low, plain = [], 0, x_bits - x_signed
        while low < plain:
            width = min(self.step_bits, plain - low)
            steps.append(Step(low, 2**width - 1, 2.0**low))
            low += width
        return [*steps, Step(plain, 1, -(2.0**plain))] if x_signed else steps

    def peak(self, x_bits: int, x_signed: bool) -> int:
        """Largest |digit| that any step can drive."""
        if self.mode == "analog":
            return 2 ** (x_bits - 1) if x_signed else 2**x_bits - 1
        return max(step.mask for step in self.steps(x_bits, x_signed))

    def power(self, x: Tensor, x_bits: int, x_signed: bool) -> Tensor:
        """float32, shape of ``x``: sum_b factor_b^2 digit_b^2, by which a cell's read variance reaches the output."""
        if self.mode == "analog":
            return x.to(torch.float32).square_()
        total = torch.zeros(x.shape, dtype=torch.float32)
        for step in self.steps(x_bits, x_signed):
            total += step.digits(x).to(torch.float32).square_() * step.factor**2
        return total
