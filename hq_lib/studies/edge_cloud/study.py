"""ResNet-20 cut in two: accuracy against the bytes sent, by cut, bits on the wire and what the edge is (notebook 09).

    python -m hq_lib.studies.edge_cloud.study --profile full --edges integer crossbar --cuts conv1 layer3.2

The edge half runs in integers, exactly or on simulated crossbars; the tensor at the cut goes over the wire in real
packets; the cloud half is the float network. Rows go to ``edge_cloud.csv`` wire by wire; those already there are not
measured again. Grids, wires and crossbars are fitted to training images; test images are only judged.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from hq_lib.data import ImageSet, normalize
from hq_lib.deploy.edge_cloud import (
    Cut,
    Wire,
    fit_wire,
    from_jpeg,
    integer_edge,
    pack,
    pixel_wire,
    run_edge,
    split_at,
    to_jpeg,
    unpack,
)
from hq_lib.integer import IntegerModel
from hq_lib.integer.execute import Products, real_values
from hq_lib.integer.execute import run as run_integers
from hq_lib.results import paths, provenance, store
from hq_lib.studies.edge_cloud.bench import (
    EDGE_BITS,
    EDGES,
    MODEL,
    QUALITIES,
    TENSOR_BITS,
    WIRE_BITS,
    Edge,
    Workbench,
    crossbar_edge,
    exact_edge,
    workbench,
)

STUDY = "edge_cloud"
IMAGE, ALL = "image", "all"
"""Names of the two ends: nothing, or everything, runs on the edge."""
CHUNK, SAY_EVERY_S = 250, 20.0


def run(
    profile: str, *, edges: Sequence[str] = EDGES, cuts: Sequence[str] = (), n_draws: int | None = None
) -> pd.DataFrame:
    """All rows of the study after measuring what is missing: pictures, then each edge at each cut and on each wire.

    Args:
        profile: chooses sizes and output folders.
        edges:   of ``EDGES``.
        cuts:    names of cuts; default the profile's.
        n_draws: programmings of each crossbar; default the profile's.

    Raises:
        ValueError: an unknown edge or cut, with those that exist.
    """
    bench = workbench(profile)
    inner = [cut.name for cut in bench.cuts[1:]]
    names = cuts or bench.size.cuts or inner
    for what, asked, valid in (("edge", edges, EDGES), ("cut", names, inner)):
        if wrong := [name for name in asked if name not in valid]:
            raise ValueError(f"unknown {what} {wrong[0]!r}: choose among {', '.join(valid)}")
    _shares(bench, names, profile)
    _pixels(bench, profile)
    _jpeg(bench, profile)
    for kind in edges:
        for draw in range(1 if kind == "integer" else n_draws or bench.size.n_draws):
            edge = exact_edge(bench) if kind == "integer" else crossbar_edge(bench, kind, draw)
            _whole(bench, edge, profile)
            for name in names:
                measure(bench, edge, bench.cut(name), profile)
    return store.read(STUDY, profile=profile)


def measure(bench: Workbench, edge: Edge, cut: Cut, profile: str) -> None:
    """Appends the missing rows of one edge and cut: accuracy and bytes of each wire."""
    grids = [("channel", bits) for bits in WIRE_BITS]
    grids += [("tensor", bits) for bits in TENSOR_BITS] if edge.kind == "integer" else []
    keys = {grid: _key(bench, edge, cut=cut.name, grid=grid[0], wire_bits=grid[1]) for grid in grids}
    missing = [grid for grid in grids if not _done(keys[grid], profile)]
    if not missing:
        return
    part, cloud = integer_edge(bench.qnet, bench.record, cut), split_at(bench.net, cut)[1]
    spec = part.tensors[part.output]
    x_int = computed(part, edge.images, edge.products(), f"{edge.title}: the edge half up to {cut.name}")
    for grid, bits in missing:
        wire = fitted_wire(bench, cut, bits=bits, per_channel=grid == "channel")
        with provenance.stopwatch() as watch:
            codes = (wire.encode_integers(x_int[i : i + CHUNK], spec) for i in range(0, len(x_int), CHUNK))
            right, sizes = over_the_wire(wire, codes, cloud, edge.images.labels)
        title = f"{edge.title}, cut after {cut.name}, {bits} bits, one scale per {grid}"
        _append(keys[grid, bits], bench, right, sizes, profile, title=title, seconds=watch.seconds)


@cache
def fitted_wire(bench: Workbench, cut: Cut, *, bits: int, per_channel: bool) -> Wire:
    """The wire of a cut, fitted to what the exact edge sends of the training images, whatever edge is used later."""
    return fit_wire(torch.from_numpy(_sent_in_training(bench, cut)), cut.name, bits=bits, per_channel=per_channel)


@lru_cache(maxsize=1)
def _sent_in_training(bench: Workbench, cut: Cut) -> np.ndarray:
    part = integer_edge(bench.qnet, bench.record, cut)
    x_int = run_edge(part, normalize(bench.train.images, bench.train.spec))
    return real_values(part.tensors[part.output], x_int)


def computed(part: IntegerModel, images: ImageSet, products: Products, title: str) -> np.ndarray:
    """The integers of ``images`` at the end of ``part``, (N, *shape); says where it is every 20 s."""
    print(title, flush=True)
    parts, said = [], time.perf_counter()
    for at in torch.arange(len(images)).split(CHUNK):
        some = images.subset(at)
        parts.append(run_edge(part, normalize(some.images, some.spec), products=products))
        if time.perf_counter() - said > SAY_EVERY_S:
            said = time.perf_counter()
            print(f"  {int(at[-1]) + 1} of {len(images)} images", flush=True)
    return np.concatenate(parts)


def over_the_wire(
    wire: Wire, codes: Iterable[np.ndarray], cloud: nn.Module, labels: Tensor
) -> tuple[Tensor, dict[str, list[int]]]:
    """Which images the cloud gets right, bool (N,), and the bytes of each packet by coding.

    Every packet is made in both codings; the cloud reads the deflated ones.

    Args:
        codes:  chunks (B, *wire.shape), the images in order.
        labels: (N,) int64.
    """
    sizes: dict[str, list[int]] = {"packed": [], "deflate": []}
    logits = []
    for some in codes:
        packets = pack(wire, some, coding="deflate")
        sizes["packed"] += map(len, pack(wire, some))
        sizes["deflate"] += map(len, packets)
        logits.append(_answers(cloud, torch.from_numpy(wire.decode(unpack(wire, packets)))))
    return torch.cat(logits).argmax(1) == labels, sizes


@torch.inference_mode()
def _answers(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def _shares(bench: Workbench, names: Sequence[str], profile: str) -> None:
    """Rows of what runs on the edge before each cut."""
    edge, units = exact_edge(bench), {"edge_mac_pct": "%", "edge_weight_KiB": "KiB"}
    for name in names:
        key = _key(bench, edge, cut=name) | {"n_test": 0, "n_calib": 0}
        if not store.done(STUDY, {**key, "metric": "edge_mac_pct"}, profile=profile):
            share = bench.share(bench.cut(name)).items()
            rows = [{**key, "metric": metric, "value": value, "unit": units[metric]} for metric, value in share]
            store.append(STUDY, rows, profile=profile)


def _pixels(bench: Workbench, profile: str) -> None:
    """Rows of the image sent in few bits a pixel; the whole network is float, in the cloud."""
    edge, spec = exact_edge(bench, "none"), bench.test.spec
    for bits in WIRE_BITS:
        key = _key(bench, edge, cut=IMAGE, wire_bits=bits)
        if _done(key, profile):
            continue
        wire = pixel_wire(spec, bits=bits)
        codes = (wire.encode(normalize(some, spec).numpy()) for some in bench.test.images.split(CHUNK))
        right, sizes = over_the_wire(wire, codes, bench.net, bench.test.labels)
        _append(key, bench, right, sizes, profile, title=f"the image, {bits} bits a pixel")


def _jpeg(bench: Workbench, profile: str) -> None:
    """Rows of the image sent as JPEG."""
    edge, images = exact_edge(bench, "none"), bench.test
    for quality in QUALITIES if images.spec.in_shape[0] in (1, 3) else ():
        key = _key(bench, edge, cut=IMAGE, jpeg_quality=quality)
        if _done(key, profile):
            continue
        streams = to_jpeg(images.images, quality=quality)
        seen = from_jpeg(streams, images.images, quality=quality)
        answers = torch.cat([_answers(bench.net, normalize(some, images.spec)) for some in seen.split(CHUNK)])
        sizes = {"jpeg": [len(stream) for stream in streams]}
        _append(key, bench, answers.argmax(1) == images.labels, sizes, profile, title=f"JPEG of quality {quality}")


def _whole(bench: Workbench, edge: Edge, profile: str) -> None:
    """The row of the network that runs on the edge as a whole."""
    key = _key(bench, edge, cut=ALL)
    if not _done(key, profile):
        with provenance.stopwatch() as watch:
            products = edge.products()
            right = torch.cat(list(_right(bench.record, edge.images, products)))
        _append(key, bench, right, {}, profile, title=f"{edge.title}, everything on the edge", seconds=watch.seconds)


def _right(record: IntegerModel, images: ImageSet, products: Products) -> Iterator[Tensor]:
    for at in torch.arange(len(images)).split(CHUNK):
        some = images.subset(at)
        logits = run_integers(record, normalize(some.images, some.spec), products=products)
        yield torch.from_numpy(logits).argmax(1) == some.labels


def _key(bench: Workbench, edge: Edge, **switches: Any) -> dict[str, Any]:
    """The columns that name one measurement."""
    bits = 32 if edge.kind == "none" else EDGE_BITS
    fitted = edge.kind != "none"
    return {
        "experiment": STUDY, "model": MODEL, "dataset": bench.test.spec.name, "method": "mse" if fitted else "float",
        "w_bits": bits, "a_bits": bits, "placement": "deploy" if fitted else "-",
        "n_calib": len(bench.train) if fitted else 0, "seed": edge.draw, "n_test": len(edge.images),
        "switches": {"edge": edge.kind, **switches, **edge.settings},
    }  # fmt: skip


def _done(key: Mapping[str, Any], profile: str) -> bool:
    return store.done(STUDY, {**key, "metric": "acc_pct"}, profile=profile)


def _append(
    key: dict[str, Any], bench: Workbench, right: Tensor, sizes: Mapping[str, list[int]], profile: str, *, title: str,
    seconds: float = 0.0,
) -> None:  # fmt: skip
    """Appends accuracy and mean bytes; of the exact edge also its accuracy on the images of the crossbars."""
    stamp = {"seconds": seconds, **provenance.stamp()}
    acc_pct = 100 * right.double().mean().item()
    rows = [{**key, "metric": "acc_pct", "value": acc_pct, "unit": "%", **stamp}]
    if len(right) == len(bench.subset) and not bench.subset.all():
        alone = right[bench.subset]
        rows.append({**rows[0], "value": 100 * alone.double().mean().item(), "n_test": len(alone)})
    mean_KiB = {name: float(np.mean(size)) / 1024 for name, size in sizes.items()}
    rows += [{**key, "metric": f"{n}_KiB", "value": v, "unit": "KiB", **stamp} for n, v in mean_KiB.items()]
    store.append(STUDY, rows, profile=profile)
    print(f"{title}: {acc_pct:.2f} %" + "".join(f", {n} {v:.3f} KiB" for n, v in mean_KiB.items()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.studies.edge_cloud.study", description=run.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    parser.add_argument("--edges", nargs="+", default=list(EDGES), choices=EDGES)
    parser.add_argument("--cuts", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--draws", type=int, default=None, metavar="N", help="programmings of each crossbar")
    options = parser.parse_args(arguments)
    run(options.profile, edges=options.edges, cuts=options.cuts, n_draws=options.draws)


if __name__ == "__main__":
    main()
