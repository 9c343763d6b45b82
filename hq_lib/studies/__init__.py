"""The studies of the workbook: each appends tidy rows to ``data/results/`` as it goes and loses nothing when killed.

``study`` is the one mechanism, ``bench`` the shipped networks with their images; a folder for each notebook holds what
it measures (``study``), what its tables say (``tables``) and its figures (``figures``).
"""

import importlib
from typing import Any

FOLDERS = ("float_training", "bn_fold", "qat", "ptq", "selection", "hybrid", "integer_export", "crossbar", "edge_cloud")
"""Folders that have studies, in the order in which a batch engine runs them."""


def every() -> dict[str, Any]:
    """Name -> ``study.Study`` of all folders, in order."""
    modules = [importlib.import_module(f"hq_lib.studies.{folder}.study") for folder in FOLDERS]
    return {study.name: study for module in modules for study in module.STUDIES}
