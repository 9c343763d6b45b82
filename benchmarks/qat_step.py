"""Time of one training step of a quantized ResNet-20, as a ratio to the float net in the same run.

    python benchmarks/qat_step.py [--methods lsq dsq] [--batch 128] [--steps 6] [--bits 4] [--compile] [--no-fusion]
                                  [--cpu-time]

Forward, loss, backward and SGD step. Every convolution and the linear layer have quantized weights per channel; the
image, every ReLU and every tensor that feeds an add have a quantizer. Rounds alternate between the nets, so that a busy
machine slows all of them; the ratio is that of the fastest steps. Only ratios mean anything. On a machine that others
use, ``OMP_NUM_THREADS=1 ... --cpu-time`` counts what the step itself used.

Measured, one thread, CPU time, W4A4, batch 128 (float compiled: 0.74 to 0.77): quantizers fused, net eager: min-max
1.31, DoReFa 1.25, PACT 1.30, LSQ 1.27, DSQ 1.45. Net compiled as a whole: 1.02, 0.98, 0.95, 0.98, 1.09.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from hq_lib.models.resnet import ResNet
from hq_lib.quantizers import act_quantizer, enable_fusion_, fusion_status, weight_quantizer
from hq_lib.training import TrainConfig
from hq_lib.training.config import set_lr, sgd

METHODS = ("minmax", "dorefa", "pact", "mpact", "lsq", "lsq_plus", "dsq")


def wire(net: nn.Module, method: str, *, bits: int) -> fx.GraphModule:
    """Return ``net`` traced, with weight quantizers as parametrizations and activation quantizers as call_modules."""
    traced = fx.symbolic_trace(net)
    for name, module in list(traced.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            quantizer = weight_quantizer(method, 8 if name in ("conv1", "fc", "linear") else bits)
            assert quantizer is not None
            quantizer.init_from(module.weight)
            parametrize.register_parametrization(module, "weight", quantizer)
    for node in list(traced.graph.nodes):
        if _is_relu(node):
            _quantize_after(traced, node, method, bits, signed=False)
        elif node.op == "placeholder":
            _quantize_after(traced, node, method, 8, signed=True)
        elif any("add" in str(user.target) for user in node.users):
            _quantize_after(traced, node, method, bits, signed=True)
    traced.recompile()
    return traced


def _is_relu(node: fx.Node) -> bool:
    return "relu" in str(node.target)


def _quantize_after(traced: fx.GraphModule, node: fx.Node, method: str, bits: int, *, signed: bool) -> None:
    name = f"{node.name}_act_quantizer"
    traced.add_submodule(name, act_quantizer(method, bits, signed=signed))
    with traced.graph.inserting_after(node):
        quantized = traced.graph.call_module(name, (node,))
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)


class Step:
    """One net with its optimiser; ``run`` makes a training step and keeps the fastest time."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, compiled: bool) -> None:
        self.net = net.train()
        self.images, self.labels = images, labels
        self.optimiser = sgd(net, TrainConfig(epochs=1, lr=0.01, weight_decay=1e-4))
        set_lr(self.optimiser, 0.01)
        self.forward = net
        if compiled:
            net(images[:8])  # the first batch fits the activations, outside the compiled graph
            self.forward = torch.compile(net)
        self.seconds = float("inf")

    def run(self) -> None:
        """Make one step."""
        start = self.clock()
        loss = nn.functional.cross_entropy(self.forward(self.images), self.labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds = min(self.seconds, self.clock() - start)


def main() -> None:
    """Print a table: method, time of a step over the float net's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each net (the fastest counts)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="also time whole nets under torch.compile")
    parser.add_argument("--no-fusion", action="store_true", help="quantizers op by op, as where no compiler is present")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process instead of the wall clock")
    args = parser.parse_args()
    Step.clock = staticmethod(time.process_time if args.cpu_time else time.perf_counter)
    warnings.simplefilter("ignore")
    enable_fusion_(not args.no_fusion)
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, 32, 32), torch.randint(10, (args.batch,))
    nets = {"float": ResNet(20)} | {method: wire(ResNet(20), method, bits=args.bits) for method in args.methods}
    steps = {name: Step(net, images, labels, compiled=False) for name, net in nets.items()}
    if args.compile:
        steps["float, compiled"] = Step(ResNet(20), images, labels, compiled=True)
        for method in args.methods:
            net = wire(ResNet(20), method, bits=args.bits)
            steps[f"{method}, compiled"] = Step(net, images, labels, compiled=True)
    for step in steps.values():
        step.run(), step.run()
        step.seconds = float("inf")
    for _ in range(args.steps):
        for step in steps.values():
            step.run()
    report(steps, args)


def report(steps: dict[str, Step], args: argparse.Namespace) -> None:
    """Print the ratios to the float net run eagerly."""
    print(
        f"ResNet-20, batch {args.batch}, W{args.bits}A{args.bits}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, fusion {fusion_status()}"
    )
    for name, step in steps.items():
        print(f"  {name:22s} {step.seconds / steps['float'].seconds:5.2f}")


if __name__ == "__main__":
    main()
