"""Killed at any moment, in a full or a closed folder, or beside another writer: nothing is lost and nothing half done.

Each action runs in a forked process that SIGKILL ends at a random moment; the same action afterwards must leave the
bits of a run that nobody disturbed, and no temporary file. `HQ_KILLS=50` kills each so often.
"""

import hashlib
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch._dynamo
import yaml
from matplotlib.figure import Figure
from test_command import NET, PTQ, RUN
from torch import nn
from typer.testing import CliRunner

from hq_lib import data, deploy, graph, integer, models
from hq_lib.__main__ import app
from hq_lib.crossbar import IdealEngine, RecordEngine, recording
from hq_lib.crossbar.trace import load_parts
from hq_lib.ptq import progress, selection
from hq_lib.results import outputs, paths, store, tables
from hq_lib.results.figures import style
from hq_lib.studies import every, steps
from hq_lib.training import TrainConfig, run_state

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
FORK = get_context("fork")
LOADED_BEFORE_THE_FORK = every(), steps
N_KILLS = int(os.environ.get("HQ_KILLS", "50"))
VERBS = {
    "train": ("train", "--config", "float.yaml"),
    "quantize": ("quantize", "--config", "brecq.yaml"),
    "study": ("study", "bn_fold", "--profile", "smoke", "--set", "n_test=20", "--set", "models=[lenet]"),
    "study of two": ("study", "bn_fold", "--profile", "smoke", "--set", "n_test=20", "--set", "models=[toynet, lenet]"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a network of one's own, trained; the verbs run in subfolders of it."""
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    train = {**RUN, "n_train": 100, "method": "float", "output": "net.safetensors"}
    protocol = {"iterations": 10, "batch_size": 10}
    (tmp_path / "float.yaml").write_text(yaml.safe_dump(train))
    (tmp_path / "brecq.yaml").write_text(
        yaml.safe_dump({**PTQ, "method": "brecq", "bits": [4, 4], "protocol": protocol, "output": "q.safetensors"})
    )
    assert go(tmp_path, VERBS["train"]) == 0
    yield tmp_path
    sys.modules.pop("mynet", None)


def act(folder: Path, words, said: Path) -> None:
    os.chdir(folder)
    os.environ["HQ_OUT"] = str(folder / "out")
    torch._dynamo.config.disable = True  # compiling is no part of what is killed here, and takes most of the time
    done = CliRunner().invoke(app, [str(word) for word in words])
    said.write_text(f"{done.output}{done.exception or ''}")
    os._exit(done.exit_code)


def go(folder, words, *, kill_after=None, said=None):
    """Exit code of the verb in a process of its own; negative where it was killed."""
    process = FORK.Process(target=act, args=(folder, words, said or folder / "said"))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def fresh(place, name):
    folder = place / name
    folder.mkdir()
    for file in (
        "mynet.py",
        "float.yaml",
        "brecq.yaml",
        *(["net.safetensors"] if not name.startswith("train") else []),
    ):
        (folder / file).write_bytes((place / file).read_bytes())
    return folder


def left(folder):
    """What a verb made: hashes of networks' tensors and the rows without time and commit."""
    found = {}
    for file in sorted(folder.rglob("*")):
        assert not file.name.endswith(".tmp"), file
        if file.suffix == ".safetensors":
            content = file.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            found[file.name] = hashlib.sha256(content[start:]).hexdigest()
        if file.suffix == ".csv" and file.parent.parent.name == "results":
            found[file.name] = store.read_file(file).drop(columns=["seconds", "git_sha"]).to_csv()
    return found


def kills(verb, place, n):
    """``n`` times: killed at a random moment, begun again. How many were hit before they ended."""
    whole = fresh(place, f"{verb}_whole")
    started = time.monotonic()
    assert go(whole, VERBS[verb]) == 0, (whole / "said").read_text()
    lasted, hit, want, draw = time.monotonic() - started, 0, left(whole), random.Random(verb)
    assert want
    for i in range(n):
        folder, started = fresh(place, f"{verb}_{i}"), time.monotonic()
        killed = go(folder, VERBS[verb], kill_after=draw.uniform(0, 1.05 * lasted)) != 0
        if not killed:  # the first run can be the slowest: what a whole one lasts is learned from each
            lasted = min(lasted, time.monotonic() - started)
        hit += killed
        assert go(folder, VERBS[verb]) == 0, (folder / "said").read_text()
        assert left(folder) == want, f"kill {i} of {verb}"
    return hit


@pytest.mark.parametrize("verb", ["train", "quantize", "study"])
def test_a_killed_verb_begun_again_ends_with_the_same_bits(place, verb):
    kills(verb, place, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", ["train", "quantize", "study of two"])
def test_many_kills(place, verb):
    hit = kills(verb, place, N_KILLS)
    print(f"{verb}: {hit} of {N_KILLS} killed before their end")
    assert hit > N_KILLS / 2


NOTEBOOK = "02_bn_fold"


def paper(folder, *, kill_after=None, alone=False):
    """Exit code of what `make paper` runs, for the outputs of one notebook; killed with all its jobs, or ``alone``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HQ_OUT", str(folder))
        wanted = [str(file) for output in outputs.of_notebook(NOTEBOOK) for file in output.files("smoke")]
        words = ["--workflow-profile", "profiles/local", "--cores", "1", "--config", "profile=smoke", "--", *wanted]
        folder.mkdir(exist_ok=True)
        with (folder / "said").open("a") as said:
            run = subprocess.Popen(
                ["snakemake", *words], cwd=paths.ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return run.wait(kill_after)
            except subprocess.TimeoutExpired:
                run.kill() if alone else os.killpg(run.pid, signal.SIGKILL)
                return run.wait()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(shutil.which("snakemake") is None, reason="needs snakemake (extra batch)")
def test_the_paper_killed_and_made_again_has_the_same_bits(tmp_path):
    """In one folder killed up to ten times in a row before it may end, then in the next, until all kills have hit.

    Every second time Snakemake alone dies and its notebook runs on, beside the one that is begun again.
    """
    whole, draw, hit, folders = tmp_path / "whole", random.Random("paper"), 0, 0
    started = time.monotonic()
    assert paper(whole) == 0, (whole / "said").read_text()
    lasted, want = time.monotonic() - started, left(whole) | pictures(whole)
    assert len(want) > 4
    while hit < N_KILLS:
        folder, folders = tmp_path / str(folders), folders + 1
        for _ in range(min(10, N_KILLS - hit)):
            started = time.monotonic()
            if paper(folder, kill_after=draw.uniform(0, lasted), alone=hit % 2 == 1) == 0:
                lasted = min(lasted, max(10.0, time.monotonic() - started))  # the first run can be the slowest
                break
            hit += 1
        assert paper(folder) == 0, (folder / "said").read_text()
        while any(str(folder).encode() in environment(process) for process in Path("/proc").glob("[0-9]*")):
            time.sleep(0.2)  # notebooks that lost their Snakemake
        assert left(folder) | pictures(folder) == want, f"folder {folder.name}, after {hit} kills in all"
        print(f"paper: killed {hit} times, {folders} folders end with the same bits", flush=True)


def environment(process):
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended
        return b""


def pictures(folder):
    """Bits of the tables and figures."""
    files = (folder / "figures" / "smoke").iterdir()
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def row(i: int) -> dict:
    named = {"experiment": "x", "model": "m", "dataset": "d", "method": "pact", "metric": "acc_pct"}
    return {**named, "w_bits": 4, "a_bits": 4, "seed": i, "value": 1.0}


def add_rows(first: int) -> None:
    for i in range(first, first + 20):
        store.append("both", [row(i)], profile="smoke")


def test_two_writers_of_one_file_lose_no_row(out_dir):
    writers = [FORK.Process(target=add_rows, args=(first,)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(store.read("both", profile="smoke")["seed"]) == [*range(20), *range(100, 120)]


@pytest.fixture
def full(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_earlier_rows_stay(full, monkeypatch):
    monkeypatch.setenv("HQ_OUT", str(full))
    store.append("rows", [row(0)], profile="smoke")
    before = store.path_of("rows", profile="smoke").read_bytes()
    (full / "rest").write_bytes(b"x" * (40 * 1024))
    with pytest.raises(store.ResultsError, match=r"rows\.csv.*No space left"):
        store.append("rows", [row(i) for i in range(1, 400)], profile="smoke")
    assert store.path_of("rows", profile="smoke").read_bytes() == before
    assert not list(full.rglob("*.tmp"))


def record_dots(folder):
    engine = RecordEngine(IdealEngine(), folder / "parts")
    engine.mvm(engine.load(np.arange(12).reshape(4, 3), 0.5, "a"), np.arange(8).reshape(2, 4))
    engine.close()


def draw(folder):
    figure = Figure()
    figure.subplots().plot([1, 2])
    style.save(figure, "fig_x", "smoke")


def writers():
    """Name -> what writes into a folder, which is HQ_OUT too."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.randn(4, 3, 8, 8)
    qnet = graph.quantize(net, graph.BitPolicy("minmax:8", "minmax:8", bn="fold"), x[:1])
    graph.calibrate(qnet, x)
    record, digits = integer.lower(qnet), data.load("digits", "train", n=20)
    report = progress.UnitReport("a", 0, 1, 1.0, 0.5, 0.0, 10, 1.0)
    kinds = {to: ending or "_folder" for to, ending in deploy.ENDINGS.items()}
    if importlib.util.find_spec("onnx") is None:
        kinds.pop("onnx")
    table = pd.DataFrame({"a": ["1"]})
    return {
        "network": lambda folder: graph.save(qnet, folder / "net.safetensors"),
        "checkpoint": lambda folder: models.write_checkpoint(folder / "net.safetensors", net.state_dict(), {}),
        **{to: partial(export_to, record, to, x[0].numpy()) for to in kinds},
        "record of dots": record_dots,
        "manifest": lambda folder: selection.write(selection.from_images(digits, range(5)), folder / "m.json"),
        "run": lambda folder: run_state.begin(folder / "run", asdict(TrainConfig(epochs=3, lr=0.1))),
        "state": lambda folder: run_state.save(folder / "run", {"history": [], "net": net.state_dict()}),
        "reconstruction": lambda folder: progress.RunFolder(folder / "fit", {"p": 1}).save(report, qnet),
        "rows": lambda folder: store.append("rows", [row(0)], profile="smoke"),
        "figure": draw,
        "table": lambda folder: tables.write(table, "tab_x", profile="smoke", caption="x", switches={}),
    }


def export_to(record, to, image, folder):
    deploy.export(record, folder / f"net{deploy.ENDINGS[to]}", to, image=image if to == "board" else None)


@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_every_writer_names_its_file_on_such_a_disk_and_leaves_no_half(full, monkeypatch, tmp_path, disk):
    monkeypatch.setenv("HQ_OUT", str(full))
    whole = tmp_path / "whole"
    for name, write in writers().items():
        place = whole / name
        monkeypatch.setenv("HQ_OUT", str(place))
        write(place)
        assert any(file.stat().st_size for file in place.rglob("*") if file.is_file()), name
    monkeypatch.setenv("HQ_OUT", str(full))
    if disk == "full":
        (full / "rest").write_bytes(b"x" * os.statvfs(full).f_bavail * 4096)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(full)], check=True)
    for name, write in writers().items():
        with pytest.raises((OSError, store.ResultsError), match=rf"{re.escape(str(full))}|\.\w+: ") as refused:
            write(full)
        assert "No space" in str(refused.value) or "Read-only" in str(refused.value), name
        assert not [file for file in full.rglob("*") if file.is_file() and file.name != "rest" and file.stat().st_size]
        assert not list(full.rglob("*.tmp")), name


def record_some(folder: Path, first: int) -> None:
    recording.FLUSH_BYTES = 1  # in this process alone: every answer is written at once
    engine = RecordEngine(IdealEngine(), folder)
    handle = engine.load(np.eye(4, dtype=np.int64), 0.5, "a")
    for i in range(first, first + 15):
        engine.mvm(handle, np.full((1, 4), i))
    engine.close()


def test_two_processes_that_record_into_one_folder_lose_no_answer(tmp_path):
    both = [FORK.Process(target=record_some, args=(tmp_path / "parts", first)) for first in (0, 100)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    seen = sorted(int(value) for call in load_parts(tmp_path / "parts").calls for value in call.x[:, 0])
    assert seen == [*range(15), *range(100, 115)]


def begin_fit(folder: Path, p: int, both_ready) -> None:
    both_ready.wait()
    try:
        progress.RunFolder(folder, {"p": p})
    except progress.ReconstructionError:
        os._exit(3)
    os._exit(0)


def test_of_two_reconstructions_that_begin_in_one_folder_one_is_refused(tmp_path):
    for i in range(20):
        ready = FORK.Barrier(2)
        both = [FORK.Process(target=begin_fit, args=(tmp_path / str(i), p, ready)) for p in (1, 2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert sorted(process.exitcode for process in both) == [0, 3]


@pytest.mark.parametrize("verb", ["train", "quantize"])
def test_a_verb_on_a_full_disk_names_the_file_and_leaves_no_half(place, full, verb):
    for file in ("mynet.py", "float.yaml", "brecq.yaml", "net.safetensors"):
        (full / file).write_bytes((place / file).read_bytes())
    (full / "rest").write_bytes(b"x" * (os.statvfs(full).f_bavail - 1) * 4096)
    said = place / "said_full"
    words = (*VERBS[verb], "--output", "new.safetensors")
    assert go(full, words, said=said) == 1, said.read_text()
    assert "No space left" in said.read_text()
    assert str(full) in said.read_text() or "new" in said.read_text()
    assert not (full / "new.safetensors").exists()
    assert not list(full.rglob("*.tmp"))


def test_a_read_only_folder_is_named(place, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "q.safetensors").mkdir()  # what root cannot write either: a folder where the file would be
    folder = fresh(place, "quantize_closed")
    assert go(folder, (*VERBS["quantize"], "--output", str(closed / "q.safetensors"))) == 1
    assert "q.safetensors" in (folder / "said").read_text()
