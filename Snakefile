"""From parameters to every table and figure of the paper: one rule a notebook, then one for the pages to share.

    snakemake --workflow-profile profiles/local --config profile=quick      (what `make paper` runs)
    snakemake --workflow-profile profiles/local --config profile=full reference    (what `make reference` runs)

In profile full each unit of a study (one training, or the points that share a bench) is a job of its own, on one thread
and with rows in a part file of its own: no two jobs write one file, and many nodes can share them. What has its rows is
no job. Then one job a study, on the machine that Snakemake runs on, gathers the parts, and the notebook only draws.
`--config device=cuda` gives a GPU to units that compute on one; `units=true` makes jobs of a shorter profile's units too.

Result rows (data/results/**.csv) are deliberately not declared as outputs: Snakemake deletes the outputs of a failed
job, and rows that a long run has already written must survive it. Tables and figures are built from those rows.
"""

import json
import os
import sys
from pathlib import Path

import yaml

from hq_lib.results import atomic, dependencies, outputs, paths

PROFILE = paths.check_profile(config.get("profile", "quick"))
DEVICE = config.get("device", "cpu")
if PROFILE == "smoke":
    os.environ.setdefault("HQ_FUSE", "0")  # so short a run does not win back what compiling kernels takes
BUILD = str(paths.build_dir(PROFILE))
LONGEST = ("08_crossbar", "05_calibration_selection", "06_hybrid_precision", "03_dsq_pact_qat", "04_aciq_qdrop_ptq")
READERS = ["00_map", "10_gallery"]  # these read what the others made
MAKERS = [notebook for notebook in outputs.written() if notebook not in READERS]
NODES = 20
IN_A_JOB = "--mode" in sys.argv  # jobs read this file too; what there is to do was settled before them
PLAN = Path(f"{BUILD}/units/plan.json")
STUDIES, UNITS = {}, []
if config.get("units", PROFILE == "full"):
    if not IN_A_JOB:
        from hq_lib import studies

        every = studies.every().values()
        plan = [{study.name: study.folder for study in every}, [u for study in every for u in study.units(PROFILE)]]
        atomic.write_text(PLAN, json.dumps(plan, indent=1))
    STUDIES, UNITS = json.loads(PLAN.read_text(encoding="utf-8"))


def done_file(unit):
    """The mark that a unit has ended; its rows are in its part."""
    return f"{BUILD}/units/{unit['study']}/{unit['unit']}.done"


def gathered(study):
    """The mark that a study's rows are in the shared files."""
    return f"{BUILD}/units/{study}.gathered"


def before(unit):
    """The units that a unit stands on."""
    return [other for other in UNITS if other["unit"] in unit["after"]]


def hours(n_nodes):
    """Of one thread a node, each unit begun as soon as a node is free and what it stands on has ended."""
    free, ended = [0.0] * n_nodes, {}
    for unit in sorted(UNITS, key=lambda unit: (len(before(unit)) > 0, -unit["minutes"])):
        start = max([min(free), *(ended.get(done_file(other), 0.0) for other in before(unit))])
        free[free.index(min(free))] = ended[done_file(unit)] = start + unit["minutes"] / 60
    return max(free)


if UNITS and not IN_A_JOB:
    longest = max(UNITS, key=lambda unit: unit["minutes"])
    print(
        f"{sum(unit['n_points'] for unit in UNITS)} points in {len(UNITS)} jobs to go, about {hours(1):.0f} h on one "
        f"node, {hours(NODES):.0f} h on {NODES}; the longest is {longest['unit']}, {longest['minutes'] / 60:.1f} h",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def made_by(notebook):
    """Paths of all figures and tables of a notebook."""
    return [str(file) for output in outputs.of_notebook(notebook) for file in output.files(PROFILE)]


def parameters(notebook):
    """What the notebook is given, as YAML: the profile, and in profile smoke shorter lists."""
    short = yaml.safe_load(Path("profiles/smoke.yaml").read_text(encoding="utf-8")) if PROFILE == "smoke" else {}
    return json.dumps({"profile": PROFILE, **short.get(notebook, {})})


def priority(notebook):
    """The longest begin first, so that no core waits for the other at the end."""
    return len(LONGEST) - LONGEST.index(notebook) if notebook in LONGEST else 0


def needs(notebook):
    """The notebook and every file of hq_lib that it imports, directly or not."""
    return [f"notebooks/{notebook}.ipynb", *dependencies.of_notebook(f"notebooks/{notebook}.ipynb")]


def rows_of(notebook):
    """The marks of all studies whose folder the notebook imports."""
    imported = "\n".join(needs(notebook))
    return [gathered(study) for study, folder in STUDIES.items() if f"/{folder}/study.py" in imported]


# `log` is the executed copy, kept when the notebook fails
EXECUTE = "papermill --log-output --no-progress-bar notebooks/{params.notebook}.ipynb {log:q} -y {params.given:q}"


rule all:
    localrule: True
    input:
        f"{BUILD}/share/index.html",


rule reference:
    localrule: True
    input:
        [gathered(study) for study in STUDIES],


rule data:
    localrule: True
    output:
        touch(f"{BUILD}/data.done"),
    message:
        "fetching the data sets, for nodes without a network"
    shell:
        "python -c 'from hq_lib import data; "
        '[data.load_or_embedded(name, "test") for name in ("cifar10", "fashion_mnist", "mnist")]\''


for place, unit in enumerate(UNITS):

    rule:
        name: f"unit_{unit['study']}_{unit['unit']}".replace("-", "_").replace(".", "_")
        input: [done_file(other) for other in before(unit)], fetched=ancient(rules.data.output[0])
        output: touch(done_file(unit))
        params: study=unit["study"], unit=unit["unit"], profile=PROFILE, device=DEVICE if unit["gpu"] else "cpu"
        threads: 1
        priority: len(UNITS) - place
        resources:
            mem_mb=4000,
            runtime=int(60 + 4 * unit["minutes"]),
            **({"gpu": 1} if unit["gpu"] and DEVICE == "cuda" else {}),
        message: f"measuring {unit['study']}: {unit['unit']}, about {unit['minutes'] / 60:.1f} h of one thread"
        shell:
            "OMP_NUM_THREADS=1 python -m hq_lib study {params.study} --profile {params.profile} --unit {params.unit:q} "
            "--device {params.device}"


for study in STUDIES:

    rule:
        name: f"gather_{study}"
        localrule: True
        input: [done_file(unit) for unit in UNITS if unit["study"] == study]
        output: touch(gathered(study))
        params: study=study, profile=PROFILE
        message: "gathering the rows of {params.study}"
        shell: "python -m hq_lib study {params.study} --profile {params.profile} --gather"


for notebook in MAKERS:

    rule:
        name: f"notebook_{notebook}"
        input: needs(notebook), rows_of(notebook)
        output: made_by(notebook)
        log: f"{BUILD}/notebooks/{notebook}.ipynb"
        params: notebook=notebook, given=parameters(notebook)
        threads: 1
        priority: priority(notebook)
        message: f"running notebook {{params.notebook}} ({PROFILE})"
        shell: EXECUTE


for notebook in READERS:

    rule:
        name: f"notebook_{notebook}"
        input: needs(notebook), *[made_by(other) for other in MAKERS]
        output: made_by(notebook), touch(f"{BUILD}/notebooks/{notebook}.done")
        log: f"{BUILD}/notebooks/{notebook}.ipynb"
        params: notebook=notebook, given=parameters(notebook)
        threads: 1
        message: f"running notebook {{params.notebook}} ({PROFILE})"
        shell: EXECUTE


rule share:
    input:
        *[made_by(notebook) for notebook in MAKERS],
        *[f"{BUILD}/notebooks/{notebook}.done" for notebook in READERS],
        "hq_lib/results/share.py",
        "hq_lib/results/page.html.j2",
    output:
        f"{BUILD}/share/index.html",
    message:
        "rendering the notebooks as pages to share"
    shell:
        f"python -m hq_lib.results.share {PROFILE}"
