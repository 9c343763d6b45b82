"""What a reconstruction leaves behind: a report per unit, and files from which a killed run goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, fx, nn

from hq_lib.graph.state import quantizers
from hq_lib.models import read_checkpoint, write_checkpoint
from hq_lib.results import atomic


class ReconstructionError(ValueError):
    """A reconstruction that cannot run or go on; the message names the unit, the images or the file, and the mend."""


@dataclass(frozen=True)
class UnitReport:
    """How one block or layer came out."""

    name: str
    """dotted name of the block or layer"""
    position: int
    """0 for the first unit of the pass"""
    n_units: int
    """units of the pass"""
    loss_before: float
    """sum over channels of |y - target|^p, mean over images and positions, rounded to nearest and calibrated"""
    loss_after: float
    """the same with the learned (hard) rounding and steps, nothing dropped"""
    undecided_pct: float
    """share of h(V) in (0.01, 0.99) when the rounding was made hard, percent; below 0.1 is what a schedule aims at"""
    n_weights: int
    """weights whose rounding was learned"""
    seconds: float
    """wall time of the unit, caches included"""
    resumed: bool = False
    """True: read from the files of an earlier run"""

    def __str__(self) -> str:
        return (
            f"{self.position + 1}/{self.n_units} {self.name}: loss {self.loss_before:.4g} -> {self.loss_after:.4g}, "
            f"undecided {self.undecided_pct:.2f} %, {self.seconds:.1f} s{' (resumed)' if self.resumed else ''}"
        )


def fingerprint(qnet: fx.GraphModule, images: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a resumed run must agree with: settings, images, and the network with its grids at the start."""
    return {"config": dict(config), "images": _sha([images]), "network": _sha(qnet.state_dict().values())}


def _sha(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in (value for value in values if isinstance(value, Tensor)):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RunFolder:
    """The files of one pass: ``run.json`` and one ``unit_000.safetensors`` per finished unit."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        """Begin at ``path``, or go on there; ``ReconstructionError`` if another run's files are there."""
        self.path = path
        file = path / "run.json"
        path.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path / ".lock"):  # of two that begin here at once, one is the first
            if not file.exists():
                atomic.write_text(file, json.dumps(dict(record), indent=1, sort_keys=True) + "\n")
                return
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ReconstructionError(
                f"{file} is damaged ({error}): delete {path}, the pass is then done again"
            ) from error
        if differing := [key for key, value in record.items() if found.get(key) != json.loads(json.dumps(value))]:
            raise ReconstructionError(
                f"{file} belongs to a run with another {', '.join(differing)}: go on with the same, give a fresh "
                f"folder, or delete this one"
            )

    def save(self, report: UnitReport, body: nn.Module) -> None:
        """Write the quantizers of a finished unit, whole or not at all."""
        learned = {name: quantizer.state_dict() for name, quantizer in quantizers(body).items()}
        state = {f"{name}:{key}": value for name, own in learned.items() for key, value in own.items()}
        write_checkpoint(self._file(report.position), state, dataclasses.asdict(report))

    def load(self, position: int, body: nn.Module) -> UnitReport | None:
        """Put a finished unit's quantizers back and return its report; None where the unit is not finished."""
        file = self._file(position)
        if not file.exists():
            return None
        try:
            state, record = read_checkpoint(file)
            for name, quantizer in quantizers(body).items():
                own = {key.split(":", 1)[1]: value for key, value in state.items() if key.split(":", 1)[0] == name}
                quantizer.load_state_dict(own)
            del record["sha256"]
            return UnitReport(**{**record, "resumed": True})
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ReconstructionError(f"{file} is damaged ({error}): delete it, the unit is then done again") from error

    def _file(self, position: int) -> Path:
        return self.path / f"unit_{position:03d}.safetensors"
