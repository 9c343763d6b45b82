"""The simulated crossbar as an engine: device, mapping, drive, converter and wires put together, and what it costs.

Energy is a labelled, order-of-magnitude estimate of converters and array only, without digital logic and buffers:

    E = conversions E_adc + cell reads G V^2 t_read
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.arrays import ArrayLayer
from hq_lib.crossbar.checks import CrossbarError, flatten
from hq_lib.crossbar.circuit import Circuit
from hq_lib.crossbar.engine import Engine, Handle
from hq_lib.crossbar.native import Normals, stream
from hq_lib.crossbar.operands import Operand
from hq_lib.crossbar.profiles import DEVICES


class SimEngine(Engine):
    """Analog arrays in simulation. Same circuit, same layers: same answers, for any batch size.

    Three ways of computing, chosen by itself (``layer(handle).path``): one matmul with the effective weights where no
    converter stands between, converted reading with all input bits at once, and converted reading bit by bit.

    Args:
        circuit: all settings; the default is PCM (Joshi), pairs, column scale, 128 rows, ideal reading.
    """

    def __init__(self, circuit: Circuit | None = None) -> None:
        super().__init__()
        self.circuit = circuit or Circuit()
        self._layers: dict[str, ArrayLayer] = {}
        self._streams: dict[tuple[object, ...], Normals] = {}
        self._noise: tuple[int, ...] = ()
        self._t_s, self._celsius = self.circuit.device.t0_s, 25.0

    @property
    def time_s(self) -> float:
        return self._t_s

    @property
    def celsius(self) -> float:
        """Temperature at which cells are read."""
        return self._celsius

    def set_time(self, t_s: float) -> None:
        """Nothing; from now on cells are read as they are ``t_s`` seconds after programming (>= the device's t0).

        Errors: a device that time does not change, unless ``t_s`` is its t0.
        """
        device = self.circuit.device
        device.at(torch.zeros(1), torch.zeros(1), None, t_s)  # refuses a time it does not know before a layer changes
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
            layer.build(t_s, celsius)
        self._t_s, self._celsius = t_s, celsius

    def reset_noise(self) -> None:
        """Nothing; read noise starts again from its first draw."""
        self._streams.clear()

    def go_on(self, n_rows: int) -> None:
        """Nothing; read noise is that of an engine that goes on after ``n_rows`` rows on record: other draws than
        theirs."""
        self._streams.clear()
        self._noise = (n_rows,)

    def layer(self, handle: Handle) -> ArrayLayer:
        """The arrays behind ``handle``: cells and pulses, weights, path, converter steps, conversions, saturations.

        Conversions are those that were simulated: none where converters provably lose nothing and one matmul does
        (``path``). `count` has those of the circuit.
        """
        if handle.name not in self._layers or self._layers[handle.name].handle is not handle:
            raise CrossbarError(f"layer {handle.name!r} was not loaded into this engine; loaded: {list(self._layers)}")
        return self._layers[handle.name]

    def calibrate_adc(self, handle: Handle, x: np.ndarray | Tensor) -> Tensor:
        """float64 (Q, N): the converter steps, in unit currents, now fitted to the currents of rows ``x`` (m, K)."""
        layer = self.layer(handle)
        layer.calibrate_adc(self._checked(handle, x).rows())
        assert layer.adc_step is not None
        return layer.adc_step

    def describe(self) -> dict[str, Any]:
        settings = flatten("", self.circuit)
        settings.pop("")
        warm = {} if self._celsius == 25.0 else {"celsius": self._celsius}
        when = {"t_s": self._t_s} if self.circuit.device.ages else {}
        return {"engine": "sim", **when, **warm} | {k.removeprefix("."): v for k, v in settings.items()}

    def effective_weight(self, handle: Handle) -> Tensor | None:
        layer = self.layer(handle)
        return layer.weight if layer.path == "collapsed" and layer.bend is None else None

    def add_noise_(self, handle: Handle, x: Operand, raw: Tensor) -> Tensor:
        layer, drive = self.layer(handle), self.circuit.drive

        def power() -> Operand:
            if layer.bend is not None:
                return x.map(torch.square)  # of currents, not of numbers
            return x.map(lambda v: drive.power(v, *layer.inputs))

        return layer.whole.add_noise_(raw, power, partial(self._normals, handle.name, "read"))

    def _program(self, handle: Handle) -> None:
        self._layers[handle.name] = ArrayLayer(handle, self.circuit, self._t_s, self._celsius)

    def _measure(self, handle: Handle, x: Operand) -> Tensor:
        layer = self.layer(handle)
        if layer.path != "collapsed":
            return layer.read(x, partial(self._normals, handle.name, "read"))
        if self.circuit.drive.mode == "analog":  # powers are squares of the numbers just converted
            x = x.floats(layer.weight.dtype)
            x = x if layer.bend is None else x.map(layer.drive)
        return self.add_noise_(handle, x, layer.whole.currents(x))

    def _rows_at_once(self, handle: Handle) -> int:
        """1 MiB of products: they stay in cache between the passes over them. C makes one pass, over 64 MiB."""
        layer = self.layer(handle)
        if layer.path != "collapsed" and layer.native:
            return (8 << 20) // layer.plan.n_outputs
        width = layer.plan.n_outputs * (1 if layer.path == "collapsed" else layer.plan.weight.numel())
        return max(16, (1 << 20) // (4 * width))

    def _normals(self, *key: object) -> Normals:
        if key not in self._streams:
            self._streams[key] = Normals(stream(self.circuit.seed, *key, *self._noise))
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
        """Estimate in pJ per input row: converters plus array (mean conductance uS, volts, nanoseconds).

        Every conversion costs ``adc_pJ``, whatever ``Adc.bits`` is: the default is one of 8 bits (see `ADC_PJ`).
        """
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
