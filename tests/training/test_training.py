import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hq_lib import data, models
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.quantizers import Tag, act_quantizer, parameter_tags, weight_quantizer
from hq_lib.studies.float_training import study as float_training
from hq_lib.training import TrainConfig, evaluate, fit, machine, predict, recipe, run_state
from hq_lib.training.config import lr_factor, parameter_groups, sgd
from hq_lib.training.evaluation import distance
from hq_lib.training.recipes import RECIPES, find

CONFIG = TrainConfig(epochs=3, lr=0.05, batch_size=50, pad=2, flip=False)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def splits():
    return data.load("digits", "train", n=400), data.load("digits", "val")


def test_it_learns_real_digits(splits):
    net = small_net()
    before = evaluate(net, splits[1]).acc_pct
    result = fit(net, *splits, dataclasses.replace(CONFIG, epochs=12), say=None)
    assert result.val_acc_pct > max(80, before)
    assert result.val_acc_pct == evaluate(net, splits[1]).acc_pct


def test_evaluate_equals_a_loop(splits):
    net, images = small_net().eval(), splits[1]
    x = data.normalize(images.images, images.spec)
    with torch.no_grad():
        logits = torch.stack([net(one[None])[0] for one in x])
    got = evaluate(net, images, batch_size=64)
    assert got.n == len(images)
    assert got.acc_pct == pytest.approx(100 * (logits.argmax(1) == images.labels).double().mean().item(), abs=1e-9)
    assert got.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    torch.testing.assert_close(predict(net, images), logits, atol=1e-5, rtol=1e-4)


def test_evaluate_restores_each_mode(splits):
    net = small_net().train()
    net[1].eval()
    evaluate(net, splits[1])
    assert net.training
    assert not net[1].training


def test_evaluate_refuses_nothing(splits):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(small_net(), splits[1].subset([]))


def test_one_step_is_sgd_with_nesterov(splits):
    """Against the update written out: v = g + wd w; w -= lr (v + m v) for the first step."""
    config = TrainConfig(epochs=1, lr=0.1, batch_size=400, pad=0, flip=False, weight_decay=0.01)
    net, by_hand = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), nn.Linear(3072, 10)
    by_hand.load_state_dict(net[1].state_dict())
    x = data.normalize(splits[0].images, splits[0].spec).flatten(1)
    F.cross_entropy(by_hand(x), splits[0].labels).backward()
    fit(net, *splits, config, say=None)
    w, g = by_hand.weight, by_hand.weight.grad + 0.01 * by_hand.weight
    torch.testing.assert_close(net[1].weight, w - 0.1 * 1.9 * g, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(net[1].bias, by_hand.bias - 0.1 * 1.9 * by_hand.bias.grad, atol=1e-6, rtol=1e-5)


def test_same_seed_same_digits(splits):
    first, second, other = small_net(), small_net(), small_net()
    fit(first, *splits, CONFIG, say=None)
    fit(second, *splits, CONFIG, say=None)
    fit(other, *splits, dataclasses.replace(CONFIG, seed=1), say=None)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training import CONFIG, small_net, dataclasses, data, fit
net = small_net()
config = dataclasses.replace(CONFIG, epochs=5, compile=sys.argv[3] == "compiled")
fit(net, data.load("digits", "train", n=400), data.load("digits", "val"), config, Path(sys.argv[1]),
    say=lambda line: print(line, flush=True))
torch.save(net.state_dict(), sys.argv[2])
"""


def child(tmp_path, name, how):
    run = [str(tmp_path / name), str(tmp_path / f"{name}.pt"), how]
    command = [sys.executable, "-c", CHILD.format(tests=os.path.dirname(__file__)), *run]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}  # empty: both processes compile at once
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | cache)


@pytest.mark.parametrize("how", ["plain", pytest.param("compiled", marks=pytest.mark.slow)])
def test_killed_and_restarted_beside_another_run_ends_bit_identical(tmp_path, how):
    whole, broken = child(tmp_path, "whole", how), child(tmp_path, "broken", how)
    for line in broken.stdout:
        if line.startswith("epoch 2/"):
            time.sleep(0.05)  # somewhere inside epoch 3
            broken.send_signal(signal.SIGKILL)
            break
    broken.wait()
    broken.stdout.close()
    assert whole.communicate(timeout=240)[0].count("validation") == 5
    assert not (tmp_path / "broken.pt").exists()
    resumed = child(tmp_path, "broken", how)
    assert "resumed after epoch" in resumed.communicate(timeout=240)[0]
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    log = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5]


def test_a_folder_of_another_run_is_refused(splits, tmp_path):
    fit(small_net(), *splits, dataclasses.replace(CONFIG, epochs=1), tmp_path, say=None)
    with pytest.raises(ValueError, match=r"lr: 0\.05 then, 0\.07 now"):
        fit(small_net(), *splits, dataclasses.replace(CONFIG, epochs=1, lr=0.07), tmp_path, say=None)


def test_a_run_from_before_a_setting_existed_goes_on(splits, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    done = fit(small_net(), *splits, config, tmp_path, say=None)
    identity = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del identity["weight_noise"]
    (tmp_path / "config.json").write_text(json.dumps(identity))
    assert fit(small_net(), *splits, config, tmp_path, say=None).history == done.history
    with pytest.raises(ValueError, match="weight_noise"):
        fit(small_net(), *splits, dataclasses.replace(config, weight_noise=0.1), tmp_path, say=None)


def test_two_processes_do_not_train_in_one_folder(splits, tmp_path):
    """The second, here one inside the first, is refused; the first ends as it would have."""

    def second(net, epoch):
        with pytest.raises(ValueError, match="another process trains in"):
            fit(net, *splits, CONFIG, tmp_path, say=None)

    config, disturbed = dataclasses.replace(CONFIG, epochs=1), small_net()
    alone = copy.deepcopy(disturbed)
    fit(disturbed, *splits, config, tmp_path, before_epoch=second, say=None)
    fit(alone, *splits, config, say=None)
    assert all(torch.equal(a, b) for a, b in zip(disturbed.parameters(), alone.parameters(), strict=True))


def test_a_damaged_state_says_what_to_delete(splits, tmp_path):
    fit(small_net(), *splits, dataclasses.replace(CONFIG, epochs=1), tmp_path, say=None)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete"):
        fit(small_net(), *splits, dataclasses.replace(CONFIG, epochs=1), tmp_path, say=None)


def test_what_before_epoch_freezes_stays_frozen_for_the_epoch(splits):
    means = []

    def freeze(net, epoch):
        means.append(net[1].running_mean.clone())
        if epoch >= 1:
            net[1].eval()

    net = small_net()
    fit(net, *splits, CONFIG, before_epoch=freeze, say=None)
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2])
    assert torch.equal(means[2], net[1].running_mean)


def test_divergence_names_epoch_and_the_rate_to_lower(splits):
    with pytest.raises(FloatingPointError, match=r"epoch 1 at learning rate 1e\+20: lower config\.lr"):
        fit(small_net(), *splits, dataclasses.replace(CONFIG, lr=1e20), say=None)


@pytest.mark.parametrize("dead", [True, False])
def test_a_training_that_learns_nothing_says_so_from_its_second_epoch_on(splits, dead):
    net, said = small_net(), []
    if dead:
        net.register_forward_hook(lambda *given: 0 * given[-1])  # equal logits, whatever the image
    fit(net, *splits, dataclasses.replace(CONFIG, lr=0.05), say=said.append)
    told = [i for i, line in enumerate(said) if "loss of guessing (2.303): nothing is learned" in line]
    assert [said[i - 1].split(":")[0] for i in told] == (["epoch 2/3", "epoch 3/3"] if dead else [])


def test_the_schedule_against_its_closed_form():
    cosine = TrainConfig(epochs=10, lr=1.0, warmup_epochs=1)
    assert lr_factor(9, 10, cosine) == pytest.approx(10 / 11)
    assert lr_factor(10, 10, cosine) == 1.0
    assert lr_factor(55, 10, cosine) == pytest.approx(0.5)
    assert lr_factor(99, 10, cosine) == pytest.approx(0.5 * (1 - math.cos(math.pi / 90)), rel=1e-6)


def test_no_weight_decay_on_norms_and_biases():
    groups = parameter_groups(small_net(), CONFIG)
    decayed = [p.ndim for g in groups for p in g["params"] if g["weight_decay"] > 0]
    assert decayed == [4, 2]
    assert sum(len(g["params"]) for g in groups) == 6


def test_norms_and_biases_of_any_shape_are_not_decayed():
    class NormedLinear(nn.Linear):
        """No norm, whatever its name begins with."""

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Flatten(), nn.Bilinear(144, 144, 2))
    net.classifier = NormedLinear(2, 2)
    net.position_bias = nn.Parameter(torch.zeros(2, 2))
    names = {id(p): name for name, p in net.named_parameters()}
    decayed = {names[id(p)] for g in parameter_groups(net, CONFIG) for p in g["params"] if g["weight_decay"] > 0}
    assert decayed == {"0.weight", "3.weight", "classifier.weight"}


@pytest.mark.parametrize("act", ["float", "pact:4", "lsq:4"])
@pytest.mark.parametrize("name", ["resnet20", "toynet", "vgg11", "lenet", "mobilenetv2_seed"])
def test_in_the_shipped_networks_all_matrices_and_kernels_are_decayed_and_clips(name, act):
    net = models.build(name)
    if act != "float":
        c, size = (1, 28) if name == "lenet" else (3, 32)
        net = quantize(net, BitPolicy(act.replace("pact", "dorefa"), act), torch.zeros(1, c, size, size))
    tags = parameter_tags(net)
    wanted = {name for name, p in net.named_parameters() if (tags[name].decay if name in tags else p.ndim > 1)}
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for g in parameter_groups(net, CONFIG) for p in g["params"] if g["weight_decay"] > 0} == wanted


@pytest.mark.parametrize("act", ["pact:4", "lsq:4"])
def test_the_history_has_the_schedules_rate_whatever_the_clips_have(splits, act):
    qnet = quantize(small_net(), BitPolicy("dorefa:4", act), torch.zeros(1, 3, 32, 32))
    few = splits[0].balanced(100, 0)
    done = fit(qnet, few, None, dataclasses.replace(CONFIG, epochs=2), say=None)
    assert [row["lr"] for row in done.history] == [CONFIG.lr * lr_factor(step, 2, done.config) for step in (1, 3)]


def test_tensors_of_five_axes_train_too(splits):
    net = small_net()
    net.register_buffer("grid", torch.zeros(1, 1, 1, 1, 1))
    fit(net, splits[0].balanced(100, 0), None, dataclasses.replace(CONFIG, epochs=1), say=None)
    assert next(net.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_a_folder_of_another_network_says_what_differs_and_stays(splits, tmp_path):
    few, config = splits[0].balanced(100, 0), dataclasses.replace(CONFIG, epochs=1)
    made = {
        act: quantize(small_net(), BitPolicy("minmax:8", act), torch.zeros(1, 3, 32, 32)) for act in ("lsq:4", "lsq:3")
    }
    fit(made["lsq:4"], few, None, config, tmp_path, say=None)
    with pytest.raises(ValueError, match=r"holds another run \(.*act 0: saved lsq:4, here lsq:3.*another folder"):
        fit(made["lsq:3"], few, None, config, tmp_path, say=None)


def test_groups_hold_every_learned_parameter_once():
    quantizers = [
        act_quantizer("pact", 4, signed=False), act_quantizer("lsq_plus", 4, signed=True),
        act_quantizer("lsq_plus", 4, signed=False), weight_quantizer("dsq", 4),
    ]  # fmt: skip
    net = nn.Sequential(nn.Linear(4, 4), *quantizers)
    ids = [id(p) for group in parameter_groups(net, CONFIG) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert parameter_tags(net)["1.alpha"] == Tag(0.1, True)
    assert "2.beta" in parameter_tags(net)
    assert "3.beta" not in parameter_tags(net)  # the unsigned one is fixed at 0


def test_a_quantizers_parameters_follow_their_tags():
    clip = act_quantizer("pact", 4, signed=False)
    tag = clip.tags["alpha"]
    groups = sgd(nn.Sequential(nn.Linear(2, 2), clip), CONFIG).param_groups
    [group] = [g for g in groups if any(p is clip.alpha for p in g["params"])]
    assert group["lr_factor"] == tag.lr_factor
    assert group["weight_decay"] == (CONFIG.weight_decay if tag.decay else 0)
    assert sum(len(g["params"]) for g in groups) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("precision", "fp8"), ("epochs", 0), ("distill", 1.5), ("compile", "yes")],
)
def test_bad_configuration_names_the_key(key, value):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{key}"):
        dataclasses.replace(CONFIG, **{key: value})


def test_recipes_know_their_names():
    assert recipe("resnet20", "full", seed=2)[1].seed == 2
    assert recipe("resnet20", "smoke")[2] == 256
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        recipe("resnet", "full")
    with pytest.raises(ValueError, match="unknown profile"):
        recipe("resnet20", "fast")


def test_recipes_build_the_networks_that_they_are_for():
    for name in RECIPES:
        found = find(name)
        spec = data.SPECS[found.dataset]
        sizes = {"n_classes": spec.n_classes, "in_channels": spec.in_shape[0]}
        assert models.build(found.network or name, **sizes, **found.options)


def test_the_first_seed_of_the_study_is_the_long_run_and_a_recipe_is_one_for_all_seeds():
    ours = [p.what.epochs for p in float_training.points(float_training.PLANS["full"]) if p["model"] == "resnet20"]
    assert ours == [200, 100, 100]
    assert [recipe("resnet20", "full", seed=seed)[1].epochs for seed in (0, 1, 2)] == [200] * 3


def test_what_is_no_accuracy_is_not_told_as_one(digits):
    dead = small_net()
    with torch.no_grad():
        next(dead.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(dead, digits)
    few = dataclasses.replace(digits, spec=dataclasses.replace(digits.spec, n_classes=3))
    with pytest.warns(UserWarning, match="3 classes, the network 10 outputs"):
        evaluate(small_net(), few)
    with pytest.raises(ValueError, match="a tuple: one tensor of logits"):
        evaluate(nn.LSTM(32, 10), [(torch.zeros(2, 3, 32), torch.zeros(2, dtype=torch.int64))])


def test_a_folder_in_which_no_epoch_was_finished_is_free(splits, tmp_path):
    train, val = splits
    run_state.begin(tmp_path, {"epochs": 99})
    fit(small_net(), train, val, CONFIG, tmp_path, say=None)
    with pytest.raises(ValueError, match="another run"):
        run_state.begin(tmp_path, {"epochs": 99})


AUTO = dataclasses.replace(CONFIG, precision="auto", compile="auto")


def settled(config, stored=None, n_steps=10**6):
    said, net = [], nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    batch = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 1])
    return machine.settled(config, net, lambda: batch, n_steps=n_steps, stored=stored or {}, say=said.append), said


def test_auto_becomes_a_choice_and_what_a_run_began_with_stands(monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(machine, "compiling_wins", lambda *_, **__: True)
    assert settled(AUTO)[0] == dataclasses.replace(AUTO, precision="bfloat16", compile=True)
    assert settled(AUTO, {"precision": "float32", "compile": False})[0] == CONFIG
    assert settled(CONFIG, {"precision": "bfloat16", "compile": True})[0] == CONFIG  # asked for by name
    assert settled(AUTO, n_steps=10)[0].compile is False


@pytest.mark.parametrize(("slowness", "wins"), [(0.5, True), (2.0, False)])
def test_the_faster_of_plain_and_compiled_is_taken(monkeypatch, slowness, wins):
    """On a clock that ticks once a plain forward pass, and ``slowness`` times in a compiled one."""
    now = [0.0]

    def tick(by):
        now[0] += by

    class Net(nn.Linear):
        def forward(self, x):
            tick(1.0)
            return super().forward(x)

    def compiled(net):
        return lambda x: (tick(slowness - 1.0), net(x))[1]

    monkeypatch.setattr(machine, "compiled", compiled)
    monkeypatch.setattr(machine, "_clock", lambda device: now[0])
    net, x = Net(4, 2), torch.randn(3, 4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    got = machine.compiling_wins(net, x, torch.tensor([0, 1, 1]), precision="float32", say=lambda _: None)
    assert got is wins
    assert net.weight.grad is None
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_without_a_compiler_auto_trains_uncompiled_and_says_so(monkeypatch):
    def no_compiler(net, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    config, said = settled(AUTO)
    assert config.compile is False
    assert len(said) == 1
    assert "no C++ compiler" in said[0]


def test_a_resumed_run_keeps_the_choice_it_began_with(splits, tmp_path, monkeypatch):
    config = dataclasses.replace(AUTO, epochs=2)
    for bfloat16 in (True, False):  # the second call is the run on another machine
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device, has=bfloat16: has)
        said = []
        done = fit(small_net(), *splits, config, tmp_path, say=said.append)
        assert any("emulates bfloat16" in line for line in said) is not bfloat16
        assert (done.config.precision, done.config.compile) == ("bfloat16", False)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["precision"] == "bfloat16"
    assert fit(small_net(), *splits, config, say=None).config.precision == "float32"


@pytest.mark.parametrize("compile_it", [False, True])
def test_strided_depthwise_layers_alone_keep_float32_in_bfloat16(compile_it):
    torch.manual_seed(0)
    strided, plain = nn.Conv2d(4, 4, 3, stride=2, groups=4), nn.Conv2d(4, 4, 3, groups=4)
    x = torch.randn(2, 4, 9, 9)
    with machine.autocast(x.device, "bfloat16"):
        got = (machine.compiled(strided) if compile_it else strided)(x), plain(x)
    assert [y.dtype for y in got] == [torch.bfloat16] * 2
    assert torch.equal(got[0], strided(x).bfloat16())
    got[0].sum().backward()
    weight = strided.weight.grad.clone()
    strided.zero_grad()
    strided(x).sum().backward()
    torch.testing.assert_close(weight, strided.weight.grad, rtol=1e-6, atol=1e-6)  # bfloat16's would differ by 1e-3
    assert not torch.equal(got[1], plain(x).bfloat16())


def test_compiled_and_plain_differ_by_rounding_alone(splits):
    plain, fast = small_net(), small_net()
    for net, compile_it in ((plain, False), (fast, True)):
        net[3].p = 0.0  # compiled code draws other masks
        fit(net, *splits, dataclasses.replace(CONFIG, epochs=1, compile=compile_it), say=None)
    for mine, theirs in zip(plain.state_dict().values(), fast.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4)


def test_batches_serve_as_well_as_images(splits):
    """A list of the batches of one epoch, against the images themselves."""
    config = dataclasses.replace(CONFIG, epochs=1, pad=0)
    train = list(data.batches(splits[0], 50, generator=torch.Generator().manual_seed(0)))
    val = list(data.batches(splits[1], 64))
    by_images, by_batches = small_net(), small_net()
    whole = fit(by_images, *splits, config, say=None)
    piecewise = fit(by_batches, train, val, config, say=None)
    assert torch.equal(by_images[0].weight, by_batches[0].weight)
    assert piecewise.val_acc_pct == whole.val_acc_pct == evaluate(by_batches, val).acc_pct
    assert torch.equal(predict(by_images, val), predict(by_images, splits[1], batch_size=64))
    with pytest.raises(ValueError, match="DataLoader or a list"):
        fit(small_net(), iter(train), val, config, say=None)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(by_images, iter([]))


def test_all_images_may_be_trained_on(splits, tmp_path):
    done = fit(small_net(), splits[0], None, dataclasses.replace(CONFIG, epochs=2), tmp_path, say=None)
    assert math.isnan(done.val_acc_pct)
    assert "val_acc_pct" not in done.history[0]


def test_a_run_from_when_there_were_more_settings_goes_on(splits, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    done = fit(small_net(), *splits, config, tmp_path, say=None)
    identity = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    gone = {"momentum": 0.9, "schedule": "cosine", "milestones": [0.5, 0.75], "ema_decay": None, "keep": "last"}
    (tmp_path / "config.json").write_text(json.dumps({**identity, **gone}))
    assert fit(small_net(), *splits, config, tmp_path, say=None).history == done.history
    (tmp_path / "config.json").write_text(json.dumps({**identity, **gone, "schedule": "step"}))
    with pytest.raises(ValueError, match="schedule: 'step' then"):
        fit(small_net(), *splits, config, tmp_path, say=None)


def test_the_teachers_distance_is_kullback_and_leiblers():
    logits, taught = torch.randn(5, 10), torch.randn(5, 10)
    target = taught.softmax(1)
    divergence = (target * (target.log() - logits.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(distance(logits, taught), divergence)
    torch.testing.assert_close(distance(taught, taught), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_one_step_beside_a_teacher(splits):
    """Against (1 - share) CE + share KL written out; the teacher, in eval mode meanwhile, stays as it was."""
    config = TrainConfig(epochs=1, lr=0.1, batch_size=400, pad=0, flip=False, weight_decay=0.0, distill=0.3)
    net, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)) for _ in range(2))
    teacher = teacher.append(nn.Dropout(0.5)).eval()
    by_hand, kept = copy.deepcopy(net), copy.deepcopy(teacher.state_dict())
    x = data.normalize(splits[0].images, splits[0].spec)
    log_p, target = by_hand(x).log_softmax(1), teacher(x).detach().softmax(1)
    divergence = (target * (target.log() - log_p)).sum(1).mean()
    (0.7 * F.nll_loss(log_p, splits[0].labels) + 0.3 * divergence).backward()
    fit(net, *splits, config, teacher=teacher.train(), say=None)
    torch.testing.assert_close(net[1].weight, by_hand[1].weight - 0.19 * by_hand[1].weight.grad, atol=1e-6, rtol=1e-5)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(kept[key], value) for key, value in teacher.state_dict().items())
    for wrong in ({"teacher": teacher}, {}):
        with pytest.raises(ValueError, match="distill"):
            fit(net, *splits, dataclasses.replace(config, distill=0.0 if wrong else 0.3), say=None, **wrong)


def test_nothing_to_train_on_and_labels_without_an_output_are_refused(digits):
    config = TrainConfig(epochs=1, lr=0.1, batch_size=8)
    with pytest.raises(ValueError, match="digits trainval is empty"):
        fit(models.build("resnet20"), digits.subset([]), digits.subset([0]), config)
    some = digits.subset(list(range(16)))
    narrow = models.build("resnet20", n_classes=3)
    for run in (lambda: evaluate(narrow, some), lambda: fit(narrow, some, some, config)):
        with pytest.raises(ValueError, match=r"label \d of a network with 3 outputs.*n_classes"):
            run()
    unlabelled = dataclasses.replace(some, labels=torch.full_like(some.labels, -1))
    with pytest.raises(ValueError, match="put pictures into class folders"):
        evaluate(models.build("resnet20"), unlabelled)


class Viewed(nn.Module):
    """As tutorials write it: a ``view`` over rows and columns, which no tensor in channels-last order takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        return self.fc(x.view(x.size(0), -1))


class Flattened(Viewed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).contiguous().flatten(1))


def test_a_network_with_a_view_trains_and_is_tested_and_keeps_its_order(splits):
    few, config = splits[0].balanced(100, 0), dataclasses.replace(CONFIG, epochs=1)
    torch.manual_seed(0)
    viewed, flattened = Viewed(), Flattened()
    flattened.load_state_dict(viewed.state_dict())
    losses = [fit(net, few, splits[1], config, say=None).history[0]["val_loss"] for net in (viewed, flattened)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert viewed.conv.weight.is_contiguous()
    assert not flattened.conv.weight.is_contiguous()
    assert viewed(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    qnet = quantize(viewed, BitPolicy(), data.normalize(few.images[:1], few.spec))
    calibrate(qnet, few)
    x = data.normalize(splits[1].images[:50], few.spec)
    torch.testing.assert_close(qnet.eval()(x), viewed.eval()(x.contiguous()), atol=0.05, rtol=0.05)
    before = qnet.get_parameter("conv.weight").clone()
    fit(qnet, few, None, config, say=None)
    assert not torch.equal(qnet.get_parameter("conv.weight"), before)


class Together(Viewed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        return self.fc(x.view(x.size(0) // 2, 2, -1).flatten(0, 1))


class InTraining(Viewed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        return self.fc((x.view(x.size(0), -1) if self.training else x).flatten(1))


@pytest.mark.parametrize("kind", [Together, InTraining])
def test_views_over_the_batch_and_in_training_alone_train(kind, splits):
    net = kind()
    fit(net, splits[0].balanced(20, 0), None, dataclasses.replace(CONFIG, epochs=1, batch_size=10), say=None)
    assert net.conv.weight.is_contiguous()


def test_the_look_for_views_leaves_the_network_and_the_walk_alone():
    class Counting(Viewed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("first", torch.tensor(-1.0))
            self.register_buffer("n", torch.tensor(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.first.copy_(torch.where(self.n == 0, x[0, 0, 0, 0], self.first))
                self.n += len(x)
            return self.fc(F.relu(self.conv(x)).flatten(1))

    class Shards:
        shard = 0

        def __len__(self) -> int:
            return 1

        def __iter__(self):
            self.shard += 1
            yield torch.full((4, 3, 32, 32), float(self.shard)), torch.zeros(4, dtype=torch.long)

    net, shards = Counting(), Shards()
    fit(net, shards, None, dataclasses.replace(CONFIG, epochs=2), say=None)
    assert (net.first, net.n, shards.shard) == (1, 8, 2)


def test_a_look_at_the_first_batch_leaves_the_order_of_a_loader(splits):
    few = splits[0].balanced(20, 0)
    pairs = torch.utils.data.TensorDataset(data.normalize(few.images, few.spec), few.labels)
    loader = torch.utils.data.DataLoader(pairs, 5, shuffle=True, generator=torch.Generator().manual_seed(1))
    other = torch.utils.data.DataLoader(pairs, 5, shuffle=True, generator=torch.Generator().manual_seed(1))
    fit(small_net(), loader, None, dataclasses.replace(CONFIG, epochs=1), say=None)
    list(other)
    assert torch.equal(loader.generator.get_state(), other.generator.get_state())
