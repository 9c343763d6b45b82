"""One function per figure: a DataFrame read from a results CSV in, a Figure out.

Topic modules hold the ``fig_...`` functions of one notebook each; ``style`` the sheet, ``save`` and ``caption``;
``methods`` the colours; ``marks`` what several figures share. Nothing here touches pyplot or its global state.
"""

from hq_lib.plotting.bn_fold import fig_bn_ranges
from hq_lib.plotting.crossbar import fig_crossbar_accuracy, fig_drift, fig_mvm_calibration, fig_mvm_scatter
from hq_lib.plotting.edge_cloud import fig_edge_cloud
from hq_lib.plotting.float_training import fig_float_training
from hq_lib.plotting.hybrid import fig_hybrid_bits, fig_layer_sensitivity, fig_pareto
from hq_lib.plotting.integer_export import fig_integer_agreement
from hq_lib.plotting.marks import band, band_line, heat_map, label_ends, plain_log, scatter
from hq_lib.plotting.methods import GROUPS, METHOD_COLORS, Look, look, looks
from hq_lib.plotting.ptq import fig_aciq_mse, fig_error_accumulation
from hq_lib.plotting.qat import fig_dsq_curve, fig_pact_alpha, fig_qat_bits
from hq_lib.plotting.selection import fig1_framework, fig_n_calib, fig_selected, fig_smoothness
from hq_lib.plotting.style import caption, house_style, need, new_figure, rendered, save, styled

__all__ = [
    "GROUPS",
    "METHOD_COLORS",
    "Look",
    "band",
    "band_line",
    "caption",
    "fig1_framework",
    "fig_aciq_mse",
    "fig_bn_ranges",
    "fig_crossbar_accuracy",
    "fig_drift",
    "fig_dsq_curve",
    "fig_edge_cloud",
    "fig_error_accumulation",
    "fig_float_training",
    "fig_hybrid_bits",
    "fig_integer_agreement",
    "fig_layer_sensitivity",
    "fig_mvm_calibration",
    "fig_mvm_scatter",
    "fig_n_calib",
    "fig_pact_alpha",
    "fig_pareto",
    "fig_qat_bits",
    "fig_selected",
    "fig_smoothness",
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
