"""What the crossbar study measures: circuits, corrections, times and sizes, as data (notebook 08).

Every study changes one thing from one base: ResNet-20 in W8A8, pairs of cells, a weight scale per column, 128-row
tiles, analog inputs, ideal reading. The column's scale is that of its quantized weights: their largest integer is 127
in every column, so that it fills the window; a scale per layer needs weights that are quantized per layer. Percent is
written as a fraction wherever a device takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    Device,
    Faults,
    Mapping,
    Wires,
    device,
    proportional,
    state_independent,
)
from hq_lib.crossbar.profiles import IDEAL, PCM_NANDAKUMAR
from hq_lib.results import paths

HOUR_S, DAY_S, YEAR_S = 3600.0, 86_400.0, 3.156e7
CORRECTIONS = {
    "none": "no correction",
    "global": "one gain per layer",
    "column_open": "gain and offset per column, open loop",
    "column": "gain and offset per column",
    "bn": "batch-norm statistics",
}
"""Correction → in words. Both "column" kinds are fitted at the time of reading; "column" in a closed loop."""
STUDIES = ("no_error", "recovery", "budget", "sigma", "adc", "stuck", "drift")
"""In the order in which they are run."""


@dataclass(frozen=True)
class Point:
    """One circuit at one place of one study."""

    study: str
    """One of ``STUDIES``."""
    effect: str
    """Line of the figure or of the table."""
    x: float
    """Place on the line, in the study's unit: percent, bits, seconds; 0 where there is none."""
    circuit: Circuit
    """Everything but the seed."""
    corrections: tuple[str, ...]
    """Keys of ``CORRECTIONS``, each measured on the same cells."""
    t_s: float = 0.0
    """Seconds since programming; 0 = the device's reference time."""
    drawn: bool = True
    """Whether anything is random, so that several draws are wanted."""
    bits: int = 8
    """Bits of weights and activations."""
    per_layer: bool = False
    """Whether weights are quantized with one scale per layer; with one per column every column fills the window."""


@dataclass(frozen=True)
class Size:
    """How much a profile measures."""

    n_test: int
    """Test images of each number."""
    n_draws: int
    """Draws of the cells (and of the calibration images) of each point."""
    n_calib: int
    """Training images behind gains, offsets and converter ranges."""
    n_norm: int
    """Training images behind batch-norm statistics."""
    state_independent_pct: tuple[float, ...]
    """Programming errors, percent of the conductance window."""
    proportional_pct: tuple[float, ...]
    """Programming errors, percent of the target."""
    adc_bits: tuple[int, ...]
    """Converter widths."""
    tile_rows: tuple[int, ...]
    """Array sizes, rows."""
    stuck_pct: tuple[float, ...]
    """Stuck cells, percent of all, half of them at G_min and half at G_max."""
    times_s: tuple[float, ...]
    """Seconds since programming, from the device's reference time on."""
    slow: bool
    """Whether effects that take minutes are measured: wire resistance, all of it at once."""
    n_pairs: int
    """Points of each panel of the scatter."""


SIZES = {
    "smoke": Size(20, 1, 8, 16, (2.0, 5.0), (10.0, 20.0), (6, 8), (64, 128), (0.5, 1.0), (20.0, DAY_S), False, 30),
    "quick": Size(
        250, 1, 32, 128, (2.0, 5.0, 10.0), (10.0, 30.0, 60.0), (4, 5, 6, 8), (64, 256), (0.1, 0.5, 2.0),
        (20.0, HOUR_S, DAY_S, YEAR_S, 10 * YEAR_S), False, 100,
    ),
    "full": Size(
        1000, 3, 64, 256, (1.0, 2.0, 5.0, 10.0), (10.0, 20.0, 40.0, 60.0), (4, 5, 6, 8), (64, 128, 256),
        (0.1, 0.5, 2.0, 5.0), (20.0, HOUR_S, DAY_S, YEAR_S, 10 * YEAR_S), True, 100,
    ),
}  # fmt: skip
"""Profile → sizes."""

DRIFT_ONLY = replace(PCM_NANDAKUMAR, name="pcm_drift_only", error=None, read=None)
RRAM_SECOND, RRAM_DAY = "rram, column scale", "programming, RRAM 1 day (Wan)"
ONE_SCALE = "no error, one scale per layer"
"""Effects that several tables and figures show."""
NOISY_READS = replace(IDEAL, name="ideal_noisy_reads", read=ConstantRead(0.01))
ALL_OF_IT = Circuit(PCM_NANDAKUMAR, adc=Adc(8), faults=Faults(0.001, 0.001))


def points(profile: str, studies: tuple[str, ...] = STUDIES) -> list[Point]:
    """Everything that a profile measures, study after study.

    Errors: a study that does not exist.
    """
    size = SIZES[paths.check_profile(profile)]
    for name in studies:
        if name not in STUDIES:
            raise ValueError(f"unknown study {name!r}: choose among {', '.join(STUDIES)}")
    makers = {
        "no_error": no_error, "recovery": recovery, "budget": error_budget, "sigma": sigma, "adc": adc, "stuck": stuck,
        "drift": drift,
    }  # fmt: skip
    return [point for name in STUDIES if name in studies for point in makers[name](size)]


def no_error(size: Size) -> Iterator[Point]:
    """What each correction costs on perfect cells; only batch-norm statistics depend on the images drawn."""
    yield Point("no_error", "no error", 0, Circuit(IDEAL), ("none", "column"), drawn=False)
    yield Point("no_error", "no error", 0, Circuit(IDEAL), ("bn",))
    yield Point("no_error", ONE_SCALE, 0, Circuit(IDEAL), ("none",), drawn=False, per_layer=True)
    if size.slow:
        yield Point("no_error", "no error", 0, Circuit(IDEAL), ("none",), drawn=False, bits=4)


def recovery(size: Size) -> Iterator[Point]:
    """Wan's RRAM after one second, in both published fits, by weight scale and correction."""
    yield Point("recovery", RRAM_SECOND, 0, Circuit(device("rram")), tuple(CORRECTIONS))
    for fit, scale in (("rram", "layer"), ("rram_crosssim", "column"), ("rram_crosssim", "layer")):
        circuit, kinds = Circuit(device(fit), Mapping(scale=scale)), ("none", "column", "bn")
        yield Point("recovery", f"{fit}, {scale} scale", 0, circuit, kinds, per_layer=scale == "layer")
    if size.slow:
        yield Point("recovery", RRAM_SECOND, 0, Circuit(device("rram")), ("none", "column"), bits=4)


def error_budget(size: Size) -> Iterator[Point]:
    """One effect at a time on otherwise perfect cells, then several at once; RRAM after a second is in `recovery`."""
    effects: dict[str, Circuit] = {
        "ADC, 8 bits, fitted range": Circuit(IDEAL, adc=Adc(8)),
        "ADC, 8 bits, full range": Circuit(IDEAL, adc=Adc(8, "max")),
        "programming, PCM (Joshi)": Circuit(device("pcm")),
        RRAM_DAY: Circuit(device("rram_1day")),
        "read noise, 1 % of G_max": Circuit(NOISY_READS),
        "stuck cells, 0.1 % low, 0.1 % high": Circuit(IDEAL, faults=Faults(0.001, 0.001)),
    }
    fixed = ("ADC, 8 bits, fitted range", "ADC, 8 bits, full range")
    for effect, circuit in effects.items():
        yield Point("budget", effect, 0, circuit, ("none", "column", "bn"), drawn=effect not in fixed)
    yield Point("budget", "drift alone, PCM, 1 day", 0, Circuit(DRIFT_ONLY), ("none", "column", "bn"), DAY_S)
    if size.slow:
        wires = Circuit(IDEAL, wires=Wires())
        yield Point("budget", "wires, 1 ohm per cell, 25 uS", 0, wires, ("none", "column", "bn"), drawn=False)
        together = "PCM with drift, reads, ADC, stuck, 1 day"
        yield Point("budget", together, 0, ALL_OF_IT, ("none", "column", "bn"), DAY_S)


def sigma(size: Size) -> Iterator[Point]:
    """Accuracy against programming error, generic cells."""

    def line(effect: str, values: tuple[float, ...], make: Callable[[float], Device]) -> Iterator[Point]:
        for pct in values:
            yield Point("sigma", effect, pct, Circuit(make(pct / 100)), ("none", "column"))

    yield from line("state independent", size.state_independent_pct, state_independent)
    yield from line("proportional", size.proportional_pct, proportional)


def adc(size: Size) -> Iterator[Point]:
    """Accuracy against converter bits by array size, perfect cells; ranges fitted on each draw's images.

    The range covers 99.99 % of the currents, or has the least mean error (both rules of ``Adc``), or all that can come.
    """
    for rows in size.tile_rows:
        for bits in size.adc_bits:
            circuit = Circuit(IDEAL, Mapping(tile_rows=rows), adc=Adc(bits))
            yield Point("adc", f"{rows} rows", bits, circuit, ("none",))
    for bits in size.adc_bits:
        yield Point("adc", "128 rows, least error", bits, Circuit(IDEAL, adc=Adc(bits, coverage=None)), ("none",))
        yield Point("adc", "128 rows, full range", bits, Circuit(IDEAL, adc=Adc(bits, "max")), ("none",), drawn=False)


def stuck(size: Size) -> Iterator[Point]:
    """Accuracy against stuck cells, with and without a fault map before programming."""
    for remap, effect in (("none", "no fault map"), ("both", "remapped")):
        for pct in size.stuck_pct:
            circuit = Circuit(IDEAL, faults=Faults(pct / 200, pct / 200), remap=remap)
            yield Point("stuck", effect, pct, circuit, ("none", "column"))


def drift(size: Size) -> Iterator[Point]:
    """Accuracy against time: PCM with drift, programming error and read noise."""
    kinds = ("none", "global", "column", "bn")
    for t_s in size.times_s:
        yield Point("drift", "PCM", t_s, Circuit(PCM_NANDAKUMAR), kinds, t_s)
