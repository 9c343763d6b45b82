"""ACIQ's predicted against measured quantization error, layer by layer, on a trained network (notebook 04).

    python -m hq_lib.studies.ptq.aciq_mse --profile full

Each tensor is clipped at ACIQ's alpha and put on the grid that the network really uses. Errors are relative to the mean
square of the tensor, so that layers can share an axis. Two predictions: the paper's noise model, and the exact integral
over the same prior on the real grid, weighted with the share of values that the prior speaks of.
"""

import argparse
import json
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from hq_lib.graph import act_quantizers, calibrate, quantize, weight_layers
from hq_lib.quantizers import aciq, fake_quantize
from hq_lib.quantizers.observers import range_qparams
from hq_lib.results import paths, store
from hq_lib.studies.ptq.recipes import calibration
from hq_lib.studies.ptq.study import PLAN, SHIPPED, open_net
from hq_lib.studies.selection import bench as selection_bench

STUDY = "aciq_mse"
BITS = {"smoke": (2, 4), "quick": (2, 3, 4, 8), "full": (2, 3, 4, 8)}
METRICS = ("mse_measured", "mse_model", "mse_exact")
N_IMAGES = 256


def run(profile: str, *, net: str = SHIPPED, seed: int = 1005) -> pd.DataFrame:
    """Errors of every activation (after its ReLU) and every weight of the net at each width; the study's rows.

    Args:
        profile: chooses images and widths.
        net:     "shipped", or "public" where it is present.
        seed:    draws the calibration images.
    """
    bench = open_net(net, paths.check_profile(profile), n_test=1)
    x = calibration(bench, min(N_IMAGES, PLAN[profile]["n_calib"]), seed)
    tensors = {("activation", name): value for name, value in activations(bench.net, x).items()}
    tensors |= {("weight", name): value for name, value in weights(bench.net, x).items()}
    common = {"experiment": STUDY, "model": bench.model, "dataset": bench.dataset, "method": "aciq", "seed": seed,
              "n_calib": len(x)}  # fmt: skip
    for (kind, name), values in tensors.items():
        rows = []
        for bits in BITS[profile]:
            found = errors(values, bits=bits, relu=kind == "activation")
            width = {"a_bits" if kind == "activation" else "w_bits": bits}
            switches = {"net": net, "tensor": kind, "layer": name, "prior": found.pop("prior")}
            rows += [
                {**common, **width, "switches": switches, "metric": metric, "value": found[metric], "unit": "1"}
                for metric in METRICS
            ]
        store.append(STUDY, rows, profile=profile)
    return store.read(STUDY, profile=profile)


def activations(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The values that each activation quantizer of the float net would see on ``x``, flat, unsigned ones only."""
    qnet = quantize(net, selection_bench.policy(4, 4), x[:1])
    seen: dict[int, Tensor] = {}
    calibrate(qnet, x, quantized_weights=False, fit=lambda quantizer, values: seen.update({id(quantizer): values}))
    named = {name.removesuffix("_act_quantizer"): quantizer for name, quantizer in act_quantizers(qnet).items()}
    return {name: seen[id(q)] for name, q in named.items() if id(q) in seen and not bool(q.signed)}


def weights(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The weights of every layer, batch norms folded."""
    qnet = quantize(net, selection_bench.policy(4, 4), x[:1])
    return {name: layer.weight.detach() for name, layer in weight_layers(qnet).items()}


def errors(values: Tensor, *, bits: int, relu: bool) -> dict[str, Any]:
    """Relative squared errors of ``values`` on one grid clipped by ACIQ: measured, and as both predictions say.

    Args:
        values: real units; with ``relu`` non-negative, the positive ones taken for the upper half of a zero-mean
                variable.
        bits:   of the grid, per tensor, end-point levels with an exact 0.

    Returns:
        ``METRICS``, pure numbers, and ``prior``, the likelier of "laplace" and "gauss".
    """
    spread = aciq.fit(values, positive_half=relu)
    prior: aciq.Prior = "laplace" if bool(spread.is_laplace) else "gauss"
    width = float(spread.b if prior == "laplace" else spread.sigma)
    clip = aciq.clip_range(values, bits=bits, prior=prior, relu="theory" if relu else None)
    alpha = float(clip.high if relu else (clip.high - clip.low) / 2)
    grid = range_qparams(clip, bits=bits)
    x_hat = fake_quantize(values, grid.scale, grid.zero_point, qmin=grid.qmin, qmax=grid.qmax)
    power = float(values.double().square().mean())
    half = 2 * float((values > 0).double().mean()) if relu else 1.0
    exact = aciq.predicted_mse(alpha, width, bits=bits, prior=prior, relu=relu,
                               grid="relu_endpoint" if relu else "endpoint")  # fmt: skip
    return {
        "mse_measured": float((x_hat - values).double().square().mean()) / power,
        "mse_model": aciq.predicted_mse(alpha, width, bits=bits, prior=prior, relu=relu) / power,
        "mse_exact": half * exact / power,
        "prior": prior,
    }


def table(profile: str) -> pd.DataFrame:
    """The rows side by side: net, tensor, layer, prior, bits, and a column for each of ``METRICS``."""
    rows = store.read(STUDY, profile=profile)
    rows = rows.loc[rows["profile"] == profile]
    keys = pd.DataFrame([json.loads(switches) for switches in rows["switches"]], index=rows.index)
    bits = rows["a_bits"].where(keys["tensor"] == "activation", rows["w_bits"]).astype(int)
    wide = keys.assign(bits=bits, dataset=rows["dataset"], metric=rows["metric"], value=rows["value"])
    index = ["dataset", "net", "tensor", "layer", "prior", "bits"]
    return wide.pivot_table(index=index, columns="metric", values="value").reset_index().rename_axis(columns=None)


def ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Measured over predicted error by tensor and bits: median, smallest, largest, of both predictions."""
    parts = {
        name: (found["mse_measured"] / found[metric]).groupby([found["tensor"], found["bits"]])
        for name, metric in (("model", "mse_model"), ("exact", "mse_exact"))
    }
    columns = {
        f"{name} {part}": getattr(group, part)() for name, group in parts.items() for part in ("median", "min", "max")
    }
    return pd.DataFrame(columns).reset_index()


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.ptq.aciq_mse", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--net", default=SHIPPED, choices=("public", SHIPPED))
    options = parser.parse_args(arguments)
    run(options.profile, net=options.net)
    print(ratios(table(options.profile)).to_string(index=False))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
