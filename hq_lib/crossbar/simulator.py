"""The simulated crossbar as an engine: device, mapping, drive, converter and wires put together, and what it costs.

Shapes: K inputs, N outputs, Q read planes (slices, and signs where they are read apart), R rows of a tile.
Energy is a labelled, order-of-magnitude estimate of converters and array only, without digital logic and buffers:

    E = conversions E_adc + cell reads G V^2 t_read
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.cells import Cells
from hq_lib.crossbar.checks import CrossbarError, flatten
from hq_lib.crossbar.circuit import Circuit
from hq_lib.crossbar.engine import Engine, Handle, exact_dtype
from hq_lib.crossbar.execution import Reader, Tile, Variance, is_whole, made_whole, on_exact_grid, on_whole_grid
from hq_lib.crossbar.native import GridTile, Normals, stream
from hq_lib.crossbar.operands import Operand
from hq_lib.crossbar.profiles import DEVICES
from hq_lib.crossbar.wires import WireCache


class ArrayLayer:
    """The programmed cells of one layer and everything built from them for one time point.

    Args:
        handle: the loaded weights.
        circuit: settings.
        t_s: seconds since programming.
        wires: solver, or None.
        celsius: temperature of the cells.
    """

    def __init__(
        self, handle: Handle, circuit: Circuit, t_s: float, wires: WireCache | None, celsius: float = 25.0
    ) -> None:
        plan = circuit.mapping.encode(handle.w_int, handle.w_bits)
        self.handle, self.circuit, self.plan = handle, circuit, plan
        self.cells = Cells.program(
            plan, circuit.device, circuit.faults, name=handle.name, seed=circuit.seed, remap=circuit.remap,
            verify=circuit.verify,
        )  # fmt: skip
        self.adc_step = self._ruled_step()
        self.n_conversions = self.n_saturated = 0
        self.noise: Variance | None = None
        self._reader: Reader | None = None
        self.bend = self._bend()
        self.build(t_s, wires, celsius)

    def build(self, t_s: float, wires: WireCache | None, celsius: float = 25.0) -> None:
        """Nothing; sets planes, variances, effective weight and path for cells as they are at ``t_s`` seconds."""
        plan = self.plan
        fractions, variance = self.cells.fractions(t_s, wires, celsius)
        self.planes = made_whole(plan.planes(fractions))
        self.variance = None if variance is None else plan.plane_variance(variance)
        self.shared = None if variance is None else plan.reference_variance(variance)
        weight = made_whole(plan.combine(self.planes) - plan.offset / plan.gain)  # (K, N); exact where it is whole
        self.weight = weight.to(exact_dtype(weight, self.handle)) if is_whole(weight) else self._final(weight)
        self.noise, self._reader = None, None
        if (
            self.variance is not None
        ):  # (K, N [+ 1]) per squared input; the last column is the reference's, in fractions
            own = self.variance @ plan.weight.square() / plan.gain.square()
            if self.shared is not None:
                own = torch.cat([own, (self.shared @ plan.weight.square())[:, None]], 1)
            self.noise = Variance(self._final(own, squared=True))

    @property
    def signed(self) -> bool:
        """Whether converters see currents of both signs."""
        return self.circuit.signed(self.handle.x_signed)

    @property
    def path(self) -> str:
        """ "collapsed", "analog" or "serial": how this layer is computed."""
        if self.circuit.path != "converted" and self._lossless():
            return "collapsed"
        if self.circuit.path == "collapsed":
            raise CrossbarError(f"{self.handle.name}: converters may lose something; use path='auto' or adc=None")
        return "analog" if self.circuit.drive.at_once else "serial"

    @property
    def reader(self) -> Reader:
        """The converted reading of this layer, built on first use."""
        if self._reader is None:
            self._reader = self._build_reader()
        return self._reader

    @property
    def noise_scale(self) -> Tensor:
        """float64 (N,): output per fraction of the reference column's read noise."""
        return self.plan.span[: self.plan.n_outputs] / self.plan.gain

    def set_adc_step(self, step: Tensor) -> None:
        """Nothing; converters read with ``step`` (Q, N) unit currents per code from now on."""
        if step.shape != (self.plan.weight.numel(), self.plan.n_outputs) or not bool((step > 0).all()):
            raise CrossbarError(f"{self.handle.name}: converter steps {tuple(step.shape)} do not fit this layer")
        self.adc_step, self._reader = step.to(torch.float64), None

    def calibrate_adc(self, x: Tensor) -> None:
        """Nothing; fits the converters' range to the currents of ``x`` (m, K). One range for the layer; the ranges of
        slices are powers of two of each other, so that shift-and-add stays whole."""
        adc, planes = self.circuit.adc, self._currents(x)
        if adc is None:
            raise CrossbarError(f"{self.handle.name}: there is no converter to calibrate (adc=None)")
        fitted = torch.tensor([adc.fitted_step(plane, self.signed) for plane in planes], dtype=torch.float64)
        base = fitted.min()
        fitted = base * torch.exp2(torch.ceil(torch.log2(fitted / base) - 1e-9))
        self.set_adc_step(fitted[:, None] * self.plan.span[: self.plan.n_outputs])

    def _currents(self, x: Tensor) -> list[Tensor]:
        """Per plane, all tile currents of sample rows ``x`` as float32, in full cells times input steps."""
        span = self.plan.span[: self.plan.n_outputs]
        steps = self.circuit.drive.steps(self.handle.x_bits, self.handle.x_signed)
        wide = x if x.dtype is torch.uint8 else x.to(torch.int32)
        gain = self.circuit.drive.gain(wide, self.handle.x_bits, self.handle.x_signed)
        wide = wide if gain is None else (wide * gain).to(torch.int32)
        found: list[list[Tensor]] = [[] for _ in range(self.plan.weight.numel())]
        for rows in self._tile_rows():
            cells = (self.planes[rows] / span[None, :, None]).to(torch.float32)
            for step in steps:
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
        peak = max(step.mask for step in drive.pulses(self.handle.x_bits, self.handle.x_signed))
        peak = peak or drive.peak(self.handle.x_bits, self.handle.x_signed)
        if cubic and peak > 1 and drive.accumulate:
            raise CrossbarError(f"{self.handle.name}: Drive.accumulate with a curved I-V needs step_bits=1")
        return (cubic, float(peak)) if cubic and peak > 1 else None

    # -- what the cells amount to --------------------------------------------------------------------------------------

    def _final(self, matrix: Tensor, *, squared: bool = False) -> Tensor:
        """``matrix`` in the precision of the circuit; ``squared`` if it multiplies squares of inputs."""
        if self.circuit.precision == "float32":
            return matrix.to(torch.float32)
        largest = float(max(abs(limit) for limit in self.handle.x_range))
        return on_exact_grid(matrix, largest**2 if squared else largest)

    # -- converters ----------------------------------------------------------------------------------------------------

    def _ruled_step(self) -> Tensor | None:
        """float64 (Q, N) unit currents per code by the rules that need no currents; None if it has to be calibrated."""
        adc, handle = self.circuit.adc, self.handle
        if adc is None:
            return torch.ones(self.plan.weight.numel(), self.plan.n_outputs, dtype=torch.float64)
        adc.codes(self.signed)  # refuses too few bits at once
        if adc.range == "calibrated":
            return None
        n_rows = min(self.circuit.mapping.tile_rows, handle.w_int.shape[0])
        peak = self.plan.span[: self.plan.n_outputs] * n_rows * self.circuit.drive.peak(handle.x_bits, handle.x_signed)
        try:
            return adc.ruled_step(peak, self.signed).expand(self.plan.weight.numel(), -1)
        except CrossbarError as error:
            raise CrossbarError(f"{handle.name}: {error}") from None

    def _lossless(self) -> bool:
        """Whether converted reading provably equals the matmul: no converter, or whole codes that cannot saturate."""
        adc = self.circuit.adc
        if adc is None:
            return self.bend is None or self.circuit.drive.at_once
        if adc.range not in ("exact", "whole") or not adc.perfect or self.adc_step is None:
            return False
        if self.variance is not None or self.bend is not None:
            return False
        return bool((self.adc_step == 1).all()) and is_whole(self.planes)

    def _tile_rows(self) -> list[slice]:
        n_rows = self.circuit.mapping.tile_rows
        return [slice(k, k + n_rows) for k in range(0, len(self.planes), n_rows)]

    def _build_reader(self) -> Reader:
        plan, handle, drive = self.plan, self.handle, self.circuit.drive
        if self.adc_step is None:
            raise CrossbarError(f"{handle.name}: a 'calibrated' ADC range needs calibrate_adc(handle, x) first")
        exact = [self._build_tile(rows) for rows in self._tile_rows()]
        tiles = self._cast(exact)
        return Reader(
            tiles,
            self.circuit.drive.steps(handle.x_bits, handle.x_signed),
            plan.weight[:, None] * self.adc_step / plan.gain,
            plan.offset / plan.gain,
            self.circuit.adc,
            self.signed,
            self.drive,
            self._on_grid(exact),
            self._power if drive.accumulate else None,
            lambda x: drive.gain(x.rows(), handle.x_bits, handle.x_signed) if drive.managed else None,
        )

    def _power(self, x: Tensor) -> Tensor:
        """Squares of what the pulses of inputs ``x`` drive, by which read variances are multiplied."""
        return self.circuit.drive.power(x, self.handle.x_bits, self.handle.x_signed)

    def _lsb(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(float64 (Q, N) unit currents per code with the gain of these converters, (Q N,) their offsets in codes)."""
        adc, lsb = self.circuit.adc, self.adc_step
        assert lsb is not None
        if adc is None or adc.perfect:
            return lsb, None
        generator = stream(self.circuit.seed, self.handle.name, "adc", rows.start)
        gain, offset = torch.randn(2, *lsb.shape, generator=generator, dtype=torch.float64)
        shift = (adc.offset_sigma_lsb * offset).flatten() if adc.offset_sigma_lsb else None
        return lsb / (1 + adc.gain_sigma * gain), shift  # the gain acts on signal and read noise alike

    def _build_tile(self, rows: slice) -> Tile:
        (lsb, shift), variance, reference = self._lsb(rows), None, None
        matrix = (self.planes[rows].permute(0, 2, 1) / lsb).flatten(1)
        if self.variance is not None:
            variance = (self.variance[rows].permute(0, 2, 1) / lsb**2).flatten(1)
        if variance is not None and self.shared is not None:
            variance = torch.cat([variance, self.shared[rows]], 1)
            reference = self.plan.span[: self.plan.n_outputs] / lsb
        return Tile(rows.start, matrix, shift, None if variance is None else Variance(variance), reference)

    def _on_grid(self, tiles: list[Tile]) -> tuple[GridTile, ...] | None:
        """The tiles with cells on whole numbers, or None where they are not read so (see `execution`)."""
        adc, drive, handle = self.circuit.adc, self.circuit.drive, self.handle
        special = drive.managed or drive.accumulate or (adc is not None and adc.halvings)
        if (
            adc is None
            or special
            or adc.inl_lsb
            or self.bend
            or self.shared is not None
            or self.circuit.precision != "float32"
        ):
            return None
        steps, peak = drive.steps(handle.x_bits, handle.x_signed), drive.peak(handle.x_bits, handle.x_signed)
        codes = max(abs(code) for code in adc.codes(self.signed)) * len(tiles) * sum(abs(step.factor) for step in steps)
        if codes >= 2**24 or (drive.mode == "analog" and peak >= 2**15) or peak**2 * len(tiles[0].matrix) >= 2**24:
            return None
        found = []
        for tile, rows in zip(tiles, self._tile_rows(), strict=True):
            planes, spread = self.planes[rows].permute(0, 2, 1).flatten(1), None
            if tile.variance is not None and (spread := tile.variance.row) is None:
                return None
            if (grid := on_whole_grid(planes, peak, 32767)) is None:
                return None
            lsb = self._lsb(rows)[0].flatten()
            shift = None if tile.shift is None else tile.shift.to(torch.float32)
            spread = None if spread is None else spread.to(torch.float32)
            found.append(GridTile(rows.start, grid[0], (grid[1] / lsb).to(torch.float32), shift, spread))
        return tuple(found)

    def _cast(self, tiles: list[Tile]) -> list[Tile]:
        """float64 ``tiles`` in the precision of the circuit; as they are if a whole-number one would lose digits."""
        if any(is_whole(t.matrix) and exact_dtype(t.matrix, self.handle) is torch.float64 for t in tiles):
            return tiles
        dtype = getattr(torch, self.circuit.precision)
        return [
            Tile(
                t.start,
                self._final(t.matrix),
                None if t.shift is None else t.shift.to(dtype),
                None if t.variance is None else Variance(self._final(t.variance.matrix, squared=True)),
                None if t.reference is None else t.reference.to(dtype),
            )
            for t in tiles
        ]


class SimEngine(Engine):
    """Analog arrays in simulation. Same circuit, same layers: same answers, for any batch size.

    Three ways of computing, chosen by itself (`chosen_path`): one matmul with the effective weights where no converter
    stands between, converted reading with all input bits at once, and converted reading bit by bit.

    Args:
        circuit: all settings; the default is PCM (Joshi), pairs, column scale, 128 rows, ideal reading.
    """

    def __init__(self, circuit: Circuit | None = None) -> None:
        super().__init__()
        self.circuit = circuit or Circuit()
        wires = self.circuit.wires
        self._wires = None if wires is None or wires.ideal else WireCache(wires)
        self._layers: dict[str, ArrayLayer] = {}
        self._streams: dict[tuple[object, ...], Normals] = {}
        self._t_s, self._celsius = self.circuit.device.t0_s, 25.0

    @property
    def time_s(self) -> float:
        return self._t_s

    def set_time(self, t_s: float) -> None:
        """Nothing; from now on cells are read as they are ``t_s`` seconds after programming (>= the device's t0).

        Errors: a device that time does not change, unless ``t_s`` is its t0.
        """
        device = self.circuit.device
        if not device.t0_s <= t_s < float("inf"):
            raise CrossbarError(f"t_s = {t_s} is not a time from {device.name}'s reference {device.t0_s} s on")
        if device.error is not None and len(device.error.times_s) > 1 and t_s > device.error.times_s[-1]:
            raise CrossbarError(f"{device.name} was measured up to {device.error.times_s[-1]:g} s, not {t_s:g} s")
        if not device.ages and t_s != device.t0_s:
            drifting = ", ".join(name for name, other in DEVICES.items() if other.ages)
            raise CrossbarError(f"{device.name} has no model of time: t_s = {t_s} would change nothing; use {drifting}")
        self._rebuild(float(t_s), self._celsius)

    def set_temperature(self, celsius: float) -> None:
        """Nothing; from now on cells are read at ``celsius`` (25 until then), as ``device.temperature_per_K`` says.

        Errors: a device whose coefficient is 0, a temperature that leaves no conductance.
        """
        self.circuit.device.warmth(celsius)
        self._rebuild(self._t_s, float(celsius))

    def _rebuild(self, t_s: float, celsius: float) -> None:
        for layer in self._layers.values():
            layer.build(t_s, self._wires, celsius)
        self._t_s, self._celsius = t_s, celsius

    def reset_noise(self) -> None:
        """Nothing; read noise starts again from its first draw."""
        self._streams.clear()

    def layer(self, handle: Handle) -> ArrayLayer:
        """The simulated cells behind ``handle``, for maps of conductances and effective weights."""
        if handle.name not in self._layers or self._layers[handle.name].handle is not handle:
            raise CrossbarError(f"layer {handle.name!r} was not loaded into this engine; loaded: {list(self._layers)}")
        return self._layers[handle.name]

    def chosen_path(self, handle: Handle) -> str:
        """ "collapsed", "analog" or "serial": how this layer is computed."""
        return self.layer(handle).path

    def calibrate_adc(self, handle: Handle, x: np.ndarray | Tensor) -> Tensor:
        """float64 (Q, N): the converter steps, in unit currents, now fitted to the currents of rows ``x`` (m, K)."""
        layer = self.layer(handle)
        layer.calibrate_adc(self._checked(handle, x).rows())
        assert layer.adc_step is not None
        return layer.adc_step

    def pulses(self) -> dict[str, tuple[int, int]]:
        """{layer: (programming pulses, cells)}; equal unless cells are verified (`Verify`)."""
        return {name: (layer.cells.n_pulses, layer.cells.target_uS.numel()) for name, layer in self._layers.items()}

    def saturation(self) -> dict[str, tuple[int, int]]:
        """{layer: (saturated conversions, all conversions)} since loading."""
        return {name: (layer.n_saturated, layer.n_conversions) for name, layer in self._layers.items()}

    def describe(self) -> dict[str, Any]:
        settings = flatten("", self.circuit)
        settings.pop("")
        warm = {} if self._celsius == 25.0 else {"celsius": self._celsius}
        return {"engine": "sim", "t_s": self._t_s, **warm} | {k.removeprefix("."): v for k, v in settings.items()}

    def effective_weight(self, handle: Handle) -> Tensor | None:
        layer = self.layer(handle)
        return layer.weight if layer.path == "collapsed" and layer.bend is None else None

    def add_noise_(self, handle: Handle, x: Operand, raw: Tensor) -> Tensor:
        layer = self.layer(handle)
        if layer.noise is None:
            return raw
        n, drive = layer.plan.n_outputs, self.circuit.drive
        if layer.bend is not None:
            power = x.map(torch.square)  # of currents, not of numbers
        else:
            power = x.map(lambda v: drive.power(v, handle.x_bits, handle.x_signed))
        drawn = self._normals(handle.name, "read").draw(x.n_rows, layer.noise.n_columns, layer.noise.matrix.dtype)
        noise = layer.noise.scale_(drawn, power.product)
        raw += noise[:, :n]
        if noise.shape[1] > n:
            raw -= noise[:, n:] * layer.noise_scale.to(raw.dtype)
        return raw

    def _program(self, handle: Handle) -> None:
        self._layers[handle.name] = ArrayLayer(handle, self.circuit, self._t_s, self._wires, self._celsius)

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        layer = self.layer(handle)
        if layer.path == "collapsed":
            analog, dtype = self.circuit.drive.mode == "analog", layer.weight.dtype
            # in analog mode powers are squares of the numbers just converted
            driven = x.map(lambda v: layer.drive(v.to(dtype))) if analog else x
            return self.add_noise_(handle, driven, driven.product(layer.weight))
        y, n_saturated = layer.reader.read(x, lambda b, t: self._normals(handle.name, "read", b, t))
        layer.n_conversions += layer.reader.n_conversions * x.n_rows
        layer.n_saturated += n_saturated
        return y

    def _rows_at_once(self, handle: Handle) -> int:
        """1 MiB of products: they stay in cache between the passes over them. C makes one pass, over 64 MiB."""
        layer = self.layer(handle)
        if layer.path != "collapsed" and layer.reader.native:
            return (8 << 20) // layer.plan.n_outputs
        width = layer.plan.n_outputs * (1 if layer.path == "collapsed" else layer.plan.weight.numel())
        return max(16, (1 << 20) // (4 * width))

    def _normals(self, *key: object) -> Normals:
        if key not in self._streams:
            self._streams[key] = Normals(stream(self.circuit.seed, *key))
        return self._streams[key]


ADC_PJ = (1.6, 15.6)
"""pJ per 8-bit conversion, low and high: two readings of one number (ISAAC, 2 mW at 1.28 GS/s) differ tenfold."""


@dataclass(frozen=True)
class Cost:
    """Counts of one layer; ``per_mvm`` values are for one input row."""

    n_cells: int
    """Programmed cells, idle partners and reference columns included."""
    n_arrays: int
    """Arrays of tile_rows x tile_cols that hold them."""
    conversions_per_mvm: int
    """Converter readings."""
    cell_reads_per_mvm: int
    """Cells that carry current, times input steps."""

    def energy_pJ(
        self, *, adc_pJ: float = ADC_PJ[0], g_uS: float = 10.0, v_read: float = 0.2, t_ns: float = 10.0
    ) -> float:
        """Estimate in pJ per input row: converters plus array (mean conductance uS, volts, nanoseconds)."""
        return self.conversions_per_mvm * adc_pJ + self.cell_reads_per_mvm * g_uS * v_read**2 * t_ns * 1e-3


def count(handle: Handle, circuit: Circuit) -> Cost:
    """The counts of ``handle`` on ``circuit``, whichever way it is computed."""
    plan = circuit.mapping.encode(handle.w_int, handle.w_bits)
    n_rows, n_columns, n_planes = plan.levels.shape
    n_tiles = -(-n_rows // circuit.mapping.tile_rows)
    n_steps, n_pulses = (
        len(steps(handle.x_bits, handle.x_signed)) for steps in (circuit.drive.steps, circuit.drive.pulses)
    )
    n_arrays = n_tiles * -(-n_columns * n_planes // circuit.mapping.tile_cols)
    conversions = n_tiles * n_steps * plan.weight.numel() * plan.n_outputs
    return Cost(plan.levels.numel(), n_arrays, conversions, plan.levels.numel() * n_pulses)
