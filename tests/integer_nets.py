"""Small networks that between them use every operation a record has, and single layers of awkward sizes."""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib import data
from hq_lib.deploy.c.runtime import RUNTIME, compiled
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import requants


class Residual(nn.Module):
    """Stem, max-pool, a block with a 1x1 shortcut, an identity block, global average, classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.bnd = nn.Conv2d(6, 8, 1, stride=2), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.bnd(self.down(x)))
        x = F.relu(x + self.conv3(x))
        return self.fc(x.mean((2, 3)))


class Mobile(nn.Module):
    """Depthwise and grouped convolutions, ReLU6, linear bottleneck with an identity addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.expand, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project, self.bn3 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.pool, self.act, self.fc = nn.AdaptiveAvgPool2d(1), nn.ReLU6(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        x = x + self.bn3(self.project(self.act(self.bn2(self.depth(self.act(self.bn1(self.expand(x))))))))
        x = F.hardtanh(self.grouped(x), -0.5, 0.75)
        return self.fc(torch.flatten(self.pool(x), 1))


class Joined(nn.Module):
    """Concatenation of a ReLU branch and a signed one, a ReLU after it, average pooling, option A's shortcut."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.c, self.d = nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.Conv2d(10, 4, 3)
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat([F.relu(self.a(x)), F.max_pool2d(self.b(x), 3, 1, 1)], 1))
        x = F.relu(self.c(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        x = F.avg_pool2d(F.relu(self.d(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class PreActivation(nn.Module):
    """A batch norm in front of a convolution, a split and shuffled map, a max-pool over everything."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding="same"), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(F.max_pool2d(F.relu(self.stem(x)), 2))
        keep, change = x.chunk(2, 1)
        x = torch.cat([keep, F.relu(self.conv(change))], 1)
        n, _, h, w = x.shape
        x = x.view(n, 2, 3, h, w).transpose(1, 2).reshape(n, 6, h, w)
        return self.fc(x.amax((2, 3)))


class Gated(nn.Module):
    """Hard-swish by table, a squeeze-and-excitation gate, a difference, nearest upsampling."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Hardswish()
        self.down, self.up, self.fc = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1), nn.Linear(6, 5)
        self.conv, self.wide = nn.Conv2d(6, 6, 3, padding=1), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = x * F.hardsigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = x - F.relu(self.conv(self.wide(F.max_pool2d(x, 2))))
        return self.fc(x.mean((2, 3)))


NETS = {"residual": Residual, "mobile": Mobile, "joined": Joined, "preactivation": PreActivation, "gated": Gated}
POLICIES = {
    "w8a8": BitPolicy(),
    "w4a4": BitPolicy(weight="lsq:4", act="lsq:4"),
    "w2a3": BitPolicy(weight="dsq:2", act="lsq_plus:3"),
    "dorefa": BitPolicy(weight="dorefa:8", act="mpact:6"),
    "a16": BitPolicy(weight={"method": "minmax", "bits": 8, "signed": False}, act="minmax:16"),
    "academic": BitPolicy(weight="minmax:4", act="minmax:4", placement="academic", input_bits=8),
    "academic_no_pool": BitPolicy(weight="lsq:5", act="lsq:5", placement="academic", input_bits=8, pool_bits=32),
}


SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def fuzzer():
    """The test program ``hqm_fuzz``, in which findings of both sanitizers are fatal."""
    return compiled("hqm_fuzz", (*RUNTIME, "hqm_fuzz.c"), *SANITIZERS)


def images(n: int, size: int = 12, seed: int = 0) -> Tensor:
    """(n, 3, size, size) float32 noise with some structure."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator) + torch.linspace(-1, 1, size)


def noise_set(generator: torch.Generator, n: int, split: str) -> data.ImageSet:
    """``n`` images of uniform noise for the networks of ``NETS``, labels 0 to 4 in turn."""
    spec = replace(data.SPECS["digits"], n_classes=5, in_shape=(3, 12, 12))
    pixels = torch.randint(0, 256, (n, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return data.ImageSet(pixels, torch.arange(n) % 5, spec, split, torch.arange(n))


def float_net(name: str, seed: int = 0) -> nn.Module:
    """A network of ``NETS`` in eval mode; batch norms with statistics, and gains of both signs."""
    torch.manual_seed(seed)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for i in range(8):
            net.train()(images(16, seed=i))
    return net.eval()


def quantized(name: str, policy: BitPolicy | str):
    """The network quantized and calibrated."""
    if (name, policy) == ("gated", "a16"):  # 16 by 16 bits is a product that int32 does not hold
        policy = replace(POLICIES["a16"], overrides={"hardsigmoid": {"act": 15}})
    policy = POLICIES[policy] if isinstance(policy, str) else policy
    qnet = quantize(float_net(name), policy, images(1))
    calibrate(qnet, images(32))
    return qnet.eval()


def random_layer(seed: int, *, conv: bool, x_dtype: str, w_dtype: str, residual: str | None, requantizer: str):
    """One layer of awkward sizes with random integers, as a whole record; multipliers that clip some outputs."""
    rng = np.random.default_rng(seed)
    groups = [1, 1, 2, 4][seed % 4] if conv else 1
    c_in, c_out = groups * int(rng.integers(1, 8)), groups * int(rng.integers(1, 24))
    if conv and seed % 8 == 3:
        groups = c_in = c_out = int(rng.integers(2, 40))
    k, s, d = (int(v) for v in rng.integers([1, 1, 1], [4, 3, 3]))
    shape = (c_in, 9, 21) if conv else (c_in,)
    one, big, wide = np.asarray(1.0, np.float32), {"uint8": 255, "uint16": 65535}[x_dtype], np.iinfo(w_dtype).max
    w_shape = (c_out, c_in // groups, k, k) if conv else (c_out, c_in)
    weight = rng.integers(-wide, wide + 1, w_shape).astype(w_dtype) // (64 if w_dtype == "int16" else 1)
    weight = weight.astype(w_dtype)
    pads = tuple(int(v) for v in rng.integers(0, 3, 4))
    acc = float(np.abs(weight.astype(float)).sum() / c_out * big / 400)
    first, second = np.full(c_out, 1 / acc), np.full(c_out, 0.5 / acc if residual == "int32" else 0.3)
    forms = requants((first.astype(np.float32), first), (second.astype(np.float32), second))
    both = forms if residual else (requants((first.astype(np.float32), first))[0], None)
    out_shape = (c_out,)
    if conv:
        sizes = [(n + a + b - d * (k - 1) - 1) // s + 1 for n, a, b in ((9, *pads[::2]), (21, *pads[1::2]))]
        out_shape = (c_out, *sizes)
    specs = [
        r.TensorSpec("image", shape, "float32", 32, 0, 0, one, 0) if conv
        else r.TensorSpec("image", (c_in, 1, 1), "float32", 32, 0, 0, one, 0),
        r.TensorSpec("q", shape if conv else (c_in, 1, 1), x_dtype, 16 if big > 255 else 8, 0, big, one, big // 3),
    ]  # fmt: skip
    ops: list[r.Op] = [r.Quantize("quantize", ("image",), "q")]
    x_name = "q"
    if not conv:
        specs.append(r.TensorSpec("flat", shape, x_dtype, specs[1].bits, 0, big, one, big // 3))
        ops.append(r.Reshape("flatten", ("q",), "flat"))
        x_name = "flat"
    scales = np.ones(c_out, np.float32)
    bias = rng.integers(-1000, 1000, c_out).astype(np.int32)

    def layer(name, out, requant, res):
        common = (weight, scales, bias, scales, 8, requant, res)
        inputs = (x_name,) if res is None else (x_name, res.tensor)
        if conv:
            return r.Conv(name, inputs, out, *common, (s, s), pads, (d, d), groups)
        return r.Linear(name, inputs, out, *common)

    res = None
    if residual:
        res_spec = {"int32": (32, -(2**31), 2**31 - 1, 0)}.get(residual, (8, 0, 255, 90))
        specs.append(r.TensorSpec("r", out_shape, residual, *res_spec[:3], one, res_spec[3]))
        ops.append(
            layer("other", "r", None if residual == "int32" else requants((first.astype(np.float32), first))[0], None)
        )
        res = r.Residual("r", both[1])
    specs.append(r.TensorSpec("y", out_shape, "uint8", 8, 7, 250, one, 100))
    ops.append(layer("layer", "y", both[0], res))
    image = rng.integers(-300 if big < 256 else -40000, 300 if big < 256 else 60000, (3, *specs[0].shape))
    model = r.IntegerModel(requantizer, {spec.name: spec for spec in specs}, tuple(ops), "image", "y")
    return model, image.astype(np.float32)


def all_pairs(seed: int, *, requantizer: str, add: bool):
    """Every pair of 255 uint8 values, scaled and summed by an Add or as a layer's residual: a record and its image.

    Multipliers are decimals of one or two digits: many sums lie on a tie or beside one, where another order of
    roundings gives another integer.
    """
    rng = np.random.default_rng(seed)
    channels, n, zero, one = 1 if add else 11, 255, 90, np.asarray(1.0, np.float32)
    first, second = rng.choice([0.05, 0.1, 0.25, 0.3, 0.35, 0.5], (2, channels))
    both = requants((first.astype(np.float32), first), (second.astype(np.float32), second))
    shape, names = (channels, n, n), ("across", "down", "y")
    specs = [r.TensorSpec("image", (1, n, n), "float32", 32, 0, 0, one, 0)]
    specs += [r.TensorSpec("q", (1, n, n), "uint8", 8, 0, 255, one, zero)]
    specs += [r.TensorSpec(name, shape, "uint8", 8, 0, 255, one, zero) for name in names]
    ops: list[r.Op] = [r.Quantize("quantize", ("image",), "q"), r.Concat("repeat", ("q",) * channels, "across", 0)]
    ops.append(r.Transpose("turn", ("across",), "down", (0, 2, 1)))
    if add:
        ops.append(r.Add("add", ("across", "down"), "y", both, np.float32(rng.choice([-8.5, 0.2, 3.15]))))
    else:
        weight, scales = np.eye(channels, dtype=np.int8)[:, :, None, None], np.ones(channels, np.float32)
        common = (weight, scales, np.zeros(channels, np.int32), scales, 8, both[0], r.Residual("down", both[1]))
        ops.append(r.Conv("layer", ("across", "down"), "y", *common, (1, 1), (0, 0, 0, 0), (1, 1), 1))
    image = np.broadcast_to(np.arange(n, dtype=np.float32) - zero, (1, 1, n, n))
    return r.IntegerModel(requantizer, {s.name: s for s in specs}, tuple(ops), "image", "y"), image.copy()


def random_moves(seed: int, *, dtype: str, requantizer: str):
    """A chain of operations that move or multiply integers, of random shapes and axes, as a record, and its images."""
    rng = np.random.default_rng(seed)
    big, one = np.iinfo(dtype).max, np.asarray(1.0, np.float32)
    grid = (dtype, 8 if big == 255 else 16, 0, big, one, big // 3)
    specs = [r.TensorSpec("image", (6, 5, 4), "float32", 32, 0, 0, one, 0), r.TensorSpec("t0", (6, 5, 4), *grid)]
    ops: list[r.Op] = [r.Quantize("quantize", ("image",), "t0")]

    def put(kind, inputs, shape, *settings):
        name = f"t{len(ops)}"
        specs.append(r.TensorSpec(name, tuple(int(n) for n in shape), *grid))
        ops.append(kind(f"op{len(ops)}", inputs, name, *settings))
        return name

    for _ in range(12):
        x, shape = specs[-1].name, specs[-1].shape
        ends = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in shape]
        match rng.choice(["reshape", "turn", "cut", "pad", "join", "gate", "table"]):
            case "reshape":
                left, sizes = math.prod(shape), []
                for _ in range(int(rng.integers(0, 4))):
                    sizes.append(int(rng.choice([n for n in range(1, left + 1) if left % n == 0])))
                    left //= sizes[-1]
                put(r.Reshape, (x,), [*sizes, left])
            case "turn":
                axes = tuple(rng.permutation(len(shape)).tolist())
                put(r.Transpose, (x,), [shape[a] for a in axes], axes)
            case "cut" if math.prod(shape) > 200:
                starts, stops = zip(*ends, strict=True)
                steps = tuple(rng.integers(1, 3, len(shape)).tolist())
                lengths = [len(range(*of)) for of in zip(starts, stops, steps, strict=True)]
                put(r.Slice, (x,), lengths, starts, stops, steps)
            case "pad" if math.prod(shape) < 2000:
                before, after = (tuple(rng.integers(0, 3, len(shape)).tolist()) for _ in range(2))
                put(r.Pad, (x,), np.array(shape) + before + after, before, after)
            case "join" if math.prod(shape) < 2000:
                axis, times = int(rng.integers(len(shape))), int(rng.integers(1, 4))
                put(r.Concat, (x,) * times, [n * (times if a == axis else 1) for a, n in enumerate(shape)], axis)
            case "gate":
                stops = tuple(n if rng.random() < 0.5 else 1 for n in shape)
                gate = put(r.Slice, (x,), stops, (0,) * len(shape), stops, (1,) * len(shape))
                forms = (np.array([1.5 / big], np.float32), np.array([1.5 / big]))
                put(r.Mul, (x, gate), shape, *requants(forms))
            case "table":
                put(r.Table, (x,), shape, rng.integers(0, big + 1, big + 1).astype(dtype))
    image = rng.integers(-big // 3, big - big // 3 + 1, (2, 6, 5, 4)).astype(np.float32)
    return r.IntegerModel(requantizer, {s.name: s for s in specs}, tuple(ops), "image", specs[-1].name), image
