"""Small networks with every shape a quantized graph must handle; used by the graph tests."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Inverted(nn.Module):
    """An inverted residual: 1x1, depthwise 3x3, linear 1x1; an identity where the shape allows it."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(c_in, 2 * c_in, 1, bias=False), nn.BatchNorm2d(2 * c_in)
        self.depthwise = nn.Conv2d(2 * c_in, 2 * c_in, 3, stride, 1, groups=2 * c_in, bias=False)
        self.bn2, self.act = nn.BatchNorm2d(2 * c_in), nn.ReLU6()
        self.project, self.bn3 = nn.Conv2d(2 * c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        y = self.act(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        y = self.bn3(self.project(y))
        return x + y if self.skip else y


class Tiny(nn.Module):
    """Stem, three inverted residuals (the middle one without identity), pool, dropout, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1))
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(self.drop(self.pool(x).view(x.size(0), -1)))


class Branches(nn.Module):
    """Concatenation of a convolution and a max-pool, a shared tensor, a gate, a transposed convolution, a linear+BN."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.gate, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.fc1, self.bn, self.fc2 = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        x = F.relu(self.a(x))
        x = torch.cat([self.b(x), F.max_pool2d(x, 3, 1, 1)], dim=1)
        x = F.relu(self.up(x * torch.sigmoid(self.gate(x))))
        return self.fc2(F.relu(self.bn(self.fc1(F.avg_pool2d(x, x.shape[2:]).flatten(1)))))


def trained_like(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``net`` in eval mode with batch-norm statistics and gains as a trained network has them."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return net.eval()


def images(n: int = 4, size: int = 12, seed: int = 1) -> Tensor:
    """(n, 3, size, size) normal pixels, the same for the same seed."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
