"""A net with every tensor's grid at every number of bits at hand: assignments are measured without fitting again."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hq_lib import ptq
from hq_lib.graph import BitPolicy, QuantizedNet, QuantizedWeight, quantize, weight_layers
from hq_lib.graph.state import Choice, set_quantization
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.quantizers import FLOAT_BITS
from hq_lib.results.hints import nearest


@torch.no_grad()
def mean_shifts(qnet: QuantizedNet, images: Tensor, *, only: Choice | None = None) -> dict[str, Tensor]:
    """By how much rounding the weights shifts the mean of each output channel: (C_out,), real units, by layer.

        shift_c = E[(w_hat * x)_c] - E[(w * x)_c]        mean over images and positions, x the layer's input

    (Nagel et al. 2019, arXiv:1906.04721, section 4.2, measured instead of derived.) ``x`` is what the layer sees while
    the quantizers chosen by ``only`` (default: all, activations too) are off, so that no layer's shift depends on
    another's bits.

    Args:
        qnet:   from ``graph.quantize``, weight grids fitted; left as it was.
        images: (N, C, H, W), normalised; one batch.
        only:   which quantizers (given the module).
    """
    found: dict[str, Tensor] = {}

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, QuantizedWeight)
        with set_quantization(layer, weights=True, acts=None):
            shift = layer.forward(inputs[0]) - output
        channels = shift.dim() - 1 if isinstance(layer, nn.Linear) else 1
        found[name] = shift.mean([d for d in range(shift.dim()) if d != channels])

    chosen = {n: m for n, m in weight_layers(qnet).items() if (q := m.weight_quantizer) and (only is None or only(q))}
    with set_quantization(qnet, weights=False, acts=False, only=only), eval_mode(qnet), ExitStack() as hooks:
        for name, layer in chosen.items():
            hooks.enter_context(layer.register_forward_hook(partial(measure, name)))
        qnet(images.to(device_of(qnet)))
    return found


def correct_means(qnet: QuantizedNet, images: Tensor, *, only: Choice | None = None) -> None:
    """Take each layer's ``mean_shifts`` out of its bias, in place; a layer without bias gets one.

    The integers and scales stay as they are, so it survives ``integer.lower``. Arguments as in ``mean_shifts``.
    """
    for name, shift in mean_shifts(qnet, images, only=only).items():
        layer = weight_layers(qnet)[name]
        layer.bias = nn.Parameter(-shift if layer.bias is None else layer.bias.detach() - shift)


def uniform_policy(bits: int, *, placement: str, overrides: Mapping[str, object] | None = None) -> BitPolicy:
    """The policy with ``bits`` for every tensor, first and last layer too; in "academic" the image stays in float."""
    return BitPolicy(
        f"minmax:{bits}", f"lsq_plus:{bits}", first_last_bits=None, placement=placement, bn="fold",
        input_bits=FLOAT_BITS if placement == "academic" else bits, overrides=overrides or {},
    )  # fmt: skip


def tensors_of(qnet: QuantizedNet) -> list[str]:
    """Names of all tensors with a quantizer: weights in execution order, then activations."""
    weights = [f"weight {name}" for name, layer in weight_layers(qnet).items() if layer.weight_quantizer is not None]
    sites = [site for site in qnet.meta["sites"] if hasattr(qnet, site.quantizer)]
    return weights + [f"act {site.name}" for site in sites]


_uniform = partial(uniform_policy, placement="academic")


class GridBank:
    """Fitted quantizers (and corrected biases) of every tensor of a net, at several numbers of bits.

    All of them are fitted to float activations, so that no tensor's grid depends on another's bits: ``assign`` only
    swaps modules. Batch norms are folded, the image stays in float ("academic"); L2.4 ranges and bias correction are
    those of fast PTQ, nothing is learned.
    """

    def __init__(self, net: nn.Module, images: Tensor, bits: Sequence[int]) -> None:
        """Fit all grids.

        Args:
            net:    float; fitted in eval mode, its own is restored.
            images: (N, C, H, W), normalised: the calibration batch.
            bits:   2 to 16 each.
        """
        self.bits = tuple(sorted(set(bits)))
        with eval_mode(net):
            fitted = {b: quantize(net, _uniform(b), images[:1]) for b in self.bits}
            for qnet in fitted.values():
                ptq.fit_weights(qnet)
                ptq.fit_acts(qnet, images)  # to the float net's activations, so before its biases change
                correct_means(qnet, images)
            self.net: QuantizedNet = quantize(net, _uniform(self.bits[-1]), images[:1])
        self._biases = {name: layer.bias for name, layer in weight_layers(self.net).items()}
        self._targets = {site.name: site.quantizer for site in self.net.meta["sites"]}
        self._modules: dict[str, dict[int, tuple[Any, nn.Parameter | None]]] = {}
        for b, qnet in fitted.items():
            layers = weight_layers(qnet)
            for tensor in tensors_of(qnet):
                kind, name = tensor.split(" ", 1)
                if kind == "weight":
                    found = layers[name].weight_quantizer, layers[name].bias
                else:
                    found = qnet.get_submodule(self._targets[name]), None
                self._modules.setdefault(tensor, {})[b] = found

    @property
    def tensors(self) -> list[str]:
        """Names of all tensors that can have bits, weights first, each kind in execution order."""
        return list(self._modules)

    def assign(self, bits: Mapping[str, int]) -> QuantizedNet:
        """The net with these bits; tensors that are not named, or named with 32, are float. The next call changes it.

        Raises:
            ValueError: an unknown tensor (with the nearest name), or bits that were not fitted.
        """
        for tensor, b in bits.items():
            if tensor not in self._modules:
                raise ValueError(f"no tensor {tensor!r}{nearest(tensor, self._modules)}")
            if b not in (*self.bits, FLOAT_BITS):
                raise ValueError(
                    f"{tensor}: {b!r} bits were not fitted; there are {self.bits} and {FLOAT_BITS} (float)"
                )
        for tensor, fitted in self._modules.items():
            kind, name = tensor.split(" ", 1)
            module, bias = fitted.get(bits.get(tensor, FLOAT_BITS), (None, None))
            if kind == "act":
                setattr(self.net, self._targets[name], module or nn.Identity())
            else:
                layer = weight_layers(self.net)[name]
                layer.weight_quantizer, layer.bias = module, bias if module is not None else self._biases[name]
        meta = self.net.meta  # reports and files go by it
        meta["specs"] = {t: replace(spec, bits=bits.get(t, FLOAT_BITS)) for t, spec in meta["specs"].items()}
        meta["policy"] = self.policy(bits)
        return self.net

    def policy(self, bits: Mapping[str, int]) -> BitPolicy:
        """The policy that gives the same bits; tensors that are not named are float in it."""
        overrides: dict[str, dict[str, int]] = {}
        for tensor in self._modules:
            kind, name = tensor.split(" ", 1)
            overrides.setdefault(name, {})[kind] = bits.get(tensor, FLOAT_BITS)
        return _uniform(self.bits[-1], overrides=overrides)
