"""Losses, and accuracy and loss of a network on a whole set, image by image (never the mean of batch means)."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.data import ImageSet, batches
from hq_lib.graph.tracing import device_of, eval_mode

BATCH_PIXELS = 2**21
"""Pixels a channel in a batch at most, where the caller does not say: 41 images of 224 x 224"""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a set of images gave."""

    acc_pct: float
    """Top-1 accuracy, percent of images."""
    loss: float
    """Mean cross entropy per image, nats."""
    n: int
    """Images evaluated."""


Batches = Iterable[tuple[Tensor, Tensor]]
"""(normalised images (B, C, H, W), labels (B,)), batch by batch: a ``DataLoader``, a list, a generator."""


def predict(net: nn.Module, images: ImageSet | Batches, *, batch_size: int | None = None) -> Tensor:
    """(N, n_classes) float32 logits on the CPU, in the order of ``images``; eval mode, no gradients."""
    return _outputs(net, images, batch_size)[0]


def evaluate(net: nn.Module, images: ImageSet | Batches, *, batch_size: int | None = None) -> Evaluation:
    """Top-1 accuracy (percent) and mean cross entropy (nats) over all images, float32.

    ``batch_size`` is for an ``ImageSet`` (None: 500, fewer of large images); batches come as they are. Raises
    ``ValueError`` for an empty set.
    """
    logits, labels = _outputs(net, images, batch_size)
    if isinstance(images, ImageSet):
        warn_of_fewer_classes(images, logits.shape[1])
    return evaluation_of(logits, labels)


def warn_of_fewer_classes(images: ImageSet, n_outputs: int) -> None:
    """Nothing, or a warning where the images have fewer classes than a network has outputs: which are theirs?"""
    if n_outputs > images.spec.n_classes:
        warnings.warn(
            f"{images.spec.name} has {images.spec.n_classes} classes, the network {n_outputs} outputs: "
            "the classes are taken for the first of them",
            stacklevel=3,  # who judged
        )


def _outputs(net: nn.Module, images: ImageSet | Batches, batch_size: int | None) -> tuple[Tensor, Tensor]:
    device = device_of(net)
    walk: Batches
    if isinstance(images, ImageSet):
        most = max(1, BATCH_PIXELS // math.prod(images.images.shape[2:]))
        walk = batches(images, batch_size or min(500, most), device=device)
    else:
        walk = images
    with eval_mode(net), torch.inference_mode():
        pairs = [(logits_of(given(net, x.to(device))), y) for x, y in walk]
    if not pairs:
        named = f"{images.spec.name} {images.split} is empty" if isinstance(images, ImageSet) else "no batch came"
        raise ValueError(f"nothing to evaluate: {named}")
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def given(net: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What ``net`` gives for ``x`` (B, C, H, W), in plain order where a ``view`` of it takes no channels-last order."""
    try:
        return net(x)
    except RuntimeError:
        if x.is_contiguous():
            raise
        return net(x.contiguous())


def logits_of(output: object) -> Tensor:
    """What a network gave, in float32; ``ValueError`` for anything but one tensor (B, K)."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"the network gives {what}: one tensor of logits (images, classes) is needed")
    return output.float()


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """() mean cross entropy, nats; ``ValueError`` that names labels which ``logits`` (N, K) have no output for."""
    try:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    except IndexError as error:
        if int(labels.min()) < 0:
            raise ValueError("images without a class only calibrate: put pictures into class folders") from error
        raise ValueError(
            f"label {int(labels.max())} of a network with {logits.shape[1]} outputs: build it with the n_classes "
            f"of the data (labels are 0 ... n_classes - 1)"
        ) from error


def distance(logits: Tensor, taught: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, mean over the images, nats; ``logits``, ``taught`` (B, K).

    Hinton et al. 2015 (arXiv:1503.02531), section 2, in the form of a divergence: the gradient in ``logits`` is that of
    the paper's cross entropy. None flows to ``taught``.
    """
    target = F.log_softmax(taught.detach(), dim=1)
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)


def evaluation_of(logits: Tensor, labels: Tensor) -> Evaluation:
    """Top-1 accuracy (percent) and mean cross entropy (nats) of ``logits`` (N, K) for ``labels`` (N,)."""
    if logits.isnan().any():
        raise ValueError(f"{int(logits.isnan().any(1).sum())} of {len(logits)} images give NaN: no accuracy is said")
    right = (logits.argmax(1) == labels).sum().item()
    return Evaluation(100.0 * right / len(labels), cross_entropy(logits.double(), labels).item(), len(labels))
