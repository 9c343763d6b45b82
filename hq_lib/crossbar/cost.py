"""Cost: counts of an array (cells, conversions, cell reads), and energy as a labelled, order-of-magnitude estimate.

E = conversions E_adc + cell reads G V^2 t_read           converters and array only: no digital logic, no buffers
"""

from __future__ import annotations

from dataclasses import dataclass

from hq_lib.crossbar.circuit import Circuit
from hq_lib.crossbar.engine import Handle

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
    n_steps = len(circuit.drive.steps(handle.x_bits, handle.x_signed))
    n_arrays = n_tiles * -(-n_columns * n_planes // circuit.mapping.tile_cols)
    conversions = n_tiles * n_steps * plan.weight.numel() * plan.n_outputs
    return Cost(plan.levels.numel(), n_arrays, conversions, plan.levels.numel() * n_steps)
