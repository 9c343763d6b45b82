"""A run that papermill's file describes (``papermill -f notebooks/configs/....yaml``), carried out in a notebook.

What carries it out is loaded where a file was given: a notebook does not depend on all rooms for the sake of one cell.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from hq_lib.results import paths


def keys() -> tuple[str, ...]:
    """What such a file may say: the fields of ``configuration.Configuration``."""
    return importlib.import_module("hq_lib.studies.configuration").KEYS


def carried_out(given: Mapping[str, Any], profile: str) -> str:
    """One line on the run, trained or quantized as ``hq`` does, its file in the profile's folder of runs.

    ``given``: ``Session.run``; may be empty, then nothing is done. Errors are those of ``configuration.read``.
    """
    if not given:
        return "no file was given, as by papermill -f notebooks/configs/....yaml: nothing is done"
    steps = importlib.import_module("hq_lib.studies.steps")
    run = importlib.import_module("hq_lib.studies.configuration").read(changes=given)
    run = dataclasses.replace(run, profile=profile, output=str(paths.runs_dir(profile) / "hq" / run.target().name))
    run.target().parent.mkdir(parents=True, exist_ok=True)
    recipes = importlib.import_module("hq_lib.studies.ptq.recipes").RECIPES
    file, acc_pct = (steps.quantized if run.method in recipes else steps.trained)(run)
    return f"{run.name}: {acc_pct:.2f} % of the test images, in {file.name}"
