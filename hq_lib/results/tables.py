"""Tables of the paper: our mean ± sd with n, beside the published number and the gap, from result rows only.

A cell is never blank: ``n/r`` says that it was not run, ``–`` that nobody published it. Numbers of different profiles
or protocols are never averaged, nor set into one column; what would do so is an error that says how to part them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from hq_lib.results import atomic, labels, paths, rows

METRIC = "acc_pct"
NOT_RUN, NOT_PUBLISHED, FROM_MEMORY = "n/r", "–", "†"
LEGEND = {NOT_RUN: "not run", NOT_PUBLISHED: "nothing published"}
MEMORY_LEGEND = f"{FROM_MEMORY} = quoted from memory of the paper, not looked up again"


class TableError(ValueError):
    """A table that would mislead or cannot be built; the message names the cell or column, and the mend."""


def with_bits(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy with a column ``bits`` (``W4A4``, ``float``), for tables whose columns are bit widths."""
    pairs = zip(frame["w_bits"], frame["a_bits"], strict=True)
    return frame.assign(bits=pd.Series([labels.bits_label(w, a) for w, a in pairs], index=frame.index, dtype="str"))


def with_switches(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """A copy with these settings of ``switches`` as columns, unless they are; NaN where a row has none."""
    found = [json.loads(text) for text in frame["switches"]]
    kind: Any = None if found else "object"  # nothing is not taken for numbers
    new = [name for name in names if name not in frame]
    return frame.assign(**{name: pd.Series([each.get(name) for each in found], frame.index, kind) for name in new})


def wide(rows: pd.DataFrame, *index: str) -> pd.DataFrame:
    """A line for each cell of ``index`` (columns or settings of ``switches``), its metrics' mean values as columns."""
    found = with_switches(rows, *index).pivot_table(index=list(index), columns="metric", values="value")
    return found.reset_index().rename_axis(columns=None)


def mean_sd(values: pd.Series, decimals: int = 2) -> str:
    """``91.20 ± 0.13``, the sample standard deviation; of one value the value, of none n/r."""
    spread = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{decimals}f}{spread}" if len(values) else NOT_RUN


def telling(frame: pd.DataFrame, index: Sequence[str], *more: str) -> list[str]:
    """``index``, and those columns of ``more`` of which one of its cells has several values: what tells lines apart."""
    groups = frame.groupby(list(index), dropna=False)
    return [*index, *(c for c in more if groups[c].nunique(dropna=False).to_numpy().max(initial=0) > 1)]


def longest(frame: pd.DataFrame, *cell: str) -> pd.DataFrame:
    """Of each cell the rows of most epochs."""
    return frame.loc[frame["epochs"] == frame.groupby(list(cell), dropna=False)["epochs"].transform("max")]


def cells(results: pd.DataFrame, *, by: Sequence[str]) -> pd.DataFrame:
    """Mean, sample standard deviation and count over the seeds of each cell.

    Args:
        results: rows of one metric (columns of ``rows.COLUMNS``, and ``bits`` if asked for).
        by: columns that name a cell.

    Returns:
        One line per cell: ``by``, ``mean``, ``sd`` (NaN where n = 1), ``n``, ``unit``, ``profile``; in order of ``by``.

    Raises:
        TableError: the rows of a cell differ in more than their seed; the columns in which they differ are named.
    """
    groups = results.groupby(list(by), sort=True, observed=True)
    same = [*(c for c in rows.KEY if c not in by and c != "seed"), "unit"]
    varies: Any = groups[same].nunique() > 1
    for cell in varies.loc[varies.any(axis=1)].reset_index().to_dict("records"):
        where, differ = (", ".join(found) for found in ((f"{c}={cell[c]}" for c in by), (c for c in same if cell[c])))
        mend = "filter the rows, or add those columns to index or columns"
        raise TableError(f"the cell {where} holds rows that differ in {differ}: {mend}")
    told: Any = {"mean": ("value", "mean"), "sd": ("value", "std"), "n": ("value", "count")}
    told |= {column: (column, "first") for column in ("unit", "profile") if column not in by}
    return groups.agg(**told).reset_index()


def build(
    results: pd.DataFrame,
    published: pd.DataFrame | None = None,
    *,
    index: Sequence[str],
    columns: Sequence[str] = (),
    order: Mapping[str, Sequence[Any]] | None = None,
    decimals: int = 2,
) -> pd.DataFrame:
    """The table as text, ready for ``write``: one line per ``index``, and per ``columns`` ours, published, gap.

    Ours reads ``91.20 ± 0.13 (n=3)``. Several published numbers for one cell are all shown, best first, and the gap
    is taken to the best; ``†`` marks one that is known from memory alone (tag M). Published
    columns appear where at least one number exists.

    Args:
        results: result rows; only those of ``acc_pct`` are used.
        published: rows of ``published.lookup``, already narrowed to the source wanted; None = no such columns.
        index: columns naming the lines; ``bits`` stands for both bit widths.
        columns: columns naming the groups of columns; () = one group.
        order: values of some columns in the wanted order; values that were not run are lines of ``n/r``. Without it
            methods stand in the order of ``labels.METHOD_LABELS`` and other values in ascending order.
        decimals: digits after the point.

    Raises:
        TableError: a column would mix profiles, a cell would mix protocols, or there is nothing to show.
    """
    ours = with_bits(results.loc[results["metric"] == METRIC])
    theirs = None if published is None else with_bits(published.loc[published["metric"] == METRIC])
    names = [*index, *columns]
    found: dict[Any, Any] = {tuple(cell[: len(names)]): cell for cell in cells(ours, by=names).itertuples(index=False)}
    known = _published_lookup(theirs, names)
    lines, groups = (_combinations(part, ours, theirs, order or {}) for part in (index, columns))
    if not lines or not groups:
        raise TableError(f"no row has the metric {METRIC!r} and nothing published was given: run the study first")
    table = {c: [labels.printed(c, line[i]) for line in lines] for i, c in enumerate(index)}
    for group in groups:
        mine = [found.get((*line, *group)) for line in lines]
        title = " ".join(labels.printed(c, g) for c, g in zip(columns, group, strict=True))
        profiles = sorted({cell.profile for cell in mine if cell})
        if len(profiles) > 1:
            mend = f"keep one, as in results[results.profile == {profiles[0]!r}], or add 'profile' to columns"
            raise TableError(f"column {title or 'ours'!r} would mix the profiles {' and '.join(profiles)}: {mend}")
        theirs_here = [known((*line, *group)) for line in lines]
        table[title or "ours"] = [_ours_text(cell, decimals) for cell in mine]
        if any(theirs_here):
            table[f"{title} published".strip()] = [_published_text(values, decimals) for values in theirs_here]
            gaps = zip(mine, theirs_here, strict=True)
            table[f"{title} gap".strip()] = [_gap_text(cell, values, decimals) for cell, values in gaps]
    return pd.DataFrame(table)


def _published_lookup(theirs: pd.DataFrame | None, names: Sequence[str]) -> Callable[[tuple], list[tuple[float, bool]]]:
    """From a cell to its published values, best first, and whether each is known from memory alone.

    Columns that published rows lack (``profile``) match any.
    """
    if theirs is None:
        return lambda cell: []
    shared = [c for c in names if c in theirs.columns]
    if not shared:
        raise TableError(f"published rows have none of the columns {', '.join(names)}: they cannot be matched")
    remembered = theirs["tag"] == "M" if "tag" in theirs else pd.Series(False, index=theirs.index)
    values: dict[Any, Any] = {
        key: sorted(group.groupby("value")["remembered"].all().items(), reverse=True)
        for key, group in theirs.assign(remembered=remembered).groupby(shared, observed=True)
    }
    return lambda cell: values.get(tuple(v for c, v in zip(names, cell, strict=True) if c in shared), [])


def _combinations(
    part: Sequence[str], ours: pd.DataFrame, theirs: pd.DataFrame | None, order: Mapping[str, Sequence[Any]]
) -> list[tuple[Any, ...]]:
    """The lines (or column groups), in order: those that occur, and the full product where all values are ordered."""
    if not part:
        return [()]
    frames = [f for f in (ours, theirs) if f is not None and set(part) <= set(f.columns)]
    present = {tuple(r) for f in frames for r in f[list(part)].itertuples(index=False)}
    if all(c in order for c in part):
        present |= set(product(*(order[c] for c in part)))
    return sorted(present, key=lambda t: tuple(_place(c, v, order) for c, v in zip(part, t, strict=True)))


def _place(column: str, value: Any, order: Mapping[str, Sequence[Any]]) -> tuple[int, Any, str]:
    """Sort key: the place in ``order``, else among the known methods, else after them by size or spelling."""
    known = list(order.get(column, labels.METHOD_LABELS if column == "method" else ()))
    if value in known:
        return (0, known.index(value), "")
    return (1, value, "") if isinstance(value, (int, float)) else (2, 0, str(value))


def _ours_text(cell: Any, decimals: int) -> str:
    if cell is None:
        return NOT_RUN
    spread = f" ± {cell.sd:.{decimals}f}" if cell.n > 1 else ""
    return f"{cell.mean:.{decimals}f}{spread} (n={cell.n})"


def _published_text(values: Sequence[tuple[float, bool]], decimals: int) -> str:
    # 91.7 stays 91.7, 91.416 becomes 91.42
    short = [min(f"{v:.{decimals}f}", repr(v), key=len) + (FROM_MEMORY if memory else "") for v, memory in values]
    return " / ".join(short) or NOT_PUBLISHED


def _gap_text(cell: Any, values: Sequence[tuple[float, bool]], decimals: int) -> str:
    if not values:
        return NOT_PUBLISHED
    return NOT_RUN if cell is None else f"{cell.mean - values[0][0]:+.{decimals}f}"


def write(table: pd.DataFrame, name: str, *, profile: str, caption: str, switches: Mapping[str, Any]) -> list[Path]:
    """The three files ``<name>.csv``, ``.md`` and ``.tex`` in ``figures_dir(profile)``; same table, same bytes.

    Below the table stand the caption's claim, the profile, and the switches (first/last bits, placement ...), the usual
    cause of numbers that cannot be reproduced.

    Args:
        table: text, as from ``build``; any DataFrame without empty cells will do.
        name: id of the output (DESIGN.md), ``tab_...``.
        caption: the claim, with n and seeds (``plotting.caption``).
        switches: further explicit settings, printed in this order; ``{}`` only where there are none.

    Raises:
        TableError: the table is empty or has an empty cell.
    """
    labels.check_id(name, "tab")
    if table.empty or table.isna().any(axis=None) or (table.astype(str) == "").any(axis=None):
        raise TableError(f"{name} has no rows or an empty cell: write {NOT_RUN} for what was not run")
    notes = _notes(table, profile, switches)
    below = "  \n".join(notes)
    texts = {"csv": table.to_csv(index=False, lineterminator="\n"), "md": f"{caption}\n\n{markdown(table)}\n{below}\n",
             "tex": _latex(table, name, caption, notes)}  # fmt: skip
    made = [paths.figures_dir(profile) / f"{name}.{ending}" for ending in texts]
    for path, text in zip(made, texts.values(), strict=True):
        atomic.write_text(path, text)
    return made


def _notes(table: pd.DataFrame, profile: str, switches: Mapping[str, Any]) -> list[str]:
    text = table.astype(str)
    used = [f"{mark} = {meaning}" for mark, meaning in LEGEND.items() if (text == mark).any(axis=None)]
    used += [MEMORY_LEGEND] if any(FROM_MEMORY in cell for cell in text.to_numpy().ravel()) else []
    settings = ", ".join(f"{k} = {v}" for k, v in switches.items())
    return [f"Profile: {profile}.", f"Switches: {settings or 'none'}.", *([f"{'; '.join(used)}."] if used else [])]


def markdown(table: pd.DataFrame) -> str:
    """The table alone, as Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |\n"

    head = line(list(table.columns)) + "|" + "---|" * len(table.columns) + "\n"
    return head + "".join(line(row) for row in table.itertuples(index=False))


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "×": r"$\times$",
        "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "α": r"$\alpha$", "σ": r"$\sigma$", "µ": r"$\mu$",
        "−": "$-$", FROM_MEMORY: r"$\dagger$"}  # fmt: skip


def _escaped(text: Any) -> str:
    return "".join(_TEX.get(letter, letter) for letter in str(text))


def _latex(table: pd.DataFrame, name: str, caption: str, notes: Sequence[str]) -> str:
    """A ``table`` environment with booktabs rules; the document needs ``\\usepackage{booktabs}`` and UTF-8."""
    rows_tex = [
        " & ".join(map(_escaped, row)) + r" \\" for row in [tuple(table.columns), *table.itertuples(index=False)]
    ]
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}", rf"\label{{{name}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\toprule", rows_tex[0], r"\midrule", *rows_tex[1:],
        r"\bottomrule", r"\end{tabular}", r"\par\footnotesize " + _escaped(" ".join(notes)), r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
