"""What the group's placements and bit lists keep without training: min-max ranges on the float networks.

``hq study qat_untrained --profile full`` appends to ``qat_untrained.csv``. Seed 001 trained ResNet-20 at INT8 with and
without a quantizer on the shortcut's output ("branch quant": 92.02 and 92.34 %); the last convolution of a block has
none of its own in either, the sum behind it has one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.studies.bench import Bench, net_switch, open_bench
from hq_lib.studies.study import Point, Row, Run, Study
from hq_lib.training import evaluate
from hq_lib.training.recipes import BIT_LISTS, find_lists, least_bits

BRANCHES = ("*.shortcut.0",)
INPUTS = ("conv1", "layer1.*.add", "layer2.*.add", "layer3.0.add", "layer3.1.add")
IN_FLOAT = {"neither": (), "branch outputs": BRANCHES, "block inputs": INPUTS, "both": (*BRANCHES, *INPUTS)}
"""What has no quantizer -> its tensors in ResNet-20, whose blocks read the stem or the sum of the block before."""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    bits: tuple[int, ...] = (8, 6, 4)
    """Bits of ResNet-20's weights and activations, with and without each of ``IN_FLOAT``."""
    models: tuple[str, ...] = tuple(BIT_LISTS)
    """Networks whose bit lists are measured."""
    n_test: int | None = None
    """Test images; None = all."""
    n_calib: int = 256
    """Training images that the ranges hold."""


def points(plan: Plan) -> list[Point]:
    """ResNet-20 by what is left in float and by bits, then every network's configurations."""
    found = [_point(plan, "resnet20", (bits, bits), {"in_float": what}) for bits in plan.bits for what in IN_FLOAT]
    return found + [
        _point(plan, model, least_bits(lists), {"lists": name})
        for model in plan.models
        for name, lists in BIT_LISTS.get(model, {}).items()
    ]


def _point(plan: Plan, model: str, bits: tuple[int, int], named: dict[str, str]) -> Point:
    key = {
        "model": model, "method": "minmax", "metric": "acc_pct", "w_bits": bits[0], "a_bits": bits[1],
        "n_calib": plan.n_calib, "seed": 0, "switches": {**named, **net_switch(model)},
    }  # fmt: skip
    what = "_".join(named.values()).replace(" ", "_").replace("*", "star")
    return Point(f"untrained_{model}_w{bits[0]}a{bits[1]}_{what}", key, bench=model, after=(f"{model}_float_s0",))


def measure(run: Run[Plan], bench: Bench, point: Point) -> Iterator[Row]:
    """Test accuracy with weights per channel; lists in placement "academic", as they are trained."""
    if point["lists"]:
        lists = find_lists(point["model"], point["lists"])
        policy = BitPolicy.from_lists(bench.net, *lists, weight="minmax", act="minmax", placement="academic")
    else:
        left = {name: {"act": 32} for name in ("*.conv2", *IN_FLOAT[point["in_float"]])}
        policy = BitPolicy(f"minmax:{point['w_bits']}", f"minmax:{point['a_bits']}", overrides=left)
    x = bench.calibration(run.plan.n_calib, 0)
    qnet = quantize(bench.net, policy, x[:1])
    calibrate(qnet, x)
    score = evaluate(qnet, bench.test)
    yield {"value": score.acc_pct, "n_test": score.n, "dataset": bench.dataset, "placement": policy.placement}


STUDY = Study(
    "qat_untrained",
    {"smoke": Plan((8,), ("resnet20",), 50, 32), "quick": Plan(n_test=500), "full": Plan()},
    points=points,
    open_bench=lambda run, name: open_bench(name, n_test=run.plan.n_test),
    measure=measure,
)
