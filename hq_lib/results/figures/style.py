"""Figures without global state: one style sheet, figures that pyplot does not know, files equal byte for byte."""

import functools
import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import style as mpl_style
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hq_lib.results import atomic, labels, paths

STYLE_FILE = Path(__file__).with_name("hq.mplstyle")
# No dates, no program versions: the same figure is the same file.
_METADATA = {
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None, "ModDate": None},
    "png": {"Software": None},
}
SCREEN_DPI = 110
P = ParamSpec("P")
R = TypeVar("R")


house_style = functools.partial(mpl_style.context, STYLE_FILE, after_reset=True)
"""The style sheet over matplotlib's defaults in a ``with`` block; the caller's settings come back after it."""


def styled(*columns: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A figure function that draws under ``house_style`` whatever the caller's matplotlib settings are.

    With ``columns`` its first argument is a frame that has to ``need`` them.
    """

    def decorate(draw: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(draw)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            if columns:
                need(args[0], columns, draw.__name__)  # type: ignore[arg-type]
            with house_style():
                drawn = draw(*args, **kwargs)
                if isinstance(drawn, Figure):
                    settle(drawn)
                return drawn

        return wrapped

    return decorate


def settle(figure: Figure) -> None:
    """Lays the figure out once and for all: matplotlib would shift it a little at every later drawing."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


class PaperFigure(Figure):
    """A Figure that pyplot does not know (nothing to close, no window) and that a notebook still shows."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png", dpi=SCREEN_DPI)


def new_figure(
    n_rows: int = 1, n_cols: int = 1, *, width: float = 6.4, height: float = 3.6, **subplots: Any
) -> tuple[PaperFigure, np.ndarray]:
    """A figure and its (n_rows, n_cols) array of Axes.

    Args:
        width, height: inches; a text column is 6.4 wide.
        subplots: passed to ``Figure.subplots``, e.g. ``sharex=True`` or ``height_ratios=[2, 1]``.
    """
    figure = PaperFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_cols, squeeze=False, **subplots)


def need(frame: pd.DataFrame, columns: Collection[str], figure: str) -> pd.DataFrame:
    """The frame, where it has rows and these columns without a missing value; else ``ValueError`` naming them."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise ValueError(f"{figure} needs the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    if frame.empty:
        raise ValueError(f"{figure} has no rows to draw: run the study first")
    holes = [c for c in columns if frame[c].isna().to_numpy().any()]
    if holes:
        raise ValueError(f"{figure} has missing values in {', '.join(holes)}: drop or complete those rows")
    return frame


def rendered(figure: Figure, ending: str, *, dpi: float | None = None) -> bytes:
    """The figure as the bytes of a ``pdf`` or ``png`` file, without dates or program versions.

    Args:
        dpi: pixels per inch of a png; None = the style sheet's, for print.
    """
    content = io.BytesIO()
    with house_style():
        settle(figure)
        figure.savefig(content, format=ending, dpi=dpi or mpl.rcParams["savefig.dpi"], metadata=_METADATA[ending])
    return content.getvalue()


def save(figure: Figure, name: str, profile: str, *, caption: str | None = None) -> list[Path]:
    """The files ``<name>.pdf``, ``.png`` (and ``.caption.txt``) in ``figures_dir(profile)``; same figure, same bytes.

    Args:
        figure: as drawn by a ``fig_...`` function.
        name: id of the output (DESIGN.md), ``fig_...``.
        profile: ``smoke``, ``quick`` or ``full``, which chooses the folder.
        caption: the claim, from ``caption``; written beside the figure for the gallery.
    """
    folder = paths.figures_dir(profile)
    stem = labels.check_id(name, "fig")
    contents = {f"{stem}.{ending}": rendered(figure, ending) for ending in ("pdf", "png")}
    if caption is not None:
        contents[f"{stem}.caption.txt"] = f"{caption}\n".encode()
    for file, content in contents.items():
        atomic.write_bytes(folder / file, content)
    return [folder / file for file in contents]


def caption(
    claim: str, *, profile: str, n: str, seeds: Collection[int] | None = None, dataset: str = "", switches: str = ""
) -> str:
    """The claim and, in brackets, what it rests on: data set, profile, n, seeds, switches.

    Args:
        claim: one sentence, what the reader should see.
        n: how many images (or what) each point is measured on.
        seeds: seeds of the runs behind it; None or () = deterministic.
        dataset: name of the data set; needed wherever it may be an embedded substitute.
        switches: explicit settings, as printed under tables.
    """
    paths.check_profile(profile)
    known = sorted(set(seeds or ()))
    plural = "seed" if len(known) == 1 else "seeds"
    drawn = f"{len(known)} {plural} ({', '.join(map(str, known))})" if known else "deterministic"
    facts = [dataset, f"profile {profile}", f"n = {n}", drawn, switches]
    return f"{claim.strip().rstrip('.')}. [{'; '.join(f for f in facts if f)}]"
