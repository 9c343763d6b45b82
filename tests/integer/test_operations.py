"""Every operation that mobile networks are made of: fake-quantized, NumPy, oracle, C, ONNX and ideal crossbar agree."""

import copy
import io
from dataclasses import replace

import integer_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from integer_nets import images
from torch import nn

from hq_lib import data
from hq_lib.crossbar import EngineNetwork, IdealEngine
from hq_lib.deploy import fpga, onnx
from hq_lib.deploy.c import Runtime, compiler, to_bytes
from hq_lib.deploy.c.runtime import CompilerError
from hq_lib.graph import BitPolicy, QuantizeError, calibrate, find_sites, quantize, save
from hq_lib.graph.tracing import trace
from hq_lib.integer import LowerError, RecordError, agreement, check, load, lower, run
from hq_lib.integer import record as r
from hq_lib.integer import to_bytes as integer_bytes
from hq_lib.integer.execute import real_values

try:
    compiler()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)


class Net(nn.Module):
    """Two convolutions of one image, anything between them and a classifier."""

    def __init__(self, between, n_out=4, parts=()):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.between, self.parts, self.fc = between, nn.ModuleList(parts), nn.Linear(n_out, 5)

    def forward(self, x):
        return self.fc(self.between(self, self.a(x), self.b(x)).mean((2, 3)))


def gate(s, a, b):
    return a * torch.sigmoid(s.parts[1](F.silu(s.parts[0](F.adaptive_avg_pool2d(a, 1)))))


MODULES = [nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.1), nn.ELU(), nn.Tanh()]
FUNCTIONS = [F.hardswish, F.hardsigmoid, torch.sigmoid, F.silu, F.gelu, F.leaky_relu, F.elu, torch.tanh]
CASES = {
    **{type(m).__name__: Net(lambda s, a, b: s.parts[0](a), parts=[m]) for m in MODULES},
    **{f"F.{f.__name__}": Net(lambda s, a, b, f=f: f(a)) for f in FUNCTIONS},
    "prelu": Net(lambda s, a, b: s.parts[0](a), parts=[nn.PReLU()]),
    "act then clip": Net(lambda s, a, b: F.relu6(F.silu(a))),
    "hardswish by hand": Net(lambda s, a, b: a * F.relu6(a + 3) / 6),
    "numbers": Net(lambda s, a, b: (0.5 - a * 2 + a.shape[2]) / 3.0),
    "gate": Net(gate, parts=[nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)]),
    "gate first": Net(lambda s, a, b: torch.sigmoid(b.mean((2, 3), keepdim=True)) * a),
    "product": Net(lambda s, a, b: torch.mul(a, b)),
    "square": Net(lambda s, a, b: a * a),
    "spatial gate": Net(lambda s, a, b: a * torch.sigmoid(s.parts[0](b)), parts=[nn.Conv2d(4, 1, 1)]),
    "sub": Net(lambda s, a, b: F.relu(a - F.relu(b))),
    "pooled, then added": Net(lambda s, a, b: F.relu(F.max_pool2d(a, 3, 1, 1) + b)),
    "padded and cut, then added": Net(lambda s, a, b: F.relu(F.pad(a[:, :, ::2], (0, 0, 3, 3)) + b)),
    "upsampled, then added": Net(
        lambda s, a, b: F.interpolate(s.parts[0](b), scale_factor=2) + a, parts=[nn.Conv2d(4, 4, 2, 2)]
    ),
    "sub of itself": Net(lambda s, a, b: a - F.max_pool2d(a, 3, 1, 1)),
    "alpha -1": Net(lambda s, a, b: torch.add(a, F.relu(b), alpha=-1)),
    "a tensor twice": Net(lambda s, a, b: torch.cat([a, b, a], 1), 12),
    "x + x": Net(lambda s, a, b: a + a),
    "two readers of a clip": Net(lambda s, a, b: (lambda y: F.relu6(y) + y)(a)),
    "padding left out": Net(lambda s, a, b: F.avg_pool2d(a, 3, 1, 1, count_include_pad=False)),
    "ceil mode": Net(lambda s, a, b: F.avg_pool2d(a, 5, 4, 1, ceil_mode=True)),
    "ceil mode, padding out": Net(lambda s, a, b: F.avg_pool2d(a, (5, 2), (4, 5), 1, True, False)),
    "divisor": Net(lambda s, a, b: F.avg_pool2d(a, 5, 4, 1, True, True, 7)),
    "uneven": Net(lambda s, a, b: F.adaptive_avg_pool2d(a, (5, 7))),
    "uneven, larger": Net(lambda s, a, b: F.adaptive_avg_pool2d(F.avg_pool2d(a, 6), (3, 4))),
    "sized by a tensor": Net(lambda s, a, b: F.avg_pool2d(a, a.size()[3])),
    "nearest": Net(lambda s, a, b: s.parts[0](F.avg_pool2d(a, 2)), parts=[nn.Upsample(scale_factor=2)]),
    "nearest, to a size": Net(lambda s, a, b: F.interpolate(F.avg_pool2d(a, (3, 2)), size=b.shape[2:]) + b),
    "bilinear": Net(lambda s, a, b: F.relu(F.interpolate(a, scale_factor=2, mode="bilinear"))),
    "bilinear module": Net(
        lambda s, a, b: s.parts[0](a), parts=[nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
    ),
    "transposed": Net(lambda s, a, b: F.relu(s.parts[0](a)), 6, [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)]),
    "transposed, grouped": Net(
        lambda s, a, b: s.parts[0](a), 6, [nn.ConvTranspose2d(4, 6, (3, 2), (3, 1), (1, 2), groups=2, dilation=(1, 3))]
    ),
    "transposed and norm": Net(
        lambda s, a, b: s.parts[1](s.parts[0](a)), 3, [nn.ConvTranspose2d(4, 3, 2, 2), nn.BatchNorm2d(3)]
    ),
    "norms behind a ReLU and a clip": Net(
        lambda s, a, b: F.relu(s.parts[1](F.relu6(s.parts[0](F.relu(a))))),
        parts=[nn.BatchNorm2d(4), nn.BatchNorm2d(4)],
    ),
    "shuffles": Net(
        lambda s, a, b: F.pixel_unshuffle(s.parts[1](F.relu(s.parts[0](a))), 3), 9,
        [nn.ChannelShuffle(2), nn.PixelShuffle(2)],
    ),
    "pieces joined as they come": Net(lambda s, a, b: torch.cat(torch.cat(a.chunk(2, 1)[::-1], 1).split([1, 3], 1), 1)),
    "root of a clip with two readers": Net(lambda s, a, b: (lambda y: torch.sqrt(F.relu(y)) + y)(a)),
    "logarithm of a clip with two readers": Net(lambda s, a, b: (lambda y: torch.log(y.clamp(min=0.1)) + y)(a)),
    "mean, by axis": Net(lambda s, a, b: torch.sigmoid(s.parts[0](b.mean(axis=(2, 3), keepdims=True))) * a,
                         parts=[nn.Conv2d(4, 4, 1)]),
    "largest, kept": Net(lambda s, a, b: torch.amax(F.relu(a), axis=(-2, -1), keepdims=True) * b),
    "joined by axis": Net(lambda s, a, b: torch.cat(tensors=[a, F.relu(b)], axis=1), 8),
    "split by name": Net(lambda s, a, b: torch.cat(a.split(split_size=2, dim=1)[::-1], dim=1)),
    "added by name": Net(lambda s, a, b: torch.sub(torch.mul(a, other=b), other=F.relu(torch.add(other=b, input=a)))),
    "mean added": Net(lambda s, a, b: F.relu(b.mean((2, 3), keepdim=True) + a)),
    "mean subtracted": Net(lambda s, a, b: F.relu(a - a.mean((2, 3), keepdim=True))),
    "rows and columns added": Net(lambda s, a, b: b.amax(2, keepdim=True) + a.mean(-1, keepdim=True)),
    "mean, axis by axis": Net(lambda s, a, b: a.mean(-1).mean(-1)[:, :, None, None]),
    "mean of places": Net(lambda s, a, b: F.relu(a).flatten(2).mean(-1).view(-1, 4, 1, 1) * b),
    "mean of tokens": Net(lambda s, a, b: s.parts[0](a.flatten(2).transpose(1, 2)).mean(1).view(-1, 4, 1, 1) + b,
                          parts=[nn.Linear(4, 4)]),
    "largest of places": Net(lambda s, a, b: a.flatten(2).amax(2, keepdim=True).unflatten(2, (1, 1)) + b),
    "indices": Net(lambda s, a, b: a[..., ::2] * b[..., :1] + a[:, 1].unsqueeze(1)[..., ::2] * b[:, :, -12:, ::2]),
    "from the end": Net(lambda s, a, b: a[:, -1:, :] * b + a[:, :, -1].unsqueeze(2)),
    "pieces one by one": Net(lambda s, a, b: torch.cat([y.unsqueeze(2) for y in
                                                             (a.select(2, -1), b.narrow(2, 3, 4).unbind(2)[1])], 2)),
    "in other words": Net(lambda s, a, b: torch.multiply(
        a.swapaxes(2, 3), torch.negative(b).absolute().divide(2)).true_divide(3)),
    "as they are": Net(lambda s, a, b: a.float() + b.to(torch.float32).type_as(a).expand_as(a).expand(-1, -1, -1, -1)),
    "padded by a number": Net(lambda s, a, b: s.parts[0](a), parts=[nn.ConstantPad2d((1, 2, 0, 1), 0.0)]),
    "split": Net(lambda s, a, b: (lambda t: torch.cat([F.relu(t[1]), F.silu(t[0])], 1))(a.split([1, 3], 1))),
}  # fmt: skip
POLICIES = {
    "w8a8": BitPolicy(),
    "w4a4": BitPolicy(weight="lsq:4", act="lsq:4"),
    "a12": BitPolicy(act="minmax:12", first_last_bits=None),
    "academic": BitPolicy(act="minmax:6", placement="academic", input_bits=8),
}


def made(net: nn.Module, policy: BitPolicy, size: int = 12):
    torch.manual_seed(0)
    x = images(24, size)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) / p[0].numel() ** 0.5 if p.ndim > 1 else torch.rand(p.shape) / 2)
    qnet = quantize(net.eval(), policy, x[:1])
    calibrate(qnet, x)
    return qnet.eval()


SOME = (
    "SiLU", "gate", "product", "sub", "alpha -1", "x + x", "two readers of a clip", "padding left out", "uneven",
    "nearest, to a size", "bilinear", "transposed", "transposed and norm", "shuffles",
    "mean added", "rows and columns added", "mean of tokens",
    "norms behind a ReLU and a clip", "pooled, then added", "padded and cut, then added", "upsampled, then added",
)  # fmt: skip
ALL = [(case, policy) for policy in POLICIES for case in (CASES if policy == "w8a8" else SOME)]


def everywhere_alike(model: r.IntegerModel, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Every tensor that NumPy makes of ``x``, once it is the oracle's and C, ONNX and ideal arrays give its logits."""
    got: dict[str, np.ndarray] = {}
    logits = run(model, x, watch=lambda op, v: got.update({op.output: v}))
    want = oracle.run(model, x[1].numpy())
    for name, values in got.items():
        assert np.array_equal(values[1].astype(np.int64), want[name].astype(np.int64)), name
    assert np.array_equal(Runtime(model).run(x), logits)
    assert np.array_equal(EngineNetwork(model, IdealEngine()).run(x), logits)
    if model.requantizer == "float32":
        assert np.array_equal(onnx.run(onnx.session(onnx.export(model)), x), logits)
    return got


def ties(model: r.IntegerModel, got: dict[str, np.ndarray]) -> dict[str, int]:
    """By addition, how many of its sums lie on a tie, where the last bit of a processor's float32 decides."""
    found = {}
    for op in (op for op in model.ops if isinstance(op, r.Add)):
        terms = zip(op.inputs, op.requants, strict=True)
        real = sum(
            (got[name] - float(model.tensors[name].zero_point)) * np.float64(requant.multiplier[0])
            for name, requant in terms
        )
        found[op.output] = int((np.abs(real - np.floor(real) - 0.5) < 1e-4).sum())
    return found


@pytest.mark.parametrize(("case", "policy"), ALL)
def test_all_executors_give_the_oracle_s_integers_and_the_graph_s_function(case, policy):
    qnet, x = made(CASES[case], POLICIES[policy]), images(5, 12, seed=3)
    for requantizer in r.REQUANTIZERS:
        model = lower(qnet, requantizer=requantizer)
        n_ties = ties(model, everywhere_alike(model, x))
        if requantizer == "float32":
            found = agreement(qnet, model, x, forced=True)
            assert max(t.largest for t in found.tensors) <= 1
            if policy != "a12":
                assert all(t.n_differ <= n_ties.get(t.name, 0.04 * t.n) for t in found.tensors), found


REFUSED = {
    "linear of rows and columns": (
        Net(lambda s, a, b: s.parts[0](a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), parts=[nn.Linear(4, 4)]),
        r"layer 'parts.0' reads \(12, 12, 4\).*x\.flatten\(1, 2\).*1x1 convolution",
    ),
    "channels repeated": (Net(lambda s, a, b: a + b[:, :1]), r"'add' adds \(1, 12, 12\) to \(4, 12, 12\).*only rows"),
    "padded by another number": (
        Net(lambda s, a, b: s.parts[0](a), parts=[nn.ConstantPad2d(1, 2.0)]),
        "no integer form",
    ),
    "expanded": (Net(lambda s, a, b: a.amax(2, keepdim=True).expand_as(b)), "no integer form"),
    "mean of channels": (Net(lambda s, a, b: a.mean(1, keepdim=True) * b), "reduces over 1; only rows and columns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_integer_form_is_refused_in_words(case):
    net, message = REFUSED[case]
    with pytest.raises(LowerError, match=message):
        lower(made(net, BitPolicy()))


def test_real_numbers_of_another_type_are_refused_with_the_way_out(tmp_path):
    x = images(8, 12)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        qnet = quantize(Net(lambda s, a, b: a + b).to(dtype).eval(), BitPolicy(), x[:1].to(dtype))
        calibrate(qnet, x.to(dtype))
        with pytest.raises(QuantizeError, match=rf"is {dtype}.*qnet\.float\(\) first"):
            save(qnet, tmp_path / "net.safetensors")
    with pytest.raises(LowerError, match=r"'a.weight' is torch.bfloat16.*qnet\.float\(\) first"):
        lower(qnet)
    lower(qnet.float())


@pytest.mark.parametrize("ends", [(-2.0, -0.2), (0.2, 2.0), (-0.3, 0.4)])
@pytest.mark.parametrize("pool", [lambda y: y, lambda y: F.avg_pool2d(y, 3, 2, 1).amax((2, 3), keepdim=True)])
def test_an_average_without_a_quantizer_takes_a_tensor_clipped_beside_0(ends, pool):
    qnet, x = made(Net(lambda s, a, b: pool(a.clamp(*ends))), BitPolicy(pool_bits=32)), images(5, 12, seed=3)
    for requantizer in r.REQUANTIZERS:
        model = lower(qnet, requantizer=requantizer)
        everywhere_alike(model, x)
    with torch.no_grad():
        want = qnet(x).numpy()
    assert np.abs(run(model, x) - want).max() <= 1e-3 * np.abs(want).max()


def test_a_layer_has_its_name_in_the_record_whatever_else_is_called_so():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.flatten, self.logits = nn.Conv2d(3, 2, 3, 2), nn.Linear(50, 6), nn.Linear(6, 6)
            self.act, self.fc = nn.ReLU6(), nn.Linear(6, 5)

        def forward(self, x):
            y = self.logits(self.flatten(torch.flatten(F.relu(self.image(x)), 1)))
            return self.fc(self.act(y) + y)

    qnet, x = made(Named(), BitPolicy()), images(5, 12, seed=3)
    model = lower(qnet)
    everywhere_alike(model, x)
    found = [t.name for t in agreement(qnet, model, x).tensors]
    assert found == [site.name for site in qnet.meta["sites"]]
    assert found == ["input", "image", "flatten", "logits", "act", "add"]


def test_tensors_of_different_shapes_are_not_compared():
    kept = made(Net(lambda s, a, b: a.mean((2, 3), keepdims=True)), BitPolicy())
    squeezed = made(Net(lambda s, a, b: a.mean((2, 3)).unsqueeze(-1).unsqueeze(-1)), BitPolicy())
    assert agreement(kept, lower(kept), images(5, 12)).same_top1_pct == 100
    with pytest.raises(ValueError, match=r"'mean' is \(4, 1, 1\).*\(4,\)"):
        agreement(squeezed, lower(kept), images(5, 12))


def test_tensors_on_different_grids_are_joined_on_one_that_spans_them():
    qnet, x = made(Net(lambda s, a, b: torch.cat([a, 3 * F.relu(b)], 1), 8), BitPolicy()), images(5, 12, seed=3)
    node = next(n for n in qnet.graph.nodes if n.name == "mul_act_quantizer")  # a quantizer of its own
    qnet.add_submodule("own_act_quantizer", copy.deepcopy(qnet.get_submodule(node.target)))
    node.target = "own_act_quantizer"
    qnet.recompile()
    calibrate(qnet, images(24, 12))
    for requantizer in r.REQUANTIZERS:
        model = lower(qnet, requantizer=requantizer)
        joined = next(op for op in model.ops if isinstance(op, r.Concat))
        assert len({float(model.tensors[t].scale) for t in joined.inputs}) == 1
        got = everywhere_alike(model, x)
        step = float(model.tensors[joined.output].scale)
        source = {op.output: op.inputs[0] for op in model.ops if isinstance(op, r.Table)}
        for name in joined.inputs:
            moved, before = (real_values(model.tensors[t], got[t]) for t in (name, source[name]))
            assert np.abs(moved - before).max() <= 0.5001 * step


def test_a_table_is_the_graph_s_own_function_at_every_integer():
    model = lower(made(Net(lambda s, a, b: F.gelu(a)), BitPolicy()))
    (table,) = (op for op in model.ops if isinstance(op, r.Table))
    x, y = (model.tensors[t] for t in (table.inputs[0], table.output))
    real = torch.arange(x.qmax + 1).sub(x.zero_point).double() * float(x.scale)
    want = real * (1 + torch.erf(real / 2**0.5)) / 2  # Hendrycks and Gimpel, arXiv:1606.08415, eq. 1
    found = (table.values.astype(int) - y.zero_point) * float(y.scale)
    assert table.values.dtype == np.uint8
    assert np.abs(found - want.clamp(*ends(y)).numpy()).max() <= 0.5001 * float(y.scale)


def ends(spec: r.TensorSpec) -> tuple[float, float]:
    return float(spec.scale) * (spec.qmin - spec.zero_point), float(spec.scale) * (spec.qmax - spec.zero_point)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda s, a, b: torch.softmax(a, 1), "softmax.*largest logit"),
        (lambda s, a, b: s.parts[0](a), "'parts.0' .layernorm.*batch norm"),
        (lambda s, a, b: (a.flatten(2) @ b.flatten(2).transpose(1, 2)).unsqueeze(-1), "matmul.*stay in float"),
        (lambda s, a, b: s.parts[1](a), "'parts.1' .prelu.*constant per channel"),
        (lambda s, a, b: torch.add(a, b, alpha=0.5), "alpha=0.5.*outside"),
        (lambda s, a, b: F.interpolate(a, scale_factor=1.5), "nearest.*whole factors"),
        (lambda s, a, b: F.interpolate(a, scale_factor=3.0, mode="bilinear"), "bilinear by 2"),
        (lambda s, a, b: F.adaptive_max_pool2d(a, 5), "does not divide"),
    ],
)
def test_what_has_no_integer_form_is_named_with_the_way_out(between, message):
    net = Net(between, parts=[nn.LayerNorm(12), nn.PReLU(4)])
    with pytest.raises(LowerError, match=f"(?s){message}"):
        lower(made(net, BitPolicy()))


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_whose_number_is_odd_come_back_from_every_file(bits, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5))
    policy = BitPolicy(weight=f"minmax:{bits}", act="minmax:4", first_last_bits=None)
    model, x = lower(made(net, policy, 13)), images(5, 13, seed=3)
    assert [op.weight.size % 2 for op in model.layers()] == [1, 1, 1]
    everywhere_alike(model, x)
    hexes = fpga.read_images(fpga.write_images(model, tmp_path, word_bits=36).parent)
    for again in (load(io.BytesIO(integer_bytes(model))), hexes):
        assert all(np.array_equal(a.weight, b.weight) for a, b in zip(again.layers(), model.layers(), strict=True))


def test_a_product_that_could_leave_int32_is_refused():
    policy = BitPolicy(act="minmax:16", input_bits=8, first_last_bits=None)
    with pytest.raises(RecordError, match=r"'mul'.*16 bit.*int32"):
        lower(made(Net(lambda s, a, b: F.relu(a) * F.relu(b)), policy))


def test_scales_far_apart_are_no_matter_to_sums_in_int64():
    net = Net(lambda s, a, b: 1e3 * a + s.parts[0](b), parts=[nn.Conv2d(4, 4, 1)])
    qnet, x = made(net, BitPolicy()), images(5, 12, seed=3)
    with torch.no_grad():
        qnet.get_submodule("parts.0").weight.mul_(1e-6)
        qnet.get_submodule("parts.0").bias.mul_(1e-6)
    calibrate(qnet, images(24, 12))
    with pytest.raises(RecordError, match=r"'add'.*too far apart"):
        lower(qnet)
    everywhere_alike(lower(qnet, requantizer="fixed"), x)


@pytest.mark.parametrize("spoil", [
    lambda op: {"values": op.values[:-1]}, lambda op: {"values": np.append(op.values, op.values[:1])},
    lambda op: {"values": op.values.astype(np.uint16)}, lambda op: {"inputs": (*op.inputs, *op.inputs)},
])  # fmt: skip
def test_a_table_of_another_length_or_dtype_is_refused(spoil):
    model = lower(made(CASES["SiLU"], BitPolicy()))
    ops = tuple(replace(op, **spoil(op)) if isinstance(op, r.Table) else op for op in model.ops)
    with pytest.raises(RecordError, match=r"silu|parts_0"):
        check(replace(model, ops=ops))


@pytest.mark.parametrize("alpha", [-1, -0.5])
def test_a_difference_of_nonnegative_tensors_is_signed(alpha):
    net = trace(Net(lambda s, a, b: torch.add(F.relu(a), F.relu(b), alpha=alpha)))
    assert {site.name: site.signed for site in find_sites(net)}["add"]
    assert {site.name: site.signed for site in find_sites(trace(CASES["sub of itself"]))}["sub"]


@pytest.mark.parametrize("takes", [
    lambda q: run(q, images(1, 12)), onnx.export, Runtime, lambda q: EngineNetwork(q, IdealEngine()), to_bytes,
])  # fmt: skip
def test_a_graph_given_to_an_executor_is_told_to_be_lowered_first(takes):
    with pytest.raises(RecordError, match=r"QuantizedNet is no integer model.*integer\.lower"):
        takes(made(CASES["product"], BitPolicy()))


def test_a_float_image_is_put_on_the_grid_of_its_pixels():
    spec = replace(data.SPECS["cifar10"], mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    qnet = made(CASES["product"], BitPolicy(placement="academic"))
    x = (torch.rand(5, 3, 12, 12) - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    with pytest.raises(LowerError, match=r"input_bits.*images=spec"):
        lower(qnet)
    model = lower(qnet, images=spec)
    grid = model.tensors[model.ops[0].output]
    assert ends(grid) == pytest.approx((-3.0, 7.0), abs=float(grid.scale))
    assert np.array_equal(Runtime(model).run(x), run(model, x))


NAMES = "mobilenet_v3_small mobilenet_v3_large efficientnet_b0 regnet_y_400mf squeezenet1_1 shufflenet_v2_x1_0"
ZOO = dict.fromkeys((*NAMES.split(), "densenet121", "googlenet", "mnasnet1_0"), 64) | {"inception_v3": 96}
"""networks of torchvision -> pixels across"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_mobile_networks_of_torchvision_give_equal_logits_in_every_executor(name):
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net, x = getattr(torchvision.models, name)(**options), torch.randn(4, 3, ZOO[name], ZOO[name])
    with torch.no_grad():
        net.train()(x)  # statistics for its batch norms
    qnet = quantize(net.eval(), BitPolicy(), x[:1])
    calibrate(qnet, x)
    model = lower(qnet.eval())
    logits = run(model, x)
    assert len(np.unique(logits)) > 500
    assert int((Runtime(model).run(x) != logits).sum()) == 0
    assert int((onnx.run(onnx.session(onnx.export(model)), x) != logits).sum()) == 0
    assert int((EngineNetwork(model, IdealEngine()).run(x[:1]) != logits[:1]).sum()) == 0
    assert max(t.largest for t in agreement(qnet, model, x, forced=True).tensors) <= 1
