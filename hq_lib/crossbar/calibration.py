"""What is corrected on an array beside `EngineNetwork.calibrate`'s fits: drift, and batch-norm statistics; residuals.

Drift compensation scales readings back to what the same probe inputs gave at the reference time, once per layer read
and kept:

    factor = mean |reading at t0| / mean |reading now|        per column, or one per layer

Batch-norm statistics are estimated again on the device without paired measurements: AdaBS (Joshi et al. 2020).

A batch norm whose mean and variance are those of its own input gives every channel mean beta and standard deviation
|gamma|. Folded into its layer it is gone, but the same can be asked of the layer's accumulators u = scale (acc + bias):

    y = gain u + shift,    gain = |gamma| / sqrt(var_now(u) + eps'),    shift = beta - gain mean_now(u)

where "now" is measured through the arrays, layer after layer, each on what the layers before it then deliver. This is
one gain and one offset per column, as in any `Correction`; what differs is the aim: stored moments, not ideal outputs.
Re-estimation can cost accuracy even without any device error, where stored moments are not those of the images that are
measured: always print the line of an `IdealEngine` beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from hq_lib.crossbar.checks import CrossbarError, Numbers, as_tensor
from hq_lib.crossbar.engine import Correction, Engine
from hq_lib.crossbar.network import EngineNetwork
from hq_lib.crossbar.operands import Handle, exact_mvm
from hq_lib.graph.folding import fold_bn
from hq_lib.integer.execute import run
from hq_lib.integer.record import Layer, TensorSpec
from hq_lib.results.hints import check_known


def residuals(engine: Engine, samples: Mapping[Handle, Numbers]) -> pd.DataFrame:
    """One row per layer on held-out inputs (m, K): errors before and after its correction, in accumulator units (LSB).

    Columns: layer, kind, n_rows, rmse_raw_lsb, rmse_lsb, relative_error (rmse over the root mean square of the exact
    products), slope and r2 of measured against exact products.
    """
    lines = []
    for handle, x in samples.items():
        z = exact_mvm(handle, as_tensor(x))
        raw, correction = engine.measure(handle, x), engine.correction(handle)
        y = correction.apply(raw)
        error, centred = y - z, z - z.mean()
        power = float(centred.square().sum()) or float("nan")
        rmse = float(error.square().mean().sqrt())
        lines.append({
            "layer": handle.name, "kind": correction.kind, "n_rows": len(z),
            "rmse_raw_lsb": float((raw - z).square().mean().sqrt()), "rmse_lsb": rmse,
            "relative_error": rmse / float(z.square().mean().sqrt().clamp_min(1e-30)),
            "slope": float((centred * y).sum()) / power, "r2": 1 - float(error.square().sum()) / power,
        })  # fmt: skip
    return pd.DataFrame(lines)


_RANGE = (0.1, 100.0)  # a factor outside it means a dead column, not drift


@dataclass(frozen=True, eq=False)
class Reference:
    """What a layer read for its probe rows at the reference time."""

    probes: Tensor
    """(m, K) integer inputs."""
    size: Tensor
    """float64 (N,), mean |reading| per column, accumulator units."""
    t_s: float
    """Time of the engine at which it was read, seconds."""


def references(network: EngineNetwork, images: Numbers, *, n_rows: int = 256) -> dict[str, Reference]:
    """{matrix: what it reads now for sampled input rows}: take it just after programming, before `compensate`.

    Errors: rows that are all zero, which tell nothing of a matrix.
    """
    rows, found = [x for parts in network.samples(images, n_rows=n_rows).values() for x in parts], {}
    for (engine, group), probes in zip(network.groups(), rows, strict=True):
        if not bool((probes != 0).any()):
            raise CrossbarError(f"{group.name}: probe rows must exist and not all be zero")
        found[group.name] = Reference(probes, engine.measure(group, probes).abs().mean(0), engine.time_s)
    return found


def compensate(
    network: EngineNetwork, references: Mapping[str, Reference], *, per: str = "column"
) -> dict[str, Tensor]:
    """{matrix: float64 (N,) factors now in force}: every reading is scaled back to its reference.

    Args:
        per: "column" (one factor per output) or "layer" (one for all). Dead columns keep the factor 1.

    Errors: a fit in force that is newer than its reference: it has taken that drift out already.
    """
    check_known(per, ("column", "layer"), "per", error=CrossbarError)
    found = {}
    for engine, group in network.groups():
        fit, then_s = engine.correction(group), references[group.name].t_s
        if fit.kind != "identity" and fit.t_s > then_s:
            raise CrossbarError(
                f"{group.name}: fitted at {fit.t_s:g} s, its reference is of {then_s:g} s: drift would be corrected "
                "twice; take references again after the fit, or network.reset() first"
            )
        then, now = references[group.name].size, engine.measure(group, references[group.name].probes).abs().mean(0)
        ratio = then.sum() / now.sum().clamp_min(1e-30) if per == "layer" else then / now.clamp_min(1e-30)
        factor = torch.where((then > 0) & (now > 0), ratio.clamp(*_RANGE), 1.0)
        engine.set_correction(group, replace(engine.correction(group), drift=factor))
        found[group.name] = factor
    return found


_AFTER = ("conv_bn", "linear_bn")


@dataclass(frozen=True, eq=False)
class Moments:
    """What a batch norm wants of the layer that took it in, per channel."""

    mean: Tensor
    """float64 (N,), real units: beta."""
    std: Tensor
    """float64 (N,), real units, >= 0: |gamma| sqrt(var / (var + eps))."""


def norm_moments(net: nn.Module) -> dict[str, Moments]:
    """{layer: moments that its batch norm gives it}, of the float network ``net`` before its batch norms were folded.

    Errors: no batch norm follows a convolution or linear layer.
    """
    found: dict[str, Moments] = {}
    for fold in fold_bn(net, on_refusal="keep").meta["folds"]:
        bn = dict(net.named_modules()).get(fold.bn)
        if fold.kind in _AFTER and isinstance(bn, nn.modules.batchnorm._BatchNorm):
            assert bn.running_var is not None  # it was folded
            var = bn.running_var.detach().to(torch.float64)
            gamma = torch.ones_like(var) if bn.weight is None else bn.weight.detach().to(torch.float64)
            beta = torch.zeros_like(var) if bn.bias is None else bn.bias.detach().to(torch.float64)
            found[fold.layer] = Moments(beta, gamma.abs() * (var / (var + bn.eps)).sqrt())
    if not found:
        raise CrossbarError("the network has no batch norm after a layer: there are no statistics to re-estimate")
    return found


def reestimate_norms(network: EngineNetwork, images: Numbers, moments: Mapping[str, Moments]) -> dict[str, Correction]:
    """{matrix: correction now in force}: every layer of ``moments`` has its batch norm's moments on ``images`` again.

    Args:
        network: on engines; corrections in force are replaced. Layers without moments (the classifier) keep theirs.
        images: (N, C, H, W) normalised float32 training images, N of some hundreds; all go through at once.
        moments: from `norm_moments`.

    Errors: a layer of ``moments`` that is not on an engine is passed over; none at all is an error.
    """
    layers = [name for name in moments if name in network.layers]
    if not layers:
        raise CrossbarError(f"no layer on an engine has a batch norm: {list(network.layers)} against {list(moments)}")

    def fit(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
        if op.name in layers:
            _fit_layer(network, op, x, moments[op.name])
        return network.products(op, x, spec)

    run(network.model, as_tensor(images), batch_size=len(images), products=fit)
    return {g.name: network.layers[name].engine.correction(g) for name in layers for g in network.layers[name].groups}


def _fit_layer(network: EngineNetwork, op: Layer, x: np.ndarray, aim: Moments) -> None:
    """Nothing; puts the corrections of one layer in force; a channel without any variance keeps its gain.

    The moments wanted are those of an engine's own answers, in its accumulator steps: answers are sum w q, without the
    bias and before the zero point's share is taken off.
    """
    layer = network.layers[op.name]
    step = torch.from_numpy(op.acc_scale.astype(np.float64)) * op.weight_step
    bias = torch.from_numpy(op.bias.astype(np.float64)) / op.weight_step
    mean, std = aim.mean / step - bias + layer.x_zero_point * layer.weight_sum, aim.std / step
    raws, moments = layer.measure(network.integers(op, x)), (m.chunk(len(layer.groups)) for m in (mean, std))
    for group, raw, wanted, spread in zip(layer.groups, raws, *moments, strict=True):
        now = raw.std(0, correction=0)
        gain = torch.where(now > 0, spread / now.clamp_min(1e-30), 1.0)
        fitted = Correction(gain, wanted - gain * raw.mean(0), torch.ones_like(gain), "norms", len(raw),
                            t_s=layer.engine.time_s)  # fmt: skip
        layer.engine.set_correction(group, fitted)
