"""Quantizers work where their tensors are: a pass over the meta device, which has shapes and no values.

A step that reads a value (``.item()``, a branch on data) or makes a tensor on the CPU stops there; on a GPU the first
would wait for the device in every step, and the second fail. ``tests/test_devices.py`` has what a GPU must give.
"""

import pytest
import torch

from hq_lib.quantizers import METHODS, act_quantizer, weight_quantizer

CASES = [
    *(pytest.param(m, s, id=f"act-{m}-{s}") for m in METHODS for s in ("unsigned", "signed")),
    *(pytest.param(m, "weight", id=f"weight-{m}") for m in METHODS),
]


def fitted(method, role, x):
    quantizer = weight_quantizer(method, 4) if role == "weight" else act_quantizer(method, 4, signed=role == "signed")
    quantizer.train()(x)  # its first batch fits the grid, from values
    return quantizer


@pytest.mark.parametrize(
    ("method", "role"), [case for case in CASES if case.values[0] != "aciq"]
)  # it is never trained
def test_steps_read_no_values_and_make_nothing_on_another_device(method, role):
    x = torch.randn(8, 4, 6, 6)
    quantizer = fitted(method, role, x).to("meta")
    x = x.to("meta").requires_grad_()
    for mode in (True, False):
        y = quantizer.train(mode)(x)
        assert (y.device.type, y.shape) == ("meta", x.shape)
        y.sum().backward()
    assert all(p.grad is None or p.grad.device.type == "meta" for p in quantizer.parameters())
