"""Every folder of the workbook, named once.

Two environment variables move them: ``HQ_DATA`` (where downloaded data sets are cached) and ``HQ_OUT`` (where results,
figures and runs are written). The ``smoke`` profile writes to a temporary folder unless ``HQ_OUT`` says otherwise, so
that a test run can never overwrite real results.
"""

import os
import tempfile
from functools import cache
from pathlib import Path

from hq_lib.results.hints import check_known

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("smoke", "quick", "full")


def check_profile(profile: str) -> str:
    """The profile itself; an unknown one raises ``ValueError`` that names the nearest valid one."""
    check_known(profile, PROFILES, "profile")
    return profile


def cache_dir() -> Path:
    """Where verified copies of the public data sets live (git ignores it): in ``$HQ_DATA``, else ``data/``."""
    return Path(os.environ.get("HQ_DATA") or ROOT / "data") / "cache"


def checkpoints_dir() -> Path:
    """The committed checkpoints (safetensors beside their run records); always the repository's own."""
    return ROOT / "data" / "checkpoints"


@cache
def _smoke_dir() -> Path:
    return Path(tempfile.mkdtemp(prefix="hq_smoke_"))


def out_dir(profile: str) -> Path:
    """Root of everything that a run of this profile writes."""
    check_profile(profile)
    if os.environ.get("HQ_OUT"):
        return Path(os.environ["HQ_OUT"])
    return _smoke_dir() if profile == "smoke" else ROOT


def _profile_folder(profile: str, *parts: str) -> Path:
    base = out_dir(profile).joinpath(*parts)
    return base if profile == "full" else base / profile


def results_dir(profile: str) -> Path:
    """Folder of result CSVs: ``data/results`` (reference), ``data/results/quick`` (git ignores it) or temporary."""
    return _profile_folder(profile, "data", "results")


def figures_dir(profile: str) -> Path:
    """Folder of figures and tables, parallel to ``results_dir``: ``figures`` or ``figures/quick``."""
    return _profile_folder(profile, "figures")


def runs_dir(profile: str) -> Path:
    """Folder of training runs (resumable checkpoints and JSON-lines logs); git ignores it."""
    return _profile_folder(profile, "data", "runs")


def shared_data() -> Path | None:
    """The optional development data beside the checkout (``../shared/data``), or None where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def build_dir(profile: str) -> Path:
    """Folder of build products (executed notebooks, pages to share): ``build/<profile>``; git ignores it."""
    return out_dir(profile) / "build" / profile
