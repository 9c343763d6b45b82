"""The arrays of one layer: its programmed cells, and everything that one point of time makes of them.

    collapsed   y = x @ W_eff                                              no converter, or a provably lossless one
    analog      y = sum_t  ADC(x_t @ D_t)                                  all input bits in one step
    serial      y = sum_b factor_b sum_t sum_q factor_q ADC(x_bt @ D_tq)   one step per input digit b

Currents are float32; codes are integers and sum exactly while below 2^24, otherwise (and for whole-number matrices that
need it) float64 is used. Shapes: K inputs, N outputs, Q read planes (slices, and signs where they are read apart).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hq_lib.crossbar.cells import Cells
from hq_lib.crossbar.checks import CrossbarError, flatten
from hq_lib.crossbar.circuit import Circuit, Step
from hq_lib.crossbar.engine import Handle, exact_dtype
from hq_lib.crossbar.native import Normals, library, stream
from hq_lib.crossbar.operands import Operand
from hq_lib.crossbar.tiles import NativeReader, Tile, is_whole, made_whole, on_exact_grid, on_whole_grid, spread_of


class ArrayLayer:
    """The programmed cells of one layer and everything built from them for one time point.

    Args:
        handle: the loaded weights.
        circuit: settings.
        t_s: seconds since programming.
        celsius: temperature of the cells.
    """

    def __init__(self, handle: Handle, circuit: Circuit, t_s: float, celsius: float = 25.0) -> None:
        self.handle, self.circuit = handle, circuit
        self.inputs = handle.x_bits, handle.x_signed
        self.plan = circuit.mapping.encode(handle.w_int, handle.w_bits)
        self.span = self.plan.span[: self.plan.n_outputs]
        self.steps = circuit.drive.steps(*self.inputs)
        self.signed = self.plan.signed or (handle.x_signed and circuit.drive.at_once)  # what converters see
        n_rows = circuit.mapping.tile_rows
        self.rows = [slice(k, k + n_rows) for k in range(0, len(self.plan.levels), n_rows)]
        self.cells = Cells.program(self.plan, circuit, handle.name)
        self.adc_step = self._ruled_step()
        self.bend = self._bend()
        self.n_conversions = self.n_saturated = 0
        self.build(t_s, celsius)

    def build(self, t_s: float, celsius: float = 25.0) -> None:
        """Nothing; sets planes, variances, effective weight and path for cells as they are at ``t_s`` seconds."""
        plan = self.plan
        fractions, variance = self.cells.fractions(t_s, celsius)
        self.planes = made_whole(plan.planes(fractions))
        self.variance, self.shared = (None, None) if variance is None else plan.plane_variance(variance)
        weight = made_whole(plan.decode(self.planes))  # (K, N); exact where it is whole
        weight = weight.to(exact_dtype(weight, self.handle)) if is_whole(weight) else self._final(weight)
        noise = reference = None
        if self.variance is not None:  # (K, N [+ 1]) per squared input; the last column is the reference's
            noise = self.variance @ plan.weight.square() / plan.gain.square()
            if self.shared is not None:
                noise = torch.cat([noise, (self.shared @ plan.weight.square())[:, None]], 1)
                reference = (self.span / plan.gain).to(weight.dtype)[None]
            noise = self._final(noise, squared=True)
        spread = None if noise is None else spread_of(noise)
        self.whole = Tile(0, weight, None, None, noise, spread, reference)
        self._tiles: list[Tile] = []

    @property
    def weight(self) -> Tensor:
        """(K, N): what the cells amount to, read noise apart."""
        return self.whole.matrix

    @property
    def path(self) -> str:
        """ "collapsed", "analog" or "serial": how this layer is computed."""
        if self.circuit.path != "converted" and self._lossless():
            return "collapsed"
        if self.circuit.path == "collapsed":
            raise CrossbarError(f"{self.handle.name}: converters may lose something; use path='auto' or adc=None")
        return "analog" if self.circuit.drive.at_once else "serial"

    def calibrate_adc(self, x: Tensor) -> None:
        """Nothing; fits the converters' range to the currents of ``x`` (m, K). One range for the layer; the ranges of
        slices are powers of two of each other, so that shift-and-add stays whole; one without current has the least."""
        adc, planes = self.circuit.adc, self._currents(x)
        if adc is None:
            raise CrossbarError(f"{self.handle.name}: there is no converter to calibrate (adc=None)")
        fitted = torch.tensor([adc.fitted_step(plane, self.signed) for plane in planes], dtype=torch.float64)
        base = fitted[fitted > 0].min() if bool((fitted > 0).any()) else fitted.new_ones(())
        fitted = base * torch.exp2(torch.ceil(torch.log2(fitted.clamp_min(base) / base) - 1e-9))
        self.adc_step, self._tiles = fitted[:, None] * self.span, []

    @property
    def fitted(self) -> str:
        """Digest of the converters' steps where they were fitted, else ""."""
        adc, step = self.circuit.adc, self.adc_step
        if adc is None or adc.range != "calibrated" or step is None:
            return ""
        return str(flatten("steps", step.numpy())["steps"])

    def _currents(self, x: Tensor) -> list[Tensor]:
        """Per plane, all tile currents of sample rows ``x`` as float32, in full cells times input steps."""
        wide = x if x.dtype is torch.uint8 else x.to(torch.int32)
        gain = self.circuit.drive.gain(wide, *self.inputs)
        wide = wide if gain is None else (wide * gain).to(torch.int32)
        found: list[list[Tensor]] = [[] for _ in range(self.plan.weight.numel())]
        for rows in self.rows:
            cells = (self.planes[rows] / self.span[None, :, None]).to(torch.float32)
            for step in self.steps:
                driven = self.drive(step.digits(wide[:, rows]).to(torch.float32))
                for q, plane in enumerate(found):
                    plane.append((driven @ cells[..., q]).flatten())
        return [torch.cat(plane) for plane in found]

    def drive(self, digits: Tensor) -> Tensor:
        """Driven ``digits`` in the units of their full drive, bent as the cells' I-V curve bends them."""
        if self.bend is None:
            return digits
        cubic, peak = self.bend
        return digits * ((digits / peak).square() * cubic + 1) / (1 + cubic)

    def _bend(self) -> tuple[float, float] | None:
        """(a, largest digit) of a curved I-V characteristic that this drive can see, or None."""
        drive, cubic = self.circuit.drive, self.circuit.device.iv_cubic
        peak = max(step.mask for step in drive.pulses(*self.inputs)) or drive.peak(*self.inputs)
        if not cubic or peak == 1:
            return None
        if drive.accumulate:
            raise CrossbarError(f"{self.handle.name}: Drive.accumulate with a curved I-V needs step_bits=1")
        return cubic, float(peak)

    def _final(self, matrix: Tensor, *, squared: bool = False) -> Tensor:
        """``matrix`` in the precision of the circuit; ``squared`` if it multiplies squares of inputs."""
        if self.circuit.precision == "float32":
            return matrix.to(torch.float32)
        largest = float(max(abs(limit) for limit in self.handle.x_range))
        return on_exact_grid(matrix, largest**2 if squared else largest)

    def _ruled_step(self) -> Tensor | None:
        """float64 (Q, N) unit currents per code by the rules that need no currents; None if it has to be calibrated."""
        adc, n_planes = self.circuit.adc, self.plan.weight.numel()
        if adc is None:
            return torch.ones(n_planes, self.plan.n_outputs, dtype=torch.float64)
        adc.codes(self.signed)  # refuses too few bits at once
        if adc.range == "calibrated":
            return None
        n_rows = min(self.circuit.mapping.tile_rows, len(self.handle.w_int))
        try:
            step = adc.ruled_step(self._largest() * n_rows * self.circuit.drive.peak(*self.inputs), self.signed)
        except CrossbarError as error:
            raise CrossbarError(f"{self.handle.name}: {error}") from None
        return step.expand(n_planes, -1)

    def _largest(self) -> Tensor:
        """float64 (N,), or (Q, N) against a reference column: the largest |level| that a cell can show a converter."""
        n, levels = self.plan.n_outputs, self.plan.levels
        if levels.shape[1] == n:
            return self.span
        middle, whole = levels[0, n][:, None], self.plan.span[n]
        return torch.maximum(middle, whole - middle) * self.span / whole

    def _lossless(self) -> bool:
        """Whether converted reading provably equals the matmul: no converter, or whole codes that cannot saturate."""
        adc = self.circuit.adc
        if adc is None:
            return self.bend is None or self.circuit.drive.at_once
        whole = adc.range in ("exact", "whole") and adc.perfect and self.variance is None and self.bend is None
        return whole and self.adc_step is not None and bool((self.adc_step == 1).all()) and is_whole(self.planes)

    # -- converted reading ---------------------------------------------------------------------------------------------

    @property
    def tiles(self) -> list[Tile]:
        """Row tiles, top to bottom, as converters read them; built on first use."""
        if not self._tiles:
            if self.adc_step is None:
                raise CrossbarError(
                    f"{self.handle.name}: a 'calibrated' ADC range needs calibrate_adc(handle, x) first"
                )
            self._tiles, adc = self._grid_tiles() or self._plain_tiles(), self.circuit.adc
            self._coefficient = self.plan.weight[:, None] * self.adc_step / self.plan.gain  # accumulator units per code
            self._native = None
            if adc is not None and self._tiles[0].factor is not None and library() is not None:
                self._native = NativeReader(self._tiles, self.steps, self._coefficient, *adc.codes(self.signed))
        return self._tiles

    @property
    def native(self) -> bool:
        """Whether the compiled library reads."""
        return bool(self.tiles) and self._native is not None

    def read(self, x: Operand, noise: Callable[[int, int], Normals]) -> Tensor:
        """float64 (rows, N) answers of the converters to integer inputs ``x``; conversions and saturations are counted.

        Args:
            noise: gives the normals of (step, tile); each is consumed in row order only.
        """
        tiles, offset = self.tiles, self.plan.offset / self.plan.gain
        if self._native is not None:
            y, n_saturated = self._native.read(x, lambda b, t, out: noise(b, t).draw_(out))
        else:
            total, n_saturated = self._totals(x, noise)
            planes = total.view(len(total), *self._coefficient.shape).unbind(1)
            y = planes[0] * self._coefficient[0]
            for plane, coefficient in zip(planes[1:], self._coefficient[1:], strict=True):
                y += plane * coefficient
        if bool((offset != 0).any()):
            y -= x.product(torch.ones(x.n_columns, 1, dtype=torch.float64)) * offset
        if self.circuit.adc is not None:
            self.n_conversions += len(tiles) * len(self.steps) * self._coefficient.numel() * x.n_rows
            self.n_saturated += n_saturated
        return y

    def _totals(self, x: Operand, noise: Callable[[int, int], Normals]) -> tuple[Tensor, int]:
        """(codes (rows, Q N) summed over steps and tiles, number of saturated conversions), by torch."""
        adc, dtype, n_saturated = self.circuit.adc, self.tiles[0].matrix.dtype, 0
        gain = self.circuit.drive.gain(x.rows(), *self.inputs) if self.circuit.drive.managed else None
        if gain is not None:
            gain = gain.to(dtype)
            x = Operand(x.rows().to(dtype) * gain)
        exact = adc is not None and self._largest_total() < 2**24
        total = torch.zeros(x.n_rows, self._coefficient.numel(), dtype=dtype if exact else torch.float64)
        for b, step in enumerate(self.steps):
            driven = x.map(lambda v, step=step: self.drive(step.digits(v).to(dtype)))
            power = cache(lambda d=driven, step=step: self.power(x, d, step))
            for t, tile in enumerate(self.tiles):
                codes = tile.add_noise_(tile.currents(driven), power, lambda b=b, t=t: noise(b, t))
                if adc is not None:
                    n_saturated += adc.convert_(codes, self.signed)
                total.add_(codes if gain is None else codes / gain, alpha=step.factor)
        return total, n_saturated

    def power(self, x: Operand, driven: Operand, step: Step) -> Operand:
        """The squares by which read variances are multiplied, for inputs ``x`` that drive ``driven`` in ``step``."""
        if self.circuit.drive.accumulate:
            return x.map(lambda v: self.circuit.drive.power(v, *self.inputs))
        return driven if step.mask == 1 else driven.map(torch.square)

    def _largest_total(self) -> float:
        """Bound on a sum of codes over tiles and steps."""
        assert self.circuit.adc is not None
        largest = max(abs(code) for code in self.circuit.adc.codes(self.signed))
        return largest * len(self.rows) * sum(abs(step.factor) for step in self.steps)

    def _read_as(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(lsb, shift, variance) of the converters below ``rows``, float64, with the gain and offset of each.

        Unit currents per code (Q, N); offsets in codes (Q N,); variances in squared codes per squared input step
        (R, Q N). The gain acts on signal and read noise alike.
        """
        adc, lsb, shift = self.circuit.adc, self.adc_step, None
        assert lsb is not None
        if adc is not None and not adc.perfect:
            generator = stream(self.circuit.seed, self.handle.name, "adc", rows.start)
            gain, offset = torch.randn(2, *lsb.shape, generator=generator, dtype=torch.float64)
            shift = (adc.offset_sigma_lsb * offset).flatten() if adc.offset_sigma_lsb else None
            lsb = lsb / (1 + adc.gain_sigma * gain)
        variance = None if self.variance is None else (self.variance[rows].permute(0, 2, 1) / lsb**2).flatten(1)
        return lsb, shift, variance

    def _grid_tiles(self) -> list[Tile]:
        """Tiles with cells on whole numbers, or none where they are not read so (see `tiles`)."""
        adc, drive, peak = self.circuit.adc, self.circuit.drive, self.circuit.drive.peak(*self.inputs)
        if adc is None or adc.halvings or adc.inl_lsb or drive.managed or drive.accumulate:
            return []
        if self.bend or self.shared is not None or self.circuit.precision != "float32":
            return []
        n_rows = self.rows[0].stop if len(self.rows) > 1 else len(self.planes)
        if (drive.mode == "analog" and peak >= 2**15) or max(peak**2 * n_rows, self._largest_total()) >= 2**24:
            return []
        found = []
        for rows in self.rows:
            lsb, shift, variance = self._read_as(rows)
            spread = None if variance is None else spread_of(variance)
            grid = on_whole_grid(self.planes[rows].permute(0, 2, 1).flatten(1), peak, 32767)
            if grid is None or (variance is not None and spread is None):
                return []
            parts = (grid[1] / lsb.flatten(), shift, variance, spread)
            factor, shift, variance, spread = (None if part is None else part.float() for part in parts)
            found.append(Tile(rows.start, grid[0], factor, shift, variance, spread))
        return found

    def _plain_tiles(self) -> list[Tile]:
        """Tiles in codes, in the precision of the circuit; in float64 if a whole-number one would lose digits."""
        read = [self._read_as(rows) for rows in self.rows]
        codes = [
            (self.planes[r].permute(0, 2, 1) / lsb).flatten(1) for r, (lsb, *_) in zip(self.rows, read, strict=True)
        ]
        keep = any(is_whole(m) and exact_dtype(m, self.handle) is torch.float64 for m in codes)
        dtype = torch.float64 if keep else getattr(torch, self.circuit.precision)
        found = []
        for rows, (lsb, shift, variance), matrix in zip(self.rows, read, codes, strict=True):
            spread = reference = None
            if variance is not None:
                if self.shared is not None:
                    variance, reference = torch.cat([variance, self.shared[rows]], 1), (self.span / lsb).to(dtype)
                variance = variance if keep else self._final(variance, squared=True)
                spread = spread_of(variance)
            shift = None if shift is None else shift.to(dtype)
            matrix = matrix if keep else self._final(matrix)
            found.append(Tile(rows.start, matrix, None, shift, variance, spread, reference))
        return found
