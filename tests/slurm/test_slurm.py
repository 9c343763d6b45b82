"""The SLURM profile on a SLURM of one node: a whole run, and what happens to runs in the world.

A few cheap units of profile smoke stand for those of full: the rules, the profile and the jobs are the same.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from hq_lib.results import paths, store

HERE = Path(__file__).parent
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "snakemake")
STUDY, UNITS = "float_reference", ("lenet", "toynet", "vgg11")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install munge slurmctld slurmd slurm-client")
    if os.geteuid() != 0 or Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("needs root, and a machine without a SLURM of its own in /etc/slurm")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["sh", str(HERE / "start.sh"), str(folder)], check=True, timeout=60)
    yield
    subprocess.run(["sh", str(HERE / "stop.sh"), str(folder)], check=True, timeout=60)


@pytest.fixture
def place(slurm, out_dir):
    yield out_dir
    subprocess.run(["scancel", "--user", "root"], check=True)
    while queue():
        time.sleep(0.5)


def queue():
    """(job, state) of everything that is queued or runs."""
    lines = subprocess.run(["squeue", "-h", "-o", "%A %T"], check=True, capture_output=True, text=True).stdout
    return [line.split() for line in lines.splitlines()]


def start(place, log):
    marks = [f"{place}/build/smoke/units/{STUDY}/{unit}.done" for unit in UNITS]
    command = [
        "snakemake", "--workflow-profile", "profiles/slurm", "--slurm-init-seconds-before-status-checks", "1",
        "--slurm-logdir", f"{place}/logs", "--config", "profile=smoke", "units=true", "--", *marks,
    ]  # fmt: skip
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=paths.ROOT, stdout=out, stderr=subprocess.STDOUT)


def wait_for(state):
    while not (found := [job for job, s in queue() if s == state]):
        time.sleep(0.2)
    return found


def check_rows(place):
    """Each unit's rows are there once, and are those of a run without SLURM."""
    found = pd.concat([store.read_file(p) for p in place.glob(f"data/runs/smoke/{STUDY}/parts/*/{STUDY}.csv")])
    assert sorted(found["model"].unique()) == sorted(UNITS)
    assert not found.duplicated(["model", "metric", "switches"]).any()
    assert not list(place.rglob("*.tmp"))
    subprocess.run(["hq", "study", STUDY, "--profile", "smoke", "--unit", "lenet"], check=True)  # it has its rows
    local = {**os.environ, "HQ_OUT": str(place / "local")}
    subprocess.run(["hq", "study", STUDY, "--profile", "smoke", "--unit", "lenet"], check=True, env=local)
    alone = store.read_file(place / f"local/data/runs/smoke/{STUDY}/parts/lenet/{STUDY}.csv")
    own = store.read_file(place / f"data/runs/smoke/{STUDY}/parts/lenet/{STUDY}.csv")
    pd.testing.assert_frame_equal(own.drop(columns="seconds"), alone.drop(columns="seconds"))


def test_a_whole_run_in_which_a_job_is_cancelled_and_the_node_drained_for_a_while(place, tmp_path):
    run = start(place, tmp_path / "log")
    subprocess.run(["scancel", wait_for("RUNNING")[0]], check=True)
    subprocess.run(["scontrol", "update", "node=localhost", "state=drain", "reason=test"], check=True)
    time.sleep(5)
    subprocess.run(["scontrol", "update", "node=localhost", "state=resume"], check=True)
    assert run.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert "Trying to restart" in (tmp_path / "log").read_text()
    check_rows(place)


def test_snakemake_killed_and_started_again_while_its_jobs_run(place, tmp_path):
    first = start(place, tmp_path / "first")
    wait_for("RUNNING")
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(place, tmp_path / "second")
    assert second.wait(timeout=600) == 0, (tmp_path / "second").read_text()
    while queue():
        time.sleep(0.5)
    check_rows(place)
