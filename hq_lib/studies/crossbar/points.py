"""What the crossbar studies measure: circuits, corrections, times and sizes, as data (notebook 08).

Everything changes one thing from one base: ResNet-20 in W8A8, pairs of cells, a weight scale per column, 128-row
tiles, analog inputs, ideal reading. The column's scale is that of its quantized weights: their largest integer is 127
in every column, so that it fills the window; a scale per layer needs weights that are quantized per layer. Percent is
written as a fraction wherever a device takes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hq_lib.crossbar import Adc, Circuit, ConstantRead, Device, Drive, Faults, FlickerRead, Mapping, Wires
from hq_lib.crossbar.profiles import IDEAL, PCM_NANDAKUMAR, RRAM_WAN_1S, device, proportional, state_independent
from hq_lib.results.hints import nearest
from hq_lib.studies.bench import TRAINED, known_networks, network_file, record_of
from hq_lib.studies.study import StudyError, check_choice

HOUR_S, DAY_S, YEAR_S = 3600.0, 86_400.0, 3.156e7
CORRECTIONS = ("none", "global", "column_open", "column", "bn")
"""Nothing, one gain per layer, gain and offset per column in an open and in a closed loop, batch-norm statistics; all
fitted at the time of reading. The gain per layer is a least-squares fit to exact products, in a closed loop; in `drift`
on PCM it is the ratio of what was read just after programming to what is read now, without exact products; in the
dot products of single layers it is fitted in an open loop."""
RULES = ("readout", "product")
"""How long one draw of PCM's read noise lasts; "readout" is the source's rule (``FlickerRead.per``)."""


@dataclass(frozen=True)
class Plan:
    """How much a profile measures."""

    n_test: int
    """Test images of each number."""
    n_draws: int
    """Draws of the cells (and of the calibration images) of each place; seeds of noise-aware training."""
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
    networks: tuple[str, ...]
    """Trained networks: names of files in ``data/checkpoints``, or paths of network files."""
    cell_bits: tuple[int, ...]
    """Bits of a cell in the study of slices."""
    noise_pct: tuple[float, ...]
    """Weight noise of training, percent of the channel's largest weight; 0 trains as long without any."""
    programming_pct: tuple[float, ...]
    """Programming errors of a cell, percent of the window, that noise-aware networks are put on; a weight, on a pair of
    cells, errs by sqrt(2) times that."""
    epochs: int
    """Of noise-aware fine-tuning."""
    n_train: int | None
    """Its training images; None = all."""
    studies: tuple[str, ...] = ()
    """Which of ``STUDIES``; () = all of them."""
    converter_bits: tuple[int, ...] = (0,)
    """Converters that noise-aware networks are read by, bits with a fitted range; 0 = ideal reading. For each of them
    the largest noise is also trained through such converters, and through drives of the network's bits."""
    devices: tuple[str, ...] = ()
    """Devices of one's own, CSV files as `crossbar.device` reads them: lines of scatter, budget and drift each."""
    n_ptq: int = 256
    """Training images that the network's own ranges are fitted to, before it is on arrays."""


TIMES_S = (20.0, HOUR_S, DAY_S, YEAR_S, 10 * YEAR_S)
PLANS = {
    "smoke": Plan(
        10, 1, 4, 8, (2.0, 5.0), (10.0,), (6, 8), (64,), (1.0,), (20.0, DAY_S), False, 20, TRAINED[4:5], (2,),
        (0.0, 5.0), (5.0,), 1, 64, converter_bits=(0, 6), n_ptq=20,
    ),
    "quick": Plan(
        150, 1, 16, 64, (2.0, 5.0, 10.0), (10.0, 30.0, 60.0), (4, 5, 6, 8), (64, 256), (0.1, 0.5, 2.0),
        (20.0, HOUR_S, DAY_S, 10 * YEAR_S), False, 100, TRAINED[1::5], (1, 2), (0.0, 5.0), (2.0, 5.0, 10.0), 1,
        1_280, n_ptq=64,
    ),
    "full": Plan(
        1000, 3, 64, 256, (1.0, 2.0, 5.0, 10.0), (10.0, 20.0, 40.0, 60.0), (4, 5, 6, 8), (64, 128, 256),
        (0.1, 0.5, 2.0, 5.0), TIMES_S, True, 100, TRAINED, (1, 2, 4), (0.0, 2.0, 5.0), (2.0, 5.0, 10.0, 15.0), 1, None,
        converter_bits=(0, 6),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Net:
    """Which network is put on arrays: ResNet-20, quantized after training, or a trained one."""

    bits: int = 8
    """Bits of weights and activations of the shipped network; of a trained one its file says them."""
    per_layer: bool = False
    """Whether weights are quantized with one scale per layer; with one per column every column fills the window."""
    file: str = ""
    """A trained network (see ``Plan.networks``) in place of the one that is quantized after training."""
    noise_pct: float | None = None
    """Weight noise that the float network is fine-tuned with first; None: it is not."""
    train_bits: int = 0
    """Bits of the converters that this training goes through, and through drives of ``bits``; 0: through neither."""


@dataclass(frozen=True)
class Place:
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
    net: Net = Net()
    """What is put on the arrays."""


DRIFT_ONLY = replace(PCM_NANDAKUMAR, name="pcm_drift_only", error=None, read=None)
RRAM_SECOND, RRAM_DAY = "rram, column scale", "programming, RRAM 1 day (Wan)"
ONE_SCALE, ONE = "no error, one scale per layer", Net(per_layer=True)
"""Effects that several tables and figures show."""
NOISY_READS = replace(IDEAL, name="ideal_noisy_reads", read=ConstantRead(0.01))
ALL_OF_IT = Circuit(PCM_NANDAKUMAR, adc=Adc(8), faults=Faults(0.001, 0.001))


def places(plan: Plan) -> list[Place]:
    """Everything that a plan measures, study after study; unknown names are refused.

    Raises:
        StudyError: a study or a trained network that does not exist.
    """
    check_choice("crossbar", "study", plan.studies, STUDIES)
    for name in plan.networks:
        network_path(name)
    return [place for name, made in STUDIES.items() if name in (plan.studies or STUDIES) for place in made(plan)]


def network_path(name: str) -> Path:
    """The quantized network's file that ``name`` means, a path or the stem of a shipped one; else ``StudyError``."""
    path = network_file(name)
    if path is None:
        hint = nearest(name, known_networks())
        raise StudyError(f"no network file {name!r}: give a path, or the name of a shipped one{hint}")
    if "policy" not in record_of(name):
        raise StudyError(f"{path} holds a float network: give a quantized one (hq quantize writes it)")
    return path


def no_error(plan: Plan) -> Iterator[Place]:
    """What each correction costs on perfect cells; only batch-norm statistics depend on the images drawn."""
    yield Place("no_error", "no error", 0, Circuit(IDEAL), ("none", "column"), drawn=False)
    yield Place("no_error", "no error", 0, Circuit(IDEAL), ("bn",))
    yield Place("no_error", ONE_SCALE, 0, Circuit(IDEAL), ("none", "column"), drawn=False, net=ONE)
    yield Place("no_error", ONE_SCALE, 0, Circuit(IDEAL), ("bn",), net=ONE)
    if plan.slow:
        yield Place("no_error", "no error", 0, Circuit(IDEAL), ("none",), drawn=False, net=Net(4))


def recovery(plan: Plan) -> Iterator[Place]:
    """Wan's RRAM after one second, in both published fits, by weight scale and correction."""
    yield Place("recovery", RRAM_SECOND, 0, Circuit(device("rram")), tuple(CORRECTIONS))
    columns, layer = Mapping(), Mapping(scale="layer")
    for fit, mapping in (("rram", layer), ("rram_crosssim", columns), ("rram_crosssim", layer)):
        circuit, kinds = Circuit(device(fit), mapping), ("none", "column", "bn")
        yield Place("recovery", f"{fit}, {mapping.scale} scale", 0, circuit, kinds, net=Net(per_layer=mapping is layer))
    if plan.slow:
        yield Place("recovery", RRAM_SECOND, 0, Circuit(device("rram")), ("none", "column"), net=Net(4))


def error_budget(plan: Plan) -> Iterator[Place]:
    """One effect at a time on otherwise perfect cells, then several at once; RRAM after a second is in `recovery`."""
    effects: dict[str, Circuit] = {
        "ADC, 8 bits, fitted range": Circuit(IDEAL, adc=Adc(8)),
        "ADC, 8 bits, full range": Circuit(IDEAL, adc=Adc(8, "max")),
        "programming, PCM (Joshi)": Circuit(device("pcm")),
        RRAM_DAY: Circuit(device("rram_1day")),
        "read noise, 1 % of G_max": Circuit(NOISY_READS),
        "stuck cells, 0.1 % low, 0.1 % high": Circuit(IDEAL, faults=Faults(0.001, 0.001)),
    }
    effects |= {f"programming, {own.name}": Circuit(own) for own in map(device, plan.devices)}
    fixed = ("ADC, 8 bits, fitted range", "ADC, 8 bits, full range")
    for effect, circuit in effects.items():
        yield Place("budget", effect, 0, circuit, ("none", "column", "bn"), drawn=effect not in fixed)
    yield Place("budget", "drift alone, PCM, 1 day", 0, Circuit(DRIFT_ONLY), ("none", "column", "bn"), DAY_S)
    if plan.slow:
        wires = Circuit(IDEAL, wires=Wires())
        yield Place("budget", "wires, 1 ohm per cell, 25 uS", 0, wires, ("none", "column", "bn"), drawn=False)
        together = "PCM with drift, reads, ADC, stuck, 1 day"
        yield Place("budget", together, 0, ALL_OF_IT, ("none", "column", "bn"), DAY_S)


def sigma(plan: Plan) -> Iterator[Place]:
    """Accuracy against programming error, generic cells."""
    lines = {
        "state independent": (plan.state_independent_pct, state_independent),
        "proportional": (plan.proportional_pct, proportional),
    }
    for effect, (values, make) in lines.items():
        for pct in values:
            yield Place("sigma", effect, pct, Circuit(make(pct / 100)), ("none", "column"))


def adc(plan: Plan) -> Iterator[Place]:
    """Accuracy against converter bits by array size, perfect cells; ranges fitted on each draw's images.

    The range covers 99.99 % of the currents, or has the least mean error (both rules of ``Adc``), or all that can come.
    """
    for rows in plan.tile_rows:
        for bits in plan.adc_bits:
            circuit = Circuit(IDEAL, Mapping(tile_rows=rows), adc=Adc(bits))
            yield Place("adc", f"{rows} rows", bits, circuit, ("none",))
    for bits in plan.adc_bits:
        yield Place("adc", "128 rows, least error", bits, Circuit(IDEAL, adc=Adc(bits, coverage=None)), ("none",))
        yield Place("adc", "128 rows, full range", bits, Circuit(IDEAL, adc=Adc(bits, "max")), ("none",), drawn=False)


def stuck(plan: Plan) -> Iterator[Place]:
    """Accuracy against stuck cells, with and without a fault map before programming."""
    for cells, effect in ((Circuit(IDEAL), "no fault map"), (Circuit(IDEAL, remap="both"), "remapped")):
        for pct in plan.stuck_pct:
            circuit = replace(cells, faults=Faults(pct / 200, pct / 200))
            yield Place("stuck", effect, pct, circuit, ("none", "column"))


def drift(plan: Plan) -> Iterator[Place]:
    """Accuracy against time: PCM with drift, programming error and read noise, by both rules of its draws; devices of
    one's own at the times at which they were measured."""
    for rule in RULES:
        for t_s in plan.times_s:
            yield Place("drift", "PCM", t_s, Circuit(by_rule(rule)), ("none", "global", "column", "bn"), t_s)
    for own in map(device, plan.devices):
        for t_s in own.error.times_s if own.error else ():
            yield Place("drift", own.name, t_s, Circuit(own), ("none", "global", "column", "bn"), t_s)


def by_rule(rule: str) -> Device:
    """Drifting PCM whose read noise is drawn once a "readout", or anew for every "product"."""
    read = PCM_NANDAKUMAR.read
    assert isinstance(read, FlickerRead)
    return replace(PCM_NANDAKUMAR, read=replace(read, per=rule))


def trained(plan: Plan) -> Iterator[Place]:
    """Trained networks, exact and on RRAM after a second and a day."""
    for network in plan.networks:
        yield Place("trained", "no error", 0, Circuit(IDEAL), ("none",), drawn=False, net=Net(file=network))
        for effect, kind in ((RRAM_SECOND, "rram"), (RRAM_DAY, "rram_1day")):
            yield Place("trained", effect, 0, Circuit(device(kind)), ("none", "column"), net=Net(file=network))


def slices(plan: Plan) -> Iterator[Place]:
    """Weights cut into slices of whole cell levels on RRAM after a second: fewer bits need fewer slices."""
    for network in ("", *plan.networks):
        for bits in plan.cell_bits:
            circuit = Circuit(RRAM_WAN_1S, Mapping(cell_bits=bits, subtract="digital"))
            yield Place("slices", "sliced", bits, circuit, ("none", "column"), net=Net(file=network))


def noise_aware(plan: Plan) -> Iterator[Place]:
    """The float network fine-tuned with weight noise, then quantized, programmed with errors and read by converters."""
    for bits in plan.converter_bits:
        trainings = [(noise, 0) for noise in plan.noise_pct] + ([(max(plan.noise_pct), bits)] if bits else [])
        for noise, through in trainings:
            effect = f"{noise:g} % " + ("through converters" if through else "in training")
            for pct in plan.programming_pct:
                circuit = Circuit(state_independent(pct / 100), adc=Adc(bits) if bits else None)
                kinds = ("none", "column")
                yield Place("noise_aware", effect, pct, circuit, kinds, net=Net(noise_pct=noise, train_bits=through))


STUDIES = {
    "no_error": no_error, "recovery": recovery, "budget": error_budget, "sigma": sigma, "adc": adc, "stuck": stuck,
    "drift": drift, "trained": trained, "slices": slices, "noise_aware": noise_aware,
}  # fmt: skip
"""In the order in which they are run."""

SERIAL = Circuit(mapping=Mapping(cell_bits=2, subtract="digital"), drive=Drive("serial"), adc=Adc(9, "exact"))
CIRCUITS = {
    "analog input, pair, 64 rows": Circuit(mapping=Mapping(tile_rows=64), adc=Adc(8)),
    "analog input, pair, 128 rows": Circuit(adc=Adc(8)),
    "analog input, pair, 256 rows": Circuit(mapping=Mapping(tile_rows=256), adc=Adc(8)),
    "analog input, signs read apart, 128 rows": Circuit(mapping=Mapping(subtract="digital"), adc=Adc(8)),
    "bit-serial, 4 slices x 2 signs, 128 rows": SERIAL,
}
"""Lines of tab_crossbar_cost."""


def panels(plan: Plan) -> dict[str, Place]:
    """Panels of the scatter and of the errors per layer; devices of one's own as they are just after programming."""
    kinds = ("none", "global", "column")
    return {
        "RRAM, 1 s, 8-bit ADC": Place("mvm", "", 0, Circuit(RRAM_WAN_1S, adc=Adc(8)), kinds),
        "PCM, 1 day": Place("mvm", "", 0, Circuit(PCM_NANDAKUMAR), kinds, DAY_S),
        **{own.name: Place("mvm", "", 0, Circuit(own), kinds) for own in map(device, plan.devices)},
    }
