import re

import nbformat
import pytest

from hq_lib.results import paths, share


def executed(folder, name, *, source="# 01 · A title\n\n**Question.** Does it render?"):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.mark.filterwarnings("default")
def test_pages_are_self_contained_and_indexed(out_dir):
    executed(paths.build_dir("quick") / "notebooks", "01_a")
    executed(paths.build_dir("quick") / "notebooks", "02_b", source="# 02 · <Other>")
    folder = share.render("quick")
    index = (folder / "index.html").read_text()
    assert '<a href="01_a.html">01 · A title</a>' in index
    assert "Does it render?" in index
    assert "&lt;Other&gt;" in index
    page = (folder / "01_a.html").read_text()
    assert not re.search(r'<img[^>]+src="(?!data:)', page)


def test_nothing_executed_yet_says_what_to_run(out_dir):
    with pytest.raises(FileNotFoundError, match="make paper PROFILE=quick"):
        share.render("quick")
