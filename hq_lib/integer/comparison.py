"""``agreement``: how far the integers are from the fake-quantized network they were made of, tensor by tensor.

Both networks round the same real values, but the fake-quantized one computes those in float32 and (without
``round_biases``, which lets it have those of the integer one) adds biases that no accumulator can hold: where a value
lies almost half-way between two steps, the two may part by one step (1 LSB).

By more where a step of the output is finer than one of the accumulator, as in outputs of 16 bits: a rounded bias moves
a result by up to half its multiplier, in output steps. Six were seen with weights of 3 and 4 bits, 36 behind an image
of 4; weights so small that they are rounded for their bias's sake (``products.in_storage``) moved one by fifteen.
"""

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx

from hq_lib.data import DataSpec, ImageSet, batches
from hq_lib.graph import kinds, op_name
from hq_lib.graph.tracing import NodeWatcher, device_of, eval_mode
from hq_lib.integer.execute import run
from hq_lib.integer.lowering import lower, tensor_names
from hq_lib.integer.nodes import LowerError
from hq_lib.integer.products import norm_gain
from hq_lib.integer.record import IntegerModel, Op


class TensorAgreement(NamedTuple):
    """How one tensor of the record compares with the graph's."""

    name: str
    """tensor of the record"""
    n: int
    """integers compared"""
    n_differ: int
    """how many of them differ"""
    largest: int
    """largest difference, steps (LSB)"""

    @property
    def mismatch_pct(self) -> float:
        """Share of integers that differ, percent."""
        return 100 * (1 - (self.n - self.n_differ) / self.n)


class Agreement(NamedTuple):
    """What ``agreement`` found."""

    tensors: list[TensorAgreement]
    """in execution order"""
    same_top1_pct: float
    """images to which both networks give the same class, percent"""
    fake_quant_acc_pct: float | None
    """top-1 of the fake-quantized network, percent; None without labels"""
    integer_acc_pct: float | None
    """top-1 of the integer network, percent; None without labels"""


def agreement(
    qnet: fx.GraphModule,
    imodel: IntegerModel,
    images: ImageSet | Tensor,
    *,
    forced: bool = False,
    batch_size: int = 50,
) -> Agreement:
    """Return how the integer network ``imodel`` compares with the quantized graph ``qnet`` it was lowered from.

    Args:
        images: an ``ImageSet`` (normalised here; gives accuracies too), or (N, C, H, W) float32, normalised.
        forced: False: each network goes its own way, so a difference is carried on. True: every operation of the
                integer network reads the graph's own integers, so each tensor shows the differences born in it.

    Raises:
        ImageError: the images do not fit. ValueError: no tensor of ``imodel`` is a quantizer of ``qnet``, or
                    one has another shape there.
    """
    labels = None if isinstance(images, Tensor) else images.labels
    parts = images.split(batch_size) if isinstance(images, Tensor) else (x for x, _ in batches(images, batch_size))
    found: dict[str, TensorAgreement] = {}
    ours, theirs = [], []
    for part in parts:
        wanted, logits = _graph_integers(qnet, imodel, part)
        if not wanted:
            raise ValueError("no tensor of the integer model is a quantizer of this graph: lower this graph itself")

        def compare(op: Op, got: np.ndarray, wanted: dict[str, np.ndarray] = wanted) -> np.ndarray | None:
            if op.output not in wanted:
                return None
            if got.shape != wanted[op.output].shape:
                raise ValueError(f"tensor {op.output!r} is {got.shape[1:]} in the integer model and "
                                 f"{wanted[op.output].shape[1:]} in this graph: lower this graph itself")  # fmt: skip
            steps = np.abs(got.astype(np.int32) - wanted[op.output])
            name, n, n_differ, largest = found.get(op.output, (op.output, 0, 0, 0))
            differ = int(np.count_nonzero(steps))
            found[name] = TensorAgreement(name, n + steps.size, n_differ + differ, max(largest, int(steps.max())))
            return wanted[op.output].astype(got.dtype) if forced else None

        ours.append(run(imodel, part.contiguous(), batch_size=batch_size, watch=compare))
        theirs.append(logits)
    classes = [np.concatenate(logits).argmax(1) for logits in (theirs, ours)]
    acc = [None if labels is None else 100 * float((c == labels.numpy()).mean()) for c in classes]
    return Agreement([*found.values()], 100 * float((classes[0] == classes[1]).mean()), *acc)


def _graph_integers(
    qnet: fx.GraphModule, imodel: IntegerModel, images: Tensor
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the integers of each quantized tensor of ``qnet``, by the record's name, and its logits."""
    names, found = tensor_names(qnet), {}
    logits = np.empty(0)

    def look(node: fx.Node, value: Any) -> None:
        nonlocal logits
        spec = imodel.tensors.get(names.get(node.name, ""))
        if spec is not None:
            x_int = np.rint(value.double().cpu().numpy() / np.float64(spec.scale)) + spec.zero_point
            found[spec.name] = x_int.astype(np.int32)
        if node.op == "output":
            logits = value.cpu().numpy()

    device = device_of(qnet)
    with eval_mode(qnet), torch.no_grad():
        NodeWatcher(qnet, look).run(images.to(device))
    return found, logits


@torch.no_grad()
def round_biases(qnet: fx.GraphModule, *, images: DataSpec | None = None) -> dict[str, float]:
    """Round the biases of ``qnet`` in place to those of ``lower(qnet)``; returns the largest change of each layer.

    An integer layer adds ``round(b / (s_x s_w))`` to its accumulator (Jacob et al. 2018, arXiv:1712.05877, section
    2.4), at most half an accumulator step away from b. In a 4-bit ResNet-20 this moves some 0.03 % of a layer's outputs
    by one step, and such steps grow on their way through the network. Behind this call the fake-quantized network makes
    the same steps: what still differs is float32 arithmetic on values half-way between two steps. The integer network
    made from ``qnet`` stays the same. Batch norms behind a layer are part of its bias: the last one's shift is rounded.

    Args:
        qnet:   quantized, its grids fitted, in any batch-norm mode.
        images: as in ``lower``, for a network whose image has no quantizer.

    Returns:
        Layer -> largest |change| of its bias (or of its norm's shift), real units; layers without one are left out.

    Raises:
        LowerError: ``qnet`` cannot be lowered, or a layer runs twice on different grids.
    """
    steps = {op.name: op.acc_scale.astype(np.float64) for op in lower(qnet, images=images).layers()}
    changes: dict[str, float] = {}
    for name, bias in _biases(qnet).items():
        if bias.holder is not None and name in steps:  # a layer whose result nothing uses is in no record
            rounded = np.rint(bias.value / steps[name]) * steps[name] - bias.rest
            values = torch.from_numpy(rounded).to(bias.holder)
            changes[name] = float((values - bias.holder).abs().max())
            bias.holder.copy_(values)
    return changes


class _Bias(NamedTuple):
    """What a layer, with the batch norms behind it, adds to its products."""

    layer: str
    """its name in the record"""
    value: np.ndarray
    """float64 (C,), real units"""
    holder: Tensor | None
    """the tensor of the network that shifts the value; None: there is none"""
    rest: np.ndarray | float
    """value - holder"""


def _biases(qnet: fx.GraphModule) -> dict[str, _Bias]:
    found: dict[fx.Node, _Bias] = {}
    seen: set[str] = set()
    for node, kind in kinds(qnet).items():
        source = next(iter(node.all_input_nodes), None)
        if kind in ("layer", "norm"):
            name, module = str(node.target), cast(Any, qnet.get_submodule(str(node.target)))
            before = found.get(source) if kind == "norm" and source is not None else None
            if name in seen or (before is not None and source is not None and len(source.users) > 1):
                raise LowerError(f"layer {before.layer if before else name!r} runs more than once, or is read with and "
                                 "without its batch norm: give each use a layer of its own")  # fmt: skip
            seen.add(name)
            own = 0.0 if module.bias is None else module.bias.double().cpu().numpy()
            gain, shift = norm_gain(module) if kind == "norm" else (1.0, np.atleast_1d(own))
            value = shift + gain * before.value if before else shift
            found[node] = _Bias(before.layer if before else name, value, module.bias, value - own)
        elif source in found and op_name(node, qnet) == "identity":
            found[node] = found[source]
    return {bias.layer: bias for bias in found.values()}  # of a layer and its norms, the last
