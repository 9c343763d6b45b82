"""What every notebook calls first: are the parameters known, which profile is this, where do outputs go."""

import ast
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hq_lib.results import paths

INJECTED = "# Parameters"  # the first line of the cell that papermill inserts after the parameters cell


@dataclass(frozen=True)
class Session:
    """The facts a notebook run goes by."""

    profile: str
    """smoke, quick or full."""
    results: Path
    """Folder of result rows."""
    figures: Path
    """Folder of figures and tables."""
    device: torch.device
    """The GPU where there is one, else the CPU."""


def start(cells: Sequence[str], profile: str) -> Session:
    """The session of this run, after checking the parameters; prints one line of facts.

    Args:
        cells:   IPython's ``In``: the source of the cells run so far, the parameters cell being the first code cell.
        profile: the notebook's parameter of that name.

    Raises:
        ValueError: an unknown profile, or a parameter given to papermill that the notebook does not have; names it and
            the nearest valid one.
    """
    check_parameters([cell for cell in cells if cell.strip()])
    paths.check_profile(profile)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(profile, paths.results_dir(profile), paths.figures_dir(profile), device)
    folders = f"rows in {_short(session.results)}, figures in {_short(session.figures)}"
    print(f"profile {profile}; {folders}; device {device}")
    return session


def check_parameters(cells: Sequence[str]) -> None:
    """Raises ``ValueError`` where papermill's injected cell assigns a name that the parameters cell does not."""
    if len(cells) < 2 or not cells[1].startswith(INJECTED):
        return
    valid = assigned_names(cells[0])
    for name in assigned_names(cells[1]):
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown parameter {name!r}: this notebook has {', '.join(valid)}{hint}")


def assigned_names(source: str) -> list[str]:
    """Names assigned at the top level of a cell, in order."""
    targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _short(folder: Path) -> Path:
    return folder.relative_to(paths.ROOT) if folder.is_relative_to(paths.ROOT) else folder
