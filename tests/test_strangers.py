"""Files from strangers: whatever is in them, a reader gives what it promises or the library's own error.

One mutator for all readers. Each campaign runs in a process of its own with 1 GiB more memory than it had, and with an
ear on every file that is opened: none lies outside the reader's folder. `HQ_MUTATIONS=100000` draws that many.
"""

import io
import json
import os
import random
import resource
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from integer_nets import float_net, images, quantized
from PIL import Image

from hq_lib import graph, integer, models
from hq_lib.crossbar import IdealEngine, RecordEngine, Trace, load_calibration, measured_device, save_calibration
from hq_lib.data import folder as pictures
from hq_lib.data import load as load_images
from hq_lib.deploy import fpga
from hq_lib.deploy.c import CompilerError, Runtime, to_bytes
from hq_lib.graph import BitPolicy
from hq_lib.models import checkpoints
from hq_lib.ptq import selection
from hq_lib.results import paths, store
from hq_lib.results.paths import ROOT
from hq_lib.studies import configuration

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
        str(p) for p in (path.parent, ROOT, paths.data_dir(), sys.prefix, sys.base_prefix, "/proc", "/dev", "/sys")
    )
    draw, refused = random.Random(seed), 0
    for i in range(n):
        mutant = mutated(content, draw)
        path.write_bytes(mutant)
        opened.clear()
        try:
            read(path)
        except BaseException as error:
            if not own(error):
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
        digest = checkpoints._digest(text, state)
        target = path.with_suffix(".safetensors")
        target.write_bytes(safetensors.torch.save(state, {checkpoints._RECORD: digest + text}))
        read(target)

    return reading


def readers(folder):
    """Name -> (a good file, its reader)."""
    qnet = quantized("residual", BitPolicy("minmax:4", "minmax:4"))
    load_net = lambda p: graph.load(p, net=float_net("residual"))  # noqa: E731
    net = graph.save(qnet, folder / "net.safetensors")
    lenet = ROOT / "data/checkpoints/lenet_float_s0.safetensors"
    record = integer.lower(qnet)
    integer.save(record, folder / "net.npz")
    engine = RecordEngine(IdealEngine(), folder / "parts")
    weights = np.arange(12).reshape(4, 3)
    engine.mvm(engine.load(weights, 0.5, "a"), np.arange(8).reshape(2, 4))
    engine.trace().save(folder / "trace.safetensors")
    bench = IdealEngine()
    bench.load(weights, 0.5, "a")
    save_calibration(folder / "calibration.safetensors", bench)
    digits = load_images("digits", "train", n=20)
    selection.write(selection.from_images(digits, range(5)), folder / "manifest.json")
    fpga.write_images(record, folder / "fpga")
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(picture, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(jpeg, "JPEG")
    device = (ROOT / "hq_lib").parent / "tests" / "own_device.csv"
    table = (
        b"target_uS,mean_uS,sigma_uS\n0,0.1,0.1\n5,5.1,0.3\n25,24.8,0.5\n"
        if not device.exists()
        else device.read_bytes()
    )
    text, state = record_of(net)
    lenet_text, lenet_state = record_of(lenet)
    trace_text, trace_state = record_of(folder / "trace.safetensors")
    read_picture = lambda p: pictures.read_image(p, size=32, short_side=36)  # noqa: E731
    rows = (ROOT / "data/results/bn_fold.csv").read_bytes().splitlines(keepends=True)[:8]
    yaml = (ROOT / "notebooks/configs/seed000_hybrid.yaml").read_bytes()
    found = {
        "network.safetensors": (net.read_bytes(), load_net),
        "network_record.json": (text, resealed(state, load_net)),
        "checkpoint.safetensors": (lenet.read_bytes(), models.load_checkpoint),
        "checkpoint_record.json": (lenet_text, resealed(lenet_state, models.load_checkpoint)),
        "record.npz": ((folder / "net.npz").read_bytes(), integer.load),
        "trace.safetensors": ((folder / "trace.safetensors").read_bytes(), Trace.load),
        "trace_record.json": (trace_text, resealed(trace_state, Trace.load)),
        "calibration.safetensors": (
            (folder / "calibration.safetensors").read_bytes(), lambda p: load_calibration(p, bench)),
        "manifest.json": ((folder / "manifest.json").read_bytes(), selection.read),
        "picture.png": (picture.getvalue(), read_picture),
        "picture.jpg": (jpeg.getvalue(), read_picture),
        "run.yaml": (yaml, configuration.read),
        "rows.csv": (b"".join(rows), store.read_file),
        "device.csv": (table, measured_device),
    }  # fmt: skip
    try:
        Runtime(record)
        found["container.hqm"] = (to_bytes(record), lambda p: Runtime(p).run(images(1)))
    except CompilerError:
        pass
    return found


NAMES = (
    "network.safetensors", "network_record.json", "checkpoint.safetensors", "checkpoint_record.json", "record.npz",
    "trace.safetensors", "trace_record.json", "calibration.safetensors", "manifest.json", "picture.png", "picture.jpg",
    "run.yaml", "rows.csv", "device.csv", "container.hqm",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    return readers(tmp_path_factory.mktemp("good"))


def survive(name, good, n, seed):
    if name not in good:
        pytest.skip("no C compiler")
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
