"""The dependency list is written once: pyproject.toml; everything else must agree with it."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from hq_lib.results.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] not in "# "
)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_direct_dependency_is_pinned_within_its_range():
    pins = {normal(name): version for name, version in PINS.items()}
    needed = [*PROJECT["dependencies"], *(r for rs in PROJECT["optional-dependencies"].values() for r in rs)]
    for requirement in map(Requirement, needed):
        assert normal(requirement.name) in pins, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[normal(requirement.name)]), str(requirement)


def test_environment_yml_lists_nothing_of_its_own():
    file = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = file["dependencies"]
    assert python.startswith("python=3.")
    assert pip == "pip"
    assert packages["pip"][0] == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", packages["pip"][1]).group(1).split(",")
    makefile = re.search(r"^EXTRAS\s*:= (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split(",")
    assert extras == makefile
    assert set(extras) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "environment.yml"])
def test_no_download_addresses(name):
    assert "://" not in (ROOT / name).read_text()


def test_the_test_command_of_ci_is_the_readmes():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
