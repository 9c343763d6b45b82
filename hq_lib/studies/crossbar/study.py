"""ResNet-20 on analog crossbars: accuracy against what is wrong with the arrays, and what repairs it (notebook 08).

``hq study crossbar --profile full`` measures each `Place` of ``points`` on test images under each correction and
appends to ``crossbar.csv``; ``hq study crossbar_layers`` measures single dot products (a sample of them goes to
``crossbar_mvm.csv``) and every layer's error on held-out rows; ``hq study crossbar_cost`` counts cells and conversions.
Calibration images are training images; nothing is chosen on test.
"""

import copy
import hashlib
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from hq_lib import graph, models, ptq
from hq_lib.crossbar import Circuit, Cost, EngineNetwork, IdealEngine, SimEngine, count, residuals
from hq_lib.crossbar.calibration import Reference
from hq_lib.crossbar.norms import Moments, norm_moments, reestimate_norms
from hq_lib.crossbar.operands import exact_mvm
from hq_lib.crossbar.simulator import ADC_PJ
from hq_lib.data import ImageSet, normalize
from hq_lib.graph import BitPolicy, quantize
from hq_lib.integer import IntegerModel, lower
from hq_lib.integer import run as run_integers
from hq_lib.studies.bench import net_switch, open_bench
from hq_lib.studies.crossbar.points import (
    CIRCUITS,
    PANELS,
    PLANS,
    SERIAL,
    OnArrays,
    Place,
    Plan,
    network_path,
    points,
)
from hq_lib.studies.study import Found, Point, Row, Run, Study, StudyError
from hq_lib.training import TrainConfig, fit
from hq_lib.training.evaluation import evaluation_of

MODEL = "resnet20"
N_PTQ = 256
"""Training images that the activation grids of the shipped network are fitted to."""
PAIRS, LAYERS, COST = "crossbar_mvm", "crossbar_layers", "crossbar_cost"
LAYER = "layer2.1.conv1"
"""The layer of the scatter: K = 288 inputs on three tiles, N = 32 outputs."""
N_ROWS, N_HELD_OUT = 2048, 16
"""Held-out rows of inputs per layer, and the test images that they come from."""
FINE_TUNE = TrainConfig(epochs=1, lr=0.01, precision="float32")
"""Noise-aware fine-tuning of the float network; epochs, noise and seed are the plan's."""


@dataclass(frozen=True, eq=False)
class Integers:
    """An integer network, and the images it is judged on."""

    model: IntegerModel
    """What is put on arrays."""
    moments: dict[str, Moments]
    """What its batch norms want, by layer; {} where they are not known."""
    test: ImageSet
    """Images that accuracies are measured on."""
    train: ImageSet
    """Images for calibration."""
    logits: np.ndarray
    """float32 (n_test, n_classes): the exact integers' answers."""

    def calibration(self, n: int, seed: int) -> Tensor:
        """(n, C, H, W) normalised training images, balanced over classes, drawn by ``seed``."""
        return normalize(self.train.drawn(n, seed).images, self.train.spec)


@dataclass(frozen=True, eq=False)
class Programmed:
    """An integer network on programmed cells, at its time of reading."""

    integers: Integers
    """The network itself."""
    network: EngineNetwork
    """Its layers on arrays."""
    references: dict[str, Reference] | None
    """What a drifting device read just after programming."""


# -- networks ----------------------------------------------------------------------------------------------------------


def open_integers(run: Run[Plan], place: Place, seed: int) -> Integers | None:
    """The network of ``place`` in integers; None, after a line that says why, where this machine cannot have it."""
    noise = place.noise_pct
    folder = None if noise is None else run.folder / _training_name(run.plan, noise, seed)
    return _integers(run.plan, place.network, place.bits, place.per_layer, noise, -1 if noise is None else seed, folder)


@lru_cache(maxsize=4)
def _integers(
    plan: Plan, network: str, bits: int, per_layer: bool, noise: float | None, seed: int, folder: Path | None
) -> Integers | None:
    bench = open_bench(MODEL, n_test=plan.n_test)
    if bench is None:
        return None
    if len(bench.test) < plan.n_test:
        print(f"{bench.dataset} has {len(bench.test)} test images, not {plan.n_test}: not run")
        return None
    if network:
        model, moments = lower(graph.load(network_path(network)), images=bench.test.spec), {}
    else:
        net = bench.net
        if noise is not None:
            net = fine_tuned(net, bench.train, plan, noise, seed, folder)
        x = bench.calibration(N_PTQ, 0)
        model, moments = lower(after_training(net, x, bits=bits, per_layer=per_layer)), norm_moments(net)
    logits = run_integers(model, normalize(bench.test.images, bench.test.spec))
    return Integers(model, moments, bench.test, bench.train, logits)


def after_training(net: nn.Module, x: Tensor, *, bits: int = 8, per_layer: bool = False) -> fx.GraphModule:
    """``net`` quantized to ``bits`` with ranges of least squared error on images ``x``, batch norms folded.

    ``per_layer`` gives the weights one scale per layer instead of one per output channel.
    """
    weight = {"method": "minmax", "bits": bits, "axis": None if per_layer else 0}
    qnet = quantize(net.eval(), BitPolicy(weight, f"minmax:{bits}", bn="fold"), x[:1])
    ptq.fit_weights(qnet, "mse")
    ptq.fit_acts(qnet, x, "mse")
    return qnet


def fine_tuned(
    net: nn.Module, train: ImageSet, plan: Plan, noise_pct: float, seed: int, folder: Path | None
) -> nn.Module:
    """A copy of ``net`` trained on with weight noise (percent of the channel's largest weight), batch norms kept."""
    config = replace(FINE_TUNE, epochs=plan.epochs, weight_noise=noise_pct / 100, seed=seed)
    few = train if plan.n_train is None or plan.n_train >= len(train) else train.balanced(plan.n_train, seed)
    tuned = copy.deepcopy(net)
    fit(tuned, few, None, config, folder)
    return tuned.eval()


def _training_name(plan: Plan, noise_pct: float, seed: int) -> str:
    return f"noise{noise_pct:g}_e{plan.epochs}_n{plan.n_train or 'all'}_s{seed}"


@cache
def _file(name: str, mtime_ns: int) -> Row:
    """What a trained network's rows say of it."""
    path = network_path(name)
    record, policy = models.read_checkpoint(path)[1], graph.load(path).policy
    return {
        "model": record["model"], "method": record.get("method", "-"), "w_bits": policy.weight.bits,
        "a_bits": policy.act.bits, "placement": policy.placement,
        "switches": {"network": path.stem, "file": file_digest(name)},
    }  # fmt: skip


def file_digest(name: str) -> str:
    """First digits of the SHA-256 of a network file, "" where it is absent."""
    try:
        return hashlib.sha256(network_path(name).read_bytes()).hexdigest()[:8]
    except StudyError:
        return ""


# -- accuracies --------------------------------------------------------------------------------------------------------


def open_arrays(run: Run[Plan], needed: Hashable) -> Programmed | None:
    """The network of (place, draw) on freshly programmed cells, at the place's time."""
    place, seed = needed  # type: ignore[misc]
    integers = open_integers(run, place, seed)
    if integers is None:
        return None
    network = EngineNetwork(integers.model, SimEngine(replace(place.circuit, seed=seed)))
    images = integers.calibration(run.plan.n_calib, seed)
    if _fitted(place):
        network.calibrate(images, kind=None)
    if not place.t_s:
        return Programmed(integers, network, None)
    references = network.references(images) if place.circuit.device.drift else None
    network.set_time(place.t_s)
    return Programmed(integers, network, references)


def measure(run: Run[Plan], bench: Programmed, point: OnArrays) -> Iterator[Found]:
    """Accuracy, and relative distance of all logits to the exact integers', under one correction; costs of slices."""
    correct(run.plan, bench, point.correction, point.seed)
    test = bench.integers.test
    logits = bench.network.run(normalize(test.images, test.spec))
    exact, acc_pct = bench.integers.logits, evaluation_of(torch.from_numpy(logits), test.labels).acc_pct
    found = {"logit_error": (float(np.linalg.norm(logits - exact) / np.linalg.norm(exact)), "1")}
    if point.place.study == "slices":
        found |= total_cost(bench.network, replace(SERIAL, mapping=point.place.circuit.mapping))
    for metric, (value, unit) in {**found, "acc_pct": (acc_pct, "%")}.items():
        yield {"dataset": test.spec.name, "metric": metric, "value": value, "unit": unit}


def correct(plan: Plan, bench: Programmed, kind: str, seed: int) -> None:
    """Puts one correction in force, and takes out all others; read noise starts from its first draw."""
    network = bench.network
    network.reset()
    for engine in network.engines:
        if isinstance(engine, SimEngine):
            engine.reset_noise()
    if kind == "none":
        return
    images = bench.integers.calibration(plan.n_norm if kind == "bn" else plan.n_calib, seed)
    if kind == "bn":
        reestimate_norms(network, images, bench.integers.moments)
    elif kind == "global" and bench.references is not None:
        network.compensate(bench.references, per="layer")
    else:
        kinds = {"global": "gain", "column": "column", "column_open": "column"}
        network.calibrate(images, kind=kinds[kind], loop="open" if kind == "column_open" else "closed")


def key(run: Run[Plan], point: OnArrays) -> Row:
    """What names an accuracy: network, circuit, time, correction, draw, and how many images each took."""
    place, plan = point.place, run.plan
    n_calib = {"none": 0, "bn": plan.n_norm}.get(point.correction, plan.n_calib)
    switches = {"study": place.study, "effect": place.effect, "x": place.x, "correction": point.correction,
                "t_s": place.t_s, **circuit_settings(place.circuit)}  # fmt: skip
    named = _network(place)
    trained: Row = {}
    if place.noise_pct is not None:
        trained = {"epochs": plan.epochs, "n_train": plan.n_train or 0}
    return {
        "experiment": run.study, **named, "metric": "acc_pct", "seed": point.seed if place.drawn else -1,
        "n_calib": max(n_calib, plan.n_calib if _fitted(place) else 0), "n_test": plan.n_test,
        "switches": {**named["switches"], **switches}, **trained,
    }  # fmt: skip


def circuit_settings(circuit: Circuit) -> Row:
    """What of ``describe()`` differs from the default circuit, and its device in full; the seed is the row's own.

    Rows older than the two rules of read noise name none: they are those of "product".
    """
    described, plain = (SimEngine(c).describe() for c in (circuit, Circuit()))
    named = {name: value for name, value in described.items() if name.startswith("device") and value is not None}
    other = {name: value for name, value in described.items() if plain.get(name, "-") != value}
    hidden = ("seed", "t_s", "device.source")
    return {k: v for k, v in (other | named).items() if k not in hidden and (k, v) != ("device.read.per", "product")}


def _network(place: Place) -> Row:
    if place.network:
        return dict(_file(place.network, network_path(place.network).stat().st_mtime_ns))
    bits = {"w_bits": place.bits, "a_bits": place.bits}
    return {"model": MODEL, "method": "mse", **bits, "placement": "deploy", "switches": net_switch(MODEL)}


def _fitted(place: Place) -> bool:
    return place.circuit.adc is not None and place.circuit.adc.range == "calibrated"


# -- single dot products -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Products(Point):
    """The dot products of all layers in one panel, under one correction, on one draw of the cells."""

    panel: str
    """Key of ``PANELS``."""
    correction: str
    """"none", "global" or "column"."""
    seed: int
    """Number of the draw."""

    @property
    def name(self) -> str:
        """E.g. ``PCM, 1 day, column, draw 0``."""
        return f"{self.panel}, {self.correction}, draw {self.seed}"

    @property
    def unit(self) -> str:
        """A draw."""
        return f"crossbar_layers_s{self.seed}"

    @property
    def bench(self) -> Hashable:
        """The network on its programmed cells."""
        return PANELS[self.panel], self.seed

    @property
    def after(self) -> tuple[str, ...]:
        """The float network."""
        return ("resnet20_float_s0",)


def product_points(plan: Plan) -> list[Products]:
    """Panel by panel and draw by draw every correction."""
    return [
        Products(panel, kind, draw)
        for panel, place in PANELS.items()
        for draw in range(plan.n_draws)
        for kind in place.corrections
    ]


def product_key(run: Run[Plan], point: Products) -> Row:
    """What names the errors of a panel; a row is one layer's, and the layer of the scatter stands for all."""
    place, named = PANELS[point.panel], _network(PANELS[point.panel])
    switches = {"panel": point.panel, "t_s": place.t_s, "layer": LAYER, "correction": point.correction}
    return {
        "experiment": PAIRS, **named, "metric": "relative_error", "n_calib": run.plan.n_calib, "seed": point.seed,
        "n_test": N_HELD_OUT, "switches": {**named["switches"], **switches, **circuit_settings(place.circuit)},
    }  # fmt: skip


def read(w_int: Tensor, x_int: Tensor, circuit: Circuit, t_s: float) -> Tensor:
    """float64 (B, N): ``x_int @ w_int`` as freshly programmed cells of ``circuit`` give it ``t_s`` seconds later."""
    engine = SimEngine(circuit)
    handle = engine.load(w_int, 1.0, LAYER)
    engine.set_time(t_s)
    return engine.mvm(handle, x_int)


def measure_products(run: Run[Plan], bench: Programmed, point: Products) -> Iterator[Found]:
    """Error, slope and r2 of every layer on held-out rows, open loop; of draw 0 a sample of products too."""
    network, test = bench.network, bench.integers.test
    network.reset()
    if point.correction != "none":
        kind = "gain" if point.correction == "global" else "column"
        network.calibrate(bench.integers.calibration(run.plan.n_calib, point.seed), kind=kind, loop="open")
    samples = network.samples(normalize(test.images[:N_HELD_OUT], test.spec), n_rows=N_ROWS)
    groups = {handle.groups[0]: (samples[name][0], None) for name, handle in network.handles.items()}
    named = {**product_key(run, point)["switches"]}
    for line in residuals(network.engines[0], groups).to_dict("records"):
        for metric in ("r2", "slope", "relative_error"):
            yield {"dataset": test.spec.name, "metric": metric, "value": line[metric], "unit": "1",
                   "switches": {**named, "layer": line["layer"]}}  # fmt: skip
    if point.seed > 0 or point.correction == "global":
        return
    engine, handle = network.engines[0], network.handles[LAYER].groups[0]
    ideal = exact_mvm(handle, samples[LAYER][0]).flatten()
    measured = engine.correction(handle).apply(engine.measure(handle, samples[LAYER][0])).flatten()
    for i in torch.randperm(len(ideal), generator=torch.Generator().manual_seed(0))[: run.plan.n_pairs].tolist():
        yield PAIRS, {"dataset": test.spec.name, "metric": "measured_LSB", "value": float(measured[i]), "unit": "LSB",
                      "switches": {**named, "i": i, "ideal_LSB": float(ideal[i])}}  # fmt: skip


# -- costs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted(Point):
    """The counts of the whole network on one circuit."""

    circuit: str
    """Key of ``CIRCUITS``."""

    @property
    def name(self) -> str:
        """The circuit."""
        return self.circuit

    @property
    def unit(self) -> str:
        """All circuits."""
        return "crossbar_cost"

    @property
    def bench(self) -> Hashable:
        """The network on its exact engine: counts need no cells."""
        return Place("cost", "", 0, Circuit(), ("none",))

    @property
    def after(self) -> tuple[str, ...]:
        """The float network."""
        return ("resnet20_float_s0",)


def cost_key(run: Run[Plan], point: Counted) -> Row:
    """What names a count."""
    switches = {"circuit": point.circuit, **circuit_settings(CIRCUITS[point.circuit])}
    named = _network(Place("cost", "", 0, Circuit(), ()))
    return {"experiment": PAIRS, **named, "metric": "n_cells", "switches": {**named["switches"], **switches}}


def open_counted(run: Run[Plan], needed: Hashable) -> Programmed | None:
    """The integer network, exact."""
    integers = open_integers(run, needed, 0)  # type: ignore[arg-type]
    return integers and Programmed(integers, EngineNetwork(integers.model, IdealEngine()), None)


def measure_cost(run: Run[Plan], bench: Programmed, point: Counted) -> Iterator[Found]:
    """Counts of one image, and the two ends of the energy estimate."""
    for metric, (value, unit) in total_cost(bench.network, CIRCUITS[point.circuit]).items():
        yield {"dataset": bench.integers.test.spec.name, "metric": metric, "value": value, "unit": unit}


def total_cost(network: EngineNetwork, circuit: Circuit) -> dict[str, tuple[float, str]]:
    """{metric: (value, unit)} of one image through all layers on ``circuit``: counts first, then energy estimates."""
    costs: list[tuple[Cost, int]] = []
    for name, handle in network.handles.items():
        op = next(op for op in network.model.layers() if op.name == name)
        n_mvm = math.prod(network.model.tensors[op.output].shape) // op.weight.shape[0]
        costs += [(count(group, circuit), n_mvm) for group in handle.groups]
    low, high = (sum(n * cost.energy_pJ(adc_pJ=adc_pJ) for cost, n in costs) / 1e6 for adc_pJ in ADC_PJ)
    return {
        "n_cells": (sum(cost.n_cells for cost, _ in costs), "count"),
        "n_arrays": (sum(cost.n_arrays for cost, _ in costs), "count"),
        "n_conversions": (sum(n * cost.conversions_per_mvm for cost, n in costs), "count"),
        "n_cell_reads": (sum(n * cost.cell_reads_per_mvm for cost, n in costs), "count"),
        "energy_low_uJ": (low, "uJ"),
        "energy_high_uJ": (high, "uJ"),
    }


STUDY = Study("crossbar", PLANS, points=points, key=key, open_bench=open_arrays, measure=measure)
PRODUCTS = Study(
    LAYERS, PLANS, points=product_points, key=product_key, open_bench=open_arrays, measure=measure_products
)
COSTS = Study(
    COST, PLANS, points=lambda plan: [Counted(name) for name in CIRCUITS], key=cost_key, open_bench=open_counted,
    measure=measure_cost,
)  # fmt: skip
STUDIES = (STUDY, PRODUCTS, COSTS)
