"""Provenance: the commit that ran, with and without git; the machine; the clock."""

import re
import subprocess

import pytest
import torch

from hq_lib.results import provenance


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    try:
        git(tmp_path, "init")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "qat.csv").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def sha_of(root):
    provenance.git_sha.cache_clear()
    return provenance.git_sha(root)


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch):
    monkeypatch.delenv("HQ_GIT_SHA", raising=False)
    yield
    provenance.git_sha.cache_clear()


def test_a_clean_checkout_gives_the_commit(repository):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    assert sha_of(repository) == head[:12]


def test_changed_code_is_dirty_but_new_results_and_untracked_files_are_not(repository):
    clean = sha_of(repository)
    (repository / "data" / "results" / "qat.csv").write_text("2\n")
    (repository / "notes.txt").write_text("mine\n")
    assert sha_of(repository) == clean
    (repository / "code.py").write_text("a = 2\n")
    assert sha_of(repository) == f"{clean}-dirty"


def test_without_repository_commit_or_git_it_is_unknown_or_what_the_environment_says(tmp_path, monkeypatch):
    assert sha_of(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git to be found
    assert sha_of(tmp_path) == "unknown"
    monkeypatch.setenv("HQ_GIT_SHA", "0123456789ab")
    assert sha_of(tmp_path) == "0123456789ab"


def test_somebody_elses_repository_around_us_is_not_ours(repository):
    inner = repository / "copy"
    inner.mkdir()
    assert sha_of(inner) == "unknown"


def test_the_stamp_fills_the_provenance_columns_with_one_line_each():
    stamp = provenance.stamp()
    assert set(stamp) == {"git_sha", "versions", "device"}
    assert all(text and text.isprintable() for text in stamp.values())
    assert f"torch {torch.__version__.split('+')[0]}" in stamp["versions"]
    assert re.search(rf", {torch.get_num_threads()} threads?$", stamp["device"])


def test_an_absent_package_is_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    provenance.versions.cache_clear()
    assert provenance.versions().endswith("no-such-package-here absent")
    provenance.versions.cache_clear()
