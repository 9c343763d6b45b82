"""Training where the network is: a step on the meta device, and what a GPU must keep."""

import contextlib
import dataclasses

import pytest
import torch
from graph_nets import Tiny, images, trained_like
from torch import nn

from hq_lib import data
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.training import TrainConfig, evaluate, fit
from hq_lib.training.loop import _Run

CONFIG = TrainConfig(epochs=1, lr=0.01, batch_size=4)


def qnet(method="lsq"):
    net = quantize(trained_like(Tiny()), BitPolicy(f"{method}:4", f"{method}:4"), images(1))
    calibrate(net, images(8))
    return net


@pytest.mark.parametrize("method", ["lsq", "dsq", "lsq_plus"])
def test_a_step_reads_no_value(method):
    """Loss, gradients and update on a device that has shapes alone: nothing waits for a number."""
    x, y = torch.empty(4, 3, 12, 12, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    run = _Run(qnet(method).to("meta"), [(x, y)], None, CONFIG, None, None, None, lambda _: None)
    run.net.train()
    loss = run._step(x, y)
    assert (loss.device.type, loss.shape) == ("meta", ())


class Stopped(BaseException):
    """What ends a process, as no library error does."""


@pytest.mark.gpu
def test_a_gpu_resumes_bit_for_bit(tmp_path):
    train, val = data.load("digits", "train", n=200), data.load("digits", "val")
    config, nets = dataclasses.replace(CONFIG, epochs=3, batch_size=50), []

    def stop(net, epoch):
        if epoch == 2:
            raise Stopped

    for folder, stops in (("whole", [None]), ("broken", [stop, None])):
        for before_epoch in stops:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).cuda()
            with contextlib.suppress(Stopped):
                fit(net, train, val, config, tmp_path / folder, before_epoch=before_epoch, say=None)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert evaluate(nets[0], val).n == len(val)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_through_quantizers_in_either_precision(precision):
    net = qnet().cuda()
    x, y = images(4), torch.arange(4)
    found = fit(net, [(x, y)], [(x, y)], dataclasses.replace(CONFIG, precision=precision), say=None)
    assert 0 <= found.val_acc_pct <= 100
