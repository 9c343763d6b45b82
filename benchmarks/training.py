"""Images a second through ``fit``, float and quantized, for each way to use the machine, alternating in one run.

    python benchmarks/training.py [--networks resnet20 mobilenetv2_seed] [--batches 128 64] [--methods pact lsq dsq]
                                  [--bits 4] [--steps 3] [--rounds 3] [--skip bfloat16 ...]

"before" is how recipes trained once: bfloat16, op by op, batches of 128, freed memory given back. Rows of methods are
ResNet-20 quantized as its recipes do; their ratio is time over the float network's, op by op in float32. The clock
counts what the process itself used, so that a busy machine disturbs less; with several threads that includes waiting
in OpenMP's barriers. The fastest round counts. Only ratios mean anything. ``OMP_NUM_THREADS`` sets the threads.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import time
import warnings

import torch
from torch import nn

from hq_lib import data, models
from hq_lib.graph import calibrate, quantize
from hq_lib.training import TrainConfig, fit, machine, qat_recipe
from hq_lib.training.recipes import find

MIB = 2**20
M_MMAP_THRESHOLD = -3


def give_back() -> None:
    """Lets glibc return freed memory, with the thresholds that it reaches by itself in a run with large tensors."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(machine.M_MMAP_MAX, 65_536)
    mallopt(M_MMAP_THRESHOLD, 32 * MIB)
    mallopt(machine.M_TRIM_THRESHOLD, 64 * MIB)


@dataclasses.dataclass
class Way:
    """One network trained in one way; the fastest round is kept."""

    net: nn.Module
    images: data.ImageSet
    config: TrainConfig
    keeps_memory: bool = True
    seconds: float = float("inf")

    def run(self, steps: int) -> None:
        """A few steps through ``fit``, timed from the first batch to the last."""
        n = steps * self.config.batch_size
        images = self.images.subset(list(range(n)))
        (machine.keep_freed_memory_ if self.keeps_memory else give_back)()
        kept, machine.keep_freed_memory_ = machine.keep_freed_memory_, lambda: None
        try:
            start = time.process_time()
            fit(self.net, images, None, self.config, say=None)
            self.seconds = min(self.seconds, (time.process_time() - start) / n)
        finally:
            machine.keep_freed_memory_ = kept


def ways_of(name: str, batches: list[int], skip: list[str]) -> dict[str, Way]:
    """Every precision, eager and compiled, at every batch size, of a float network."""
    found = find(name)
    images = data.load(found.dataset, "train", n=2_000)
    base = TrainConfig(epochs=1, lr=0.01, precision="bfloat16")
    sizes = {"n_classes": images.spec.n_classes, "in_channels": images.spec.in_shape[0], **found.options}

    def net() -> nn.Module:
        torch.manual_seed(0)
        return models.build(found.network or name, **sizes)

    ways = {} if "before" in skip else {f"{name} before": Way(net(), images, base, keeps_memory=False)}
    for precision in ("float32", "bfloat16"):
        for how in ("eager", "compiled"):
            for batch in batches:
                if not {precision, how} & set(skip):
                    config = dataclasses.replace(base, precision=precision, compile=how == "compiled", batch_size=batch)
                    ways[f"{name} {precision} {how} {batch}"] = Way(net(), images, config)
    return ways


def quantized_ways(methods: list[str], bits: int, skip: list[str]) -> dict[str, Way]:
    """ResNet-20 op by op in float, and quantized by each method, op by op and compiled; batches of 128."""
    images = data.load("cifar10", "train", n=2_000)
    few = data.normalize(images.images[:64], images.spec)
    base = TrainConfig(epochs=1, lr=0.01)
    ways = {"float step": Way(models.build("resnet20"), images, base)}
    for method in methods:
        for how in ("eager", "compiled"):
            if how not in skip:
                qnet = quantize(models.build("resnet20").eval(), qat_recipe(method, bits, bits, "full").policy, few[:1])
                calibrate(qnet, few)
                ways[f"{method} {how}"] = Way(qnet, images, dataclasses.replace(base, compile=how == "compiled"))
    return ways


def main() -> None:
    """Prints one line a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet20", "toynet", "mobilenetv2_seed", "vgg11"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--methods", nargs="*", default=["pact", "lsq", "dsq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=("before", "float32", "bfloat16", "eager", "compiled"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for name in args.networks:
        ways = timed(ways_of(name, args.batches, args.skip), args)
        first = next(iter(ways.values())).seconds
        for label, way in ways.items():
            rate = f"{1 / way.seconds:8.1f} images a CPU second"
            print(f"  {label:40s} {rate}, {first / way.seconds:5.2f} times the first")
    if args.methods:
        ways = timed(quantized_ways(args.methods, args.bits, args.skip), args)
        for label, way in ways.items():
            ratio = way.seconds / ways["float step"].seconds
            print(f"  W{args.bits}A{args.bits} {label:35s} {ratio:5.2f} of a float step")


def timed(ways: dict[str, Way], args: argparse.Namespace) -> dict[str, Way]:
    """The same ways after a round that warms up and the rounds that count."""
    for way in ways.values():
        way.run(1)
        way.run(2)
        way.seconds = float("inf")
    for _ in range(args.rounds):
        for way in ways.values():
            way.run(args.steps)
    return ways


if __name__ == "__main__":
    main()
