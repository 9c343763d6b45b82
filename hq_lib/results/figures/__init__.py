"""The figures' style and what several of them share; each study's figures stand in its own folder.

``style`` holds the sheet, ``save`` and ``caption``; ``methods`` the colours; ``marks`` bands, heat maps and labels.
Nothing here touches pyplot or its global state.
"""

from hq_lib.results.figures.marks import band, band_line, heat_map, label_ends, plain_log, scatter
from hq_lib.results.figures.methods import GROUPS, METHOD_COLORS, Look, look, looks
from hq_lib.results.figures.style import SCREEN_DPI, caption, house_style, need, new_figure, rendered, save, styled

__all__ = [
    "GROUPS",
    "METHOD_COLORS",
    "SCREEN_DPI",
    "Look",
    "band",
    "band_line",
    "caption",
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
