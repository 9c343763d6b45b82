"""Hostile containers and image files: an error and an exit code, never a crash (AddressSanitizer and UBSan watch)."""

import struct
import subprocess
import zlib

import numpy as np
import pytest
from integer_nets import SANITIZERS, fuzzer, images, quantized

from hq_lib.deploy.c import compiler, to_bytes
from hq_lib.deploy.c.runtime import RUNTIME, TOOL, CompilerError, compiled
from hq_lib.integer import lower, run

try:
    compiler()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)

ONE = struct.unpack("<I", np.float32(1).tobytes())[0]
EVIL = (0, 1, 2, 3, 4, 15, 16, 17, 63, 64, 255, 256, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1, ONE)


def signed(content: bytes) -> bytes:
    """The container with a size and checksum that hold, so that the checks behind them are reached."""
    body = struct.pack("<I", len(content)) + struct.pack("<I", zlib.crc32(content[16:])) + content[16:]
    return content[:8] + body


def mutations(content: bytes, n: int, seed: int) -> list[bytes]:
    """Evil words in the tables, random bytes anywhere, cuts; most of them signed again."""
    rng = np.random.default_rng(seed)
    n_tensors, n_ops = struct.unpack_from("<2I", content, 20)
    tables, made = 16 + 20 * n_tensors + 32 * n_ops, []
    for i in range(n):
        words = bytearray(content)
        for _ in range(int(rng.integers(1, 3))):
            place, old = int(rng.integers(4, tables)) * 4, 0
            old = struct.unpack_from("<I", words, place)[0]
            value = int(rng.choice(EVIL)) if rng.random() < 0.6 else (old + int(rng.integers(-70, 70))) % 2**32
            struct.pack_into("<I", words, place, value)
        if i % 5 == 0:
            words = bytearray(content)
            for place in rng.integers(64, len(words), 8):
                words[place] = int(rng.integers(256))
        if i % 11 == 0:
            words = words[: int(rng.integers(0, len(words)))]
        made.append(signed(bytes(words)) if i % 17 and len(words) >= 64 else bytes(words))
    return made


@pytest.fixture(scope="module")
def sanitized() -> str:
    """The command-line program with both sanitizers."""
    try:
        return str(compiled("hqm", RUNTIME + TOOL, *SANITIZERS))
    except CompilerError as error:
        pytest.skip(f"no sanitizers here: {str(error)[:200]}")


def call(tool: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


HOSTILE = pytest.mark.parametrize(
    ("net", "policy", "requantizer"),
    [
        (net, policy, requantizer)
        for net, policy in (("residual", "academic"), ("mobile", "w8a8"), ("joined", "a16"), ("preactivation", "w4a4"),
                            ("gated", "w8a8"))
        for requantizer in ("float32", "fixed")
    ],
)  # fmt: skip


def survived(content: bytes, n: int, seed: int, kernel: str, folder) -> tuple[int, int]:
    """How many of a container and its ``n`` mutations were opened and run, and how many refused; a crash fails."""
    corpus = [content, *mutations(content, n, seed)]
    (folder / "corpus").write_bytes(b"".join(struct.pack("<I", len(c)) + c for c in corpus))
    done = subprocess.run([str(fuzzer()), str(folder / "corpus"), kernel], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    opened, refused = map(int, done.stdout.split())
    assert opened + refused == n + 1
    return opened, refused


@HOSTILE
def test_mutated_containers_never_leave_their_memory(net, policy, requantizer, tmp_path, sanitized):
    content = to_bytes(lower(quantized(net, policy), requantizer=requantizer))
    for kernel in ("scalar", "auto"):
        opened, refused = survived(content, 250, len(net), kernel, tmp_path)
        assert opened > 10  # mutated ones that run all the same: what the sanitizers are for
        assert refused > 90


@pytest.mark.slow
@pytest.mark.timeout(7200)
@HOSTILE
def test_a_hundred_thousand_mutations(net, policy, requantizer, tmp_path, sanitized):
    """10,000 of each container: 100,000 in all, alternately with the scalar and the fastest kernels."""
    content = to_bytes(lower(quantized(net, policy), requantizer=requantizer))
    found = [survived(content, 500, 1000 + i, ("scalar", "auto")[i % 2], tmp_path) for i in range(20)]
    assert sum(opened for opened, _ in found) > 400


@pytest.fixture
def model_file(tmp_path):
    content = to_bytes(lower(quantized("residual", "w8a8")))
    (tmp_path / "net.hqm").write_bytes(content)
    return tmp_path / "net.hqm"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: b"", "truncated"),
        (lambda c: b"PK\3\4" + c[4:], "not a .hqm"),
        (lambda c: c[:4] + b"\x63" + c[5:], "another version"),
        (lambda c: c[:-1], "truncated"),
        (lambda c: c + b"\0", "not of the size"),
        (lambda c: c[:900] + bytes([c[900] ^ 1]) + c[901:], "CRC-32"),
        (lambda c: signed(c[:24] + struct.pack("<I", 10**9) + c[28:]), "header"),
    ],
)
def test_bad_containers_are_named_with_exit_code_4(spoil, message, model_file, tmp_path, sanitized):
    (tmp_path / "bad.hqm").write_bytes(spoil(model_file.read_bytes()))
    done = call(sanitized, tmp_path / "bad.hqm", "--info")
    assert (done.returncode, "bad.hqm" in done.stderr) == (4, True), done.stderr
    assert message in done.stderr


def test_logits_and_accuracy_of_raw_floats(model_file, tmp_path, sanitized):
    imodel, x = lower(quantized("residual", "w8a8")), images(9).numpy()
    want = run(imodel, x)
    labels = want.argmax(1).astype(np.uint8)
    labels[0] ^= 1
    (tmp_path / "x.f32").write_bytes(x.tobytes())
    (tmp_path / "labels").write_bytes(labels.tobytes())
    done = call(sanitized, model_file, "--raw-f32", tmp_path / "x.f32", "--labels", tmp_path / "labels",
                "--logits", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.fromfile(tmp_path / "out", np.float32).reshape(want.shape), want)
    told = dict(line.split() for line in done.stdout.splitlines())
    assert told["n_images"] == "9"
    assert float(told["acc_pct"]) == pytest.approx(100 * 8 / 9, abs=1e-3)
    assert float(told["ms_per_image"]) > 0
    assert "n_images        4" in call(sanitized, model_file, "--raw-f32", tmp_path / "x.f32", "--n", 4).stdout


def test_wrong_words_and_files_have_their_exit_codes(model_file, tmp_path, sanitized):
    x = images(2).numpy()
    for name, data in {
        "whole": x.tobytes(),
        "cut": x.tobytes()[:-3],
        "empty": b"",
        "nan": (x * np.nan).tobytes(),
    }.items():
        (tmp_path / name).write_bytes(data)
    cases = {
        ("--help",): 0, (): 2, (model_file,): 2, (model_file, "--png", "a"): 2, (model_file, "--raw-f32"): 2,
        (model_file, "--idx", "--cifar10", "a"): 2, (model_file, "--raw-f32", tmp_path / "whole", "--n", "0x"): 2,
        (model_file, "--raw-f32", tmp_path / "whole", "--kernel", "mmx"): 2, (model_file, "--raw-f32", "a", "--n"): 2,
        (tmp_path / "none.hqm", "--info"): 3, (model_file, "--raw-f32", tmp_path / "none"): 3, (tmp_path, "--info"): 3,
        (model_file, "--raw-f32", tmp_path / "whole"): 0, (model_file, "--raw-f32", tmp_path / "cut"): 5,
        (model_file, "--raw-f32", tmp_path / "empty"): 5, (model_file, "--raw-f32", tmp_path / "nan"): 5,
        (model_file, "--raw-u8", tmp_path / "whole"): 5, (model_file, "--cifar10", tmp_path / "whole"): 5,
        (model_file, "--raw-f32", tmp_path / "whole", "--labels", tmp_path / "empty"): 5,
        (model_file, "--raw-f32", tmp_path / "whole", "--logits", tmp_path / "no" / "folder"): 3,
    }  # fmt: skip
    for words, code in cases.items():
        done = call(sanitized, *words)
        assert done.returncode == code, (words, done)
        assert done.returncode == 0 or done.stderr.startswith("hqm: "), (words, done)


@pytest.mark.slow
def test_cifar10_and_idx_files(cifar10_test, tmp_path, sanitized):
    """The program reads the formats of the data sets themselves: pixels in, the logits of normalised floats out."""
    from hq_lib.data import normalize
    from hq_lib.graph import BitPolicy, calibrate, quantize
    from hq_lib.models import build

    part = cifar10_test.subset(range(20))
    x = normalize(part.images, part.spec)
    qnet = quantize(build("toynet").eval(), BitPolicy(), x[:1])
    calibrate(qnet, x)
    imodel = lower(qnet.eval(), images=part.spec)
    (tmp_path / "net.hqm").write_bytes(to_bytes(imodel))
    want, pixels, labels = run(imodel, x), part.images.numpy(), part.labels.numpy().astype(np.uint8)
    batch = b"".join(bytes([k]) + p.tobytes() for k, p in zip(labels, pixels, strict=True))
    idx = struct.pack(">4B4I", 0, 0, 8, 4, 20, 3, 32, 32) + pixels.tobytes()
    files = {"batch.bin": batch, "cut.bin": batch[:-1], "evil.bin": b"\xff" + batch[1:], "x.idx": idx,
             "labels.idx": struct.pack(">4BI", 0, 0, 8, 1, 20) + labels.tobytes(), "cut.idx": idx[:-1],
             "huge.idx": struct.pack(">4B4I", 0, 0, 8, 4, 2**32 - 1, 3, 32, 32) + pixels.tobytes(),
             "x.u8": pixels.tobytes()}  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for words in (("--cifar10", "batch.bin"), ("--idx", "x.idx", "--labels", "labels.idx"), ("--raw-u8", "x.u8")):
        paths = [w if w.startswith("--") else tmp_path / w for w in words]
        done = call(sanitized, tmp_path / "net.hqm", *paths, "--logits", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert np.array_equal(np.fromfile(tmp_path / "out", np.float32).reshape(want.shape), want)
        if words[0] != "--raw-u8":
            assert f"{100 * (want.argmax(1) == labels).mean():.4f}" in done.stdout
    for name, kind in (("cut.bin", "--cifar10"), ("evil.bin", "--cifar10"), ("cut.idx", "--idx"), ("huge.idx", "--idx"),
                       ("batch.bin", "--idx"), ("labels.idx", "--idx")):  # fmt: skip
        assert call(sanitized, tmp_path / "net.hqm", kind, tmp_path / name).returncode == 5, name
