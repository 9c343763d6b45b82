"""What notebook 08 shows of the crossbar studies: rows in, frames out."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch

from hq_lib.crossbar import Device
from hq_lib.results import tables
from hq_lib.studies.crossbar.figures import RULES
from hq_lib.studies.crossbar.points import CIRCUITS, DAY_S, ONE_SCALE, PLANS, RRAM_DAY, RRAM_SECOND, error_budget
from hq_lib.studies.crossbar.study import LAYER

EXACT = "no error: the exact integers"
RECOVERED = {
    RRAM_SECOND: "programming, RRAM 1 s (Wan)",
    "rram, layer scale": "the same, one scale per layer",
    "rram_crosssim, column scale": "the same, CrossSim's fit",
}
"""Lines of "recovery" that the budget shows too → their names there."""
BASE = "ResNet-20, W8A8 (mse ranges), pair of cells, column scale, 128 rows unless said"
"""What captions say of the circuits."""


def unpacked(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """``rows`` with these keys of their switches as columns, and ``rule``: that of PCM's read noise, else ""."""
    rows = tables.with_switches(rows, "device.read", "device.read.per", *names)
    older = pd.Series(rows["device.read"] == "FlickerRead").map({True: "product", False: ""})
    return rows.assign(rule=rows["device.read.per"].fillna(older))


def accuracies(rows: pd.DataFrame, *studies: str, bits: int | None = 8) -> pd.DataFrame:
    """Accuracy rows of some studies with columns study, effect, x, correction, network, rule and acc_pct (percent)."""
    found = unpacked(rows, "study", "effect", "x", "correction", "network")
    found = found.loc[(found["metric"] == "acc_pct") & found["study"].isin(studies)]
    found = found.loc[(found["w_bits"] == bits) | (bits is None)]
    return found.assign(acc_pct=found["value"]).reset_index(drop=True)


def means(rows: pd.DataFrame, study: str) -> pd.DataFrame:
    """Mean accuracy over the draws of one study, percent: a line per effect (rule) and correction, a column per x."""
    found = accuracies(rows, study)
    words: Any = {"": "", **{rule: f", {text}" for rule, text in RULES.items()}}
    found = found.assign(effect=found["effect"] + found["rule"].map(words))
    return found.pivot_table(index=["effect", "correction"], columns="x", values="acc_pct", sort=False).round(1)


def mean(rows: pd.DataFrame, study: str, effect: str, correction: str) -> float | None:
    """Mean accuracy over the draws in W8A8, percent; None where it was not run."""
    found = accuracies(rows, study).query("effect == @effect and correction == @correction")
    return float(found["acc_pct"].to_numpy().mean()) if len(found) else None


def exact_pct(rows: pd.DataFrame) -> float:
    """Accuracy of the exact integer network in W8A8, percent."""
    found = mean(rows, "no_error", "no error", "none")
    if found is None:
        raise ValueError("there are no rows of the study no_error: run it first, studies=['no_error']")
    return found


def no_error_pct(rows: pd.DataFrame) -> dict[str, float]:
    """{correction: accuracy, percent} of the network without any error, for "column" and "bn"."""
    return {kind: value for kind in ("column", "bn") if (value := mean(rows, "no_error", "no error", kind))}


def drift_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows for fig_drift: PCM at all its times by both rules, RRAM at the two times for which it was published, and
    devices of one's own."""
    second = accuracies(rows, "recovery").query("effect == @RRAM_SECOND").assign(x=1.0)
    day = accuracies(rows, "budget").query("effect == @RRAM_DAY").assign(x=DAY_S)
    rram = pd.concat([second, day]).assign(effect="RRAM")
    found = pd.concat([accuracies(rows, "drift"), rram], ignore_index=True)
    return found.loc[found["correction"].isin(["none", "global", "column", "bn"])].reset_index(drop=True)


def scatter_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``crossbar_mvm`` for fig_mvm_scatter."""
    rows = unpacked(rows, "panel", "correction", "ideal_LSB")
    return rows.assign(measured_LSB=rows["value"])


def layer_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``crossbar_layers`` for fig_mvm_calibration, layers by name: ResNet-20's order."""
    rows = unpacked(rows, "panel", "correction", "layer").query("metric == 'relative_error'")
    return rows.assign(relative_error=rows["value"]).sort_values(["layer", "seed"], kind="stable")


def products_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean error, slope and r2 of the scatter's layer, a line per panel and correction."""
    rows = unpacked(rows, "panel", "correction", "layer")
    rows = rows.loc[rows["layer"] == LAYER]
    return rows.pivot_table(index=["panel", "correction"], columns="metric", values="value", sort=False).round(3)


def budget_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_error_budget: accuracy with one effect at a time under three corrections, and the logits' error."""
    shown = unpacked(rows, "study", "effect", "correction")
    kinds = ["none", "column", "bn"]
    shown = shown.loc[shown["study"].isin(["no_error", "recovery", "budget"]) & shown["correction"].isin(kinds)]
    shown = shown.loc[(shown["w_bits"] == 8) & (shown["rule"] != "product")]
    shown = shown.assign(effect=shown["effect"].replace(RECOVERED | {"no error": EXACT}))
    order = [EXACT, ONE_SCALE, *RECOVERED.values(), *(place.effect for place in error_budget(PLANS["full"]))]
    of_budget = shown.loc[shown["study"] == "budget", "effect"]
    order += [effect for effect in of_budget.unique() if effect not in order]  # devices of one's own
    shown = shown.loc[shown["effect"].isin(order)]
    table = tables.build(
        shown, index=["effect"], columns=["correction"], order={"effect": order, "correction": kinds}, decimals=1
    )
    plain = shown.loc[(shown["metric"] == "logit_error") & (shown["correction"] == "none")]
    errors = plain.groupby("effect")["value"].mean()
    table["logit error"] = [f"{errors[e]:.3f}" if e in errors else tables.NOT_RUN for e in table["effect"]]
    return table


def device_table(devices: Iterable[Device]) -> pd.DataFrame:
    """Window of each device, its programming error idle, half way and full in percent of the window, and its source."""
    lines = []
    for cell in devices:
        at = torch.linspace(cell.g_min_uS, cell.g_max_uS, 3, dtype=torch.float64)
        sigma = 100 / cell.window_uS * (cell.error.sigma(at) if cell.error else 0 * at)
        lines.append({
            "device": cell.name, "window, uS": f"{cell.g_min_uS:g} to {cell.g_max_uS:g}",
            **dict(zip(("idle, %", "half way, %", "full, %"), sigma.round(decimals=2).tolist(), strict=True)),
            "with time": "drifts" if cell.drift else "spreads" if cell.ages else "-",
            "read noise": f"once a {cell.read.per}" if cell.read else "-", "source": cell.source,
        })  # fmt: skip
    return pd.DataFrame(lines)


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_crossbar_cost: cells, arrays, conversions and cell reads of one image, and the range of energy estimates."""
    rows = unpacked(rows, "circuit")
    wide = rows.pivot_table(index="circuit", columns="metric", values="value").reindex(list(CIRCUITS))
    names = {"n_conversions": "conversions per image", "n_cell_reads": "cell reads per image"}
    return pd.DataFrame(_counted(wide, {"n_cells": "cells", "n_arrays": "arrays", **names}), wide.index).reset_index()


def trained_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_trained_arrays: accuracy of trained networks, exact and on RRAM after a second and a day, by correction.

    Networks of one method and width go by their files' names.
    """
    found = accuracies(rows, "trained", bits=None)
    if found.empty:
        return pd.DataFrame()
    names: Any = {"no error": "exact", RRAM_SECOND: "RRAM 1 s", RRAM_DAY: "RRAM 1 day"}
    corrected = found["correction"].replace({"none": "", "column": ", column"})
    found = tables.with_bits(found).assign(place=found["effect"].map(names) + corrected)
    order = {"place": ["exact", "RRAM 1 s", "RRAM 1 s, column", "RRAM 1 day", "RRAM 1 day, column"]}
    index = tables.telling(found, ["method", "bits"], "network")
    return tables.build(found, index=index, columns=["place"], order=order, decimals=1)


def slices_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_slices: bits of a cell, cells and conversions of one image read bit by bit, accuracy on RRAM after 1 s.

    Networks of one method and width go by their files' names.
    """
    found = unpacked(rows, "study", "x", "correction", "network").query("study == 'slices'")
    found = tables.with_bits(found)
    if found.empty:
        return pd.DataFrame()
    found = found.assign(network=found["network"].fillna(found["model"]))
    index = [*tables.telling(found, ["bits", "method"], "network"), "x"]
    scores = found.loc[found["metric"] == "acc_pct"]
    accuracy = scores.pivot_table(index=index, columns="correction", values="value")[["none", "column"]].round(1)
    counts = found.pivot_table(index=index, columns="metric", values="value")
    texts = _counted(counts, {"n_cells": "cells", "n_conversions": "conversions per image"})
    table = pd.DataFrame(texts, counts.index).join(accuracy.add_prefix("acc, ")).reset_index()
    table.insert(0, "method", table.pop("method"))
    return table.rename(columns={"x": "bits of a cell"})


def noise_aware_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows for fig_noise_aware: the longest training among them, with columns effect, x, correction, seed, acc_pct, and
    reading: by what they were read."""
    found = tables.with_switches(accuracies(rows, "noise_aware"), "adc.bits")
    reading = ["ideal reading" if pd.isna(bits) else f"{bits:g}-bit converters" for bits in found["adc.bits"]]
    return found.assign(reading=reading).loc[found["epochs"] == found["epochs"].max()].reset_index(drop=True)


def gain_of_noise(rows: pd.DataFrame) -> pd.DataFrame:
    """What weight noise in training adds to training as long without, points, paired by seed: mean, sd and n."""
    found = noise_aware_points(rows)
    if found.empty:
        return pd.DataFrame()
    place = ["reading", "correction", "x"]
    wide: Any = found.pivot_table(index=[*place, "seed"], columns="effect", values="acc_pct", sort=False)
    base = wide.columns[0]
    gains = wide.drop(columns=base).sub(wide[base], axis=0)
    return gains.groupby(place, sort=False).agg(["mean", "std", "count"]).round(2)


def _counted(wide: pd.DataFrame, titles: dict[str, str]) -> dict[str, list[str]]:
    """Counts by title, and the range of energy estimates."""
    pairs = zip(wide["energy_low_uJ"], wide["energy_high_uJ"], strict=True)
    counts = {title: [f"{value:,.0f}" for value in wide[name]] for name, title in titles.items()}
    return {**counts, "estimate, uJ per image": [f"{low:.1f} to {high:.1f}" for low, high in pairs]}
