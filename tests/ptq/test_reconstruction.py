"""Reconstruction of small nets: dropping's limits, losses, resuming, memory forms, integers, and what is refused."""

import dataclasses
import shutil

import pytest
import torch
from graph_nets import Branches, Tiny, images, trained_like
from torch import nn

from hq_lib import integer, ptq
from hq_lib.graph import BitPolicy, QuantizeError, act_quantizers, blocks, quantize, weight_layers
from hq_lib.ptq.reconstruction import batch_indices, drop, dropping, keep_mask
from hq_lib.ptq.units import cut, units
from hq_lib.quantizers import AdaRound

N = 32
SMALL = ptq.ReconstructionConfig(iterations=30, batch_size=8, n_images=N, rounding_lr=5e-2, keep_probability=1.0)


class Plain(nn.Module):
    """Two convolutions and an addition between a stem and a classifier: quick to reconstruct."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(x + self.b(self.act(self.a(x))))
        return self.fc(x.mean((2, 3)))


def made(net=None, bits=3, placement="academic", **policy):
    x = images(N, size=8)
    policy = BitPolicy(f"minmax:{bits}", f"lsq_plus:{bits}", placement=placement, bn="fold", **policy)
    qnet = quantize(trained_like(net or seeded()), policy, x[:1])
    ptq.fit_weights(qnet)
    ptq.fit_acts(qnet, x)
    return qnet.eval(), x


def seeded():
    torch.manual_seed(0)
    return Plain()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_masks_keep_the_asked_share_in_every_lane():
    like = torch.empty(4096, 16)
    for p in (0.1, 0.5, 0.9):
        mask = keep_mask(like, p, generator()).float()
        assert mask.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / like.numel()) ** 0.5)
        assert (mask.mean(0) - p).abs().max() < 5 * (p * (1 - p) / 4096) ** 0.5
    assert keep_mask(torch.empty(7), 0.5, generator()).shape == (7,)
    assert keep_mask(like, 0.9999999, generator()).all(), "nearest to 1 of the 2^16 probabilities"


def test_dropping_is_all_quantized_at_1_and_all_float_at_0():
    qnet, x = made()
    quantizer = next(iter(act_quantizers(qnet).values()))
    block = cut(qnet, blocks(qnet)[0])
    hard = block(x)
    with dropping(block, 1.0, generator()):
        assert torch.equal(block(x), hard)
    with dropping(block, 0.0, generator()):
        floating = block(x)
    quantizer.enabled = False
    assert torch.equal(block(x), floating)
    assert not torch.equal(floating, hard)
    with dropping(block, 0.5, generator()):
        quantizer.enabled = True
        mixed = block(x)
    assert torch.equal((mixed == hard) | (mixed == floating), torch.ones_like(mixed).bool())
    assert torch.equal(block(x), hard)


def test_a_dropped_element_gets_the_identity_gradient():
    x = torch.full((64,), 9.0, requires_grad=True)
    clipped = x.clamp(max=1.0)
    drop(clipped, x, 0.5, generator()).sum().backward()
    kept = keep_mask(x, 0.5, generator())
    assert torch.equal(x.grad, (~kept).float())


def test_batches_without_replacement_use_each_image_once_per_epoch():
    config = dataclasses.replace(SMALL, iterations=8)
    drawn = torch.cat([*batch_indices(N, config, generator())])
    assert torch.equal(drawn[:N].sort().values, torch.arange(N))
    assert torch.equal(drawn[N:].sort().values, torch.arange(N))
    free = dataclasses.replace(config, batch_sampling="with_replacement")
    assert len(torch.cat([*batch_indices(N, free, generator())]).unique()) < N


def test_the_exponent_waits_then_falls_linearly():
    config = ptq.ReconstructionConfig(iterations=100)
    assert config.beta(19) is None
    assert config.beta(20) == 20
    assert config.beta(60) == pytest.approx(11)
    assert config.beta(99) == pytest.approx(2 + 18 / 80)


@pytest.mark.parametrize("passes", [ptq.adaround, ptq.brecq, ptq.qdrop])
def test_every_method_lowers_the_error_of_the_logits(passes):
    qnet, x = made(bits=2)
    target = trained_like(seeded())(x)
    before = (qnet(x) - target).square().mean()
    ptq.reconstruct(qnet, x, passes(iterations=100, batch_size=8, n_images=N, rounding_lr=5e-2))
    assert (qnet(x) - target).square().mean() < before
    assert all(isinstance(layer.weight_quantizer, AdaRound) for layer in weight_layers(qnet).values())


def test_reconstruction_lowers_each_blocks_loss_and_decides_the_rounding():
    qnet, x = made(bits=2)
    reports = ptq.reconstruct(qnet, x, dataclasses.replace(SMALL, iterations=300, rounding_weight=0.05))
    assert [report.name for report in reports] == ["stem", "a", "fc"]
    assert reports[1].loss_after < 0.8 * reports[1].loss_before
    assert max(report.undecided_pct for report in reports) < 0.1


def test_layers_are_units_with_their_activation_function():
    qnet, _ = made()
    block = blocks(qnet)[1]
    found = units(qnet, block, unit="layer")
    (a, nothing), (b, lead) = found
    assert (a.name, b.name) == ("a", "b")
    assert nothing is None
    assert lead is not None
    assert a.nodes[0] == "a"
    assert a.output.endswith("_act_quantizer")
    assert b.nodes == ("b",)


def test_no_iterations_leave_rounding_to_nearest():
    qnet, x = made()
    before = qnet(x)
    reports = ptq.reconstruct(qnet, x, ptq.qdrop(iterations=0, n_images=N))
    assert torch.allclose(qnet(x), before, atol=1e-6)
    assert all(report.loss_before == report.loss_after for report in reports)


@pytest.mark.parametrize("passes", [ptq.qdrop, ptq.adaround])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(passes, tmp_path):
    settings = passes(iterations=12, batch_size=8, n_images=N)
    whole, x = made()
    ptq.reconstruct(whole, x, settings)

    def killed(report):
        if report.position == 1:
            raise KeyboardInterrupt

    first, _ = made()
    with pytest.raises(KeyboardInterrupt):
        ptq.reconstruct(first, x, settings, folder=tmp_path, progress=killed)
    second, _ = made()
    reports = ptq.reconstruct(second, x, settings, folder=tmp_path)
    assert [report.resumed for report in reports[:3]] == [True, True, False]
    assert torch.equal(second(x), whole(x))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_another_run_does_not_take_over_a_folder(tmp_path):
    qnet, x = made()
    ptq.reconstruct(qnet, x, ptq.qdrop(iterations=0, n_images=N), folder=tmp_path)
    fresh, _ = made()
    with pytest.raises(ptq.ReconstructionError, match="another config"):
        ptq.reconstruct(fresh, x, ptq.qdrop(iterations=1, batch_size=8, n_images=N), folder=tmp_path)
    with pytest.raises(ptq.ReconstructionError, match="another images"):
        ptq.reconstruct(fresh, x + 1, ptq.qdrop(iterations=0, n_images=N), folder=tmp_path)


def test_switches_modes_and_gradients_are_restored():
    qnet, x = made()
    qnet.train()
    state = torch.get_rng_state()
    ptq.reconstruct(qnet, x, ptq.brecq(iterations=4, batch_size=8, n_images=N))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(q.enabled for q in act_quantizers(qnet).values())
    assert qnet.training
    assert all(p.grad is None for p in qnet.parameters())
    assert qnet.get_submodule("a").weight.requires_grad


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_activations_in_files_give_the_same_bits(unit, monkeypatch):
    (plain, x), (lean, _) = made(), made()
    settings = dataclasses.replace(SMALL, iterations=5, unit=unit)
    if unit == "block":
        settings = dataclasses.replace(settings, loss="fisher")
    ptq.reconstruct(plain, x, settings)
    monkeypatch.setattr("hq_lib.ptq.units.MAX_BYTES", 0)
    ptq.reconstruct(lean, x, settings)
    for a, b in zip(plain.state_dict().values(), lean.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("hq_lib.ptq.units.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(OSError, match=r"no space for .* GiB of activations: set TMPDIR"):
        ptq.reconstruct(made()[0], x, settings)


@pytest.mark.parametrize("placement", ["academic", "deploy"])
def test_the_integers_give_the_same_classes(placement):
    qnet, x = made(bits=4, placement=placement, input_bits=8)
    ptq.reconstruct(qnet, x, dataclasses.replace(SMALL, iterations=10))
    logits = torch.from_numpy(integer.run(integer.lower(qnet), x.numpy()))
    with torch.no_grad():
        assert torch.equal(logits.argmax(1), qnet(x).argmax(1))
        assert torch.allclose(logits, qnet(x), atol=0.05)


def test_branches_and_transposed_convolutions_can_be_reconstructed():
    qnet, _ = made(Branches())
    reports = ptq.reconstruct(qnet, images(N, size=8), dataclasses.replace(SMALL, iterations=3, keep_probability=0.5))
    assert len(reports) == len(blocks(qnet))


def test_bad_images_are_refused_in_words():
    qnet, x = made()
    with pytest.raises(ptq.ReconstructionError, match=r"images are .*takes float"):
        ptq.reconstruct(qnet, images(N, size=12), SMALL)
    with pytest.raises(ptq.ReconstructionError, match="20 images given, 32 asked for"):
        ptq.reconstruct(qnet, x[:20], SMALL)
    with pytest.raises(ptq.ReconstructionError, match="do not fill a batch"):
        ptq.reconstruct(qnet, x[:4], dataclasses.replace(SMALL, n_images=None))
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(ptq.ReconstructionError, match="1 of 32 images hold NaN"):
        ptq.reconstruct(qnet, x, SMALL)


def test_weights_of_one_bit_are_refused_by_layer():
    x = images(N, size=8)
    qnet = quantize(seeded(), BitPolicy("minmax:1", "lsq_plus:4", first_last_bits=None, bn="fold"), x[:1])
    ptq.fit_acts(qnet, x)
    with pytest.raises(QuantizeError, match=r"layer 'stem': minmax:1 has no level at 0.*2 bits"):
        ptq.reconstruct(qnet, x, SMALL)
    ptq.reconstruct(qnet, x, dataclasses.replace(SMALL, learn_rounding=False, iterations=2))


def test_it_learns_where_the_caller_has_gradients_off():
    found = []
    for mode in (torch.enable_grad(), torch.no_grad()):
        qnet, x = made()
        with mode:
            ptq.reconstruct(qnet, x, SMALL)
        found.append(qnet.get_submodule("stem").weight_quantizer.v.detach().clone())
    assert torch.equal(*found)
    with torch.inference_mode(), pytest.raises(ptq.ReconstructionError, match="inference_mode"):
        ptq.reconstruct(qnet, x, SMALL)


def test_missing_grids_and_bad_settings_are_refused_in_words():
    x = images(N, size=8)
    qnet = quantize(trained_like(Plain()), BitPolicy("minmax:4", "lsq_plus:4", bn="fold"), x[:1])
    with pytest.raises(ptq.ReconstructionError, match="has no grid yet"):
        ptq.reconstruct(qnet, x, SMALL)
    wrong = (("keep_probability", 1.5), ("batch_size", 0), ("unit", "net"), ("iterations", -1), ("iterations", 2.5))
    for name, value in wrong:
        with pytest.raises(ValueError, match=rf"ReconstructionConfig\.{name}"):
            dataclasses.replace(SMALL, **{name: value})


@pytest.mark.parametrize("method", [ptq.qdrop, ptq.brecq])
def test_steps_are_learned_and_zero_points_stay_as_published(method):
    x = images(N, size=8)
    policy = BitPolicy("minmax:3", "lsq_plus:3", placement="academic", bn="fold")
    qnet = quantize(trained_like(Tiny()), policy, x[:1])
    ptq.fit_weights(qnet)
    ptq.fit_acts(qnet, x)
    before = {name: q.grid() for name, q in act_quantizers(qnet).items()}
    assert any(q.signed for q in act_quantizers(qnet).values())
    ptq.reconstruct(qnet, x, method(iterations=40, batch_size=8, n_images=N, step_lr=5e-2))
    after = {name: q.grid() for name, q in act_quantizers(qnet).items()}
    assert all(torch.equal(after[name].zero_point, grid.zero_point) for name, grid in before.items())
    signed = [name for name, q in act_quantizers(qnet).items() if q.signed]
    assert all(not torch.equal(after[name].scale, before[name].scale) for name in signed)
