"""Integer networks on engines: an `IntegerModel` of which some or all layers are multiplied by analog arrays.

    engine = SimEngine(Circuit(device("rram")))
    network = EngineNetwork(imodel, engine)                          every layer on this engine
    network = EngineNetwork(imodel, {"conv1": a, "layer1.*": b})     these layers on these engines, the rest exact
    network.calibrate(images)                                        converter ranges, then gain and offset per column
    logits = network.run(images)                                     as ``integer.run``, with the engines' products
    network.evaluate(image_set).acc_pct

Only sums of products are the engine's: biases, requantization, additions and pooling stay digital and exact, so that
with `IdealEngine` every integer equals the NumPy executor's. Accumulators saturate at int32 as digital ones would.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from hq_lib.crossbar.checks import CrossbarError, Numbers, as_tensor
from hq_lib.crossbar.convolution import Convolution
from hq_lib.crossbar.engine import Correction, Engine, need_rows
from hq_lib.crossbar.native import stream
from hq_lib.crossbar.operands import Handle, exact_mvm
from hq_lib.crossbar.recording import simulated
from hq_lib.data import ImageSet, batches
from hq_lib.integer.arithmetic import products as exact_products
from hq_lib.integer.check import need_model
from hq_lib.integer.execute import run
from hq_lib.integer.record import ACC_MAX, Conv, IntegerModel, Layer, TensorSpec
from hq_lib.results.hints import check_known
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

    Errors: a pattern that fits no layer, a fault map of none that is loaded (with the nearest names), a layer whose
    bits an engine refuses.
    """

    def __init__(self, model: IntegerModel, engines: Engine | Mapping[str, Engine]) -> None:
        need_model(model)
        self.model = model
        chosen = _choose([op.name for op in model.layers()], {"*": engines} if isinstance(engines, Engine) else engines)
        self.layers = {
            op.name: _loaded(chosen[op.name], op, model.tensors[op.inputs[0]])
            for op in model.layers()
            if op.name in chosen
        }
        for engine in self.engines:
            arrays = simulated(engine)
            for name in arrays.circuit.faults.maps if arrays else ():
                check_known(name, engine.handles, "layer of a fault map", error=CrossbarError)

    @property
    def engines(self) -> list[Engine]:
        """The engines in use, each once, in the order of their first layer."""
        return list({id(layer.engine): layer.engine for layer in self.layers.values()}.values())

    def groups(self) -> list[tuple[Engine, Handle]]:
        """Every loaded matrix with its engine, in the order of execution; a grouped convolution has several."""
        return [(layer.engine, group) for layer in self.layers.values() for group in layer.groups]

    def run(self, images: Numbers, *, batch_size: int = 50) -> np.ndarray:
        """float32 (N, n_classes): the logits of normalised float32 ``images`` (N, C, H, W), as ``integer.run``."""
        return run(self.model, as_tensor(images), batch_size=batch_size, products=self.products)

    def evaluate(self, images: ImageSet, *, batch_size: int = 50) -> Evaluation:
        """Accuracy (percent) and mean cross entropy (nats) of the network on ``images``."""
        logits = [self.run(x, batch_size=batch_size) for x, _ in batches(images, batch_size)]
        return evaluation_of(torch.from_numpy(np.concatenate(logits)), images.labels)

    def set_time(self, t_s: float) -> None:
        """Nothing; simulated cells that time changes are read ``t_s`` seconds after programming from now on.

        Errors: no layer is on such cells.
        """
        found = [inner for inner in map(simulated, self.engines) if inner is not None]
        if not found:
            raise CrossbarError("no layer is on simulated cells: there is no time to set")
        for engine in [engine for engine in found if engine.circuit.device.ages] or found[:1]:
            engine.set_time(t_s)

    # -- calibration ---------------------------------------------------------------------------------------------------

    def samples(self, images: Numbers, *, n_rows: int = 4096) -> Samples:
        """Up to ``n_rows`` input rows of each layer on an engine, drawn from the exact network's run on ``images``."""
        found: Samples = {}

        def look(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
            if op.name in self.layers:
                found[op.name] = self._rows(op, x, n_rows)
            return exact_products(op, x, spec)

        run(self.model, as_tensor(images), batch_size=len(images), products=look)
        return found

    def calibrate(
        self,
        images: Numbers,
        *,
        kind: str | None = "column",
        loop: str = "closed",
        repeats: int = 1,
        n_rows: int = 4096,
    ) -> dict[str, Correction]:
        """{matrix: correction now in force}, layer after layer in one run; converter ranges are fitted first.

        Args:
            images: (N, C, H, W) normalised float32, N of about 64; all go through the network at once.
            kind: "gain" or "column" (gain and offset), see `Engine.calibrate`; None: only the
                converters' ranges, where they are of the "calibrated" kind.
            loop: inputs that a layer is fitted on. "open": the exact network's. "closed": those that the calibrated
                layers before it deliver, against the exact network's accumulators: it also takes out what they left.
            repeats: measurements of each row; two or more remove read noise from the slopes.
            n_rows: rows of inputs per layer, drawn at random.
        """
        check_known(loop, ("open", "closed"), "loop", error=CrossbarError)
        ideal = self.samples(images, n_rows=n_rows)
        for name, rows in ideal.items():  # before anything is measured
            need_rows(name, len(rows[0]), kind)

        def fit(op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
            if op.name in self.layers:
                rows = self._rows(op, x, n_rows) if loop == "closed" else ideal[op.name]
                groups, engine = self.layers[op.name].groups, self.layers[op.name].engine
                arrays = simulated(engine)
                for group, given, exact in zip(groups, rows, ideal[op.name], strict=True):
                    if arrays and arrays.circuit.adc and arrays.circuit.adc.range == "calibrated":
                        arrays.calibrate_adc(group, given)
                    if kind is not None:
                        engine.calibrate(group, given, exact_mvm(group, exact), kind=kind, repeats=repeats)
            return self.products(op, x, spec) if loop == "closed" else exact_products(op, x, spec)

        run(self.model, as_tensor(images), batch_size=len(images), products=fit)
        return {group.name: engine.correction(group) for engine, group in self.groups()}

    def reset(self) -> None:
        """Nothing; all corrections are the identity again (converter ranges stay)."""
        for engine, group in self.groups():
            engine.set_correction(group, Correction.identity(group.w_int.shape[1]))

    # -- products ------------------------------------------------------------------------------------------------------

    def products(self, op: Layer, x: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """float64 (B, *output shape): the layer's sums of products by its engine, exact ones where it has none.

        What ``integer.run(..., products=network.products)`` takes, for callers that want to watch the run.
        """
        if op.name not in self.layers:
            return exact_products(op, x, spec)
        y = self.layers[op.name](self.integers(op, x))
        if op.weight_step != 1:
            y *= op.weight_step
        room = ACC_MAX - int(np.abs(op.bias.astype(np.int64)).max(initial=0))
        y.clip(-room, room, out=y)
        return y if x.ndim != 3 or isinstance(op, Conv) else y.reshape(*x.shape[:2], -1)

    def integers(self, op: Layer, x: np.ndarray) -> np.ndarray:
        """``x`` as the layer takes it: rows of a linear layer in two axes, a signed type where padding is negative."""
        x = x.astype(np.int32) if self.layers[op.name].groups[0].x_signed else x
        return x if isinstance(op, Conv) else x.reshape(-1, x.shape[-1])

    def _rows(self, op: Layer, x: np.ndarray, n_rows: int) -> list[Tensor]:
        """Per group up to ``n_rows`` of the layer's input rows, at the same places in every run."""
        groups = self.layers[op.name].rows(self.integers(op, x))
        order = torch.randperm(len(groups[0]), generator=stream(0, op.name, "calibration rows"))
        return [rows[order[:n_rows]] for rows in groups]


def _loaded(engine: Engine, op: Layer, spec: TensorSpec) -> Convolution:
    """Layer ``op`` with inputs on the grid of ``spec``, on ``engine``.

    Weights are loaded in steps of their trained grid (``op.weight_step`` apart). Declared bits are those of the grids,
    and more only where a method's grid (DoReFa's without zero, a zero point off the grid) needs them.
    """
    w = op.weight.astype(np.int32) // op.weight_step
    ends, fields = [0, spec.qmin, spec.qmax], {}
    if isinstance(op, Conv):
        fields = {"stride": op.stride, "padding": op.padding, "dilation": op.dilation, "groups": op.groups}
        ends += [spec.zero_point] if any(op.padding) else []
    low, high = int(min(ends)), int(max(ends))
    w_low, w_high = int(w.min(initial=0)), int(w.max(initial=0))
    return Convolution(
        engine,
        w,
        op.weight_scale.astype(np.float64) * op.weight_step,
        op.name,
        x_zero_point=spec.zero_point,
        w_bits=max(op.weight_bits, 1 if w_low >= -1 and w_high <= 1 else _signed_bits(w_low, w_high)),
        x_bits=_signed_bits(low, high) if low < 0 else max(high.bit_length(), 1, spec.bits),
        x_signed=low < 0,
        **fields,
    )


def _signed_bits(low: int, high: int) -> int:
    """Least b with low..high in -2^(b-1)..2^(b-1)-1."""
    return 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0)


def _choose(names: list[str], engines: Mapping[str, Engine]) -> dict[str, Engine]:
    """{layer: engine} in the order of ``names``, by the first pattern that fits."""
    for pattern in engines:
        if not any(fnmatchcase(name, pattern) for name in names):
            check_known(pattern, names, "the network's layer or pattern", error=CrossbarError)
    fits = {name: [e for pattern, e in engines.items() if fnmatchcase(name, pattern)] for name in names}
    return {name: found[0] for name, found in fits.items() if found}
