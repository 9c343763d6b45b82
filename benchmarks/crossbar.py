"""Time of ResNet-20's multiplications on simulated crossbars, against the same float convolutions in the same run.

    python benchmarks/crossbar.py [--images 32] [--repeats 3] [--threads 1] [--slow-images 8]

Layers have ResNet-20's shapes (CIFAR, 19 convolutions, 40.55 M multiplications), random 8-bit weights and inputs, which
does not matter for time. "per float conv" divides by the bare float convolutions; "per float net" by the whole float
network (batch norm, ReLU and additions included), measured in the same run: the integer network around the engine
(requantization) comes on top of ours. "per path" divides by the same path without the extra effect. Seconds are CPU
seconds of this process, the least of the repeats; only ratios mean anything on a shared machine.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    ConvEngine,
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


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    """What is timed."""
    make: Callable[[], Engine]
    """A fresh engine."""
    slow: bool = False
    """Runs on fewer images."""
    base: str = ""
    """The same path without the extra effect."""


CASES = (
    Case("ideal", IdealEngine),
    Case("collapsed", lambda: SimEngine(Circuit())),
    Case("collapsed, wires 1 ohm", lambda: SimEngine(Circuit(wires=Wires())), base="collapsed"),
    Case("collapsed, read noise", lambda: SimEngine(Circuit(NOISY)), base="collapsed"),
    Case("analog input, ADC, 128 rows", lambda: SimEngine(Circuit(mapping=ANALOG, adc=CODES))),
    Case(
        "... wires 1 ohm",
        lambda: SimEngine(Circuit(mapping=ANALOG, adc=CODES, wires=Wires())),
        base="analog input, ADC, 128 rows",
    ),
    Case("... read noise", lambda: SimEngine(Circuit(NOISY, ANALOG, adc=CODES)), base="analog input, ADC, 128 rows"),
    Case("bit-serial, 4 slices x 2 signs", lambda: SimEngine(Circuit(PCM_JOSHI, SLICED, BITS, NINE)), slow=True),
    Case(
        ".. read noise",
        lambda: SimEngine(Circuit(NOISY, SLICED, BITS, NINE)),
        slow=True,
        base="bit-serial, 4 slices x 2 signs",
    ),
)


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of ``repeats`` calls, after one call to warm up."""
    run()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def layers(n_images: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """(weight, images, stride, layers of this shape) for each shape; integers."""
    random = torch.Generator().manual_seed(0)
    made = []
    for c_in, c_out, side, stride, n in SHAPES:
        w = (torch.randn(c_out, c_in, 3, 3, generator=random) * 28).round().clamp(-127, 127).to(torch.int32)
        x = (torch.randn(n_images, c_in, side, side, generator=random).abs() * 60).clamp(0, 255).to(torch.uint8)
        made.append((w, x, stride, n))
    return made


def float_seconds(n_images: int, repeats: int) -> float:
    """CPU seconds per image of the bare float convolutions."""
    total = 0.0
    for w, x, stride, n in layers(n_images):
        xf, wf = x.float(), w.float()
        run = lambda x=xf, w=wf, s=stride: functional.conv2d(x, w, stride=s, padding=1)  # noqa: E731
        total += n * least_seconds(run, repeats)
    return total / n_images


def net_seconds(n_images: int, repeats: int) -> float:
    """CPU seconds per image of the float ResNet-20."""
    net, x = build("resnet20").eval(), torch.randn(n_images, 3, 32, 32)
    return least_seconds(lambda: net(x), repeats) / n_images


def engine_seconds(engine: Engine, n_images: int, repeats: int) -> float:
    """CPU seconds per image of all convolutions on ``engine``."""
    total, conv = 0.0, ConvEngine(engine)
    for i, (w, x, stride, n) in enumerate(layers(n_images)):
        handle = conv.load(w, 1.0, f"layer{i}", stride=stride, padding=1)
        if isinstance(engine, SimEngine) and engine.circuit.adc is CODES:
            engine.calibrate_adc(handle.groups[0], conv.rows(handle, x[:2])[0])
        total += n * least_seconds(lambda h=handle, x=x: conv.conv(h, x), repeats)
    return total / n_images


@torch.no_grad()
def table(n_images: int, n_slow: int, repeats: int) -> pd.DataFrame:
    """One row per case, the float lines measured beside each."""
    rows, seconds = [], {}
    for case in CASES:
        n = n_slow if case.slow else n_images
        conv, net = float_seconds(n_images, repeats), net_seconds(n_images, repeats)
        seconds[case.name] = engine_seconds(case.make(), n, repeats)
        rows.append(
            {
                "case": case.name,
                "images": n,
                "ms_per_image": 1e3 * seconds[case.name],
                "float_conv_ms": 1e3 * conv,
                "float_net_ms": 1e3 * net,
                "per_float_conv": seconds[case.name] / conv,
                "per_float_net": seconds[case.name] / net,
                "per_path": seconds[case.name] / seconds[case.base] if case.base else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 32), ("slow-images", 8), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(table(args.images, args.slow_images, args.repeats).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
