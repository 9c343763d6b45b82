"""BN folding measured: how exact is it, and what does it do to the weight ranges (notebook 02).

Networks with a shipped checkpoint are folded with their trained statistics and judged on test images; all others get
random, non-trivial statistics (ALGORITHMS: mean ~ N(0, 1), variance ~ U(0.5, 2), gamma ~ U(0.5, 1.5)) and are judged
on the error alone.
"""

import copy
import json
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from hq_lib import data, models
from hq_lib.graph.folding import fold_bn, per_channel_ranges
from hq_lib.results import figures, labels, paths, store, tables
from hq_lib.studies.bench import shipped
from hq_lib.studies.bn_fold.figures import summary
from hq_lib.training import predict

STUDY, RANGES = "bn_fold", "bn_ranges"
N_TEST = {"smoke": 200, "quick": None, "full": None}
TRAINED = ("resnet20", "toynet", "lenet")
UNTRAINED = (
    "resnet56", "vgg11", "vgg_small", "mobilenetv2", "mobilenetv2_seed", "resnet18", "resnet50", "resnet101",
    "mobilenetv2_imagenet", "regnetx_600m", "mnasnet2_0",
)  # fmt: skip
SMOKE = ("resnet20", "toynet")
BN = nn.modules.batchnorm._BatchNorm


def run(profile: str, *, trained: Sequence[str] = TRAINED, untrained: Sequence[str] = UNTRAINED) -> pd.DataFrame:
    """Folds every network and appends the errors (and accuracies) to ``bn_fold.csv``; returns its rows."""
    smoke = paths.check_profile(profile) == "smoke"
    for name in SMOKE if smoke else (*trained, *untrained):
        if shipped(name) is not None:
            _trained(name, profile)
        else:
            _untrained(name, profile)
    return store.read(STUDY, profile=profile)


def _untrained(name: str, profile: str) -> None:
    torch.manual_seed(0)
    net = models.build(name)
    randomize_statistics(net, torch.Generator().manual_seed(0))
    size = 64 if name in models.imagenet_names() else 32
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    _append(name, "-", errors(net, example), profile, {"statistics": "random", "input_px": size})
    print(f"{name}: folded", flush=True)


def _trained(name: str, profile: str) -> None:
    path = shipped(name)
    assert path is not None
    net, record = models.load_checkpoint(path)
    test = data.load_or_embedded(record["dataset"], "test", n=N_TEST[profile])
    if test.spec.in_shape != data.SPECS[record["dataset"]].in_shape:
        print(f"{name}: skipped, the embedded digits do not fit it")
        return
    values = errors(net, data.normalize(test.images[:32], test.spec))
    known = test.spec.name == record["dataset"]  # the embedded digits would give a meaningless accuracy
    values |= accuracies(net, test) if known else {}
    _append(name, test.spec.name, values, profile, {"statistics": "trained"}, n_test=len(test) if known else 0)
    _append_ranges(name, record["dataset"], ranges_before_after(net), profile)
    print(f"{name}: folded on {test.spec.name}", flush=True)


def randomize_statistics(net: nn.Module, generator: torch.Generator) -> None:
    """Gives every BN random statistics and affine parameters, so that an error in any term of the fold shows."""
    for module in net.modules():
        if isinstance(module, BN):
            draw = torch.rand(3, module.num_features, generator=generator)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + 1.5 * draw[0])
            with torch.no_grad():
                module.weight.copy_(0.5 + draw[1])
                module.bias.copy_(2 * draw[2] - 1)


def errors(net: nn.Module, example: Tensor) -> dict[str, float]:
    """Largest error of the folded network's logits on an example, relative to the largest logit.

    Returns ``rel_error_float64`` and ``rel_error_float32``, pure numbers.
    """
    out = {}
    for name, dtype in (("rel_error_float64", torch.float64), ("rel_error_float32", torch.float32)):
        original, x = copy.deepcopy(net).to(dtype).eval(), example.to(dtype)
        folded = fold_bn(original, x)
        with torch.no_grad():
            want, got = original(x), folded(x)
        out[name] = ((got - want).abs().max() / want.abs().max()).item()
    return out


def accuracies(net: nn.Module, test: data.ImageSet) -> dict[str, float]:
    """Accuracy before and after the fold (percent), and how many predictions changed."""
    net.eval()
    before = predict(net, test).argmax(1)
    after = predict(fold_bn(net, data.normalize(test.images[:4], test.spec)), test).argmax(1)
    return {
        "acc_pct": 100 * (before == test.labels).double().mean().item(),
        "folded_acc_pct": 100 * (after == test.labels).double().mean().item(),
        "n_flips": float((before != after).sum()),
    }


def ranges_before_after(net: nn.Module) -> pd.DataFrame:
    """Largest |w| of every output channel: columns layer, channel, stage ("before" or "after"), max_abs."""
    return pd.concat(
        [
            per_channel_ranges(net).assign(stage="before"),
            per_channel_ranges(fold_bn(net.eval(), check=False)).assign(stage="after"),
        ],
        ignore_index=True,
    )


UNITS = {"acc_pct": "%", "folded_acc_pct": "%", "n_flips": "count", "rel_error_float64": "1", "rel_error_float32": "1"}


def _append(
    name: str, dataset: str, values: dict[str, float], profile: str, switches: dict[str, object], n_test: int = 0
) -> None:
    common = {"experiment": STUDY, "model": name, "dataset": dataset, "method": "float", "switches": switches}
    rows = [
        {**common, "metric": metric, "value": value, "unit": UNITS[metric], "n_test": n_test}
        for metric, value in values.items()
    ]
    store.append(STUDY, rows, profile=profile)


def _append_ranges(name: str, dataset: str, ranges: pd.DataFrame, profile: str) -> None:
    rows = [
        {
            "experiment": RANGES, "model": name, "dataset": dataset, "method": "float", "metric": "max_abs_w",
            "value": row["max_abs"], "unit": "1",
            "switches": {key: row[key] for key in ("layer", "channel", "stage")},
        }
        for row in ranges.to_dict("records")
    ]  # fmt: skip
    store.append(RANGES, rows, profile=profile)


def table(profile: str) -> pd.DataFrame:
    """tab_bn_fold: per network the relative error in both number formats, and what happened to its predictions."""
    rows = store.read(STUDY, profile=profile)
    keys = ["model", "dataset", "n_test", "switches"]
    wide = rows.pivot_table(index=keys, columns="metric", values="value").reset_index()
    out = pd.DataFrame({"model": [labels.printed("model", m) for m in wide["model"]]})
    out["statistics"] = [json.loads(switches)["statistics"] for switches in wide["switches"]]
    out["images"] = wide["dataset"].replace("-", "noise")
    for metric in ("rel_error_float64", "rel_error_float32"):
        out[metric.replace("rel_", "relative ").replace("_", ", ")] = [f"{v:.1e}" for v in wide[metric]]
    for metric, title in (("acc_pct", "accuracy, %"), ("folded_acc_pct", "folded, %"), ("n_flips", "changed")):
        values = wide[metric] if metric in wide else pd.Series(float("nan"), index=wide.index)
        digits = 0 if metric == "n_flips" else 2
        out[title] = [tables.NOT_RUN if pd.isna(v) else f"{v:.{digits}f}" for v in values]
    out["test images"] = [f"{n:,}" if n else tables.NOT_RUN for n in wide["n_test"]]
    return out


def caption(profile: str) -> str:
    """What tab_bn_fold shows, with profile and images."""
    rows = store.read(STUDY, profile=profile)
    counted = f"up to {rows['n_test'].max():,} test images"
    data_sets = ", ".join(sorted(set(rows["dataset"]) - {"-"}))
    claim = "Folding batch norm changes logits by rounding only: largest error relative to the largest logit"
    return figures.caption(claim, profile=profile, n=counted, dataset=data_sets)


def ranges(profile: str, model: str) -> pd.DataFrame:
    """The channel ranges of one network, from its rows: columns layer, channel, stage, max_abs; layers in net order."""
    rows = store.read(RANGES, profile=profile)
    rows = rows.loc[rows["model"] == model]
    if rows.empty:
        raise ValueError(f"no channel ranges of {model!r}: choose one of {', '.join(TRAINED)} that ships a checkpoint")
    keys = pd.DataFrame([json.loads(switches) for switches in rows["switches"]], index=rows.index)
    found = keys.assign(max_abs=rows["value"])
    order = list(dict.fromkeys(per_channel_ranges(models.build(model))["layer"]))
    place = found["layer"].map(order.index)
    return found.assign(place=place).sort_values(["place", "stage", "channel"]).drop(columns="place")


def spread(found: pd.DataFrame) -> pd.DataFrame:
    """Largest over smallest (non-zero) channel range of each layer, before and after, and the ratio of the two."""
    table = summary(found)
    both = table["max"].div(table["min"]).unstack("stage").reindex(dict.fromkeys(found["layer"]))
    before, after = both["before"], both["after"]
    return pd.DataFrame({"before": before, "after": after, "ratio": after / before})


def findings(profile: str, model: str) -> list[str]:
    """The sentences that the rows of a profile support."""
    rows = store.read(STUDY, profile=profile)
    lines = []
    for number in ("float64", "float32"):
        worst = rows.loc[rows["metric"] == f"rel_error_{number}"].sort_values(by="value").to_dict("records")[-1]
        among = f"of {rows['model'].nunique()} networks"
        lines.append(f"{number}: the largest relative error {among} is {worst['value']:.1e} ({worst['model']})")
    for row in rows.loc[rows["metric"] == "n_flips"].to_dict("records"):
        lines.append(f"{row['model']}: {row['value']:.0f} of {row['n_test']:,} test predictions changed")
    ratio = spread(ranges(profile, model))["ratio"].dropna()
    lines.append(
        f"{model}: the spread of channel ranges grew in {(ratio > 1).sum()} of {len(ratio)} layers, "
        f"by a factor of {ratio.median():.1f} in the median and {ratio.max():.1f} at most ({ratio.idxmax()})"
    )
    return lines
