"""Chosen layers of an integer network on a bench, simulated, rehearsed, real or recorded: one loop for all of them.

    hq crossbar net.safetensors --engine rehearsal --layers linear          a bench in memory, over TCP
    hq crossbar net.safetensors --engine tcp --set crossbar.host=192.168.0.7 --set crossbar.port=5025
    hq crossbar net.safetensors --engine replay                             again, without the bench

Layers are loaded, calibrated column by column on training images, and run on test images; all others are exact
integers. Every multiplication of a bench is kept in the folder, a simulated one where it is asked for. A bench that
fails ends the run with `BenchError` and loses nothing: the same plan again answers from the folder what was measured,
writes the cells again and asks the bench for the rest. Where writing is not exact, gains and offsets do not fit cells
that were written again after they were fitted: ``written_again`` names these layers. ``replay`` does the whole run
again without a bench, to the same logits.
``summary.json`` and ``layers.csv`` hold what came out.
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch

from hq_lib.crossbar.checks import Bound, Count, CrossbarError, Positive, Settings
from hq_lib.crossbar.circuit import Circuit, Drive
from hq_lib.crossbar.drivers import BenchServer, Driver, Limits, TcpDriver
from hq_lib.crossbar.engine import Engine
from hq_lib.crossbar.hardware import HardwareEngine, Patience
from hq_lib.crossbar.mapping import STUCK_HIGH, STUCK_LOW
from hq_lib.crossbar.network import EngineNetwork
from hq_lib.crossbar.profiles import device
from hq_lib.crossbar.recording import RecordEngine, ReplayEngine
from hq_lib.crossbar.simulator import SimEngine
from hq_lib.crossbar.trace import Trace, load_parts
from hq_lib.data import ImageSet, normalize
from hq_lib.integer import IntegerModel
from hq_lib.integer import run as run_integers
from hq_lib.results import atomic
from hq_lib.training.evaluation import evaluation_of


class FakeDriver:
    """A bench in memory, exact but for the errors it is given; follows `Driver`.

    Args:
        limits: its size.
        gain, offset: of every column, dimensionless and counts.
        noise: standard deviation of every count, counts.
        timeouts: whether the next reads time out, one truth each; those behind them do not.
        stuck: {tile: uint8 (rows, columns) of the codes of `Faults`}; what these cells are written with is lost.
        seed: of the noise.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        gain: float = 1.0,
        offset: float = 0.0,
        noise: float = 0.0,
        timeouts: Iterable[bool] = (),
        stuck: dict[int, np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        self._limits, self.gain, self.offset, self.noise = limits, gain, offset, noise
        self.timeouts, self.n_reads, self.stuck = list(timeouts), 0, stuck or {}
        self._levels: dict[int, np.ndarray] = {}
        self._random = np.random.default_rng(seed)

    def limits(self) -> Limits:
        return self._limits

    def write(self, tile: int, levels: np.ndarray) -> None:
        self._limits.refuse(tile, levels, "levels")
        codes = self.stuck.get(tile, np.zeros(levels.shape, np.uint8))[: levels.shape[0], : levels.shape[1]]
        high = np.where(codes == STUCK_HIGH, self._limits.level_max, levels.astype(np.int64))
        self._levels[tile] = np.where(codes == STUCK_LOW, 0, high)

    def read(self, tile: int, codes: np.ndarray) -> np.ndarray:
        self.n_reads += 1
        if self.timeouts and self.timeouts.pop(0):
            raise TimeoutError("the fake bench was told to time out")
        self._limits.refuse(tile, codes, "codes")
        if tile not in self._levels:
            raise CrossbarError(f"tile {tile} was never written")
        exact = codes.astype(np.int64) @ self._levels[tile][: codes.shape[1]]
        counts = self._limits.counts_per_unit * self.gain * exact + self.offset
        counts = np.rint(counts + self.noise * self._random.standard_normal(counts.shape))
        return counts.clip(*self._limits.counts)

    def environment(self) -> dict[str, float]:
        return {"time_s": float(self.n_reads), "temperature_C": 25.0}

    def close(self) -> None:
        self._levels.clear()


REHEARSAL = Limits(
    n_tiles=64, rows=128, columns=128, level_max=255, code_max=255, count_max=2**31, rows_per_read=256,
    counts_per_unit=0.01,
)  # fmt: skip
"""The bench of a rehearsal: in memory behind TCP, with 3 % too much gain, an offset and noise in its counts."""


@dataclass(frozen=True)
class Plan(Settings):
    """One run. The same plan on the same folder goes on where it stopped."""

    engine: Literal["sim", "rehearsal", "tcp", "replay"]
    """What multiplies."""
    folder: Path
    """Where the record and the results lie."""
    layers: tuple[str, ...] = ("linear",)
    """Names or patterns with * of the layers that are multiplied on the engine."""
    n_test: Count = 20
    """Test images, >= 1."""
    n_calib: Annotated[int, Bound(">= 0", whole=True)] = 8
    """Training images behind gains and offsets per column; 0 = no calibration."""
    device: str = "rram"
    """Kind of cell of ``sim``: a name, or a CSV file of measured ones (see ``crossbar.profiles``)."""
    seed: int = 0
    """Of the cells of ``sim``: another one is another chip."""
    record: bool = False
    """Whether multiplications of ``sim`` are kept too: 300 MiB an image of EfficientNet-Lite0."""
    host: str = "127.0.0.1"
    """Where the bench of ``tcp`` listens."""
    port: int = 0
    """Its port."""
    timeout_s: Positive = 5.0
    """Seconds that a call of ``tcp`` may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "tcp" and not 0 < self.port < 2**16:
            raise CrossbarError(f"port {self.port}: a bench behind TCP needs the port it listens on")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came out of a run."""

    logits: np.ndarray
    """float32 (n_test, n_classes)."""
    summary: dict[str, Any]
    """acc_pct, exact_acc_pct (all layers exact), logit_error, n_test, n_calib, n_rows on record, layers, engine;
    of a recorded run n_recorded, the rows answered from what the folder held before, and n_measured, those it adds;
    of a bench tiles_needed, n_tiles, n_writes and write_s (seconds) of now; and of all that is on record, in a replay
    too, the n_saturated counts, and the layers written_again between their rows."""
    layers: pd.DataFrame
    """One row per matrix: layer, kind, n_rows, rmse_before_lsb, rmse_after_lsb on the calibration rows; of a bench
    written_again."""


def run(plan: Plan, model: IntegerModel, test: ImageSet, train: ImageSet) -> Outcome:
    """The outcome of ``plan`` for ``model``, calibrated on images of ``train``, judged on the first of ``test``.

    Errors: `BenchError` where the bench fails for good (what it measured is on disk), `TraceError` where a replay asks
    for what was not measured or the folder is of another engine or network.
    """
    images = test.subset(torch.arange(min(plan.n_test, len(test))))
    x = normalize(images.images, images.spec)
    with ExitStack() as stack:
        engine = stack.enter_context(_engine(plan, stack))
        network = EngineNetwork(model, dict.fromkeys(plan.layers, engine))
        if plan.n_calib:
            few = train.drawn(plan.n_calib, 0)
            network.calibrate(normalize(few.images, few.spec))
        logits, exact = network.run(x), run_integers(model, x)
        found = {name: evaluation_of(torch.from_numpy(each), images.labels).acc_pct
                 for name, each in (("acc_pct", logits), ("exact_acc_pct", exact))}  # fmt: skip
        error = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
        trace = engine.trace() if isinstance(engine, RecordEngine) else getattr(engine, "trace", Trace())
        written: dict[str, Any] = {}
        if isinstance(engine, RecordEngine):
            written |= {"n_recorded": engine.n_recorded, "n_measured": engine.n_measured}
            written |= engine.inner.programming() if isinstance(engine.inner, HardwareEngine) else {}
        if of_bench := trace.engine.get("engine") == "hardware":  # from the record: however often, a run says the same
            written |= {"n_saturated": trace.n_saturated, "written_again": trace.written_again}
        summary = {
            **found, "logit_error": error, "n_test": len(logits), "n_calib": plan.n_calib, "n_rows": trace.n_rows,
            **written, "layers": list(network.layers), "engine": engine.describe(),
        }  # fmt: skip
        fits = {group.name: engine.correction(group) for engine, group in network.groups()}
        lines = [(name, c.kind, c.n_rows, c.rmse_before, c.rmse_after) for name, c in fits.items()]
        columns = ["layer", "kind", "n_rows", "rmse_before_lsb", "rmse_after_lsb"]
        layers = pd.DataFrame(lines, columns=columns)
        if of_bench:
            layers["written_again"] = layers["layer"].isin(written["written_again"])
        outcome = Outcome(logits, summary, layers)
    if plan.engine != "replay":
        atomic.write_text(plan.folder / "summary.json", json.dumps(outcome.summary, indent=1) + "\n")
        atomic.write_text(plan.folder / "layers.csv", outcome.layers.to_csv(index=False, lineterminator="\n"))
    return outcome


def drive_of(limits: Limits) -> Drive:
    """All bits of an 8-bit input at once where the bench takes such codes, else as many bits a step as it takes."""
    return Drive() if limits.code_max >= 255 else Drive("serial", (limits.code_max + 1).bit_length() - 1)


def _engine(plan: Plan, stack: ExitStack) -> Engine:
    """The engine of ``plan``, recording what a bench measures; what it needs is closed with ``stack``."""
    if plan.engine == "replay":
        trace = load_parts(plan.folder)
        if not trace.calls:
            raise CrossbarError(f"{plan.folder} holds no recorded run: make one with another engine first")
        return ReplayEngine(trace)
    if plan.engine == "sim":
        made = SimEngine(Circuit(device(plan.device), seed=plan.seed))
        if plan.record:
            return RecordEngine(made, plan.folder)
        if any(plan.folder.glob("part_*")):
            raise CrossbarError(f"{plan.folder} holds the record of another run: choose an empty folder, or go on with "
                                "it by record=true (hq: --record)")  # fmt: skip
        return made
    driver: Driver
    if plan.engine == "rehearsal":
        fake = FakeDriver(REHEARSAL, gain=1.03, offset=40.0, noise=20.0)
        driver = TcpDriver(*stack.enter_context(BenchServer(fake)).address, timeout_s=plan.timeout_s)
    else:
        driver = TcpDriver(plan.host, plan.port, timeout_s=plan.timeout_s)
    stack.callback(driver.close)
    limits = Patience().insist(driver.limits, "asking the bench for its limits")
    return RecordEngine(HardwareEngine(driver, drive=drive_of(limits)), plan.folder)
