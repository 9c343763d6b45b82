"""Integer models on disk: the same bits back, readable without torch, and never a crash on a damaged file."""

import io
import json
import random
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from integer_nets import images, quantized

from hq_lib.deploy import export
from hq_lib.graph import BitPolicy
from hq_lib.integer import RecordError, check, load, lower, run, to_bytes
from hq_lib.results import paths


@pytest.fixture(scope="module")
def model():
    """A record with fused additions, int32 residuals, pools and reshapes."""
    return lower(quantized("residual", "academic"))


def test_a_saved_model_computes_the_same_bits(model, tmp_path):
    again = load(export(model, tmp_path / "net.npz", "npz"))
    assert np.array_equal(run(again, images(5)), run(model, images(5)))
    assert to_bytes(again) == to_bytes(model) == (tmp_path / "net.npz").read_bytes()
    assert again.meta == model.meta


def test_numpy_alone_reads_the_arrays(model, tmp_path):
    """Plain arrays as they are; a weight of few bits by the rule of the docstring, spelled out here."""
    with np.load(export(model, tmp_path / "net.npz", "npz"), allow_pickle=False) as archive:
        manifest = json.loads(bytes(archive["manifest.json"]))
        for layer in [op for op in manifest["ops"] if op["op"] == "Conv"]:
            wanted, like = model.op(layer["name"]).weight, manifest["arrays"][layer["weight"]]
            assert np.array_equal(archive[layer["bias"]], model.op(layer["name"]).bias)
            if "bits" not in like:
                assert np.array_equal(archive[layer["weight"]], wanted)
                continue
            digits = "".join(f"{byte:08b}"[::-1] for byte in archive[layer["weight"]])
            b = like["bits"]
            codes = [int(digits[i * b : (i + 1) * b][::-1], 2) for i in range(wanted.size)]
            assert [(c - 2**b * (c >= 2 ** (b - 1))) * like["step"] for c in codes] == wanted.ravel().tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_storage_follows_bits(bits):
    net = lower(quantized("residual", BitPolicy(f"minmax:{bits}", "minmax:8", first_last_bits=None)))
    content = to_bytes(net)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    for i, op in enumerate(net.ops):
        if hasattr(op, "weight"):
            assert sizes[f"op{i}.weight.npy"] - 128 <= -(-op.weight.size * bits // 8)
    assert to_bytes(load(io.BytesIO(content))) == content


def test_loading_and_running_import_no_torch(model, tmp_path):
    export(model, tmp_path / "net.npz", "npz")
    np.save(tmp_path / "x.npy", images(3).numpy())
    code = (
        "import sys, numpy as np; from hq_lib.integer import load, run; "
        "y = run(load(sys.argv[1]), np.load(sys.argv[2])); assert 'torch' not in sys.modules; np.save(sys.argv[3], y)"
    )
    files = [str(tmp_path / name) for name in ("net.npz", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=paths.ROOT)
    assert np.array_equal(np.load(files[2]), run(model, images(3)))


def repacked(content: bytes, change) -> bytes:
    """The file with its members changed by ``change(dict of name -> bytes)``."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def edited(content: bytes, edit) -> bytes:
    """The file with its manifest changed by ``edit(manifest)``."""

    def change(members):
        manifest = json.loads(members["manifest.json"])
        edit(manifest)
        members["manifest.json"] = json.dumps(manifest).encode()

    return repacked(content, change)


def op_of(manifest: dict, kind: str) -> dict:
    return next(op for op in manifest["ops"] if op["op"] == kind)


EDITS = {
    "schema": (lambda m: m.update(schema=99), "schema"),
    "requantizer": (lambda m: m.update(requantizer="double"), "requantizer"),
    "op": (lambda m: m["ops"][1].update(op="Evil"), "not a readable"),
    "field": (lambda m: m["ops"][1].update(extra=1), "fields"),
    "stride 0": (lambda m: op_of(m, "Conv").update(stride=[0, 1]), "numbers from 1"),
    "padding": (lambda m: op_of(m, "Conv").update(padding=[-1, 0, 0, 0]), "numbers from 0"),
    "groups": (lambda m: op_of(m, "Conv").update(groups=5), "groups"),
    "order": (lambda m: m["ops"].reverse(), "first operation|before anything"),
    "input": (lambda m: m.update(input="nowhere"), "nowhere"),
    "output": (lambda m: m.update(output="image"), "output"),
    "shape": (lambda m: m["tensors"][2].update(shape=[6, 12, 13]), "shape"),
    "huge": (lambda m: m["tensors"][0].update(shape=[3, 10**6, 10**6]), "elements"),
    "bits": (lambda m: m["tensors"][1].update(bits=17), "bits"),
    "zero point": (lambda m: m["tensors"][1].update(zero_point=300), "zero point"),
    "range": (lambda m: m["tensors"][1].update(qmin=200, qmax=100), "not in uint8"),
    "bool": (lambda m: m["tensors"][1].update(qmin=False), "integer"),
    "name": (lambda m: m["tensors"][1].update(name=7), "text"),
    "array": (lambda m: op_of(m, "Conv").update(weight="nothing"), "not a readable"),
    "dtype": (lambda m: m["arrays"]["op1.weight"].update(dtype="object"), "not allowed"),
    "array size": (lambda m: m["arrays"]["op1.weight"].update(shape=[10**9]), "not allowed"),
    "array shape": (lambda m: m["arrays"]["op1.weight"].update(shape=[3]), "SHA-256|absent"),
    "bits of a weight": (lambda m: m["arrays"]["op1.weight"].update(bits=9, step=1), "are no int8"),
    "step of a weight": (lambda m: m["arrays"]["op1.weight"].update(bits=4, step=2**16), "are no int8"),
    "fewer bits": (lambda m: m["arrays"]["op1.weight"].update(bits=2, step=1), "absent|SHA-256"),
    "no ops": (lambda m: m.update(ops=[]), "first operation"),
    "meta": (lambda m: m.update(meta=[]), "meta"),
    "list": (lambda m: m.update(tensors={}), "readable|tensor"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_that_lies_is_refused(model, what):
    edit, message = EDITS[what]
    with pytest.raises(RecordError, match=message):
        load(io.BytesIO(edited(to_bytes(model), edit)))


def test_a_scale_that_no_file_could_give_back_is_refused(model):
    spec = next(spec for spec in model.tensors.values() if spec.dtype == "uint8")
    tensors = model.tensors | {spec.name: replace(spec, scale=np.float32(spec.scale))}  # a number, no array
    with pytest.raises(RecordError, match=f"tensor '{spec.name}', scale: no array but a float32"):
        to_bytes(replace(model, tensors=tensors))


def test_an_altered_weight_is_noticed(model):
    def flip(members):
        data = bytearray(members["op1.weight.npy"])
        data[-1] ^= 1
        members["op1.weight.npy"] = bytes(data)

    with pytest.raises(RecordError, match="SHA-256"):
        load(io.BytesIO(repacked(to_bytes(model), flip)))


def test_truncated_files_are_refused(model):
    content = to_bytes(model)
    for n in [0, 1, 4, 100, len(content) // 2, len(content) - 1]:
        with pytest.raises(RecordError):
            load(io.BytesIO(content[:n]))


def test_mutated_files_give_an_error_or_a_checked_model(model):
    content, rng = to_bytes(model), random.Random(0)
    for _ in range(300):
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            check(load(io.BytesIO(data)))
        except RecordError:
            continue


def test_mutated_manifests_give_an_error_or_a_checked_model(model):
    content, rng = to_bytes(model), random.Random(1)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = archive.read("manifest.json")
    odd = [b"-1", b"1e999", b"null", b"[]", b"{}", b'"x"', b"true", b"99999999999999999999", b"0", b""]
    for _ in range(150):
        start = rng.randrange(len(text))
        mutated = text[:start] + rng.choice(odd) + text[start + rng.randrange(6) :]
        try:
            other = repacked(content, lambda members, new=mutated: members.update({"manifest.json": new}))
            check(load(io.BytesIO(other)))
        except RecordError:
            continue


def test_missing_files_and_other_suffixes_are_named(model, tmp_path):
    with pytest.raises(RecordError, match=r"absent\.npz"):
        load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"\.npz"):
        export(model, tmp_path / "net.bin", "npz")
