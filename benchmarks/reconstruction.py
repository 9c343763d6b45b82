"""Accuracy and time of block reconstruction on the public ResNet-20 (91.73 %), on CIFAR-10's whole test set.

    python benchmarks/reconstruction.py --bits W4A4 W2A2 [--method qdrop] [--iterations 500] [--threads 1]

QDrop's protocol: 1,024 un-augmented training images, first and last weights and the last layer's input 8 bit, image,
add inputs and logits in float, L_2.4 ranges (activations: float net, 256 images). The bar for 500 iterations is what
the official code reaches with a rounding rate of 1e-2 (one seed): 90.84 / 88.90 / 89.15 / 80.45 % at
W4A4 / W3A3 / W2A4 / W2A2. Measured at W2A2, 500 iterations, one seed: 79.58 % with that rate (6 to 34 % of a block's
roundings undecided at the end), 81.33 % with ``--rounding-lr 5e-2 --beta-start 8`` (0 to 1.3 %); to nearest 15.14 %.
At W4A4: to nearest 89.68 %, 90.99 % with that rate, 91.07 % with the other.
Times are wall and CPU seconds; on a shared machine only CPU seconds mean anything.
"""

import argparse
import re
import time

import torch

from hq_lib import data, models, paths, ptq
from hq_lib.graph import BitPolicy, quantize
from hq_lib.training import evaluate

BAR_PCT = {"W4A4": 90.84, "W3A3": 88.90, "W2A4": 89.15, "W2A2": 80.45}
PASSES = {"qdrop": ptq.qdrop, "brecq": ptq.brecq, "adaround": ptq.adaround}


def measure(bits: str, options: argparse.Namespace) -> None:
    """Print one line per unit and one for the result."""
    folder = paths.shared_data()
    if folder is None:
        raise SystemExit("the public checkpoint is looked for in ../shared/data, which is not here")
    net = models.resnet20_akamaster(folder / "checkpoints" / "resnet20_akamaster_9173.th")
    test = data.load("cifar10", "test").normalized_by(*models.IMAGENET_MEAN_STD)
    train = data.load("cifar10", "train").normalized_by(*models.IMAGENET_MEAN_STD)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    chosen = train.subset(order[: options.images])
    images = data.normalize(chosen.images, chosen.spec).contiguous()
    w, a = map(int, re.findall(r"\d+", bits))
    policy = BitPolicy(f"minmax:{w}", f"lsq_plus:{a}", placement="academic", bn="fold", pool_bits=32)
    qnet = quantize(net, policy, images[:1])
    cpu = time.process_time()
    ptq.fit_weights(qnet, "mse")
    ptq.fit_acts(qnet, images[:256], "mse")
    print(f"{policy.describe()}\nranges: {time.process_time() - cpu:.1f} CPU s", flush=True)
    nearest = evaluate(qnet, test).acc_pct if options.nearest else float("nan")
    settings = {"iterations": options.iterations, "n_images": len(images), "seed": options.seed}
    settings |= {"rounding_lr": options.rounding_lr, "step_lr": options.step_lr, "beta_start": options.beta_start}
    settings |= {"rounding_weight": options.rounding_weight, "keep_probability": options.keep}
    settings = settings if options.method == "qdrop" else {**settings, "keep_probability": 1.0}
    start, cpu = time.perf_counter(), time.process_time()
    reports = ptq.reconstruct(qnet, images, PASSES[options.method](**settings), progress=lambda r: print(r, flush=True))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    acc = evaluate(qnet, test).acc_pct
    n_steps = options.iterations * len(reports)
    print(
        f"{bits} {options.method}, {options.iterations} iterations, rounding rate {options.rounding_lr}, beta "
        f"{options.beta_start}, lambda {options.rounding_weight}, keep {settings['keep_probability']}, seed "
        f"{options.seed}, {len(images)} images: nearest {nearest:.2f} %, reconstructed {acc:.2f} % (bar "
        f"{BAR_PCT.get(bits, float('nan')):.2f}), {wall:.0f} s wall, {cpu:.0f} CPU s, "
        f"{1000 * cpu / max(1, n_steps):.1f} CPU ms per iteration",
        flush=True,
    )


def main() -> None:
    """Measure each width in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bits", nargs="+", default=["W4A4", "W2A2"])
    parser.add_argument("--method", choices=PASSES, default="qdrop")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounding-lr", type=float, default=1e-2)
    parser.add_argument("--step-lr", type=float, default=4e-5)
    parser.add_argument("--beta-start", type=float, default=20.0)
    parser.add_argument("--rounding-weight", type=float, default=0.01)
    parser.add_argument("--keep", type=float, default=0.5, help="probability of keeping the quantized value (qdrop)")
    parser.add_argument("--seed", type=int, default=1005)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nearest", action="store_true", help="evaluate rounding to nearest too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for bits in options.bits:
        measure(bits, options)


if __name__ == "__main__":
    main()
