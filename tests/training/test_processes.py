"""Data-parallel training on the CPU: two gloo processes against one process, on the same global batches."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hq_lib import data
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.training import TrainConfig, fit

CONFIG = TrainConfig(epochs=3, lr=0.05, batch_size=40, pad=2, flip=True)


def splits():
    return data.load("digits", "train", n=200), data.load("digits", "val", n=100)


def qat_net(norm: bool) -> nn.Module:
    """Learned steps on weights and activations, with a batch norm or without one."""
    torch.manual_seed(0)
    between = nn.BatchNorm2d(8) if norm else nn.Identity()
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), between, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    x = data.normalize(splits()[0].images, splits()[0].spec)
    qnet = quantize(net, BitPolicy("lsq:4", "lsq:4", bn="keep"), x[:1])
    calibrate(qnet, x)
    return qnet


CHILD = """
import dataclasses, json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_processes import CONFIG, qat_net, quantize, splits, BitPolicy, fit, nn
from hq_lib.training import machine
folder = Path(sys.argv[1])
with machine.joined():
    own = folder / f"rank{{machine.rank()}}"
    own.mkdir()
    for norm in (False, True):
        net = qat_net(norm)
        if machine.rank():
            nn.init.zeros_(net.get_parameter("4.weight"))  # what the first process has counts
        found = fit(net, *splits(), CONFIG, folder / f"run{{norm}}", say=lambda line: (own / "said").write_text(line))
        torch.save(net.state_dict(), own / f"{{norm}}.pt")
        (own / f"{{norm}}.json").write_text(json.dumps(found.history))
    again = qat_net(True)
    fit(again, *splits(), CONFIG, folder / "runTrue", say=None)  # resumes after the last epoch
    torch.save(again.state_dict(), own / "again.pt")
    for how, config in (("uneven", dataclasses.replace(CONFIG, batch_size=25)), ("unfitted", CONFIG)):
        net = qat_net(False)
        if how == "unfitted":
            flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
            net = quantize(flat, BitPolicy("lsq:4", "lsq:4"), torch.zeros(1, 3, 32, 32))
        try:
            fit(net, *splits(), config, say=None)
        except ValueError as error:
            (own / how).write_text(str(error))
    machine.end_unless_first()
    (folder / "alone").write_text(str(machine.rank()))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_and_agree_to_the_last_bit(tmp_path):
    child = CHILD.format(tests=os.path.dirname(__file__))
    (tmp_path / "child.py").write_text(child)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, tmp_path / "child.py", tmp_path], check=True, timeout=600)
    first, second = tmp_path / "rank0", tmp_path / "rank1"
    for norm in (False, True):
        nets = [torch.load(folder / f"{norm}.pt", weights_only=True) for folder in (first, second)]
        nets.append(torch.load(tmp_path / f"run{norm}" / "state.pt", weights_only=True)["net"])
        for key, value in nets[0].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, nets[1][key]), key
                assert torch.equal(value, nets[2][key]), key
        ours, theirs = (json.loads((folder / f"{norm}.json").read_text()) for folder in (first, second))
        assert [row["train_loss"] for row in ours] == [row["train_loss"] for row in theirs]
        assert [row["val_loss"] for row in ours] == [row["val_loss"] for row in theirs]
        alone = qat_net(norm)
        one = [row["train_loss"] for row in fit(alone, *splits(), CONFIG, say=None).history]
        # each share's own batch statistics: 20 images instead of 40
        assert [row["train_loss"] for row in ours] == pytest.approx(one, rel=0.1 if norm else 1e-4)
    again = [torch.load(folder / "again.pt", weights_only=True) for folder in (first, second)]
    assert all(torch.equal(v, again[1][k]) and torch.equal(v, nets[0][k]) for k, v in again[0].items()
               if isinstance(v, torch.Tensor))  # fmt: skip
    assert "epoch 3/3" in (first / "said").read_text()
    assert not (second / "said").exists()
    for folder in (first, second):
        assert "25 images cannot be shared evenly by 2 processes" in (folder / "uneven").read_text()
        assert "has no grid yet" in (folder / "unfitted").read_text()
    assert (tmp_path / "alone").read_text() == "0"


def test_one_process_is_left_as_it_is():
    """Shares of one process are whole batches; the parts of several make up the batch, augmented as it is."""
    images = splits()[0]

    def walked(part: slice) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [x for x, _ in data.batches(images, 40, generator=generator, pad=2, flip=True, part=part)]

    whole, even, odd = walked(slice(None)), walked(slice(0, None, 2)), walked(slice(1, None, 2))
    for batch, a, b in zip(whole, even, odd, strict=True):
        assert torch.equal(batch[0::2], a)
        assert torch.equal(batch[1::2], b)
