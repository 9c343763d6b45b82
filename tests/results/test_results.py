"""Result files: what may enter, what a second write changes, two writers at once, a killed writer, promotion."""

import csv
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from hq_lib.results import atomic, paths, rows, store
from hq_lib.results.rows import Row, RowError
from hq_lib.results.store import ResultsError

CONTEXT = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


def a_row(**changes):
    row = {
        "experiment": "tab_toynet", "model": "toynet", "dataset": "cifar10", "method": "pact", "w_bits": 4, "a_bits": 4,
        "seed": 0, "metric": "acc_pct", "value": 91.25, "epochs": 3, "n_train": 45_000, "n_test": 10_000,
    }  # fmt: skip
    return row | changes


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    return tmp_path


def the_file(profile="quick"):
    return store.path_of("qat", profile=profile)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_design_and_of_the_row():
    assert {f.name for f in dataclasses.fields(Row)} == set(rows.COLUMNS)
    assert len(set(rows.COLUMNS)) == len(rows.COLUMNS) == 22
    assert set(rows.KEY) | {"git_sha", "versions", "device", "seconds", "value", "unit"} == set(rows.COLUMNS)


def test_a_unit_is_taken_from_the_metric_s_name_and_asked_for_where_it_says_none():
    row = {**a_row(profile="quick", git_sha="x", versions="x", device="x"), "metric": "n_flips", "value": 3}
    assert rows.clean(row)["unit"] == "count"
    assert rows.clean({**row, "metric": "val_acc_pct"})["unit"] == "%"
    assert rows.clean({**row, "metric": "predicted_kl"})["unit"] == "nat"
    with pytest.raises(RowError, match="has no unit"):
        rows.clean({**row, "metric": "kl_of_mine"})
    with pytest.raises(RowError, match="promises 'count'"):
        rows.clean({**row, "unit": "1"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": float("nan")}, "diverged"),
        ({"value": float("inf")}, "finite"),
        ({"value": 191.0}, r"\[0, 100\]"),
        ({"value": "91"}, "finite"),
        ({"value": True}, "finite"),
        ({"unit": "percent"}, "unknown unit 'percent'"),
        ({"unit": "s"}, "promises '%'"),
        ({"metric": "images_per_s", "unit": "%"}, "promises '1/s'"),
        ({"w_bits": 0}, "32 meaning float"),
        ({"a_bits": 33}, "a_bits"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": -2}, "at least -1"),
        ({"n_calib": -1}, "at least 0"),
        ({"n_calib": 10**19}, "in 64 bits"),
        ({"n_test": None}, "n_test"),
        ({"seconds": -1.0}, "negative"),
        ({"method": ""}, "method"),
        ({"method": " pact"}, "one line"),
        ({"model": "toy\nnet"}, "one line"),
        ({"profile": "fall"}, "did you mean 'full'"),
        ({"switches": "[1]"}, "JSON object"),
        ({"switches": "{"}, "JSON object"),
        ({"switches": "[" * 100_000}, "JSON object"),
        ({"switches": {"drop": float("nan")}}, "JSON object"),
    ],
)
def test_a_bad_cell_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        rows.clean({**a_row(profile="quick", git_sha="x", versions="x", device="x"), **changes})


def test_unknown_and_missing_columns_are_named():
    with pytest.raises(RowError, match=r"'n_calibs'.*did you mean 'n_calib'"):
        store.append("qat", [{**a_row(), "n_calibs": 4}], profile="quick")
    fields = {k: v for k, v in a_row().items() if k != "metric"}
    with pytest.raises(RowError, match="has no metric, unit"):
        store.append("qat", [fields], profile="quick")
    assert not the_file().exists()


def test_numpy_and_torch_scalars_become_plain_numbers():
    import torch

    row = a_row(value=np.float64(90.5), seed=np.int64(3), w_bits=torch.tensor(2))
    store.append("qat", [row], profile="quick")
    back = store.read("qat", profile="quick").iloc[0]
    assert (back.value, back.seed, back.w_bits) == (90.5, 3, 2.0)


# --- append and read -------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written_to_the_last_bit():
    values = np.random.default_rng(0).uniform(0, 100, 40)
    store.append("qat", [a_row(seed=i, value=v) for i, v in enumerate(values)], profile="quick")
    back = store.read("qat", profile="quick")
    assert back["value"].tolist() == values.tolist()
    assert tuple(back.columns) == rows.COLUMNS
    assert {c: str(t) for c, t in back.dtypes.items()} == rows.DTYPES
    assert not back.isna().any(axis=None)


def test_the_file_is_plain_csv_that_pandas_reads_the_same():
    store.append("qat", [a_row(switches={"b": 'a,"quoted"', "a": 8})], profile="quick")
    ours = store.read("qat", profile="quick")
    theirs = pd.read_csv(the_file(), keep_default_na=False, dtype=rows.DTYPES)
    pd.testing.assert_frame_equal(ours, theirs)
    assert json.loads(ours["switches"][0]) == {"a": 8, "b": 'a,"quoted"'}
    assert "," + "4,4" + ",-," in the_file().read_text()  # whole bits without a decimal point


def test_the_same_rows_in_any_order_give_the_same_bytes():
    many = [a_row(seed=s, w_bits=b, seconds=1.5) for s in range(3) for b in (2, 3.7, 32)]
    store.append("qat", many, profile="quick")
    once = the_file().read_bytes()
    assert store.append("qat", many[::-1], profile="quick") == 9
    assert the_file().read_bytes() == once
    the_file().unlink()
    for row in many[::-1]:
        store.append("qat", [row], profile="quick")
    assert the_file().read_bytes() == once


def test_the_same_key_replaces_value_and_provenance_only():
    store.append("qat", [a_row(value=10.0, seconds=1.0), a_row(seed=1)], profile="quick")
    store.append("qat", [a_row(value=20.0, seconds=2.0, device="bench")], profile="quick")
    back = store.read("qat", profile="quick")
    assert back["value"].tolist() == [20.0, 91.25]
    assert back["device"][0] == "bench"
    assert back["seconds"][0] == 2.0


def test_switches_are_part_of_the_key_whatever_their_order_of_writing():
    store.append("qat", [a_row(switches='{"b": 1, "a": 2}')], profile="quick")
    assert store.append("qat", [a_row(switches={"a": 2, "b": 1})], profile="quick") == 1
    assert store.append("qat", [a_row(switches={"a": 2})], profile="quick") == 2


def test_two_rows_of_one_call_may_not_share_a_key():
    with pytest.raises(RowError, match="two rows share the key"):
        store.append("qat", [a_row(value=1.0), a_row(value=2.0)], profile="quick")


def test_one_metric_has_one_unit_in_a_file():
    store.append("qat", [a_row(metric="mine", unit="nat", value=0.3)], profile="quick")
    with pytest.raises(RowError, match="'mine' in two units"):
        store.append("qat", [a_row(metric="mine", unit="bit", value=0.3, seed=1)], profile="quick")


def test_a_row_of_another_profile_is_refused():
    with pytest.raises(RowError, match="never mix"):
        store.append("qat", [a_row(profile="full")], profile="quick")


def test_profiles_live_in_separate_folders(out):
    for profile in paths.PROFILES:
        store.append("qat", [a_row()], profile=profile)
        assert store.read("qat", profile=profile)["profile"].tolist() == [profile]
    assert the_file("full") == out / "data" / "results" / "qat.csv"


def test_nothing_run_reads_as_no_rows_with_all_columns():
    empty = store.read("qat", profile="quick")
    assert len(empty) == 0
    assert {c: str(t) for c, t in empty.dtypes.items()} == rows.DTYPES
    assert store.append("qat", [], profile="quick") == 0
    assert the_file().read_text().strip() == ",".join(rows.COLUMNS)


@pytest.mark.parametrize("name", ["../qat", "qat.csv", "QAT", ""])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(ResultsError, match="lower-case"):
        store.read(name, profile="quick")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "line", "reason"),
    [
        (lambda b: b[:-7], 3, "ends in the middle"),
        (lambda b: b"", 1, "ends in the middle"),
        (lambda b: b.replace(b"experiment,", b"study,", 1), 1, "header"),
        (lambda b: b.replace(b"\n", b",note\n", 1).replace(b'}"\n', b'}",x\n'), 1, "header"),
        (lambda b: b + b.splitlines(keepends=True)[1], 4, "two rows share the key"),
        (lambda b: b + b"<<<<<<< HEAD\n", 4, "1 cells instead of 22"),
        (lambda b: b.replace(b",91.25,", b",ninety,", 1), 2, "value is 'ninety'"),
        (lambda b: b.replace(b",91.25,", b",nan,", 1), 2, "finite"),
        (lambda b: b.replace(b",91.25,", b",,", 1), 2, "value is ''"),
        (lambda b: b.replace(b"toynet,cifar10", b"toy\xff,cifar10", 1), 2, "UTF-8"),
        (lambda b: b.replace(b'"{', b'x"{', 1), 2, None),
    ],
)
def test_a_damaged_file_is_named_with_line_and_mend_and_never_overwritten(damage, line, reason):
    switch = {"note": "a,b"}
    store.append("qat", [a_row(seed=s, switches=switch) for s in range(2)], profile="quick")
    the_file().write_bytes(damage(the_file().read_bytes()))
    before = the_file().read_bytes()
    for use in (
        lambda: store.read("qat", profile="quick"),
        lambda: store.append("qat", [a_row()], profile="quick"),
    ):
        mend = "these columns alone.*experiment,model" if line == 1 else "delete that line"  # never the header's
        with pytest.raises(ResultsError, match=rf"qat\.csv, line {line}: .*{reason or ''}.*Mend: {mend}"):
            use()
    assert the_file().read_bytes() == before


@pytest.mark.parametrize("written", [lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b])
def test_what_windows_writes_is_read(written):
    store.append("qat", [a_row()], profile="quick")
    the_file().write_bytes(written(the_file().read_bytes()))
    assert store.read("qat", profile="quick")["value"].tolist() == [91.25]


def test_a_folder_that_cannot_be_written_is_named(out, monkeypatch):
    store.append("qat", [a_row()], profile="quick")
    before = the_file().read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full_disk)
    with pytest.raises(ResultsError, match=r"No space left on device.*HQ_OUT"):
        store.append("qat", [a_row(seed=5)], profile="quick")
    assert the_file().read_bytes() == before
    assert not list(the_file().parent.glob("*.tmp")) + list(the_file().parent.glob(".*.tmp"))


def test_a_file_where_the_folder_should_be_is_named(out):
    (out / "data").write_text("in the way")
    with pytest.raises(ResultsError, match="cannot write"):
        store.append("qat", [a_row()], profile="quick")


def test_a_lock_that_is_never_freed_ends_in_an_error(monkeypatch):
    import filelock

    store.append("qat", [a_row()], profile="quick")
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1)
    holder = filelock.FileLock(the_file().with_name(".qat.csv.lock"))
    with holder, pytest.raises(ResultsError, match="stayed locked"):
        store.append("qat", [a_row()], profile="quick")


# --- several processes -----------------------------------------------------------------------------------------------


def append_fifty(method):
    for seed in range(50):
        store.append("qat", [a_row(method=method, seed=seed, value=seed / 7)], profile="quick")


def append_for_ever(started):
    started.set()
    seed = 0
    while True:
        store.append("qat", [a_row(seed=seed % 500, value=(seed % 97) + 0.5)], profile="quick")
        seed += 1


def test_two_processes_appending_fifty_rows_each_lose_none():
    writers = [CONTEXT.Process(target=append_fifty, args=(m,)) for m in ("pact", "lsq")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [w.exitcode for w in writers] == [0, 0]
    back = store.read("qat", profile="quick")
    assert back.groupby("method")["seed"].apply(list).to_dict() == {m: list(range(50)) for m in ("pact", "lsq")}
    assert np.array_equal(back["value"], back["seed"] / 7)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_killed_writer_leaves_a_whole_file_and_no_lock():
    for attempt in range(3):
        started = CONTEXT.Event()
        writer = CONTEXT.Process(target=append_for_ever, args=(started,))
        writer.start()
        assert started.wait(60)
        time.sleep(0.15 + 0.11 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(60)
        n_before = len(store.read("qat", profile="quick"))
        assert store.append("qat", [a_row(method=f"after{attempt}")], profile="quick") == n_before + 1
    assert n_before > 1
    assert not list(the_file().parent.glob(".*.tmp"))  # what the killed ones left is swept


def test_left_over_temporary_files_are_swept_by_the_next_append():
    store.append("qat", [a_row()], profile="quick")
    stale = the_file().with_name(".qat.csv.4242.tmp")
    stale.write_text("half a fi")
    store.append("qat", [a_row()], profile="quick")
    assert not stale.exists()


def test_committed_reference_rows_are_sound(monkeypatch):
    monkeypatch.delenv("HQ_OUT")
    for path in sorted(paths.results_dir("full").glob("*.csv")):
        frame = store.read(path.stem, profile="full")
        assert "smoke" not in set(frame["profile"]), path.name
        assert path.read_bytes().decode() == rows.to_csv(frame.to_dict("records")), (
            f"{path.name} is not in canonical form"
        )
        with path.open(newline="") as handle:
            assert tuple(next(csv.reader(handle))) == rows.COLUMNS


def test_what_a_killed_process_left_beside_a_file_goes_with_the_next_write(tmp_path):
    """Its own temporary file stays where it lives, that of a dead process of this machine does not."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living = (tmp_path / f".a[1].csv.{platform.node()}.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    for file in (left, living):
        file.write_bytes(b"half")
    atomic.write_text(tmp_path / "a[1].csv", "whole")
    assert not left.exists()
    assert living.exists()
    assert (tmp_path / "a[1].csv").read_text() == "whole"
