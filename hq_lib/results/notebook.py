"""What every notebook calls first: are the parameters known, which profile is this, where do outputs go."""

import ast
import base64
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from hq_lib.results import figures, paths, tables
from hq_lib.results.hints import nearest

REFERENCE = "full"  # the profile that the text of a notebook quotes
INJECTED = "# Parameters"  # the first line of the cell that papermill inserts after the parameters cell
LIVE = ("JPY_SESSION_NAME", "VSCODE_PID")  # set for a kernel that a person sits at, not by papermill


@dataclass(frozen=True)
class Session:
    """The facts a notebook run goes by."""

    profile: str
    """smoke, quick or full."""
    results: Path
    """Folder of result rows."""
    figures: Path
    """Folder of figures and tables."""
    device: str
    """"cuda" where there is a GPU, else "cpu"."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What ``papermill -f notebooks/configs/....yaml`` says of a run, for notebooks that carry one out; else empty."""

    def show(
        self,
        name: str,
        thing: pd.DataFrame | Callable[[], Figure],
        rows: pd.DataFrame,
        *,
        claim: str,
        n: str | None = None,
        note: str = "",
        switches: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Writes a table or figure with its caption into the profile's folder, and displays it.

        Args:
            name:     id of the output (DESIGN.md), ``tab_...`` or ``fig_...``.
            thing:    a DataFrame, or a function that draws a Figure; where there are no rows it is not called (nor is
                      a DataFrame without lines written), and the cell says n/r.
            rows:     the rows behind it: the caption takes images, seeds and data set from them.
            claim:    one sentence, what the reader should see.
            n:        what each number is measured on, where that is not the rows' test images.
            note:     what else the caption has to state.
            switches: settings printed under a table, the usual cause of numbers that cannot be reproduced.
            facts:    ``seeds`` or ``dataset``, where the rows do not tell.
        """
        if rows.empty and not (isinstance(thing, pd.DataFrame) and len(thing)):
            print(f"{name}: n/r in profile {self.profile}, nothing is written")
            return
        known = {name: [*rows[name]] if name in rows else [] for name in ("seed", "dataset", "n_test", "git_sha")}
        told = {
            "seeds": {int(s) for s in known["seed"]} - {-1},
            "dataset": ", ".join(sorted({*known["dataset"]} - {"-"})),
        }
        sizes = sorted({int(count) for count in known["n_test"]} - {0})
        measured = f"{' and '.join(f'{size:,}' for size in sizes)} test images" if sizes else "no images"
        ours = [commit for commit in known["git_sha"] if commit != "-"]  # "-": no row of ours
        dirty = sum(commit.endswith("-dirty") for commit in ours)
        noted = [note, f"{dirty:,} of {len(ours):,} rows from uncommitted code" if dirty else ""]
        more = {**told, **facts, "n": n or measured, "switches": "; ".join(filter(None, noted))}
        caption = figures.caption(claim, profile=self.profile, **more)
        shown = thing if isinstance(thing, pd.DataFrame) else thing()
        if isinstance(shown, pd.DataFrame):
            tables.write(shown, name, profile=self.profile, caption=caption, switches=switches or {})
            display(Markdown(tables.markdown(shown)))  # pandas' own view cuts long cells and long tables
        else:
            figures.save(shown, name, self.profile, caption=caption)
            display(shown, metadata={"image/png": {"alt": claim}})
        literally = caption.replace("*", r"\*")
        display(Markdown(f"**{name}.** {literally}"))


def start(cells: Sequence[str], profile: str, run: Collection[str] = ()) -> Session:
    """The session of this run, after checking the parameters; prints one line of facts.

    Args:
        cells:   IPython's ``In``: the source of the cells run so far, read only where papermill injected one of them.
        profile: the notebook's parameter of that name.
        run:     keys of a run's file, where the notebook carries one out (``Session.run``). What the file says of a
                 parameter that the notebook has too (``bits``) is the run's: the notebook's own keeps its default.

    Raises:
        ValueError: an unknown profile, or a parameter given to papermill that the notebook does not have; names it and
            the nearest valid one.
    """
    given = check_parameters(cells, run)
    shell, (defaults, _) = get_ipython(), _parameters(cells)
    for name in given.keys() & defaults.keys() - {"profile"} if shell else ():
        shell.user_ns[name] = defaults[name]
    paths.check_profile(profile)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    session = Session(profile, paths.results_dir(profile), paths.figures_dir(profile), device, given)
    folders = f"rows in {_short(session.results)}, figures in {_short(session.figures)}"
    print(f"profile {profile}; {folders}; device {device}")
    if profile != REFERENCE:
        print(
            f"What the text calls the reference run is profile {REFERENCE}; every output below is of profile {profile}."
        )
    return session


def explore(draw: Callable[..., Figure], **values: Sequence[Any]) -> None:
    """A figure with a slider for each named argument, redrawn when one moves.

        explore(lambda alpha=0.2: fig_curve(curves(alpha)), alpha=[0.1, 0.2, 0.3, 0.4])

    Under papermill, in HTML and wherever there are no widgets it is the picture ``draw()`` of the defaults, so that a
    page always shows something. Nothing is written: what the paper shows goes through ``Session.show``.

    Args:
        draw:   draws a Figure; each argument with a slider has a default, where the slider stands first.
        values: the places of each slider, in order.

    Raises:
        ValueError: an argument that ``draw`` does not have, or a default that is no place of its slider.
    """
    defaults = {name: p.default for name, p in inspect.signature(draw).parameters.items()}
    for name, places in values.items():
        if name not in defaults:
            raise ValueError(f"draw has no argument {name!r}: it has {', '.join(defaults)}{nearest(name, defaults)}")
        if defaults[name] not in places:
            raise ValueError(f"the default {defaults[name]!r} of {name} is no place of its slider: {list(places)}")
    picture = figures.rendered(draw(), "png", dpi=figures.SCREEN_DPI)
    bundle = {"image/png": base64.b64encode(picture).decode(), "text/plain": f"figure at {defaults}"}
    if any(name in os.environ for name in LIVE):
        bundle |= _sliders(draw, picture, {name: (defaults[name], places) for name, places in values.items()})
    display(bundle, raw=True)


def _sliders(draw: Callable[..., Figure], picture: bytes, controls: Mapping[str, tuple[Any, Sequence[Any]]]) -> dict:
    """The mime bundle of the sliders over their picture; empty where ipywidgets is not installed."""
    try:
        import ipywidgets
    except ImportError:
        return {}
    image = ipywidgets.Image(value=picture, format="png")
    sliders = {
        name: ipywidgets.SelectionSlider(value=first, options=places, description=name, continuous_update=False)
        for name, (first, places) in controls.items()
    }

    def redraw(_: Any) -> None:
        chosen = draw(**{name: slider.value for name, slider in sliders.items()})
        image.value = figures.rendered(chosen, "png", dpi=figures.SCREEN_DPI)

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    return ipywidgets.VBox([*sliders.values(), image])._repr_mimebundle_() or {}


def check_parameters(cells: Sequence[str], run: Collection[str] = ()) -> dict[str, Any]:
    """What papermill's injected cell says of a run: its keys among ``run``, if any of them is no parameter.

    Raises ``ValueError`` where it assigns another name that the parameters cell does not. Or a value of another kind:
    one value for a list, text for a number. Where a default is None, anything goes.
    """
    defaults, injected = _parameters(cells)
    of_run = {name: value for name, value in injected.items() if name in run}
    of_run = of_run if of_run.keys() - defaults else {}
    for name, value in injected.items():
        if name in of_run and name != "profile":
            continue
        if name not in defaults:
            known = f"this notebook has {', '.join(defaults)}"
            raise ValueError(f"unknown parameter {name!r}: {known}{nearest(name, defaults)}")
        kind, given = (float if type(v) is int else type(v) for v in (defaults[name], value))
        if isinstance(defaults[name], list) and given is not list:
            raise ValueError(f"{name} is a list, not {value!r}: write -y '{name}: [{value}]'")
        if defaults[name] is not None and given is not kind:
            raise ValueError(f"{name} is {value!r}: a value like {defaults[name]!r} is needed")
    return of_run


def _parameters(cells: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the parameters cell assigns, and what papermill's after it does; nothing where it injected none."""
    ran = [cell for cell in cells if _tree(cell).body]
    injected = [place for place, cell in enumerate(ran) if cell.startswith(INJECTED)]
    first = [ran[place - 1] for place in injected if place and "profile" in _names(ran[place - 1])]
    own = [cell for cell in first if not cell.startswith(INJECTED)]  # of which a mended one is run again
    return (_assigned(own[-1]), _assigned(ran[injected[-1]])) if own else ({}, {})


def _names(source: str) -> set[str]:
    targets = (target for node in _tree(source).body if isinstance(node, ast.Assign) for target in node.targets)
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _tree(source: str) -> ast.Module:
    """The cell; an empty one where it does not parse, for then it never ran."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def _assigned(source: str) -> dict[str, Any]:
    shell, found = get_ipython(), {}
    for node in _tree(source).body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            code = compile(ast.Expression(node.value), "<parameters>", "eval")
            found |= dict.fromkeys(names, eval(code, {**(shell.user_ns if shell else {}), **found}))
    return found


def _short(folder: Path) -> Path:
    return folder.relative_to(paths.ROOT) if folder.is_relative_to(paths.ROOT) else folder
