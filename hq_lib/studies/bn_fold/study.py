"""BN folding measured: how exact is it, and what does it do to the weight ranges (notebook 02).

``hq study bn_fold --profile full`` folds each network in float64 and float32 and appends its errors to ``bn_fold.csv``.
Networks with a shipped checkpoint are folded with their trained statistics and judged on test images, in W8A8 integers
too, and the ranges of their channels go to ``bn_ranges.csv``; all others get random, non-trivial statistics (mean ~
N(0, 1), variance ~ U(0.5, 2), gamma ~ U(0.5, 1.5), beta ~ U(-1, 1)) and are judged on the error alone.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from hq_lib import data, integer, models
from hq_lib.data import ImageSet
from hq_lib.deploy import c as export_c
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.graph.folding import fold_bn, per_channel_ranges
from hq_lib.studies.bench import Bench, net_switch, open_bench, shipped
from hq_lib.studies.study import Found, Point, Run, Study, check_choice, metric_rows
from hq_lib.training import predict

RANGES = "bn_ranges"
BN = nn.modules.batchnorm._BatchNorm
N_COMPARED, N_NOISE = 32, 2
"""Images on which logits are compared: test images, or noise."""
N_CALIB = 256
"""Training images from which the ranges of the integers come."""
IN_INTEGERS = {"integers_acc_pct": {"bn": "fold"}, "integers_kept_acc_pct": {"bn": "keep", "pool_bits": 16}}
"""Metric -> what its policy says besides W8A8. Norms that are kept become an int32 multiplier and an int32 bias of each
channel, average pools give 16 bits: PACT-Quantization's README has them so, and reports no loss."""


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    models: tuple[str, ...]
    """Networks, as in ``models.names``."""
    n_test: int | None = None
    """Test images; None = all."""


EVERY = (
    "resnet20", "toynet", "lenet", "resnet56", "vgg11", "vgg_small", "mobilenetv2", "mobilenetv2_seed", "resnet18",
    "resnet50", "resnet101", "mobilenetv2_imagenet", "regnetx_600m", "mnasnet2_0",
)  # fmt: skip
PLANS = {"smoke": Plan(("resnet20", "toynet"), n_test=50), "quick": Plan(EVERY, n_test=2_000), "full": Plan(EVERY)}


def points(plan: Plan) -> list[Point]:
    """The networks of a plan, trained where a checkpoint is shipped; ``StudyError`` for one that does not exist."""
    check_choice("bn_fold", "network", plan.models, models.names())
    found = []
    for model in plan.models:
        trained = shipped(model) is not None
        how = net_switch(model) if trained else {"input_px": 64 if model in models.IMAGENET else 32}
        switches = {"statistics": "trained" if trained else "random", **how}
        key = {"model": model, "method": "float", "metric": "rel_error_float64", "switches": switches}
        after = (f"{model}_float_s0",) if trained else ()
        found.append(Point(f"fold_{model}", key, bench=model, after=after))
        if trained:
            key = {**key, "method": "minmax", "w_bits": 8, "a_bits": 8, "metric": "integers_kept_acc_pct"}
            found.append(Point(f"integers_{model}", key, bench=model, after=after, minutes=3.0))
    return found


def open_net(run: Run[Plan], name: str) -> Bench | nn.Module | None:
    """The shipped network with its images, or one with random statistics."""
    if shipped(name) is not None:
        return open_bench(name, n_test=run.plan.n_test)
    torch.manual_seed(0)
    net = models.build(name)
    randomize_statistics(net, torch.Generator().manual_seed(0))
    return net.eval()


def measure(run: Run[Plan], bench: Bench | nn.Module, point: Point) -> Iterator[Found]:
    """Errors in both number formats; of a shipped network also accuracies and channel ranges, or its integers."""
    if isinstance(bench, nn.Module):
        size = N_NOISE, 3, point["input_px"], point["input_px"]
        noise = torch.randn(size, generator=torch.Generator().manual_seed(1))
        yield from metric_rows(errors(bench, noise), dataset="-")
        return
    test = bench.test
    known = bench.dataset == bench.record["dataset"]  # the embedded digits would give a meaningless accuracy
    if point.key["metric"] in IN_INTEGERS:
        common = {"dataset": bench.dataset, "n_test": len(test), "n_calib": N_CALIB, "placement": "deploy"}
        yield from metric_rows(in_integers(bench) if known else {}, **common)
        return
    found = errors(bench.net, data.normalize(test.images[:N_COMPARED], test.spec))
    found |= accuracies(bench.net, test) if known else {}
    yield from metric_rows(found, dataset=bench.dataset, n_test=len(test) if known else 0)
    for row in ranges_before_after(bench.net).to_dict("records"):
        where = {**net_switch(point["model"]), **{name: row[name] for name in ("layer", "channel", "stage")}}
        yield RANGES, {"experiment": RANGES, "dataset": bench.record["dataset"], "metric": "max_abs_w",
                       "value": row["max_abs"], "switches": where}  # fmt: skip


def randomize_statistics(net: nn.Module, generator: torch.Generator) -> None:
    """Gives every BN random statistics and affine parameters, so that an error in any term of the fold shows."""
    for module in net.modules():
        if isinstance(module, BN):
            draw = torch.rand(3, module.num_features, generator=generator)
            drawn = {"running_var": 0.5 + 1.5 * draw[0], "weight": 0.5 + draw[1], "bias": 2 * draw[2] - 1}
            mean = torch.randn(module.num_features, generator=generator)
            module.load_state_dict({"running_mean": mean, **drawn}, strict=False)


def errors(net: nn.Module, example: Tensor) -> dict[str, float]:
    """Largest error of the folded network's logits on an example (N, C, H, W), relative to the largest logit.

    Returns ``rel_error_float64`` and ``rel_error_float32``, pure numbers.
    """
    found = {}
    for name, dtype in (("rel_error_float64", torch.float64), ("rel_error_float32", torch.float32)):
        original, x = copy.deepcopy(net).to(dtype).eval(), example.to(dtype)
        folded = fold_bn(original, x)
        with torch.no_grad():
            want, got = original(x), folded(x)
        found[name] = ((got - want).abs().max() / want.abs().max()).item()
    return found


def accuracies(net: nn.Module, test: ImageSet) -> dict[str, float]:
    """The accuracies before and after the fold, percent, and how many predictions changed."""
    before = predict(net, test).argmax(1)
    after = predict(fold_bn(net, data.normalize(test.images[:4], test.spec)), test).argmax(1)
    right = {"acc_pct": before == test.labels, "folded_acc_pct": after == test.labels}
    found = {name: 100 * share.double().mean().item() for name, share in right.items()}
    return {**found, "n_flips": float((before != after).sum())}


def in_integers(bench: Bench) -> dict[str, float]:
    """Accuracies in W8A8 integers, percent: min-max ranges, 31-bit multipliers, norms folded and norms kept."""
    found, x = {}, bench.calibration(N_CALIB, 0)
    images = data.normalize(bench.test.images, bench.test.spec).numpy()
    for metric, how in IN_INTEGERS.items():
        qnet = quantize(bench.net, BitPolicy("minmax:8", "minmax:8", **how), x[:1])
        calibrate(qnet, x)
        record = integer.lower(qnet.eval(), requantizer="fixed", images=bench.test.spec)
        try:
            logits = export_c.Runtime(record).run(images)
        except export_c.CompilerError:  # NumPy gives the same integers, in five times the time
            logits = integer.run(record, images)
        right = torch.from_numpy(logits).argmax(1) == bench.test.labels
        found[metric] = 100 * right.double().mean().item()
    return found


def ranges_before_after(net: nn.Module) -> pd.DataFrame:
    """Largest |w| of every output channel: columns layer, channel, stage ("before" or "after"), max_abs."""
    stages = {"before": net, "after": fold_bn(net)}
    return pd.concat([per_channel_ranges(n).assign(stage=s) for s, n in stages.items()], ignore_index=True)


STUDY = Study("bn_fold", PLANS, points=points, open_bench=open_net, measure=measure)
STUDIES = (STUDY,)
