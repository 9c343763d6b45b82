"""Tables, captions and sentences of the crossbar study, from its rows only (notebook 08)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from hq_lib.results import figures, store, tables
from hq_lib.studies.crossbar.mvm import CIRCUITS, COST, LAYER, LAYERS, PAIRS
from hq_lib.studies.crossbar.points import DAY_S, ONE_SCALE, RRAM_DAY, RRAM_SECOND, YEAR_S, points
from hq_lib.studies.crossbar.study import study_rows, unpacked

EXACT = "no error: the exact integers"
RECOVERED = {
    RRAM_SECOND: "programming, RRAM 1 s (Wan)",
    "rram, layer scale": "the same, one scale per layer",
    "rram_crosssim, column scale": "the same, CrossSim's fit",
}
"""Lines of "recovery" that the budget shows too → their names there."""
BUDGET_COLUMNS = ("none", "column", "bn")


def accuracy_rows(profile: str, *studies: str, bits: int = 8) -> pd.DataFrame:
    """Accuracy rows of some studies with columns study, effect, x, correction, t_s, seed, acc_pct."""
    found = pd.concat([study_rows(profile, study) for study in studies], ignore_index=True)
    found = found.loc[(found["metric"] == "acc_pct") & (found["w_bits"] == bits)]
    return found.assign(acc_pct=found["value"]).reset_index(drop=True)


def mean(profile: str, study: str, effect: str, correction: str, *, x: float = 0.0, bits: int = 8) -> float | None:
    """Mean accuracy over the draws, percent; None where it was not run."""
    found = accuracy_rows(profile, study, bits=bits)
    found = found.loc[(found["effect"] == effect) & (found["correction"] == correction) & (found["x"] == x)]
    return float(found["acc_pct"].mean()) if len(found) else None


def exact_pct(profile: str, *, bits: int = 8) -> float:
    """Accuracy of the exact integer network, percent."""
    found = mean(profile, "no_error", "no error", "none", bits=bits)
    if found is None:
        raise ValueError(f"the study no_error of {bits} bits was not run in profile {profile}: run it first")
    return found


def no_error_pct(profile: str) -> dict[str, float]:
    """{correction: accuracy, percent} of the network without any error, for "column" and "bn"."""
    return {kind: value for kind in ("column", "bn") if (value := mean(profile, "no_error", "no error", kind))}


def drift_points(profile: str) -> pd.DataFrame:
    """Rows for fig_drift: PCM at all its times, and RRAM at the two times for which it was published."""
    second, day = accuracy_rows(profile, "recovery"), accuracy_rows(profile, "budget")
    second, day = second.loc[second["effect"] == RRAM_SECOND], day.loc[day["effect"] == RRAM_DAY]
    rram = pd.concat([second.assign(x=1.0), day.assign(x=DAY_S)]).assign(effect="RRAM")
    found = pd.concat([accuracy_rows(profile, "drift"), rram], ignore_index=True)
    return found.loc[found["correction"].isin(["none", "global", "column", "bn"])].reset_index(drop=True)


def scatter_pairs(profile: str) -> pd.DataFrame:
    """Rows for fig_mvm_scatter."""
    rows = unpacked(store.read(PAIRS, profile=profile), "panel", "correction", "ideal_LSB")
    return rows.assign(measured_LSB=rows["value"])


def layer_errors(profile: str) -> pd.DataFrame:
    """Rows for fig_mvm_calibration, layers in the order of the network."""
    rows = unpacked(store.read(LAYERS, profile=profile), "panel", "correction", "layer")
    rows = rows.loc[rows["metric"] == "relative_error"].assign(relative_error=rows["value"])
    names = sorted(set(rows["layer"]), key=lambda name: (name == "linear", name != "conv1", name))
    return rows.assign(at=rows["layer"].map(names.index)).sort_values(["at", "seed"], kind="stable")


def budget_table(profile: str) -> pd.DataFrame:
    """tab_error_budget: accuracy with one effect at a time under three corrections, and the logits' error."""
    shown = pd.concat([study_rows(profile, study) for study in ("no_error", "recovery", "budget")], ignore_index=True)
    shown = shown.loc[(shown["w_bits"] == 8) & shown["correction"].isin(BUDGET_COLUMNS)]
    shown = shown.assign(effect=shown["effect"].replace(RECOVERED | {"no error": EXACT}))
    order = [EXACT, ONE_SCALE, *RECOVERED.values(), *(point.effect for point in points("full", ("budget",)))]
    shown = shown.loc[shown["effect"].isin(order)]
    choices = {"effect": order, "correction": list(BUDGET_COLUMNS)}
    table = tables.build(shown, index=["effect"], columns=["correction"], order=choices, decimals=1)
    plain = shown.loc[(shown["metric"] == "logit_error") & (shown["correction"] == "none")]
    errors = plain.groupby("effect")["value"].mean()
    table["logit error"] = [f"{errors[e]:.3f}" if e in errors else tables.NOT_RUN for e in table["effect"]]
    return table


def cost_table(profile: str) -> pd.DataFrame:
    """tab_crossbar_cost: cells, arrays, conversions and cell reads of one image, and the range of energy estimates."""
    rows = unpacked(store.read(COST, profile=profile), "circuit")
    wide = rows.pivot_table(index="circuit", columns="metric", values="value").reindex(list(CIRCUITS))
    energy = [
        f"{low:.1f} to {high:.1f}" for low, high in zip(wide["energy_low_uJ"], wide["energy_high_uJ"], strict=True)
    ]
    return pd.DataFrame(
        {
            "circuit": list(wide.index),
            "cells": [f"{v:,.0f}" for v in wide["n_cells"]],
            "arrays": [f"{v:,.0f}" for v in wide["n_arrays"]],
            "conversions per image": [f"{v:,.0f}" for v in wide["n_conversions"]],
            "cell reads per image": [f"{v:,.0f}" for v in wide["n_cell_reads"]],
            "estimate, uJ per image": energy,
        }
    )


def caption(claim: str, profile: str, rows: pd.DataFrame, *, switches: str = "") -> str:
    """The claim with data set, profile, images and draws of ``rows``."""
    n = f"{rows['n_test'].max():,} test images"
    base = "ResNet-20, W8A8 (mse ranges), pair of cells, column scale, 128 rows unless said"
    facts = "; ".join(part for part in (base, switches) if part)
    seeds = sorted(seed for seed in set(rows["seed"]) if seed >= 0)
    return figures.caption(
        claim, profile=profile, n=n, seeds=seeds, dataset=str(rows["dataset"].iloc[0]), switches=facts
    )


def findings(profile: str) -> list[str]:
    """The sentences that the rows of a profile support."""
    found = [*_recovery(profile), _sigma(profile), _converters(profile), *_drift(profile), _norms(profile)]
    return [line for line in [*found, _stuck(profile), _dot_products(profile), _cost(profile)] if line]


def _recovery(profile: str) -> list[str]:
    lines = []
    for bits in (8, 4):
        none, column = (mean(profile, "recovery", RRAM_SECOND, k, bits=bits) for k in ("none", "column"))
        if none is None or column is None:
            continue
        ideal = exact_pct(profile, bits=bits)
        verdict = "within" if ideal - column <= 3 else "NOT within"
        lines.append(
            f"RRAM one second after programming (Wan), W{bits}A{bits}, scale per column: {none:.1f} % without and "
            f"{column:.1f} % with column calibration; the exact integers give {ideal:.1f} %, so it comes to {verdict} "
            f"3 points ({ideal - column:.1f})"
        )
    exact = mean(profile, "no_error", ONE_SCALE, "none")
    layer = [mean(profile, "recovery", "rram, layer scale", kind) for kind in ("none", "column")]
    opened = mean(profile, "recovery", RRAM_SECOND, "column_open")
    if exact is not None and None not in layer and opened is not None:
        lines.append(f"with one weight scale per layer the same cells give {layer[0]:.1f} and {layer[1]:.1f} % of an "
                     f"exact {exact:.1f} %; fitted open loop, column calibration gives {opened:.1f} %")  # fmt: skip
    return lines


def _sigma(profile: str) -> str:
    exact, parts = exact_pct(profile), []
    table: Any = accuracy_rows(profile, "sigma").groupby(["effect", "correction", "x"])["acc_pct"].mean()
    for effect in ("state independent", "proportional"):
        for kind in ("none", "column"):
            parts.append(f"{effect}, {kind}: {_largest(table.loc[effect, kind], exact - 3)} %")
    return "largest programming error measured that stays within 3 points: " + "; ".join(parts)


def _largest(line: pd.Series, least: float) -> str:
    """The largest x up to which all of ``line`` is at least ``least``; "none" where the first already fails."""
    kept = [x for i, x in enumerate(line.index) if (line.iloc[: i + 1] >= least).all()]
    return f"{kept[-1]:g}" if kept else "none, 0"


def _converters(profile: str) -> str:
    exact, parts = exact_pct(profile), []
    table: Any = accuracy_rows(profile, "adc").groupby(["effect", "x"])["acc_pct"].mean()
    for effect in dict.fromkeys(table.index.get_level_values(0)):
        line = table.loc[effect]
        enough = line.loc[line >= exact - 1]
        parts.append(f"{effect}: {f'{enough.index.min():g} bits' if len(enough) else f'not with {line.index.max():g}'}")
    return "fewest converter bits measured that stay within 1 point: " + "; ".join(parts)


def _drift(profile: str) -> list[str]:
    lines = []
    table: Any = accuracy_rows(profile, "drift").pivot_table(index="x", columns="correction", values="acc_pct")
    for t_s, name in ((DAY_S, "a day"), (YEAR_S, "a year"), (10 * YEAR_S, "ten years")):
        if t_s in table.index:
            row = table.loc[t_s]
            lines.append(f"PCM after {name}: {row['none']:.1f} % uncorrected, {row['global']:.1f} % with a factor per "
                         f"layer, {row['column']:.1f} % with column calibration, {row['bn']:.1f} % with batch-norm "
                         "statistics")  # fmt: skip
    return lines


def _norms(profile: str) -> str:
    exact, bn = exact_pct(profile), mean(profile, "no_error", "no error", "bn")
    return "" if bn is None else f"batch-norm re-estimation on perfect cells: {bn:.1f} %, {exact - bn:+.1f} points lost"


def _stuck(profile: str) -> str:
    table: Any = accuracy_rows(profile, "stuck").groupby(["x", "effect", "correction"])["acc_pct"].mean()
    x = 0.5 if 0.5 in table.index else table.index[0][0]
    row = table.loc[x]
    return (f"{x:g} % stuck cells: {row['no fault map', 'none']:.1f} %, with column calibration "
            f"{row['no fault map', 'column']:.1f} %, remapped around them {row['remapped', 'none']:.1f} %, both "
            f"{row['remapped', 'column']:.1f} %")  # fmt: skip


def _dot_products(profile: str) -> str:
    rows = unpacked(store.read(LAYERS, profile=profile), "panel", "correction", "layer")
    table: Any = rows.loc[rows["layer"] == LAYER].groupby(["panel", "correction", "metric"])["value"].mean()
    parts = []
    for panel in dict.fromkeys(rows["panel"]):
        cell = table.loc[panel]
        error = [cell[kind, "relative_error"] for kind in ("none", "column")]
        slope = [cell[kind, "slope"] for kind in ("none", "column")]
        parts.append(f"{panel}: error {error[0]:.3f} to {error[1]:.3f}, slope {slope[0]:.2f} to {slope[1]:.2f}")
    return f"dot products of {LAYER}, before to after column calibration: " + "; ".join(parts)


def _cost(profile: str) -> str:
    rows = unpacked(store.read(COST, profile=profile), "circuit")
    table: Any = rows.set_index(["circuit", "metric"])["value"]
    analog, serial = ("analog input, pair, 128 rows", "bit-serial, 4 slices x 2 signs, 128 rows")
    ratio = table[serial, "n_conversions"] / table[analog, "n_conversions"]
    return (f"one image takes {table[analog, 'n_conversions']:,.0f} conversions with analog inputs at 128 rows, "
            f"{ratio:.0f} times as many bit by bit; energy, an estimate of the order only: "
            f"{table[analog, 'energy_low_uJ']:.1f} to {table[analog, 'energy_high_uJ']:.1f} against "
            f"{table[serial, 'energy_low_uJ']:.0f} to {table[serial, 'energy_high_uJ']:.0f} uJ")  # fmt: skip
