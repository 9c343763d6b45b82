"""Which files of hq_lib a notebook or module imports, directly or through others; read from the source, nothing is run.

The Snakefile lists them as inputs, so that a notebook runs again exactly when something it uses has changed.
"""

import ast
import json
from functools import cache
from pathlib import Path

from hq_lib import HOMES
from hq_lib.results.paths import ROOT

PACKAGE = "hq_lib"


def of_notebook(notebook: Path | str) -> list[str]:
    """Paths relative to the repository, sorted. A cell that does not parse (a magic, say) is passed over."""
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    return of_sources(*("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))


def of_sources(*sources: str) -> list[str]:
    """The same for pieces of Python source."""
    found: set[Path] = set()
    pending = list(sources)
    while pending:
        new = _imported(pending.pop()) - found
        found |= new
        pending += [file.read_text(encoding="utf-8") for file in new]
    return sorted(file.relative_to(ROOT).as_posix() for file in found)


@cache
def _imported(source: str) -> frozenset[Path]:
    """The hq_lib files that a source imports, ``__init__`` files and what it asks of a face (``hq.fit``) included."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return frozenset()
    names: list[str] = []
    faces = {a.asname for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name == PACKAGE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in faces:
            names.append(f"{PACKAGE}.{HOMES.get(node.attr, node.attr)}")
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(file for name in names if name.split(".")[0] == PACKAGE for file in _files(name))


def _files(name: str) -> list[Path]:
    parts = name.split(".")
    files = [ROOT.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    return [file for file in [*files, ROOT.joinpath(*parts).with_suffix(".py")] if file.is_file()]
