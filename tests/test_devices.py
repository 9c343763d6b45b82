"""What a GPU must give, room by room; run where CUDA is, and here on a device that stands in for it (``pretend``).

The stand-in computes the CPU's bits, so there every comparison is of bits; on a GPU it is of rounding.
"""

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from graph_nets import Branches, Tiny, trained_like
from graph_nets import images as normal
from pretend import DEVICE, PRETENDED, compiler, waits
from test_command import NET, PTQ, RUN
from torch import Tensor, nn

from hq_lib import data, deploy, graph, integer, models, ptq
from hq_lib.crossbar import Adc, Circuit, Convolution, EngineNetwork, SimEngine, device
from hq_lib.data import batches, normalize
from hq_lib.deploy.edge_cloud.cuts import find_cuts, split_at
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.graph.modes import repeatable
from hq_lib.integer.comparison import agreement
from hq_lib.integer.storage import to_bytes
from hq_lib.ptq import selection
from hq_lib.ptq.bits import GridBank
from hq_lib.quantizers import METHODS, act_quantizer, straight_through, weight_quantizer
from hq_lib.results import paths, provenance
from hq_lib.studies import configuration, every, steps
from hq_lib.studies.ptq.recipes import RECIPES, fit_recipe
from hq_lib.training import TrainConfig, evaluate, fit, predict
from hq_lib.training.loop import _Run

TRAINED = [method for method in METHODS if method != "aciq"]
CONFIG = TrainConfig(epochs=2, lr=0.05, batch_size=40, pad=2)


@pytest.mark.skipif(DEVICE != "cuda" or compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("which", ["gpu and not slow", pytest.param("gpu and slow", marks=pytest.mark.slow)])
def test_every_test_of_a_gpu_passes_on_a_device_that_stands_in_for_one(which):
    """A tensor, index or generator made on another device than its tensor's ends it, and so does a step that waits."""
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", which, "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "HQ_DEVICE": "pretend", "HQ_FUSE": "0"}
    done = subprocess.run(tests, cwd=paths.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout.splitlines()[-1]


def alike(found: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """The same bits on the stand-in; on a GPU within ``tolerance`` of the largest value."""
    found, want = found.detach().cpu().double(), want.detach().cpu().double()
    assert found.shape == want.shape
    if PRETENDED:
        assert torch.equal(found, want)
    assert (found - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-6)


def digits(n: int = 200) -> tuple[data.ImageSet, data.ImageSet]:
    return data.load("digits", "train", n=n), data.load("digits", "val", n=100)


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, 10)
    )


def quantized(method: str, where: str = DEVICE):
    """``small`` through the quantizers of a method, calibrated on the CPU and moved."""
    train, _ = digits()
    x = normalize(train.images, train.spec)
    qnet = quantize(small(), BitPolicy(f"{method}:4", f"{method}:4", bn="keep"), x[:1])
    calibrate(qnet, x)
    return qnet.to(where)


# -- results, data, models ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_rows_name_the_device():
    name = "pretend of" if PRETENDED else torch.cuda.get_device_name()
    assert provenance.device(DEVICE).startswith(name)


@pytest.mark.gpu
def test_batches_of_images_that_lie_on_the_device_are_the_cpus_to_the_last_bit_and_nothing_waits():
    train, _ = digits()
    there = dataclasses.replace(train, images=train.images.to(DEVICE), labels=train.labels.to(DEVICE))
    walks = []
    for images, where in ((train, "cpu"), (there, DEVICE)):
        generator = torch.Generator().manual_seed(3)
        with waits() if where == DEVICE else contextlib.nullcontext(lambda: 0) as waited:
            walks.append(list(batches(images, 40, generator=generator, pad=2, flip=True, device=where)))
            assert waited() == 0
    for (x, y), (x_there, y_there) in zip(*walks, strict=True):
        assert x_there.device.type == y_there.device.type == DEVICE
        assert torch.equal(x, x_there.cpu())
        assert torch.equal(y, y_there.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lenet", "resnet20", "vgg_small", "toynet", "mobilenetv2"])
def test_networks_give_the_cpus_logits(name):
    net = models.build(name).eval()
    x = torch.randn(4, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
    y = torch.zeros(4, dtype=torch.int64)
    want = predict(net, [(x, y)])
    alike(predict(net.to(DEVICE), [(x, y)]), want)


# -- quantizers --------------------------------------------------------------------------------------------------------


def fitted(method, role, x):
    quantizer = weight_quantizer(method, 4) if role == "weight" else act_quantizer(method, 4, signed=role == "signed")
    quantizer.train()(x)  # its first batch fits the grid, from values
    return quantizer


@pytest.mark.gpu
@pytest.mark.parametrize("role", ["unsigned", "signed", "weight"])
@pytest.mark.parametrize("method", METHODS)
def test_integers_are_the_cpus_and_forward_is_on_their_grid(method, role):
    """At ties too (S24): values that lie half-way between two steps, by the grid's own scale, fused and not."""
    quantizer = fitted(method, role, torch.randn(8, 4, 6, 6)).eval()
    ties = (torch.arange(-40, 40) + 0.5).reshape(1, 1, 4, 20).repeat(8, 4, 1, 1) * quantizer.grid().scale
    want = quantizer.to_int(ties)
    there = quantizer.to(DEVICE)
    for _ in range(2):  # the second call may be fused
        y, found = there(ties.to(DEVICE)), there.to_int(ties.to(DEVICE))
        assert torch.equal(found.cpu(), want), straight_through._state
        grid = there.grid()
        assert torch.equal(y, grid.scale * (found - grid.zero_point)), straight_through._state


@pytest.mark.gpu
@pytest.mark.parametrize("role", ["unsigned", "signed", "weight"])
@pytest.mark.parametrize("method", TRAINED)
def test_gradients_are_the_cpus_and_a_step_waits_for_nothing(method, role):
    x = torch.randn(8, 4, 6, 6)
    here = fitted(method, role, x)
    there, grads = copy.deepcopy(here).to(DEVICE), []
    for quantizer, values in ((here, x.clone()), (there, x.to(DEVICE))):
        values.requires_grad_()
        with waits() if quantizer is there else contextlib.nullcontext(lambda: 0) as waited:
            quantizer(values).square().sum().backward()
            assert waited() == 0
        grads.append([values.grad, *(p.grad for p in quantizer.parameters() if p.grad is not None)])
    for want, found in zip(*grads, strict=True):
        alike(found, want)


# -- graph -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bn", ["fold", "keep"])
@pytest.mark.parametrize("net", [Tiny, Branches])
def test_a_net_quantized_and_saved_on_the_device_is_the_one_that_loads_on_the_cpu(net, bn, tmp_path):
    nets, float_net = [], trained_like(net())
    for where in ("cpu", DEVICE):
        qnet = quantize(copy.deepcopy(float_net).to(where), BitPolicy("minmax:8", "minmax:8", bn=bn), normal(1))
        calibrate(qnet, normal(16))
        nets.append(qnet)
    graph.save(nets[1], tmp_path / "there.safetensors")
    loaded, x = graph.load(tmp_path / "there.safetensors", net=net()), normal(4)
    assert torch.equal(loaded(x), copy.deepcopy(nets[1]).cpu()(x))
    for name, value in nets[0].state_dict().items():
        if "quantizer" in name and value.is_floating_point():
            alike(nets[1].state_dict()[name], value)
    assert np.corrcoef(nets[1](x.to(DEVICE)).detach().cpu().flatten(), nets[0](x).detach().flatten())[0, 1] > 0.99


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["float", "noise", "distilled", *TRAINED])
def test_an_epoch_waits_for_nothing_and_loses_what_the_cpu_loses(method):
    train, val = digits()
    change = {"noise": {"weight_noise": 0.03}, "distilled": {"distill": 0.5}}.get(method, {})
    config, losses = dataclasses.replace(CONFIG, **change), []
    for where in ("cpu", DEVICE):
        net = quantized(method, where) if method in TRAINED else small().to(where)
        teacher = small().to(where).eval() if method == "distilled" else None
        run = _Run(net, train, val, config, None, teacher, None, lambda _: None)
        run.net.train()
        run._epoch(0)
        if where == DEVICE:
            with waits() as waited:
                for x, y in run._walk(1):
                    run._step(x, y)
                assert waited() == 0
        net = quantized(method, where) if method in TRAINED else small().to(where)
        found = fit(net, train, val, config, teacher=teacher, say=None)
        losses.append(torch.tensor([row[key] for row in found.history for key in ("train_loss", "val_loss")]))
    alike(losses[1], losses[0], 0.3)  # masks and noise of a GPU are other draws


class Stopped(BaseException):
    """What ends a process, as no library error does."""


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["float", "lsq"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, method):
    train, val = digits()
    config, nets = dataclasses.replace(CONFIG, epochs=3), []

    def stop(net, epoch):
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.allow_tf32
        if epoch == 2:
            raise Stopped

    for folder, stops in (("whole", [None]), ("broken", [stop, None])):
        for before_epoch in stops:
            net = small().to(DEVICE) if method == "float" else quantized(method)
            with contextlib.suppress(Stopped):
                fit(net, train, val, config, tmp_path / folder, before_epoch=before_epoch, say=None)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert evaluate(nets[0], val).n == len(val)


@pytest.mark.gpu
@pytest.mark.skipif(PRETENDED, reason="the stand-in has no autocast")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile_it", [False, True])
def test_either_precision_trains_through_quantizers_compiled_or_not(precision, compile_it):
    config = dataclasses.replace(CONFIG, precision=precision, compile=compile_it)
    assert fit(quantized("lsq"), *digits(), config, say=None).val_acc_pct > 20  # chance is 10


# -- ptq ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["minmax", "percentile", "mse", "aciq_corrected", "aciq_allocated", "adaround", "brecq_fisher", "qdrop"]
)
def test_a_recipe_gives_as_good_a_network_and_its_integers(name):
    x, found = normal(32), []
    float_net = trained_like(Tiny())
    for where in ("cpu", DEVICE):
        qnet = quantize(copy.deepcopy(float_net).to(where), BitPolicy("minmax:4", "lsq_plus:4", bn="fold"), normal(1))
        size = {"iterations": 20, "batch_size": 8, "n_images": 32} if RECIPES[name].passes is not None else {}
        fit_recipe(qnet, x.to(where), RECIPES[name], seed=0, **size)
        with torch.no_grad():
            off = (qnet(x.to(where)).cpu() - float_net(x)).square().mean().sqrt() / float_net(x).std()
        record = integer.lower(qnet)
        assert to_bytes(record) == to_bytes(integer.lower(qnet.cpu()))
        assert torch.from_numpy(integer.run(record, x.numpy())).argmax(1).eq(qnet(x).argmax(1)).double().mean() > 0.8
        found.append((off, record))
    assert abs(found[0][0] - found[1][0]) < 0.1
    assert not PRETENDED or to_bytes(found[0][1]) == to_bytes(found[1][1])


@pytest.mark.gpu
def test_a_reconstruction_waits_no_more_for_more_iterations():
    counts = []
    for iterations in (5, 25):
        net = trained_like(Tiny()).to(DEVICE)
        qnet = quantize(net, BitPolicy("minmax:4", "lsq_plus:4", bn="fold"), normal(1))
        x = normal(32).to(DEVICE)
        ptq.fit_weights(qnet, "minmax")
        ptq.fit_acts(qnet, x, "minmax")
        config = ptq.ReconstructionConfig(iterations=iterations, batch_size=8, n_images=32)
        with waits() as waited:
            ptq.reconstruct(qnet, x, config)
            counts.append(waited())
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_scores_of_images_and_grids_at_several_bits_are_the_cpus():
    pixels = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    for metric in selection.METRICS:
        alike(selection.score(pixels.to(DEVICE), metric), selection.score(pixels, metric))
    net, x = trained_like(Tiny()), normal(16)
    answers = []
    for where in ("cpu", DEVICE):
        bank = GridBank(copy.deepcopy(net).to(where), x, [3, 8])
        answers.append(bank.assign(dict.fromkeys(bank.tensors, 3))(x.to(where)).detach().cpu())
    assert np.corrcoef(answers[0].flatten(), answers[1].flatten())[0, 1] > 0.99
    if PRETENDED:
        assert torch.equal(*answers)


# -- integer, deploy, crossbar -----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_integers_exports_halves_and_arrays_do_not_see_where_the_network_lay(tmp_path):
    qnet = quantize(trained_like(Tiny()).to(DEVICE), BitPolicy("minmax:8", "minmax:8", bn="fold"), normal(1))
    calibrate(qnet, normal(32))
    qnet.eval()
    record, x = integer.lower(qnet), normal(16)
    assert agreement(qnet, record, x).same_top1_pct > 90
    integer.round_biases(qnet)
    edge, cloud = split_at(qnet, find_cuts(qnet, normal(1).to(DEVICE))[2])
    with torch.no_grad(), repeatable():
        whole = qnet(x.to(DEVICE))
        assert torch.equal(cloud(edge(x.to(DEVICE))), whole)
    there, here = integer.lower(qnet), integer.lower(qnet.cpu())
    assert to_bytes(there) == to_bytes(here)
    files = [deploy.export(one, tmp_path / f"{i}.npz", "npz").read_bytes() for i, one in enumerate((there, here))]
    assert files[0] == files[1]
    want = integer.run(here, x.numpy())
    assert (torch.from_numpy(want).argmax(1) == whole.cpu().argmax(1)).double().mean() > 0.9
    on_arrays = [EngineNetwork(one, SimEngine(Circuit(device("rram")))).run(x.numpy()) for one in (there, here)]
    assert np.array_equal(*on_arrays)


@pytest.mark.gpu
@pytest.mark.parametrize("adc", [None, Adc(8)])
def test_engines_answer_tensors_there_with_the_same_numbers(adc):
    w, x = torch.randint(-127, 128, (8, 16, 3, 3)), torch.randint(0, 256, (20, 16, 6, 5)).to(torch.uint8)
    found = []
    for where in ("cpu", DEVICE):
        engine = SimEngine(Circuit(adc=adc))
        conv = Convolution(engine, w.to(where), torch.ones(8, device=where), "a", padding=1)
        rows = conv.rows(x[:2].to(where))[0].to(where)
        if adc is not None:
            engine.calibrate_adc(conv.groups[0], rows)
        engine.calibrate(conv.groups[0], rows, kind="gain")
        found += [conv(x.to(where)), engine.mvm(conv.groups[0], rows)]
    assert [y.device.type for y in found] == ["cpu", "cpu", DEVICE, DEVICE]
    assert torch.equal(found[0], found[2].cpu())
    assert torch.equal(found[1], found[3].cpu())


# -- studies -----------------------------------------------------------------------------------------------------------


SHORT = {
    "float_training": {"models": ["lenet"]}, "float_reference": {"models": ["lenet"]},
    "ptq_methods": {"recipes": ["qdrop"], "bits": [[4, 4]]}, "aciq_mse": {"bits": [4]}, "hybrid_bits": {"bits": [2, 8]},
    "qat": {"methods": ["pact"], "bits": [[4, 4]]},
    "selection_study": {"choices": ["random", "herding"]},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, study in every().items() if study.gpu])
def test_studies_measure_there_and_their_rows_say_so(name, out_dir):
    if name == "bit_allocation":
        every()["layer_sensitivity"].run("smoke", device=DEVICE)
    rows = every()[name].run("smoke", device=DEVICE, **SHORT.get(name, {}))
    assert len(rows) or name in ("selection_imagenet", "qat_group")  # pictures, networks that few machines have
    assert rows["device"].str.startswith(provenance.device(DEVICE)).all()


@pytest.mark.gpu
def test_the_verbs_train_quantize_and_test_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HQ_OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    if PRETENDED:
        monkeypatch.setattr(configuration, "check_known", lambda *_: None)  # which knows cpu and cuda
    trained = {**RUN, "device": DEVICE, "method": "float", "output": "net.safetensors"}
    rounded = {**PTQ, "device": DEVICE, "method": "qdrop", "bits": [4, 4], "output": "q.safetensors",
               "protocol": {"iterations": 5, "batch_size": 10}}  # fmt: skip
    through = {**RUN, "device": DEVICE, "method": "pact", "weights": "net.safetensors", "output": "t.safetensors"}
    for name, entries in (("float", trained), ("ptq", rounded), ("qat", through)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(entries))
    steps.trained(configuration.read("float.yaml"))
    steps.quantized(configuration.read("ptq.yaml"))
    steps.trained(configuration.read("qat.yaml"))
    run = configuration.read("ptq.yaml")
    for file in ("q.safetensors", "t.safetensors"):
        lines = list(steps.tested(run, tmp_path / file, integer=True))
        assert len(lines) == 3
    sys.modules.pop("mynet", None)
