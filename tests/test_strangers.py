"""Files from strangers: whatever is in them, a reader gives what it promises or the library's own error.

One mutator for all readers. Each campaign runs in a process of its own with 1 GiB more memory than it had, and with an
ear on every file that is opened: none lies outside the reader's folder. `HQ_MUTATIONS=100000` draws that many.
"""

import hashlib
import importlib.util
import io
import json
import os
import random
import resource
import socket
import struct
import sys
import tempfile
import zlib
from collections import OrderedDict
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fpgai_nets import SMALL, random_net, write_tuple
from integer_nets import float_net, images, quantized
from PIL import Image
from torch import nn

from hq_lib import deploy, graph, integer, models
from hq_lib.crossbar import (
    IdealEngine,
    Limits,
    RecordEngine,
    TcpDriver,
    Trace,
    device,
    fit_report,
)
from hq_lib.data import fetch, sources
from hq_lib.data import folder as pictures
from hq_lib.data import load as load_images
from hq_lib.deploy import edge_cloud, fpga
from hq_lib.deploy.c import CompilerError, Runtime, to_bytes
from hq_lib.deploy.c.container import MAGIC
from hq_lib.deploy.c.runtime import meta_of
from hq_lib.deploy.fpga import memory_image
from hq_lib.graph import BitPolicy
from hq_lib.models import checkpoints
from hq_lib.ptq import progress, selection
from hq_lib.results import paths, published, store
from hq_lib.results.paths import ROOT
from hq_lib.studies import configuration, inputs, methods, steps
from hq_lib.training import TrainConfig, run_state
from hq_lib.training.recipes import METHODS

FORK = get_context("fork")
N = int(os.environ.get("HQ_MUTATIONS", "2000"))
MIB = 2**20
TOKENS = [
    b"", b"\0", b"\xff\xff\xff\xff", b"[" * 5000, b"{", b'"', b"..", b"/", b"../../secret", b"/etc/passwd", b"NaN",
    b"-1", b"1e999", b"9" * 5000, b"null", b"true", b"[]", b"{}", b"\n", b",", b": ",
    b"&a [*a]", b"!!python/name:os.system ",
    b"0", b"2147483648", b"18446744073709551615", "\u00e9".encode(), b"PK\x05\x06",
]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, cuts, repeats, tokens, numbers."""
    out = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, n = draw.randrange(len(out) + 1), draw.choice([1, 1, 2, 4, 8, 64])
        kind = draw.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at : at + n] = draw.randbytes(n)
        elif kind == 2:
            del out[at : at + draw.choice([n, len(out)])]
        elif kind == 3:
            out[at:at] = out[at : at + n] * draw.choice([1, 3])
        elif kind == 4:
            out[at : at + draw.choice([0, n])] = draw.choice(TOKENS)
        elif digits := [i for i, b in enumerate(out[:20000]) if 48 <= b <= 57]:
            out[draw.choice(digits)] = draw.choice(b"0123456789-e.")
    return bytes(out)


def written(path: Path, content: bytes) -> None:
    """A new file: one that is cut and filled again waits for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def own(error: BaseException) -> bool:
    """A class of the library, or a plain refusal that the library raised itself."""
    if type(error).__module__.startswith("hq_lib"):
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_here = place is not None and "/hq_lib/" in place.tb_frame.f_code.co_filename
    return isinstance(error, ValueError | OSError) and raised_here


def campaign(path, content, read, n, seed, found):
    """In a process of its own: the reader on ``n`` mutants; the first fault goes to ``found``."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 1024 * MIB, used + 1024 * MIB))
    sys.setrecursionlimit(1000)
    inside = tuple(
        str(p) for p in (path.parent, ROOT, paths.cache_dir(), sys.prefix, sys.base_prefix, "/proc", "/dev", "/sys")
    )
    draw, refused = random.Random(seed), 0
    for i in range(n):
        mutant = mutated(content, draw) if i else content
        written(path, mutant)
        opened.clear()
        try:
            read(path)
        except BaseException as error:
            if not own(error) or not i:  # the file itself is read
                found.put(f"mutant {i}: {type(error).__name__}: {str(error)[:300]}")
                path.with_name(f"found_{path.name}").write_bytes(mutant)
                return
            refused += 1
        if outside := [name for name in opened if not name.isdigit() and not name.startswith(inside)]:
            found.put(f"mutant {i}: opened {outside[0]}")
            return
    found.put(refused)


def record_of(path):
    """The sealed record of a file, to be mutated and sealed again: beyond the check sum lies the reader itself."""
    state, record = models.read_checkpoint(path)
    return json.dumps({key: value for key, value in record.items() if key != "sha256"}).encode(), state


def resealed(state, read):
    def reading(path):
        text = path.read_bytes().decode("utf-8", "replace")
        digest = checkpoints.digest(text, state)
        target = path.with_suffix(".safetensors")
        target.write_bytes(safetensors.torch.save(state, {checkpoints._RECORD: digest + text}))
        read(target)

    return reading


def beside(files, name, read, *, seal=None):
    """A reader of a folder in which one file was changed; ``seal`` makes its checksums hold again."""

    def reading(path):
        place = path.parent / "beside"
        if not place.exists():
            place.mkdir()
            for other, content in files.items():
                (place / other).write_bytes(content)
        content = path.read_bytes()
        written(place / name, content)
        if seal is not None:
            seal(place, name, content)
        read(place)

    return reading


def seal_images(place, name, content):
    """The checksums of an FPGA's memory images, as somebody hostile would write them."""
    manifest = place / memory_image.MANIFEST
    try:
        body = json.loads((seal_images.whole if name != manifest.name else content).decode("utf-8", "replace"))
        for image in body["images"].values():
            if image["file"] == name:
                image["sha256"] = hashlib.sha256(content).hexdigest()
        body.pop("sha256", None)
        manifest.write_text(json.dumps({**body, "sha256": memory_image._digest(body)}))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass  # no JSON any more: it is read as it is


def sealed_packet(wire):
    def reading(path):
        content = path.read_bytes()
        if content[-1:] > b"\x40":  # three of four
            fields, payload = content[:13], content[17:]
            content = fields + struct.pack("<I", zlib.crc32(payload, zlib.crc32(fields))) + payload
        edge_cloud.unpack(wire, [content])

    return reading


def normalized(meta):
    """How images are read that a stranger's file speaks of."""
    inputs.normalization(configuration.Configuration(), steps._image_record(meta))


def read_meta(path):
    content = path.read_bytes()
    header = MAGIC + bytes(40) + struct.pack("<2I", 64, len(content)) + bytes(12)
    path.with_suffix(".hqm").write_bytes(header + content)
    normalized(meta_of(path.with_suffix(".hqm")))


def answered(ask):
    """A bench's answer to the first request, as whoever sits at its address sends it."""

    def reading(path):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(path.read_bytes())
            theirs.shutdown(socket.SHUT_WR)
            driver = TcpDriver("127.0.0.1", 1, timeout_s=5.0)
            driver._socket = ours
            ask(driver)

    return reading


def message(head, array=None):
    """The bytes of a bench's answer to request 1."""
    body = b"" if array is None else array.tobytes()
    text = json.dumps({"number": 1, **head, **({} if array is None else {"dtype": "<f8", "shape": array.shape})})
    return struct.pack(">I", len(text)) + text.encode() + body


def cached(place):
    """The data cache, which refuses what is damaged by fetching it again."""
    arrays, reason = fetch._read_cache(place, fetch.DataSet("mine", {"images": None, "labels": None}, ()))
    if arrays is None:
        raise fetch.DataUnavailableError(reason)


def readers_of_runs(folder):
    """A run's YAML to the end of what it says, manifests to their images, a data cache, a bench's answers."""
    run = (
        "model: lenet\nmethod: brecq\nbits: [4, 4]\nprotocol: {iterations: 20}\n"
        "policy: {first_last_bits: 8, overrides: {'conv*': {weight: 'minmax:6'}}}\n"
    )
    training = "model: lenet\nmethod: pact\nseed: 3\nprotocol: {epochs: 3, lr: 0.1}\nmean: [0.1]\nstd: [0.3]\n"
    lists = "model: lenet\nmethod: lsq\nlists: {layer_abit: [8, 4], layer_wbit: [8, 2]}\n"
    net = nn.Sequential(OrderedDict(conv1=nn.Conv2d(1, 2, 3), relu=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(8, 2)))

    def told(path):
        given = configuration.read(path)
        if given.method in METHODS:
            methods.qat(given, net), methods.float_training(given)
        else:
            methods.ptq(given, net)
        inputs.normalization(given, {"dataset": "fashion_mnist"})

    (folder / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)).save(folder / "images" / f"{i}.png")
    pngs = {file.name: file.read_bytes() for file in (folder / "images").iterdir()}
    listed = (
        selection.from_images(load_images("imagenet", "trainval", root=folder / "images"), [0, 2]).to_json().encode()
    )
    digits = load_images("digits", "train", n=20)
    arrays = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "labels": np.arange(2)}
    fetch._store(folder / "cache", arrays, {key: fetch.sha256_of(array) for key, array in arrays.items()})
    kept = {file.name: file.read_bytes() for file in (folder / "cache").iterdir()}
    sizes = {"n_tiles": 4, "rows": 4, "columns": 3, "rows_per_read": 2}
    limits = Limits(**sizes, level_max=15, code_max=15, count_max=1000, counts_per_unit=0.5)
    return {
        "run_to_its_end.yaml": (run.encode(), told),
        "training_to_its_end.yaml": (training.encode(), told),
        "lists.yaml": (lists.encode(), told),
        "manifest_of_files.json": (
            listed, beside(pngs, "manifest.json",
                lambda place: selection.take(
                    selection.read(place / "manifest.json"), load_images("imagenet", "trainval", root=place)))),
        "manifest_of_digits.json": (
            selection.from_images(digits, range(5)).to_json().encode(),
            lambda p: selection.take(selection.read(p), digits)),
        "cache_sums.json": (kept[fetch.SUMS], beside(kept, fetch.SUMS, cached)),
        "cache_images.npy": (kept["images.npy"], beside(kept, "images.npy", cached)),
        "bench_limits.bin": (message({"limits": asdict(limits)}), answered(TcpDriver.limits)),
        "bench_conditions.bin": (message({"environment": {"celsius": 25.0}}), answered(TcpDriver.environment)),
        "bench_counts.bin": (
            message({}, np.arange(6.0).reshape(2, 3)), answered(lambda d: d.read(0, np.zeros((2, 4), np.int64)))),
    }  # fmt: skip


def more_readers(folder, record):
    """Images of an FPGA, packets, folders of runs, tables, files of other tools."""
    manifest = fpga.write_images(record, folder / "fpga")
    images_of = {file.name: file.read_bytes() for file in manifest.parent.iterdir()}
    seal_images.whole = images_of[manifest.name]
    image = max((name for name in images_of if name != manifest.name), key=lambda name: len(images_of[name]))
    seeds = {file.name: file.read_bytes() for file in fpga.write_net(random_net(3, SMALL), folder, "net", form="txt")}
    read_seeds = lambda place: fpga.read_net(place, "net", SMALL, form="txt")  # noqa: E731
    bins = {file.name: file.read_bytes() for file in fpga.write_net(random_net(3, SMALL), folder, "net", form="bin")}
    read_bins = lambda place: fpga.read_net(place, "net", SMALL, form="bin")  # noqa: E731
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 5)).astype(np.float32)
    few, real = edge_cloud.fit_wire(torch.from_numpy(x), "cut", bits=3), edge_cloud.float_wire(x.shape[1:], "cut")
    dots = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (1, 3, 16, 16), np.uint8))
    torch.save({"state_dict": models.build("lenet").state_dict()}, folder / "public.pt")
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    identity = asdict(TrainConfig(epochs=3, lr=0.1))
    run_state.begin(folder / "run", identity)
    run_state.save(folder / "run", {"history": [], "net": net.state_dict(), "optimizer": optimizer.state_dict()})
    run = {name: (folder / "run" / name).read_bytes() for name in (run_state.STATE, run_state.CONFIG)}
    body = quantized("residual", BitPolicy("lsq:4", "lsq:4"))
    files = progress.RunFolder(folder, {"config": {"p": 2.0}})
    files.save(progress.UnitReport("a", 0, 1, 1.0, 0.5, 0.0, 10, 1.0), body)
    fit = {name: (folder / name).read_bytes() for name in ("run.json", "unit_000.safetensors")}
    read_fit = lambda place: progress.RunFolder(place, {"config": {"p": 2.0}}).load(0, body)  # noqa: E731
    idx = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + bytes(range(24))
    rows = published.FILE.read_bytes().splitlines(keepends=True)[:12]
    meta = {"image": {"name": "cifar10", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "in_shape": [3, 32, 32]}}
    return {
        "fpga_manifest.json": (
            seal_images.whole, beside(images_of, manifest.name, fpga.read_images, seal=seal_images)),
        "fpga_image.hex": (images_of[image], beside(images_of, image, fpga.read_images, seal=seal_images)),
        "fpga_weight.txt": (seeds["net_weight.txt"], beside(seeds, "net_weight.txt", read_seeds)),
        "fpga_quant.txt": (seeds["net_quant.txt"], beside(seeds, "net_quant.txt", read_seeds)),
        "fpga_weight.bin": (bins["net_weight.bin"], beside(bins, "net_weight.bin", read_bins)),
        "seed.tuple": (
            write_tuple(random_net(5, SMALL), folder / "a.tuple").read_bytes(),
            lambda p: fpga.read_tuple(p, SMALL)),
        "public.pt": (
            (folder / "public.pt").read_bytes(), lambda p: models.load_public(p, models.build("lenet"))),
        "packet_deflate.bin": (edge_cloud.pack(few, few.encode(x), coding="deflate")[0], sealed_packet(few)),
        "packet_float.bin": (edge_cloud.pack(real, x)[0], sealed_packet(real)),
        "packet.jpg": (
            edge_cloud.to_jpeg(dots, quality=80)[0],
            lambda p: edge_cloud.from_jpeg([p.read_bytes()], dots, quality=80)),
        "published.csv": (b"".join(rows), published._load.__wrapped__),
        "cells.csv": ((ROOT / "data/devices/example_cells.csv").read_bytes(), fit_report),
        "run_state.pt": (
            run[run_state.STATE], beside(run, run_state.STATE, lambda place: run_state.begin(place, identity))),
        "run_config.json": (run[run_state.CONFIG], beside(run, run_state.CONFIG, run_state.settings)),
        "fit_unit.safetensors": (fit["unit_000.safetensors"], beside(fit, "unit_000.safetensors", read_fit)),
        "fit_run.json": (fit["run.json"], beside(fit, "run.json", read_fit)),
        "images.idx": (idx, sources.read_idx),
        "exported_meta.json": (json.dumps(meta).encode(), read_meta),
    }  # fmt: skip


def readers(folder):
    """Name -> (a good file, its reader)."""
    qnet = quantized("residual", BitPolicy("minmax:4", "minmax:4"))
    load_net = lambda p: graph.load(p, net=float_net("residual"))  # noqa: E731
    net = graph.save(qnet, folder / "net.safetensors")
    _, facts = models.read_checkpoint(ROOT / "data/checkpoints/lenet_float_s0.safetensors")
    small = {**facts, "model": "vgg_small", "options": {"width": 0.01}, "in_channels": 1}
    checkpoint = folder / "small.safetensors"
    models.save_checkpoint(checkpoint, models.build("vgg_small", width=0.01, in_channels=1), small)
    record = integer.lower(qnet)
    deploy.export(record, folder / "net.npz", "npz")
    engine = RecordEngine(IdealEngine(), folder / "parts")
    weights = np.arange(12).reshape(4, 3)
    engine.mvm(engine.load(weights, 0.5, "a"), np.arange(8).reshape(2, 4))
    engine.trace().save(folder / "trace.safetensors")
    digits = load_images("digits", "train", n=20)
    selection.write(selection.from_images(digits, range(5)), folder / "manifest.json")
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(picture, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(jpeg, "JPEG")
    text, state = record_of(net)
    float_text, float_state = record_of(checkpoint)
    trace_text, trace_state = record_of(folder / "trace.safetensors")
    read_picture = lambda p: pictures.read_image(p, size=32, short_side=36)  # noqa: E731
    rows = (ROOT / "data/results/bn_fold.csv").read_bytes().splitlines(keepends=True)[:8]
    yaml = (ROOT / "notebooks/configs/seed000_hybrid.yaml").read_bytes()
    found = {
        "network.safetensors": (net.read_bytes(), load_net),
        "network_record.json": (text, resealed(state, load_net)),
        "checkpoint.safetensors": (checkpoint.read_bytes(), models.load_checkpoint),
        "checkpoint_record.json": (float_text, resealed(float_state, models.load_checkpoint)),
        "record.npz": ((folder / "net.npz").read_bytes(), integer.load),
        "trace.safetensors": ((folder / "trace.safetensors").read_bytes(), Trace.load),
        "trace_record.json": (trace_text, resealed(trace_state, Trace.load)),
        "manifest.json": ((folder / "manifest.json").read_bytes(), selection.read),
        "picture.png": (picture.getvalue(), read_picture),
        "picture.jpg": (jpeg.getvalue(), read_picture),
        "run.yaml": (yaml, configuration.read),
        "rows.csv": (b"".join(rows), store.read_file),
        "device.csv": ((ROOT / "data/devices/example.csv").read_bytes(), device),
        **more_readers(folder, record),
        **readers_of_runs(folder),
    }  # fmt: skip
    try:
        Runtime(record)
        found["container.hqm"] = (to_bytes(record), lambda p: Runtime(p).run(images(1)))
    except CompilerError:
        pass
    if importlib.util.find_spec("onnxruntime"):
        from hq_lib.deploy import onnx

        file = deploy.export(record, folder / "net.onnx", "onnx")
        found["exported.onnx"] = (file.read_bytes(), lambda p: (onnx.meta_of(p), onnx.session(p)))
    return found


NAMES = (
    "network.safetensors", "network_record.json", "checkpoint.safetensors", "checkpoint_record.json", "record.npz",
    "trace.safetensors", "trace_record.json", "manifest.json", "picture.png", "picture.jpg",
    "run.yaml", "rows.csv", "device.csv", "container.hqm", "exported.onnx", "fpga_manifest.json", "fpga_image.hex",
    "fpga_weight.txt", "fpga_quant.txt", "seed.tuple", "public.pt", "packet_deflate.bin", "packet_float.bin",
    "packet.jpg", "published.csv", "cells.csv", "run_state.pt", "run_config.json", "fit_unit.safetensors",
    "fit_run.json", "images.idx", "exported_meta.json", "fpga_weight.bin", "run_to_its_end.yaml",
    "training_to_its_end.yaml", "lists.yaml", "manifest_of_files.json", "manifest_of_digits.json", "cache_sums.json",
    "cache_images.npy", "bench_limits.bin", "bench_conditions.bin", "bench_counts.bin",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    return readers(tmp_path_factory.mktemp("good"))


def survive(name, good, n, seed):
    if name not in good:
        pytest.skip("no C compiler, or no onnxruntime")
    content, read = good[name]
    with tempfile.TemporaryDirectory() as folder:
        found = FORK.Queue()
        process = FORK.Process(target=campaign, args=(Path(folder) / name, content, read, n, seed, found))
        process.start()
        process.join()
        assert process.exitcode == 0, f"the process ended with {process.exitcode}"
        said = found.get(timeout=5)
    assert isinstance(said, int), said
    return said


@pytest.mark.parametrize("name", NAMES)
def test_a_few_mutants_of_every_file_are_refused_or_read(name, good):
    survive(name, good, 40, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_many_mutants_of_every_file_are_refused_or_read(name, good):
    print(f"{name}: {survive(name, good, N, seed=2)} of {N} refused")
