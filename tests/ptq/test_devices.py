"""Reconstruction on a GPU: as good a network comes out as on the CPU."""

import copy

import pytest
import torch
from graph_nets import Tiny, images, trained_like

from hq_lib import ptq
from hq_lib.graph import BitPolicy, calibrate, quantize


@pytest.mark.gpu
def test_a_gpu_reconstructs_what_the_cpu_does():
    qnet = quantize(trained_like(Tiny()), BitPolicy("minmax:4", "minmax:8", bn="fold"), images(1))
    calibrate(qnet, images(16))
    x, losses = images(32), []
    for device in ("cpu", "cuda"):
        net = copy.deepcopy(qnet).to(device)
        ptq.reconstruct(net, x, ptq.ReconstructionConfig(iterations=50, batch_size=8, n_images=32))
        net.cpu()
        with torch.no_grad():
            losses.append(float((net(x) - qnet(x)).square().mean().sqrt() / qnet(x).std()))
    assert abs(losses[0] - losses[1]) < 0.1
