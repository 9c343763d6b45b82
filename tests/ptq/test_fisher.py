"""The Fisher loss: its gradients in closed form, its mean of 1, its place in the loss, and what is refused."""

import dataclasses

import pytest
import torch
from graph_nets import images, trained_like
from torch import nn

from hq_lib import ptq
from hq_lib.graph import BitPolicy, blocks, quantize
from hq_lib.ptq.reconstruction import distance, unit_loss
from hq_lib.ptq.units import Fisher, UnitCache, cut, drawn_labels, through

N = 32
SMALL = ptq.ReconstructionConfig(
    iterations=60, batch_size=8, n_images=N, rounding_lr=5e-2, keep_probability=1.0, loss="fisher"
)


class Linear(nn.Module):
    """Two linear layers and a softmax: the Fisher diagonal is known by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.b(self.a(self.conv(x).mean((2, 3))))


def made(bits=2):
    x = images(N, size=8)
    qnet = quantize(trained_like(Linear()), BitPolicy(f"minmax:{bits}", "lsq_plus:8", placement="academic"), x[:1])
    ptq.fit_weights(qnet)
    ptq.fit_acts(qnet, x)
    return qnet.eval(), x


def graphs_of(qnet):
    return [cut(qnet, block) for block in blocks(qnet)]


def test_gradients_are_the_closed_form_of_softmax_and_a_linear_layer():
    net, (qnet, x) = Linear().eval(), made()
    labels = torch.randint(5, (N,), generator=torch.Generator().manual_seed(3))
    z = net.a(net.conv(x).mean((2, 3))).detach()
    logits_gradient = net.b(z).softmax(1) - nn.functional.one_hot(labels, 5)
    index = torch.arange(N)
    behind_a = Fisher(graphs_of(qnet)[2:], labels).gradient(z, index)
    assert torch.allclose(behind_a, logits_gradient @ net.b.weight, atol=1e-6)
    last = Fisher([], labels).gradient(net.b(z), index)
    assert torch.allclose(last, logits_gradient, atol=1e-6)


def test_labels_follow_the_float_nets_softmax_and_the_seed():
    qnet, x = made()
    many = x[:1].expand(4000, -1, -1, -1)
    drawn = drawn_labels(graphs_of(qnet), many, seed=0)
    p = Linear()(x[:1]).softmax(1).squeeze().detach()
    assert torch.allclose(drawn.bincount(minlength=5) / 4000, p, atol=0.04)
    assert torch.equal(drawn, drawn_labels(graphs_of(qnet), many, seed=0))
    assert not torch.equal(drawn, drawn_labels(graphs_of(qnet), many, seed=1))


def test_importance_has_mean_one_and_the_shape_of_the_squared_gradient():
    qnet, x = made()
    graphs = graphs_of(qnet)
    pair = through(graphs[0], (x, x), x)
    fisher = Fisher(graphs[2:], drawn_labels(graphs, x, seed=0))
    cache = UnitCache(pair, graphs[1], x, fisher=fisher)
    index = torch.arange(N)
    weight = cache.importance(index)
    assert weight.mean().item() == pytest.approx(1, abs=2e-3)
    g = fisher.gradient(cache.batch(index)[2], index)
    assert torch.allclose(weight, g.square() / g.square().mean(), rtol=3e-3, atol=1e-4)
    x_q, _, target = cache.batch(index)
    y = graphs[1](x_q).detach()
    assert unit_loss(cache, 2.0) == pytest.approx(float((weight * (y - target) ** 2).sum(1).mean()), rel=1e-3)


def test_per_image_all_images_count_alike_however_sure_the_net_is():
    """The weights within an image keep their ratios; the sure half would have 1e-12 of the whole otherwise."""
    net = Linear()
    with torch.no_grad():
        net.b.weight.mul_(60)
    x = images(N, size=8)
    qnet = quantize(net.eval(), BitPolicy("minmax:3", "float"), x[:1])
    graphs = graphs_of(qnet)
    pair = through(graphs[0], (x, x), x)
    labels, index = drawn_labels(graphs, x, seed=0), torch.arange(N)
    raw, alike = (
        UnitCache(pair, graphs[1], x, fisher=Fisher(graphs[2:], labels, per_image=flag)) for flag in (False, True)
    )
    spread = raw.importance(index).mean(1)
    assert spread.max() > 20 * spread.median()
    weight = alike.importance(index)
    torch.testing.assert_close(weight.mean(1), torch.ones(N), rtol=5e-3, atol=0)
    g = Fisher(graphs[2:], labels).gradient(alike.batch(index)[2], index).double()
    known = g.square().mean(1) > 0
    want = (g.square() / g.square().mean(1, keepdim=True)).float()
    torch.testing.assert_close(weight[known], want[known], rtol=5e-3, atol=1e-3)
    assert torch.equal(weight[~known], torch.ones_like(weight[~known]))


def test_the_weight_multiplies_each_values_error():
    y, target, weight = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 10.0]])
    assert float(distance(y, target, 2.0, weight)) == 2 * 4 + 10 * 1
    assert float(distance(y, target, 2.0)) == 4 + 1


def test_where_nothing_matters_every_error_counts_alike():
    net = Linear()
    nn.init.zeros_(net.b.weight)
    x = images(N, size=8)
    qnet = quantize(net.eval(), BitPolicy("minmax:3", "float"), x[:1])
    graphs = graphs_of(qnet)
    cache = UnitCache((x, x), graphs[0], x, fisher=Fisher(graphs[1:], torch.zeros(N).long()))
    assert torch.equal(cache.importance(torch.arange(4)), torch.ones(4, 4, 6, 6))


def test_it_lowers_the_divergence_of_the_answers_and_resumes_to_the_same_bits(tmp_path):
    target = Linear().eval()(images(N, size=8)).log_softmax(1)
    qnet, x = made()

    def divergence():
        return nn.functional.kl_div(qnet(x).log_softmax(1), target, log_target=True, reduction="batchmean").item()

    before = divergence()
    ptq.reconstruct(qnet, x, ptq.brecq(loss="fisher", iterations=100, batch_size=8, n_images=N, rounding_lr=5e-2),
                    folder=tmp_path)  # fmt: skip
    assert divergence() < before
    (tmp_path / "pass_0" / "unit_002.safetensors").unlink()
    again, _ = made()
    ptq.reconstruct(again, x, ptq.brecq(loss="fisher", iterations=100, batch_size=8, n_images=N, rounding_lr=5e-2),
                    folder=tmp_path)  # fmt: skip
    assert torch.equal(again(x), qnet(x))


def test_per_image_goes_through_brecq():
    settings = {"iterations": 100, "batch_size": 8, "n_images": N, "rounding_lr": 5e-2}
    qnet, x = made()
    reports = ptq.reconstruct(qnet, x, ptq.brecq(loss="fisher_per_image", **settings)[:1])
    assert reports[-1].loss_after < 0.9 * reports[-1].loss_before


def test_brecqs_two_passes_share_the_loss():
    weights, acts = ptq.brecq(loss="fisher", iterations=40)
    assert (weights.loss, acts.loss, acts.loss_power, acts.iterations) == ("fisher", "fisher", 2.0, 10)
    assert ptq.brecq()[1].loss_power == 2.4


def test_layers_and_images_for_answers_are_refused():
    for loss in ("fisher", "fisher_per_image"):
        with pytest.raises(ValueError, match=f"loss '{loss}' needs unit 'block'"):
            dataclasses.replace(SMALL, unit="layer", loss=loss)
    with pytest.raises(ValueError, match=r"ReconstructionConfig\.loss 'kl'"):
        dataclasses.replace(SMALL, loss="kl")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = images(N, size=8)
    qnet = quantize(net.eval(), BitPolicy("minmax:3", "float"), x[:1])
    with pytest.raises(ptq.ReconstructionError, match=r"needs logits \(N, classes\)"):
        ptq.reconstruct(qnet, x, SMALL)
