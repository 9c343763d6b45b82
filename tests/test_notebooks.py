"""Every notebook: its shape (STYLE.md's limits), no outputs in git, and a run of it in the smoke profile."""

import ast
import json
import os
import re
import statistics
import sys
import warnings
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
import yaml
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from traitlets.config import Config

from hq_lib import models
from hq_lib.quantizers import straight_through
from hq_lib.results import dependencies, notebook, paths, tables
from hq_lib.results.share import RUNS_A_STUDY
from hq_lib.studies import every

NOTEBOOKS = sorted((paths.ROOT / "notebooks").glob("*.ipynb"))
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def code_lines(source):
    return sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#"))


@names
def test_no_outputs_in_git(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells(path, "code"))
    assert "papermill" not in content["metadata"]
    assert all("papermill" not in c["metadata"] for c in content["cells"])


@names
def test_format_and_kernel(path):
    content = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(content)
    assert content.metadata.kernelspec.name == "python3"
    assert content.metadata.language_info.name == "python"
    ids = [c.id for c in content.cells]
    assert len(set(ids)) == len(ids)


@names
def test_parameters_come_first_one_assignment_a_line(path):
    first = cells(path, "code")[0]
    assert "parameters" in first["metadata"].get("tags", [])
    tree = ast.parse("".join(first["source"]))
    assert all(isinstance(node, ast.Assign) for node in tree.body)
    assert len({node.lineno for node in tree.body}) == len(tree.body)
    assert "profile" in {target.id for node in tree.body for target in node.targets}


@names
def test_the_profile_is_a_parameter_that_decides(path):
    """``papermill -p profile full`` reaches every notebook: the parameter is there and used.

    Map and gallery, which only read, show the committed reference by default; the others run quick.
    """
    sources = ["".join(c["source"]) for c in cells(path, "code")]
    values = {t.id: node.value for node in ast.parse(sources[0]).body for t in node.targets}
    assert ast.literal_eval(values["profile"]) == ("full" if path.stem in ("00_map", "10_gallery") else "quick")
    assert sum("notebook.start(In, profile" in source for source in sources[1:]) == 1
    assert not any(re.search(r"^profile\s*=", source, re.MULTILINE) for source in sources[1:])


@names
def test_cells_are_small(path):
    sizes = [code_lines("".join(c["source"])) for c in cells(path, "code")]
    assert statistics.median(sizes) <= 7
    assert sorted(sizes)[int(0.9 * (len(sizes) - 1))] <= 15
    assert max(sizes) <= 25
    assert sum(sizes) <= 250


@names
def test_one_question_and_its_findings(path):
    prose = ["".join(c["source"]) for c in cells(path, "markdown")]
    question = re.search(r"\*\*Question\.\*\*(.*?)(?:\n\n|\Z)", prose[0], re.S)
    assert question, "the first cell asks no question"
    assert question.group(1).count("?") == 1
    assert any(re.search(r"^#+ .*Findings", p, re.M) for p in prose)


QUOTED = re.compile(r"\*\*(Answer in brief|Right or wrong)[^*]*\*\*(.*?)(?=\n\n\*\*|\Z)", re.S)


@names
def test_numbers_in_the_text_say_whose_they_are(path):
    """An answer that quotes an accuracy says of which run: the output below may be another's."""
    for cell in cells(path, "markdown"):
        for name, text in QUOTED.findall("".join(cell["source"])):
            if re.search(r"\d+\.\d+ (%|points)|\d+\.\d+ and \d+\.\d+ %", text):
                assert re.search("reference run|profile (full|quick)", text), name


@names
def test_a_cell_that_runs_a_study_prints_nothing_else(path):
    """Pages to share leave out what it prints, for that is progress."""
    running = [text for c in cells(path, "code") if RUNS_A_STUDY.search(text := "".join(c["source"]))]
    assert not [text for text in running if "print(" in text]


def test_nothing_is_defined_twice():
    defined = defaultdict(set)
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            for name in re.findall(r"^(?:def|class) (\w+)", "".join(cell["source"]), re.M):
                defined[name].add(path.name)
    for path in (paths.ROOT / "hq_lib").rglob("*.py"):
        for name in re.findall(r"^(?:def|class) ([a-z]\w+|[A-Z]\w+)", path.read_text(encoding="utf-8"), re.M):
            if name in defined:
                defined[name].add(path.name)
    assert {name: where for name, where in defined.items() if len(where) > 1} == {}


SHORT = yaml.safe_load((paths.ROOT / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))


def test_the_short_lists_are_of_notebooks():
    assert set(SHORT) <= {path.stem for path in NOTEBOOKS}


@pytest.fixture(scope="module")
def smoke_out(tmp_path_factory):
    """An HQ_OUT of all notebooks that this process runs, with an output that map and gallery find in any order."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("smoke")
        patch.setenv("HQ_OUT", str(folder))
        patch.setenv("HQ_FUSE", "0")
        tables.write(pd.DataFrame({"network": ["x"]}), "tab_bn_fold", profile="smoke", caption="x", switches={})
        yield folder


LOADED_BEFORE_THE_FORK = every()


def run_cells(sources, folder, said):
    """In a forked process, which has the imports of this one: the cells one after another, to the first error."""
    os.chdir(folder)
    straight_through._state["on"] = False
    with said.open("w") as out, redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("error")
        shell = InteractiveShell.instance(config=Config({"HistoryManager": {"hist_file": ":memory:"}}))
        ended = all(shell.run_cell(source, store_history=True).success for source in sources)
        print("", flush=True)
    os._exit(0 if ended else 1)


@names
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_it_runs(path, smoke_out, tmp_path):
    """Cell by cell as papermill gives it to a kernel; what a kernel and its start add is ``IN_A_KERNEL``'s."""
    given = parameterize_notebook(load_notebook_node(str(path)), {"profile": "smoke", **SHORT.get(path.stem, {})})
    sources, said = [c.source for c in given.cells if c.cell_type == "code"], tmp_path / "said"
    process = get_context("fork").Process(target=run_cells, args=(sources, path.parent, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()[-6000:]


def run_until(name, mark, said, *more, **given):
    """The exit code of a notebook's cells up to the one that says ``mark``, and then of ``more``."""
    path = paths.ROOT / "notebooks" / f"{name}.ipynb"
    made = parameterize_notebook(load_notebook_node(str(path)), {"profile": "smoke", **given})
    sources = [c.source for c in made.cells if c.cell_type == "code"]
    last = next(i for i, source in enumerate(sources) if mark in source)
    process = get_context("fork").Process(target=run_cells, args=([*sources[: last + 1], *more], path.parent, said))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_folder_of_ones_own_is_asked_for_its_own_classes(tmp_path):
    """The sample's question (animal or thing) is none of theirs, and ten pictures train where 32 fill a batch."""
    for name, count in {"cat": 8, "dog": 4, "eel": 8}.items():
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (20 * i, 40, 60)).save(tmp_path / "pets" / name / f"{i}.png")
    said, short = tmp_path / "said", {"size": 32, "epochs": 1, "iterations": 1, "root": str(tmp_path / "pets")}
    told = "print(train.spec.classes, torch.bincount(train.labels).tolist(), torch.bincount(test.labels).tolist())"
    assert run_until("11_your_network", "round_biases", said, told, **short) == 0, said.read_text()[-6000:]
    assert "('cat', 'dog', 'eel') [4, 2, 4] [4, 2, 4]" in said.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_no_folder_is_the_sample_or_the_digits_and_not_the_repository(tmp_path):
    said, told = tmp_path / "said", "print('read:', folder.name, train.spec.name, train.spec.classes)"
    assert run_until("11_your_network", "SPECS", said, told, root="", size=32) == 0, said.read_text()[-6000:]
    assert re.search(r"read: imagenet_sample (imagenet \('animal', 'thing'\)|digits)", said.read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize(
    ("name", "mark", "given", "named"),
    [
        ("11_your_network", "SPECS", {"root": "~/petz"}, rf"image folder {re.escape(str(Path.home() / 'petz'))} does"),
        ("11_your_network", "SPECS", {"root": "petz"}, r"image folder \S*petz does not exist"),
        ("09_edge_cloud", "workbench", {"networks": []}, r"networks is \[\]"),
        ("09_edge_cloud", "workbench", {"edges": []}, r"edges \[\]"),
        ("03_dsq_pact_qat", "init_from", {"methods": ["lqs"]}, r"unknown QAT method 'lqs'.*mean 'lsq'"),
        ("08_crossbar", "check_known", {"layer": "layer2.1.conv3"}, r"unknown layer .*mean 'layer2.1.conv"),
    ],
)
def test_what_a_notebook_cannot_run_with_is_named(name, mark, given, named, tmp_path):
    assert run_until(name, mark, tmp_path / "said", **given) == 1
    assert re.search(named, (tmp_path / "said").read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_images_of_one_channel_are_cut_bit_for_bit(tmp_path):
    """A batch of them counts as contiguous in another order of bytes too, in which PyTorch sums otherwise."""
    given = {"networks": ["lenet"], "edges": ["integer"], "cuts": []}
    assert run_until("09_edge_cloud", "bit for bit", tmp_path / "said", **given) == 0, (tmp_path / "said").read_text()


IN_A_KERNEL = "00_map"


@pytest.mark.filterwarnings("default")  # the kernel's own process and client libraries, not ours
def test_papermill_runs_one_in_a_kernel(smoke_out):
    executed = smoke_out / f"{IN_A_KERNEL}.ipynb"
    path = paths.ROOT / "notebooks" / executed.name
    papermill.execute_notebook(path, executed, parameters={"profile": "smoke"}, progress_bar=False, cwd=path.parent)
    outputs = [o for c in cells(executed, "code") for o in c["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr" and "Warning" in "".join(o["text"])]


SUBSETS = {
    "03_dsq_pact_qat": {"methods": ["lsq"], "bits": [[2, 2]]},
    "04_aciq_qdrop_ptq": {"nets": ["resnet18"], "recipes": ["minmax"]},  # no such weights here
    "05_calibration_selection": {"choices": ["random"], "imagenet_nets": []},
    "07_integer_export": {"networks": ["lenet"], "bits": [[8, 8]]},
    "08_crossbar": {"studies": ["no_error"]},
    "09_edge_cloud": {"networks": ["resnet20_dsq_w2a2_s0"], "edges": ["integer"]},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(SUBSETS))
@pytest.mark.filterwarnings("default")
def test_a_subset_runs_to_the_end_and_what_it_leaves_out_is_not_run(name, tmp_path, monkeypatch):
    """On fresh outputs; a figure or table without a row is n/r and is not written."""
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    path, executed = paths.ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "executed.ipynb"
    chosen = {"profile": "smoke", **SUBSETS[name]}
    papermill.execute_notebook(path, executed, parameters=chosen, progress_bar=False, cwd=path.parent)
    printed = "".join("".join(o.get("text", "")) for c in cells(executed, "code") for o in c["outputs"])
    for output in re.findall(r"(\w+): n/r in profile smoke", printed):
        assert not list((tmp_path / "figures" / "smoke").glob(f"{output}.*"))
    assert "n/r in profile smoke" in printed or name in ("05_calibration_selection", "09_edge_cloud")


@pytest.mark.filterwarnings("default")
def test_an_unknown_parameter_is_named(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"unknown parameter 'seed'.*did you mean 'seeds'"):
        papermill.execute_notebook(
            NOTEBOOKS[1], tmp_path / "x.ipynb", parameters={"profile": "smoke", "seed": 1}, progress_bar=False
        )


RUNS = {
    "03_dsq_pact_qat": ("seed001_toynet_cfg1.yaml", "toynet_mpact_cfg-1"),
    "06_hybrid_precision": ("seed000_hybrid.yaml", "resnet20_hybrid_w2a4"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.filterwarnings("default")
def test_papermill_takes_the_file_of_a_run(name, tmp_path, monkeypatch):
    """``papermill -f`` with the very file of ``hq train``; only its length is cut. The study keeps its own bits."""
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    file, said = RUNS[name]
    given = yaml.safe_load((paths.ROOT / "notebooks" / "configs" / file).read_text(encoding="utf-8"))
    short = {"profile": "smoke", "n_train": 100, "n_val": 100, "n_test": 100, "protocol": {"epochs": 1}, "n_calib": 16}
    if given["model"] == "toynet":
        short["weights"] = str(tmp_path / "float.pt")
        torch.save(models.build("toynet").state_dict(), short["weights"])
        short["data"] = "cifar10"
    source, executed = paths.ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "executed.ipynb"
    papermill.execute_notebook(
        source, executed, parameters={**given, **short}, progress_bar=False, cwd=tmp_path, log_output=False
    )
    texts = ["".join(o.get("data", {}).get("text/plain", "")) for c in cells(executed, "code") for o in c["outputs"]]
    (line,) = [text for text in texts if said in text]
    assert re.search(r"\d+\.\d\d % of the test images", line)
    assert len(list(tmp_path.rglob(given["output"]))) == 1


def test_the_file_of_a_run_goes_to_the_run_and_the_notebook_keeps_its_bits():
    first, run = "profile = 'quick'\nbits = [2, 4, 8]\nseeds = [0]", ("profile", "model", "bits", "seed")
    injected = "# Parameters\nmodel = 'resnet20'\nbits = [2, 4]\nprofile = 'smoke'\nseeds = [1]\n"
    want = {"model": "resnet20", "bits": [2, 4], "profile": "smoke"}
    assert notebook.check_parameters([first, injected], run) == want
    assert notebook.check_parameters([first, "# Parameters\nbits = [2, 4]\n"], run) == {}  # the notebook's own
    with pytest.raises(ValueError, match="'modell'"):
        notebook.check_parameters([first, injected.replace("model", "modell")], run)


def test_unknown_parameters_are_found_in_the_injected_cell():
    first, injected = "profile = 'quick'\nseeds = [0]", "# Parameters\nprofile = 'smoke'\nseds = [1]\n"
    with pytest.raises(ValueError, match=r"'seds'.*profile, seeds.*did you mean 'seeds'"):
        notebook.check_parameters([first, injected])
    notebook.check_parameters([first, "# Parameters\nseeds = [1]\n"])
    notebook.check_parameters([first, "import torch"])
    notebook.check_parameters(["import os", first, "# Parameters\nseeds = [1]\n"])
    notebook.check_parameters(["profile = 'quick'\nseeds = list(range(3))", "# Parameters\nseeds = [1]"])
    again = ["rows = 1 / 0", "# Parameters\nb = 2"]  # other cells are never read
    notebook.check_parameters([first, "# Parameters\nseeds = [1]", first + "\nb = 1", "# Parameters\nb = 2", *again])


@pytest.mark.parametrize(
    "cells",
    [
        ["profile = 'smoke'\nseeds = [0", "profile = 'smoke'\nseeds = [0]"],  # a slip, mended and run again
        ["profile = 'smoke'\nseeds = list(range(3))"],
        ["import os\nhere = os.getcwd()", "profile = 'smoke'"],
        ["profile = 'smoke'\nseeds = [0]", "# Parameters\nseeds = [1", "# Parameters\nseeds = [1]"],
        ["# Parameters\nprofile = 'smoke'"],  # an executed copy, from its second cell on
    ],
)
def test_somebody_who_sits_at_the_notebook_may_run_its_cells_as_he_likes(cells, tmp_path, monkeypatch):
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    assert notebook.start(["", *cells, "session = notebook.start(In, profile)"], "smoke").run == {}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("seeds = 0", r"-y 'seeds: \[0\]'"),
        ("profile = 3", "a value like 'quick'"),
        ("n = 'many'", "a value like 0.5"),
        ("n = 2", None),
    ],
)
def test_a_parameter_of_another_kind_is_refused_with_the_way_to_write_it(given, named):
    cells = ["profile = 'quick'\nseeds = [0]\nn = 0.5\nany = None", f"# Parameters\n{given}\nany = 'x'"]
    if named is None:
        notebook.check_parameters(cells)
        return
    with pytest.raises(ValueError, match=named):
        notebook.check_parameters(cells)


def test_dependencies_follow_imports():
    found = dependencies.of_sources("from hq_lib.training import fit\nimport numpy")
    assert "hq_lib/training/loop.py" in found
    assert "hq_lib/data/sources.py" in found  # through hq_lib.data
    assert "hq_lib/share.py" not in found
    assert dependencies.of_sources("%magic") == []
    face = dependencies.of_sources("import hq_lib as hq\nhq.fit(net)\nhq.crossbar.Adc(8)")
    assert {"hq_lib/training/loop.py", "hq_lib/crossbar/circuit.py"} <= set(face)
    assert "hq_lib/deploy/__init__.py" not in dependencies.of_sources("import hq_lib as hq\nhq.fit(net)")
