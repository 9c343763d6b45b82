import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from hq_lib.results import paths, share

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
LOADS = {"src", "srcset", "href", "data", "poster", "action", "formaction", "background", "xlink:href", "ping"}
pytestmark = pytest.mark.filterwarnings("default")  # nbconvert's own libraries


def requests_of(page):
    """What a browser would fetch to show the page: every address but those of links to click, and of inline data."""
    soup = BeautifulSoup(page, "html.parser")
    found = []
    for tag in soup.find_all(True):
        for name in LOADS & set(tag.attrs):
            if not (tag.name == "a" and name == "href") and not tag[name].startswith("data:"):
                found.append((tag.name, tag[name]))
    styles = " ".join([*(t.get_text() for t in soup.find_all("style")), *(t["style"] for t in soup.select("[style]"))])
    found += [("css", url) for url in re.findall(r"url\(['\"]?([^)'\"]*)|@import([^;]*)", styles) if "data:" not in url]
    return found + [("script", t.get_text()) for t in soup.find_all("script") if "://" in t.get_text()]


def test_the_check_sees_what_would_be_fetched():
    page = """<link rel="stylesheet" href="https://x/a.css"><script src="//cdn/x.js"></script><iframe src="b.html">
    </iframe><style>@font-face{src:url(https://x/f.woff)}</style><p style="background:url(i.png)"><object data="o">
    </object><script>import("https://x/m.mjs")</script><a href="https://paper">click</a><img src="data:image/png,">"""
    assert len(requests_of(page)) == 7


def executed(name, *cells, title="# 01 · A title\n\n**Question.** Does it render?"):
    folder = paths.build_dir("quick") / "notebooks"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title), *cells])
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / f"{name}.ipynb")


def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def printed(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def displayed(**data):
    return nbformat.v4.new_output("display_data", data={key.replace("_", "/"): value for key, value in data.items()})


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HQ_OUT", str(tmp_path_factory.mktemp("pages")))
        return rendered()


def rendered():
    widget = displayed(image_png=PIXEL)
    widget.data["application/vnd.jupyter.widget-view+json"] = {"model_id": "1"}
    executed(
        "01_float_training",
        nbformat.v4.new_markdown_cell("With $\\alpha_{\\mathrm{DSQ}} < 1$, see [02](02_bn_fold.ipynb) and"
                                      " [rows](../data/results/qat.csv), [a figure](../figures/fig_pareto.png)."),
        code("rows = study.run(profile, seeds=seeds)", printed("[1/2, 3 s] pact: 91 %"), displayed(text_plain="kept")),
        code("print(accuracy)", printed("said aloud"), printed("0%|   | 0/5", "stderr"),
             printed("UserWarning: look", "stderr")),
        code("explore(draw)", widget),
    )  # fmt: skip
    executed("02_bn_fold", title="# 02 · <Other>")
    folder = share.render("quick")
    return {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.html")}


def test_nothing_is_fetched(pages):
    assert {name: requests_of(page) for name, page in pages.items()} == {name: [] for name in pages}
    assert "://" not in pages["01_float_training"].replace('xmlns="http://www.w3.org/1998/Math/MathML"', "")


def test_formulas_are_mathml(pages):
    soup = BeautifulSoup(pages["01_float_training"], "html.parser")
    assert soup.math.get_text() == "αDSQ<1"
    assert "$" not in soup.main.get_text()


def test_progress_is_left_out_and_what_is_said_stays(pages):
    page = pages["01_float_training"]
    assert "[1/2" not in page
    assert "0/5" not in page
    assert all(text in page for text in ("kept", "said aloud", "UserWarning: look"))


def test_a_slider_is_a_picture(pages):
    page = pages["01_float_training"]
    assert f"data:image/png;base64,{PIXEL}" in page
    assert "widget-view" not in page


def test_code_is_folded_behind_a_button(pages):
    soup = BeautifulSoup(pages["01_float_training"], "html.parser")
    assert len(soup.select("details.code:not([open])")) == 3
    assert soup.button.get_text() == "show code"
    assert not BeautifulSoup(pages["02_bn_fold"], "html.parser").button


def test_one_page_leads_to_the_next(pages):
    first, second = (BeautifulSoup(pages[name], "html.parser") for name in ("01_float_training", "02_bn_fold"))
    assert [a["href"] for a in first.nav.find_all("a")] == ["index.html", "02_bn_fold.html"]
    assert [a["href"] for a in second.nav.find_all("a")] == ["01_float_training.html", "index.html"]
    assert [a["href"] for a in first.main.find_all("a")] == ["02_bn_fold.html", "10_gallery.html#fig_pareto"]


def test_the_index_shows_the_main_table_four_figures_and_a_sentence_a_notebook(out_dir):
    executed("02_bn_fold", title="# 02 · <Other>\n\n**Question.** Does it render?")
    figures = paths.figures_dir("quick")
    figures.mkdir(parents=True)
    (figures / f"{share.MAIN_TABLE}.md").write_text("Claim.\n\n| step |\n|---|\n| float |\n")
    (figures / "fig_pareto.png").write_bytes(b"picture")
    index = BeautifulSoup((share.render("quick") / "index.html").read_text(encoding="utf-8"), "html.parser")
    assert index.table.get_text(" ", strip=True) == "step float"
    assert len(index.find_all("img")) == 1
    assert "fig_edge_cloud: n/r" in index.get_text()
    assert index.li.get_text() == "02 · <Other>: Does it render?"
    assert index.li.a["href"] == "02_bn_fold.html"


def test_a_formula_without_mathml_is_named(out_dir):
    executed("01_a", title="# 01\n\nWith $\\nosuchcommand x$.")
    with pytest.raises(ValueError, match=r"nosuchcommand x.*simpler"):
        share.render("quick")


@pytest.mark.parametrize("path", sorted((paths.ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_formula_of_the_notebooks_is_mathml(path):
    prose = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    page = BeautifulSoup("".join(map(share.markdown, prose)), "html.parser")
    assert "$" not in page.get_text()
    assert requests_of(str(page)) == []


def test_nothing_executed_yet_says_what_to_run(out_dir):
    with pytest.raises(FileNotFoundError, match="make paper PROFILE=quick"):
        share.render("quick")
