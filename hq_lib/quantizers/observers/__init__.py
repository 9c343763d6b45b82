"""Observers: from calibration values to a range and a grid. Pure functions, no gradients, no state.

``ranges`` min-max and percentile, range -> grid; ``lp_grid`` the L_p-optimal grid, exact, over steps and zero points;
``lp_error`` its error and lower bounds. The analytic clip is ``hq_lib.quantizers.aciq``.
"""

from hq_lib.quantizers.observers.lp_grid import LpResult, lp_search
from hq_lib.quantizers.observers.ranges import (
    Range,
    Scheme,
    grid_ends,
    grid_from_range,
    minmax_range,
    percentile_range,
)

__all__ = [
    "LpResult", "Range", "Scheme", "grid_ends", "grid_from_range", "lp_search", "minmax_range", "percentile_range",
]  # fmt: skip
