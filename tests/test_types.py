"""The library's types hold: pyright in basic mode."""

import subprocess

import pytest

from hq_lib.results.paths import ROOT


@pytest.mark.timeout(1200)
def test_pyright_finds_nothing():
    if subprocess.run(["pyright", "--version"], capture_output=True).returncode:
        pytest.skip("pyright cannot be had here: on its first run it fetches its program by npm")
    found = subprocess.run(["pyright"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
