"""``explore``: a slider where somebody can move it, else a picture. ``Session.show``: what a caption has to state."""

import base64

import pandas as pd
import pytest

from hq_lib.results import figures, notebook, paths


def line(slope=2, start=0):
    figure, axes = figures.new_figure()
    axes[0, 0].plot([0, 1], [start, start + slope])
    return figure


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(notebook, "display", lambda bundle, raw: bundles.append(bundle))
    for name in notebook.LIVE:
        monkeypatch.delenv(name, raising=False)
    return bundles


def png(figure):
    return figures.rendered(figure, "png", dpi=figures.SCREEN_DPI)


def test_without_a_reader_it_is_the_picture_of_the_defaults(shown):
    notebook.explore(line, slope=[1, 2, 3])
    assert set(shown[0]) == {"image/png", "text/plain"}
    assert base64.b64decode(shown[0]["image/png"]) == png(line())


def test_a_slider_redraws_and_the_picture_stays_for_readers_without_widgets(shown, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    monkeypatch.setenv(notebook.LIVE[0], "here")
    boxes, make = [], widgets.VBox
    monkeypatch.setattr(widgets, "VBox", lambda children: boxes.append(make(children)) or boxes[-1])
    notebook.explore(line, slope=[1, 2, 3], start=[0, 5])
    slope, start, image = boxes[0].children
    assert shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == boxes[0].model_id
    assert base64.b64decode(shown[0]["image/png"]) == image.value == png(line())
    slope.value = 3
    assert image.value == png(line(slope=3))
    start.value = 5
    assert image.value == png(line(slope=3, start=5))


@pytest.mark.parametrize(
    ("values", "named"), [({"slop": [1, 2]}, "did you mean 'slope'"), ({"slope": [1, 3]}, r"default 2 of slope")]
)
def test_a_wrong_slider_is_named(shown, values, named):
    with pytest.raises(ValueError, match=named):
        notebook.explore(line, **values)
    assert shown == []


def test_a_caption_counts_the_rows_of_uncommitted_code(out_dir, monkeypatch):
    said = []
    monkeypatch.setattr(notebook, "display", lambda thing, **_: said.append(thing))
    session = notebook.start(["profile = 'quick'"], "quick")
    rows = pd.DataFrame({"git_sha": ["a1", "a1-dirty", "b2-dirty"], "seed": [0, 1, 2], "n_test": 100, "dataset": "d"})
    session.show("tab_some", pd.DataFrame({"x": ["1"]}), rows, claim="One")
    told = (paths.figures_dir("quick") / "tab_some.md").read_text().splitlines()[0]
    assert told == (
        "One. [d; profile quick; n = 100 test images; 3 seeds (0, 1, 2); 2 of 3 rows from uncommitted code]"
    )
    assert said[1].data == f"**tab_some.** {told}"
    session.show("fig_some", line, rows.iloc[:1], claim="One")
    assert "uncommitted" not in (paths.figures_dir("quick") / "fig_some.caption.txt").read_text()


def test_another_profile_says_what_the_text_quotes(out_dir, capsys):
    notebook.start(["profile = 'quick'"], "quick")
    assert "reference run is profile full" in capsys.readouterr().out
    notebook.start(["profile = 'full'"], "full")
    assert "reference run" not in capsys.readouterr().out
