"""Mixed precision: the integer program against brute force, costs by hand, and the bank against quantizing afresh."""

import itertools

import numpy as np
import pytest
import torch
from graph_nets import Tiny, trained_like
from torch import nn

from hq_lib import models, ptq
from hq_lib.graph import BitPolicy, QuantizeError, calibrate, quantize, set_quantization, state, weight_layers
from hq_lib.graph.tracing import eval_mode
from hq_lib.ptq.bits import (
    Cost,
    GridBank,
    at_random,
    bop_cost,
    greedy,
    optimal,
    size_cost,
    uniform,
)

BITS = (2, 3, 4, 8)
TENSORS = ("weight a", "weight b", "weight c", "act a", "act b")
ALONE = Cost("KiB", {"weight a": 1.0, "weight b": 4.0, "weight c": 9.0, "act a": 0.5, "act b": 0.5})
PAIRS = Cost("BOP", {"weight a": 8.0}, {("weight b", "act a"): 3.0, ("weight c", "act b"): 5.0})


def table(seed):
    rng = np.random.default_rng(seed)
    return {t: {b: float(rng.lognormal(0, 2) * 4.0**-b) for b in BITS} for t in TENSORS}


def brute_force(losses, cost, budget):
    best = np.inf
    for chosen in itertools.product(BITS, repeat=len(TENSORS)):
        bits = dict(zip(TENSORS, chosen, strict=True))
        if cost.of(bits) <= budget:
            best = min(best, sum(losses[t][b] for t, b in bits.items()))
    return best


@pytest.mark.parametrize("cost", [ALONE, PAIRS], ids=["size", "products"])
@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e6], ids=["nat", "1e-7 nat", "1e6 nat"])
@pytest.mark.parametrize("seed", range(4))
def test_the_integer_program_equals_brute_force(cost, seed, unit):
    losses = {tensor: {b: unit * loss for b, loss in row.items()} for tensor, row in table(seed).items()}
    low, high = (uniform(losses, cost, b).cost for b in (2, 8))
    for share in (0.0, 0.1, 0.35, 1.0):
        budget = low + share * (high - low)
        found = optimal(losses, cost, budget)
        assert found.predicted == pytest.approx(brute_force(losses, cost, budget * (1 + 1e-9)), rel=1e-6)
        assert found.cost <= budget * (1 + 1e-6)
        assert found.cost == pytest.approx(cost.of(found.bits))


@pytest.mark.parametrize("cost", [ALONE, PAIRS], ids=["size", "products"])
def test_greedy_and_random_keep_the_budget_and_lose_to_the_optimum(cost):
    losses, rng = table(7), np.random.default_rng(0)
    budget = uniform(losses, cost, 4).cost
    best = optimal(losses, cost, budget).predicted
    assert best <= uniform(losses, cost, 4).predicted
    others = [greedy(losses, cost, budget), *(at_random(losses, cost, budget, rng) for _ in range(20))]
    assert all(a.cost <= budget * (1 + 1e-9) and a.predicted >= best * (1 - 1e-9) for a in others)
    assert len({tuple(a.bits.items()) for a in others}) > 4


def test_a_random_assignment_uses_its_budget_up():
    losses, rng = table(1), np.random.default_rng(3)
    found = at_random(losses, ALONE, 50.0, rng)
    for tensor, bits in found.bits.items():
        if more := [b for b in BITS if b > bits]:
            assert ALONE.of({**found.bits, tensor: min(more)}) > 50.0


def test_a_budget_that_nothing_meets_is_refused():
    for search in (optimal, greedy):
        with pytest.raises(ValueError, match=r"budget 29 KiB: the cheapest assignment already costs 30"):
            search(table(0), ALONE, 29.0)


def test_a_tensor_that_costs_and_has_no_losses_is_named():
    losses = {tensor: row for tensor, row in table(0).items() if tensor != next(iter(ALONE.per_bit))}
    for search in (optimal, greedy):
        with pytest.raises(ValueError, match=r"no losses for '.*' \(and 0 more\), which costs KiB"):
            search(losses, ALONE, 100.0)


def test_costs_of_resnet20_by_hand():
    net = models.build("resnet20").eval()
    policy = BitPolicy("minmax:4", "lsq_plus:4", first_last_bits=None, placement="academic", bn="fold")
    qnet = quantize(net, policy, torch.zeros(1, 3, 32, 32))
    sizes, bops = size_cost(qnet), bop_cost(qnet)
    every = {f"weight {n}": 4 for n in weight_layers(qnet)} | {f"act {s.name}": 4 for s in qnet.meta["sites"]}
    n_weights = sum(layer.weight.numel() for layer in weight_layers(qnet).values())
    assert sizes.of(every) == n_weights * 4 / 8 / 1024
    stem = 3 * 16 * 9 * 32 * 32  # multiply-accumulates; its input is the image, 8 bits
    assert bops.of(every) == stem * 4 * 8 + (40_813_184 - stem) * 16
    assert bops.everywhere(4) == bops.of(every)
    assert bops.per_bit_pair["weight layer2.0.shortcut.0", "act layer1.2.add"] == 16 * 32 * 16 * 16
    assert bops.per_bit_pair["weight linear", "act pool"] == 640
    assert len(bops.per_bit_pair) == 21


def test_a_layer_on_a_float_tensor_has_no_bit_operations():
    policy = BitPolicy("minmax:4", "lsq_plus:4", overrides={"stem": {"act": 32}}, placement="academic", bn="fold")
    qnet = quantize(trained_like(Tiny()), policy, torch.zeros(1, 3, 8, 8))
    with pytest.raises(QuantizeError, match=r"layer 'blocks.0.expand': its input is not quantized"):
        bop_cost(qnet)


def tiny():
    torch.manual_seed(11)
    return trained_like(Tiny())


@pytest.fixture(scope="module")
def images():
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def test_a_bank_leaves_the_net_in_its_mode(images):
    net = tiny().train()
    GridBank(net, images, (8,))
    assert all(module.training for module in net.modules())


@pytest.fixture(scope="module")
def bank(images):
    return GridBank(tiny(), images, (3, 8))


def test_the_bank_gives_what_quantizing_afresh_gives(bank, images):
    bits = {"weight stem": 8, "weight blocks.1.depthwise": 3, "weight fc": 3, "act stem": 3, "act blocks.2.add": 8}
    fresh = quantize(tiny(), bank.policy(bits), images[:1])
    ptq.fit_weights(fresh)
    ptq.fit_acts(fresh, images)
    ptq.correct_means(fresh, images)
    qnet = bank.assign(bits)
    with eval_mode(qnet), torch.no_grad():
        torch.testing.assert_close(qnet(images), fresh(images), rtol=1e-4, atol=1e-5)
    record = {key: spec for key, spec in fresh.bits_record().items() if spec != "float"}
    assert {key: int(spec.rsplit(":", 1)[1]) for key, spec in record.items()} == bits


def test_joined_tensors_have_the_most_bits_that_one_of_them_was_given(images):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            a = torch.relu(self.a(x))
            return self.c(torch.cat([a, torch.relu(self.b(a))], 1)).mean((2, 3))

    policy = GridBank(Joined(), images, (3, 8)).policy({"act a": 8, "act b": 3, "weight c": 3})
    assert policy.overrides["a"]["act"] == policy.overrides["b"]["act"] == 8
    assert quantize(Joined(), policy, images[:1]).bits_record()["weight c"] == "minmax:3"


def test_the_bank_without_bits_is_the_float_net(bank, images):
    net = tiny()
    with torch.no_grad():
        bank.assign(dict.fromkeys(bank.tensors, 3))
        float_logits = bank.assign({"act stem": 32}).eval()(images)
        torch.testing.assert_close(float_logits, net(images), rtol=1e-4, atol=1e-5)


def test_fewer_bits_are_further_from_float(bank, images):
    with torch.no_grad():
        truth = bank.assign({})(images)
        errors = [(bank.assign(dict.fromkeys(bank.tensors, b))(images) - truth).square().mean() for b in (3, 8)]
    assert errors[0] > 10 * errors[1] > 0


def test_unknown_tensors_and_bits_are_named(bank):
    with pytest.raises(ValueError, match=r"no tensor 'weight stm'; did you mean 'weight stem'"):
        bank.assign({"weight stm": 3})
    with pytest.raises(ValueError, match=r"act stem: 4 bits were not fitted; there are \(3, 8\)"):
        bank.assign({"act stem": 4})


@pytest.mark.parametrize("together", [3, 1000])
def test_corrected_means_equal_the_float_nets(images, together, monkeypatch):
    """One layer alone: the mean of each output channel is exact after the correction, and was not before."""
    monkeypatch.setattr(state, "PASS_NUMBERS", together * images[0].numel())
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    policy = BitPolicy("minmax:2", "float", first_last_bits=None)
    qnet = quantize(net, policy, images[:1])
    with torch.no_grad():
        truth, before = (net[0](images), qnet.get_submodule("0")(images))
        ptq.correct_means(qnet, images)
        shift = -qnet.get_submodule("0").bias
        torch.testing.assert_close(shift, (before - truth).mean((0, 2, 3)))
        assert shift.abs().max() > 1e-3
        after = qnet.get_submodule("0")(images)
    torch.testing.assert_close(after.mean((0, 2, 3)), truth.mean((0, 2, 3)), rtol=0, atol=1e-5)


def test_only_some_quantizers_are_corrected_and_fitted(images):
    """What a hybrid net needs: the trained tensors keep grid and bias, and stay switched on."""
    policy = BitPolicy("minmax:4", "lsq_plus:4", overrides={"blocks.1.*": {"weight": "dsq:2"}}, placement="academic")
    qnet = quantize(tiny(), policy, images[:1])
    calibrate(qnet, images)
    trained = {n: q for n, layer in weight_layers(qnet).items() if (q := layer.weight_quantizer) and q.bits == 2}

    def late(quantizer):
        return quantizer.bits >= 4

    ptq.fit_weights(qnet, only=late)
    before = {name: layer.bias for name, layer in weight_layers(qnet).items()}
    ptq.correct_means(qnet, images, only=late)
    shifts = [name for name, layer in weight_layers(qnet).items() if layer.bias is not before[name]]
    assert trained
    assert set(trained) == {"blocks.1.expand", "blocks.1.depthwise", "blocks.1.project"}
    assert not set(shifts) & set(trained)
    assert all(weight_layers(qnet)[n].weight_quantizer is q and q.enabled for n, q in trained.items())
    assert len(shifts) + len(trained) == len(weight_layers(qnet))
    set_quantization(qnet, weights=False, acts=False, only=late)
    assert all(q.enabled for q in trained.values())
