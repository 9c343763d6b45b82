"""The network file: equal outputs to the last bit, in this process and a fresh one, or a refusal by name."""

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_nets import Branches, Tiny, images, trained_like
from torch import nn

from hq_lib import data, graph, integer, models, ptq
from hq_lib.graph import BitPolicy, PolicyError, QuantizeError, calibrate, quantize, weight_layers
from hq_lib.models import CheckpointError
from hq_lib.ptq.bits import GridBank
from hq_lib.quantizers import FixedGrid, FrozenWeight, Quantizer
from hq_lib.results import paths
from hq_lib.results.bits import pack, unpack
from hq_lib.training import recipes

METHODS = ("minmax", "dorefa", "dorefa_hw", "pact", "mpact", "lsq", "lsq_plus", "dsq")


class Small(nn.Module):
    """A stem with its norm, a depthwise convolution around which the image skips, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.deep, self.fc = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        x = self.bn(self.stem(x)).relu()
        return self.fc((x + self.deep(x)).mean((2, 3)))


NETS = {"Tiny": Tiny, "Branches": Branches, "Small": Small}


def fitted(policy: BitPolicy, net: type[nn.Module] = Small) -> graph.QuantizedNet:
    qnet = quantize(trained_like(net()), policy, images(1))
    calibrate(qnet, images())
    return qnet


def both_forms(qnet, folder, name="net"):
    """Save in both forms, load again, compare; returns the two files."""
    files = []
    for form in ("frozen", "trainable"):
        file = graph.save(qnet, folder / f"{name}_{form}.safetensors", form=form)
        again = graph.load(str(file), net=NETS[qnet.meta["network"]]())
        assert torch.equal(again(images(3, seed=7)), qnet.eval()(images(3, seed=7)))
        files.append(file)
    return files


GRID = set(itertools.product((None, 0), (1, 2, 3, 4, 5, 6, 7, 8, 16)))
FEW = [(0, 1), (None, 3), (0, 16)]  # signs, codes that fill no byte, two bytes a code


@pytest.mark.parametrize(
    ("axis", "bits"), [*FEW, *(pytest.param(*each, marks=pytest.mark.slow) for each in sorted(GRID - {*FEW}, key=str))]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_to_the_last_bit(tmp_path, method, axis, bits):
    weight = {"method": method, "bits": bits, "axis": axis}
    both_forms(fitted(BitPolicy(weight, f"{method}:{bits}", bn="fold" if bits % 2 else "keep")), tmp_path)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_training_recipe_comes_back_with_its_options(tmp_path, method):
    both_forms(fitted(recipes.qat_recipe(method, 3, 3, "full").policy), tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("axis", [None, 0])
def test_affine_weights_and_branches_come_back(tmp_path, axis, bits):
    weight = {"method": "minmax", "bits": bits, "axis": axis, "signed": False}
    both_forms(fitted(BitPolicy(weight, f"lsq_plus:{bits}"), Branches), tmp_path)


@pytest.fixture(scope="module")
def steps_of_ptq():
    """Name -> a network after that step of post-training quantization."""
    x, few, nets = images(16), {"iterations": 4, "batch_size": 8, "n_images": None}, {}
    torch.manual_seed(0)
    for scheme in ("affine", "symmetric"):
        policy = BitPolicy("minmax:3", "lsq_plus:3", placement="academic", bn="fold")
        qnet = quantize(trained_like(Small()), policy, x[:1])
        ptq.fit_weights(qnet, "mse", scheme=scheme)
        ptq.fit_acts(qnet, x, "mse")
        nets[f"ranges, {scheme}"] = copy.deepcopy(qnet)
        for config in (ptq.adaround, ptq.brecq, ptq.qdrop):
            nets[f"{config.__name__}, {scheme}"] = done = copy.deepcopy(qnet)
            ptq.reconstruct(done, x, config(**few))
        ptq.correct_moments(qnet, x)
        nets[f"corrected, {scheme}"] = qnet
    qnet = quantize(trained_like(Small()), BitPolicy("minmax:4", "lsq_plus:4", bn="fold"), x[:1])
    ptq.fit_allocated(qnet)
    ptq.fit_acts(qnet, x, "aciq")
    nets["allocated"] = copy.deepcopy(qnet)
    ptq.correct_moments(qnet, x)
    nets["allocated and corrected"] = copy.deepcopy(qnet)
    integer.round_biases(qnet)
    nets["biases rounded"] = qnet
    return nets


def test_every_step_of_ptq_comes_back_and_lowers_to_the_same_integers(tmp_path, steps_of_ptq):
    for name, qnet in steps_of_ptq.items():
        frozen, _ = both_forms(qnet, tmp_path)
        again = graph.load(frozen, net=Small())
        for layer, before in weight_layers(qnet).items():
            after = weight_layers(again)[layer]
            assert type(after.weight_quantizer) is FrozenWeight, name
            w_int, grid = after.weight_quantizer.integers(after.weight)
            quantizer = before.weight_quantizer
            assert isinstance(quantizer, Quantizer)
            assert torch.equal(w_int, quantizer.to_int(before.weight)), name
            assert torch.equal(after.weight, grid.scale * (w_int - grid.zero_point)), name
        assert all(type(q) is FixedGrid for q in graph.act_quantizers(again).values())
        columns = ["layer", "tensor", "method", "bits", "scale", "macs", "size_KiB"]
        assert again.policy.report(again)[columns].equals(qnet.policy.report(qnet)[columns])
        if name.startswith(("allocated", "biases")):
            assert integer.to_bytes(integer.lower(again)) == integer.to_bytes(integer.lower(qnet))


def test_a_fitted_network_does_not_load_into_a_fresh_one_as_another():
    """GridWeight and MinMaxWeight had the same keys: the loaded network quietly computed its ranges anew."""
    x = images(8)
    qnet = quantize(trained_like(Tiny()), BitPolicy("minmax:3", "lsq_plus:3", bn="fold"), x[:1])
    fresh = copy.deepcopy(qnet)
    ptq.fit_weights(qnet, "mse")
    ptq.fit_acts(qnet, x, "mse")
    with pytest.raises(ValueError, match=r"stem\.weight_quantizer.*FixedGrid.*MinMaxWeight.*graph\.save"):
        fresh.load_state_dict(qnet.state_dict())


FRESH = """
import pickle, sys
from pathlib import Path
import torch
sys.path[:0] = [{tests!r}, {tests!r} + "/graph"]
from test_network_file import NETS, images
from hq_lib import graph
for file, of, want in pickle.loads(Path({index!r}).read_bytes()):
    qnet = torch.load(file, weights_only=False) if file.endswith(".pt") else graph.load(file, net=NETS[of]())
    print(int((qnet.eval()(images(3, seed=7)) != want).sum()))
"""


def unequal_in_a_fresh_process(index, folder) -> list[int]:
    """Output values that differ, for each (file, network, wanted outputs), where nothing else ran before."""
    (folder / "index").write_bytes(pickle.dumps(index))
    script = FRESH.format(tests=str(paths.ROOT / "tests"), index=str(folder / "index"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=paths.ROOT)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_fresh_process_gives_the_same_bits(tmp_path, steps_of_ptq):
    """Files of every method and every step of PTQ, and pickles of whole networks, opened where nothing else ran."""
    nets = dict(steps_of_ptq)
    for i, method in enumerate(METHODS):
        policy = BitPolicy({"method": method, "bits": 1 + i, "axis": [None, 0][i % 2]}, f"{method}:{1 + i}")
        nets[method] = fitted(policy, [Small, Branches][i % 2])
    index = []
    for i, qnet in enumerate(nets.values()):
        of, want = qnet.meta["network"], qnet.eval()(images(3, seed=7)).detach()
        index += [(str(file), of, want) for file in both_forms(qnet, tmp_path, str(i))]
        torch.save(qnet, tmp_path / f"{i}.pt")
        index.append((str(tmp_path / f"{i}.pt"), of, want))
    assert unequal_in_a_fresh_process(index, tmp_path) == [0] * len(index)


STEPS = ("minmax", "percentile", "mse", "aciq", "aciq_official", "corrected", "adaround", "brecq", "qdrop")
SYMMETRIC_ONLY = ("dorefa", "dorefa_hw", "pact", "mpact")


def after_calibration(method: str, bits: int, axis: int | None, scheme: Any) -> graph.QuantizedNet:
    """A small network whose weights and activations are on the grids of a training method."""
    weight = {"method": method, "bits": bits, "axis": axis, "signed": scheme == "symmetric"}
    return fitted(BitPolicy(weight, f"{method}:{bits}", bn="fold"))


def after_ptq(method: str, bits: int, axis: int | None, scheme: Any) -> graph.QuantizedNet:
    """A small network after a range method, a reconstruction (on L2.4 ranges), or moment correction."""
    x, weight = images(8), {"method": "minmax", "bits": bits, "axis": axis}
    policy = BitPolicy(weight, f"lsq_plus:{bits}", first_last_bits=None, bn="fold")
    qnet = quantize(trained_like(Small()), policy, x[:1])
    ranges: Any = "mse" if method in ("adaround", "brecq", "qdrop", "corrected") else method
    ptq.fit_weights(qnet, ranges, scheme=scheme)
    ptq.fit_acts(qnet, x, ranges)
    if method == "corrected":
        ptq.correct_moments(qnet, x)
    elif ranges != method:
        ptq.reconstruct(qnet, x, getattr(ptq, method)(iterations=2, batch_size=4, n_images=None))
    return qnet


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("made", "method"), [(after_calibration, m) for m in METHODS] + [(after_ptq, m) for m in STEPS]
)
def test_every_method_comes_back_in_a_fresh_process_over_the_whole_grid(tmp_path, made, method):
    """Symmetric and affine, per tensor and per channel, 1 to 8 and 16 bits, both forms; what is refused says why."""
    index, n_refused = [], 0
    for scheme, axis, bits in itertools.product(("symmetric", "affine"), (None, 0), (1, 2, 3, 4, 5, 6, 7, 8, 16)):
        no_range = made is after_ptq and bits == 1  # two levels have no range to choose
        if no_range or (made is after_calibration and method in SYMMETRIC_ONLY and scheme == "affine"):
            with pytest.raises((QuantizeError, graph.PolicyError), match="2 bits or more" if no_range else "unsigned"):
                made(method, bits, axis, scheme)
            n_refused += 1
            continue
        qnet = made(method, bits, axis, scheme)
        want = qnet.eval()(images(3, seed=7)).detach()
        index += [(str(file), "Small", want) for file in both_forms(qnet, tmp_path, f"{scheme}_{axis}_{bits}")]
    assert len(index) == 2 * (36 - n_refused)
    assert unequal_in_a_fresh_process(index, tmp_path) == [0] * len(index)


def test_shipped_checkpoints_open_by_name_with_their_records():
    files = sorted(paths.checkpoints_dir().glob("resnet20_*_w*_s0.safetensors"))
    assert files
    for file in files:
        qnet = graph.load(file)
        assert not qnet.training
        assert qnet.record["acc_pct"]["test"] > 86
        assert len(qnet.record["sha256"]) == 64
        assert qnet.record["images"]["mean"] == pytest.approx(data.SPECS["cifar10"].mean)


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_exact_and_without_gaps(bits):
    rng = np.random.default_rng(bits)
    for n in (0, 1, 7, 8, 1000, 2**20 + 3):
        values = rng.integers(0, 2**bits, n, dtype=np.int64)
        raw = pack(values, bits)
        assert len(raw) == -(-n * bits // 8)
        assert np.array_equal(unpack(raw, bits, n), values)
    with pytest.raises(ValueError, match="bytes"):
        unpack(raw[:-1], bits, n)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    file = graph.save(fitted(BitPolicy("lsq:4", "lsq:4")), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"net\.safetensors.*own \(Small\).*net="):
        graph.load(file)
    with pytest.raises(CheckpointError, match=r"net\.safetensors.*computes 'stem.*"):
        graph.load(file, net=Tiny())
    models.save_checkpoint(
        tmp_path / "float.safetensors", models.build("lenet"),
        {"model": "lenet", "options": {}, "dataset": "mnist", "n_classes": 10, "in_channels": 1},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"float\.safetensors.*models\.load_checkpoint"):
        graph.load(tmp_path / "float.safetensors")
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing"):
        graph.load(tmp_path / "absent.safetensors")


def test_a_pickled_network_keeps_graph_names_and_shapes():
    qnet = fitted(BitPolicy("lsq:4", "lsq:4"), Branches)
    file = io.BytesIO()
    torch.save(qnet, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert [(n.name, n.meta.get("shape")) for n in again.graph.nodes] == [
        (n.name, n.meta.get("shape")) for n in qnet.graph.nodes
    ]
    assert again.policy == qnet.policy
    assert [b.name for b in graph.blocks(again)] == [b.name for b in graph.blocks(qnet)]
    assert again.policy.report(again).equals(qnet.policy.report(qnet))
    assert json.dumps(again.bits_record()) == json.dumps(qnet.bits_record())


def a_policy(rng) -> BitPolicy:
    """A policy that fits any of ``NETS``, drawn at random: methods, bits, axes, placement, norms, overrides."""
    width = lambda: int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 16, 32]))  # noqa: E731
    weight = {"method": str(rng.choice(METHODS)), "bits": width()}
    if rng.random() < 0.5:
        weight["axis"] = [None, 0][rng.integers(2)]
    if weight["method"] == "minmax" and weight["bits"] > 1 and rng.random() < 0.3:
        weight["signed"] = False
    overrides = {}
    for kind, base in (("weight", weight["method"]), ("act", None)):
        if rng.random() < 0.5:
            overrides["*c*" if kind == "weight" else "*a*"] = {kind: f"{base or rng.choice(METHODS)}:{width()}"}
    return BitPolicy(
        weight, f"{rng.choice(METHODS)}:{width()}", first_last_bits=[None, 8, 32, 4][rng.integers(4)],
        stem_out_bits=[None, 8][rng.integers(2)], placement=["deploy", "academic"][rng.integers(2)],
        bn=["keep", "fold"][rng.integers(2)], overrides=overrides,
    )  # fmt: skip


def unequal_bits(seed: int, folder: Path) -> int:
    """How many output values of a random small network under a random policy differ after both forms of its file."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net, x = trained_like(list(NETS.values())[rng.integers(3)](), seed), images(4, seed=seed)
    policy = a_policy(rng)
    try:
        qnet = quantize(net, policy, x[:1])
    except PolicyError as error:  # an override of one of several joined tensors
        if "shares its grid" not in str(error):
            raise
        qnet = quantize(net, dataclasses.replace(policy, overrides={}), x[:1])
    calibrate(qnet, x)
    if rng.random() < 0.3:  # some steps of training, in which each quantizer moves
        optimizer = torch.optim.SGD(qnet.train().parameters(), 1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            qnet(x).square().mean().backward()
            optimizer.step()
    found, want = 0, qnet.eval()(images(3, seed=7))
    for form in ("frozen", "trainable"):
        file = graph.save(qnet, folder / "net.safetensors", form=form)
        found += int((graph.load(file, net=type(net)())(images(3, seed=7)) != want).sum())
    return found


@pytest.mark.parametrize("first", range(0, int(os.environ.get("HQ_FUZZ", "30")), 10))
def test_random_policies_of_random_networks_come_back(tmp_path, first):
    """``HQ_FUZZ=500`` draws five hundred."""
    assert sum(unequal_bits(seed, tmp_path) for seed in range(first, first + 10)) == 0


def test_training_goes_on_from_the_trainable_form_as_from_the_network(tmp_path):
    x, trained = images(8), []
    qnet = fitted(BitPolicy("lsq:3", "dsq:3"))
    again = graph.load(graph.save(qnet, tmp_path / "net.safetensors", form="trainable"), net=Small())
    for net in (qnet, again):
        optimizer = torch.optim.SGD(net.train().parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        trained.append(net.state_dict())
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())


def test_a_frozen_network_refuses_to_be_trained(tmp_path):
    again = graph.load(graph.save(fitted(BitPolicy("lsq:3", "lsq:3")), tmp_path / "net.safetensors"), net=Small())
    with pytest.raises(RuntimeError, match=r"of 'stem'.*integers cannot be trained"):
        again.train()(images(2))


def test_mixed_bits_of_a_bank_bit_lists_and_a_hybrid_come_back(tmp_path):
    x, net = images(8), trained_like(Small())
    bank = GridBank(net, x, (2, 3, 8))
    qnet = bank.assign({tensor: (2, 3, 8, 32)[i % 4] for i, tensor in enumerate(bank.tensors)})
    both_forms(qnet, tmp_path)
    rows = qnet.policy.report(qnet)
    assert rows.set_index(["tensor", "layer"]).bits["weight", "stem"] == 2
    policy = BitPolicy.hybrid(4, 3, qat="dsq", ptq="minmax", overrides={"deep": {"weight": 2}})
    both_forms(fitted(policy), tmp_path)
    resnet = trained_like(models.build("resnet20"))
    policy = BitPolicy.from_lists(resnet, (8,) * 9, (4, 2, 8) * 3)
    qnet = quantize(resnet, policy, images(1, 32))
    calibrate(qnet, images(2, 32))
    again = graph.load(graph.save(qnet, tmp_path / "lists.safetensors", record={"model": "resnet20"}))
    assert torch.equal(again(images(2, 32, seed=3)), qnet(images(2, 32, seed=3)))
    assert again.policy == policy


def test_the_record_says_where_the_network_is_from(tmp_path):
    manifest = tmp_path / "sel_1.json"
    manifest.write_text("{}")
    said = {"method": "lsq", "images": data.SPECS["cifar10"], "manifest": manifest, "acc_pct": {"test": 12.5}}
    file = graph.save(fitted(BitPolicy("lsq:3", "lsq:3")), tmp_path / "net.safetensors", record=said)
    record = graph.load(file, net=Small()).record
    assert record["class"] == "Small"
    assert record["acc_pct"] == {"test": 12.5}
    assert record["images"]["std"] == [*data.SPECS["cifar10"].std]
    assert record["manifest"] == {"file": "sel_1.json", "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert BitPolicy.from_dict(record["policy"]) == BitPolicy("lsq:3", "lsq:3")
    assert {"git_sha", "versions"} <= record.keys()
    again = graph.load(graph.save(graph.load(file, net=Small()), tmp_path / "twice.safetensors"), net=Small())
    assert {**again.record, "sha256": ""} == {**record, "sha256": ""}


def test_what_cannot_come_back_is_refused_by_name(tmp_path):
    file, policy = tmp_path / "net.safetensors", BitPolicy("lsq:3", "lsq:3")
    with pytest.raises(QuantizeError, match=r"graph\.quantize.*models\.save_checkpoint"):
        graph.save(Small(), file)
    with pytest.raises(QuantizeError, match=r"_act_quantizer'.*calibrate"):
        graph.save(quantize(Small().eval(), policy, images(1)), file)
    off = fitted(policy)
    graph.set_quantization(
        off, weights=False, acts=True, only=lambda q: q is weight_layers(off)["deep"].weight_quantizer
    )
    with pytest.raises(QuantizeError, match=r"'deep'.*switched off"):
        graph.save(off, file)
    other = fitted(policy)
    weight_layers(other)["deep"].weight_quantizer = weight_layers(fitted(BitPolicy("lsq:5", "lsq:3")))[
        "deep"
    ].weight_quantizer
    with pytest.raises(QuantizeError, match=r"'deep'.*5 bit.*policy"):
        graph.save(other, file, form="trainable")
    with pytest.raises(QuantizeError, match=r"'stem\.weight'|'deep\.weight'|float64"):
        graph.save(fitted(policy).double(), file)
    with pytest.raises(QuantizeError, match=r"resnet20.*does not build this network"):
        graph.save(fitted(policy), file, record={"model": "resnet20"})
    with pytest.raises(CheckpointError, match=r"net\.pt.*\.safetensors"):
        graph.save(fitted(policy), tmp_path / "net.pt")
    assert not file.exists()


def test_a_file_changed_anywhere_is_refused_or_the_same(tmp_path):
    """Random bytes, cut ends, and records and tensors changed under a right hash: the library's errors only."""
    rng = np.random.default_rng(0)
    qnet = fitted(BitPolicy({"method": "lsq", "bits": 3, "axis": 0}, "lsq:3"))
    file, changed = graph.save(qnet, tmp_path / "net.safetensors"), tmp_path / "changed.safetensors"
    whole, want = file.read_bytes(), qnet.eval()(images(2))
    for _ in range(60):
        content = bytearray(whole[: int(rng.integers(len(whole)))] if rng.random() < 0.2 else whole)
        for place in rng.integers(0, max(len(content), 1), 2):
            content[place : place + 1] = bytes([int(rng.integers(256))])
        changed.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            assert torch.equal(graph.load(changed, net=Small())(images(2)), want)
    tensors, record = models.read_checkpoint(file)
    odd = [None, -1, 3, 1.5, "x", [], {}, [1, 2], {"kind": "AdaRound"}, True, 10**9]
    places = [(record, key) for key in record] + [(e, key) for e in record["quantizers"].values() for key in e]
    for holder, key in places:
        kept = holder[key]
        for value in (odd[i] for i in rng.integers(len(odd), size=1)):
            holder[key] = value
            models.write_checkpoint(changed, tensors, record)
            with contextlib.suppress(CheckpointError):
                graph.load(changed, net=Small())
        holder[key] = kept
    for key, value in list(tensors.items())[::4]:
        for other in (
            value.double(),
            value.reshape(-1)[:1],
            value.new_zeros(3, 2),
            torch.full_like(value.float(), -1.0),
        ):
            models.write_checkpoint(changed, {**tensors, key: other}, record)
            with contextlib.suppress(CheckpointError):
                graph.load(changed, net=Small())


def test_a_network_in_channels_last_comes_back_in_channels_last(tmp_path):
    qnet = fitted(BitPolicy("lsq:4", "lsq:4"))
    qnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    again = graph.load(graph.save(qnet, tmp_path / "net.safetensors", form="trainable"), net=Small())
    assert weight_layers(again)["stem"].weight.is_contiguous(memory_format=torch.channels_last)
    x = images(3, seed=7).contiguous(memory_format=torch.channels_last)
    assert torch.equal(again(x), qnet.eval()(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_network_of_one_channel_is_frozen_as_it_computes(method, tmp_path):
    """Such weights are in both orders of memory at once, and by the order a convolution takes one way to sum or two."""
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    qnet = quantize(models.build("lenet").eval(), BitPolicy(f"{method}:4", "lsq_plus:4"), x[:1])
    calibrate(qnet, x)
    qnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    again = graph.load(graph.save(qnet, tmp_path / "net.safetensors", record={"model": "lenet"}))
    assert torch.equal(again(x), qnet.eval()(x))


def test_four_bits_take_half_a_byte(tmp_path):
    qnet = quantize(models.build("resnet20").eval(), BitPolicy("minmax:4", "lsq:4"), images(1, 32))
    calibrate(qnet, images(2, 32))
    n = sum(layer.weight.numel() for layer in weight_layers(qnet).values())
    size = graph.save(qnet, tmp_path / "net.safetensors", record={"model": "resnet20"}).stat().st_size
    assert size < n / 2 + 60_000


def test_a_file_from_when_views_were_no_reshapes_still_opens(tmp_path):
    class Viewed(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).view(x.size(0), -1))

    net, x = Viewed(nn.Conv2d(3, 4, 3), nn.Linear(144, 2)), torch.randn(4, 3, 8, 8)
    qnet = quantize(net, BitPolicy(), x[:1])
    calibrate(qnet, x)
    tensors, record = models.read_checkpoint(graph.save(qnet.eval(), tmp_path / "new.safetensors"))
    views = [line.replace("call_method reshape", "call_method view") for line in record["graph"]]
    assert views != record["graph"]
    models.write_checkpoint(tmp_path / "old.safetensors", tensors, {**record, "graph": views})
    assert torch.equal(graph.load(tmp_path / "old.safetensors", net=net)(x), qnet(x))


def test_a_file_that_gave_other_tensors_a_grid_says_that_it_is_older(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    qnet = quantize(net, BitPolicy(), x := torch.randn(4, 3, 8, 8))
    calibrate(qnet, x)
    tensors, record = models.read_checkpoint(graph.save(qnet.eval(), tmp_path / "new.safetensors"))
    more = {**record["quantizers"], "float_1_act_quantizer": next(iter(record["quantizers"].values()))}
    models.write_checkpoint(tmp_path / "old.safetensors", tensors, {**record, "quantizers": more})
    with pytest.raises(
        models.CheckpointError, match=r"older version.*'float_1_act_quantizer'.*quantize the network ag"
    ):
        graph.load(tmp_path / "old.safetensors", net=net)
