"""One function per figure: a DataFrame read from a results CSV in, a Figure out.

Topic modules hold the ``fig_...`` functions of one notebook each; ``style`` the sheet, ``save`` and ``caption``;
``methods`` the colours; ``marks`` what several figures share. Nothing here touches pyplot or its global state.
"""

from hq_lib.plotting.bn_fold import fig_bn_ranges
from hq_lib.plotting.float_training import fig_float_training
from hq_lib.plotting.integer_export import fig_integer_agreement
from hq_lib.plotting.marks import band, band_line, heat_map, label_ends, plain_log, scatter
from hq_lib.plotting.methods import GROUPS, METHOD_COLORS, Look, look, looks
from hq_lib.plotting.ptq import fig_aciq_mse, fig_error_accumulation
from hq_lib.plotting.qat import fig_dsq_curve, fig_pact_alpha, fig_qat_bits
from hq_lib.plotting.style import caption, house_style, need, new_figure, rendered, save, styled

__all__ = [
    "GROUPS",
    "METHOD_COLORS",
    "Look",
    "band",
    "band_line",
    "caption",
    "fig_aciq_mse",
    "fig_bn_ranges",
    "fig_error_accumulation",
    "fig_dsq_curve",
    "fig_float_training",
    "fig_integer_agreement",
    "fig_pact_alpha",
    "fig_qat_bits",
    "heat_map",
    "house_style",
    "label_ends",
    "look",
    "looks",
    "need",
    "new_figure",
    "plain_log",
    "rendered",
    "save",
    "scatter",
    "styled",
]
