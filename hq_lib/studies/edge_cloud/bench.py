"""What the edge-cloud study measures on: the network in both forms, its cuts, the edges and the sizes (notebook 09)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib import data, models, ptq
from hq_lib.crossbar import Adc, Circuit, EngineNetwork, SimEngine, device
from hq_lib.data import ImageSet, normalize
from hq_lib.deploy.edge_cloud import Cut, find_cuts
from hq_lib.graph import BitPolicy, layer_macs, quantize
from hq_lib.integer import IntegerModel, lower
from hq_lib.integer.execute import Products
from hq_lib.integer.sums import products as exact_products
from hq_lib.results import paths
from hq_lib.studies.bench import shipped

MODEL = "resnet20"
EDGE_BITS = 8
"""Of weights and activations of the edge half."""
WIRE_BITS = (1, 2, 4, 8)
TENSOR_BITS = (1, 2)
"""Bits at which one scale for the whole tensor is compared with one per channel."""
QUALITIES = (25, 50, 75, 90, 95)
"""JPEG qualities of the image that is sent instead."""
CIRCUITS = {
    "crossbar": Circuit(device("rram"), adc=Adc(8)),
    "crossbar_1day": Circuit(device("rram_1day"), adc=Adc(8)),
}
"""Edge -> what it multiplies on: RRAM (Wan et al. 2022) 1 s and 1 day after programming, 128 rows, 8-bit converters."""
EDGES = ("integer", *CIRCUITS)
STAGE_ENDS = ("conv1", "layer1.2", "layer2.2", "layer3.2")
"""The cuts after the stem and after each stage: the last of each size of tensor."""


@dataclass(frozen=True)
class Size:
    """How much a profile measures."""

    n_calib: int
    """Training images that grids and wires are fitted to."""
    n_test: int | None
    """Test images of the exact edge; None = all."""
    n_crossbar: int
    """Test images of each crossbar draw, balanced over classes, among the former."""
    n_draws: int
    """Programmings of each crossbar."""
    n_columns: int
    """Training images that converter ranges and column corrections are fitted to."""
    cuts: tuple[str, ...] = ()
    """Cuts measured; () = all."""


SIZES = {
    "smoke": Size(32, 30, 20, 1, 8, ("conv1", "layer3.2")),
    "quick": Size(128, 500, 200, 1, 32, STAGE_ENDS),
    "full": Size(256, None, 1000, 3, 64),
}
"""Profile -> sizes."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """The network in both forms, its cuts, and the images."""

    net: nn.Module
    """Float, as shipped."""
    qnet: fx.GraphModule
    """W8A8 after training, grids of least squared error."""
    record: IntegerModel
    """The same in integers."""
    cuts: list[Cut]
    """The image first."""
    train: ImageSet
    """Training images that everything is fitted to."""
    test: ImageSet
    """Images that the exact edge is judged on."""
    subset: Tensor
    """bool (n_test,): those that crossbars are judged on."""
    size: Size
    """Sizes of the profile."""

    def cut(self, name: str) -> Cut:
        """The cut called ``name``."""
        return next(cut for cut in self.cuts if cut.name == name)

    def share(self, cut: Cut) -> dict[str, float]:
        """What of the network runs before ``cut``: ``edge_mac_pct`` and ``edge_weight_KiB`` at 8 bits."""
        macs, weights = layer_macs(self.qnet), {op.name: op.weight.size for op in self.record.layers()}
        mine = sum(macs[name] for name in cut.layers)
        size_KiB = sum(weights[name] for name in cut.layers) * EDGE_BITS / 8192
        return {"edge_mac_pct": 100 * mine / sum(macs.values()), "edge_weight_KiB": size_KiB}


@cache
def workbench(profile: str) -> Workbench:
    """The shipped ResNet-20, quantized to W8A8 after training, with the profile's images.

    Without CIFAR-10 the images are the embedded digits: everything runs, but accuracies mean nothing, and the rows name
    the data set.
    """
    size, path = SIZES[paths.check_profile(profile)], shipped(MODEL)
    if path is None:
        raise FileNotFoundError(f"no float checkpoint of {MODEL} in {paths.checkpoints_dir()}: run notebook 01 in full")
    net, record = models.load_checkpoint(path)
    train = data.load_or_embedded(record["dataset"], "train").balanced(size.n_calib, 0)
    test = data.load_or_embedded(record["dataset"], "test", n=size.n_test)
    x = normalize(train.images, train.spec)
    qnet = quantize(net.eval(), BitPolicy(f"minmax:{EDGE_BITS}", f"minmax:{EDGE_BITS}", bn="fold"), x[:1])
    ptq.fit_weights(qnet, "mse")
    ptq.fit_acts(qnet, x, "mse")
    chosen = test.balanced(min(size.n_crossbar, len(test)), 0).indices
    subset = torch.isin(test.indices, chosen)
    return Workbench(net, qnet, lower(qnet), find_cuts(net, x[:1]), train, test, subset, size)


@dataclass(frozen=True, eq=False)
class Edge:
    """What runs the first half, and the images it is judged on."""

    kind: str
    """One of ``EDGES``, or "none": the image is sent."""
    draw: int
    """Seed of the programming; -1 = exact, nothing is drawn."""
    images: ImageSet
    """Judged images."""
    products: Callable[[], Products]
    """Gives what multiplies; a crossbar is programmed and corrected at the first call."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What defines a crossbar, for result rows."""

    @property
    def title(self) -> str:
        """For progress lines."""
        return self.kind if self.draw < 0 else f"{self.kind}, draw {self.draw}"


def exact_edge(bench: Workbench, kind: str = "integer") -> Edge:
    """The digital edge: exact integers on all images of the profile."""
    return Edge(kind, -1, bench.test, lambda: exact_products)


def crossbar_edge(bench: Workbench, kind: str, draw: int) -> Edge:
    """The crossbar ``kind`` in its programming number ``draw``, corrected column by column on training images."""
    circuit = replace(CIRCUITS[kind], seed=draw)

    @cache
    def program() -> Products:
        network = EngineNetwork(bench.record, SimEngine(circuit))
        chosen = bench.train.balanced(min(bench.size.n_columns, len(bench.train)), draw)
        network.calibrate(normalize(chosen.images, chosen.spec))
        return network.products

    described = {k: v for k, v in SimEngine(circuit).describe().items() if v is not None and k not in ("seed", "t_s")}
    settings = {"correction": "column, closed loop", "n_columns": bench.size.n_columns, **described}
    return Edge(kind, draw, bench.test.subset(bench.subset.nonzero().flatten()), program, settings)
