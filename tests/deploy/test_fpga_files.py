"""FPGAI's text, bin and .tuple files: round trips, and every kind of bad file refused."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from fpgai_nets import SMALL, assert_same, random_net, write_tuple
from torch import nn

from hq_lib.deploy import fpga
from hq_lib.deploy.fpga import FpgaiError, FpgaiLayer, Stage
from hq_lib.deploy.fpga.formats import parse_quant, parse_weight_text, read_tuple

# formats


@pytest.mark.parametrize("form", ["bin", "txt"])
def test_files_round_trip(tmp_path, form):
    net = random_net(3)
    paths = fpga.write_net(net, tmp_path, "net", form=form)
    bias = {"net_bias.bin"} if form == "bin" else set()
    assert {path.name for path in paths} == {"net_quant.txt", f"net_weight.{form}"} | bias
    assert_same(fpga.read_net(tmp_path, "net", fpga.LENET, form=form), net)


def test_text_form_is_the_seeds(tmp_path):
    stage = Stage("a", (3, 4))
    layer = FpgaiLayer(stage, np.arange(12, dtype=np.uint8).reshape(3, 4), np.array([-1, 2, 3], np.int32), 200, 9, 7)
    text = "#\n0,1,2,3,4,5,6,7,8,9\n10,11\n$\n-1,2,3\n"
    fpga.write_net([layer], tmp_path, "net", form="txt")
    assert (tmp_path / "net_weight.txt").read_text() == text
    assert (tmp_path / "net_quant.txt").read_text() == "200,9,7\n"
    trailing = text.replace("9\n", "9,\n").replace("\n", "\r\n")  # a comma at the end of a line, Windows line ends
    weights, biases = parse_weight_text(trailing, [stage])
    assert np.array_equal(weights[0], layer.weight)
    assert biases[0].tolist() == [-1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n", "1 lines for 2 layers"),
        ("1,2,3\n4,5\n", "line 2"),
        ("1,2,3\n4,5,x\n", "'x' is no decimal"),
        ("1,2,3\n256,5,6\n", "where 256 is 0"),
        ("0,2,3\n4,5,6\n", "multiplier 0"),
        ("1,32,3\n4,5,6\n", "shift 32"),
        ("1,2,3\n4,5,-1\n", "zero point -1"),
        ("1,2,3\n4,5,99999999999999\n", "no decimal"),
    ],
)
def test_bad_quant_lines_are_named(text, message):
    with pytest.raises(FpgaiError, match=message):
        parse_quant(text, n_layers=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 '#' blocks"),
        ("#\n1,2\n$\n3\n#\n", "2 '#' blocks"),
        ("#\n1,2\n", r"0 '\$' lines"),
        ("#\n1\n$\n3\n", "1 numbers for shape"),
        ("#\n1,2,3\n$\n3\n", "3 numbers"),
        ("#\n1,256\n$\n3\n", "do not fit uint8"),
        ("#\n1,2\n$\n3000000000\n", "do not fit int32"),
        ("#\n1,,2\n$\n3\n", "no decimal"),
        ("junk#\n1,2\n$\n3\n", "blocks"),
    ],
)
def test_bad_weight_texts_are_named(text, message):
    with pytest.raises(FpgaiError, match=message):
        parse_weight_text(text, [Stage("a", (1, 2))])


@pytest.mark.parametrize("change", [-1, 1, -400])
@pytest.mark.parametrize("file", ["net_weight.bin", "net_bias.bin"])
def test_binary_files_of_another_size_are_refused(tmp_path, file, change):
    fpga.write_net(random_net(), tmp_path, "net")
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:change] if change < 0 else content + b"\0")
    with pytest.raises(FpgaiError, match=file):
        fpga.read_net(tmp_path, "net", fpga.LENET)


def test_absent_files_folders_in_names_and_binary_text_are_refused(tmp_path):
    with pytest.raises(FpgaiError, match=r"net_quant\.txt.*cannot be read"):
        fpga.read_net(tmp_path, "net", fpga.LENET)
    for name in ("../net", "a/b", "", ".net"):
        with pytest.raises(FpgaiError, match="plain file name"):
            fpga.read_net(tmp_path, name, fpga.LENET)
    (tmp_path / "net_quant.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FpgaiError, match="not a text file"):
        fpga.read_net(tmp_path, "net", fpga.LENET)


# .tuple


def test_tuples_are_read(tmp_path):
    net = random_net(4)
    assert_same(read_tuple(write_tuple(net, tmp_path / "net_quant.tuple"), fpga.LENET), net)


def torch_tuple(tmp_path, state, quant):
    torch.save((state, quant), tmp_path / "torch.tuple")
    return tmp_path / "torch.tuple"


def test_what_torch_saves_is_read(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5))
    state = net.state_dict()
    state["0.weight"] = (state["0.weight"] * 100 + 128).int()
    state["1.weight"] = state["1.weight"].mul(100).add(128).to(torch.uint8)
    stages = (Stage("a", (3, 2, 3, 3)), Stage("b", (5, 4)))
    layers = read_tuple(torch_tuple(tmp_path, state, [200, 9, 128, 130, 8, 128]), stages)
    assert [(x.multiplier, x.shift, x.zero_point) for x in layers] == [(200, 9, 128), (130, 8, 128)]
    for i, layer in enumerate(layers):
        assert np.array_equal(layer.weight, state[f"{i}.weight"].numpy())
        real = layer.bias * layer.scale / 255
        np.testing.assert_allclose(real, state[f"{i}.bias"].numpy(), atol=0.5 * layer.scale / 255 * (1 + 1e-6))


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("echo harm > harm.txt",)


def raw_tuple(tmp_path, code, **members):
    path = tmp_path / "raw.tuple"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": code, "version": b"3\n", **members}.items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (pickle.dumps(Hostile(), 2), "refused, nothing was run"),
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.", "refused, nothing was run"),
        (pickle.dumps(Hostile(), 4), "refused, nothing was run"),
        (b"\x80\x02(i__main__\nx\n.", "refused, nothing was run"),
        (b"\x80\x02.", "not a readable|refused"),
        (b"", "not a readable"),
        (pickle.dumps(({}, [1, 2]), 2), "triples"),
        (pickle.dumps(({"a": 1}, []), 2), "more than tensors"),
        (pickle.dumps({}, 2), "no .state_dict"),
    ],
)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, code, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FpgaiError, match=message):
        read_tuple(raw_tuple(tmp_path, code), ())
    assert not (tmp_path / "harm.txt").exists()


def test_tuples_of_another_network_are_refused(tmp_path):
    file = write_tuple(random_net(), tmp_path / "net.tuple")
    with pytest.raises(FpgaiError, match="for 4 stages"):
        read_tuple(file, fpga.LENET[:4])
    swapped = (*fpga.LENET[:4], Stage("fc2", (11, 84)))
    with pytest.raises(FpgaiError, match="fc2"):
        read_tuple(file, swapped)
    state, quant = torch.load(file)
    wide = torch_tuple(tmp_path, {**state, "fc1.weight": state["fc1.weight"] + 200}, quant)
    with pytest.raises(FpgaiError, match=r"fc1\.weight.*0\.\.255"):
        read_tuple(wide, fpga.LENET)


def mutations(content, n, seed):
    """``n`` damaged copies: bytes changed, cut, repeated or removed."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        data = bytearray(content)
        kind, at = rng.integers(4), int(rng.integers(len(data)))
        if kind == 0:
            for i in rng.integers(0, len(data), int(rng.integers(1, 5))):
                data[i] = rng.integers(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        else:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        yield bytes(data)


def test_damaged_tuples_are_errors_or_harmless(tmp_path):
    small = random_net(5, SMALL)
    path = write_tuple(small, tmp_path / "a.tuple")
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    code, refused = members.pop("data.pkl"), 0
    for content in mutations(whole, 60, 6):
        path.write_bytes(content)
        refused += is_refused(lambda: read_tuple(path, SMALL))
    for damaged in mutations(code, 200, 7):
        raw = raw_tuple(tmp_path, damaged, **members)
        refused += is_refused(lambda raw=raw: read_tuple(raw, SMALL))
    assert refused > 130


def is_refused(read):
    try:
        read()
    except FpgaiError:
        return True
    return False


def test_damaged_text_and_bin_files_are_errors_or_harmless(tmp_path):
    net, refused = random_net(8, SMALL), 0
    for form in ("bin", "txt"):
        for path in fpga.write_net(net, tmp_path, "net", form=form):
            whole = path.read_bytes()
            for content in mutations(whole, 40, 9):
                path.write_bytes(content)
                refused += is_refused(lambda form=form: fpga.read_net(tmp_path, "net", SMALL, form=form))
            path.write_bytes(whole)
    assert refused > 60
