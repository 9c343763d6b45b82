"""The figures' style; each study's figures stand in its own folder, and what several of them share in ``marks``.

``style`` holds the sheet, ``save`` and ``caption``; ``methods`` the colours; ``marks`` bands, heat maps and labels.
Nothing here touches pyplot or its global state.
"""

from hq_lib.results.figures.marks import band, band_line, band_lines, heat_map, label_ends, plain_log
from hq_lib.results.figures.methods import Look, look, looks
from hq_lib.results.figures.style import SCREEN_DPI, PaperFigure, caption, need, new_figure, rendered, save, styled
