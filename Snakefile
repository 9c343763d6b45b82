"""From parameters to every table and figure of the paper: one rule a notebook, then one for the pages to share.

    snakemake --workflow-profile profiles/local --config profile=quick      (what `make paper` runs)

Result rows (data/results/**.csv) are deliberately not declared as outputs: Snakemake deletes the outputs of a failed
job, and rows that a long run has already written must survive it. Tables and figures are built from those rows.
"""

from hq_lib.results import dependencies, outputs, paths

PROFILE = paths.check_profile(config.get("profile", "quick"))
BUILD = str(paths.build_dir(PROFILE))
MAKERS = outputs.written()
READERS = ["00_map", "10_gallery"]  # these only read what the others made


def made_by(notebook):
    """Paths of all figures and tables of a notebook."""
    return [str(file) for output in outputs.of_notebook(notebook) for file in output.files(PROFILE)]


def needs(notebook):
    """The notebook and every file of hq_lib that it imports, directly or not."""
    return [f"notebooks/{notebook}.ipynb", *dependencies.of_notebook(f"notebooks/{notebook}.ipynb")]


# `log` is the executed copy, kept when the notebook fails
EXECUTE = "papermill --log-output --no-progress-bar notebooks/{params.notebook}.ipynb {log} -p profile {params.profile}"


rule all:
    input:
        f"{BUILD}/share/index.html",


for notebook in MAKERS:

    rule:
        name: f"notebook_{notebook}"
        input: needs(notebook)
        output: made_by(notebook)
        log: f"{BUILD}/notebooks/{notebook}.ipynb"
        params: notebook=notebook, profile=PROFILE
        message: "running notebook {params.notebook} ({params.profile})"
        shell: EXECUTE


for notebook in READERS:

    rule:
        name: f"notebook_{notebook}"
        input: needs(notebook), *[made_by(other) for other in MAKERS]
        output: touch(f"{BUILD}/notebooks/{notebook}.done")
        log: f"{BUILD}/notebooks/{notebook}.ipynb"
        params: notebook=notebook, profile=PROFILE
        message: "running notebook {params.notebook} ({params.profile})"
        shell: EXECUTE


rule share:
    input:
        *[made_by(notebook) for notebook in MAKERS],
        *[f"{BUILD}/notebooks/{notebook}.done" for notebook in READERS],
        "hq_lib/results/share.py",
    output:
        f"{BUILD}/share/index.html",
    message:
        "rendering the notebooks as pages to share"
    shell:
        f"python -m hq_lib.results.share --profile {PROFILE}"
