"""Rendered notebooks to send to a collaborator: one folder of self-contained HTML pages with an index.

    python -m hq_lib.results.share quick

A page asks no host and no other file for anything: formulas are MathML, figures lie inside, code is folded behind a
button, and what a study prints while it works is left out.
"""

import base64
import html
import re
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from hq_lib.results import atomic, outputs, paths

MAIN_TABLE = "tab_overview"
FRONT_FIGURES = ("fig_bn_ranges", "fig_pareto", "fig_crossbar_accuracy", "fig_edge_cloud")
SHOWN = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")
RUNS_A_STUDY = re.compile(r"\brun\(\s*profile\b")
"""A cell that does: its printed lines are progress, its results are displayed."""


def render(profile: str) -> Path:
    """Renders every executed notebook of a profile; returns the folder, which holds ``index.html``.

    Raises:
        FileNotFoundError: no notebook has been executed in that profile yet.
        ValueError: a formula that has no MathML; it is named.
    """
    build = paths.build_dir(profile)
    executed = sorted((build / "notebooks").glob("*.ipynb"))
    if not executed:
        raise FileNotFoundError(f"no executed notebooks in {build / 'notebooks'}: run `make paper PROFILE={profile}`")
    folder = build / "share"
    books = {notebook.stem: nbformat.read(notebook, as_version=4) for notebook in executed}
    names = ["", *books, ""]
    for before, (name, book), after in zip(names, books.items(), names[2:], strict=False):
        links = [("← " + before[:2], before), ("index", "index"), (after[:2] + " →", after)]
        atomic.write_text(folder / f"{name}.html", _page(book, links))
    atomic.write_text(folder / "index.html", _page(_index(profile, books), []))
    return folder


def _page(book: nbformat.NotebookNode, links: list[tuple[str, str]]) -> str:
    """The notebook as one HTML page; links are label and page name, "" for none."""
    exporter = HTMLExporter(
        template_name="basic", extra_template_paths=[str(Path(__file__).parent)], template_file="page.html.j2"
    )
    exporter.config.NbConvertBase.display_data_priority = list(SHOWN)  # no scripts, no widgets
    exporter.register_filter("markdown2html", markdown)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = [output for output in cell.outputs if not _is_progress(cell, output)]
    facts = {
        "title": _title(book),
        "links": [(label, target and f"{target}.html") for label, target in links if target],
        "has_code": bool(code),
        "code_css": HtmlFormatter().get_style_defs(".highlight"),
    }
    page, _ = exporter.from_notebook_node(book, resources=facts)
    page = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', page)
    page = re.sub(r'href="\.\./figures/(?:\w+/)?(\w+)\.\w+"', r'href="10_gallery.html#\1"', page)
    return re.sub(r'<a href="\.\./[^"]*">(.*?)</a>', r"\1", page, flags=re.S)  # files that are not sent


def _is_progress(cell: nbformat.NotebookNode, output: nbformat.NotebookNode) -> bool:
    if output.output_type != "stream":
        return False
    return bool(RUNS_A_STUDY.search(cell.source)) or (output.name == "stderr" and "Warning" not in output.text)


class _Renderer(IPythonRenderer):
    """Markdown as nbconvert has it, formulas as MathML."""

    def __init__(self) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")


def markdown(source: str) -> str:
    """The HTML of a piece of Markdown; ``ValueError`` names a formula that has no MathML."""
    return str(MarkdownWithMath(renderer=_Renderer()).render(source))


def _mathml(formula: str, display: str) -> str:
    found = convert(formula, display=display)
    if "\\" in found:
        raise ValueError(f"the formula ${formula}$ has no MathML: {found}; write it with simpler commands")
    return found


def _index(profile: str, books: dict[str, nbformat.NotebookNode]) -> nbformat.NotebookNode:
    """The first page as a notebook without code: the main table, four figures, one sentence a notebook."""
    figures = paths.figures_dir(profile)
    table = figures / f"{MAIN_TABLE}.md"
    texts = [
        f"# Quantization workbook\n\nExecuted notebooks, profile **{profile}**; every page is self-contained.",
        table.read_text(encoding="utf-8") if table.exists() else f"{MAIN_TABLE}: n/r in profile {profile}",
        "## The notebooks\n\n" + "\n".join(f"- {_sentence(n, b)}" for n, b in books.items()),
        "## Four figures",
        *(_figure(figures, name) for name in FRONT_FIGURES),
    ]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text) for text in texts])


def _figure(folder: Path, name: str) -> str:
    picture, caption = folder / f"{name}.png", folder / f"{name}.caption.txt"
    if not picture.exists():
        return f"{name}: n/r"
    claim = html.escape(caption.read_text(encoding="utf-8").strip() if caption.exists() else name)
    source = base64.b64encode(picture.read_bytes()).decode()
    maker = next(output.notebook for output in outputs.OUTPUTS if output.id == name)
    caption = f'<figcaption>{claim} <a href="{maker}.html">{maker[:2]}</a></figcaption>'
    return f'<figure><img alt="{claim}" src="data:image/png;base64,{source}">{caption}</figure>'


def _title(book: nbformat.NotebookNode) -> str:
    return next((line.lstrip("# ") for cell in book.cells for line in cell.source.splitlines() if line), "untitled")


def _sentence(name: str, book: nbformat.NotebookNode) -> str:
    """The notebook's title, as a link, and its question."""
    found = re.search(r"^\*\*Question\.\*\* *(.*)$", book.cells[0].source if book.cells else "", re.M)
    failed = " (stopped with an error)" if book.metadata.get("papermill", {}).get("exception") else ""
    return f"[{html.escape(_title(book))}]({name}.ipynb){failed}: {found.group(1) if found else ''}"


if __name__ == "__main__":
    print(f"pages in {render(sys.argv[1])}: open index.html")
