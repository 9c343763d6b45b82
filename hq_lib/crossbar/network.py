"""Integer networks on engines: an `IntegerModel` of which some or all layers are multiplied by analog arrays.

    engine = SimEngine(Circuit(device("rram")))
    network = EngineNetwork(imodel, engine)                          every layer on this engine
    network = EngineNetwork(imodel, {"conv1": a, "layer1.*": b})     these layers on these engines, the rest exact
    network.calibrate(images)                                        converter ranges, then gain and offset per column
    logits = network.run(images)                                     as ``integer.run``, with the engines' products
    network.evaluate(image_set).acc_pct

Only sums of products are the engine's: biases, requantization, additions and pooling stay digital and exact, so that
with `IdealEngine` every integer equals the NumPy executor's. Accumulators saturate at int32 as digital ones would.

`reestimate_norms` is AdaBS (Joshi et al. 2020): batch-norm statistics estimated again on the device, without paired
measurements.

A batch norm whose mean and variance are those of its own input gives every channel mean beta and standard deviation
|gamma|. Folded into its layer it is gone, but the same can be asked of the layer's accumulators u = scale (acc + bias):

    y = gain u + shift,    gain = |gamma| / sqrt(var_now(u) + eps'),    shift = beta - gain mean_now(u)

where "now" is measured through the arrays, layer after layer, each on what the layers before it then deliver. This is
one gain and one offset per column, as in any `Correction`; what differs is the aim: stored moments, not ideal outputs.
Re-estimation can cost accuracy even without any device error, where stored moments are not those of the images that are
measured: always print the line of an `IdealEngine` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_lib.crossbar.calibration import (
    Reference,
    compensate_drift,
    fit_range,
    load_calibration,
    save_calibration,
    take_reference,
)
from hq_lib.crossbar.checks import CrossbarError, check_choice
from hq_lib.crossbar.convolution import ConvEngine, ConvHandle
from hq_lib.crossbar.engine import Correction, Engine, Handle, exact_mvm
from hq_lib.crossbar.native import stream
from hq_lib.crossbar.recording import simulated
from hq_lib.crossbar.simulator import SimEngine
from hq_lib.data import ImageSet, normalize
from hq_lib.graph.folding import fold_bn
from hq_lib.integer.check import need_model
from hq_lib.integer.execute import Products, run
from hq_lib.integer.record import ACC_MAX, Conv, IntegerModel, Layer, TensorSpec
from hq_lib.integer.sums import products as exact_products
from hq_lib.training.evaluation import Evaluation, evaluation_of

Samples = dict[str, list[Tensor]]
"""{layer: one (m, K) tensor of sampled input rows per group}"""


class EngineNetwork:
    """An integer network whose layers multiply on engines.

    Args:
        model: from ``lower`` or ``integer.load``.
        engines: one engine for all convolutions and linear layers, or {layer name or pattern with *: engine}. The first
            pattern that fits a layer decides; layers that none fits are multiplied exactly in NumPy. Weights are
            loaded (programmed) here, under the layers' names; engines stay the caller's to close.

    Errors: a pattern that fits no layer (with the nearest names), a layer whose bits an engine refuses.
    """

    def __init__(self, model: IntegerModel, engines: Engine | Mapping[str, Engine]) -> None:
        need_model(model)
        self.model = model
        chosen = _choose([op.name for op in model.layers()], {"*": engines} if isinstance(engines, Engine) else engines)
        self.layers: dict[str, Engine] = chosen
        self.handles: dict[str, ConvHandle] = {}
        for op in model.layers():
            if op.name in chosen:
                self.handles[op.name] = load_layer(chosen[op.name], op, model.tensors[op.inputs[0]])

    @property
    def engines(self) -> list[Engine]:
        """The engines in use, each once, in the order of their first layer."""
        return list({id(engine): engine for engine in self.layers.values()}.values())

    def groups(self) -> Iterator[tuple[Engine, Handle]]:
        """Every loaded matrix with its engine, in the order of execution; a grouped convolution has several."""
        for name, handle in self.handles.items():
            for group in handle.groups:
                yield self.layers[name], group

    def run(self, images: np.ndarray | Tensor, *, batch_size: int = 50) -> np.ndarray:
        """float32 (N, n_classes): the logits of normalised float32 ``images`` (N, C, H, W), as ``integer.run``."""
        return run(self.model, images, batch_size=batch_size, products=self.products)

    def evaluate(self, images: ImageSet, *, batch_size: int = 50) -> Evaluation:
        """Accuracy (percent) and mean cross entropy (nats) of the network on ``images``."""
        logits = self.run(normalize(images.images, images.spec), batch_size=batch_size)
        return evaluation_of(torch.from_numpy(logits), images.labels)

    def set_time(self, t_s: float) -> None:
        """Nothing; simulated cells that time changes are read ``t_s`` seconds after programming from now on.

        Errors: no layer is on such cells.
        """
        found = self._simulators()
        for engine in [engine for engine in found if engine.circuit.device.ages] or found[:1]:
            engine.set_time(t_s)

    def set_temperature(self, celsius: float) -> None:
        """Nothing; all simulated cells are read at ``celsius`` from now on.

        Errors: no layer is on such cells, a device without a temperature coefficient.
        """
        for engine in self._simulators():
            engine.set_temperature(celsius)

    def _simulators(self) -> list[SimEngine]:
        """The simulators in use, behind recorders too, each once; none is an error."""
        found = [pair[0] for pair in (simulated(engine, group) for engine, group in self.groups()) if pair]
        if not found:
            raise CrossbarError("no layer is on simulated cells: there is no time or temperature to set")
        return list({id(engine): engine for engine in found}.values())

    def describe(self) -> dict[str, Any]:
        """Flat dictionary for result rows: which layers, and every setting of their engines."""
        found: dict[str, Any] = {"layers_on_engine": f"{len(self.layers)} of {len(self.model.layers())}"}
        for i, engine in enumerate(self.engines):
            prefix = "" if len(self.engines) == 1 else f"engine{i}."
            found |= {f"{prefix}{key}": value for key, value in engine.describe().items()}
        return found

    # -- calibration ---------------------------------------------------------------------------------------------------

    def samples(self, images: np.ndarray | Tensor, *, n_rows: int = 4096) -> Samples:
        """Up to ``n_rows`` input rows of each layer on an engine, drawn from the exact network's run on ``images``."""
        found: Samples = {}

        def look(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
            if op.name in self.handles:
                found[op.name] = self._rows(op, x, n_rows)
            return exact_products(op, x, spec)

        self._run_at_once(images, look)
        return found

    def calibrate(
        self,
        images: np.ndarray | Tensor,
        *,
        kind: str | None = "column",
        loop: str = "closed",
        repeats: int = 1,
        n_rows: int = 4096,
    ) -> dict[str, Correction]:
        """{matrix: correction now in force}, layer after layer in one run; converter ranges are fitted first.

        Args:
            images: (N, C, H, W) normalised float32, N of about 64; all go through the network at once.
            kind: "zero", "gain", "column_gain" or "column" (gain and offset), see `Engine.calibrate`; None: only the
                converters' ranges, where they are of the "calibrated" kind.
            loop: inputs that a layer is fitted on. "open": the exact network's. "closed": those that the calibrated
                layers before it deliver, against the exact network's accumulators: it also takes out what they left.
            repeats: measurements of each row; two or more remove read noise from the slopes.
            n_rows: rows of inputs per layer, drawn at random.
        """
        check_choice(loop, ("open", "closed"), "loop")
        ideal = self.samples(images, n_rows=n_rows)

        def fit(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
            if op.name in self.handles:
                rows = self._rows(op, x, n_rows) if loop == "closed" else ideal[op.name]
                for group, given, exact in zip(self.handles[op.name].groups, rows, ideal[op.name], strict=True):
                    fit_range(self.layers[op.name], group, given)
                    if kind is not None:
                        wanted = exact_mvm(group, exact)
                        self.layers[op.name].calibrate(group, given, wanted, kind=kind, repeats=repeats)
            return self.products(op, x, spec) if loop == "closed" else exact_products(op, x, spec)

        self._run_at_once(images, fit)
        return {group.name: engine.correction(group) for engine, group in self.groups()}

    def references(self, images: np.ndarray | Tensor, *, n_rows: int = 256) -> dict[str, Reference]:
        """{matrix: what it reads now for sampled input rows}: take it just after programming, before `compensate`."""
        rows = [x for parts in self.samples(images, n_rows=n_rows).values() for x in parts]
        pairs = zip(self.groups(), rows, strict=True)
        return {group.name: take_reference(engine, group, x) for (engine, group), x in pairs}

    def compensate(self, references: Mapping[str, Reference], *, per: str = "column") -> None:
        """Nothing; scales every reading back to its reference, one factor per "column" or per "layer"."""
        for engine, group in self.groups():
            compensate_drift(engine, group, references[group.name], per=per)

    def reset(self) -> None:
        """Nothing; all corrections are the identity again (converter ranges stay)."""
        for engine, group in self.groups():
            engine.set_correction(group, None)

    def save(self, folder: str | Path) -> None:
        """Nothing; writes the calibration of every engine into ``folder`` (``engine_0.safetensors``, ...).

        With `load` on a network made the same way, work goes on where it stopped without calibrating again.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for i, engine in enumerate(self.engines):
            save_calibration(Path(folder) / f"engine_{i}.safetensors", engine)

    def load(self, folder: str | Path) -> list[str]:
        """Names of the matrices whose calibration, written by `save`, is in force now; another network's is refused."""
        found = []
        for i, engine in enumerate(self.engines):
            path = Path(folder) / f"engine_{i}.safetensors"
            if not path.exists():
                raise CrossbarError(f"{path} is missing: save() a calibration of this network there first")
            found += load_calibration(path, engine)
        return found

    # -- products ------------------------------------------------------------------------------------------------------

    def products(self, op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """float64 (B, *output shape): the layer's sums of products by its engine, exact ones where it has none.

        What ``integer.run(..., products=network.products)`` takes, for callers that want to watch the run.
        """
        if op.name not in self.handles:
            return exact_products(op, x, spec)
        handle = self.handles[op.name]
        y = ConvEngine(self.layers[op.name]).conv(handle, _integers(op, x, handle))
        if op.weight_step != 1:
            y *= op.weight_step
        room = ACC_MAX - int(np.abs(op.bias.astype(np.int64)).max(initial=0))
        y.clip(-room, room, out=y)
        return y if x.ndim != 3 or isinstance(op, Conv) else y.reshape(*x.shape[:2], -1)

    def measure(self, op: Layer, x: np.ndarray) -> list[Tensor]:
        """Per group float64 (rows, N): what the layer's engine reads for inputs ``x``, before its correction."""
        handle = self.handles[op.name]
        return ConvEngine(self.layers[op.name]).measure(handle, _integers(op, x, handle))

    def _rows(self, op: Layer, x: np.ndarray, n_rows: int) -> list[Tensor]:
        """Per group up to ``n_rows`` of the layer's input rows, at the same places in every run."""
        handle = self.handles[op.name]
        groups = ConvEngine(self.layers[op.name]).rows(handle, _integers(op, x, handle))
        order = torch.randperm(len(groups[0]), generator=stream(0, op.name, "calibration rows"))
        return [rows[order[:n_rows]] for rows in groups]

    def _run_at_once(self, images: np.ndarray | Tensor, engine: Products) -> None:
        run(self.model, images, batch_size=len(images), products=engine)


def load_layer(engine: Engine, op: Layer, spec: TensorSpec) -> ConvHandle:
    """The handle of layer ``op`` with inputs on the grid of ``spec``, loaded into ``engine``.

    Weights are loaded in steps of their trained grid (``op.weight_step`` apart). Declared bits are those of the grids,
    and more only where a method's grid (DoReFa's without zero, a zero point off the grid) needs them.
    """
    w = op.weight.astype(np.int32) // op.weight_step
    low, high = _input_range(op, spec)
    x_bits = max(int(high).bit_length() + (low < 0), int(-low - 1).bit_length() + 1 if low < 0 else 1)
    fields: dict[str, Any] = {}
    if isinstance(op, Conv):
        fields = {"stride": op.stride, "padding": op.padding, "dilation": op.dilation, "groups": op.groups}
    return ConvEngine(engine).load(
        w,
        op.weight_scale.astype(np.float64) * op.weight_step,
        op.name,
        x_zero_point=spec.zero_point,
        w_bits=max(op.weight_bits, _signed_bits(w)),
        x_bits=x_bits if low < 0 else max(x_bits, spec.bits),
        x_signed=low < 0,
        **fields,
    )


def _input_range(op: Layer, spec: TensorSpec) -> tuple[int, int]:
    """(smallest, largest) integer that the engine can be given: the tensor's, and the zero point where it pads."""
    ends = [0, spec.qmin, spec.qmax]
    if isinstance(op, Conv) and any(op.padding):
        ends.append(spec.zero_point)
    return min(ends), max(ends)


def _signed_bits(w: np.ndarray) -> int:
    """Least b with all weights in -2^(b-1)..2^(b-1)-1, or 1 for weights in -1..1."""
    low, high = int(w.min(initial=0)), int(w.max(initial=0))
    if low >= -1 and high <= 1:
        return 1
    return 1 + max(high.bit_length(), (-low - 1).bit_length() if low else 0)


def _integers(op: Layer, x: np.ndarray, handle: ConvHandle) -> np.ndarray:
    """``x`` as the engine wants it: rows of a linear layer in two axes, a signed type where padding is negative."""
    x = x.astype(np.int32) if handle.groups[0].x_signed else x
    return x if isinstance(op, Conv) else x.reshape(-1, x.shape[-1])


def _choose(names: list[str], engines: Mapping[str, Engine]) -> dict[str, Engine]:
    """{layer: engine} in the order of ``names``, by the first pattern that fits."""
    for pattern in engines:
        if not any(fnmatchcase(name, pattern) for name in names):
            check_choice(pattern, names, "the network's layer or pattern")
    fits = {name: [e for pattern, e in engines.items() if fnmatchcase(name, pattern)] for name in names}
    return {name: found[0] for name, found in fits.items() if found}


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
            found[fold.layer] = _moments(bn)
    if not found:
        raise CrossbarError("the network has no batch norm after a layer: there are no statistics to re-estimate")
    return found


def reestimate_norms(
    network: EngineNetwork, images: np.ndarray | Tensor, moments: Mapping[str, Moments]
) -> dict[str, Correction]:
    """{matrix: correction now in force}: every layer of ``moments`` has its batch norm's moments on ``images`` again.

    Args:
        network: on engines; corrections in force are replaced. Layers without moments (the classifier) keep theirs.
        images: (N, C, H, W) normalised float32 training images, N of some hundreds; all go through at once.
        moments: from `norm_moments`.

    Errors: a layer of ``moments`` that is not on an engine is passed over; none at all is an error.
    """
    layers = [name for name in moments if name in network.handles]
    if not layers:
        raise CrossbarError(f"no layer on an engine has a batch norm: {list(network.handles)} against {list(moments)}")
    made: dict[str, Correction] = {}

    def fit(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
        if op.name in layers:
            made.update(_fit_layer(network, op, x, moments[op.name]))
        return network.products(op, x, spec)

    run(network.model, images, batch_size=len(images), products=fit)
    return made


def _moments(bn: nn.modules.batchnorm._BatchNorm) -> Moments:
    assert bn.running_var is not None  # it was folded
    var = bn.running_var.detach().to(torch.float64)
    one = torch.ones_like(var)
    gamma = one if bn.weight is None else bn.weight.detach().to(torch.float64)
    beta = 0 * one if bn.bias is None else bn.bias.detach().to(torch.float64)
    return Moments(beta, gamma.abs() * (var / (var + bn.eps)).sqrt())


def _fit_layer(network: EngineNetwork, op: Layer, x: np.ndarray, aim: Moments) -> dict[str, Correction]:
    """{matrix: correction} of one layer, in force; a channel without any variance keeps its gain."""
    handle, made, first = network.handles[op.name], {}, 0
    for group, raw in zip(handle.groups, network.measure(op, x), strict=True):
        columns = slice(first, first + raw.shape[1])
        mean, std = _in_steps(op, handle, aim, columns)
        now = raw.std(0, correction=0)
        gain = torch.where(now > 0, std / now.clamp_min(1e-30), 1.0)
        offset = mean - gain * raw.mean(0)
        fitted = Correction(gain, offset, torch.ones_like(gain), "norms", len(raw))
        network.layers[op.name].set_correction(group, fitted)
        made[group.name], first = fitted, columns.stop
    return made


def _in_steps(op: Layer, handle: ConvHandle, aim: Moments, columns: slice) -> tuple[Tensor, Tensor]:
    """(mean, std), float64 (n,): the moments wanted of an engine's own answers, in its accumulator steps.

    Answers are sum w q, without the bias and before the zero point's share is taken off.
    """
    step = torch.from_numpy(op.acc_scale.astype(np.float64)) * op.weight_step
    bias = torch.from_numpy(op.bias.astype(np.float64)) / op.weight_step
    mean = aim.mean / step - bias + handle.x_zero_point * handle.weight_sum
    return mean[columns], (aim.std / step)[columns]
