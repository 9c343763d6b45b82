"""ResNet-20 on analog crossbars: accuracy against what is wrong with the arrays, and what repairs it (notebook 08).

``hq study crossbar --profile full`` measures each `Place` of ``points`` on test images under each correction and
appends to ``crossbar.csv``; ``hq study crossbar_layers`` measures single dot products (a sample of them goes to
``crossbar_mvm.csv``) and every layer's error on held-out rows; ``hq study crossbar_cost`` counts cells and conversions.
Calibration images are training images; nothing is chosen on test.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib import graph
from hq_lib.crossbar import Circuit, EngineNetwork, SimEngine, count, residuals
from hq_lib.crossbar.calibration import Moments, Reference, compensate, norm_moments, reestimate_norms, references
from hq_lib.crossbar.operands import exact_mvm
from hq_lib.crossbar.profiles import IDEAL
from hq_lib.crossbar.simulator import ADC_PJ
from hq_lib.data import ImageSet, normalize
from hq_lib.integer import IntegerModel, lower
from hq_lib.integer import run as run_integers
from hq_lib.studies.bench import after_training, net_switch, open_bench, quantized_as, record_of
from hq_lib.studies.crossbar.points import CIRCUITS, PLANS, SERIAL, Net, Place, Plan, network_path, panels, places
from hq_lib.studies.study import Found, Point, Row, Run, Study, metric_rows
from hq_lib.training import TrainConfig, fit
from hq_lib.training.evaluation import evaluation_of

MODEL = "resnet20"
PAIRS, LAYERS, COST = "crossbar_mvm", "crossbar_layers", "crossbar_cost"
FIRST = ("resnet20_float_s0",)
"""The training of the shipped network, which points stand on."""
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


@lru_cache(maxsize=4)
def open_integers(run: Run[Plan], net: Net, seed: int = 0) -> Integers | None:
    """The network in integers; None, after a line that says why, where this machine cannot have it.

    ``seed`` is that of noise-aware training: a copy of the float network trained on, batch norms kept.
    """
    plan, bench = run.plan, open_bench(MODEL, n_test=run.plan.n_test)
    if bench is None:
        return None
    if len(bench.test) < plan.n_test:
        print(f"{bench.dataset} has {len(bench.test)} test images, not {plan.n_test}: not run")
        return None
    if net.file:
        model, moments = lower(graph.load(network_path(net.file)), images=bench.test.spec), {}
    elif net.noise_pct is None:
        model, moments = shipped_integers(net.bits, net.per_layer, plan.n_ptq), norm_moments(bench.net)
    else:
        through = {"drive_bits": net.bits, "converter_bits": net.train_bits} if net.train_bits else {}
        config = replace(FINE_TUNE, epochs=plan.epochs, weight_noise=net.noise_pct / 100, seed=seed, **through)
        few = bench.train.drawn(plan.n_train or len(bench.train), seed)
        float_net = copy.deepcopy(bench.net)
        name = f"{_training(net)}_e{plan.epochs}_n{plan.n_train or 'all'}_s{seed}"
        fit(float_net, few, None, config, bench.run_folder(run.folder, name))
        made = after_training(float_net, bench.calibration(plan.n_ptq, 0), bits=net.bits, per_layer=net.per_layer)
        model, moments = lower(made), norm_moments(float_net)
    logits = run_integers(model, normalize(bench.test.images, bench.test.spec))
    return Integers(model, moments, bench.test, bench.train, logits)


@cache
def shipped_integers(bits: int, per_layer: bool, n_ptq: int) -> IntegerModel:
    """The shipped network in integers, as ``after_training`` has it: one search of ranges for the three studies."""
    bench = open_bench(MODEL, n_test=1)
    assert bench is not None
    return lower(after_training(bench.net, bench.calibration(n_ptq, 0), bits=bits, per_layer=per_layer))


def _training(net: Net) -> str:
    """What tells a noise-aware training from others of its plan and seed, for folders and units."""
    return f"noise{net.noise_pct:g}" + (f"_{net.train_bits}bits" if net.train_bits else "")


# -- accuracies --------------------------------------------------------------------------------------------------------


def open_arrays(run: Run[Plan], needed: Any) -> Programmed | None:
    """The network of (place, draw) on freshly programmed cells, at the place's time."""
    place, seed = needed
    integers = open_integers(run, place.net, 0 if place.net.noise_pct is None else seed)
    if integers is None:
        return None
    network = EngineNetwork(integers.model, SimEngine(replace(place.circuit, seed=seed)))
    images = integers.calibration(run.plan.n_calib, seed)
    if _fitted(place):
        network.calibrate(images, kind=None)
    if not place.t_s:
        return Programmed(integers, network, None)
    fresh = references(network, images) if place.circuit.device.drift else None
    network.set_time(place.t_s)
    return Programmed(integers, network, fresh)


def measure(run: Run[Plan], bench: Programmed, point: Point) -> Iterator[Found]:
    """Accuracy, and relative distance of all logits to the exact integers', under one correction; costs of slices."""
    place, correction, seed = point.what
    correct(run.plan, bench, correction, seed, fitted=_fitted(place))
    test = bench.integers.test
    logits = bench.network.run(normalize(test.images, test.spec))
    exact, acc_pct = bench.integers.logits, evaluation_of(torch.from_numpy(logits), test.labels).acc_pct
    found = {"logit_error": float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))}
    if place.study == "slices":
        found |= total_cost(bench.network, replace(SERIAL, mapping=place.circuit.mapping))
    yield from metric_rows({**found, "acc_pct": acc_pct}, dataset=test.spec.name, n_test=len(test))


def correct(plan: Plan, bench: Programmed, kind: str, seed: int, *, fitted: bool) -> None:
    """Puts one correction in force, and takes out all others; read noise starts from its first draw.

    Converter ranges that are ``fitted`` are fitted anew, uncorrected and at the time of reading, whatever was measured
    before; fits per column find ranges of their own as they go.
    """
    network = bench.network
    network.reset()
    if fitted:
        network.calibrate(bench.integers.calibration(plan.n_calib, seed), kind=None)
    for engine in network.engines:
        if isinstance(engine, SimEngine):
            engine.reset_noise()
    if kind == "none":
        return
    images = bench.integers.calibration(plan.n_norm if kind == "bn" else plan.n_calib, seed)
    if kind == "bn":
        reestimate_norms(network, images, bench.integers.moments)
    elif kind == "global" and bench.references is not None:
        compensate(network, bench.references, per="layer")
    else:
        kinds = {"global": "gain", "column": "column", "column_open": "column"}
        network.calibrate(images, kind=kinds[kind], loop="open" if kind == "column_open" else "closed")


def points(plan: Plan) -> list[Point]:
    """The first draw of every place under each correction, then the second."""
    wanted = places(plan)
    return [
        _point(plan, place, correction, draw)
        for draw in range(plan.n_draws)
        for place in wanted
        if place.drawn or draw == 0
        for correction in place.corrections
    ]


def _point(plan: Plan, place: Place, correction: str, draw: int) -> Point:
    """A study's draw is a unit, but each training has its own; a training's cost is on its first point."""
    n_calib = {"none": 0, "bn": plan.n_norm}.get(correction, plan.n_calib)
    net, noise, per = place.net, place.net.noise_pct, getattr(place.circuit.device.read, "per", "")
    where = {"study": place.study, "effect": place.effect, "x": place.x, "correction": correction, "t_s": place.t_s}
    trained = {} if noise is None else {"epochs": plan.epochs, "n_train": plan.n_train or 0}
    key = {
        **_named(net, place.circuit, **where), "metric": "acc_pct", "seed": draw if place.drawn else -1,
        "n_calib": max(n_calib, plan.n_calib if _fitted(place) else 0), **trained,
    }  # fmt: skip
    name = f"{place.study}: {place.effect}, {place.x:g}, {correction}, draw {draw}, "
    name += (net.file or f"{net.bits} bits") + (f", read noise by {per}" if per else "")
    if noise is not None and place.circuit.adc is not None:  # the same training is read ideally too
        name += f", {place.circuit.adc.bits}-bit converters"
    return Point(
        name, key, (place, correction, draw), bench=(place, draw),
        unit=f"crossbar_{place.study}_s{draw}" + ("" if noise is None else f"_{_training(net)}"),
        after=(Path(net.file).stem,) if net.file else FIRST,
        minutes=4.2 if noise is not None and correction == "none" and place.x == plan.programming_pct[0] else 0.3,
    )  # fmt: skip


def circuit_settings(circuit: Circuit) -> Row:
    """What of ``describe()`` differs from the default circuit, and its device in full; the seed is the row's own.

    Rows older than the two rules of read noise name none: they are those of "product".
    """
    described, plain = (SimEngine(c).describe() for c in (circuit, Circuit()))
    named = {name: value for name, value in described.items() if name.startswith("device") and value is not None}
    other = {name: value for name, value in described.items() if plain.get(name, "-") != value}
    hidden = ("seed", "t_s", "device.source")
    return {k: v for k, v in (other | named).items() if k not in hidden and (k, v) != ("device.read.per", "product")}


def _named(net: Net, circuit: Circuit, /, **switches: Any) -> Row:
    """The columns that name a network, and ``switches`` with what of it and of its circuit stands there."""
    if net.file:
        columns = quantized_as(record_of(net.file))
    else:
        columns = {"model": MODEL, "method": "mse", "w_bits": net.bits, "a_bits": net.bits, "placement": "deploy"}
    return {**columns, "switches": {**net_switch(net.file or MODEL), **switches, **circuit_settings(circuit)}}


def _fitted(place: Place) -> bool:
    return place.circuit.adc is not None and place.circuit.adc.range == "calibrated"


# -- single dot products -----------------------------------------------------------------------------------------------


def product_points(plan: Plan) -> list[Point]:
    """The products of all layers, panel by panel and draw by draw under every correction; a draw is a unit.

    A row is one layer's, and the layer of the scatter stands for all.
    """
    found = []
    for (panel, place), draw in product(panels(plan).items(), range(plan.n_draws)):
        for kind in place.corrections:
            where = {"panel": panel, "t_s": place.t_s, "layer": LAYER, "correction": kind}
            key = {
                "experiment": PAIRS, **_named(place.net, place.circuit, **where), "metric": "relative_error",
                "n_calib": plan.n_calib, "seed": draw, "n_test": N_HELD_OUT,
            }  # fmt: skip
            name, unit = f"{panel}, {kind}, draw {draw}", f"crossbar_layers_s{draw}"
            found.append(Point(name, key, (kind, draw), bench=(place, draw), unit=unit, after=FIRST))
    return found


def read(w_int: Tensor, x_int: Tensor, circuit: Circuit, t_s: float) -> Tensor:
    """float64 (B, N): ``x_int @ w_int`` as freshly programmed cells of ``circuit`` give it ``t_s`` seconds later."""
    engine = SimEngine(circuit)
    handle = engine.load(w_int, 1.0, LAYER)
    engine.set_time(t_s)
    return engine.mvm(handle, x_int)


def measure_products(run: Run[Plan], bench: Programmed, point: Point) -> Iterator[Found]:
    """Error, slope and r2 of every layer on held-out rows, open loop; of draw 0 a sample of products too."""
    (correction, seed), network, test = point.what, bench.network, bench.integers.test
    network.reset()
    if correction != "none":
        kind = "gain" if correction == "global" else "column"
        network.calibrate(bench.integers.calibration(run.plan.n_calib, seed), kind=kind, loop="open")
    samples = network.samples(normalize(test.images[:N_HELD_OUT], test.spec), n_rows=N_ROWS)
    groups = {layer.groups[0]: samples[name][0] for name, layer in network.layers.items()}
    named = point.key["switches"]
    for line in residuals(network.engines[0], groups).to_dict("records"):
        values = {metric: line[metric] for metric in ("r2", "slope", "relative_error")}
        yield from metric_rows(values, dataset=test.spec.name, switches={**named, "layer": line["layer"]})
    if seed > 0 or correction == "global":
        return
    engine, handle = network.engines[0], network.layers[LAYER].groups[0]
    ideal = exact_mvm(handle, samples[LAYER][0]).flatten()
    measured = engine.correction(handle).apply(engine.measure(handle, samples[LAYER][0])).flatten()
    for i in torch.randperm(len(ideal), generator=torch.Generator().manual_seed(0))[: run.plan.n_pairs].tolist():
        yield PAIRS, {"dataset": test.spec.name, "metric": "measured_LSB", "value": float(measured[i]),
                      "switches": {**named, "i": i, "ideal_LSB": float(ideal[i])}}  # fmt: skip


# -- costs -------------------------------------------------------------------------------------------------------------


def cost_points(plan: Plan) -> list[Point]:
    """The counts of the whole network on each circuit; perfect cells will do for all, as counts are the mapping's."""
    found, perfect = [], Place(COST, "", 0, Circuit(IDEAL), ())
    for circuit, of in CIRCUITS.items():
        key = {"experiment": PAIRS, **_named(perfect.net, of, circuit=circuit), "metric": "n_cells"}
        found.append(Point(circuit, key, of, bench=(perfect, 0), unit="crossbar_cost", after=FIRST))
    return found


def measure_cost(run: Run[Plan], bench: Programmed, point: Point) -> Iterator[Found]:
    """Counts of one image, and the two ends of the energy estimate."""
    yield from metric_rows(total_cost(bench.network, point.what), dataset=bench.integers.test.spec.name)


def total_cost(network: EngineNetwork, circuit: Circuit) -> dict[str, float]:
    """{metric: value} of one image through all layers on ``circuit``: counts first, then energy estimates."""
    shapes = {op.name: network.model.tensors[op.output].shape for op in network.model.layers()}
    places = {name: math.prod(shapes[name]) // layer.shape[0] for name, layer in network.layers.items()}
    costs = [(count(group, circuit), n) for name, n in places.items() for group in network.layers[name].groups]
    low, high = (sum(n * cost.energy_pJ(adc_pJ=adc_pJ) for cost, n in costs) / 1e6 for adc_pJ in ADC_PJ)
    return {
        "n_cells": sum(cost.n_cells for cost, _ in costs),
        "n_arrays": sum(cost.n_arrays for cost, _ in costs),
        "n_conversions": sum(n * cost.conversions_per_mvm for cost, n in costs),
        "n_cell_reads": sum(n * cost.cell_reads_per_mvm for cost, n in costs),
        "energy_low_uJ": low, "energy_high_uJ": high,
    }  # fmt: skip


STUDY = Study("crossbar", PLANS, points=points, open_bench=open_arrays, measure=measure, unkeyed=("n_test", "n_ptq"))
PRODUCTS = Study(
    LAYERS, PLANS, points=product_points, open_bench=open_arrays, measure=measure_products, unkeyed=("n_pairs", "n_ptq")
)
COSTS = Study(COST, PLANS, points=cost_points, open_bench=open_arrays, measure=measure_cost)
STUDIES = (STUDY, PRODUCTS, COSTS)
