"""Chosen layers of ResNet-20 on a bench, simulated, rehearsed, real or recorded: one loop for all of them.

    python -m hq_lib.studies.crossbar.bench rehearsal --folder runs/linear --layers linear
    python -m hq_lib.studies.crossbar.bench tcp --host 192.168.0.7 --port 5025 --folder runs/linear
    python -m hq_lib.studies.crossbar.bench replay --folder runs/linear --layers linear

Layers are loaded, calibrated column by column on training images, and run on test images; all others are exact
integers. Every multiplication is kept in the folder. A bench that fails ends the run with exit code 3 and loses
nothing: the same command again answers from the folder what was measured and asks the bench for the rest. ``replay``
does the whole run again without a bench, to the same logits. ``summary.json`` and ``layers.csv`` hold what came out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hq_lib.crossbar import (
    BenchError,
    BenchServer,
    Circuit,
    CrossbarError,
    Drive,
    Driver,
    Engine,
    EngineNetwork,
    FakeDriver,
    HardwareEngine,
    Limits,
    Patience,
    RecordEngine,
    ReplayEngine,
    SimEngine,
    TcpDriver,
    device,
)
from hq_lib.crossbar.recording import load_parts
from hq_lib.data import normalize
from hq_lib.results import atomic, paths
from hq_lib.studies.crossbar.study import CrossbarBench, crossbar_bench
from hq_lib.training.evaluation import evaluation_of

ENGINES = ("sim", "rehearsal", "tcp", "replay")
REHEARSAL = Limits(
    n_tiles=64, rows=128, columns=128, level_max=255, code_max=255, count_max=2**31, rows_per_read=256,
    counts_per_unit=0.01,
)  # fmt: skip
"""The bench of a rehearsal: in memory behind TCP, with 3 % too much gain, an offset and noise in its counts."""


@dataclass(frozen=True)
class Plan:
    """One run. The same plan on the same folder goes on where it stopped."""

    engine: str
    """One of ``ENGINES``."""
    folder: Path
    """Where the record and the results lie."""
    layers: tuple[str, ...] = ("linear",)
    """Names or patterns with * of the layers that are multiplied on the engine."""
    n_test: int = 20
    """Test images, >= 1."""
    n_calib: int = 8
    """Training images behind gains and offsets per column; 0 = no calibration."""
    device: str = "rram"
    """Kind of cell of ``sim``."""
    host: str = "127.0.0.1"
    """Where the bench of ``tcp`` listens."""
    port: int = 0
    """Its port."""
    timeout_s: float = 5.0
    """Seconds that a call of ``tcp`` may take."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise CrossbarError(f"engine {self.engine!r}: choose among {', '.join(ENGINES)}")
        if self.n_test < 1 or self.n_calib < 0:
            raise CrossbarError(f"n_test = {self.n_test} must be 1 or more, n_calib = {self.n_calib} 0 or more")
        if self.engine == "tcp" and not 0 < self.port < 2**16:
            raise CrossbarError(f"port {self.port}: a bench behind TCP needs the port it listens on")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came out of a run."""

    logits: np.ndarray
    """float32 (n_test, n_classes)."""
    summary: dict[str, Any]
    """acc_pct, exact_acc_pct (all layers exact), logit_error, n_test, n_calib, n_rows recorded, layers, engine."""
    layers: pd.DataFrame
    """One row per matrix: layer, kind, n_rows, rmse_before_lsb, rmse_after_lsb on the calibration rows."""


def run(plan: Plan, bench: CrossbarBench) -> Outcome:
    """The outcome of ``plan`` on the network and images of ``bench``, kept in the plan's folder.

    Errors: `BenchError` where the bench fails for good (what it measured is on disk), `TraceError` where a replay asks
    for what was not measured or the folder is of another engine or network.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(_engine(plan, stack))
        network = EngineNetwork(bench.model, dict.fromkeys(plan.layers, engine))
        if plan.n_calib:
            network.calibrate(bench.calibration(plan.n_calib, 0))
        images = bench.test.subset(torch.arange(min(plan.n_test, len(bench.test))))
        logits = network.run(normalize(images.images, images.spec))
        outcome = Outcome(logits, _summary(plan, bench, network, engine, logits, images.labels), _layers(network))
    if plan.engine != "replay":
        atomic.write_text(plan.folder / "summary.json", json.dumps(outcome.summary, indent=1) + "\n")
        atomic.write_text(plan.folder / "layers.csv", outcome.layers.to_csv(index=False, lineterminator="\n"))
    return outcome


def drive_of(limits: Limits) -> Drive:
    """All bits of an 8-bit input at once where the bench takes such codes, else as many bits a step as it takes."""
    return Drive() if limits.code_max >= 255 else Drive("serial", (limits.code_max + 1).bit_length() - 1)


def _engine(plan: Plan, stack: ExitStack) -> Engine:
    """The engine of ``plan``, recording where anything is measured; what it needs is closed with ``stack``."""
    if plan.engine == "replay":
        trace = load_parts(plan.folder)
        if not trace.calls:
            raise CrossbarError(f"{plan.folder} holds no recorded run: make one with another engine first")
        return ReplayEngine(trace)
    if plan.engine == "sim":
        return RecordEngine(SimEngine(Circuit(device(plan.device))), plan.folder)
    driver: Driver
    if plan.engine == "rehearsal":
        made = FakeDriver(REHEARSAL, gain=1.03, offset=40.0, noise=20.0)
        driver = TcpDriver(*stack.enter_context(BenchServer(made)).address, timeout_s=plan.timeout_s)
    else:
        driver = TcpDriver(plan.host, plan.port, timeout_s=plan.timeout_s)
    limits = Patience().insist(driver.limits, "asking the bench for its limits")
    return RecordEngine(HardwareEngine(driver, drive=drive_of(limits)), plan.folder)


def _summary(
    plan: Plan, bench: CrossbarBench, network: EngineNetwork, engine: Engine, logits: np.ndarray, labels: torch.Tensor
) -> dict[str, Any]:
    exact = bench.logits[: len(logits)]
    acc, exact_acc = (evaluation_of(torch.from_numpy(each), labels).acc_pct for each in (logits, exact))
    trace = engine.trace() if isinstance(engine, RecordEngine) else load_parts(plan.folder)
    return {
        "acc_pct": acc,
        "exact_acc_pct": exact_acc,
        "logit_error": float(np.linalg.norm(logits - exact) / np.linalg.norm(exact)),
        "n_test": len(logits),
        "n_calib": plan.n_calib,
        "n_rows": trace.n_rows,
        "layers": list(network.layers),
        "engine": engine.describe(),
    }


def _layers(network: EngineNetwork) -> pd.DataFrame:
    corrections = {group.name: engine.correction(group) for engine, group in network.groups()}
    columns = ["layer", "kind", "n_rows", "rmse_before_lsb", "rmse_after_lsb"]
    rows = [(name, c.kind, c.n_rows, c.rmse_before, c.rmse_after) for name, c in corrections.items()]
    return pd.DataFrame(rows, columns=columns)


def main(words: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 2 a setting that cannot be, 3 the bench failed (run the same command again)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = asdict(Plan("sim", Path()))
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--folder", type=Path, required=True, help="where the record lies; resumes what is there")
    parser.add_argument("--layers", nargs="+", default=defaults["layers"], help="names or patterns with *")
    for name in ("n_test", "n_calib", "device", "host", "port", "timeout_s"):
        value = defaults[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--profile", choices=paths.PROFILES, default="quick", help="how many test images there are")
    args = vars(parser.parse_args(words))
    bench = crossbar_bench(args.pop("profile"))
    try:
        args["layers"] = tuple(args["layers"])
        outcome = run(Plan(**args), bench)
    except BenchError as error:
        print(f"{error}\nwhat was measured is kept in {args['folder']}: run the same command again", file=sys.stderr)
        return 3
    except CrossbarError as error:
        print(error, file=sys.stderr)
        return 2
    print(outcome.layers.to_string(index=False))
    for key in ("acc_pct", "exact_acc_pct", "logit_error", "n_test", "n_calib", "n_rows"):
        print(f"{key:14s} {outcome.summary[key]:.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
