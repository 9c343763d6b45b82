"""Random small networks of every kind of block, and random policies for them."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.graph import BitPolicy

SIZE = 12


class Block(nn.Module):
    """Convolutions and norms by name, put together by a function of them and the map."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.put = forward

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.put(self, x)


class Net(nn.Module):
    """Stem, blocks, average, dropout or not, one head or two."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw, torch_state = random.Random(seed), torch.get_rng_state()
        torch.manual_seed(seed)
        c = draw.choice([4, 6, 8])
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), draw.choice(ACTS)())
        kinds = [draw.choice(list(BLOCKS)) for _ in range(draw.randint(1, 4))]
        self.kinds, blocks = kinds, []
        for kind in kinds:
            block, c = BLOCKS[kind](draw, c)
            blocks.append(block)
        self.blocks, self.drop = nn.Sequential(*blocks), nn.Dropout(0.3)
        self.fc = nn.Linear(c, 5)
        self.aux = nn.Linear(c, 3) if draw.random() < 0.1 else None
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.0, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        with torch.no_grad():
            for i in range(4):
                self.train()(images(8, seed + i))
        self.eval()
        torch.set_rng_state(torch_state)

    def forward(self, x: Tensor):
        """(B, 3, H, W) -> (B, 5), or with it (B, 3)."""
        x = self.drop(self.blocks(self.stem(x)).mean((2, 3)))
        return self.fc(x) if self.aux is None else (self.fc(x), self.aux(x))


def images(n: int, seed: int) -> Tensor:
    """(n, 3, 12, 12) noise with some structure."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, SIZE, SIZE, generator=generator) + torch.linspace(-1, 1, SIZE)


ACTS = [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU]


def conv(c_in, c_out, k=3, **options):
    return nn.Conv2d(c_in, c_out, k, padding=k // 2, **options)


def residual(draw, c):
    down, stride = draw.random() < 0.5, draw.choice([1, 2])
    out = c + 2 if down else c
    parts = {"a": conv(c, out, stride=stride if down else 1, bias=False), "n": nn.BatchNorm2d(out), "b": conv(out, out),
             "m": nn.BatchNorm2d(out), "act": draw.choice(ACTS)()}  # fmt: skip
    if down:
        parts["s"] = conv(c, out, 1, stride=stride)
    relu = draw.random() < 0.7
    return Block(
        lambda s, x: (lambda y: F.relu(y) if relu else y)(s.m(s.b(s.act(s.n(s.a(x))))) + (s.s(x) if down else x)),
        **parts,
    ), out


def depthwise(draw, c):
    parts = {"e": conv(c, 2 * c, 1), "n": nn.BatchNorm2d(2 * c), "d": conv(2 * c, 2 * c, groups=2 * c, bias=False),
             "m": nn.BatchNorm2d(2 * c), "p": conv(2 * c, c, 1)}  # fmt: skip
    return Block(lambda s, x: x + s.p(F.relu6(s.m(s.d(F.relu6(s.n(s.e(x))))))), **parts), c


def grouped(draw, c):
    return Block(lambda s, x: F.relu(s.n(s.a(x))), a=conv(c, 2 * c, groups=2), n=nn.BatchNorm2d(2 * c)), 2 * c


def concat(draw, c):
    other = draw.choice([lambda x: x, lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1)])
    return Block(lambda s, x: torch.cat([F.relu(s.a(x)), other(x)], 1), a=conv(c, 4)), c + 4


def squeeze(draw, c):
    gate = draw.choice([torch.sigmoid, F.hardsigmoid])
    return Block(
        lambda s, x: x * gate(s.up(F.relu(s.down(F.adaptive_avg_pool2d(x, 1))))), down=conv(c, 2, 1), up=conv(2, c, 1)
    ), c


def in_place(draw, c):
    change = draw.choice([F.relu_, lambda y: F.relu(y, inplace=True), lambda y: y.clamp_(0, 2)])
    return Block(lambda s, x: (lambda y: s.b(change(y)) + y)(s.a(x)), a=conv(c, c), b=conv(c, c)), c


def shared(draw, c):
    return Block(lambda s, x: s.a(F.relu(s.n(s.a(x)))), a=conv(c, c), n=nn.BatchNorm2d(c)), c


def pre_activation(draw, c):
    return Block(lambda s, x: x + s.a(F.relu(s.n(x))), n=nn.BatchNorm2d(c), a=conv(c, c)), c


def pool(draw, c):
    k, stride = draw.choice([(3, 2), (2, 2), (3, 1)])
    kind, ceil = draw.choice([nn.MaxPool2d, nn.AvgPool2d]), draw.random() < 0.5
    return Block(lambda s, x: s.p(s.a(x)), a=conv(c, c), p=kind(k, stride, 1, ceil_mode=ceil)), c


def two_readers(draw, c):
    clip = draw.choice([F.relu6, lambda y: y.clamp(-0.5, 1.0), F.hardtanh])
    return Block(lambda s, x: (lambda y: clip(y) + y)(s.a(x)), a=conv(c, c)), c


def dropped(draw, c):
    return Block(lambda s, x: F.relu(s.a(F.dropout2d(x, 0.3, s.training))), a=conv(c, c)), c


def shuffled(draw, c):
    def forward(s, x):
        keep, change = x.chunk(2, 1)
        x = torch.cat([keep, F.relu(s.a(change))], 1)
        n, _, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    return (Block(forward, a=conv(c // 2, c // 2)), c) if c % 2 == 0 else dropped(draw, c)


def upsampled(draw, c):
    return Block(lambda s, x: F.interpolate(F.max_pool2d(F.relu(s.a(x)), 2, ceil_mode=True), size=x.shape[2:]) - x,
                 a=conv(c, c)), c  # fmt: skip


def dead(draw, c):
    """A channel of weights that is zero, a norm that gives zero, or a map that no pixel passes."""
    a, n = conv(c, c), nn.BatchNorm2d(c)
    with torch.no_grad():
        a.weight[draw.randrange(c)] = 0.0
    clip = draw.choice([F.relu, F.relu6, lambda y: F.relu(y - 1e4)])
    return Block(lambda s, x: clip(s.n(s.a(x))) + x, a=a, n=n), c


def dilated(draw, c):
    padding = draw.choice([(2, 2), (0, 2), "same"])
    options = {"dilation": 2, "groups": draw.choice([1, 2]) if c % 2 == 0 else 1}
    return Block(lambda s, x: F.hardswish(s.a(x)), a=nn.Conv2d(c, c, 3, padding=padding, **options)), c


def doubled(draw, c):
    return Block(lambda s, x: F.avg_pool2d(torch.cat([x, s.a(x), x], 1), 3, 1, 1, count_include_pad=False),
                 a=conv(c, 2)), 2 * c + 2  # fmt: skip


KINDS = (
    residual, depthwise, grouped, concat, squeeze, in_place, shared, pre_activation, pool, two_readers, dropped,
    shuffled, upsampled, dead, dilated, doubled,
)  # fmt: skip
BLOCKS = {kind.__name__: kind for kind in KINDS}


def policy(seed: int) -> BitPolicy:
    """Any methods that go together, 2 to 8 bits, either placement, norms kept or folded."""
    draw = random.Random(-seed - 1)
    weights = ["minmax", "lsq", "lsq_plus", "dsq", "dorefa"]
    acts = ["minmax", "lsq", "lsq_plus", "pact", "dsq", "mpact"]
    return BitPolicy(
        weight=f"{draw.choice(weights)}:{draw.randint(2, 8)}",
        act=f"{draw.choice(acts)}:{draw.randint(2, 8)}",
        first_last_bits=draw.choice([8, None]),
        stem_out_bits=draw.choice([None, 8]),
        input_bits=8,
        pool_bits=draw.choice([None, 8]),
        placement=draw.choice(["deploy", "academic"]),
        bn=draw.choice(["keep", "fold"]),
    )
