"""The networks of notebook 07, quantized after training, and one file of each per executor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import fx, nn

from hq_lib import data, graph, integer, models, ptq
from hq_lib.data import ImageSet, normalize
from hq_lib.deploy import c as export_c
from hq_lib.graph import BitPolicy, quantize
from hq_lib.integer.record import Requantizer
from hq_lib.ptq.ranges import Method
from hq_lib.results import paths
from hq_lib.studies.bench import shipped
from hq_lib.studies.integer_export.executors import ENDINGS

STUDY = "integer_export"
MODELS = ("lenet", "vgg11", "resnet20", "toynet", "mobilenetv2_seed")
REQUANTIZERS: tuple[Requantizer, ...] = get_args(Requantizer)
PART = 500  # images that are normalised and run at a time


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    n_test: int | None
    """Test images that every executor classifies; None = all."""
    n_layers: int
    """Test images on which tensors are compared one by one."""
    n_calib: int = 256
    """Training images from which the activation ranges come."""
    models: tuple[str, ...] = MODELS
    """Networks."""
    memory: bool = True
    """Whether peak memory is measured, which takes a process per point."""


PLAN = {
    "smoke": Plan(20, 4, 16, ("lenet", "resnet20"), memory=False), "quick": Plan(500, 20), "full": Plan(None, 100),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a network is quantized after training."""

    weights: Method
    """Range of each output channel's weights."""
    acts: Method
    """Range of each activation."""
    stem_out_bits: int | None = None
    """Bits of the first layer's output; None = as the others."""


RECIPES = {8: Recipe("minmax", "minmax"), 4: Recipe("mse", "mse", stem_out_bits=8)}


@dataclass(frozen=True)
class Job:
    """One network at one bit width: what its points share."""

    profile: str
    """smoke, quick or full."""
    model: str
    """Network."""
    net: nn.Module
    """The float network, in eval mode."""
    record: dict[str, Any]
    """Run record of its checkpoint."""
    test: ImageSet
    """Images to classify."""
    train: ImageSet
    """Images to calibrate on."""
    w_bits: int
    """Bits of the weights between first and last layer."""
    a_bits: int
    """Bits of the activations there."""

    @property
    def recipe(self) -> Recipe:
        """How it is quantized."""
        return RECIPES[min(self.w_bits, self.a_bits)]

    @property
    def folder(self) -> Path:
        """Where its files are written."""
        return paths.runs_dir(self.profile) / STUDY / f"{self.model}_w{self.w_bits}a{self.a_bits}"

    def row(self, method: str, **more: Any) -> dict[str, Any]:
        """The columns that all rows of an executor share."""
        quantized = {
            "w_bits": self.w_bits, "a_bits": self.a_bits, "placement": "deploy", "n_calib": len(self.train),
        }  # fmt: skip
        return {
            "experiment": STUDY, "model": self.model, "dataset": self.test.spec.name, "method": method,
            "seed": self.record["seed"], "n_test": len(self.test), **({} if method == "float" else quantized), **more,
        }  # fmt: skip


def job(name: str, profile: str, w_bits: int, a_bits: int) -> Job | None:
    """The job; None, with a line that says why, where the network has no checkpoint or no images that fit it."""
    path, plan = shipped(name), PLAN[profile]
    if path is None:
        print(f"{name}: no checkpoint is shipped, skipped")
        return None
    net, record = models.load_checkpoint(path)
    test = data.load_or_embedded(record["dataset"], "test", n=plan.n_test)
    if test.spec.in_shape != data.SPECS[record["dataset"]].in_shape:
        print(f"{name}: {record['dataset']} is not available and the embedded digits do not fit it, skipped")
        return None
    train = data.load(test.spec.name, "train", n=plan.n_calib)
    return Job(profile, name, net, record, test, train, w_bits, a_bits)


def quantized(job: Job) -> fx.GraphModule:
    """The network, fake-quantized by the recipe of its bits; the same bits every time.

    Its biases are those of the accumulators, so that it simulates the integers.
    """
    policy = BitPolicy(
        weight=f"minmax:{job.w_bits}", act=f"lsq_plus:{job.a_bits}", bn="fold", stem_out_bits=job.recipe.stem_out_bits
    )
    x = normalize(job.train.images, job.train.spec)
    qnet = quantize(job.net, policy, x[:1])
    ptq.fit_weights(qnet, job.recipe.weights, scheme="symmetric")
    ptq.fit_acts(qnet, x, job.recipe.acts)
    integer.round_biases(qnet)
    return qnet.eval()


def write(job: Job, qnet: fx.GraphModule) -> dict[str, Path]:
    """One file per executor and requantizer, by "float", "fake_quant", "numpy float32", "c fixed" ..., "onnx float32".

    The ONNX file is left out where onnx is not installed.
    """
    record = {key: job.record[key] for key in ("model", "options", "dataset", "n_classes", "in_channels", "seed")}
    files = {key: job.folder / f"{key.replace(' ', '_')}.{ENDINGS[key.split()[0]]}" for key in points()}
    models.save_checkpoint(files["float"], job.net, record)
    graph.save(qnet, files["fake_quant"], form="trainable", record={**record, "images": job.test.spec})
    for requantizer in REQUANTIZERS:
        imodel = integer.lower(qnet, requantizer=requantizer, images=job.test.spec)
        integer.save(imodel, files[f"numpy {requantizer}"])
        export_c.save(imodel, files[f"c {requantizer}"])
        if requantizer == "float32":
            _write_onnx(imodel, files["onnx float32"])
    return files


def _write_onnx(imodel: integer.IntegerModel, file: Path) -> None:
    try:
        from hq_lib.deploy import onnx as export_onnx
    except ImportError:
        return
    export_onnx.save(export_onnx.export(imodel), file)


def points() -> list[str]:
    """What is measured, "<executor> <requantizer>"; NumPy comes first: the others are compared with it."""
    with_form = [f"{executor} {form}" for form in REQUANTIZERS for executor in ("numpy", "c")]
    return [*with_form, "onnx float32", "float", "fake_quant"]


def switches(job: Job, point: str) -> dict[str, Any]:
    """The settings behind a point, as a row states them."""
    if point == "float":
        return {}
    recipe, form = job.recipe, point.split()[1:]
    known = {"weights": recipe.weights, "acts": recipe.acts, "stem_out_bits": recipe.stem_out_bits or job.a_bits}
    return {**known, "first_last_bits": 8, **({"requantizer": form[0]} if form else {})}


def parts(images: ImageSet) -> Iterator[np.ndarray]:
    """Normalised images in parts, (B, C, H, W) float32 in row-major order."""
    for part in images.images.split(PART):
        yield np.ascontiguousarray(normalize(part, images.spec).numpy())
