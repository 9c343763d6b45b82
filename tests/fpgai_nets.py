"""Random FPGAI networks, and when two are the same."""

from collections import OrderedDict

import numpy as np
import torch

from hq_lib.deploy.fpga import LENET, FpgaiLayer, Stage

SMALL = (
    Stage("first", (3, 2, 3, 2), stride=2, padding=1, pool="max"),
    Stage("second", (4, 3, 1, 1), pool="average"),
    Stage("last", (5, 16), relu1=False),
)
"""(2, 15, 17) images -> (3, 8, 9), pooled to (3, 4, 4) -> (4, 4, 4), pooled to (4, 2, 2) -> 5"""


def random_net(seed=0, stages=LENET):
    rng = np.random.default_rng(seed)
    layers = []
    for stage in stages:
        weight = rng.integers(0, 256, stage.shape, np.uint8)
        bias = rng.integers(-(2**14), 2**14, stage.shape[0], np.int32)
        quant = (int(rng.integers(low, high)) for low, high in ((128, 256), (13, 16), (100, 156)))
        layers.append(FpgaiLayer(stage, weight, bias, *quant))
    return layers


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x.multiplier, x.shift, x.zero_point) == (y.multiplier, y.shift, y.zero_point)
        assert x.weight.dtype == y.weight.dtype == np.uint8
        assert np.array_equal(x.weight, y.weight)
        assert np.array_equal(x.bias, y.bias)


def write_tuple(net, path):
    """``net`` as seed 002's Python saves it: int32 weights, real biases, a flat list of its quant triples."""
    state = OrderedDict()
    for layer in net:
        state[f"{layer.stage.name}.weight"] = torch.from_numpy(layer.weight.astype(np.int32))
        state[f"{layer.stage.name}.bias"] = torch.from_numpy((layer.bias * layer.scale / 255).astype(np.float32))
    quant = [n for layer in net for n in (layer.multiplier, layer.shift, layer.zero_point)]
    torch.save((state, quant), path)
    return path
