"""The shape of the library: eleven rooms, each importing only rooms below it, and no circle of files."""

import ast
from graphlib import TopologicalSorter

import pytest

from hq_lib.results import dependencies, paths

ROOMS = [
    "results",
    "data",
    "models",
    "quantizers",
    "graph",
    "training",
    "ptq",
    "integer",
    "deploy",
    "crossbar",
    "studies",
]
LIBRARY = paths.ROOT / "hq_lib"
FILES = sorted(LIBRARY.rglob("*.py"))


def imported(path):
    """The hq_lib files that a file imports, inside functions too; a package's face only where it is meant."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "hq_lib":
                found.add(file_of(name))
    return found - {path}


def file_of(name):
    """The file of a dotted name: of the module itself, or of the module that holds the name."""
    place = paths.ROOT.joinpath(*name.split("."))
    for candidate in (place.with_suffix(".py"), place / "__init__.py", place.parent.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return place.parent / "__init__.py"


def room(path):
    return path.relative_to(LIBRARY).parts[0]


def test_the_rooms_are_those_of_the_plan():
    assert {p.name for p in LIBRARY.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ROOMS)


INSIDE = [path for path in FILES if room(path) in ROOMS]


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_a_room_imports_only_rooms_below_it(path):
    above = [f for f in imported(path) if room(f) in ROOMS and ROOMS.index(room(f)) > ROOMS.index(room(path))]
    assert above == []


def test_no_files_import_each_other_in_a_circle():
    tuple(TopologicalSorter({path: imported(path) for path in FILES}).static_order())  # CycleError names the files


def test_the_colour_of_one_study_is_no_input_of_another():
    """Recolouring fig_drift must not rerun notebook 03."""
    assert not [f for f in dependencies.of_notebook("notebooks/03_dsq_pact_qat.ipynb") if "/crossbar/" in f]
    assert "hq_lib/studies/crossbar/figures.py" in dependencies.of_notebook("notebooks/08_crossbar.ipynb")
