"""README.md and docs/: numbers are those of the rows, code runs, the command line takes every line, links lead on."""

import re
import shlex

import pytest
import torch
import typer
from torch import nn

from hq_lib import __main__ as command
from hq_lib.results.paths import ROOT
from hq_lib.studies import overview

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
names = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", overview.DOCUMENTS)
def test_numbers_are_those_of_the_rows(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- rows: " in text
    assert overview.written(text) == text, "run `make readme`"


def test_a_number_that_drifts_is_seen():
    drifted = README.replace("92.23", "92.24")
    assert drifted != README
    assert overview.written(drifted) == README


def test_an_unknown_marker_is_an_error():
    with pytest.raises(KeyError, match="tab_nothing"):
        overview.written("<!-- rows: tab_nothing -->\n<!-- end -->")


def test_results_stand_between_markers_only():
    outside = re.sub(r"<!-- rows: .*?<!-- end -->", "", README, flags=re.S)
    assert not re.findall(r"\d+\.\d+ %|±", outside)


def test_it_is_read_in_minutes():
    assert len(README.split()) <= 1100


@names
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def lines_of(text):
    """The lines of its code blocks and code spans that call ``hq``."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    spans = re.findall(r"`(hq [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [line for line in [*blocks, *spans] if line.startswith("hq ")]


@names
def test_the_command_line_takes_every_line(path):
    verbs = typer.main.get_command(command.app).commands
    for line in lines_of(path.read_text(encoding="utf-8")):
        verb, *words = shlex.split(line, comments=True)[1:]
        options = {name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= options, line
        assert all((ROOT / word).exists() for word in words if word.startswith("notebooks/")), line


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (300,))
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = {"net": nn.Sequential(body, nn.Linear(8, 10)).eval(), "x_train": x, "y_train": y, "x_test": x, "y_test": y}
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, names)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.safetensors", "mine.onnx"}
