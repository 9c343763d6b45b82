"""From parameters to every table and figure of the paper: one rule a notebook, then one for the pages to share.

    snakemake --workflow-profile profiles/local --config profile=quick      (what `make paper` runs)
    snakemake --workflow-profile profiles/local --config profile=full reference    (what `make reference` runs)

In profile full each unit of a study (one training, or the points that share a bench) is a job of its own, on one thread
and with rows in a part file of its own: no two jobs write one file, and many nodes can share them. What has its rows is
no job. The notebook then gathers the parts and only draws.

Result rows (data/results/**.csv) are deliberately not declared as outputs: Snakemake deletes the outputs of a failed
job, and rows that a long run has already written must survive it. Tables and figures are built from those rows.
"""

from hq_lib.results import dependencies, outputs, paths

PROFILE = paths.check_profile(config.get("profile", "quick"))
BUILD = str(paths.build_dir(PROFILE))
READERS = ["00_map", "10_gallery"]  # these read what the others made
MAKERS = [notebook for notebook in outputs.written() if notebook not in READERS]
UNITS = []
if PROFILE == "full":
    from hq_lib import studies

    UNITS = [unit for study in studies.every().values() for unit in study.units(PROFILE)]
    print(f"{len(UNITS)} units, {sum(unit['minutes'] for unit in UNITS) / 60:.0f} hours of one thread to go", flush=True)


def done_file(unit):
    """The mark that a unit has ended; its rows are in its part."""
    return f"{BUILD}/units/{unit['study']}/{unit['unit']}.done"


def made_by(notebook):
    """Paths of all figures and tables of a notebook."""
    return [str(file) for output in outputs.of_notebook(notebook) for file in output.files(PROFILE)]


def needs(notebook):
    """The notebook and every file of hq_lib that it imports, directly or not."""
    return [f"notebooks/{notebook}.ipynb", *dependencies.of_notebook(f"notebooks/{notebook}.ipynb")]


def units_of(notebook):
    """The marks of all units whose study is in a folder that the notebook imports."""
    imported = "\n".join(needs(notebook))
    return [done_file(unit) for unit in UNITS if f"/{unit['folder']}/study.py" in imported]


# `log` is the executed copy, kept when the notebook fails
GATHER = "python -m hq_lib study all --profile {params.profile} --gather && " if PROFILE == "full" else ""
EXECUTE = GATHER + (
    "papermill --log-output --no-progress-bar notebooks/{params.notebook}.ipynb {log:q} -p profile {params.profile}"
)


rule all:
    input:
        f"{BUILD}/share/index.html",


rule reference:
    input:
        [done_file(unit) for unit in UNITS],


for place, unit in enumerate(UNITS):

    rule:
        name: f"unit_{unit['study']}_{unit['unit']}".replace("-", "_").replace(".", "_")
        input: [done_file(other) for other in UNITS if other["unit"] in unit["after"]]
        output: touch(done_file(unit))
        params: study=unit["study"], unit=unit["unit"], profile=PROFILE
        threads: 1
        priority: len(UNITS) - place
        resources: mem_mb=4000, runtime=int(60 + 4 * unit["minutes"])
        message: f"measuring {unit['study']}: {unit['unit']}, about {unit['minutes'] / 60:.1f} h of one thread"
        shell: "OMP_NUM_THREADS=1 python -m hq_lib study {params.study} --profile {params.profile} --unit {params.unit:q}"


for notebook in MAKERS:

    rule:
        name: f"notebook_{notebook}"
        input: needs(notebook), units_of(notebook)
        output: made_by(notebook)
        log: f"{BUILD}/notebooks/{notebook}.ipynb"
        params: notebook=notebook, profile=PROFILE
        threads: 1
        message: "running notebook {params.notebook} ({params.profile})"
        shell: EXECUTE


for notebook in READERS:

    rule:
        name: f"notebook_{notebook}"
        input: needs(notebook), *[made_by(other) for other in MAKERS]
        output: made_by(notebook), touch(f"{BUILD}/notebooks/{notebook}.done")
        log: f"{BUILD}/notebooks/{notebook}.ipynb"
        params: notebook=notebook, profile=PROFILE
        threads: 1
        message: "running notebook {params.notebook} ({params.profile})"
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
        f"python -m hq_lib.results.share --profile {PROFILE}"
