"""``agreement``: how far the integers are from the fake-quantized network they were made of, tensor by tensor.

Both networks round the same real values, but the fake-quantized one computes those in float32 and (without
``round_biases``) adds biases that no accumulator can hold: where a value lies almost half-way between two steps, the
two may part by one step (1 LSB).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from hq_lib.data import ImageSet, normalize
from hq_lib.graph.tracing import NodeWatcher, device_of, eval_mode
from hq_lib.integer.execute import run
from hq_lib.integer.lowering import tensor_names
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
        ImageError: the images do not fit. ValueError: no tensor of ``imodel`` is a quantizer of ``qnet``.
    """
    x, labels = (images, None) if isinstance(images, Tensor) else (normalize(images.images, images.spec), images.labels)
    found: dict[str, TensorAgreement] = {}
    ours, theirs = [], []
    for part in x.split(batch_size):
        wanted, logits = _graph_integers(qnet, imodel, part)
        if not wanted:
            raise ValueError("no tensor of the integer model is a quantizer of this graph: lower this graph itself")

        def compare(op: Op, got: np.ndarray, wanted: dict[str, np.ndarray] = wanted) -> np.ndarray | None:
            if op.output not in wanted:
                return None
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
