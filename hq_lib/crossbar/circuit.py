"""Circuit: every setting of a simulated crossbar in one frozen record; its converters with four rules of range.

Currents are in unit currents: one weight step times one input step. code = clip(round(I / step), code_min, code_max).
A converter loses nothing only if its step is a whole number of unit currents and its codes cover the range. Inputs are
driven whole or in digits, two's complement (the sign bit's factor is < 0):

    x = sum_b factor_b digit_b,   digit_b = (x >> shift_b) & mask_b
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from hq_lib.crossbar import checks
from hq_lib.crossbar.checks import CrossbarError, Settings
from hq_lib.crossbar.devices import Device
from hq_lib.crossbar.mapping import Faults, Mapping
from hq_lib.crossbar.profiles import PCM_JOSHI


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
class Drive(Settings):
    """Input scheme of the rows."""

    mode: Literal["analog", "serial"] = "analog"
    """"analog": one step with a multi-bit level or pulse width. "serial": ``step_bits`` bits at a time, ADC each."""
    step_bits: checks.CellBits = 1
    """Bits v per step of the serial mode, 1..8; the analog mode drives all bits in one step and has no other than 1."""
    accumulate: bool = field(default=False, metadata=checks.OPTION)
    """Serial mode: add the steps' currents by their weights in analog and convert the sum once, not every step."""
    managed: bool = field(default=False, metadata=checks.OPTION)
    """Analog mode: drive each row of inputs by the power of two that brings its largest to the top of the range, and
    divide it out digitally: aihwkit's noise management. It sets small inputs against offsets and steps of converters.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.accumulate and self.mode == "analog") or (self.managed and self.mode == "serial"):
            raise CrossbarError("Drive.accumulate is for mode 'serial', Drive.managed for mode 'analog'")
        if self.step_bits != 1 and self.mode == "analog":
            raise CrossbarError(
                f"Drive.step_bits = {self.step_bits}: mode 'analog' drives all bits at once; use 'serial'"
            )

    @property
    def at_once(self) -> bool:
        """Whether converters see whole inputs, not one step of them."""
        return self.mode == "analog" or self.accumulate

    def steps(self, x_bits: int, x_signed: bool) -> list[Step]:
        """The steps that are converted; a sign bit is a step of its own in serial mode."""
        return [Step(0, 0, 1.0)] if self.at_once else self.pulses(x_bits, x_signed)

    def pulses(self, x_bits: int, x_signed: bool) -> list[Step]:
        """The steps that carry integers of ``x_bits`` bits to the rows."""
        if self.mode == "analog":
            return [Step(0, 0, 1.0)]
        steps, low, plain = [], 0, x_bits - x_signed
        while low < plain:
            width = min(self.step_bits, plain - low)
            steps.append(Step(low, 2**width - 1, 2.0**low))
            low += width
        return [*steps, Step(plain, 1, -(2.0**plain))] if x_signed else steps

    def peak(self, x_bits: int, x_signed: bool) -> int:
        """Largest |digit| that any converted step can carry."""
        if self.at_once:
            return 2 ** (x_bits - 1) if x_signed else 2**x_bits - 1
        return max(step.mask for step in self.steps(x_bits, x_signed))

    def gain(self, rows: Tensor, x_bits: int, x_signed: bool) -> Tensor | None:
        """(n, 1) powers of two >= 1 by which ``rows`` (n, K) are driven; None where they are driven as they are."""
        if not self.managed:
            return None
        largest = rows.abs().amax(1, keepdim=True).to(torch.float64).clamp_min(1.0)
        return torch.exp2(torch.log2(self.peak(x_bits, x_signed) / largest).floor())

    def power(self, x: Tensor, x_bits: int, x_signed: bool) -> Tensor:
        """float32, shape of ``x``: sum_b factor_b^2 digit_b^2, by which a cell's read variance reaches the output."""
        if self.mode == "analog":
            return x.to(torch.float32).square_()
        total = torch.zeros(x.shape, dtype=torch.float32)
        for step in self.pulses(x_bits, x_signed):
            total += step.digits(x).to(torch.float32).square_() * step.factor**2
        return total


@dataclass(frozen=True)
class Adc(Settings):
    """One converter per read column. Leave it out (``adc=None``) for ideal, unlimited reading.

    Currents are those above G_min, with ``Mapping(subtract="digital")`` too: a converter that sees the current of G_min
    as well, as one without a reference does, needs a larger range, most where the on/off ratio is small."""

    bits: checks.Bits = 8
    """Code width, 1..16 bits, sign included where currents have both signs (then 2..16)."""
    range: Literal["exact", "whole", "max", "calibrated"] = "calibrated"
    """"exact": step = one unit current; refused where ``bits`` do not cover all cells full and all inputs full.
    "whole": step = the smallest power of two of unit currents that covers them (exact where that is one).
    "max": the same range, whatever the step. "calibrated": from measured currents (`SimEngine.calibrate_adc`)."""
    coverage: checks.Share | None = 0.9999
    """Share of calibration currents inside the range, in (0, 1]; None: the range of least mean |error| (L1)."""
    gain_sigma: checks.Fraction = 0.0
    """Spread of converter gain about 1, fraction in [0, 1), one draw per tile and column."""
    offset_sigma_lsb: checks.NotNegative = 0.0
    """Spread of converter offset, codes (LSB), >= 0, one draw per tile and column."""
    halvings: Annotated[int, checks.Bound(">= 0 and <= 16", whole=True)] = field(default=0, metadata=checks.OPTION)
    """Times that a row of inputs is read again at half the drive while any converter of an array saturates, 0..16, its
    codes doubled digitally: aihwkit's bound management. Read noise is that of the last reading; offsets count as the
    column's own. Conversions are counted once a row, not once a reading. With ``Drive("analog")`` only."""
    inl_lsb: checks.NotNegative = 0.0
    """Peak integral nonlinearity, codes, >= 0: an S-shaped bend, zero at both ends and in the middle of the range."""

    def codes(self, signed: bool) -> tuple[int, int]:
        """(code_min, code_max): two's complement where currents have both signs, else from 0."""
        if not signed:
            return 0, 2**self.bits - 1
        checks.SIGNED_BITS.check(self.bits, "Adc.bits of a signed converter")
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def perfect(self) -> bool:
        """Whether the converter adds nothing but rounding and clipping."""
        return self.gain_sigma == 0 and self.offset_sigma_lsb == 0 and self.inl_lsb == 0

    def ruled_step(self, peak: Tensor, signed: bool) -> Tensor:
        """float64, shape of ``peak``: unit currents per code by the "exact", "whole" or "max" rule.

        Args:
            peak: largest possible |current| of a column in unit currents, >= 0.
            signed: whether currents have both signs.

        Errors: "exact" with too few bits for it, with the bits that it needs.
        """
        _, top = self.codes(signed)
        least = peak.to(torch.float64).clamp_min(1.0) / top
        if self.range == "max":
            return least
        enough = peak.clamp_min(1.0) / (top + 0.5)  # the last code also holds what rounds to it
        step = torch.exp2(torch.ceil(torch.log2(enough)).clamp_min(0.0))
        if self.range == "exact" and bool((step > 1).any()):
            needed = math.ceil(math.log2(float(peak.max()) + 0.5)) + signed
            raise CrossbarError(
                f"Adc({self.bits}, 'exact') cannot be exact: currents reach {float(peak.max()):.0f} units, which takes "
                f"{needed} bits; drive fewer bits (Drive('serial')), lower cell_bits or tile_rows, or use range='whole'"
            )
        return step

    def fitted_step(self, currents: Tensor, signed: bool) -> float:
        """Current per code by the "calibrated" rule from sample ``currents`` of any shape, in their own unit; 0 where
        there are none."""
        sizes = currents.abs().flatten() if signed else currents.clamp_min(0).flatten()
        _, top = self.codes(signed)
        if sizes.numel() == 0 or not float(sizes.max()) > 0:
            return 0.0
        if self.coverage is None:
            low, flat = self.codes(signed)[0], currents.flatten()
            steps = [float(flat.abs().max()) / top * 2.0 ** (-k / 8) for k in range(64)]
            losses = [((flat / s).round_().clamp_(low, top).mul_(s) - flat).abs_().mean() for s in steps]
            return steps[int(torch.stack(losses).argmin())]
        rank = min(max(math.ceil(self.coverage * sizes.numel()), 1), sizes.numel())
        return max(float(torch.kthvalue(sizes, rank).values), float(sizes.max()) * 1e-6) / top

    def convert_(self, scaled: Tensor, signed: bool) -> int:
        """How many entries saturated; turns ``scaled`` = I / step into codes in place."""
        low, high = self.codes(signed)
        if self.halvings:
            most = torch.maximum(
                scaled.amax(1) / (high + 0.5), scaled.amin(1) / (low - 0.5) if low else scaled.new_zeros(1)
            )
            factor = torch.exp2(torch.log2(most.clamp_min(1.0)).ceil_().clamp_max_(self.halvings))[:, None]
            scaled /= factor
            n_saturated = replace(self, halvings=0).convert_(scaled, signed)
            scaled *= factor
            return n_saturated
        if self.inl_lsb:
            u = (scaled - (low + high) / 2) * (2 / (high - low))
            scaled += self.inl_lsb * (3 * math.sqrt(3) / 2) * u * (1 - u * u).clamp_min_(0)
        scaled.round_()
        least, most = torch.aminmax(scaled)
        if float(least) >= low and float(most) <= high:
            return 0
        n_saturated = int(((scaled < low) | (scaled > high)).sum())
        scaled.clamp_(low, high)
        return n_saturated


@dataclass(frozen=True)
class Verify(Settings):
    """Write-verify: cells are read after programming, and those too far from their target are programmed again."""

    tolerance: Annotated[float, checks.Bound("> 0 and < 1", mend="5 % of the window is 0.05")]
    """What is near enough, a fraction of the window G_max - G_min, in (0, 1)."""
    max_pulses: Annotated[int, checks.Bound(">= 1 and <= 10000", whole=True)] = 10
    """Times that a cell is programmed at most, >= 1; the last state stays, wherever it is. Stuck cells away from their
    target take them all."""


@dataclass(frozen=True)
class Wires(Settings):
    """Resistances of one tile; leave it out (``wires=None``) for ideal wires."""

    row_ohm: checks.NotNegative = 1.0
    """Row wire per cell, ohm, >= 0; about 0.35 (aihwkit) to 1..3 in narrow wires."""
    col_ohm: checks.NotNegative = 1.0
    """Column wire per cell, ohm, >= 0."""
    source_ohm: checks.NotNegative = 0.0
    """Driver output R_s, ohm, >= 0."""
    load_ohm: checks.NotNegative = 0.0
    """Sense input R_l, ohm, >= 0."""
    active: checks.Share = field(default=1.0, metadata=checks.OPTION)
    """Share of rows that are driven at one time, (0, 1], where cells of undriven rows are gated off (1T1R): wires then
    carry the current of that share. The map is that of the mean, G_eff(active G) / active, since the exact one depends
    on which rows they are; 1: all cells are connected."""

    @property
    def ideal(self) -> bool:
        """Whether every resistance is zero."""
        return self.row_ohm == self.col_ohm == self.source_ohm == self.load_ohm == 0


@dataclass(frozen=True)
class Circuit(Settings):
    """A crossbar: what its cells, converters and wires are, and how it is computed."""

    device: Device = PCM_JOSHI
    """Kind of memory cell; `profiles` has the published ones."""
    mapping: Mapping = field(default_factory=Mapping)
    """How weights are put on cells."""
    drive: Drive = field(default_factory=Drive)
    """How inputs are put on rows."""
    adc: Adc | None = None
    """Converters; None: currents are read ideally."""
    wires: Wires | None = None
    """Wire resistances; None: none."""
    verify: Verify | None = field(default=None, metadata=checks.OPTION)
    """Programming in pulses with a reading after each; None: one pulse."""
    faults: Faults = field(default_factory=Faults)
    """Stuck cells."""
    remap: Literal["none", "partner", "rows", "both"] = "none"
    """What is done about known stuck cells: "none", "partner", "rows" or "both"."""
    seed: Annotated[int, checks.Bound(">= -inf", whole=True)] = 0
    """Seed of every draw; draws depend on seed, layer name and purpose only."""
    path: Literal["auto", "collapsed", "converted"] = "auto"
    """"auto": one matmul where converters are absent or lose nothing; "converted": never; "collapsed": nothing else."""
    precision: Literal["float32", "float64"] = "float32"
    """Of currents. "float64" keeps matrices on a grid on which sums are exact (inputs up to 12 bits): answers are
    bit-identical for any batch size and thread count. So they are with "float32" behind converters, where cells are
    read on 32,767 steps of their column's largest (a change of at most 2e-5 of it; whole numbers stay as they are),
    in C. Without converters, or with a curved characteristic, INL or noise that depends on the cell, the last bit of a
    float32 sum may depend on batch size and threads, and rarely moves a rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adc is not None and self.adc.halvings and self.drive.mode == "serial":
            raise CrossbarError("Adc.halvings halves analog inputs: single bits have no half; use Drive('analog')")
        if self.remap != "none" and self.mapping.scheme != "pair":
            raise CrossbarError("fault-aware remapping works on pairs; use Mapping(scheme='pair') or remap='none'")
