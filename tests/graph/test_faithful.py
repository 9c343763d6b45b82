"""The graph is the network: its modes, its in-place changes, its hidden and parametrized layers; or it is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from hq_lib import data, integer, ptq
from hq_lib.graph import (
    BitPolicy,
    QuantizeError,
    act_quantizers,
    calibrate,
    load,
    op_name,
    quantize,
    save,
    weight_layers,
)
from hq_lib.graph.agreement import DisagreementError, traced
from hq_lib.graph.folding import FoldError, fold_bn
from hq_lib.graph.tracing import UntraceableError, trace

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FLOAT = BitPolicy(weight=32, act=32)


class Net(nn.Module):
    """Two convolutions and a head, put together by a function of them and the image."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.h = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.f = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def eight(net: nn.Module):
    qnet = quantize(net, BitPolicy(), X[:1])
    calibrate(qnet, X)
    return qnet.eval()


def dropped(n, x):
    return n.h(F.dropout(n.b(F.relu(n.a(x))), 0.5, training=n.training))


def dropped_by_position(n, x):
    return n.h(F.dropout2d(n.b(F.relu(n.a(x))), 0.5, n.training))


class DropPath(nn.Module):
    """As the vision libraries write it: a branch on the mode in Python."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x / 0.5 * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


class WithDropPath(Net):
    def __init__(self) -> None:
        super().__init__(lambda n, x: n.h(n.drop(n.b(F.relu(n.a(x))))))
        self.drop = DropPath()


@pytest.mark.parametrize("net", [Net(dropped), Net(dropped_by_position), WithDropPath()], ids=["flag", "place", "path"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [trace, lambda n: quantize(n, FLOAT, X[:1])], ids=["trace", "quantize"])
def test_a_graph_drops_in_training_and_only_there_whatever_mode_it_was_traced_in(net, train, make):
    gm = make(net.train(train))
    for graph in (gm, copy.deepcopy(gm)):
        assert torch.equal(graph.eval()(X), net.eval()(X))
        for module in (graph.train(), net.train()):
            torch.manual_seed(1)
            once = module(X)
            torch.manual_seed(1)
            assert torch.equal(module(X), once)
            assert not torch.equal(module(X), once)


def test_torchvisions_stochastic_depth_follows_the_mode():
    ops = pytest.importorskip("torchvision.ops")
    net = Net(lambda n, x: n.h(ops.stochastic_depth(n.b(F.relu(n.a(x))), 0.5, "row", n.training)))
    for mode in (True, False):
        qnet = eight(net.train(mode))
        assert torch.equal(qnet(X), qnet(X))
        assert not torch.equal(qnet.train()(X), qnet(X))


def test_a_dropout_that_is_always_on_stays_on():
    gm = trace(Net(lambda n, x: F.dropout(x, 0.5)).eval())
    assert not torch.equal(gm(X), gm(X))


def test_a_dropout_of_nothing_and_a_module_that_is_at_work_in_training_alone_lower():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    class Quiet(Net):
        def __init__(self) -> None:
            super().__init__(lambda n, x: n.h(n.noise(F.dropout(F.relu(n.a(x)), 0.0))))
            self.noise = Noise()

    qnet = quantize(Quiet().eval(), BitPolicy("minmax:8", "minmax:8", bn="fold"), X[:1])
    assert not any("dropout" in name or "noise" in name for name in act_quantizers(qnet))
    calibrate(qnet, X)
    assert integer.lower(qnet.eval())
    assert not torch.equal(qnet.train()(X), qnet(X))


DRAWS = {
    "dropout": lambda n, x: n.h(F.dropout(n.a(x))),
    "by place": lambda n, x: n.h(torch.dropout(n.a(x), 0.5, True)),
    "the other way round": lambda n, x: n.h(F.dropout(n.a(x), 0.5, not n.training)),
    "noise": lambda n, x: n.h(n.a(x) + torch.randn_like(x)[:, :1]),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("bn", ["keep", "fold"])
def test_a_network_that_draws_numbers_in_eval_mode_is_refused_by_line_with_the_mend(name, bn):
    with pytest.raises(QuantizeError, match=r"at .*test_faithful\.py:\d+.*eval mode.*training=self\.training"):
        quantize(Net(DRAWS[name]).eval(), BitPolicy(bn=bn), X[:1])


def test_no_batch_norm_folds_through_a_dropout_that_is_always_on():
    class Always(Net):
        def __init__(self, flag) -> None:
            super().__init__(lambda n, x: n.h(n.norm(F.dropout(n.a(x), 0.5, flag(n)))))
            self.norm = nn.BatchNorm2d(4)

    with pytest.raises(FoldError, match="'dropout' before it is no plain convolution"):
        fold_bn(Always(lambda n: True).eval(), X)
    with pytest.raises(FoldError, match="'dropout' before it is no plain convolution"):
        fold_bn(Always(lambda n: not n.training).eval(), X)
    fold_bn(Always(lambda n: n.training).eval(), X)
    fold_bn(Always(lambda n: False).eval(), X)


class Branch(nn.Module):
    """One class for two things, as searched networks have it."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.conv(x)
        return x + torch.randn_like(x) if self.training else x


def test_a_class_with_and_without_weights_keeps_the_quantizers_of_its_layers():
    net = Net(lambda n, x: n.h(n.q(n.p(F.relu(n.a(x))))))
    net.p, net.q = Branch(True), Branch(False)
    qnet = quantize(net.eval(), BitPolicy("minmax:4", "minmax:4"), X[:1])
    assert weight_layers(qnet)["p.conv"].weight_quantizer.bits == 4
    assert not qnet.policy.report(qnet).attrs["hidden"]


class AuxiliaryHead(Net):
    def __init__(self) -> None:
        super().__init__(lambda n, x: (n.h(n.a(x)), n.h(n.b(n.a(x)))) if n.training else n.h(n.a(x)))


def test_a_net_with_other_operations_in_training_refuses_that_mode_by_line():
    gm = trace(AuxiliaryHead().eval())
    assert gm(X).shape == (8, 5)
    with pytest.raises(RuntimeError, match=r"AuxiliaryHead was traced in eval mode.*test_faithful\.py:\d+"):
        gm.train()(X)


IN_PLACE = {
    "relu_": lambda n, x: (lambda y: n.h(n.b(F.relu_(y)) + y))(n.a(x)),
    "inplace": lambda n, x: (lambda y: n.h(n.b(F.relu(y, inplace=True)) + y))(n.a(x)),
    "method": lambda n, x: (lambda y: n.h(n.b(y.clamp_(0, 2)) + y))(n.a(x)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_tensor_read_again_after_an_in_place_change_is_the_changed_one_in_integers_too(name):
    net = Net(IN_PLACE[name]).eval()
    assert torch.equal(quantize(net, FLOAT, X[:1])(X), net(X))
    qnet = eight(net)
    y, model = qnet(X), integer.lower(qnet)
    got = torch.from_numpy(integer.run(model, X.numpy()))
    assert (got - y).abs().max() < 0.02 * y.abs().max()
    assert (y - net(X)).abs().max() < 0.05 * net(X).abs().max()


def test_a_view_that_an_in_place_change_reaches_is_refused_by_line():
    def forward(n, x):
        y = n.a(x)
        seen = y.view(-1, 4, 64)
        return n.h(n.b(F.relu_(y)) + seen.view(-1, 4, 8, 8))

    for make in (lambda n: quantize(n, BitPolicy(), X), lambda n: fold_bn(n, X), lambda n: traced(n, X)):
        with pytest.raises(DisagreementError, match=r"in place at .*test_faithful\.py:\d+"):
            make(Net(forward).eval())


def test_a_net_that_draws_numbers_which_a_graph_would_freeze_is_refused():
    net = Net(lambda n, x: n.h(n.b(n.a(x)) + torch.rand(4, 1, 1)))
    with pytest.raises(DisagreementError, match=r"Net as a graph is another network.*draws numbers"):
        quantize(net.eval(), BitPolicy(), X)


def test_every_batch_norm_that_folds_counts_as_one():
    quantizers = []
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
        qnet = quantize(net.eval(), BitPolicy(), X[:1])
        quantizers.append(list(act_quantizers(qnet)))
        assert not any("BatchNorm" in type(m).__name__ for m in fold_bn(net, X).modules())
    assert quantizers[0] == quantizers[1] == ["input_1_act_quantizer", "_2_act_quantizer", "_3_act_quantizer"]


class FrozenBatchNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


class Functional(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


@pytest.mark.parametrize("norm", [FrozenBatchNorm(), Functional(4)], ids=["arithmetic", "function"])
def test_a_batch_norm_of_ones_own_is_refused_by_name(norm):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.raises(QuantizeError, match=rf"'1', at .*{type(norm).__name__}.*nn\.BatchNorm2d"):
        quantize(net, BitPolicy(), X)


def test_weights_that_a_function_reads_are_counted_and_said():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.swin_t(weights=None).eval()
    with pytest.warns(UserWarning, match=r"24 weights \(8.*shiftedwindowattention"):
        qnet = quantize(net, BitPolicy("minmax:4", "minmax:8", first_last_bits=None), torch.randn(1, 3, 64, 64))
    table = qnet.policy.report(qnet)
    weights = table.loc[table.tensor == "weight"]
    hidden = weights.loc[[layer in table.attrs["hidden"] for layer in weights.layer]]
    assert (len(weights), len(hidden)) == (53, 24)
    assert set(hidden.method) == {"float"}
    share = hidden.n_params.sum() / weights.n_params.sum()
    assert table.attrs["avg_w_bits"] == pytest.approx(4 + 28 * share)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.m, self.l = nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x).flatten(2).transpose(1, 2)
        return self.l(self.m(y, y, y)[0])


def test_a_layers_weight_that_a_function_reads_too_is_counted_and_said():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(3, 8), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(torch.relu(self.fc(x)) @ self.fc.weight)

    with pytest.warns(UserWarning, match=r"1 weights \(24 numbers, first 'fc.weight'\) stay in float, read by matmul"):
        qnet = quantize(Tied(), BitPolicy("minmax:2", "minmax:4"), torch.randn(2, 3))
    assert qnet.policy.report(qnet).attrs["hidden"] == ["fc.weight"]


def test_a_weight_that_is_asked_for_its_type_alone_is_not_read(recwarn):
    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 8)

        def forward(self, x):
            return self.fc(x.to(self.fc.weight.dtype))

    qnet = quantize(Asked(), BitPolicy("minmax:2", "minmax:4"), torch.randn(2, 3))
    assert qnet.policy.report(qnet).attrs["hidden"] == []
    assert not recwarn.list


def test_attention_is_refused_with_the_way_out_which_is_one():
    net = Attention().eval()
    with pytest.raises(QuantizeError, match=r"'m': multiheadattention.*leaf_modules=\('m',\)"):
        quantize(net, BitPolicy(), X)
    qnet = quantize(net, BitPolicy(), X[:1], leaf_modules=("m",))
    calibrate(qnet, X)
    assert set(qnet.policy.report(qnet).attrs["hidden"]) == {"m.in_proj_weight", "m.out_proj.weight"}
    reader = next(n for n in qnet.graph.nodes if n.target == "l")
    assert str(reader.args[0].target).endswith("_act_quantizer")  # the tensor that the tuple holds is on a grid
    assert (qnet(X) - net(X)).abs().max() < 0.05 * net(X).abs().max()


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


PARAMETRIZED = [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]


@pytest.mark.parametrize("norm", PARAMETRIZED, ids=["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("bn", ["keep", "fold"])
def test_parametrized_layers_are_quantized_with_the_weight_that_they_compute_with(norm, bn):
    net = Net(lambda n, x: n.h(n.b(F.relu(n.a(x))))).eval()
    net.b = norm(net.b).eval()
    with torch.no_grad():
        net.b.parametrizations.weight.original0.mul_(3) if norm is PARAMETRIZED[0] else None
    want = net(X)
    qnet = quantize(net, BitPolicy(32, 32, bn=bn), X[:1])
    assert torch.equal(qnet(X), want)
    assert torch.equal(qnet.get_submodule("b").weight, net.b.weight)  # type: ignore[arg-type]
    assert torch.equal(net(X), want)  # the original keeps its parametrization
    assert (eight(net)(X) - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
def test_weights_that_hooks_compute_are_refused_by_layer(norm):
    net = Net(lambda n, x: n.h(n.b(F.relu(n.a(x)))))
    net.b = norm(net.b)
    with pytest.raises(QuantizeError, match=r"'b'.*remove_weight_norm.*parametrizations"):
        quantize(net.eval(), BitPolicy(), X)


@pytest.mark.parametrize("bn", ["keep", "fold"])
def test_pruned_layers_are_refused_by_name_until_the_pruning_is_final(bn):
    net = Net(lambda n, x: n.h(n.b(F.relu(n.a(x)))))
    prune.l1_unstructured(net.b, "weight", 0.5)
    net.eval()(X)
    with pytest.raises(QuantizeError, match=r"'b'.*torch\.nn\.utils\.prune\.remove\(layer, 'weight'\)"):
        quantize(net, BitPolicy(bn=bn), X)
    prune.remove(net.b, "weight")
    assert float((eight(net).get_submodule("b").weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_arguments_left_at_their_defaults_are_no_inputs(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x, scale=0.5, mask=None, *, heads=True):
            x = torch.relu(self.conv(x)) * scale
            x = x if mask is None else x * mask
            return self.fc(x.amax((2, 3))) if heads else x

    net = Scaled().eval()
    qnet = eight(net)
    again = load(save(qnet, tmp_path / "scaled.safetensors"), net=Scaled())
    assert torch.equal(again(X), qnet(X))
    assert (qnet(X) - net(X)).abs().max() < 0.05
    assert (torch.tensor(integer.run(integer.lower(again), X)) - again(X)).abs().max() < 0.01
    assert len(ptq.reconstruct(qnet, X, ptq.qdrop(iterations=1, n_images=len(X), batch_size=len(X)))) == 2


@pytest.mark.parametrize("kind", ["args", "kwargs", "both"])
def test_arguments_of_any_number_that_the_example_leaves_out_are_no_inputs(kind, tmp_path):
    class Open(Net):
        def __init__(self):
            super().__init__(lambda n, x: n.h(F.relu(n.a(x))))

        def forward(self, x, *more, flag=True, **named):  # type: ignore[override]
            return super().forward(x + more[0] if more else x)

    class Args(Open):
        def forward(self, x, *more):  # type: ignore[override]
            return Net.forward(self, x)

    class Kwargs(Open):
        def forward(self, x, **named):  # type: ignore[override]
            return Net.forward(self, x)

    made = {"args": Args, "kwargs": Kwargs, "both": Open}[kind]
    qnet = eight(made().eval())
    assert torch.equal(load(save(qnet, tmp_path / "open.safetensors"), net=made())(X), qnet(X))
    assert (torch.tensor(integer.run(integer.lower(qnet), X)) - qnet(X)).abs().max() < 0.02 * qnet(X).abs().max()


@pytest.mark.parametrize("name", ["policy", "record", "code", "graph", "meta", "x_act_quantizer"])
def test_a_module_whose_name_a_quantized_network_takes_is_refused_by_name(name):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    net.add_module(name, nn.ReLU())
    with pytest.raises(QuantizeError, match=rf"'{name}'.*rename"):
        quantize(net, BitPolicy(), X)


def test_a_layer_that_changes_how_its_weight_is_used_is_refused_by_name():
    net = Net(lambda n, x: n.h(n.b(F.relu(n.a(x))))).eval()
    net.b = Standardised(4, 4, 3, padding=1)
    with pytest.raises(QuantizeError, match=r"'b', at .*test_faithful\.py:\d+.*leaf_modules=\('b',\)"):
        quantize(net, BitPolicy(), X)
    qnet = quantize(net, FLOAT, X, leaf_modules=("b",))
    assert torch.equal(qnet(X), net(X))


def test_a_pool_over_the_whole_map_by_its_size_lowers():
    net = Net(lambda n, x: (lambda y: n.h[2](F.avg_pool2d(y, y.size()[3]).view(y.size(0), -1)))(n.b(F.relu(n.a(x)))))
    qnet = eight(net.eval())
    got = torch.from_numpy(integer.run(integer.lower(qnet), X.numpy()))
    assert (got - qnet(X)).abs().max() < 0.02 * qnet(X).abs().max()


CLIPS = {"relu6": F.relu6, "clamp": lambda y: y.clamp(-0.3, 0.4), "hardtanh": lambda y: F.hardtanh(y, -0.2, 0.5)}


@pytest.mark.parametrize("name", CLIPS)
def test_what_is_clipped_from_a_tensor_with_another_reader_shares_its_grid(name):
    net = Net(lambda n, x: (lambda y: n.h(n.b(CLIPS[name](y)) + y))(n.a(x))).eval()
    qnet = eight(net)
    clip = next(n for n in qnet.graph.nodes if op_name(n, qnet) == name)
    (after,) = clip.users
    assert after.target == clip.args[0].target  # one quantizer, so that the ends are levels of the same grid
    got = torch.from_numpy(integer.run(integer.lower(qnet), X.numpy()))
    assert (got - qnet(X)).abs().max() < 0.02 * qnet(X).abs().max()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.h1, self.h2 = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.d(F.relu(self.c(x)))).mean((2, 3))
        return self.h1(y).softmax(1), self.h2(y)


def test_every_head_counts_as_a_last_layer():
    specs = quantize(TwoHeads().eval(), BitPolicy("lsq:4", "lsq:3"), X[:1]).meta["specs"]
    assert [str(specs[f"weight {name}"]) for name in ("c", "d", "h1", "h2")] == ["lsq:8", "lsq:4", "lsq:8", "lsq:8"]


def test_a_sum_at_the_end_makes_only_its_last_branch_a_last_layer():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Net(lambda n, x: x + n.b(n.a(x))[:, :3]))
    specs = quantize(net.eval(), BitPolicy("lsq:4", "lsq:3"), X[:1]).meta["specs"]
    assert [specs[f"weight {name}"].bits for name in ("0", "1.a", "1.b")] == [8, 4, 8]


def test_layer_types_are_patterns():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip
    said = {"linear": {"weight": 6}, "depthwise": 7, "last": {"act": 5}, "first": 3}
    record = quantize(net.eval(), BitPolicy("lsq:4", "lsq:4", overrides=said), X[:1]).bits_record()
    weights = [record[f"weight {i}"] for i in (0, 2, 5, 7)]
    assert weights == ["lsq:3", "lsq:7", "lsq:6", "lsq:6"]
    assert [record[f"act {i}"] for i in (0, 2, 5)] == ["lsq:3", "lsq:7", "lsq:5"]
    with pytest.raises(ValueError, match=r"overrides\['depthwise'\].*no layer of the type"):
        quantize(TwoHeads().eval(), BitPolicy(overrides={"depthwise": 4}), X[:1])


def test_a_name_that_is_a_type_of_other_layers_too_is_refused():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.fc = nn.Linear(192, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.linear(x.flatten(1))))

    with pytest.raises(ValueError, match=r"'linear' is the name of a layer.*'linear\*'"):
        quantize(Named().eval(), BitPolicy(overrides={"linear": {"weight": 4}}), X[:1])
    record = quantize(Named().eval(), BitPolicy(overrides={"linear*": {"weight": 4}}), X[:1]).bits_record()
    assert (record["weight linear"], record["weight fc"]) == ("minmax:4", "minmax:8")


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        return self.d(F.relu(self.bn(x))) + x


def test_batch_norms_that_cannot_be_folded_may_be_kept():
    net, policy = PreActivation().eval(), BitPolicy(32, 32, bn="fold")
    with pytest.raises(FoldError, match=r"(?s)fold_bn\(net, x, on_refusal='keep'\).*'bn': "):
        quantize(net, policy, X)
    qnet = quantize(net, policy, X, on_refusal="keep")
    assert torch.equal(qnet(X), net(X))


@pytest.mark.parametrize(
    ("net", "policy", "error", "mend"),
    [
        (nn.Conv2d(3, 4, 3), BitPolicy(), UntraceableError, r"nn\.Sequential"),
        (TwoHeads, BitPolicy(), TypeError, "call it first"),
        ("resnet20", BitPolicy(), TypeError, r"models\.build"),
        (TwoHeads().state_dict(), BitPolicy(), TypeError, "load it"),
        (TwoHeads(), "lsq:4", TypeError, "BitPolicy"),
        (TwoHeads(), {"weight": 4}, TypeError, "BitPolicy"),
        (TwoHeads(), BitPolicy, TypeError, "BitPolicy"),
    ],
)
def test_what_is_no_network_or_no_policy_is_refused_with_the_mend(net, policy, error, mend):
    with pytest.raises(error, match=mend):
        quantize(net, policy, X)


def test_a_data_set_is_normalised_before_it_calibrates_and_bare_pixels_are_refused():
    pixels = torch.randint(0, 256, (6, *X.shape[1:]), dtype=torch.uint8)
    spec = data.DataSpec("mine", 2, tuple(X.shape[1:]), mean=(0.5,) * 3, std=(0.25,) * 3)
    images = data.ImageSet(pixels, torch.zeros(6, dtype=torch.long), spec)
    by_set, by_hand = (quantize(TwoHeads().eval(), BitPolicy(), X[:1]) for _ in range(2))
    by_hand.load_state_dict(by_set.state_dict())
    calibrate(by_set, images)
    x = data.normalize(pixels, spec)
    assert torch.allclose(x, (pixels / 255 - 0.5) / 0.25, rtol=0, atol=1e-6)  # two orders of division
    calibrate(by_hand, x)
    assert all(map(torch.equal, by_set(X), by_hand(X)))
    with pytest.raises(QuantizeError, match=r"data\.normalize"):
        calibrate(by_set, pixels)


def test_a_method_run_together_with_its_bits_is_named():
    with pytest.raises(ValueError, match="'lsq:4'"):
        BitPolicy("lsq4")


def test_a_weighted_sum_is_no_sum_of_non_negative_tensors():
    net = Net(lambda n, x: (lambda y: n.h(n.b(torch.add(F.relu(n.a(x)), F.relu(n.b(y)), alpha=-1))))(n.a(x))).eval()
    sites = {site.node: site.signed for site in quantize(net, BitPolicy(), X[:1]).meta["sites"]}
    assert sites["add"] is True
    assert (eight(net)(X) - net(X)).abs().max() < 0.05 * net(X).abs().max()


def test_the_hybrid_rule_with_aciq_from_the_boundary_up_runs_in_integers():
    net = Net(lambda n, x: n.h(n.b(F.relu(n.a(x))))).eval()
    policy = BitPolicy.hybrid(3, 6, qat="dsq", ptq="aciq", bn="fold", overrides={"b": {"weight": 6}})
    assert BitPolicy.from_dict(policy.to_dict()) == policy
    qnet = quantize(net, policy, X[:1])
    calibrate(qnet, X)
    record = qnet.bits_record()
    assert (record["weight a"], record["weight b"], record["act a"]) == ("dsq:3", "aciq:6", "aciq:6")
    got = torch.from_numpy(integer.run(integer.lower(qnet.eval()), X.numpy()))
    assert (got - qnet(X)).abs().max() < 0.03 * qnet(X).abs().max()


def test_power_of_two_scales_are_a_policy_and_lower():
    spec = {"method": "minmax", "bits": 8, "power_of_two": True}
    net = Net(lambda n, x: n.h(n.b(F.relu(n.a(x))))).eval()
    qnet = quantize(net, BitPolicy(spec, spec), X[:1])
    calibrate(qnet, X)
    scales = [q.grid().scale.flatten() for n, q in act_quantizers(qnet).items() if n != "x_act_quantizer"]
    scales += [layer.weight_quantizer.grid().scale.flatten() for layer in weight_layers(qnet).values()]
    assert all(torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)) for scale in scales)
    got = torch.from_numpy(integer.run(integer.lower(qnet.eval()), X.numpy()))
    assert (got - qnet(X)).abs().max() < 0.03 * qnet(X).abs().max()
    with pytest.raises(QuantizeError, match="'a' has a power-of-two scale"):
        ptq.fit_weights(qnet)
