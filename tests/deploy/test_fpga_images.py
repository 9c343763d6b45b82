"""Memory images: known words, whole networks rebuilt from files alone, every altered file or manifest refused."""

import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from integer_nets import NETS, images, quantized

from hq_lib import data, integer, models
from hq_lib.deploy import fpga
from hq_lib.deploy.fpga import FpgaiError
from hq_lib.deploy.fpga.memory_image import MANIFEST, decode, encode
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer import record as r
from hq_lib.results import paths


def test_words_by_hand():
    x = np.array([1, -2, 127, -128, 5], np.int8)
    assert encode(x, 8, 8, "hex") == b"01\nfe\n7f\n80\n05\n"
    assert encode(x, 8, 32, "hex") == b"807ffe01\n00000005\n"  # the first value in the lowest bits
    assert encode(np.array([1, -2, 7, -8]), 4, 4, "hex") == b"1\ne\n7\n8\n"
    assert encode(np.array([1, 2, 3, 4]), 3, 10, "hex") == b"0d1\n004\n"  # 011 010 001 and a bit to spare
    coe = b"memory_initialization_radix=16;\nmemory_initialization_vector=\n00000001,\nffffffff;\n"
    assert encode(np.array([1, -1], np.int32), 32, 32, "coe") == coe


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 17, 31, 32])
@pytest.mark.parametrize("encoding", ["hex", "coe"])
@pytest.mark.parametrize("per_word", [1, 2.5, 7])
def test_every_width_comes_back(bits, encoding, per_word):
    for signed in (False, True):
        low = -(2 ** (bits - 1)) if signed else 0
        x = np.random.default_rng(0).integers(low, low + 2**bits, 23)
        content = encode(x, bits, int(bits * per_word), encoding)
        assert np.array_equal(decode(content, 23, bits, int(bits * per_word), encoding, signed=signed), x)


@pytest.mark.parametrize("policy", ["w8a8", "w4a4", "a16", "academic"])
@pytest.mark.parametrize("net", NETS)
def test_a_network_is_rebuilt_and_run_from_its_files_alone(tmp_path, net, policy):
    for i, (requantizer, options) in enumerate([("float32", {}), ("fixed", {"encoding": "coe", "word_bits": 72})]):
        model, x = integer.lower(quantized(net, policy), requantizer=requantizer), images(6)
        made = fpga.write_images(model, tmp_path / str(i), **options).parent
        assert np.array_equal(integer.run(fpga.read_images(made), x), integer.run(model, x))


def test_every_input_of_the_manifest_has_a_writer_and_every_operation_is_there(tmp_path):
    model = integer.lower(quantized("gated", "w8a8"), requantizer="fixed")
    manifest = json.loads(fpga.write_images(model, tmp_path).read_text(encoding="utf-8"))
    written = {manifest["input"]}
    for op in manifest["ops"]:
        assert set(op["inputs"]) <= written
        written.add(op["output"])
    assert [op["op"] for op in manifest["ops"]] == [type(op).__name__ for op in model.ops]
    assert {"Table", "Mul", "Add", "AvgPool", "Conv"} <= {op["op"] for op in manifest["ops"]}
    assert {image["file"] for image in manifest["images"].values()} | {MANIFEST} == {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(("policy", "bits"), [("w8a8", 8), ("w4a4", 4)])
def test_weights_take_the_bits_that_they_were_trained_on(tmp_path, policy, bits):
    model = integer.lower(quantized("residual", policy))
    found = json.loads(fpga.write_images(model, tmp_path, word_bits=32).read_text(encoding="utf-8"))["images"]
    for i, op in enumerate(model.ops):
        if isinstance(op, r.Layer) and op.name not in ("stem", "fc"):  # 8 bits in every policy
            image = found[f"op{i}.weight"]
            assert image["bits"] <= bits  # fewer where no weight is that large
            assert image["step"] == op.weight_step
            assert image["n_words"] == math.ceil(op.weight.size / (32 // image["bits"]))


def test_reading_and_running_need_no_torch(tmp_path):
    model, x = integer.lower(quantized("joined", "w8a8"), requantizer="fixed"), images(2).numpy()
    fpga.write_images(model, tmp_path / "made")
    np.save(tmp_path / "x.npy", x)
    code = """if 1:
        import sys, numpy as np
        sys.modules["torch"] = None
        from hq_lib import integer
        from hq_lib.deploy.fpga import read_images
        np.save("y.npy", integer.run(read_images("made"), np.load("x.npy")))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), integer.run(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["lenet", "resnet20", "mobilenetv2_seed"])
def test_networks_of_the_workbook_from_hex_alone_on_100_images(name, bits, tmp_path, cifar10_test, mnist_10k):
    part = (mnist_10k[1] if name == "lenet" else cifar10_test).subset(range(100))
    net, _ = models.load_checkpoint(paths.checkpoints_dir() / f"{name}_float_s0.safetensors")
    x = data.normalize(part.images, part.spec)
    with torch.no_grad():
        qnet = quantize(net.eval(), BitPolicy(weight=f"minmax:{bits}", act=f"minmax:{bits}"), x[:1])
    calibrate(qnet, x)
    model = integer.lower(qnet.eval(), requantizer="fixed", images=part.spec)
    want = integer.run(model, x)
    assert len(np.unique(want)) > 500
    assert np.array_equal(integer.run(fpga.read_images(fpga.write_images(model, tmp_path).parent), x), want)


def test_equal_records_give_equal_bytes(tmp_path):
    model = integer.lower(quantized("residual", "w8a8"))
    one, two = (fpga.write_images(model, tmp_path / n).parent for n in "ab")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("word_bits", [7, 0, -8, 8192, 32.0, "32"])
def test_words_that_hold_no_whole_values_are_refused(tmp_path, word_bits):
    with pytest.raises(FpgaiError, match=r"op\d+|tensor"):
        fpga.write_images(integer.lower(quantized("residual", "w8a8")), tmp_path, word_bits=word_bits)


def test_unknown_encodings_are_refused(tmp_path):
    with pytest.raises(FpgaiError, match="'hex' or 'coe'"):
        fpga.write_images(integer.lower(quantized("residual", "w8a8")), tmp_path, encoding="mif")


def rewrite(folder, change):
    """Apply ``change`` to the manifest's body and sign it again, as somebody hostile would."""
    path = folder / MANIFEST
    body = json.loads(path.read_text(encoding="utf-8"))
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}), encoding="utf-8")


@pytest.fixture(scope="module")
def joined():
    return integer.lower(quantized("joined", "w8a8"), requantizer="fixed")


@pytest.fixture
def folder(joined, tmp_path):
    return fpga.write_images(joined, tmp_path / "images").parent


OUTSIDE = ["../secret.hex", "/etc/passwd", "a/b.hex", "..", ".", "", "C:\\x", "a\0b", None, 3, ["x"]]


@pytest.mark.parametrize("file", OUTSIDE)
def test_paths_out_of_the_folder_are_refused(folder, file):
    rewrite(folder, lambda body: body["images"]["op1.weight"].update(file=file))
    with pytest.raises(FpgaiError, match="plain file name"):
        fpga.read_images(folder)


def test_links_out_of_the_folder_are_refused(folder):
    image = folder / "001_a_weight.hex"
    image.rename(folder.parent / "secret.hex")
    image.symlink_to(folder.parent / "secret.hex")
    with pytest.raises(FpgaiError, match="leads out of the folder"):
        fpga.read_images(folder)


def put(key, value):
    return lambda body: body["images"]["op1.weight"].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("shape", [4, 3, 3, 3]), "truncated or of another array"),
        (put("shape", [27, 3]), "4 axes"),
        (put("shape", [10**5, 10**5]), "shape"),
        (put("shape", [-81]), "shape"),
        (put("shape", [True, 81]), "shape"),
        (put("shape", "81"), "a list of some"),
        (put("dtype", "object"), "dtype"),
        (put("dtype", "uint8"), "do not fit"),
        (put("bits", 7), "end of a word"),
        (put("bits", 0), "0 bits"),
        (put("bits", 10**9), "bits"),
        (put("signed", False), "do not fit"),
        (put("step", 0), "step"),
        (put("step", 2), "do not fit"),
        (put("step", 2.0), "step"),
        (put("word_bits", 16), "truncated"),
        (put("word_bits", 10**9), "bits"),
        (put("n_words", 35), "word counts"),
        (put("sha256", "0" * 64), "SHA-256"),
        (put("extra", 1), "has the keys"),
        (lambda body: body.update(schema=1), "schema 1"),
        (lambda body: body.update(encoding="mif"), "encoding"),
        (lambda body: body.update(ops={}), "quantize its input|not a manifest"),
        (lambda body: body["ops"][1].pop("bias"), "has fields"),
        (lambda body: body["ops"][1].update(op="Eval"), "KeyError"),
        (lambda body: body["ops"].pop(3), "before anything writes"),
        (lambda body: body["ops"][1].update(padding=[10**9] * 4), "numbers from 0"),
        (lambda body: body["images"].update(noise={}), "noise.*has the keys"),
        (lambda body: body["images"].pop("op1.weight"), "KeyError"),
    ],
)
def test_hostile_manifests_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(FpgaiError, match=message):
        fpga.read_images(folder)


def test_an_altered_number_of_the_manifest_is_noticed(folder):
    path = folder / MANIFEST
    text = path.read_text(encoding="utf-8")
    assert '"qmax": 255' in text
    path.write_text(text.replace('"qmax": 255', '"qmax": 254', 1), encoding="utf-8")
    with pytest.raises(FpgaiError, match="altered"):
        fpga.read_images(folder)


def test_an_absent_image_or_manifest_is_named(folder):
    (folder / "001_a_bias.hex").unlink()
    with pytest.raises(FpgaiError, match=r"op1\.bias.*001_a_bias\.hex.*cannot be read"):
        fpga.read_images(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(FpgaiError, match="cannot be read"):
        fpga.read_images(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format": NaN}', b"null"])
def test_manifests_that_are_none_are_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(FpgaiError):
        fpga.read_images(folder)


def test_no_damaged_file_is_ever_read(folder):
    rng = np.random.default_rng(0)
    for path in [folder / MANIFEST, *sorted(folder.glob("00*"))[::3]]:
        whole = path.read_bytes()
        for _ in range(12):
            data = bytearray(whole)
            at = int(rng.integers(len(data)))
            if rng.integers(2):
                data[at] ^= int(rng.integers(1, 128))
            else:
                del data[at : at + int(rng.integers(1, 20))]
            path.write_bytes(data)
            if path.name == MANIFEST and unchanged(data, whole):
                continue  # white space moved
            with pytest.raises(FpgaiError):
                fpga.read_images(folder)
        path.write_bytes(whole)
    fpga.read_images(folder)


def unchanged(data, whole):
    try:
        return json.loads(bytes(data)) == json.loads(whole)
    except ValueError:
        return False


@pytest.mark.parametrize("bits", [18, 16, 8])
def test_narrow_multipliers_stay_within_their_stated_error(bits):
    for net, policy in (("gated", "w8a8"), ("residual", "academic"), ("mobile", "w4a4")):
        model, x = integer.lower(quantized(net, policy), requantizer="fixed"), images(30)
        narrow, error = fpga.narrowed(model, bits)
        pairs = [(q.fixed * 2.0 ** -q.shift.astype(int), p.fixed * 2.0 ** -p.shift.astype(int)) for q, p in zip(
            requants(model), requants(narrow), strict=True)]  # fmt: skip
        assert max(float((np.abs(a - b) / np.maximum(a, 1e-30)).max()) for a, b in pairs) == pytest.approx(error)
        assert max(int(p.fixed.max()) for p in requants(narrow)) < 2**bits
        alone = [op for op in narrow.ops if isinstance(op, r.AvgPool | r.Mul) and op.requant is not None]
        assert all(int(op.requant.fixed[0]) >= 2 ** (bits - 1) for op in alone)
        got, want = integer.run(narrow, x), integer.run(model, x)
        if bits == 18:
            assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
    with pytest.raises(FpgaiError, match="fixed"):
        fpga.narrowed(integer.lower(quantized("mobile", "w4a4")), 18)
    with pytest.raises(FpgaiError, match="8 to 31"):
        fpga.narrowed(model, 32)


def requants(model):
    found = []
    for op in model.ops:
        found += [*getattr(op, "requants", ()), *([op.requant] if getattr(op, "requant", None) else [])]
        found += [op.residual.requant] if getattr(op, "residual", None) else []
    return found
