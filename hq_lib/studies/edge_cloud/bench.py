"""What the edge-cloud study measures on: the network in both forms, its cuts, and the edges (notebook 09)."""

from dataclasses import dataclass, replace
from functools import cache

from torch import fx, nn

from hq_lib.crossbar import Adc, Circuit, EngineNetwork, SimEngine, device
from hq_lib.data import ImageSet, normalize
from hq_lib.deploy.edge_cloud import Cut, find_cuts
from hq_lib.graph import layer_macs
from hq_lib.integer import IntegerModel, lower
from hq_lib.integer.arithmetic import products as exact_products
from hq_lib.integer.execute import Products
from hq_lib.studies.bench import after_training, open_bench, quantized_as
from hq_lib.studies.study import Row, check_choice

EDGE_BITS = 8
"""Of weights and activations of the edge half of a float network."""
CIRCUITS = {"crossbar": Circuit(device("rram"), adc=Adc(8)), "crossbar_1day": Circuit(device("rram_1day"), adc=Adc(8))}
"""Edge -> what it multiplies on: RRAM (Wan et al. 2022) 1 s and 1 day after programming, 128 rows, 8-bit converters."""
NONE, EXACT = "none", "integer"
EDGES = (EXACT, *CIRCUITS)


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


@dataclass(frozen=True, eq=False)
class Workbench:
    """The network in both forms, its cuts, and the images."""

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
    few: ImageSet
    """Those of them that crossbars are judged on."""
    about: Row
    """model, method, bits and placement of the edge half, for rows."""

    def cut(self, name: str) -> Cut:
        """The cut called ``name``; ``StudyError`` where the network has none."""
        cuts = {cut.name: cut for cut in self.cuts[1:]}
        check_choice(self.about["model"], "cut", [name], cuts)
        return cuts[name]

    def share(self, cut: Cut) -> dict[str, float]:
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
    return Workbench(net, qnet, record, find_cuts(net, x[:1]), train, test, few, about)


@cache
def products_of(bench: Workbench, kind: str, draw: int, n_columns: int) -> Products:
    """What multiplies on an edge: exact integers, or at a ``draw`` >= 0 the crossbar ``kind`` in that programming,
    corrected column by column on ``n_columns`` training images."""
    if draw < 0:
        return exact_products
    network = EngineNetwork(bench.record, SimEngine(replace(CIRCUITS[kind], seed=draw)))
    chosen = bench.train.balanced(min(n_columns, len(bench.train)), draw)
    network.calibrate(normalize(chosen.images, chosen.spec))
    return network.products


def settings_of(kind: str, n_columns: int) -> Row:
    """What defines a crossbar, for a row's switches; {} for what is none."""
    if kind not in CIRCUITS:
        return {}
    described = SimEngine(CIRCUITS[kind]).describe().items()
    settings = {key: value for key, value in described if value is not None and key not in ("seed", "t_s")}
    return {"correction": "column, closed loop", "n_columns": n_columns, **settings}
