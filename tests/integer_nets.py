"""Small networks that between them use every operation a record has, with batch norms that have seen data."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.graph import BitPolicy, calibrate, quantize


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


NETS = {"residual": Residual, "mobile": Mobile, "joined": Joined, "preactivation": PreActivation}
POLICIES = {
    "w8a8": BitPolicy(),
    "w4a4": BitPolicy(weight="lsq:4", act="lsq:4", bn="fold_train"),
    "w2a3": BitPolicy(weight="dsq:2", act="lsq_plus:3"),
    "dorefa": BitPolicy(weight="dorefa:8", act="mpact:6"),
    "a16": BitPolicy(weight={"method": "minmax", "bits": 8, "signed": False}, act="minmax:16"),
    "academic": BitPolicy(weight="minmax:4", act="minmax:4", placement="academic", input_bits=8),
    "academic_no_pool": BitPolicy(weight="lsq:5", act="lsq:5", placement="academic", input_bits=8, pool_bits=32),
}


def images(n: int, size: int = 12, seed: int = 0) -> Tensor:
    """(n, 3, size, size) float32 noise with some structure."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator) + torch.linspace(-1, 1, size)


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
    policy = POLICIES[policy] if isinstance(policy, str) else policy
    qnet = quantize(float_net(name), policy, images(1))
    calibrate(qnet, images(32))
    return qnet.eval()
