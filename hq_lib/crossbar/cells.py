"""Cells of one layer: targets, what programming made of them, and what they are at a later time.

Arrays are float64 (K, C, P) in *physical* row order until `fractions` puts the rows back into logical order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hq_lib.crossbar.checks import CrossbarError
from hq_lib.crossbar.devices import Device, Verify
from hq_lib.crossbar.mapping import OK, STUCK_HIGH, Faults, Plan, partner_levels, row_order
from hq_lib.crossbar.native import stream
from hq_lib.crossbar.wires import WireCache


@dataclass(frozen=True, eq=False)
class Cells:
    """The programmed cells of one layer."""

    plan: Plan
    """Wanted levels and their recombination."""
    device: Device
    """The kind of cell."""
    target_uS: Tensor
    """Targets, uS."""
    g0_uS: Tensor
    """Programmed conductances at the device's reference time, uS."""
    xi: Tensor
    """Standard normals behind the programming errors."""
    nu: Tensor | None
    """Drift exponents, dimensionless, or None."""
    codes: Tensor
    """uint8 fault codes."""
    order: Tensor
    """int64 (K,): logical row held by each physical row."""
    name: str
    """Layer name; with ``seed`` the key of the random streams."""
    seed: int
    """Seed of the random streams."""
    n_pulses: int
    """Programming pulses of all cells."""

    @classmethod
    def program(
        cls,
        plan: Plan,
        device: Device,
        faults: Faults,
        *,
        name: str,
        seed: int,
        remap: str = "none",
        verify: Verify | None = None,
    ) -> Cells:
        """Cells programmed with the random streams of (``seed``, ``name``); remapped around their faults if asked."""
        shape = (int(plan.levels.shape[0]), int(plan.levels.shape[1]), int(plan.levels.shape[2]))
        codes = faults.codes(name, shape, stream(seed, name, "faults"))
        order = torch.arange(shape[0])
        if remap in ("rows", "both"):
            order = row_order(plan, codes, partner=remap == "both")
        placed = plan.rows(order)
        levels = partner_levels(placed, codes) if remap in ("partner", "both") else placed.levels
        target = device.g_min_uS + levels / plan.span[None, :, None] * device.window_uS
        pulses = stream(seed, name, "program")
        xi, n_pulses = _normals(device, plan, shape, pulses), target.numel()
        near = verify.tolerance * device.window_uS if verify else 0.0
        for _ in range(verify.max_pulses - 1 if verify else 0):
            off = (device.program(target, xi) - target).abs() > near
            if not bool(off.any()):
                break
            xi, n_pulses = torch.where(off, _normals(device, plan, shape, pulses), xi), n_pulses + int(off.sum())
        g0 = device.program(target, xi)
        nu = device.exponents(target, stream(seed, name, "drift"))
        return cls(plan, device, target, g0, xi, nu, codes, order, name, seed, n_pulses)

    def conductance(self, t_s: float, celsius: float = 25.0) -> Tensor:
        """float64 (K, C, P), uS, physical order, as read at ``t_s`` seconds: drifted, stuck cells where they are stuck,
        with the noise of that read-out. Reading again at one time gives the same; noise per product is apart."""
        g, g0 = self._settled(t_s)
        g = self.device.read_out(g, g0, t_s, stream(self.seed, self.name, "readout", float(t_s)))
        return g * self.device.warmth(celsius) if celsius != 25.0 else g

    def _settled(self, t_s: float) -> tuple[Tensor, Tensor]:
        """(conductance at ``t_s``, what it was when programmed), uS, before any read noise."""
        g = self.device.at(self.target_uS, self.xi, self.nu, t_s)
        if not bool((self.codes != OK).any()):
            return g, self.g0_uS
        stuck = torch.where(self.codes == STUCK_HIGH, self.device.g_max_uS, self.device.g_min_uS).to(g.dtype)
        return torch.where(self.codes == OK, g, stuck), torch.where(self.codes == OK, self.g0_uS, stuck)

    def fractions(
        self, t_s: float, wires: WireCache | None = None, celsius: float = 25.0
    ) -> tuple[Tensor, Tensor | None]:
        """(fractions, variance) in logical order, (K, C, P): place in the window, and variance per product.

        With ``wires`` both are seen through them: variances scale with (G_eff / G)^2, first order in the noise.
        """
        g, (settled, g0) = self.conductance(t_s, celsius), self._settled(t_s)
        std = self.device.read_std(settled, t_s, per="product", g0_uS=g0)
        variance = None if std is None else (std * self.device.warmth(celsius)).square()
        if wires is not None:
            seen = self._through(g, wires)
            if variance is not None:
                variance = variance * torch.where(g > 0, seen / g.clamp_min(1e-30), 0.0).square()
            g = seen
        window, inverse = self.device.window_uS, torch.argsort(self.order)
        fractions = ((g - self.device.g_min_uS) / window)[inverse]
        return fractions, None if variance is None else (variance / window**2)[inverse]

    def _through(self, g: Tensor, wires: WireCache) -> Tensor:
        """Effective conductances, tile by tile; the planes of one output are neighbours in a tile."""
        if bool((g < 0).any()):
            raise CrossbarError("wires need conductances >= 0: use a device with clip_at_zero=True")
        flat, mapping = g.flatten(1).numpy(), self.plan.mapping
        seen = torch.empty(flat.shape, dtype=torch.float64)
        for r in range(0, flat.shape[0], mapping.tile_rows):
            for c in range(0, flat.shape[1], mapping.tile_cols):
                tile = slice(r, r + mapping.tile_rows), slice(c, c + mapping.tile_cols)
                seen[tile] = torch.from_numpy(wires.effective(flat[tile]))
        return seen.view(g.shape)


def _normals(device: Device, plan: Plan, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """float64 ``shape`` standard normals; cells of one column or row of an array share a part, as the device says."""
    xi = torch.randn(shape, generator=generator, dtype=torch.float64)
    by_column, by_row = device.column_correlation, device.row_correlation
    if by_column == by_row == 0:
        return xi
    n_rows, n_columns = shape[0], shape[1] * shape[2]
    tile_of_row = torch.arange(n_rows) // plan.mapping.tile_rows
    tile_of_column = torch.arange(n_columns) // plan.mapping.tile_cols
    columns = torch.randn(int(tile_of_row[-1]) + 1, n_columns, generator=generator, dtype=torch.float64)
    rows = torch.randn(n_rows, int(tile_of_column[-1]) + 1, generator=generator, dtype=torch.float64)
    shared = by_column**0.5 * columns[tile_of_row] + by_row**0.5 * rows[:, tile_of_column]
    return (1 - by_column - by_row) ** 0.5 * xi + shared.view(shape)
