"""``quantize``: what stays equal, what is quantized, what is refused, and that the result is an ordinary module."""

import copy

import pytest
import torch
from graph_nets import Branches, Inverted, Tiny, images, trained_like
from torch import nn

from hq_lib import models, ptq
from hq_lib.graph import (
    QUANTIZER_SUFFIX,
    BitPolicy,
    PolicyError,
    QuantConv2d,
    QuantizeError,
    QuantLinear,
    act_quantizers,
    calibrate,
    kinds,
    op_name,
    quantize,
    weight_layers,
)
from hq_lib.graph.tracing import UntraceableError
from hq_lib.quantizers import Quantizer

PLACEMENTS = ("deploy", "academic")
FLOAT = BitPolicy(weight=32, act=32)


def sixteen(placement: str = "deploy", **settings) -> BitPolicy:
    return BitPolicy("minmax:16", "minmax:16", first_last_bits=16, input_bits=16, placement=placement, **settings)


def made(net: nn.Module, policy: BitPolicy, x: torch.Tensor):
    qnet = quantize(net, policy, x[:1])
    calibrate(qnet, x)
    return qnet


@pytest.fixture(params=["Tiny", "Branches", "lenet", "resnet20", "toynet", "mobilenetv2", "vgg11"])
def net_and_images(request) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    own = {"Tiny": Tiny, "Branches": Branches}
    net = own[request.param]() if request.param in own else models.build(request.param)
    x = images(2, size={**dict.fromkeys(own, 12), "lenet": 28}.get(request.param, 32))
    channels = next(p for p in net.parameters() if p.dim() == 4).shape[1]
    return trained_like(net), x[:, :channels]


def test_all_bits_32_equals_the_float_net_bit_for_bit(net_and_images):
    net, x = net_and_images
    qnet = quantize(net, FLOAT, x[:1])
    assert torch.equal(qnet(x), net(x))
    assert not act_quantizers(qnet)
    assert all(layer.weight_quantizer is None for layer in weight_layers(qnet).values())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sixteen_bits_are_close_to_float(net_and_images, placement):
    net, x = net_and_images
    y, y_hat = net(x), made(net, sixteen(placement), x)(x)
    assert (y_hat - y).norm() < 2e-3 * y.norm()
    assert not torch.equal(y_hat, y)


def test_every_tensor_that_enters_a_layer_add_or_pool_is_quantized(net_and_images):
    net, x = net_and_images
    qnet = quantize(net, BitPolicy(), x[:1])
    kind_of = kinds(qnet)

    def on_grid(node) -> bool:
        if kind_of[node] in ("pass", "concat", "relu"):
            return all(on_grid(n) for n in node.all_input_nodes if kind_of[n] != "shape")
        return kind_of[node] == "quantizer"

    readers = [n for n, kind in kind_of.items() if kind in ("layer", "add", "mul") or "pool" in op_name(n, qnet)]
    readers += [n for n in kind_of if op_name(n, qnet) == "mean"]
    loose = [(n.name, i.name) for n in readers for i in n.all_input_nodes if kind_of[i] != "shape" and not on_grid(i)]
    assert loose == []
    assert all(isinstance(layer.weight_quantizer, Quantizer) for layer in weight_layers(qnet).values())


def test_layers_keep_names_types_and_parameters():
    net = trained_like(Tiny())
    qnet = quantize(net, sixteen(), images())
    layers = weight_layers(qnet)
    assert list(layers) == [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert isinstance(layers["blocks.0.depthwise"], QuantConv2d)
    assert layers["blocks.0.depthwise"].groups == 16
    assert isinstance(layers["fc"], QuantLinear)
    theirs = qnet.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(theirs[name], tensor)


def test_the_float_net_and_the_random_state_are_left_alone():
    net, x = trained_like(Tiny()).train(), images()
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    qnet = made(net, sixteen(), x)
    assert torch.initial_seed() == 3
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    qnet(x).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert qnet.training


def test_quantizers_are_named_after_their_nodes_and_shared_ones_are_one_module():
    qnet = quantize(Branches().eval(), BitPolicy(), images())
    nodes = [n for n in qnet.graph.nodes if n.op == "call_module" and str(n.target).endswith(QUANTIZER_SUFFIX)]
    assert all(node.name == f"{node.args[0].name}{QUANTIZER_SUFFIX}" for node in nodes)
    targets = {str(node.args[0]): str(node.target) for node in nodes}
    assert targets["relu"] == targets["b"] == "relu_act_quantizer"
    assert qnet.relu_act_quantizer.signed  # one branch of the concatenation is signed
    assert len(nodes) == len(set(targets.values())) + 1


def test_a_layer_called_twice_is_quantized_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    net, x = Twice().eval(), images()
    qnet = made(net, sixteen(), x)
    assert len(weight_layers(qnet)) == 1
    torch.testing.assert_close(qnet(x), net(x), atol=1e-3, rtol=1e-3)


def test_the_rewrite_equals_a_network_quantized_by_hand():
    """One block written out: Q(relu(conv)), Q(conv), Q(add), with the quantizers of the graph."""
    net, x = trained_like(Inverted(3, 3, 1)), images()
    q = made(net, BitPolicy("minmax:4", "minmax:4", first_last_bits=None), x)
    layers, acts = weight_layers(q), act_quantizers(q)

    def conv(name, x):
        layer = net.get_submodule(name)
        return layer._conv_forward(x, layers[name].weight_quantizer(layer.weight), None)

    x0 = acts["x_act_quantizer"](x)
    x1 = acts["relu6_act_quantizer"](nn.functional.relu6(net.bn1(conv("expand", x0))))
    x2 = acts["act_act_quantizer"](nn.functional.relu6(net.bn2(conv("depthwise", x1))))
    x3 = net.bn3(conv("project", x2))  # feeds the add, which is the output here
    assert torch.equal(q(x), x0 + acts["bn3_act_quantizer"](x3))


@pytest.mark.parametrize("method", ["minmax", "dorefa", "dorefa_hw", "pact", "mpact", "lsq", "lsq_plus", "dsq"])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_every_method_runs_and_trains_on_the_graph(method, bits):
    net, x = trained_like(Tiny()), images()
    qnet = quantize(net, BitPolicy(f"{method}:{bits}", f"{method}:{bits}"), x).train()
    qnet(x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in qnet.parameters() if p.grad is not None)
    grads = [layer.weight.grad.abs().sum() for layer in weight_layers(qnet).values()]
    assert sum(grads) > 0  # of one layer it may vanish: at one bit all places of a small map can be clipped
    assert torch.isfinite(qnet.eval()(x)).all()


def test_copies_and_checkpoints(tmp_path):
    net, x = trained_like(Tiny()), images()
    qnet = made(net, BitPolicy("lsq:4", "lsq:4"), x)
    twin = copy.deepcopy(qnet)
    assert torch.equal(twin(x), qnet(x))
    assert twin.policy == qnet.policy
    twin.stem.weight.data.zero_()
    assert qnet.stem.weight.abs().sum() > 0
    torch.save(qnet.state_dict(), tmp_path / "state.pt")
    fresh = quantize(net, qnet.policy, x)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), qnet(x))


def test_a_state_of_another_policy_is_refused_by_tensor():
    net, x = trained_like(Tiny()), images()
    state = quantize(net, BitPolicy("lsq:4", "lsq:4"), x).state_dict()
    other = quantize(net, BitPolicy("lsq:4", "lsq:4", overrides={"blocks.1.project": {"weight": "lsq:3"}}), x)
    with pytest.raises(PolicyError, match=r"another policy \(weight blocks\.1\.project: saved lsq:4, here lsq:3\)"):
        other.load_state_dict(state)
    with pytest.raises(PolicyError, match=r"and \d+ more"):
        quantize(net, FLOAT, x).load_state_dict(state)


def test_a_state_of_other_batch_norms_or_of_rounded_weights_is_refused_in_words():
    net, x = trained_like(Tiny()), images()
    made_so = [quantize(net, BitPolicy("minmax:4", "minmax:4", bn=bn), x) for bn in ("fold", "keep")]
    with pytest.raises(PolicyError, match=r"policy\.bn.*keys are in one of the two only"):
        made_so[0].load_state_dict(made_so[1].state_dict())
    rounded = copy.deepcopy(made_so[0])
    ptq.fit_acts(rounded, x)
    ptq.reconstruct(rounded, x, ptq.adaround(iterations=0, n_images=None))
    with pytest.raises(PolicyError, match="quantizers that ptq has replaced"):
        made_so[0].load_state_dict(rounded.state_dict())


def test_the_same_bits_said_in_other_words_are_the_same_policy_to_a_state():
    net, x = trained_like(Tiny()), images()
    state = quantize(net, BitPolicy("lsq:4", "lsq:8"), x).state_dict()
    overrides = {"*": {"act": "lsq:8"}, "input": {"act": "minmax:8"}}
    quantize(net, BitPolicy("lsq:4", "lsq:4", overrides=overrides), x).load_state_dict(state)


def test_quantizing_twice_is_refused():
    net, x = trained_like(Tiny()), images()
    qnet = quantize(net, BitPolicy(), x)
    with pytest.raises(QuantizeError, match="quantized already"):
        quantize(qnet, BitPolicy(), x)
    with pytest.raises(QuantizeError, match="quantized already"):
        quantize(nn.Sequential(qnet), BitPolicy(), x)


def test_an_untraceable_net_names_its_line():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(UntraceableError, match=r"(?s)test_rewrite\.py:\d+.*leaf_modules"):
        quantize(Loop(), BitPolicy(), images())


def test_patterns_are_checked_against_the_network():
    with pytest.raises(PolicyError, match=r"'blocks\.7\.\*'"):
        quantize(Tiny(), BitPolicy(overrides={"blocks.7.*": 4}), images())


def test_an_example_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match="stem"):
        quantize(Tiny(), BitPolicy(), torch.zeros(1, 1, 12, 12))


def test_evaluating_before_calibration_is_refused():
    with pytest.raises(RuntimeError, match=r"of 'input'\) was never fitted: call graph\.calibrate"):
        quantize(Tiny().eval(), BitPolicy(), images())(images())


def test_a_broken_weight_names_its_layer():
    net = Tiny()
    with torch.no_grad():
        net.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"of 'fc'\): 1 of .* NaN or Inf"):
        quantize(net, BitPolicy(), images())


def test_torch_compile_takes_the_graph_whole():
    net, x = trained_like(Tiny()), images()
    qnet = made(net, BitPolicy("lsq:4", "lsq:4"), x)
    compiled = torch.compile(qnet, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), qnet(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look at it
def test_a_compiled_network_fits_itself_on_its_first_batch_outside_of_the_compiled_code(monkeypatch):
    net, x, outputs, traced, fit = trained_like(Tiny()), images(4), [], [], Quantizer.init_from
    net.drop.p = 0.0
    monkeypatch.setattr(Quantizer, "init_from", lambda *a: (traced.append(torch.compiler.is_compiling()), fit(*a))[1])
    for compiled in (False, True):
        qnet = quantize(copy.deepcopy(net), BitPolicy("lsq:4", "dsq:4"), x[:1]).train()
        forward = torch.compile(qnet, backend="eager") if compiled else qnet
        outputs.append(torch.stack([forward(x), forward(x)]))
    assert torch.equal(*outputs)
    assert traced
    assert not any(traced)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "mnasnet0_5", "efficientnet_b0", "googlenet",
             "densenet121", "shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small"]
)  # fmt: skip
def test_imagenet_networks(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    net = trained_like(getattr(torchvision.models, name)(weights=None, **options))
    x = images(2, 64)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(quantize(net, FLOAT, x)(x), y)
        for placement in PLACEMENTS:
            assert (made(net, sixteen(placement), x)(x) - y).norm() < 2e-3 * y.norm()


def test_states_fit_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    net, x = trained_like(Tiny()), images()
    qnet = made(net, BitPolicy("lsq:4", "lsq:4"), x)
    save_file(qnet.state_dict(), tmp_path / "state.safetensors")
    fresh = quantize(net, qnet.policy, x)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(fresh(x), qnet(x))


def test_folding_beforehand_removes_the_norms_and_keeps_the_function():
    net, x = trained_like(Tiny()), images()
    qnet = made(net, sixteen(bn="fold"), x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in qnet.modules())
    torch.testing.assert_close(qnet(x), net(x), atol=2e-3, rtol=1e-3)
