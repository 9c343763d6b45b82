"""Folding: equal to the original in eval mode, refused by name where it cannot be."""

import copy
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from hq_lib import models
from hq_lib.graph import agreement, folding
from hq_lib.graph.agreement import DisagreementError
from hq_lib.graph.folding import FoldError, fold_bn, folded_weight_bias, per_channel_ranges

M = TypeVar("M", bound=nn.Module)
BN = nn.modules.batchnorm._BatchNorm
SMALL = [name for name in models.names() if name not in models.IMAGENET]


def randomized(net: M, dtype: torch.dtype = torch.float64) -> M:
    """The net with BN statistics of which none is neutral, so that an error in any term shows."""
    draw = torch.Generator().manual_seed(0)
    for bn in (m for m in net.modules() if isinstance(m, BN)):
        if bn.running_mean is not None and bn.running_var is not None:
            bn.running_mean.normal_(0, 1, generator=draw)
            bn.running_var.uniform_(0.5, 2, generator=draw)
        if bn.affine:
            nn.init.uniform_(bn.weight, 0.5, 1.5, generator=draw)
            nn.init.normal_(bn.bias, generator=draw)
    return net.to(dtype).eval()


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def error(net: nn.Module, folded: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return (net(x) - folded(x)).abs().max().item()


def n_live(net: nn.Module) -> int:
    return sum(isinstance(m, BN) for m in net.modules())


FOLDABLE: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "bias": (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "no bias": (lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "eps": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.3)], (2, 3, 8, 8)),
    "not affine": (lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)], (2, 3, 8, 8)),
    "depthwise": (lambda: [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)], (2, 4, 8, 8)),
    "grouped": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 8, 8)),
    "conv1d": (lambda: [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 8)),
    "conv3d": (lambda: [nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)], (2, 2, 4, 4, 4)),
    "linear": (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4)], (3, 5)),
    "linear, no bias": (lambda: [nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)], (3, 5)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
    "transposed, groups": (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
    "transposed, 1d": (lambda: [nn.ConvTranspose1d(4, 2, 3, groups=2, bias=False), nn.BatchNorm1d(2)], (2, 4, 5)),
    "through dropout": (lambda: [nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "two in a row": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "synchronized": (lambda: [nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)], (2, 3, 8, 8)),
    "before": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, stride=2)], (2, 3, 8, 8)),
    "before, no bias": (lambda: [nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 4, 3, bias=False)], (2, 3, 8, 8)),
    "before, groups": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], (2, 4, 8, 8)),
    "before, linear": (lambda: [nn.BatchNorm1d(5), nn.Linear(5, 4)], (3, 5)),
    "before, reflecting pad": (
        lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")],
        (2, 3, 8, 8),
    ),
    "before, valid": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="valid")], (2, 3, 8, 8)),
    "two before": (lambda: [nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)], (2, 3, 8, 8)),
    "both sides": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "weight norm": (lambda: [parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_folded_equals_original_in_eval_mode(case: str) -> None:
    layers, shape = FOLDABLE[case]
    net = randomized(nn.Sequential(*layers()))
    folded = fold_bn(net, image(*shape))
    x = 3 * image(*shape) + 1  # not the example
    assert error(net, folded, x) < 1e-10
    assert n_live(folded) == 0
    assert {fold.reason for fold in folded.meta["folds"]} == {""}
    assert len(folded.meta["folds"]) == n_live(net)
    assert not folded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_pytorchs_own_fusion(dtype: torch.dtype) -> None:
    conv = randomized(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, eps=0.1)), dtype)
    linear = randomized(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), dtype)
    transposed = randomized(nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), dtype)
    for net, want in (
        (conv, fuse_conv_bn_eval(conv[0], conv[1])),
        (linear, fuse_linear_bn_eval(linear[0], linear[1])),
        (transposed, fuse_conv_bn_eval(transposed[0], transposed[1], transpose=True)),
    ):
        got = fold_bn(net).get_submodule("0")
        torch.testing.assert_close(got.weight, want.weight)
        torch.testing.assert_close(got.bias, want.bias)


def test_hand_computed_row() -> None:
    layer, bn = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)
    for tensor, value in zip((*layer.parameters(), *bn.parameters(), *bn.buffers()), (2, 1, 5, 7, 3, 4), strict=False):
        tensor.data.fill_(value)
    weight, bias = folded_weight_bias(layer, bn, kind="linear_bn")
    assert (weight.item(), bias.item()) == (5.0, 2.0)  # g = 5 / 2: W' = 2 g, b' = (1 - 3) g + 7
    weight, bias = folded_weight_bias(layer, bn, kind="bn_linear")
    assert (weight.item(), bias.item()) == (5.0, 0.0)  # b' = 1 + 2 (7 - 3 g)


class Crossed(nn.Module):
    """Registered as conv1, shortcut, bn2, bn1; executed as conv1, bn1 and shortcut, bn2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.shortcut = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.bn2, self.bn1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn1(F.dropout(self.conv1(x), training=self.training))) + self.bn2(self.shortcut(x))


def test_order_of_execution_counts_not_of_registration() -> None:
    net = randomized(Crossed()).train()
    folded = fold_bn(net, image(2, 3, 4, 4))
    assert [(fold.layer, fold.bn) for fold in folded.meta["folds"]] == [("conv1", "bn1"), ("shortcut", "bn2")]
    assert error(net.eval(), folded, image(2, 3, 4, 4)) < 1e-10


def test_original_is_unchanged_and_shares_nothing() -> None:
    net = randomized(Crossed()).train()
    before = copy.deepcopy(net.state_dict())
    folded = fold_bn(net, image(2, 3, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.state_dict().keys() == before.keys()
    assert all(m.training for m in net.modules())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in folded.parameters()}


def test_weight_norm_of_the_original_lives_on() -> None:
    net = randomized(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    want = net(image(2, 3, 8, 8))
    folded = fold_bn(net, image(2, 3, 8, 8))
    assert torch.equal(net(image(2, 3, 8, 8)), want)
    assert folded.state_dict().keys() == {"0.weight", "0.bias"}


class Net(nn.Module):
    """Named layers and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, **options)  # type: ignore[arg-type]


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def _hooked() -> nn.Conv2d:
    conv = _conv()
    conv.register_forward_hook(lambda _m, _x, y: 2 * y)
    return conv


def _infinite() -> nn.Conv2d:
    conv = _conv()
    nn.init.constant_(conv.weight, float("inf"))
    return conv


class Opaque(nn.Sequential):
    pass


REFUSED: dict[str, tuple[Callable[[], Net], str]] = {
    "zero padding after": (
        lambda: Net(lambda s, x: s.conv(s.bn(x)), bn=nn.BatchNorm2d(3), conv=_conv(padding=1)),
        "'conv' after it pads with zeros",
    ),
    "same padding after": (
        lambda: Net(lambda s, x: s.conv(s.bn(x)), bn=nn.BatchNorm2d(3), conv=_conv(padding="same")),
        "'conv' after it pads with zeros",
    ),
    "transposed after": (
        lambda: Net(lambda s, x: s.up(s.bn(x)), bn=nn.BatchNorm2d(3), up=nn.ConvTranspose2d(3, 4, 3)),
        "'up' after it is transposed",
    ),
    "output used elsewhere": (
        lambda: Net(lambda s, x: s.bn(y := s.conv(x)) + y, bn=nn.BatchNorm2d(3), conv=_conv()),
        "the output of 'conv' before it is used by 'add' too",
    ),
    "dropped output used elsewhere": (
        lambda: Net(
            lambda s, x: s.bn(s.drop(y := s.conv(x))) + y, bn=nn.BatchNorm2d(3), conv=_conv(), drop=nn.Dropout()
        ),
        "the output of 'conv' before it is used by 'add' too",
    ),
    "norm used elsewhere": (
        lambda: Net(lambda s, x: s.conv(y := s.bn(x)).sum() + y, bn=nn.BatchNorm2d(3), conv=_conv()),
        "its output goes to 2 places",
    ),
    "shared conv": (
        lambda: Net(lambda s, x: s.conv(s.bn(s.conv(x))), bn=nn.BatchNorm2d(3), conv=_conv()),
        "'conv' is called 2 times",
    ),
    "shared norm": (
        lambda: Net(lambda s, x: s.bn(s.b(s.bn(s.a(x)))), bn=nn.BatchNorm2d(3), a=_conv(), b=_conv()),
        "'bn' is called 2 times",
    ),
    "batch statistics": (
        lambda: Net(lambda s, x: s.bn(s.conv(x)), bn=nn.BatchNorm2d(3, track_running_stats=False), conv=_conv()),
        "track_running_stats=False",
    ),
    "weight read": (
        lambda: Net(lambda s, x: s.bn(s.conv(x)) + s.conv.weight.sum(), bn=nn.BatchNorm2d(3), conv=_conv()),
        "forward reads the tensors of 'conv' directly",
    ),
    "hook": (
        lambda: Net(lambda s, x: s.bn(s.conv(x)), bn=nn.BatchNorm2d(3), conv=_hooked()),
        "'conv' has forward hooks",
    ),
    "no layer": (
        lambda: Net(lambda s, x: F.relu(s.bn(F.relu(x))), bn=nn.BatchNorm2d(3)),
        "'relu' before it is no plain .* layer, and 'relu_1' after it is no plain",
    ),
    "own forward": (
        lambda: Net(lambda s, x: s.bn(s.conv(x)), bn=nn.BatchNorm2d(3), conv=Standardized(3, 3, 3)),
        "before it is no plain convolution",
    ),
    "active dropout": (
        lambda: Net(lambda s, x: s.bn(F.dropout(s.conv(x))), bn=nn.BatchNorm2d(3), conv=_conv()),
        "'dropout' before it is no plain",
    ),
    "functional": (
        lambda: Net(lambda s, x: F.batch_norm(x, s.m.bias, s.m.weight[:, 0].abs()), m=nn.Linear(1, 3)),
        "'batch_norm': it is a functional batch_norm",
    ),
    "inside a leaf": (
        lambda: Net(lambda s, x: s.leaf(x), leaf=Opaque(_conv(), nn.BatchNorm2d(3))),
        "'leaf.1': it is inside a leaf module",
    ),
    "not on axis 1": (
        lambda: Net(lambda s, x: s.bn(s.fc(x[:, 0])), fc=nn.Linear(8, 8), bn=nn.BatchNorm1d(8)),
        "the channels of 'fc' are not on the batch norm's axis 1",
    ),
    "not finite": (
        lambda: Net(lambda s, x: s.bn(s.conv(x)), conv=_infinite(), bn=nn.BatchNorm2d(3)),
        "the folded weights are not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_by_name(case: str) -> None:
    make, reason = REFUSED[case]
    net, x = randomized(make()), image(2, 3, 8, 8)
    with pytest.raises(FoldError, match=reason):
        fold_bn(net, x, leaf_modules=(Opaque,))


@pytest.mark.parametrize("case", sorted(set(REFUSED) - {"not finite", "active dropout"}))
def test_kept_norms_still_run_exactly(case: str) -> None:
    net, x = randomized(REFUSED[case][0]()), image(2, 3, 8, 8)
    folded = fold_bn(net, x, on_refusal="keep", leaf_modules=(Opaque,))
    assert all(fold.reason and not fold.layer for fold in folded.meta["folds"])
    assert n_live(folded) == n_live(net)
    assert error(net, folded, x) < 1e-12


def test_keep_folds_the_rest_and_reports_both() -> None:
    net = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = fold_bn(net, image(2, 3, 8, 8), on_refusal="keep")
    assert [(fold.bn, fold.layer, fold.kind) for fold in folded.meta["folds"]] == [("0", "", ""), ("3", "2", "conv_bn")]
    assert error(net, folded, image(2, 3, 8, 8)) < 1e-12
    assert n_live(folded) == 1
    with pytest.raises(ValueError, match=r"on_refusal 'skip'.*raise, keep"):
        fold_bn(net, on_refusal="skip")  # type: ignore[arg-type]


def test_batch_norm_that_nothing_uses_is_dropped() -> None:
    net = randomized(Net(lambda s, x: (s.bn(x), s.conv(x))[1], bn=nn.BatchNorm2d(3), conv=_conv()))
    assert n_live(fold_bn(net, image(2, 3, 8, 8))) == 0


@pytest.mark.parametrize("sign", ["weight", "bias"])
def test_self_check_names_the_first_wrong_layer(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped sign in the formula, from the second fold on, does not pass."""
    exact, calls = folding.folded_weight_bias, []

    def flipped(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        calls.append(args)
        weight, bias = exact(*args, **options)  # type: ignore[arg-type]
        signs = (1, 1) if len(calls) == 1 else (-1, 1) if sign == "weight" else (1, -1)
        return signs[0] * weight, signs[1] * bias

    net = randomized(nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))))
    monkeypatch.setattr(folding, "folded_weight_bias", flipped)
    with pytest.raises(DisagreementError, match="first at '3'"):
        fold_bn(net, image(2, 3, 8, 8))
    calls.clear()
    fold_bn(net)


def test_self_check_says_when_the_original_is_not_finite() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(DisagreementError, match="'0' is not finite on this example in the original"):
        fold_bn(net, image(2, 3, 8, 8) * float("inf"))


def test_random_layers_do_not_fail_the_check() -> None:
    net = randomized(Net(lambda s, x: F.dropout(s.bn(s.conv(x))), bn=nn.BatchNorm2d(3), conv=_conv()))
    state = torch.get_rng_state()
    fold_bn(net, image(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), dtype)
    folded = fold_bn(net, image(2, 3, 8, 8, dtype=dtype))
    assert {p.dtype for p in folded.parameters()} == {dtype}
    want = net(x := image(2, 3, 8, 8, dtype=dtype))
    assert error(net, folded, x) < agreement.TOLERANCE[dtype] * want.abs().max()


def test_frozen_layers_stay_frozen() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).requires_grad_(False)
    assert not any(p.requires_grad for p in fold_bn(net).parameters())


def test_folding_twice_changes_nothing() -> None:
    net = randomized(Crossed())
    once = fold_bn(net, image(2, 3, 4, 4))
    twice = fold_bn(once, image(2, 3, 4, 4))
    assert twice.meta["folds"] == ()
    assert all(torch.equal(twice.state_dict()[key], value) for key, value in once.state_dict().items())


def test_ranges_are_those_of_each_output_channel() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)
    )
    table = per_channel_ranges(net)
    assert list(table.columns) == ["layer", "channel", "max_abs"]
    want = [net[0].weight[c].abs().max() for c in range(6)]
    want += [net[1].weight[3 * (c // 2) : 3 * (c // 2) + 3, c % 2].abs().max() for c in range(4)]
    want += [net[3].weight[c].abs().max() for c in range(2)]
    assert table.max_abs.tolist() == [v.item() for v in want]
    assert table.layer.tolist() == 6 * ["0"] + 4 * ["1"] + 2 * ["3"]


def test_fold_scales_the_ranges_by_its_multiplier() -> None:
    net = randomized(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    g = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    before, after = per_channel_ranges(net), per_channel_ranges(fold_bn(net))
    torch.testing.assert_close(torch.tensor(after.max_abs), torch.tensor(before.max_abs) * g.detach().abs())


def _example(name: str, dtype: torch.dtype) -> Tensor:
    size = 64 if name in models.IMAGENET else 28 if name == "lenet" else 32
    return image(2, 1 if name == "lenet" else 3, size, size, dtype=dtype)


def _folds_exactly(net: nn.Module, name: str) -> None:
    """Random statistics let the logits of deep residual nets grow to 1e5, so both bounds are parts of the largest."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        folded = fold_bn(net.to(dtype))
        x = _example(name, dtype)
        with torch.no_grad():
            want, got = net(x), folded(x)
        assert (got - want).abs().max() < bound * want.abs().max()
        assert torch.equal(got.argmax(1), want.argmax(1))
        assert n_live(folded) == 0


@pytest.mark.parametrize("name", SMALL)
def test_every_small_network_folds_exactly(name: str) -> None:
    torch.manual_seed(0)
    _folds_exactly(randomized(models.build(name)), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.IMAGENET)
def test_every_imagenet_network_folds_exactly(name: str) -> None:
    torch.manual_seed(0)
    try:
        net = models.build(name)
    except ImportError as missing:
        pytest.skip(str(missing))
    _folds_exactly(randomized(net), name)
