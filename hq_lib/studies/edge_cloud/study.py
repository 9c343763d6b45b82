"""A network cut in two: accuracy against the bytes sent, by cut, bits on the wire and what the edge is (notebook 09).

``hq study edge_cloud --profile full`` runs the edge half in integers, exactly or on simulated crossbars, sends the
tensor at the cut over a wire in real packets, and runs the cloud half in PyTorch: the float network, or what is left of
a quantized one. Rows go to ``edge_cloud.csv``. Grids, wires and crossbars are fitted to training images; test images
are only judged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from hq_lib.crossbar import Adc, Circuit, EngineNetwork, SimEngine, device
from hq_lib.data import ImageSet, normalize
from hq_lib.deploy import edge_cloud as ec
from hq_lib.graph import layer_macs
from hq_lib.integer import IntegerModel, TensorSpec, lower
from hq_lib.integer import run as run_integers
from hq_lib.integer.arithmetic import products as exact_products
from hq_lib.integer.execute import Products, output_integers, real_values
from hq_lib.studies.bench import after_training, known_networks, net_switch, open_bench, quantized_as
from hq_lib.studies.study import Found, Point, Row, Run, Study, check_choice, metric_rows

IMAGE, ALL = "image", "all"
"""Names of the two ends: nothing, or everything, runs on the edge."""
NONE, EXACT = "none", "integer"
EDGE_BITS = 8
"""Of weights and activations of the edge half of a float network."""
CIRCUITS = {"crossbar": Circuit(device("rram"), adc=Adc(8)), "crossbar_1day": Circuit(device("rram_1day"), adc=Adc(8))}
"""Edge -> what it multiplies on: RRAM (Wan et al. 2022) 1 s and 1 day after programming, 128 rows, 8-bit converters."""
EDGES = (EXACT, *CIRCUITS)
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


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    n_calib: int
    """Training images that grids and wires are fitted to."""
    n_test: int | None
    """Test images of the exact edge; None = all."""
    n_crossbar: int
    """Test images of each crossbar draw, balanced over classes, among the former."""
    n_columns: int
    """Training images that converter ranges and column corrections are fitted to."""
    n_draws: int
    """Programmings of each crossbar."""
    cuts: tuple[str, ...]
    """Cuts, of those that ``find_cuts`` names; () = all of each network, for those without a residual stage too."""
    networks: tuple[str, ...] = ("resnet20",)
    """Shipped float networks by name, whose edge half is W8A8; or network files, by path or stem."""
    edges: tuple[str, ...] = EDGES
    """Of ``EDGES``."""


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

    A unit is all wires of one edge.

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
    return Point(f"{unit} {cut} {words}", key, known, network, unit, after)


@dataclass(frozen=True, eq=False)
class Workbench:
    """The network in both forms, its cuts, and the images."""

    net: nn.Module
    """What runs in the cloud: the float network as shipped, or the quantized one of a file."""
    qnet: fx.GraphModule
    """What runs on the edge: W8A8 after training, grids of least squared error; or the network of the file."""
    record: IntegerModel
    """The same in integers."""
    cuts: list[ec.Cut]
    """The image first."""
    train: ImageSet
    """Training images that everything is fitted to."""
    test: ImageSet
    """Images that the exact edge is judged on."""
    few: ImageSet
    """Those of them that crossbars are judged on."""
    about: Row
    """model, method, bits and placement of the edge half, for rows."""

    def cut(self, name: str) -> ec.Cut:
        """The cut called ``name``; ``StudyError`` where the network has none."""
        cuts = {cut.name: cut for cut in self.cuts[1:]}
        check_choice(self.about["model"], "cut", [name], cuts)
        return cuts[name]

    def share(self, cut: ec.Cut) -> dict[str, float]:
        """What of the network runs before ``cut``: ``edge_mac_pct`` and ``edge_weight_KiB`` at the weights' bits."""
        macs, weights = layer_macs(self.qnet), {op.name: op for op in self.record.layers()}
        mine = sum(macs[name] for name in cut.layers)
        n_bits = sum(weights[name].weight.size * weights[name].weight_bits for name in cut.layers)
        return {"edge_mac_pct": 100 * mine / sum(macs.values()), "edge_weight_KiB": n_bits / 8192}


@cache
def workbench(network: str, plan: Plan) -> Workbench | None:
    """The network with the plan's images; None, after a line that says why, where they cannot be had.

    A float network is quantized to W8A8 after training. Without its data set the images are the embedded digits:
    everything runs, but accuracies mean nothing, and the rows name the data set.
    """
    found = open_bench(network, n_val=1, n_test=plan.n_test)
    if found is None:
        return None
    net, train, test = found.net, found.train.balanced(plan.n_calib, 0), found.test
    x = normalize(train.images, train.spec)
    if "policy" in found.record:
        qnet, about = net, quantized_as(found.record)
    else:
        qnet = after_training(net, x, bits=EDGE_BITS)
        bits = {"w_bits": EDGE_BITS, "a_bits": EDGE_BITS, "placement": "deploy"}
        about = {"model": found.model, "method": "mse", **bits}
    assert isinstance(qnet, fx.GraphModule)
    few, record = test.balanced(min(plan.n_crossbar, len(test)), 0), lower(qnet, images=test.spec)
    return Workbench(net, qnet, record, ec.find_cuts(net, x[:1]), train, test, few, about)


@cache
def products_of(bench: Workbench, edge: str, draw: int, n_columns: int) -> Products:
    """What multiplies on an edge: exact integers, or the crossbar in that programming, corrected column by column on
    ``n_columns`` training images. It is programmed and corrected once for all its cuts."""
    if edge not in CIRCUITS:
        return exact_products
    network = EngineNetwork(bench.record, SimEngine(replace(CIRCUITS[edge], seed=draw)))
    chosen = bench.train.balanced(min(n_columns, len(bench.train)), draw)
    network.calibrate(normalize(chosen.images, chosen.spec))
    return network.products


def measure(run: Run[Plan], bench: Workbench, point: Point) -> Iterator[Found]:
    """Accuracy and mean bytes of one wire; of the exact edge also its accuracy on the images of the crossbars."""
    edge, n_columns, test = point["edge"], run.plan.n_columns, bench.test
    images = bench.few if edge in CIRCUITS else test
    about = {"dataset": test.spec.name, "n_test": len(images), "n_calib": len(bench.train), **bench.about}
    about["switches"] = {**point.what}
    if edge in CIRCUITS:
        described = SimEngine(CIRCUITS[edge]).describe().items()
        about["switches"] |= {"correction": "column, closed loop", "n_columns": n_columns}
        about["switches"] |= {k: v for k, v in described if v is not None and k not in ("seed", "t_s")}
    if edge == NONE:
        about["n_calib"] = 0
        if bench.net is not bench.qnet:
            about |= {"method": "float", "w_bits": 32, "a_bits": 32, "placement": "-"}
    if point["metric"] == "edge_mac_pct":
        yield from metric_rows(bench.share(bench.cut(point["cut"])), **{**about, "n_test": 0, "n_calib": 0})
        return
    answers, sizes = answered(bench, images, products_of(bench, edge, point["seed"], n_columns), point)
    right = (answers.argmax(1) == images.labels).double()
    yield {**about, "value": 100 * right.mean().item()}
    few = torch.isin(test.indices, bench.few.indices)
    if len(right) == len(few) and not few.all():
        yield {**about, "value": 100 * right[few].mean().item(), "n_test": int(few.sum())}
    yield from metric_rows({f"{coding}_KiB": float(np.mean(each)) / 1024 for coding, each in sizes.items()}, **about)


@torch.no_grad()
def answered(
    bench: Workbench, images: ImageSet, products: Products, point: Point
) -> tuple[Tensor, dict[str, list[int]]]:
    """Logits of the judged images, and the bytes of each packet by coding.

    Every packet is made in both codings; the cloud reads the deflated ones.
    """
    if quality := point["jpeg_quality"]:
        streams = ec.to_jpeg(images.images, quality=quality)
        seen = ec.from_jpeg(streams, images.images, quality=quality)
        answers = torch.cat([bench.net(normalize(some, images.spec)) for some in seen.split(CHUNK)])
        return answers, {"jpeg": [len(stream) for stream in streams]}
    x = normalize(images.images, images.spec)
    if point["cut"] == ALL:
        return torch.from_numpy(run_integers(bench.record, x, products=products)), {}
    if point["cut"] == IMAGE:
        wire, cloud, values = ec.pixel_wire(images.spec, bits=point["wire_bits"]), bench.net, x.numpy()
        encode = wire.encode
    else:
        cut = bench.cut(point["cut"])
        wire = fitted_wire(bench, cut, bits=point["wire_bits"], per_channel=point["grid"] == "channel")
        cloud, (spec, values) = ec.split_at(bench.net, cut)[1], sent(bench, images, products, cut)
        encode = partial(wire.encode_integers, spec=spec)
    sizes: dict[str, list[int]] = {"packed": [], "deflate": []}
    logits = []
    for i in range(0, len(values), CHUNK):
        codes = encode(values[i : i + CHUNK])
        packets = ec.pack(wire, codes, coding="deflate")
        sizes["packed"] += map(len, ec.pack(wire, codes))
        sizes["deflate"] += map(len, packets)
        logits.append(cloud(torch.from_numpy(wire.decode(ec.unpack(wire, packets)))))
    return torch.cat(logits), sizes


@cache
def fitted_wire(bench: Workbench, cut: ec.Cut, *, bits: int, per_channel: bool) -> ec.Wire:
    """The wire of a cut, fitted to what the exact edge sends of the training images, whatever edge is used later."""
    values = torch.from_numpy(real_values(*sent(bench, bench.train, exact_products, cut)))
    return ec.fit_wire(values, cut.name, bits=bits, per_channel=per_channel)


@lru_cache(maxsize=2)  # the training images and the judged ones, for all wires of a cut
def sent(bench: Workbench, images: ImageSet, products: Products, cut: ec.Cut) -> tuple[TensorSpec, np.ndarray]:
    """What an edge sends of some images: the grid at the cut, and the integers on it, (N, *shape)."""
    half = ec.integer_edge(bench.qnet, bench.record, cut)
    return half.tensors[half.output], output_integers(half, normalize(images.images, images.spec), products=products)


STUDY = Study(
    "edge_cloud",
    PLANS,
    points=points,
    open_bench=lambda run, name: workbench(name, run.plan),
    measure=measure,
    unkeyed=("n_test", "n_crossbar", "n_calib", "n_columns"),
)
STUDIES = (STUDY,)
