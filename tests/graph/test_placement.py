"""Where quantizers sit: hand-counted sites on small nets, signs, roles, shared grids, and names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_lib.graph import BitPolicy, QuantizeError, Site, calibrate, find_sites, kinds, quantize
from hq_lib.graph.tracing import propagate, trace


class Residual(nn.Module):
    """Two convolutions around an identity: the smallest block."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Small(nn.Module):
    """Stem, max-pool, block, average pool, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Residual()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.stem(x)), 2)
        x = F.dropout(self.block(x), 0.5, self.training)
        return self.fc(x.mean((2, 3)).flatten(1))


def sites(net: nn.Module, placement: str = "deploy") -> dict[str, Site]:
    return {site.name: site for site in find_sites(trace(net.eval()), placement=placement)}


def test_deploy_quantizes_the_image_layers_adds_and_average_pools():
    assert list(sites(Small())) == ["input", "stem", "block.conv1", "block.conv2", "block.add", "mean"]


def test_academic_leaves_the_add_float():
    assert list(sites(Small(), "academic")) == ["input", "stem", "block.conv1", "block.add", "mean"]


def test_quantizers_sit_after_batch_norm_and_activation():
    nodes = {name: site.node for name, site in sites(Small()).items()}
    assert nodes == {
        "input": "x", "stem": "relu6", "block.conv1": "relu", "block.conv2": "block_conv2", "block.add": "relu_1",
        "mean": "mean",
    }  # fmt: skip


def test_signs_follow_from_the_graph():
    signed = {name for name, site in sites(Small()).items() if site.signed}
    assert signed == {"input", "block.conv2"}


def test_roles():
    deploy = {name: site.role for name, site in sites(Small()).items() if site.role}
    assert deploy == {"input": "image", "stem": "stem", "mean": "pool_last"}
    academic = {name: site.role for name, site in sites(Small(), "academic").items() if site.role}
    assert academic == {"input": "image", "stem": "stem", "block.add": "last", "mean": "pool_last"}


def test_shapes_are_of_one_image_once_an_example_has_run():
    gm = trace(Small().eval())
    propagate(gm, torch.zeros(5, 3, 10, 10))
    assert [site.shape for site in find_sites(gm)][:2] == [(3, 10, 10), (4, 8, 8)]


def test_a_branch_that_also_feeds_a_layer_keeps_its_quantizer_in_academic_placement():
    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.conv, self.fc = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.down(x)
            return self.fc((x + self.conv(x)).amax((2, 3)))

    assert list(sites(Down(), "academic")) == ["input", "down", "add"]


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (lambda y: y, False),
        (lambda y: F.dropout(y, 0.1, False).contiguous(), False),
        (lambda y: F.max_pool2d(y, 3, 1, 1), True),
        (lambda y: F.pad(y[:, :, 1:], (0, 0, 1, 0)), True),
        (lambda y: F.interpolate(y, scale_factor=1), True),
    ],
)
def test_academic_placement_keeps_the_quantizer_of_what_is_moved_before_it_is_added(between, kept):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc((between(self.a(x)) + self.b(x)).amax((2, 3)))

    assert list(sites(Moved(), "academic")) == ["input", *(["a"] if kept else []), "add"]


class Joined(nn.Module):
    """A concatenation of a ReLU branch and a linear branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), F.max_pool2d(self.b(x), 3, 1, 1)], 1)
        return F.adaptive_avg_pool2d(self.c(x), 1).flatten(1)


def test_concatenated_tensors_share_a_grid_wide_enough_for_all_signs():
    found = sites(Joined())
    assert list(found) == ["input", "a", "b", "c"]
    assert found["a"].group == found["b"].group == "relu"
    assert found["a"].signed
    assert found["b"].signed
    assert found["c"].group == "c"


def test_the_network_output_stays_float():
    class Pooled(nn.Sequential):
        pass

    net = Pooled(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert list(sites(net)) == ["input", "0"]


def test_pre_activation_norms_get_a_quantizer_of_their_own():
    class Pre(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            y = x + self.conv(F.relu(self.bn(x)))
            return self.fc(y.amax((2, 3)))

    found = sites(Pre())
    assert {name: site.node for name, site in found.items()} == {
        "input": "x", "bn": "relu", "conv": "conv", "add": "add",
    }  # fmt: skip
    assert not found["bn"].signed


@pytest.mark.parametrize("placement", ["deploy", "academic"])
def test_a_norm_behind_a_relu_gets_a_quantizer_of_its_own(placement):
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU6(), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    assert {name: site.node for name, site in sites(net, placement).items()} == {
        "input": "input_1", "0": "_2", "3": "_4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "signed"),
    [
        (nn.ReLU(), False),
        (nn.ReLU6(), False),
        (nn.Hardtanh(0, 1), False),
        (nn.Hardtanh(), True),
        (nn.Sigmoid(), False),
        (nn.SiLU(), True),
        (nn.LeakyReLU(), True),
        (lambda x: torch.clamp(x, 0, 6), False),
        (lambda x: x.clamp(min=0.0), False),
        (lambda x: torch.clamp(x, -1, 1), True),
        (lambda x: x.clamp(max=1.0), True),
        (lambda x: torch.clip(x, 0, 1), False),
        (lambda x: F.hardtanh(x, 0.0, 6.0), False),
        (lambda x: F.hardtanh(x), True),
        (lambda x: F.relu(x, inplace=True), False),
        (lambda x: x.relu_(), False),
        (lambda x: x.relu() * x.sigmoid(), False),
        (lambda x: x.relu() + x.sigmoid(), False),
        (lambda x: x.relu() - x.sigmoid(), True),
        (lambda x: F.threshold(x.relu(), 0.3, -1.0), True),
        (lambda x: sum([x.relu(), x.sigmoid()]), False),
        (lambda x: torch.add(0, x.relu(), alpha=-1), True),
    ],
)
def test_every_spelling_of_an_activation_gets_its_sign(activation, signed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
            self.activation = activation

        def forward(self, x):
            return self.fc(self.activation(self.conv(x)))

    found = list(sites(Net()).values())
    assert found[-1].signed is signed


def test_functional_layers_and_unknown_layers_are_refused_with_the_way_out():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 3, 1, 1))

        def forward(self, x):
            return F.conv2d(x, self.w)

    with pytest.raises(QuantizeError, match=r"test_placement\.py:\d+.* calls conv2d as a function.*nn\.Conv2d"):
        kinds(trace(Functional()))
    with pytest.raises(QuantizeError, match=r"layer '0': conv1d has no quantized form"):
        kinds(trace(nn.Sequential(nn.Conv1d(1, 1, 1))))
    with pytest.raises(QuantizeError, match="nothing to quantize"):
        find_sites(trace(nn.Sequential(nn.ReLU())))


@pytest.mark.parametrize("padding", [nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1)])
def test_padding_by_what_is_there_adds_no_quantizer_as_a_module_either(padding):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), padding, nn.Conv2d(4, 2, 3))
    assert list(sites(net)) == ["input", "0"]


def test_the_0_of_pythons_sum_is_no_addition():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(sum([self.a(x), self.b(x)]).amax((2, 3)))

    assert list(sites(Summed())) == ["input", "a", "b", "add"]
    assert list(sites(Summed(), "academic")) == ["input", "add"]


@pytest.mark.parametrize(
    ("masked", "quantized"),
    [
        (lambda y: torch.where(y > 0, y, 0.1 * y), ["mul", "where"]),
        (lambda y: y * (y > 0), ["mul"]),
        (lambda y: y.masked_fill(y < 0, 0.0), ["masked_fill"]),
        (lambda y: y * y.gather(1, y.argmax(1, keepdim=True)), ["gather", "mul"]),
        (lambda y: y * F.one_hot(y.argmax(1), 4).permute(0, 3, 1, 2), ["mul"]),
    ],
)
def test_masks_and_indices_have_no_quantizer(masked, quantized):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(masked(self.conv(x)).amax((2, 3)))

    net, x = Net().eval(), torch.randn(2, 3, 5, 5)
    qnet = quantize(net, BitPolicy("minmax:16", "minmax:16", first_last_bits=16, input_bits=16), x)
    calibrate(qnet, x)
    assert [site.name for site in qnet.meta["sites"]] == ["input", "conv", *quantized]
    torch.testing.assert_close(qnet(x), net(x), atol=2e-3, rtol=0)


def test_an_output_that_the_network_reads_too_is_returned_on_its_grid():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            y = torch.relu(self.conv(x))
            return y, self.fc(y.amax((2, 3)))

    x = torch.randn(2, 3, 5, 5)
    qnet = quantize(Both().eval(), BitPolicy("minmax:8", "minmax:2", first_last_bits=2), x)
    calibrate(qnet, x)
    assert len(qnet(x)[0].unique()) == 4
