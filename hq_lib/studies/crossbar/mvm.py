"""Single dot products on the arrays, before and after calibration, and what the arrays cost (notebook 08).

    python -m hq_lib.studies.crossbar.mvm --profile full

Dot products go to ``crossbar_mvm.csv`` (a sample of measured and ideal numbers), errors of every layer to
``crossbar_layers.csv``, counts and energy estimates to ``crossbar_cost.csv``. Corrections are fitted on training
images, open loop, and judged on rows of test images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hq_lib.crossbar import Adc, Circuit, Cost, Drive, EngineNetwork, IdealEngine, Mapping, SimEngine, count, residuals
from hq_lib.crossbar.cost import ADC_PJ
from hq_lib.crossbar.engine import Engine, Handle, exact_mvm
from hq_lib.crossbar.profiles import PCM_NANDAKUMAR, RRAM_WAN_1S
from hq_lib.data import normalize
from hq_lib.results import paths, provenance, store
from hq_lib.studies.crossbar.points import DAY_S, SIZES
from hq_lib.studies.crossbar.study import MODEL, CrossbarBench, circuit_settings, crossbar_bench

PAIRS, LAYERS, COST = "crossbar_mvm", "crossbar_layers", "crossbar_cost"
LAYER = "layer2.1.conv1"
"""The layer of the scatter: K = 288 inputs on three tiles, N = 32 outputs."""
N_ROWS = 2048
"""Held-out rows of inputs per layer."""
KINDS = {"none": None, "global": "gain", "column": "column"}
"""Correction → kind of fit."""


@dataclass(frozen=True)
class Panel:
    """One circuit of the scatter and of the errors per layer."""

    label: str
    """What the panel is called."""
    circuit: Circuit
    """Everything but the seed."""
    t_s: float = 0.0
    """Seconds since programming; 0 = the device's reference time."""


PANELS = (
    Panel("RRAM, 1 s, 8-bit ADC", Circuit(RRAM_WAN_1S, adc=Adc(8))),
    Panel("PCM, 1 day", Circuit(PCM_NANDAKUMAR), DAY_S),
)
SERIAL = Circuit(mapping=Mapping(cell_bits=2, subtract="digital"), drive=Drive("serial"), adc=Adc(9, "exact"))
CIRCUITS = {
    "analog input, pair, 64 rows": Circuit(mapping=Mapping(tile_rows=64), adc=Adc(8)),
    "analog input, pair, 128 rows": Circuit(adc=Adc(8)),
    "analog input, pair, 256 rows": Circuit(mapping=Mapping(tile_rows=256), adc=Adc(8)),
    "analog input, signs read apart, 128 rows": Circuit(mapping=Mapping(subtract="digital"), adc=Adc(8)),
    "bit-serial, 4 slices x 2 signs, 128 rows": SERIAL,
}
"""Lines of tab_crossbar_cost."""


def run(profile: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The rows of dot products, of layer errors and of costs, after measuring what is missing."""
    bench, size = crossbar_bench(profile), SIZES[paths.check_profile(profile)]
    for panel in PANELS:
        for draw in range(size.n_draws):
            key = _common(bench, panel.circuit, draw, panel=panel.label, t_s=panel.t_s)
            first = {**key, "switches": key["switches"] | {"layer": LAYER, "correction": "none"}}
            if not store.done(LAYERS, first, profile=profile):
                _measure(bench, panel, draw, key, profile)
                print(f"dot products: {panel.label}, draw {draw}", flush=True)
    store.append(COST, list(_cost_rows(bench)), profile=profile)
    return tuple(store.read(study, profile=profile) for study in (PAIRS, LAYERS, COST))  # type: ignore[return-value]


def _measure(bench: CrossbarBench, panel: Panel, draw: int, key: dict[str, Any], profile: str) -> None:
    """Nothing; appends the layer errors of one draw under every correction, and of draw 0 the sampled dot products."""
    network = EngineNetwork(bench.model, SimEngine(replace(panel.circuit, seed=draw)))
    images = bench.calibration(bench.size.n_calib, draw)
    if panel.circuit.adc is not None:
        network.calibrate(images, kind=None)
    if panel.t_s:
        network.set_time(panel.t_s)
    held_out = normalize(bench.test.images[:16], bench.test.spec)
    samples = network.samples(held_out, n_rows=N_ROWS)
    layers, pairs = [], []
    for name, kind in KINDS.items():
        network.reset()
        if kind is not None:
            network.calibrate(images, kind=kind, loop="open")
        layers += _layer_rows(network, samples, key, name)
        if draw == 0 and name in ("none", "column"):
            pairs += list(_pair_rows(network, samples, key, name, bench.size.n_pairs))
    if pairs:
        store.append(PAIRS, pairs, profile=profile)
    store.append(LAYERS, layers, profile=profile)


def _layer_rows(
    network: EngineNetwork, samples: dict[str, list[Tensor]], key: dict[str, Any], kind: str
) -> list[dict[str, Any]]:
    engine, rows = network.engines[0], []
    found = residuals(engine, {h.groups[0]: (samples[name][0], None) for name, h in network.handles.items()})
    for line in found.to_dict("records"):
        switches = key["switches"] | {"layer": line["layer"], "correction": kind}
        rows += [
            {**key, "switches": switches, "metric": metric, "value": line[metric], "unit": "1"}
            for metric in ("relative_error", "slope", "r2")
        ]
    return rows


def _pair_rows(
    network: EngineNetwork, samples: dict[str, list[Tensor]], key: dict[str, Any], kind: str, n: int
) -> Iterator[dict[str, Any]]:
    engine, handle = network.engines[0], network.handles[LAYER].groups[0]
    ideal, measured = _products(engine, handle, samples[LAYER][0])
    chosen = torch.randperm(ideal.numel(), generator=torch.Generator().manual_seed(0))[:n]
    for i in chosen.tolist():
        switches = key["switches"] | {"layer": LAYER, "correction": kind, "i": i, "ideal_LSB": float(ideal[i])}
        yield {**key, "switches": switches, "metric": "measured_LSB", "value": float(measured[i]), "unit": "LSB"}


def _products(engine: Engine, handle: Handle, x: Tensor) -> tuple[Tensor, Tensor]:
    """(ideal, measured and corrected) dot products of rows ``x``, flat float64."""
    measured = engine.correction(handle).apply(engine.measure(handle, x))
    return exact_mvm(handle, x).flatten(), measured.to(torch.float64).flatten()


def _cost_rows(bench: CrossbarBench) -> Iterator[dict[str, Any]]:
    network = EngineNetwork(bench.model, IdealEngine())
    for label, circuit in CIRCUITS.items():
        key = {**_common(bench, circuit, -1, circuit=label), "n_test": 0, "n_calib": 0}
        for metric, (value, unit) in total_cost(network, circuit).items():
            yield {**key, "metric": metric, "value": value, "unit": unit}


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


def _common(bench: CrossbarBench, on: Circuit, draw: int, **switches: Any) -> dict[str, Any]:
    return {
        "experiment": PAIRS, "model": MODEL, "dataset": bench.test.spec.name, "method": "mse", "w_bits": 8, "a_bits": 8,
        "placement": "deploy", "n_calib": bench.size.n_calib, "seed": draw, "n_test": 16,
        "switches": switches | circuit_settings(on), **provenance.stamp(),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=paths.PROFILES, default="quick")
    run(parser.parse_args().profile)


if __name__ == "__main__":
    main()
