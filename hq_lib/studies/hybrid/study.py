"""Bits per tensor on the shipped ResNet-20: the hybrid rule, sensitivities, searched assignments (notebook 06).

    hybrid_bits        seed 000's rule over a grid of bits (``cells``)
    layer_sensitivity  KL(float || quantized) of the predictions with one tensor at b bits and all others float, on
                       validation images: label-free, never negative, at small noise proportional to the noise's power
    bit_allocation     least summed KL within a size (weights alone) or a number of bit operations (weights and
                       activations), measured on test beside the same bits everywhere and random assignments

All nets of the last two are calibrated only (fast PTQ): nothing is trained or reconstructed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hq_lib import models
from hq_lib.graph import QuantizedNet, quantize
from hq_lib.ptq import bits as bit_search
from hq_lib.ptq.bits import Assignment, Cost, GridBank, tensors_of, uniform_policy
from hq_lib.studies.bench import Bench, net_switch, open_bench
from hq_lib.studies.hybrid.cells import CONFIG, FIRST_LAST_BITS, QAT, RANGES, cells, finished, train
from hq_lib.studies.hybrid.tables import losses, sensitivities
from hq_lib.studies.study import Found, Point, Row, Run, Study, StudyError, profile_rows
from hq_lib.training import evaluate, predict

MODEL, EVAL_BATCH = "resnet20", 100
SENSITIVITY, ALLOCATION = "layer_sensitivity", "bit_allocation"
ENDS, ENDS_BITS = ("weight conv1", "weight linear", "act pool"), 8
"""first and last layer, and their bits where they are an exception"""
ACT_BITS = 8
"""of the activations where the budget is a size"""


@dataclass(frozen=True)
class MapPlan:
    """How much of the hybrid map a profile measures."""

    bits: tuple[int, ...]
    """Of weights and of activations."""
    n_train: int
    """Images of the short training."""
    n_calib: int
    """Images that ranges are fitted to."""
    n_test: int | None = None
    """Test images; None = all."""
    n_val: int = 500
    """Images that the short training is watched on."""
    trained_at_the_boundary: bool = False
    """Whether the cell with all tensors at the boundary is trained too."""
    seeds: tuple[int, ...] = (0,)
    """One map each."""


MAP_PLANS = {
    "smoke": MapPlan((2, 8), 64, 20, 20, 20),
    "quick": MapPlan((2, 4, 8), 1_280, 64, 500),
    "full": MapPlan((2, 3, 4, 6, 8), 12_800, 256, trained_at_the_boundary=True),
}


def map_points(plan: MapPlan) -> list[Point]:
    """Every cell, those that share a training adjoining: they are one unit."""
    found, flag = [], plan.trained_at_the_boundary
    same = {"qat": QAT, "ranges": RANGES, "bias": "means", "first_last_bits": FIRST_LAST_BITS, "lr": CONFIG.lr}
    for cell in (cell for seed in plan.seeds for cell in cells(plan.bits, seed=seed, trained_at_the_boundary=flag)):
        key = {
            **_common(plan.n_calib, "fig_hybrid_bits", cell.seed), "w_bits": cell.w_bits, "a_bits": cell.a_bits,
            "switches": {"boundary": cell.boundary, **same, **net_switch(MODEL)},
            **({"method": "hybrid"} if cell.boundary else {}),
            "epochs": CONFIG.epochs if cell.is_trained else 0, "n_train": plan.n_train if cell.is_trained else 0,
        }  # fmt: skip
        found.append(Point(cell.name, key, cell, bench=cell.shared, unit=cell.training))
    return found


def open_map(run: Run[MapPlan], shared: Any) -> tuple[Bench, QuantizedNet | None] | None:
    """Network and images, and what the short training made of it where the cells have a trained tensor."""
    plan = run.plan
    bench = open_bench(MODEL, n_val=plan.n_val, n_test=plan.n_test, device=run.device)
    if bench is None or not shared.is_trained:
        return bench and (bench, None)
    return bench, train(shared, bench, run.folder, n_calib=plan.n_calib, n_train=plan.n_train)


def measure_map(run: Run[MapPlan], bench: tuple[Bench, QuantizedNet | None], point: Point) -> Iterator[Found]:
    """Test accuracy of a cell."""
    stage, trained = bench
    score = evaluate(finished(point.what, stage, run.plan.n_calib, trained), stage.test, batch_size=EVAL_BATCH)
    yield {"dataset": stage.dataset, "n_test": score.n, "metric": "acc_pct", "value": score.acc_pct}


MAP = Study(
    "hybrid_bits", MAP_PLANS, points=map_points, open_bench=open_map, measure=measure_map, gpu=True,
    unkeyed=("n_test", "n_val"),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much of sensitivities and assignments a profile measures."""

    bits: tuple[int, ...]
    """To choose from."""
    n_calib: int
    """Images that grids are fitted to."""
    n_val: int
    """Images that losses are measured on."""
    n_test: int | None
    """Images that accuracies are measured on; None = all."""
    optimal: tuple[float, ...]
    """Budgets of the searches, as the cost of that many bits everywhere."""
    uniform: tuple[int, ...]
    """The same bits everywhere."""
    ends_8: tuple[int, ...]
    """The same but for first and last layer."""
    at_random: tuple[float, ...]
    """Budgets of random assignments."""
    n_draws: int
    """Random assignments a budget."""
    seeds: tuple[int, ...] = (0,)
    """Calibration draws of all but the random assignments."""


PLANS = {
    "smoke": Plan((2, 8), 20, 10, 10, (4.0,), (2, 8), (2,), (4.0,), 1),
    "quick": Plan((2, 3, 4, 8), 32, 100, 500, (2.5, 3.0, 4.0), (2, 3, 4), (2, 3), (3.0,), 3),
    "full": Plan(
        (2, 3, 4, 5, 6, 8), 256, 1_000, None, (2.5, 3.0, 4.0, 5.0), (2, 3, 4, 5), (2, 3, 4), (3.0,), 5, (0, 1, 2)
    ),
}
TENSORS_A_UNIT = 7


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


@cache
def outline() -> QuantizedNet:
    """The quantized graph that speaks of the network's tensors; its weights do not matter."""
    return quantize(models.build(MODEL), uniform_policy(8), torch.zeros(1, 3, 32, 32))


def tensors() -> list[str]:
    """Every weight and activation, in the network's order."""
    return tensors_of(outline())


class Laboratory:
    """Network and images with the grids of one calibration draw, on which assignments are tried."""

    def __init__(self, run: Run[Plan], bench: Bench, seed: int) -> None:
        """Fit the grids of every tensor at all bits of the plan to calibration draw ``seed``."""
        print(f"fitting grids of {run.plan.bits} bits, calibration draw {seed}", flush=True)
        images = bench.calibration(run.plan.n_calib, seed).to(run.device)
        self.bench, self.grids = bench, GridBank(bench.net, images, run.plan.bits)
        self.truth = predict(self.grids.assign({}), bench.val, batch_size=EVAL_BATCH)

    def on_validation(self, bits: Mapping[str, int]) -> dict[str, float]:
        """``differences`` from the float net."""
        logits = predict(self.grids.assign(bits), self.bench.val, batch_size=EVAL_BATCH)
        return differences(logits, self.truth, self.bench.val.labels)

    def rows(self, values: Mapping[str, float], switches: Row) -> Iterator[Row]:
        """One row per metric; those measured on validation images say so."""
        for metric, value in values.items():
            split, images = ("test", self.bench.test) if metric == "acc_pct" else ("val", self.bench.val)
            yield {
                "n_test": len(images), "dataset": self.bench.dataset, "metric": metric, "value": value,
                "switches": {**switches, **net_switch(MODEL), "split": split},
            }  # fmt: skip


def open_laboratory(run: Run[Plan], seed: Any) -> Laboratory | None:
    """The laboratory of a calibration draw."""
    bench = open_bench(MODEL, n_val=run.plan.n_val, n_test=run.plan.n_test, device=run.device)
    return bench and Laboratory(run, bench, seed)


def _common(n_calib: int, experiment: str, seed: int) -> Row:
    of = {"experiment": experiment, "model": MODEL, "method": RANGES, "placement": "academic"}
    return {**of, "n_calib": n_calib, "seed": seed}


def sensitivity_points(plan: Plan) -> list[Point]:
    """Every tensor ("weight ..." or "act ...") at all bits, all others in float, on calibration draw 0.

    A unit is a few tensors, as the grids of all are fitted for them.
    """
    found = []
    for i, tensor in enumerate(tensors()):
        column = "w_bits" if tensor.startswith("weight ") else "a_bits"
        switches = {"tensor": tensor, "split": "val", **net_switch(MODEL)}
        common = {**_common(plan.n_calib, "fig_layer_sensitivity", 0), "switches": switches}
        unit = f"sensitivity_{i // TENSORS_A_UNIT}"
        found += [Point(f"{tensor} at {b} bits", {**common, column: b}, b, bench=0, unit=unit) for b in plan.bits]
    return found


def measure_sensitivity(run: Run[Plan], lab: Laboratory, point: Point) -> Iterator[Found]:
    """KL, rise of the loss and drop of the accuracy on validation images."""
    yield from lab.rows(lab.on_validation({point["tensor"]: point.what}), {"tensor": point["tensor"]})


SENSITIVITIES = Study(
    SENSITIVITY, PLANS, points=sensitivity_points, open_bench=open_laboratory, measure=measure_sensitivity, gpu=True,
    unkeyed=("n_val",),
)  # fmt: skip


def searched(
    losses: Mapping[str, Mapping[int, float]], search: str, budget: str, equivalent: float, seed: int = 0
) -> Assignment:
    """One assignment of bits, from the KL, nat, of every tensor at all bits.

    Args:
        search:     "optimal", "greedy", "uniform", "ends_8" (uniform but for first and last layer) or "at_random".
        budget:     "size" or "bop".
        equivalent: its budget is the cost of this many bits everywhere.
        seed:       of "at_random".
    """
    cost = _costs()[budget]
    table = {t: dict(row) for t, row in losses.items() if budget == "bop" or t.startswith("weight ")}
    if search in ("uniform", "ends_8"):
        ends = ENDS if search == "ends_8" else ()
        return bit_search.assigned({t: ENDS_BITS if t in ends else int(equivalent) for t in table}, table, cost)
    limit = cost.everywhere(equivalent)
    if search == "at_random":
        return bit_search.at_random(table, cost, limit, np.random.default_rng(seed))
    return (bit_search.optimal if search == "optimal" else bit_search.greedy)(table, cost, limit)


def search_points(plan: Plan) -> list[Point]:
    """The float network, then every assignment of the plan; those of equal calibration draw adjoin.

    A key is how it was searched, not what was found; a unit is all searches of a calibration draw.
    """
    after = tuple(sorted({point.unit for point in sensitivity_points(PLANS["full"])}))
    key = {**_common(0, "fig_pareto", 0), "method": "float", "placement": "-"}
    key["switches"] = {"split": "test", **net_switch(MODEL)}
    found = [Point("size of 32 bits, float, draw 0", key, bench=0, unit="search_0", after=after)]
    several = {"uniform": plan.uniform, "ends_8": plan.ends_8, "optimal": plan.optimal}
    for budget in ("size", "bop"):
        wanted: list[tuple[str, float, int]] = [("greedy", bits, 0) for bits in plan.optimal]
        wanted += [(search, bits, seed) for search, many in several.items() for bits in many for seed in plan.seeds]
        wanted += [("at_random", bits, draw) for bits in plan.at_random for draw in range(plan.n_draws)]
        for search, bits, seed in wanted:
            switches = {"search": search, "budget": budget, "equivalent": float(bits), **net_switch(MODEL)}
            key = {**_common(plan.n_calib, "fig_pareto", seed), "metric": "predicted_kl"}
            key |= {f"switches.{name}": value for name, value in switches.items()}
            name, draw = f"{budget} of {bits:g} bits, {search}, draw {seed}", 0 if search == "at_random" else seed
            found.append(Point(name, key, bench=draw, unit=f"search_{draw}", after=after))
    return sorted(found, key=lambda point: point.bench)


def measure_search(run: Run[Plan], lab: Laboratory, point: Point) -> Iterator[Found]:
    """Predicted loss and cost; but for "greedy", whose rows hold the prediction alone, what it is in truth."""
    if point["method"] == "float":
        score = evaluate(lab.bench.net, lab.bench.test, batch_size=EVAL_BATCH)
        yield from lab.rows({"acc_pct": score.acc_pct}, {})
        return
    losses, costs = _losses(run), _costs()
    how = {name: point[name] for name in ("search", "budget", "equivalent")}
    some = searched(losses, **how, seed=point["seed"])
    bits = {t: some.bits.get(t, ACT_BITS) for t in losses}
    values = {"predicted_kl": sum(losses[t][b] for t, b in bits.items())}
    values |= {"size_KiB": costs["size"].of(bits), "bops": costs["bop"].of(bits)}
    if point["search"] != "greedy":
        score = evaluate(lab.grids.assign(bits), lab.bench.test, batch_size=EVAL_BATCH)
        values |= {**lab.on_validation(bits), "acc_pct": score.acc_pct}
    kinds = {"w": "weight ", "a": "act "}  # the result, one digit a tensor in the network's order
    digits = {k: "".join(str(b) for t, b in bits.items() if t.startswith(kind)) for k, kind in kinds.items()}
    yield from ({**averages(bits), **row} for row in lab.rows(values, {**how, **digits}))


def _losses(run: Run[Plan]) -> dict[str, dict[int, float]]:
    """What the searches work on: KL, nat, by tensor in the network's order, and bits; of this very network."""
    found = losses(sensitivities(profile_rows(SENSITIVITY, run.profile, earlier=False)))
    missing = [t for t in tensors() if len(found.get(t, ())) < len(run.plan.bits)]
    if missing:
        raise StudyError(
            f"{len(missing)} tensors have no sensitivities: hq study {SENSITIVITY} --profile {run.profile}"
        )
    return {tensor: found[tensor] for tensor in tensors()}


@cache
def _costs() -> dict[str, Cost]:
    return {"size": bit_search.size_cost(outline()), "bop": bit_search.bop_cost(outline())}


def averages(bits: Mapping[str, int]) -> dict[str, float]:
    """Average bits: of the weights by elements, of the activations by elements of one image."""
    elements = {f"act {site.name}": float(torch.Size(site.shape).numel()) for site in outline().meta["sites"]}
    rates = {"w_bits": _costs()["size"].per_bit, "a_bits": {t: n for t, n in elements.items() if t in bits}}
    return {
        column: sum(n * bits[t] for t, n in weights.items()) / sum(weights.values())
        for column, weights in rates.items()
    }


SEARCHES = Study(
    ALLOCATION, PLANS, points=search_points, open_bench=open_laboratory, measure=measure_search, gpu=True,
    unkeyed=("n_test", "n_val", "bits"),
)  # fmt: skip
STUDIES = (MAP, SENSITIVITIES, SEARCHES)
