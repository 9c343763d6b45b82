"""What helps a network to low bits without labels: weights evened out, means corrected, batch norms measured again.

net = ptq.equalize(fold_bn(net, x), x)                    # before quantize: same function, ranges alike
ptq.correct_means(qnet, images)                           # after it: the shift that rounding made, out of the biases
ptq.reestimate_norms(qnet, batches)                       # after it: statistics of the quantized activations
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hq_lib.graph import QuantizedNet, QuantizedWeight, QuantizeError, kinds, op_name, weight_layers
from hq_lib.graph.agreement import traced
from hq_lib.graph.modes import eval_mode
from hq_lib.graph.state import Choice, passes, set_quantization
from hq_lib.graph.tracing import Example, device_of

_THROUGH = {"relu", "maxpool2d", "identity"}  # f(s x) = s f(x) for s > 0, channel by channel
MAX_SWEEPS = 50
SETTLED = 1e-4
"""A sweep whose factors all lie this close to 1 is the last one."""


@torch.no_grad()
def equalize(net: nn.Module, example: Example) -> fx.GraphModule:
    """Return a copy of ``net`` as a graph that computes the same, whose neighbouring layers have like channel ranges.

    Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1): for two layers with nothing but a
    positively homogeneous function between them, and each channel i,

        s_i = sqrt(r1_i r2_i) / r2_i,   W1_i <- W1_i / s_i,   b1_i <- b1_i / s_i,   W2_i <- W2_i s_i

    r1_i = max |W1| over output channel i, r2_i = max |W2| over input channel i: both become sqrt(r1_i r2_i). Sweeps
    over all pairs until nothing moves. A channel of zeros stays. ReLU6 is not homogeneous: such pairs are left alone
    (departure: the paper replaces it by ReLU, which changes the function).

    Raises:
        QuantizeError: no pair of layers can be evened out (batch norms between them? ``fold_bn`` first).
    """
    gm = traced(net, example)
    pairs = _pairs(gm)
    if not pairs:
        raise QuantizeError("equalize: no two layers follow each other with a ReLU alone between them: fold_bn first")
    for _ in range(MAX_SWEEPS):
        if max(_even_out(first, second) for first, second in pairs) < SETTLED:
            break
    return gm


def _pairs(gm: fx.GraphModule) -> list[tuple[nn.Module, nn.Module]]:
    kind_of = kinds(gm)
    layers = [node for node, kind in kind_of.items() if kind == "layer"]
    calls = [str(node.target) for node in layers]
    found = []
    for node in layers:
        after = node
        while len(after.users) == 1 and op_name(after := next(iter(after.users)), gm) in _THROUGH:
            pass
        if after is node or kind_of[after] != "layer" or len({*after.all_input_nodes}) != 1:
            continue
        first, second = (gm.get_submodule(str(n.target)) for n in (node, after))
        once = calls.count(str(node.target)) == calls.count(str(after.target)) == 1
        if once and all(isinstance(m, nn.Linear) or _plain(m) for m in (first, second)):
            found.append((first, second))
    return found


def _plain(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and (
        layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels
    )


def _even_out(first: nn.Module, second: nn.Module) -> float:
    """Scale one pair; how far its factors are from 1 at most."""
    w1, w2 = first.weight, second.weight
    axis = 0 if isinstance(second, nn.Conv2d) and second.groups > 1 else 1
    assert isinstance(w1, Tensor)
    assert isinstance(w2, Tensor)
    r1, r2 = w1.abs().flatten(1).amax(1), w2.abs().transpose(0, axis).flatten(1).amax(1)
    s = torch.where((r1 > 0) & (r2 > 0), (r1 * r2).sqrt() / r2, torch.ones_like(r1))
    w1.div_(s.reshape(-1, *[1] * (w1.dim() - 1)))
    w2.mul_(s.reshape([-1 if d == axis else 1 for d in range(w2.dim())]))
    if isinstance(first.bias, Tensor):
        first.bias.div_(s)
    return float((s - 1).abs().max())


@torch.no_grad()
def correct_means(qnet: QuantizedNet, images: Tensor, *, only: Choice | None = None) -> None:
    """Take out of each layer's bias by how much rounding its weights shifts the mean of each output channel, in place.

        shift_c = E[(w_hat * x)_c] - E[(w * x)_c]        mean over images and positions, x the layer's input

    (Nagel et al. 2019, arXiv:1906.04721, section 4.2, measured instead of derived.) ``x`` is what the layer sees while
    the quantizers chosen by ``only`` (default: all, activations too) are off, so that no layer's shift depends on
    another's bits. A layer without bias gets one. The integers and scales stay as they are, so it survives
    ``integer.lower``.

    Args:
        qnet:   from ``graph.quantize``, weight grids fitted.
        images: (N, C, H, W), normalised; one batch.
        only:   which quantizers (given the module); the others' layers keep their bias.

    Raises ``QuantizeError`` naming a layer that runs twice.
    """
    shifts: dict[str, Tensor] = {}
    passed: set[str] = set()

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, QuantizedWeight)
        if name in passed:
            raise QuantizeError(f"layer {name!r} runs twice: its two shifts share one bias")
        passed.add(name)
        with set_quantization(layer, weights=True, acts=None):
            shift = layer.forward(inputs[0]) - output
        channels = shift.dim() - 1 if isinstance(layer, nn.Linear) else 1
        mean = shift.mean([d for d in range(shift.dim()) if d != channels]) * (len(part) / len(images))
        shifts[name] = shifts[name] + mean if name in shifts else mean

    chosen = {n: m for n, m in weight_layers(qnet).items() if (q := m.weight_quantizer) and (only is None or only(q))}
    with set_quantization(qnet, weights=False, acts=False, only=only), eval_mode(qnet), ExitStack() as hooks:
        for name, layer in chosen.items():
            hooks.enter_context(layer.register_forward_hook(partial(measure, name)))
        for part in passes(images):
            passed.clear()
            qnet(part.to(device_of(qnet)))
    for name, shift in shifts.items():
        layer = chosen[name]
        layer.bias = nn.Parameter(-shift if layer.bias is None else layer.bias.detach() - shift)


@torch.no_grad()
def reestimate_norms(net: nn.Module, batches: Tensor | Iterable[Tensor]) -> None:
    """Measure the running statistics of every batch norm of ``net`` anew on ``batches``, in place.

        mean <- (1/K) sum_k mean_k,   var <- (1/K) sum_k var_k        over the K batches

    (Nagel et al. 2022, arXiv:2203.11086, section 4.1: low-bit training leaves moving averages that fit no net.) All
    else is in eval mode; modes and momenta are restored.

    Args:
        net:     usually quantized, its grids fitted, batch norms kept.
        batches: (B, C, H, W) normalised images, or several; best as large as in training.

    Raises:
        QuantizeError: no batch norm with running statistics (they were folded?), or no batch.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    images = [batches] if isinstance(batches, Tensor) else list(batches)
    if not norms or not images:
        raise QuantizeError(f"reestimate_norms: {len(norms)} batch norms and {len(images)} batches: it needs both, "
                            "and batch norms that are kept, BitPolicy(bn='keep')")  # fmt: skip
    momenta = [norm.momentum for norm in norms]
    try:
        with eval_mode(net):
            for norm in norms:
                norm.reset_running_stats()
                norm.train().momentum = None  # cumulative average
            for batch in images:
                net(batch.to(device_of(net)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
