"""Observers: from calibration values to a range and a grid. Pure functions, no gradients, no state.

``ranges`` min-max and percentile, range -> (scale, zero_point); ``lp_grid`` the L_p-optimal grid, exact, over steps
and zero points; ``lp_error`` its error and lower bounds; ``recording`` a net's layer outputs in evaluation mode. The
analytic clip is ``hq_lib.quantizers.aciq``.
"""

from hq_lib.quantizers.observers.lp_grid import LpResult, lp_search
from hq_lib.quantizers.observers.ranges import (
    QParams,
    Range,
    Scheme,
    grid_ends,
    minmax_range,
    percentile_range,
    range_qparams,
)
from hq_lib.quantizers.observers.recording import evaluating, record

__all__ = [
    "LpResult", "QParams", "Range", "Scheme", "evaluating", "grid_ends", "lp_search", "minmax_range",
    "percentile_range", "range_qparams", "record",
]  # fmt: skip
