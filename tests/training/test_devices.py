"""A training step on the meta device; ``tests/test_devices.py`` has what a GPU must keep."""

import pytest
import torch
from graph_nets import Tiny, images, trained_like

from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.quantizers import METHODS
from hq_lib.training import TrainConfig
from hq_lib.training.loop import _Run

CONFIG = TrainConfig(epochs=1, lr=0.01, batch_size=4)


def qnet(method="lsq"):
    net = quantize(trained_like(Tiny()), BitPolicy(f"{method}:4", f"{method}:4"), images(1))
    calibrate(net, images(8))
    return net


@pytest.mark.parametrize("method", [method for method in METHODS if method != "aciq"])  # it is never trained
def test_a_step_reads_no_value(method):
    """Loss, gradients and update on a device that has shapes alone: nothing waits for a number."""
    x, y = torch.empty(4, 3, 12, 12, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    run = _Run(qnet(method).to("meta"), [(x, y)], None, CONFIG, None, None, None, lambda _: None)
    run.net.train()
    loss = run._step(x, y)
    assert (loss.device.type, loss.shape) == ("meta", ())
