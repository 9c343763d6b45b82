"""Sizes of a network: parameters, multiply-accumulates (MACs), and MAdds as seed 001 counts them.

Operations are counted by forward hooks on the modules, so a layer that runs twice counts twice, and an operation that
is called as a function (``F.avg_pool2d``) is invisible.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Rule = Callable[[nn.Module, Tensor, Tensor], int]


def count_parameters(net: nn.Module) -> int:
    """Number of elements of all parameters; batch-norm statistics are buffers and do not count."""
    return sum(p.numel() for p in net.parameters())


def count_macs(net: nn.Module, in_shape: Sequence[int]) -> int:
    """MACs of the convolutions and linear layers for one image, without biases.

        conv       C_out H_out W_out  k_h k_w  C_in / groups
        conv^T     C_in H_in W_in  k_h k_w  C_out / groups
        linear     n_in n_out, times the positions it is applied to

    Args:
        net:      any module; left as it was (mode, buffers, hooks).
        in_shape: (C, H, W) of one image.
    """
    return _count(net, in_shape, _macs)


def count_madds_thop(net: nn.Module, in_shape: Sequence[int]) -> int:
    """MAdds for one image in the convention of the package thop, which seed 001's tables use.

    MACs of ``count_macs``, plus 2 per element that a batch norm puts out, plus pooling *modules*: an ``AvgPool2d`` 1
    per output element, an ``AdaptiveAvgPool2d`` (window area + 1) per output element. Pools called as functions,
    activations and additions are free.

    Args:
        net:      any module; left as it was.
        in_shape: (C, H, W) of one image.
    """
    return _count(net, in_shape, _madds_thop)


def _madds_thop(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, _BatchNorm):
        return 2 * y.numel()
    if isinstance(module, nn.AvgPool2d):
        return y.numel()
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return y.numel() * (x[0, 0].numel() // y[0, 0].numel() + 1)
    return _macs(module, x, y)


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, _ConvTransposeNd):
        return x.numel() * module.weight[0].numel()
    if isinstance(module, _ConvNd):
        return y.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    return 0


def _count(net: nn.Module, in_shape: Sequence[int], rule: Rule) -> int:
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += rule(module, inputs[0], output)

    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if not list(module.children()) or isinstance(module, _ConvNd):
            module.register_forward_hook(add)
    with torch.no_grad():
        net(next(net.parameters(), torch.zeros(())).new_zeros((1, *in_shape)))
    return total
