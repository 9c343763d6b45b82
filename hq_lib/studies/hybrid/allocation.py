"""How much each tensor's bits matter, and what a budget of bits buys when it is spent accordingly (notebook 06).

    sensitivity  KL(float || quantized) of the predictions with one tensor at b bits and all others float, on
                 validation images: label-free, never negative, at small noise proportional to the noise's power
    search       least summed KL within a size (weights alone) or a number of bit operations (weights and activations),
                 measured on test beside the same bits everywhere and random assignments of equal cost

All nets are calibrated only (fast PTQ): nothing is trained or reconstructed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from hq_lib.graph import quantize
from hq_lib.ptq.bits import (
    Assignment,
    Cost,
    GridBank,
    at_random,
    bop_cost,
    greedy,
    optimal,
    size_cost,
    tensors_of,
    uniform,
    uniform_policy,
)
from hq_lib.results import paths, provenance, store
from hq_lib.studies.hybrid.cells import EVAL_BATCH, MODEL, RANGES, bench
from hq_lib.training import evaluate, predict

SENSITIVITY, ALLOCATION = "layer_sensitivity", "bit_allocation"
ENDS, ENDS_BITS = ("weight conv1", "weight linear", "act pool"), 8
"""first and last layer, and their bits where they are an exception"""
ACT_BITS = 8
"""of the activations where the budget is a size"""
PLAN: dict[str, dict[str, Any]] = {
    "smoke": {"bits": (2, 8), "n_calib": 16, "n_val": 50, "n_test": 50, "optimal": (4.0,), "uniform": (2, 8),
              "ends_8": (2,), "at_random": (4.0,), "n_draws": 1, "seeds": (0,)},
    "quick": {"bits": (2, 3, 4, 8), "n_calib": 128, "n_val": 300, "n_test": 1_000, "optimal": (2.5, 3.0, 4.0),
              "uniform": (2, 3, 4), "ends_8": (2, 3), "at_random": (3.0,), "n_draws": 3, "seeds": (0,)},
    "full": {"bits": (2, 3, 4, 5, 6, 8), "n_calib": 256, "n_val": 1_000, "n_test": None,
             "optimal": (2.5, 3.0, 4.0, 5.0), "uniform": (2, 3, 4, 5), "ends_8": (2, 3, 4),
             "at_random": (3.0,), "n_draws": 5, "seeds": (0, 1, 2)},
}  # fmt: skip
"""Profile -> bits to choose from; images; by search its budgets, as the cost of that many bits everywhere; random draws
a budget; calibration draws of all but the random assignments."""
UNITS = {
    "kl": "nat", "loss_rise": "nat", "acc_drop_pp": "pp", "acc_pct": "%", "predicted_kl": "nat", "size_KiB": "KiB",
    "bops": "BOP",
}  # fmt: skip


def differences(logits: Tensor, truth: Tensor, labels: Tensor) -> dict[str, float]:
    """What separates quantized ``logits`` from float ``truth``, (N, K) each.

    ``kl`` = mean sum_k p_k (ln p_k - ln q_k), nat, p of the float net; ``loss_rise`` of the cross entropy, nat;
    ``acc_drop_pp`` in percentage points.
    """
    q, p = logits.double().log_softmax(1), truth.double().log_softmax(1)
    loss_q, loss_p = (F.nll_loss(log_probabilities, labels).item() for log_probabilities in (q, p))
    right_q, right_p = ((x.argmax(1) == labels).double().mean().item() for x in (q, p))
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean").clamp(min=0).item()
    return {"kl": kl, "loss_rise": loss_q - loss_p, "acc_drop_pp": 100 * (right_p - right_q)}


class Laboratory:
    """Network, images and grids of a profile; grids are fitted only when something has to be measured."""

    def __init__(self, profile: str, *, device: str = "cpu") -> None:
        """Load network and images; ``device``: "cpu" or "cuda"."""
        self.profile, self.device, self.plan = profile, device, PLAN[paths.check_profile(profile)]
        self.stage = bench(n_val=self.plan["n_val"], n_test=self.plan["n_test"], device=device)
        policy = uniform_policy(max(self.plan["bits"]), placement="academic")
        outline = quantize(self.stage.net, policy, torch.zeros(1, *self.stage.test.spec.in_shape, device=device))
        self.tensors = tensors_of(outline)
        self.size, self.bops = size_cost(outline), bop_cost(outline)
        self.elements = {f"act {site.name}": float(torch.Size(site.shape).numel()) for site in outline.meta["sites"]}
        self._bank: tuple[int, GridBank, Tensor] | None = None

    def bank(self, seed: int) -> tuple[GridBank, Tensor]:
        """The grids fitted to calibration draw ``seed``, and the float net's logits on the validation images."""
        if self._bank is None or self._bank[0] != seed:
            print(f"fitting grids of {self.plan['bits']} bits, calibration draw {seed}", flush=True)
            images = self.stage.calibration(self.plan["n_calib"], seed).to(self.device)
            grids = GridBank(self.stage.net, images, self.plan["bits"])
            truth = predict(grids.assign({}), self.stage.val, batch_size=EVAL_BATCH)
            self._bank = (seed, grids, truth)
        return self._bank[1:]

    def on_validation(self, bits: Mapping[str, int], seed: int) -> dict[str, float]:
        """``differences`` from the float net."""
        grids, truth = self.bank(seed)
        logits = predict(grids.assign(bits), self.stage.val, batch_size=EVAL_BATCH)
        return differences(logits, truth, self.stage.val.labels)

    def on_test(self, bits: Mapping[str, int], seed: int) -> float:
        """Accuracy, percent of the test images."""
        logits = predict(self.bank(seed)[0].assign(bits), self.stage.test, batch_size=EVAL_BATCH)
        return 100 * (logits.argmax(1) == self.stage.test.labels).double().mean().item()

    def append(self, study: str, common: Mapping[str, Any], values: Mapping[str, float], seconds: float) -> None:
        """One row per metric; those measured on validation images say so."""
        rows = []
        for metric, value in values.items():
            test = metric == "acc_pct"
            on = {"n_test": len(self.stage.test)} if test else {"n_test": len(self.stage.val)}
            rows.append({
                **common, **on, "dataset": self.stage.dataset, "metric": metric, "value": value, "unit": UNITS[metric],
                "switches": {**common["switches"], "split": "test" if test else "val"}, "seconds": seconds,
                **provenance.stamp(self.device),
            })  # fmt: skip
        store.append(study, rows, profile=self.profile)

    def common(self, experiment: str, seed: int) -> dict[str, Any]:
        """Columns that all rows of an experiment share."""
        return {
            "experiment": experiment, "model": MODEL, "method": RANGES, "placement": "academic",
            "n_calib": self.plan["n_calib"], "seed": seed,
        }  # fmt: skip


def sensitivity(lab: Laboratory) -> pd.DataFrame:
    """One tensor quantized at a time, measured where there is no row yet; see ``sensitivities``."""
    for i, tensor in enumerate(lab.tensors):
        for bits in lab.plan["bits"]:
            column = "w_bits" if tensor.startswith("weight ") else "a_bits"
            common = lab.common("fig_layer_sensitivity", 0) | {column: bits, "switches": {"tensor": tensor}}
            if store.done(SENSITIVITY, {**common, "switches": {"tensor": tensor, "split": "val"}}, profile=lab.profile):
                continue
            with provenance.stopwatch(lab.device) as watch:
                values = lab.on_validation({tensor: bits}, 0)
            lab.append(SENSITIVITY, common, values, watch.seconds)
        if i % 10 == 9 or i + 1 == len(lab.tensors):
            print(f"sensitivities: {i + 1} of {len(lab.tensors)} tensors", flush=True)
    return sensitivities(lab.profile)


def sensitivities(profile: str) -> pd.DataFrame:
    """Rows as a table: columns kind ("weight" or "act"), name, tensor, bits, kl, loss_rise, acc_drop_pp."""
    rows = store.read(SENSITIVITY, profile=profile)
    rows = rows.loc[rows["profile"] == profile]
    tensors = [json.loads(text)["tensor"] for text in rows["switches"]]
    tidy = rows.assign(tensor=tensors, bits=rows[["w_bits", "a_bits"]].min(axis=1).astype(int))
    wide = tidy.pivot_table(index=["tensor", "bits"], columns="metric", values="value").reset_index()
    kind, name = zip(*(tensor.split(" ", 1) for tensor in wide["tensor"]), strict=True)
    return wide.assign(kind=kind, name=name).rename_axis(columns=None)


def losses_of(known: pd.DataFrame, tensors: list[str]) -> dict[str, dict[int, float]]:
    """What the searches work on: KL, nat, by tensor (in this order) and bits."""
    by_key = known.set_index(["tensor", "bits"])["kl"]
    return {tensor: by_key.loc[tensor].to_dict() for tensor in tensors}


@dataclass(frozen=True)
class Job:
    """One assignment to be measured."""

    search: str
    """"optimal", "greedy", "uniform", "ends_8" (uniform but for first and last layer) or "at_random"."""
    budget: str
    """"size" or "bop"."""
    equivalent: float
    """Its budget is the cost of this many bits everywhere."""
    seed: int
    """Calibration draw; of "at_random" the draw of the assignment."""
    found: Assignment
    """The bits that were searched."""


def jobs(lab: Laboratory, losses: dict[str, dict[int, float]]) -> list[Job]:
    """Every assignment of the plan; those of equal calibration draw adjoin."""
    made: list[Job] = []
    for budget, cost in (("size", lab.size), ("bop", lab.bops)):
        table = {t: row for t, row in losses.items() if budget == "bop" or t.startswith("weight ")}
        found: dict[tuple[str, float], Assignment] = {}
        for bits in lab.plan["uniform"]:
            found["uniform", bits] = uniform(table, cost, bits)
        for bits in lab.plan["ends_8"]:
            found["ends_8", bits] = _with_ends(uniform(table, cost, bits), table, cost)
        for bits in lab.plan["optimal"]:
            limit = cost.everywhere(bits)
            found["optimal", bits] = optimal(table, cost, limit)
            made.append(Job("greedy", budget, bits, 0, greedy(table, cost, limit)))
        made += [
            Job(name, budget, bits, seed, best) for (name, bits), best in found.items() for seed in lab.plan["seeds"]
        ]
        for bits, draw in product(lab.plan["at_random"], range(lab.plan["n_draws"])):
            limit = cost.everywhere(bits)
            drawn = at_random(table, cost, limit, np.random.default_rng(draw))
            made.append(Job("at_random", budget, bits, draw, drawn))
    return sorted(made, key=lambda job: 0 if job.search == "at_random" else job.seed)


def _with_ends(same: Assignment, table: dict[str, dict[int, float]], cost: Cost) -> Assignment:
    bits = {**same.bits, **{tensor: ENDS_BITS for tensor in ENDS if tensor in table}}
    return Assignment(bits, cost.of(bits), sum(table[tensor][b] for tensor, b in bits.items()))


def search(lab: Laboratory) -> pd.DataFrame:
    """Every assignment of the plan, measured where it has no row yet; see ``points``.

    "greedy" is not measured: its rows hold the prediction alone, beside the integer program's.
    """
    losses = losses_of(sensitivity(lab), lab.tensors)
    _append_float(lab)
    wanted = jobs(lab, losses)
    for i, job in enumerate(wanted):
        bits = {t: job.found.bits.get(t, ACT_BITS) for t in lab.tensors}
        common: dict[str, Any] = lab.common("fig_pareto", job.seed) | _averages(lab, bits)
        common["switches"] = _switches(job, bits)
        if store.done(ALLOCATION, {**common, "switches": {**common["switches"], "split": "val"}}, profile=lab.profile):
            continue
        values = {"predicted_kl": sum(losses[t][b] for t, b in bits.items())}
        values |= {"size_KiB": lab.size.of(bits), "bops": lab.bops.of(bits)}
        with provenance.stopwatch(lab.device) as watch:
            if job.search != "greedy":
                seed = 0 if job.search == "at_random" else job.seed
                values |= lab.on_validation(bits, seed) | {"acc_pct": lab.on_test(bits, seed)}
        lab.append(ALLOCATION, common, values, watch.seconds)
        reached = f": {values['acc_pct']:.2f} %" if "acc_pct" in values else ""
        print(f"[{i + 1}/{len(wanted)}] {job.budget} {job.equivalent:g} {job.search} {job.seed}{reached}", flush=True)
    return points(lab.profile)


def _append_float(lab: Laboratory) -> None:
    common = {**lab.common("fig_pareto", 0), "method": "float", "n_calib": 0, "placement": "-", "switches": {}}
    if not store.done(ALLOCATION, {**common, "switches": {"split": "test"}}, profile=lab.profile):
        score = evaluate(lab.stage.net, lab.stage.test, batch_size=EVAL_BATCH)
        lab.append(ALLOCATION, common, {"acc_pct": score.acc_pct}, 0.0)


def float_accuracy(profile: str) -> float:
    """Test accuracy of the float network, percent, on the images of the study."""
    rows = store.read(ALLOCATION, profile=profile)
    return float(rows.loc[(rows["profile"] == profile) & (rows["method"] == "float"), "value"].iloc[0])


def _averages(lab: Laboratory, bits: Mapping[str, int]) -> dict[str, float]:
    """Average bits: of the weights by elements, of the activations by elements of one image."""
    rates = {"w_bits": lab.size.per_bit, "a_bits": {t: n for t, n in lab.elements.items() if t in bits}}
    return {
        column: sum(n * bits[t] for t, n in weights.items()) / sum(weights.values())
        for column, weights in rates.items()
    }


def _switches(job: Job, bits: Mapping[str, int]) -> dict[str, Any]:
    """The search and its result, one digit a tensor in the network's order."""
    digits = {
        column: "".join(str(b) for t, b in bits.items() if t.startswith(kind))
        for column, kind in (("w", "weight "), ("a", "act "))
    }
    return {"search": job.search, "budget": job.budget, "equivalent": float(job.equivalent), **digits}


def points(profile: str) -> pd.DataFrame:
    """Rows as a table, one line an assignment: budget, search, equivalent, seed, w, a, w_bits, a_bits, the metrics."""
    rows = store.read(ALLOCATION, profile=profile)
    rows = rows.loc[(rows["profile"] == profile) & (rows["method"] == RANGES)]
    told = pd.DataFrame([json.loads(text) for text in rows["switches"]], index=rows.index)
    keys = ["budget", "search", "equivalent", "seed", "w", "a", "w_bits", "a_bits"]
    tidy = pd.concat([told.drop(columns="split"), rows[["seed", "w_bits", "a_bits", "metric", "value"]]], axis=1)
    return tidy.pivot_table(index=keys, columns="metric", values="value").reset_index().rename_axis(columns=None)
