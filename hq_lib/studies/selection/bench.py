"""What a calibration study works on: a float net with its images, and that net quantized from a given set.

CIFAR-10 with the shipped ResNet-20 by default; ``dataset="imagenet"`` with a folder and EfficientNet-Lite0 by
parameter. Where CIFAR-10 cannot be had, a ResNet-20 is trained on the embedded digits, and every row says so.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib import data, models, ptq
from hq_lib.data import ImageSet, folder
from hq_lib.graph import BitPolicy, quantize
from hq_lib.models import efficientnet_lite
from hq_lib.ptq.ranges import Method
from hq_lib.results import paths
from hq_lib.studies.bench import shipped
from hq_lib.training import TrainConfig, fit, predict

Bits = tuple[int, int]
"""of weights and activations"""
MODEL = {"cifar10": "resnet20", "digits": "resnet20", "imagenet": "efficientnet_lite0"}
MEAN_STD = (efficientnet_lite.MEAN, efficientnet_lite.STD)
EVAL_BATCH = {"imagenet": 25}
RANGE_IMAGES = 256
"""images whose activations set the ranges, the first of a set (QDrop takes one batch of 256)"""
DIGITS = TrainConfig(epochs=4, lr=0.05, batch_size=32, pad=2, flip=False)
ROUNDING_TRAVEL = 20.0
"""rounding rate x iterations: the published 1e-3 x 20,000, kept for short budgets (see ``ReconstructionConfig``)"""
BETA_START, BATCH_SIZE = 8.0, 16
SETTINGS = {"first_last_bits": 8, "range_images": RANGE_IMAGES}
"""switches that every row shares"""
STEPS = {"batch_size": BATCH_SIZE, "beta_start": BETA_START}
"""switches of a reconstruction"""
N_TRAIN = 16_384
"""largest number of an image folder's training images kept in memory"""


@dataclass(frozen=True)
class Bench:
    """A float net and the images it is calibrated, compared and judged on."""

    model: str
    """name of the net"""
    net: nn.Module
    """the float net, eval mode"""
    train: ImageSet
    """what calibration sets are taken from, without augmentation"""
    common: ImageSet
    """held-out images on which the losses of all sets are compared; their labels are used only to fix the budget"""
    test: ImageSet
    """seen once per row, by no choice"""
    rounded: dict[tuple[Bits, str], fx.GraphModule] = field(default_factory=dict)
    """nets with weight grids, by bits and method of ranges: they depend on no image, so they are made once"""

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.train.spec.name

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return next(self.net.parameters()).device

    @cached_property
    def common_logits(self) -> Tensor:
        """(N, n_classes), the float net's on ``common``."""
        return predict(self.net, self.common, batch_size=eval_batch(self))


def open_bench(
    dataset: str, profile: str, *, n_common: int, n_test: int | None, root: Path | None = None, device: str = "cpu"
) -> Bench:
    """The bench of a data set; an unavailable CIFAR-10 becomes the embedded digits, with a line that says so.

    Args:
        dataset:  "cifar10" or "imagenet".
        profile:  where the digits' net is kept.
        n_common: images of the held-out set: of the validation split, or cut from an image folder's training half.
        n_test:   test images, None = all.
        root:     the image folder of "imagenet"; default the sample in ../shared/data.
        device:   "cpu" or "cuda".

    Raises:
        ValueError:        another data set, or ``n_common`` of a folder that has no more images.
        FileNotFoundError: no image folder; ImportError: no weights for it. ``available`` asks beforehand.
    """
    if dataset == "imagenet":
        return _imagenet_bench(root or imagenet_root(), n_common, n_test, device)
    if dataset != "cifar10":
        raise ValueError(f"no calibration study of {dataset!r}: choose 'cifar10' or 'imagenet'")
    train = data.load_or_embedded(dataset, "train")
    name = train.spec.name
    common = data.load(name, "val")
    common = common.balanced(min(n_common, len(common)), 0)
    test = data.load_or_embedded(name, "test", n=n_test)
    net = _shipped_net() if name == "cifar10" else _digits_net(train, profile)
    return Bench(MODEL[name], net.eval().to(device), train, common, test)


def imagenet_root() -> Path:
    """The optional sample of ImageNet beside the checkout (a folder that may be absent)."""
    return (paths.shared_data() or paths.ROOT / "absent") / "imagenet_sample"


def available(root: Path | None = None) -> str:
    """Why the ImageNet study cannot run ("" = it can): no folder, or no weights of EfficientNet-Lite0."""
    folder = root or imagenet_root()
    if not folder.is_dir():
        return f"no image folder {folder.name}: give root=<folder of class folders>"
    try:
        efficientnet_lite.weights_path()
    except ImportError as error:
        return str(error)
    return ""


def _imagenet_bench(root: Path, n_common: int, n_test: int | None, device: str) -> Bench:
    if reason := available(root):
        raise FileNotFoundError(reason)
    net = models.build(MODEL["imagenet"]).eval().to(device)
    n_train = min(N_TRAIN, len(folder.list_folder(root, "train")[0]))
    if n_common >= n_train:
        raise ValueError(f"{root.name}: {n_common} of {n_train} training images held out leave none to calibrate with")
    train = data.load("imagenet", "train", root=root, n=n_train).normalized_by(*MEAN_STD)
    test = data.load("imagenet", "test", root=root, n=n_test).normalized_by(*MEAN_STD)
    held_out = torch.zeros(n_train, dtype=torch.bool)
    held_out[torch.linspace(0, n_train - 1, n_common).round().long()] = True
    parts = [train.subset(mask.nonzero().flatten()) for mask in (~held_out, held_out)]
    return Bench(MODEL["imagenet"], net, parts[0], parts[1], test)


def _shipped_net() -> nn.Module:
    path = shipped(MODEL["cifar10"])
    assert path is not None, "the repository ships data/checkpoints/resnet20_float_s0.safetensors"
    return models.load_checkpoint(path)[0]


def _digits_net(train: ImageSet, profile: str) -> nn.Module:
    torch.manual_seed(0)
    net = models.build(MODEL["digits"], n_classes=train.spec.n_classes, in_channels=train.spec.in_shape[0])
    config = DIGITS if profile != "smoke" else dataclasses.replace(DIGITS, epochs=1)
    fit(net, train, data.load("digits", "val"), config, paths.runs_dir(profile) / "selection_study" / "digits_net")
    return net


def policy(w_bits: int, a_bits: int) -> BitPolicy:
    """Bits of the study: min-max or L_p weights per channel, LSQ+ activations, QDrop's placement, folded norms."""
    return BitPolicy(f"minmax:{w_bits}", f"lsq_plus:{a_bits}", placement="academic", bn="fold", pool_bits=32)


def ranged(bench: Bench, x: Tensor, bits: Bits, ranges: Method = "mse") -> fx.GraphModule:
    """The net quantized with ranges from calibration images ``x`` (N, C, H, W), rounded to nearest."""
    if (bits, ranges) not in bench.rounded:
        made = quantize(bench.net, policy(*bits), x[:1])
        ptq.fit_weights(made, ranges)
        bench.rounded[bits, ranges] = made
    qnet = copy.deepcopy(bench.rounded[bits, ranges])
    ptq.fit_acts(qnet, x[:RANGE_IMAGES], ranges)
    return qnet


def rounding_rate(iterations: int) -> float:
    """Adam's rate of the rounding logits for a budget: ``ROUNDING_TRAVEL`` over the iterations, at most 0.5."""
    return min(0.5, ROUNDING_TRAVEL / max(1, iterations))


def reconstructed(
    bench: Bench, x: Tensor, bits: Bits, method: str, *, iterations: int, seed: int, batch_sampling: str
) -> fx.GraphModule:
    """The net quantized from calibration images ``x`` by "qdrop" or "brecq" (ranges alone for "mse", "minmax")."""
    if method in ("mse", "minmax"):
        return ranged(bench, x, bits, "mse" if method == "mse" else "minmax")
    known = {"qdrop": ptq.qdrop, "brecq": ptq.brecq}
    if method not in known:
        raise ValueError(f"unknown method {method!r}: choose one of qdrop, brecq, mse, minmax")
    qnet = ranged(bench, x, bits)
    settings: Mapping[str, Any] = {
        "iterations": iterations, "n_images": len(x), "seed": seed, "batch_sampling": batch_sampling,
        "batch_size": min(BATCH_SIZE, len(x)), "beta_start": BETA_START, "rounding_lr": rounding_rate(iterations),
    }  # fmt: skip
    ptq.reconstruct(qnet, x, known[method](**settings))
    return qnet


def logit_loss(bench: Bench, qnet: nn.Module, images: ImageSet, target: Tensor | None = None) -> float:
    """Mean over images of sum_classes (logit of ``qnet`` - float logit)^2: the last layer's reconstruction loss.

    ``target``: the float net's logits (N, n_classes) on ``images``, where they are known already.
    """
    size = eval_batch(bench)
    wanted = predict(bench.net, images, batch_size=size) if target is None else target
    return (predict(qnet, images, batch_size=size) - wanted).square().sum(1).mean().item()


def eval_batch(bench: Bench) -> int:
    """Images per forward pass: small enough for a core's cache."""
    return EVAL_BATCH.get(bench.dataset, 64)
