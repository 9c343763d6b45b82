"""Sizes of a network: parameters, multiply-accumulates (MACs), and MAdds as seed 001 counts them."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_parameters(net: nn.Module) -> int:
    """Number of elements of all parameters; batch-norm statistics are buffers and do not count."""
    return sum(p.numel() for p in net.parameters())


def count_macs(net: nn.Module, in_shape: Sequence[int]) -> int:
    """MACs of the convolutions and matrix products for one image, without biases: half of PyTorch's own FLOPs.

        conv       C_out H_out W_out  k_h k_w  C_in / groups
        conv^T     C_in H_in W_in  k_h k_w  C_out / groups
        linear     n_in n_out, times the positions it is applied to

    Args:
        net:      any module; left as it was (mode, buffers).
        in_shape: (C, H, W) of one image.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a second's import that only this needs

    net = copy.deepcopy(net).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(next(net.parameters(), torch.zeros(())).new_zeros((1, *in_shape)))
    return counter.get_total_flops() // 2


def count_madds_thop(net: nn.Module, in_shape: Sequence[int]) -> int:
    """MAdds for one image in the convention of the package thop, which seed 001's tables use.

    MACs of ``count_macs``, plus 2 per element that a batch norm puts out, plus pooling *modules*: an ``AvgPool2d`` 1
    per output element, an ``AdaptiveAvgPool2d`` (window area + 1) per output element. Pools called as functions,
    activations and additions are free.

    Args:
        net:      any module; left as it was.
        in_shape: (C, H, W) of one image.
    """
    beside = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal beside
        if isinstance(module, _BatchNorm):
            beside += 2 * y.numel()
        elif isinstance(module, nn.AvgPool2d):
            beside += y.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            beside += y.numel() * (inputs[0][0, 0].numel() // y[0, 0].numel() + 1)

    net = copy.deepcopy(net)
    for module in net.modules():
        module.register_forward_hook(add)
    return count_macs(net, in_shape) + beside
