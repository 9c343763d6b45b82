"""Time of ResNet-20's multiplications on simulated crossbars, against the same float convolutions in the same run.

    python benchmarks/crossbar.py [--images 32] [--repeats 5] [--threads 1]

Layers have ResNet-20's shapes (CIFAR, 19 convolutions, 40.55 M multiplications), random 8-bit weights and inputs, which
does not matter for time. "per float conv" divides by the bare float convolutions; "per float net" by the whole float
network (batch norm, ReLU and additions included), measured in the same run: the integer network around the engine
(requantization) comes on top of ours. "per path" divides by the same path without wires or noise, called in turn with
it. Converted reading runs in C where there is a compiler. Read noise is 1 % of G_max for every cell; noise that depends
on the cell costs a second product of full width. Wires are solved when weights are loaded, which is not timed. Seconds
are CPU seconds of this process, the least of the repeats; only ratios mean anything on a shared machine.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    Convolution,
    Drive,
    Engine,
    IdealEngine,
    Mapping,
    SimEngine,
    Wires,
)
from hq_lib.crossbar.profiles import PCM_JOSHI
from hq_lib.models import build

SHAPES = (  # channels in, out, image side, stride, layers of this shape
    (3, 16, 32, 1, 1),
    (16, 16, 32, 1, 6),
    (16, 32, 32, 2, 1),
    (32, 32, 16, 1, 5),
    (32, 64, 16, 2, 1),
    (64, 64, 8, 1, 5),
)
NOISY = replace(PCM_JOSHI, read=ConstantRead(0.01))
ANALOG, CODES = Mapping(tile_rows=128), Adc(8, "calibrated")
SLICED, BITS, NINE = Mapping(tile_rows=128, cell_bits=2, subtract="digital"), Drive("serial"), Adc(9, "exact")


GROUPS: tuple[tuple[int, dict[str, Callable[[], Engine]]], ...] = (  # (share of the images, {line: engine})
    (1, {"ideal": IdealEngine}),
    (
        1,
        {
            "collapsed": lambda: SimEngine(Circuit()),
            "collapsed, wires 1 ohm": lambda: SimEngine(Circuit(wires=Wires())),
            "collapsed, read noise": lambda: SimEngine(Circuit(NOISY)),
        },
    ),
    (
        1,
        {
            "analog input + ADC, 128 rows": lambda: SimEngine(Circuit(mapping=ANALOG, adc=CODES)),
            "analog input + ADC, wires 1 ohm": lambda: SimEngine(Circuit(mapping=ANALOG, adc=CODES, wires=Wires())),
            "analog input + ADC, read noise": lambda: SimEngine(Circuit(NOISY, ANALOG, adc=CODES)),
        },
    ),
    (
        4,
        {
            "bit-serial, 4 slices x 2 signs": lambda: SimEngine(Circuit(PCM_JOSHI, SLICED, BITS, NINE)),
            "bit-serial, wires 1 ohm": lambda: SimEngine(Circuit(PCM_JOSHI, SLICED, BITS, NINE, Wires())),
            "bit-serial, read noise": lambda: SimEngine(Circuit(NOISY, SLICED, BITS, NINE)),
        },
    ),
)


def least_seconds(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """CPU seconds of the fastest of ``repeats`` calls of each of ``runs``, called in turn after one call to warm up."""
    least = [float("inf")] * len(runs)
    for run in runs:
        run()
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            least[i] = min(least[i], time.process_time() - start)
    return least


def layers(n_images: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """(weight, images, stride, layers of this shape) for each shape; integers."""
    random = torch.Generator().manual_seed(0)
    made = []
    for c_in, c_out, side, stride, n in SHAPES:
        w = (torch.randn(c_out, c_in, 3, 3, generator=random) * 28).round().clamp(-127, 127).to(torch.int32)
        x = (torch.randn(n_images, c_in, side, side, generator=random).abs() * 60).clamp(0, 255).to(torch.uint8)
        made.append((w, x, stride, n))
    return made


def net_seconds(n_images: int, repeats: int) -> float:
    """CPU seconds per image of the float ResNet-20."""
    net, x = build("resnet20").eval(), torch.randn(n_images, 3, 32, 32)
    return least_seconds([lambda: net(x)], repeats)[0] / n_images


def group_seconds(engines: list[Engine], n_images: int, repeats: int) -> list[float]:
    """CPU seconds per image of all convolutions: bare float ones first, then on each of ``engines``, in turn."""
    total = [0.0] * (1 + len(engines))
    for i, (w, x, stride, n) in enumerate(layers(n_images)):
        wf, xf = w.float(), x.float()
        runs: list[Callable[[], object]] = [
            lambda x=xf, w=wf, stride=stride: functional.conv2d(x, w, stride=stride, padding=1)
        ]
        for engine in engines:
            conv = Convolution(engine, w, 1.0, f"layer{i}", stride=stride, padding=1)
            if isinstance(engine, SimEngine) and engine.circuit.adc is CODES:
                engine.calibrate_adc(conv.groups[0], conv.rows(x[:2])[0])
            runs.append(lambda conv=conv, x=x: conv(x))
        total = [a + n * b for a, b in zip(total, least_seconds(runs, repeats), strict=True)]
    return [seconds / n_images for seconds in total]


@torch.no_grad()
def table(n_images: int, repeats: int) -> pd.DataFrame:
    """One row per engine, float lines measured beside each group; the first of a group is its path without extras."""
    rows = []
    for share, group in GROUPS:
        net = net_seconds(n_images, repeats)
        conv, *found = group_seconds([make() for make in group.values()], max(n_images // share, 1), repeats)
        net = min(net, net_seconds(n_images, repeats))
        for name, seconds in zip(group, found, strict=True):
            rows.append(
                {
                    "engine": name,
                    "images": max(n_images // share, 1),
                    "ms_per_image": 1e3 * seconds,
                    "float_net_ms": 1e3 * net,
                    "per_float_conv": seconds / conv,
                    "per_float_net": seconds / net,
                    "per_path": seconds / found[0],
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 32), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(table(args.images, args.repeats).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
