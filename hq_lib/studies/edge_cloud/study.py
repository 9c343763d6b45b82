"""A network cut in two: accuracy against the bytes sent, by cut, bits on the wire and what the edge is (notebook 09).

``hq study edge_cloud --profile full`` runs the edge half in integers, exactly or on simulated crossbars, sends the
tensor at the cut over a wire in real packets, and runs the cloud half in PyTorch: the float network, or what is left of
a quantized one. Rows go to ``edge_cloud.csv``. Grids, wires and crossbars are fitted to training images; test images
are only judged.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_lib.data import ImageSet, normalize
from hq_lib.deploy.edge_cloud import (
    Cut,
    Wire,
    fit_wire,
    from_jpeg,
    integer_edge,
    pack,
    pixel_wire,
    split_at,
    to_jpeg,
    unpack,
)
from hq_lib.integer import IntegerModel
from hq_lib.integer.execute import Products, output_integers, real_values
from hq_lib.integer.execute import run as run_integers
from hq_lib.studies.bench import file_switch, known_networks, net_switch
from hq_lib.studies.edge_cloud.bench import (
    EDGES,
    EXACT,
    NONE,
    Size,
    Workbench,
    products_of,
    settings_of,
    workbench,
)
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice, metric_rows

IMAGE, ALL = "image", "all"
"""Names of the two ends: nothing, or everything, runs on the edge."""
WIRE_BITS = (1, 2, 4, 8)
TENSOR_BITS = (1, 2)
"""Bits at which one scale for the whole tensor is compared with one per channel."""
QUALITIES = (25, 50, 75, 90, 95)
"""JPEG qualities of the image that is sent instead."""
STAGE_ENDS = ("conv1", "layer1.2", "layer2.2", "layer3.2")
"""ResNet-20's cuts after the stem and after each stage: the last of each size of tensor."""
CHUNK = 250


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    size: Size
    """Images."""
    n_draws: int
    """Programmings of each crossbar."""
    cuts: tuple[str, ...]
    """Cuts, of those that ``find_cuts`` names; () = all of each network, for those without a residual stage too."""
    networks: tuple[str, ...] = ("resnet20",)
    """Shipped float networks by name, whose edge half is W8A8; or network files, by path or stem."""
    edges: tuple[str, ...] = EDGES
    """Of ``bench.EDGES``."""


PLANS = {
    "smoke": Plan(Size(16, 20, 10, 4), 1, ("conv1", "layer3.2")),
    "quick": Plan(Size(64, 200, 100, 16), 1, STAGE_ENDS),
    "full": Plan(
        Size(256, None, 1000, 64), 3, STAGE_ENDS, ("resnet20", "resnet20_pact_w4a4_s0", "resnet20_dsq_w2a2_s0")
    ),
}


@dataclass(frozen=True)
class Sending:
    """What is sent of a network, from one edge over one wire; a cut without wire is the share of the edge."""

    network: str
    """See ``Plan``."""
    edge: str
    """One of ``EDGES``, or "none": the image is sent."""
    cut: str
    """Name of a cut; "image", or "all": the network runs on the edge as a whole."""
    draw: int = -1
    """Programming of a crossbar; -1 = exact."""
    grid: str = ""
    """One scale per "channel" or per "tensor"; "" for what is no tensor."""
    wire_bits: int = 0
    """Bits of a number on the wire."""
    jpeg_quality: int = 0
    """Of an image that is sent as JPEG."""

    @property
    def is_share(self) -> bool:
        """Whether nothing is sent: only the share of the edge is told."""
        return self.cut not in (IMAGE, ALL) and not self.wire_bits

    @property
    def switches(self) -> Row:
        """What names a measurement among a row's switches; a crossbar's settings stand beside it."""
        wire = {"grid": self.grid, "wire_bits": self.wire_bits, "jpeg_quality": self.jpeg_quality}
        known = {"edge": self.edge, "cut": self.cut, **file_switch(self.network), **net_switch(self.network)}
        return {**known, **{name: value for name, value in wire.items() if value}}

    def point(self) -> Point:
        """A unit is all wires of one edge, a bench one of its cuts."""
        known, names = self.switches, ("edge", "cut", "network", "file", "net", "grid", "wire_bits", "jpeg_quality")
        key: Row = {f"switches.{name}": known.get(name) for name in names}
        key |= {"seed": self.draw, "metric": "edge_mac_pct" if self.is_share else "acc_pct"}
        key |= {} if "network" in known else {"model": self.network}
        stem = Path(self.network).name.removesuffix(".safetensors")
        unit = f"{stem}_{self.edge}" + ("" if self.draw < 0 else f"_{self.draw}")
        wire = f"quality {self.jpeg_quality}" if self.jpeg_quality else f"{self.wire_bits} bits {self.grid}"
        bench, after = (self.network, self.edge, self.draw, self.cut), (f"{self.network}_float_s0", self.network)
        return Point(f"{unit} {self.cut} {wire}", key, self, bench, unit, after)


def points(plan: Plan) -> list[Point]:
    """Network by network the share of each cut, the pictures, then each edge at each cut and on each wire."""
    check_choice("edge_cloud", "edge", plan.edges, EDGES)
    named = [name for name in plan.networks if not Path(name).is_file()]
    check_choice("edge_cloud", "network", named, known_networks())
    found = []
    for network in plan.networks:
        opened = None if plan.cuts else workbench(network, plan.size)
        inner = plan.cuts if opened is None else tuple(cut.name for cut in opened.cuts[1:])
        found += [Sending(network, EXACT, cut) for cut in inner]
        image = Sending(network, NONE, IMAGE)
        found += [replace(image, wire_bits=bits) for bits in WIRE_BITS]
        found += [replace(image, jpeg_quality=quality) for quality in QUALITIES]
        for edge in plan.edges:
            for draw in [-1] if edge == EXACT else range(plan.n_draws):
                grids = [("channel", bits) for bits in WIRE_BITS]
                grids += [("tensor", bits) for bits in TENSOR_BITS] if edge == EXACT else []
                found += [Sending(network, edge, ALL, draw)]
                found += [Sending(network, edge, cut, draw, grid, bits) for cut in inner for grid, bits in grids]
    return [each.point() for each in found]


@dataclass(frozen=True, eq=False)
class CutBench:
    """A network with its edge, and one of its cuts (None: the image is sent, or nothing is)."""

    work: Workbench
    """Network and images."""
    edge: str
    """What runs the first half, one of ``EDGES``, or "none": the image is sent."""
    draw: int
    """Programming of a crossbar; -1 = exact."""
    cut: Cut | None
    """Where it ends."""

    @property
    def images(self) -> ImageSet:
        """Judged images: fewer for a crossbar."""
        return self.work.test if self.draw < 0 else self.work.test.subset(self.work.subset.nonzero().flatten())

    @property
    def products(self) -> Products:
        """What multiplies; a crossbar is programmed and corrected at the first call."""
        return products_of(self.work, self.edge, self.draw)

    def batches(self) -> Iterator[Tensor]:
        """The judged images, normalised, some at a time."""
        return (normalize(some, self.work.test.spec) for some in self.images.images.split(CHUNK))

    @cached_property
    def part(self) -> IntegerModel:
        """The edge half."""
        assert self.cut is not None
        return integer_edge(self.work.qnet, self.work.record, self.cut)

    @cached_property
    def sent(self) -> np.ndarray:
        """The integers of all judged images at the cut, (N, *shape)."""
        return np.concatenate([output_integers(self.part, x, products=self.products) for x in self.batches()])


def open_cut(run: Run[Plan], needed: Any) -> CutBench | None:
    """The network, its edge and the cut; ``StudyError`` for a cut that it does not have."""
    network, kind, draw, name = needed
    work = workbench(network, run.plan.size)
    if work is None:
        return None
    if name not in (IMAGE, ALL):
        check_choice(network, "cut", [name], [cut.name for cut in work.cuts[1:]])
    return CutBench(work, kind, draw, None if name in (IMAGE, ALL) else work.cut(name))


def measure(run: Run[Plan], bench: CutBench, point: Point) -> Iterator[Found]:
    """Accuracy and mean bytes of one wire; of the exact edge also its accuracy on the images of the crossbars."""
    what, work, images = point.what, bench.work, bench.images
    about = {"dataset": work.test.spec.name, "n_test": len(images), "n_calib": len(work.train), **work.about}
    about["switches"] = {**what.switches, **settings_of(what.edge, work.size)}
    if what.edge == NONE and work.net is not work.qnet:
        about |= {"method": "float", "w_bits": 32, "a_bits": 32, "placement": "-"}
    if what.edge == NONE:
        about["n_calib"] = 0
    if what.is_share:
        assert bench.cut is not None
        yield from metric_rows(work.share(bench.cut), **{**about, "n_test": 0, "n_calib": 0})
        return
    right, sizes = _answered(bench, what)
    yield {**about, "value": _percent(right)}
    if len(right) == len(work.subset) and not work.subset.all():
        alone = right[work.subset]
        yield {**about, "value": _percent(alone), "n_test": len(alone)}
    yield from metric_rows({f"{coding}_KiB": float(np.mean(each)) / 1024 for coding, each in sizes.items()}, **about)


def _answered(bench: CutBench, what: Sending) -> tuple[Tensor, dict[str, list[int]]]:
    """Which images are answered rightly, and the bytes of each packet by coding."""
    work, images = bench.work, bench.images
    if what.cut == ALL:
        logits = np.concatenate([run_integers(work.record, x, products=bench.products) for x in bench.batches()])
        return torch.from_numpy(logits).argmax(1) == images.labels, {}
    if what.jpeg_quality:
        streams = to_jpeg(images.images, quality=what.jpeg_quality)
        seen = from_jpeg(streams, images.images, quality=what.jpeg_quality)
        answers = torch.cat([_answers(work.net, normalize(some, images.spec)) for some in seen.split(CHUNK)])
        return answers.argmax(1) == images.labels, {"jpeg": [len(stream) for stream in streams]}
    if what.cut == IMAGE:
        wire = pixel_wire(images.spec, bits=what.wire_bits)
        codes = (wire.encode(x.numpy()) for x in bench.batches())
        return over_the_wire(wire, codes, work.net, images.labels)
    assert bench.cut is not None
    wire = fitted_wire(work, bench.cut, bits=what.wire_bits, per_channel=what.grid == "channel")
    spec, sent = bench.part.tensors[bench.part.output], bench.sent
    codes = (wire.encode_integers(sent[i : i + CHUNK], spec) for i in range(0, len(sent), CHUNK))
    return over_the_wire(wire, codes, split_at(work.net, bench.cut)[1], images.labels)


@cache
def fitted_wire(bench: Workbench, cut: Cut, *, bits: int, per_channel: bool) -> Wire:
    """The wire of a cut, fitted to what the exact edge sends of the training images, whatever edge is used later."""
    return fit_wire(torch.from_numpy(_sent_in_training(bench, cut)), cut.name, bits=bits, per_channel=per_channel)


@lru_cache(maxsize=1)
def _sent_in_training(bench: Workbench, cut: Cut) -> np.ndarray:
    part = integer_edge(bench.qnet, bench.record, cut)
    x_int = output_integers(part, normalize(bench.train.images, bench.train.spec))
    return real_values(part.tensors[part.output], x_int)


def over_the_wire(
    wire: Wire, codes: Iterable[np.ndarray], cloud: nn.Module, labels: Tensor
) -> tuple[Tensor, dict[str, list[int]]]:
    """Which images the cloud gets right, bool (N,), and the bytes of each packet by coding.

    Every packet is made in both codings; the cloud reads the deflated ones.

    Args:
        codes:  chunks (B, *wire.shape), the images in order.
        labels: (N,) int64.
    """
    sizes: dict[str, list[int]] = {"packed": [], "deflate": []}
    logits = []
    for some in codes:
        packets = pack(wire, some, coding="deflate")
        sizes["packed"] += map(len, pack(wire, some))
        sizes["deflate"] += map(len, packets)
        logits.append(_answers(cloud, torch.from_numpy(wire.decode(unpack(wire, packets)))))
    return torch.cat(logits).argmax(1) == labels, sizes


@torch.inference_mode()
def _answers(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


STUDY = Study("edge_cloud", PLANS, points=points, open_bench=open_cut, measure=measure)
STUDIES = (STUDY,)
