"""What the edge-cloud study measures on: the network in both forms, its cuts, the edges and the sizes (notebook 09)."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, fx, nn

from hq_lib.crossbar import Adc, Circuit, EngineNetwork, SimEngine, device
from hq_lib.data import ImageSet, normalize
from hq_lib.deploy.edge_cloud import Cut, find_cuts
from hq_lib.graph import layer_macs
from hq_lib.integer import IntegerModel, lower
from hq_lib.integer.execute import Products
from hq_lib.integer.sums import products as exact_products
from hq_lib.studies.bench import after_training, open_bench, quantized_as
from hq_lib.studies.study import Row

EDGE_BITS = 8
"""Of weights and activations of the edge half of a float network."""
CIRCUITS = {
    "crossbar": Circuit(device("rram"), adc=Adc(8)),
    "crossbar_1day": Circuit(device("rram_1day"), adc=Adc(8)),
}
"""Edge -> what it multiplies on: RRAM (Wan et al. 2022) 1 s and 1 day after programming, 128 rows, 8-bit converters."""
NONE, EXACT = "none", "integer"
EDGES = (EXACT, *CIRCUITS)


@dataclass(frozen=True)
class Size:
    """How much a profile measures."""

    n_calib: int
    """Training images that grids and wires are fitted to."""
    n_test: int | None
    """Test images of the exact edge; None = all."""
    n_crossbar: int
    """Test images of each crossbar draw, balanced over classes, among the former."""
    n_columns: int
    """Training images that converter ranges and column corrections are fitted to."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """The network in both forms, its cuts, and the images."""

    network: str
    """By name or file, see ``studies.bench.network_file``."""
    net: nn.Module
    """What runs in the cloud: the float network as shipped, or the quantized one of a file."""
    qnet: fx.GraphModule
    """What runs on the edge: W8A8 after training, grids of least squared error; or the network of the file."""
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
    about: Row
    """model, method, bits and placement of the edge half, for rows."""

    def cut(self, name: str) -> Cut:
        """The cut called ``name``."""
        return next(cut for cut in self.cuts if cut.name == name)

    def share(self, cut: Cut) -> dict[str, float]:
        """What of the network runs before ``cut``: ``edge_mac_pct`` and ``edge_weight_KiB`` at the weights' bits."""
        macs, weights = layer_macs(self.qnet), {op.name: op for op in self.record.layers()}
        mine = sum(macs[name] for name in cut.layers)
        n_bits = sum(weights[name].weight.size * weights[name].weight_bits for name in cut.layers)
        return {"edge_mac_pct": 100 * mine / sum(macs.values()), "edge_weight_KiB": n_bits / 8192}


@cache
def workbench(network: str, size: Size) -> Workbench | None:
    """The network with the profile's images; None, after a line that says why, where they cannot be had.

    A float network is quantized to W8A8 after training. Without its data set the images are the embedded digits:
    everything runs, but accuracies mean nothing, and the rows name the data set.
    """
    found = open_bench(network, n_val=1, n_test=size.n_test)
    if found is None:
        return None
    net, train, test = found.net, found.train.balanced(size.n_calib, 0), found.test
    x = normalize(train.images, train.spec)
    if "policy" in found.record:
        qnet, about = net, quantized_as(found.record)
    else:
        qnet = after_training(net, x, bits=EDGE_BITS)
        bits = {"w_bits": EDGE_BITS, "a_bits": EDGE_BITS, "placement": "deploy"}
        about = {"model": found.model, "method": "mse", **bits}
    assert isinstance(qnet, fx.GraphModule)
    chosen = test.balanced(min(size.n_crossbar, len(test)), 0).indices
    subset, record = torch.isin(test.indices, chosen), lower(qnet, images=test.spec)
    return Workbench(network, net, qnet, record, find_cuts(net, x[:1]), train, test, subset, size, about)


@cache
def products_of(bench: Workbench, kind: str, draw: int) -> Products:
    """What multiplies on an edge: exact integers, or at a ``draw`` >= 0 the crossbar ``kind`` in that programming,
    corrected column by column on training images."""
    if draw < 0:
        return exact_products
    network = EngineNetwork(bench.record, SimEngine(replace(CIRCUITS[kind], seed=draw)))
    chosen = bench.train.balanced(min(bench.size.n_columns, len(bench.train)), draw)
    network.calibrate(normalize(chosen.images, chosen.spec))
    return network.products


def settings_of(kind: str, size: Size) -> Row:
    """What defines a crossbar, for a row's switches; {} for what is none."""
    if kind not in CIRCUITS:
        return {}
    described = SimEngine(CIRCUITS[kind]).describe().items()
    settings = {key: value for key, value in described if value is not None and key not in ("seed", "t_s")}
    return {"correction": "column, closed loop", "n_columns": size.n_columns, **settings}
