"""Integer networks in five executors: do they agree, and what does each cost (notebook 07).

``hq study integer_export --profile full`` quantizes each float network after training (a quantized one is taken as its
file has it), writes one file per executor and runs the test set through all of them: accuracy, agreement, file size,
time and memory go to ``integer_export.csv``. ``hq study integer_layers`` compares the integers of each tensor with the
fake-quantized network's.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from hq_lib import data, deploy, graph, integer, models, ptq
from hq_lib.data import ImageSet, normalize
from hq_lib.graph import BitPolicy, quantize
from hq_lib.integer.record import REQUANTIZERS
from hq_lib.ptq.ranges import Method
from hq_lib.results import provenance
from hq_lib.studies.bench import (
    TRAINED,
    Bench,
    known_networks,
    net_switch,
    network_file,
    open_bench,
    quantized_as,
    record_of,
)
from hq_lib.studies.integer_export import executors
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice, metric_rows

MODELS = ("lenet", "vgg11", "resnet20", "toynet", "mobilenetv2_seed")
MOBILE = (
    "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "squeezenet1_1",
    "shufflenet_v2_x1_0", "densenet121", "googlenet", "mnasnet1_0", "inception_v3",
)  # fmt: skip
"""Torchvision's networks, untrained: of them only agreement, size and time are measured."""
ENLARGED = {"inception_v3": 3}
"""How often each pixel is repeated for an untrained network; 2 for the others."""
AS_TRAINED = "as trained"
"""Biases of a trained network before ``round_biases``."""
NAMED = ("network", "file", "net", "biases")
"""Switches that name a network whose tensors are compared."""
PART = 500  # images that are normalised and run at a time


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    n_test: int | None
    """Test images that every executor classifies; None = all."""
    n_layers: int
    """Test images on which tensors are compared one by one."""
    networks: tuple[str, ...]
    """Float networks of ``MODELS``, which take ``bits``; network files by path or by stem in ``data/checkpoints``, of
    which quantized ones have their own; untrained ones of ``MOBILE``, which take 8 bits."""
    bits: tuple[tuple[int, int], ...] = ((8, 8), (4, 4))
    """(weights, activations) between first and last layer of float networks."""
    n_calib: int = 256
    """Training images from which the activation ranges come."""
    n_untrained: int = 16
    """Images that untrained networks are run on."""
    memory: bool = True
    """Whether peak memory is measured, which takes a process per point."""


PLANS = {
    "smoke": Plan(10, 2, ("lenet", "resnet20", "resnet20_pact_w4a4_s0"), n_calib=16, memory=False),
    "quick": Plan(200, 4, (*MODELS, "resnet20_pact_w4a4_s0", "resnet20_dsq_w2a2_s0"), n_calib=128, memory=False),
    "full": Plan(None, 100, (*MODELS, *TRAINED, *MOBILE)),
}


def recipe_of(bits: tuple[int, int]) -> tuple[Method, int | None]:
    """How a float network is quantized after training: the ranges of weights (of each output channel) and activations,
    and bits of the first layer's output, None = as the others. Min-max at 8 bits, below that of least squared error."""
    return ("minmax", None) if min(bits) >= 8 else ("mse", 8)


@dataclass(frozen=True)
class Network:
    """One network at one bit width."""

    name: str
    """See ``Plan``."""
    bits: tuple[int, int] | None
    """(weights, activations) that it is quantized to; None where it is quantized already."""

    @property
    def unit(self) -> str:
        """All that share the network's files, e.g. ``resnet20_w8a8``."""
        stem = Path(self.name).name.removesuffix(".safetensors")
        return stem if self.bits is None else f"{stem}_w{self.bits[0]}a{self.bits[1]}"

    @property
    def w_bits(self) -> float:
        """Bits of the weights between first and last layer."""
        policy = None if self.bits else record_of(self.name).get("policy")
        return self.bits[0] if self.bits else BitPolicy.from_dict(policy).weight.bits if policy else 32

    def key(self, plan: Plan, *, quantized: bool = True) -> Row:
        """What names the network (a column for one of ours, switches for a file) and how it was quantized here."""
        known: Row = {"untrained": True} if self.name in MOBILE else {**net_switch(self.name)}
        named: Row = {} if "network" in known else {"model": self.name}
        if not quantized or self.bits is None:
            return {**named, "switches": known}
        (w_bits, a_bits), (ranges, stem_out_bits) = self.bits, recipe_of(self.bits)
        known |= {"weights": ranges, "acts": ranges, "stem_out_bits": stem_out_bits or a_bits, "first_last_bits": 8}
        named |= {"w_bits": w_bits, "a_bits": a_bits, "placement": "deploy", "n_calib": plan.n_calib}
        return {**named, "switches": known}

    def point(self, name: str, key: Row) -> Point:
        """A point of this network; its files are opened once for all of them, behind its training."""
        after = f"{self.name}_float_s0" if self.name in MODELS else self.name
        return Point(f"{self.unit} {name}".strip(), key, bench=self, unit=f"exported_{self.unit}", after=(after,))


def networks(plan: Plan) -> list[Network]:
    """Every network at every bit width that it is quantized to."""
    named = [name for name in plan.networks if not name.endswith(".safetensors") or not Path(name).is_file()]
    check_choice("integer_export", "network", named, [*known_networks(), *TRAINED, *MOBILE])
    found = []
    for name in plan.networks:
        fixed = name in TRAINED or "policy" in record_of(name)
        widths = ((8, 8),) if name in MOBILE else (None,) if fixed else plan.bits
        found += [Network(name, None if pair is None else (int(pair[0]), int(pair[1]))) for pair in widths]
    return found


def points(plan: Plan) -> list[Point]:
    """Every executor of every network; NumPy comes first: the others are compared with it.

    A key names the network, executor, requantizer and, of those that changed, the executor's version.
    """
    pairs = [(executor, form) for form in REQUANTIZERS for executor in ("numpy", "c")] + [("onnx", "float32")]
    found, whole = [], set()
    for net in networks(plan):
        is_ours = net.name not in MOBILE
        is_first = is_ours and net.bits is not None and net.name not in whole
        whole.add(net.name)
        for executor, requantizer in [*pairs, *[("float", "")] * is_first, *[("fake_quant", "")] * is_ours]:
            key = net.key(plan, quantized=executor != "float")
            form = {"requantizer": requantizer, "version": executors.version(executor, net.w_bits)}
            key["switches"] |= {name: value for name, value in form.items() if value}
            key |= {"method": executor, "metric": "acc_pct" if is_ours else "cpu_ms"}
            found.append(net.point(f"{executor} {requantizer}".strip(), key))
    return found


@dataclass(frozen=True, eq=False)
class IntegerBench:
    """A quantized network, its images, and one file of it per executor and requantizer."""

    qnet: fx.GraphModule
    """Fake-quantized; its biases are those of the accumulators, so that it simulates the integers."""
    test: ImageSet
    """Images to classify."""
    about: Row
    """Columns that all rows share."""
    files: dict[str, Path]
    """"float", "fake_quant", "numpy float32", "c fixed" ..., "onnx float32" -> file."""
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    """NumPy's, by requantizer, once they are computed."""

    def reference(self, requantizer: str) -> np.ndarray:
        """NumPy's logits of all test images."""
        if requantizer not in self.logits:
            run = executors.opened("numpy", self.files[f"numpy {requantizer}"])
            self.logits[requantizer] = executors.measure(run, parts(self.test))[0]
        return self.logits[requantizer]


def open_network(run: Run[Plan], needed: Any) -> IntegerBench | None:
    """The network, quantized by the recipe of its bits or as it is, and its files."""
    network, bits, plan = needed.name, needed.bits, run.plan
    if network in MOBILE:
        bench = untrained(network, plan)
    else:
        bench = open_bench(network, n_train=plan.n_calib, n_val=1, n_test=plan.n_test)
    if bench is None:
        return None
    if bits is None:
        qnet, about = bench.net, quantized_as(bench.record)
    else:
        print(f"{network}: quantizing on {len(bench.train)} images of {bench.dataset}", flush=True)
        qnet, about = quantized(bench, bits), {"w_bits": bits[0], "a_bits": bits[1], "placement": "deploy"}
    assert isinstance(qnet, fx.GraphModule)
    integer.round_biases(qnet, images=bench.test.spec)
    about = {key: about[key] for key in ("w_bits", "a_bits", "placement")}
    names = {"model": bench.model, "dataset": bench.dataset, "seed": bench.record["seed"], "n_test": len(bench.test)}
    return IntegerBench(qnet, bench.test, {**names, **about}, written(bench, qnet, run.folder / needed.unit))


def quantized(bench: Bench, bits: tuple[int, int]) -> fx.GraphModule:
    """The network, fake-quantized by the recipe of its bits; the same bits every time.

    Batch norms that cannot be folded exactly (DenseNet's, behind a concatenation) stay, and have integers of their own.
    """
    ranges, stem_out_bits = recipe_of(bits)
    weight, act = f"minmax:{bits[0]}", f"lsq_plus:{bits[1]}"
    x = normalize(bench.train.images, bench.train.spec)
    policy = BitPolicy(weight, act, bn="fold", stem_out_bits=stem_out_bits)
    qnet = quantize(bench.net, policy, x[:1], on_refusal="keep")
    ptq.fit_weights(qnet, ranges, scheme="symmetric")
    ptq.fit_acts(qnet, x, ranges)
    return qnet.eval()


def untrained(name: str, plan: Plan) -> Bench | None:
    """A network of torchvision with random weights and the statistics of a few images, on CIFAR-10 enlarged."""
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(num_classes=10, **options)
    times = ENLARGED.get(name, 2)
    sets = []
    for split in ("train", "test"):
        few = data.load_or_embedded("cifar10", split, n=plan.n_untrained)
        large = few.images.repeat_interleave(times, 2).repeat_interleave(times, 3)
        sets.append(ImageSet(large, few.labels, few.spec, few.split))
    with torch.no_grad():
        net.train()(normalize(sets[0].images, sets[0].spec))
    return Bench(net.eval(), {"model": name, "seed": 0}, sets[0], sets[0], sets[1])


def written(bench: Bench, qnet: fx.GraphModule, folder: Path) -> dict[str, Path]:
    """One file per executor and requantizer; the ONNX file is left out where onnx is not installed."""
    keys = ["float", "fake_quant", *(f"{e} {form}" for form in REQUANTIZERS for e in ("numpy", "c")), "onnx float32"]
    files = {key: folder / f"{key.replace(' ', '_')}.{executors.ENDINGS[key.split()[0]]}" for key in keys}
    if "dataset" in bench.record:
        kept = ("model", "options", "dataset", "n_classes", "in_channels", "seed")
        record = {key: bench.record[key] for key in kept if key in bench.record}
        if "policy" not in bench.record:
            models.save_checkpoint(files["float"], bench.net, record)
        graph.save(qnet, files["fake_quant"], form="trainable", record={**record, "images": bench.test.spec})
    for requantizer in REQUANTIZERS:
        imodel = integer.lower(qnet, requantizer=requantizer, images=bench.test.spec)
        deploy.export(imodel, files[f"numpy {requantizer}"], "npz")
        deploy.export(imodel, files[f"c {requantizer}"], "c")
        if requantizer == "float32":
            with suppress(ImportError):
                deploy.export(imodel, files["onnx float32"], "onnx")
    return files


def measure(run: Run[Plan], bench: IntegerBench, point: Point) -> Iterator[Found]:
    """Accuracy, agreement with NumPy, time, size of the file, and memory; what this machine lacks is a row too."""
    executor, requantizer = point["method"], point["requantizer"] or ""
    file, about = bench.files[f"{executor} {requantizer}".strip()], dict(bench.about)
    if executor == "float":
        about |= {"w_bits": 32, "a_bits": 32, "placement": "-"}
    try:
        logits, cpu_ms = executors.measure(executors.opened(executor, file), parts(bench.test))
    except executors.UnavailableError as error:
        print(f"  {point.name}: {error}", flush=True)
        reason = {**point.key["switches"], "reason": str(error)}
        yield {**about, "metric": "unavailable", "value": 1, "switches": reason}
        return
    agreement = _agreement(bench, executor, requantizer, logits)
    found = {"cpu_ms": cpu_ms, "file_KiB": file.stat().st_size / 1024, **agreement}
    if run.plan.memory:
        peak = executors.peak_MiB(executor, file, next(parts(bench.test))[:1])
        found |= {} if peak is None else {"peak_MiB": peak}
    if not point["untrained"]:
        found["acc_pct"] = 100 * float((logits.argmax(1) == bench.test.labels.numpy()).mean())
    about["device"] = ", ".join([provenance.device("cpu"), *executors.how(executor, file)])
    yield from metric_rows(found, **about)


def _agreement(bench: IntegerBench, executor: str, requantizer: str, logits: np.ndarray) -> dict[str, float]:
    """Against NumPy: logits that differ (other integer executors), or the share of equal predictions (PyTorch)."""
    if executor == "numpy":
        bench.logits[requantizer] = logits
        return {}
    wanted = bench.reference(requantizer or "float32")
    if executor in ("c", "onnx"):
        return {"n_logit_mismatches": int((logits != wanted).sum())}
    return {"same_top1_pct": 100 * float((logits.argmax(1) == wanted.argmax(1)).mean())}


def parts(images: ImageSet) -> Iterator[np.ndarray]:
    """Normalised images in parts, (B, C, H, W) float32 in row-major order."""
    for part in images.images.split(PART):
        yield np.ascontiguousarray(normalize(part, images.spec).numpy())


def layer_points(plan: Plan) -> list[Point]:
    """The networks whose tensors are compared, integers with fake-quantized values; trained ones with both biases."""
    found = []
    for net in (net for net in networks(plan) if net.name not in MOBILE):
        key = {"method": "numpy", "metric": "largest_LSB", **net.key(plan)}
        switches = key.pop("switches")
        for biases in ("", AS_TRAINED) if net.bits is None else ("",):
            named = {f"switches.{name}": {**switches, "biases": biases or None}.get(name) for name in NAMED}
            found.append(net.point(biases, {**key, **named}))
    return found


def measure_layers(run: Run[Plan], bench: IntegerBench, point: Point) -> Iterator[Found]:
    """Of each tensor the integers that differ, on the integer network's own integers and fed with the graph's.

    Of a network with its biases as trained the latter alone: what they, which no accumulator holds, do in each tensor.
    """
    named = {name: point[name] for name in NAMED if point[name]}
    images = bench.test.subset(torch.arange(min(run.plan.n_layers, len(bench.test))))
    imodel = integer.lower(bench.qnet, images=bench.test.spec)
    file = network_file(point.bench.name) if point["biases"] else None
    qnet = graph.load(file) if file else bench.qnet
    for forced in (True,) if point["biases"] else (False, True):
        inputs = "the graph's" if forced else "its own"
        for place, tensor in enumerate(integer.agreement(qnet, imodel, images, forced=forced).tensors):
            where = {"tensor": tensor.name, "place": place, "inputs": inputs, **named}
            found = {"mismatch_pct": tensor.mismatch_pct, "largest_LSB": tensor.largest}
            yield from metric_rows(found, **{**bench.about, "n_test": len(images), "switches": where})


STUDY = Study(
    "integer_export", PLANS, points=points, open_bench=open_network, measure=measure, unkeyed=("n_test", "n_untrained")
)
LAYERS = Study(
    "integer_layers", PLANS, points=layer_points, open_bench=open_network, measure=measure_layers, unkeyed=("n_layers",)
)
STUDIES = (STUDY, LAYERS)
