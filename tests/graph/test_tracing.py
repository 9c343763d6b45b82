"""Tracing: the graph computes what the network does; what cannot be traced is named by file and line."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hq_lib.graph import tracing
from hq_lib.graph.tracing import UntraceableError, propagate, trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that cannot be traced
            return x
        return -x


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, double: bool = False, *, power: int = 1) -> Tensor:
        x = self.bn(self.conv(x))
        return x**power * 2 if double else x**power


def net_with_branch() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Branching()))


def test_graph_computes_what_the_network_does_with_the_same_parameters() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    gm = trace(net)
    assert torch.equal(gm(X), net(X))
    assert gm.state_dict().keys() == net.state_dict().keys()
    assert gm.get_parameter("2.1.weight") is net[2][1].weight


def test_views_by_name_keep_their_meaning() -> None:
    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(size=(2, 3, 64)).view(dtype=torch.int32)

    assert torch.equal(trace(Viewed())(X), X.reshape(2, 3, 64).view(torch.int32))


@pytest.mark.parametrize("train", [True, False])
def test_every_module_keeps_its_mode(train: bool) -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Dropout()).train(train)
    net[1].train(not train)
    modes = {name: m.training for name, m in trace(net).named_modules()}
    assert modes == {name: m.training for name, m in net.named_modules()}


def test_error_names_file_line_module_and_the_ways_out() -> None:
    with pytest.raises(UntraceableError) as caught:
        trace(net_with_branch())
    message = str(caught.value)
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}" in message
    assert "if x.sum() > 0" in message
    assert "in module 1.0" in message
    assert "leaf_modules=('1.0',)" in message
    assert "in place of the net" in message
    assert "concrete_args" in message


@pytest.mark.parametrize("leaf", ["1.0", "1", Branching])
def test_leaf_module_is_one_opaque_call(leaf: str | type[nn.Module]) -> None:
    net = net_with_branch()
    gm = trace(net, leaf_modules=(leaf,))
    assert torch.equal(gm(X), net(X))
    assert torch.equal(gm(-X), net(-X))


def test_concrete_args_fix_flags_and_leave_the_inputs() -> None:
    net = Flagged().eval()
    gm = trace(net, concrete_args={"double": True, "power": 3})
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x"]
    assert torch.equal(gm(X), net(X, True, power=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaf_modules": ("bm",)}, "no module named 'bm'; nearest: .*'bn'"),
        ({"concrete_args": {"dubble": True}}, "named 'dubble'; nearest: 'double'"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(Flagged(), **options)


def test_flag_without_value_is_named() -> None:
    with pytest.raises(UntraceableError, match="'double': value, 'power': value"):
        trace(Flagged())


def test_module_in_a_plain_list_is_reported() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Conv2d(3, 4, 3)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    with pytest.raises(UntraceableError, match=r"not installed as a submodule(.|\n)*return self\.layers\[0\]"):
        trace(Hidden())


def test_data_parallel_is_looked_through_at_the_top_and_inside() -> None:
    inner = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3))), nn.ReLU())
    gm = trace(nn.DataParallel(inner))
    assert not any(isinstance(m, nn.DataParallel) for m in gm.modules())
    assert torch.equal(gm(X), inner[1](inner[0].module(X)))


def test_a_graph_comes_back_whole_with_a_graph_of_its_own() -> None:
    first = trace(net := nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    second = trace(first)
    assert second.graph is not first.graph
    assert torch.equal(second(X), net(X))
    assert [n.name for n in second.graph.nodes] == [n.name for n in first.graph.nodes]
    assert not second.training


def test_broken_and_layerless_graphs_are_refused() -> None:
    broken = trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    del broken._modules["0"]
    with pytest.raises(UntraceableError, match="broken graph"):
        trace(broken)
    aten = fx.Graph()
    aten.output(aten.call_function(torch.ops.aten.relu.default, (aten.placeholder("x"),)))
    with pytest.raises(UntraceableError, match="ATen"):
        trace(fx.GraphModule(nn.Module(), aten))


@pytest.mark.parametrize(("thing", "message"), [(Flagged, "call it first"), (F.relu, "not a torch.nn.Module")])
def test_what_is_no_network_is_refused(thing: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trace(thing)  # type: ignore[arg-type]


def test_plain_subclass_stays_a_layer() -> None:
    class MyNorm(nn.BatchNorm2d):
        pass

    gm = trace(nn.Sequential(nn.Conv2d(3, 4, 3), MyNorm(4)))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0", "1"]


def test_propagate_writes_shapes_and_moves_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten()).train()
    gm, before = trace(net), copy.deepcopy(net.state_dict())
    propagate(gm, X)
    assert [tuple(n.meta["shape"]) for n in gm.graph.nodes][1:] == 3 * [(2, 4, 3, 3)] + 2 * [(2, 36)]
    assert {n.meta["dtype"] for n in gm.graph.nodes} == {torch.float32}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in gm.modules())


def test_propagate_takes_several_inputs_and_forgets_stale_shapes() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    gm = trace(Add())
    propagate(gm, (X, X[:1]))
    propagate(gm, (X[:1], X[:1]))
    added = next(n for n in gm.graph.nodes if n.target is operator.add)
    assert added.meta["shape"] == (1, 3, 8, 8)


def test_wrong_example_names_the_layer_and_the_shape() -> None:
    with pytest.raises(ValueError, match=r"layer '0' does not accept its input of shape \[\(2, 1, 8, 8\)\]"):
        propagate(trace(nn.Sequential(nn.Conv2d(3, 4, 3))), X[:, :1])


def test_eval_mode_restores_each_mode_after_an_error() -> None:
    net = nn.Sequential(nn.Dropout().eval(), nn.Dropout().train())
    modes = [m.training for m in net.modules()]

    def fail() -> None:
        with tracing.eval_mode(net):
            assert not any(m.training for m in net.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in net.modules()] == modes


def test_a_constant_of_forward_stays_in_the_graph_and_off_the_network():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x + torch.tensor([1.0, 2.0, 3.0]))

    net, x = Shifted(), torch.randn(4, 3)
    names = set(dir(net))
    assert torch.equal(trace(net)(x), net(x))
    assert set(dir(net)) == names
