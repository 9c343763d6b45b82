"""Time of the L_p range search against the literal loop, on ResNet-20's real activations and weights, in one run.

    python benchmarks/range_search.py [--images 256] [--bits 8] [--p 2.4] [--threads 1] [--budget 400]

The literal loop is our own, in the official style: float32, one quantized copy of the tensor per candidate. Where it
would try more than ``--budget`` candidates (two-sided data: 100 * 2^bits) its time is that of about ``--budget`` evenly
spaced ones, scaled up and marked "*"; elsewhere it runs in full and the errors of the two choices are compared
("excess", in float64: 0 means that ours is no worse). Seconds are CPU seconds of this process; only ratios mean
anything on a shared machine.

Weights: the public ResNet-20 where ../shared/data has it, else freshly initialised. Images: CIFAR-10 or the digits.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, fx, nn

from hq_lib import data
from hq_lib.models.small import ResNet
from hq_lib.quantizers import Grid
from hq_lib.quantizers.lp_grid import lp_search
from hq_lib.results import paths

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the public checkpoint's recipe


class Recorder(fx.Interpreter):
    """Runs a traced net and keeps the image, every ReLU output and every sum before a ReLU."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Tensor:
        """The node's value, kept if a quantizer could sit there."""
        value = super().run_node(n)
        if n.op == "placeholder" or any(word in str(n.target) for word in ("relu", "add")):
            self.kept[n.name] = value
        return value


def network() -> tuple[nn.Module, str]:
    """(ResNet-20, where its weights come from)."""
    net, folder = ResNet(20, option="A"), paths.shared_data()
    if folder is None:
        return net, "freshly initialised"
    state = torch.load(folder / "checkpoints" / "resnet20_akamaster_9173.th", map_location="cpu", weights_only=True)
    net.load_state_dict({key.removeprefix("module."): value for key, value in state["state_dict"].items()})
    return net, "the public checkpoint"


def tensors(n_images: int) -> tuple[dict[str, tuple[Tensor, int | None]], str]:
    """Name -> (tensor, channel axis) of activations and weights, and a line that says what they are."""
    net, origin = network()
    net.eval()
    images = data.load_or_embedded("cifar10", "train", n=n_images)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        recorder = Recorder(fx.symbolic_trace(net))
        recorder.run((images.images.float() / 255 - mean) / std)
    found: dict[str, tuple[Tensor, int | None]] = {name: (x, None) for name, x in recorder.kept.items()}
    found |= {name: (w.detach(), 0) for name, w in net.named_parameters() if w.dim() > 1}
    return found, f"ResNet-20 ({origin}), {len(images)} images of {images.spec.name}"


def error_of(x: Tensor, grid: Grid, p: float) -> Tensor:
    """Per tensor or per channel (axis 0): mean |x - x_hat|^p in float64."""
    x = x.double().reshape(-1, x.numel() // max(1, grid.scale.numel()))
    scale, zero_point = grid.scale.double().view(-1, 1), grid.zero_point.double().view(-1, 1)
    x_int = torch.clamp(torch.round(x / scale) + zero_point, grid.qmin, grid.qmax)
    return (x - scale * (x_int - zero_point)).abs().pow(p).mean(1)


def literal(x: Tensor, *, bits: int, p: float, budget: int) -> tuple[Grid, float, bool]:
    """(best grid found, seconds for all candidates, whether that time is scaled up); ``x`` is (C, n)."""
    low, high, n = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0), 2**bits - 1
    zero_points = range(n + 1) if bool((low < 0).any()) and bool((high > 0).any()) else [0]
    candidates = list(itertools.product(range(1, 101), zero_points))
    tried = candidates[:: max(1, len(candidates) // budget)] if len(candidates) > budget else candidates
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    start = time.process_time()
    for i, zero_point in tried:
        scale = ((high - low) * (i / 100) / n).clamp(min=1e-8)
        x_hat = scale * (torch.clamp(torch.round(x / scale) + zero_point, 0, n) - zero_point)
        score = (x - x_hat).abs().pow(p).mean(1, keepdim=True)
        better = score < best
        best = torch.where(better, score, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, torch.full_like(scale, zero_point), best_zero)
    seconds = (time.process_time() - start) * len(candidates) / len(tried)
    return Grid(best_scale.flatten(), best_zero.flatten(), 0, n), seconds, len(tried) < len(candidates)


def timed(call: Callable[[], Grid]) -> tuple[Grid, float]:
    """(result, CPU seconds) of one call."""
    start = time.process_time()
    return call(), time.process_time() - start


def compare(name: str, x: Tensor, axis: int | None, options: argparse.Namespace) -> dict[str, object]:
    """One row: times of the exact search, of the fast one and of the literal loop, and who found the lower error."""
    search = {"bits": options.bits, "p": options.p, "axis": axis}
    exact, exact_s = timed(lambda: lp_search(x, **search))
    fast, fast_s = timed(lambda: lp_search(x, **search, exact=False))
    rows = x.reshape(1, -1) if axis is None else x.flatten(1)
    reference, literal_s, scaled = literal(rows, bits=options.bits, p=options.p, budget=options.budget)
    errors = [error_of(rows, grid, options.p) for grid in (exact, fast, reference)]
    return {
        "tensor": name, "kind": "weight" if axis == 0 else "two-sided" if bool((x < 0).any()) else "one-sided",
        "n_values": x.numel(), "literal_s": literal_s, "scaled": "*" if scaled else "", "exact_s": exact_s,
        "fast_s": fast_s, "times_faster": literal_s / exact_s,
        "excess": float(((errors[0] - errors[2]) / errors[2].clamp(min=1e-30)).max()),
        "fast_excess": float((errors[1] / errors[0].clamp(min=1e-30) - 1).max()),
    }  # fmt: skip


def main() -> None:
    """Print one row per tensor and the totals by kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--p", type=float, default=2.4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=int, default=400, help="candidates of the literal loop before it is scaled up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found, origin = tensors(options.images)
    lp_search(torch.rand(100_000), bits=options.bits)  # first-call costs belong to nobody
    table = pd.DataFrame([compare(name, x, axis, options) for name, (x, axis) in found.items()])
    print(f"{origin}; {options.bits} bits, p = {options.p}, {options.threads} thread(s); * = scaled up\n")
    print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    totals = table.groupby("kind")[["literal_s", "exact_s", "fast_s"]].sum()
    totals["times_faster"] = totals["literal_s"] / totals["exact_s"]
    print("\n" + totals.to_string(float_format=lambda v: f"{v:.3g}"))


if __name__ == "__main__":
    main()
