"""A network cut in two: accuracy against the bytes sent, by cut, bits on the wire and what the edge is (notebook 09).

``hq study edge_cloud --profile full`` runs the edge half in integers, exactly or on simulated crossbars, sends the
tensor at the cut over a wire in real packets, and runs the cloud half in PyTorch: the float network, or what is left of
a quantized one. Rows go to ``edge_cloud.csv``. Grids, wires and crossbars are fitted to training images; test images
are only judged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.data import ImageSet, normalize
from hq_lib.deploy import edge_cloud as ec
from hq_lib.integer import IntegerModel
from hq_lib.integer.execute import Products, output_integers, real_values
from hq_lib.integer.execute import run as run_integers
from hq_lib.studies.bench import known_networks, net_switch
from hq_lib.studies.edge_cloud import bench as benches
from hq_lib.studies.edge_cloud.bench import EDGES, EXACT, NONE, Plan, Workbench, workbench
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
NAMED = ("edge", "cut", "network", "file", "net", "grid", "wire_bits", "jpeg_quality")
"""Switches that name a measurement; a crossbar's settings stand beside them."""
PLANS = {
    "smoke": Plan(16, 20, 10, 4, 1, ("conv1", "layer3.2")),
    "quick": Plan(64, 200, 100, 16, 1, STAGE_ENDS),
    "full": Plan(256, None, 1000, 64, 3, STAGE_ENDS, ("resnet20", "resnet20_pact_w4a4_s0", "resnet20_dsq_w2a2_s0")),
}


def points(plan: Plan) -> list[Point]:
    """Network by network the share of each cut, the pictures, then each edge at each cut and on each wire."""
    check_choice("edge_cloud", "edge", plan.edges, EDGES)
    named = [name for name in plan.networks if not Path(name).is_file()]
    check_choice("edge_cloud", "network", named, known_networks())
    found = []
    for network in plan.networks:
        opened = None if plan.cuts else workbench(network, plan)
        inner = plan.cuts if opened is None else tuple(cut.name for cut in opened.cuts[1:])
        found += [point(network, EXACT, cut) for cut in inner]
        found += [point(network, NONE, IMAGE, wire_bits=bits) for bits in WIRE_BITS]
        found += [point(network, NONE, IMAGE, jpeg_quality=quality) for quality in QUALITIES]
        for edge in plan.edges:
            wires = [{"grid": "channel", "wire_bits": bits} for bits in WIRE_BITS]
            wires += [{"grid": "tensor", "wire_bits": bits} for bits in TENSOR_BITS if edge == EXACT]
            for draw in [-1] if edge == EXACT else range(plan.n_draws):
                found += [point(network, edge, ALL, draw)]
                found += [point(network, edge, cut, draw, **wire) for cut in inner for wire in wires]
    return found


def point(network: str, edge: str, cut: str, draw: int = -1, **wire: Any) -> Point:
    """What is sent of a network from one edge; a cut without wire is the share of the edge.

    A unit is all wires of one edge, a bench one of its cuts.

    Args:
        network: see ``Plan``.
        edge:    one of ``EDGES``, or "none": the image is sent.
        cut:     name of a cut; "image", or "all": the network runs on the edge as a whole.
        draw:    programming of a crossbar; -1 = exact.
        wire:    ``wire_bits`` of a number, of a tensor with one scale per ``grid``, "channel" or "tensor"; or the
                 image's ``jpeg_quality``.
    """
    known = {"edge": edge, "cut": cut, **net_switch(network), **wire}
    key: Row = {f"switches.{name}": known.get(name) for name in NAMED}
    key |= {"seed": draw, "metric": "acc_pct" if wire or cut == ALL else "edge_mac_pct"}
    key |= {} if "network" in known else {"model": network}
    unit = f"{Path(network).name.removesuffix('.safetensors')}_{edge}" + ("" if draw < 0 else f"_{draw}")
    words = f"{wire.get('wire_bits', 0)} bits {wire.get('grid', '')}"
    words = f"quality {wire['jpeg_quality']}" if "jpeg_quality" in wire else words
    after = (f"{network}_float_s0", network)
    return Point(f"{unit} {cut} {words}", key, known, (network, edge, draw, cut), unit, after)


@dataclass(frozen=True, eq=False)
class CutBench:
    """A network with its edge, and one of its cuts."""

    work: Workbench
    """Network and images."""
    images: ImageSet
    """Judged images: fewer for a crossbar."""
    products: Products
    """What multiplies on the edge."""
    cut: ec.Cut | None
    """Where it ends; None: the image is sent, or nothing is."""

    def batches(self) -> Iterator[Tensor]:
        """The judged images, normalised, some at a time."""
        return (normalize(some, self.images.spec) for some in self.images.images.split(CHUNK))

    @cached_property
    def part(self) -> IntegerModel:
        """The edge half."""
        assert self.cut is not None
        return ec.integer_edge(self.work.qnet, self.work.record, self.cut)

    @cached_property
    def sent(self) -> np.ndarray:
        """The integers of all judged images at the cut, (N, *shape)."""
        return np.concatenate([output_integers(self.part, x, products=self.products) for x in self.batches()])


def open_cut(run: Run[Plan], needed: Any) -> CutBench | None:
    """The network, its edge and the cut; a crossbar is programmed and corrected once for all its cuts."""
    network, edge, draw, name = needed
    work = workbench(network, run.plan)
    if work is None:
        return None
    cut = None if name in (IMAGE, ALL) else work.cut(name)
    products = benches.products_of(work, edge, draw, run.plan.n_columns)
    return CutBench(work, work.test if draw < 0 else work.few, products, cut)


def measure(run: Run[Plan], bench: CutBench, point: Point) -> Iterator[Found]:
    """Accuracy and mean bytes of one wire; of the exact edge also its accuracy on the images of the crossbars."""
    work, test = bench.work, bench.work.test
    about = {"dataset": test.spec.name, "n_test": len(bench.images), "n_calib": len(work.train), **work.about}
    about["switches"] = {**point.what, **benches.settings_of(point["edge"], run.plan.n_columns)}
    if point["edge"] == NONE and work.net is not work.qnet:
        about |= {"method": "float", "w_bits": 32, "a_bits": 32, "placement": "-"}
    if point["edge"] == NONE:
        about["n_calib"] = 0
    if point["metric"] == "edge_mac_pct":
        assert bench.cut is not None
        yield from metric_rows(work.share(bench.cut), **{**about, "n_test": 0, "n_calib": 0})
        return
    answers, sizes = answered(bench, point)
    right = (answers.argmax(1) == bench.images.labels).double()
    yield {**about, "value": 100 * right.mean().item()}
    few = torch.isin(test.indices, work.few.indices)
    if len(right) == len(few) and not few.all():
        yield {**about, "value": 100 * right[few].mean().item(), "n_test": int(few.sum())}
    yield from metric_rows({f"{coding}_KiB": float(np.mean(each)) / 1024 for coding, each in sizes.items()}, **about)


@torch.no_grad()
def answered(bench: CutBench, point: Point) -> tuple[Tensor, dict[str, list[int]]]:
    """Logits of the judged images, and the bytes of each packet by coding.

    Every packet is made in both codings; the cloud reads the deflated ones.
    """
    work, images, cut = bench.work, bench.images, bench.cut
    if point["cut"] == ALL:
        logits = np.concatenate([run_integers(work.record, x, products=bench.products) for x in bench.batches()])
        return torch.from_numpy(logits), {}
    if quality := point["jpeg_quality"]:
        streams = ec.to_jpeg(images.images, quality=quality)
        seen = ec.from_jpeg(streams, images.images, quality=quality)
        answers = torch.cat([work.net(normalize(some, images.spec)) for some in seen.split(CHUNK)])
        return answers, {"jpeg": [len(stream) for stream in streams]}
    if cut is None:
        wire, cloud = ec.pixel_wire(images.spec, bits=point["wire_bits"]), work.net
        codes = (wire.encode(x.numpy()) for x in bench.batches())
    else:
        wire = fitted_wire(work, cut, bits=point["wire_bits"], per_channel=point["grid"] == "channel")
        cloud, spec, sent = ec.split_at(work.net, cut)[1], bench.part.tensors[bench.part.output], bench.sent
        codes = (wire.encode_integers(sent[i : i + CHUNK], spec) for i in range(0, len(sent), CHUNK))
    sizes: dict[str, list[int]] = {"packed": [], "deflate": []}
    logits = []
    for some in codes:
        packets = ec.pack(wire, some, coding="deflate")
        sizes["packed"] += map(len, ec.pack(wire, some))
        sizes["deflate"] += map(len, packets)
        logits.append(cloud(torch.from_numpy(wire.decode(ec.unpack(wire, packets)))))
    return torch.cat(logits), sizes


@cache
def fitted_wire(bench: Workbench, cut: ec.Cut, *, bits: int, per_channel: bool) -> ec.Wire:
    """The wire of a cut, fitted to what the exact edge sends of the training images, whatever edge is used later."""
    return ec.fit_wire(torch.from_numpy(_sent_in_training(bench, cut)), cut.name, bits=bits, per_channel=per_channel)


@lru_cache(maxsize=1)
def _sent_in_training(bench: Workbench, cut: ec.Cut) -> np.ndarray:
    part = ec.integer_edge(bench.qnet, bench.record, cut)
    x_int = output_integers(part, normalize(bench.train.images, bench.train.spec))
    return real_values(part.tensors[part.output], x_int)


STUDY = Study("edge_cloud", PLANS, points=points, open_bench=open_cut, measure=measure)
STUDIES = (STUDY,)
