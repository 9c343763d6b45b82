"""Memory images: known words, round trips of both records, every altered file or manifest refused."""

import hashlib
import json

import numpy as np
import pytest
from fpgai_nets import SMALL, random_net
from integer_nets import images, quantized

from hq_lib import integer
from hq_lib.deploy import fpga
from hq_lib.deploy.fpga import FpgaiError, LayerMemory
from hq_lib.deploy.fpga.memory_image import MANIFEST, decode, encode


@pytest.fixture(scope="module")
def imodel():
    return integer.lower(quantized("residual", "w8a8"))


def test_words_by_hand():
    x = np.array([1, -2, 127, -128, 5], np.int8)
    assert encode(x, encoding="hex", word_bits=8) == b"01\nfe\n7f\n80\n05\n"
    assert encode(x, encoding="hex", word_bits=32) == b"807ffe01\n00000005\n"  # the first value in the lowest bits
    coe = b"memory_initialization_radix=16;\nmemory_initialization_vector=\n00000001,\nffffffff;\n"
    assert encode(np.array([1, -1], np.int32), encoding="coe", word_bits=32) == coe


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32"])
@pytest.mark.parametrize("encoding", ["hex", "coe"])
@pytest.mark.parametrize("word_bits", [32, 96])
def test_every_dtype_comes_back(dtype, encoding, word_bits):
    limits = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(limits.min, limits.max, (3, 7), dtype, endpoint=True)
    content = encode(x, encoding=encoding, word_bits=word_bits)
    y = decode(content, dtype, x.shape, encoding=encoding, word_bits=word_bits)
    assert y.dtype == x.dtype
    assert np.array_equal(x, y)


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.name, a.parameters, list(a.arrays)) == (b.name, b.parameters, list(b.arrays))
        for role, array in b.arrays.items():
            assert a.arrays[role].dtype == array.dtype
            assert np.array_equal(a.arrays[role], array)


@pytest.mark.parametrize("options", [{}, {"encoding": "coe"}, {"word_bits": 64}])
def test_images_of_an_fpgai_net_round_trip(tmp_path, options):
    net = random_net()
    memories = fpga.memories_of(net)
    path = fpga.write_images(memories, tmp_path / "made", **options)
    assert path.name == MANIFEST
    got = fpga.read_images(path.parent)
    assert_equal(got, memories)
    for memory, layer, stage in zip(got, net.layers, net.stages, strict=True):
        numbers = [memory.parameters[key] for key in ("scale", "multiplier", "shift", "zero_point")]
        assert numbers == [layer.scale, layer.multiplier, layer.shift, layer.zero_point]
        assert memory.parameters["padding"] == stage.padding
        assert np.array_equal(memory.arrays["weight"], layer.weight)


def test_images_of_an_integer_model_hold_all_that_its_layers_need(tmp_path, imodel):
    got = fpga.read_images(fpga.write_images(fpga.memories_of(imodel), tmp_path).parent)
    assert [memory.name for memory in got] == [op.name for op in imodel.layers()]
    for memory, op in zip(got, imodel.layers(), strict=True):
        assert np.array_equal(memory.arrays["weight"], op.weight)
        assert np.array_equal(memory.arrays["bias"], op.bias)
        assert np.array_equal(np.float32(memory.parameters["scale"]), op.weight_scale)
        assert (memory.parameters["multiplier"] is None) == (op.requant is None)
        if op.requant is not None:
            assert memory.parameters["multiplier"] == memory.arrays["multiplier"].tolist() == op.requant.fixed.tolist()
            assert memory.parameters["shift"] == memory.arrays["shift"].tolist() == op.requant.shift.tolist()
            assert np.array_equal(np.float32(memory.parameters["multiplier_float32"]), op.requant.multiplier)
        assert memory.parameters["input"]["zero_point"] == imodel.tensors[op.inputs[0]].zero_point


def test_a_layer_can_be_computed_from_its_images(tmp_path, imodel):
    """The classifier of the record, from nothing but manifest and images, equals the executor's integers."""
    seen = {}
    want = integer.run(imodel, images(4), watch=lambda op, x: seen.update({op.output: x.copy()}))
    op = imodel.layers()[-1]
    memory = fpga.read_images(fpga.write_images(fpga.memories_of(imodel), tmp_path, word_bits=32).parent)[-1]
    x = seen[op.inputs[0]].astype(np.int64) - memory.parameters["input"]["zero_point"]
    acc = x @ memory.arrays["weight"].astype(np.int64).T + memory.arrays["bias"]
    assert np.array_equal(acc, seen[op.output])
    scale = np.float32(memory.parameters["result"]["scale"])
    assert np.array_equal(acc.astype(np.float32) * scale, want)


def test_equal_layers_give_equal_bytes(tmp_path):
    one, two = (fpga.write_images(fpga.memories_of(random_net()), tmp_path / n).parent for n in "ab")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("word_bits", [12, 0, -8, 8, 48, 8192, 32.0, "32"])
def test_words_that_hold_no_whole_values_are_refused(tmp_path, word_bits):
    with pytest.raises(FpgaiError, match="do not hold whole values"):
        fpga.write_images(fpga.memories_of(random_net(0, SMALL)), tmp_path, word_bits=word_bits)


def test_unknown_roles_dtypes_and_encodings_are_refused(tmp_path):
    for arrays in ({"weight": np.zeros(3)}, {"noise": np.zeros(3, np.int8)}):
        with pytest.raises(FpgaiError, match="layer 'a'"):
            fpga.write_images([LayerMemory("a", {}, arrays)], tmp_path)
    with pytest.raises(FpgaiError, match="'hex' or 'coe'"):
        fpga.write_images([], tmp_path, encoding="mif")


def rewrite(folder, change):
    """Apply ``change`` to the manifest's body and sign it again, as somebody hostile would."""
    path = folder / MANIFEST
    body = json.loads(path.read_text(encoding="utf-8"))
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    return fpga.write_images(fpga.memories_of(random_net(0, SMALL)), tmp_path / "images").parent


OUTSIDE = ["../secret.hex", "/etc/passwd", "a/b.hex", "..", ".", "", "C:\\x", "a\0b", None, 3, ["x"]]


@pytest.mark.parametrize("file", OUTSIDE)
def test_paths_out_of_the_folder_are_refused(folder, file):
    rewrite(folder, lambda body: body["layers"][0]["images"]["weight"].update(file=file))
    with pytest.raises(FpgaiError, match="plain file name"):
        fpga.read_images(folder)


def test_links_out_of_the_folder_are_refused(folder):
    image = folder / "000_first_weight.hex"
    image.rename(folder.parent / "secret.hex")
    image.symlink_to(folder.parent / "secret.hex")
    with pytest.raises(FpgaiError, match="leads out of the folder"):
        fpga.read_images(folder)


def put(key, value):
    return lambda body: body["layers"][0]["images"]["weight"].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("shape", [3, 2, 3, 3]), "truncated or of another array"),
        (put("shape", [10**5, 10**5]), "shape"),
        (put("shape", [-36]), "shape"),
        (put("shape", [True, 36]), "shape"),
        (put("shape", "36"), "a list belongs"),
        (put("dtype", "object"), "dtype"),
        (put("dtype", "int16"), "whole values|truncated"),
        (put("word_bits", 16), "truncated"),
        (put("word_bits", 10**9), "whole values"),
        (put("n_words", 35), "word counts"),
        (put("order", "Fortran"), "order"),
        (put("sha256", "0" * 64), "SHA-256"),
        (put("extra", 1), "has the keys"),
        (lambda body: body.update(schema=2), "schema 2"),
        (lambda body: body.update(encoding="mif"), "encoding"),
        (lambda body: body.update(layers={}), "layers: a list"),
        (lambda body: body["layers"][0].pop("parameters"), "KeyError"),
        (lambda body: body["layers"][0].update(name=1), "layer's name"),
        (lambda body: body["layers"][0]["images"].update(noise={}), "unknown images"),
    ],
)
def test_hostile_manifests_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(FpgaiError, match=message):
        fpga.read_images(folder)


def test_an_altered_number_of_the_manifest_is_noticed(folder):
    path = folder / MANIFEST
    text = path.read_text(encoding="utf-8")
    multiplier = json.loads(text)["layers"][0]["parameters"]["multiplier"]
    path.write_text(text.replace(f'"multiplier": {multiplier}', f'"multiplier": {multiplier + 1}', 1), encoding="utf-8")
    with pytest.raises(FpgaiError, match="altered"):
        fpga.read_images(folder)


def test_an_absent_image_or_manifest_is_named(folder):
    (folder / "001_second_bias.hex").unlink()
    with pytest.raises(FpgaiError, match=r"second.*bias.*001_second_bias\.hex.*cannot be read"):
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
    for path in sorted(folder.iterdir()):
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
