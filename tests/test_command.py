"""The command line on tiny networks and the embedded digits: each verb's file is what the next one takes."""

import hashlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

import hq_lib
from hq_lib import data, graph, integer, models, ptq
from hq_lib.__main__ import app, main
from hq_lib.crossbar import bench
from hq_lib.data import sources
from hq_lib.deploy import ENDINGS, fpga
from hq_lib.deploy.c import CompilerError, library
from hq_lib.graph.spec import of_kind
from hq_lib.ptq import selection
from hq_lib.results import paths
from hq_lib.studies import configuration, inputs, methods, steps
from hq_lib.studies.ptq.recipes import RECIPES
from hq_lib.training.recipes import METHODS

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=6, classes=10):
        super().__init__(
            nn.Conv2d(3, width, 3, stride=4, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, classes),
        )

class Gate(nn.Module):
    def forward(self, x):
        return x if x.mean() > 1e9 else 0.5 * x

class Gated(Net):
    def __init__(self):
        super().__init__()
        self[2] = nn.Sequential(nn.ReLU(), Gate())
"""
RUN = {
    "net": "mynet:Net", "data": "digits", "n_train": 200, "n_val": 50, "n_test": 50, "n_calib": 20,
    "protocol": {"epochs": 2, "lr": 0.1, "pad": 0, "flip": False, "batch_size": 20},
}  # fmt: skip
PTQ = {**RUN, "weights": "net.safetensors", "protocol": {}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network of one's own in it, and that network trained."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mynet.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HQ_OUT", str(folder / "out"))
        patch.setattr(sys, "path", [*sys.path])
        write(folder / "float.yaml", {**RUN, "method": "float", "output": "net.safetensors"})
        assert "net.safetensors" in hq("train", "--config", "float.yaml")
        write(folder / "ptq.yaml", PTQ)
        yield folder
        sys.modules.pop("mynet", None)


def write(path: Path, entries: dict) -> Path:
    path.write_text(yaml.safe_dump(entries))
    return path


def hq(*words: str, code: int = 0) -> str:
    """What the command prints; for a refusal its error."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output if done.exit_code in (0, 2) else str(done.exception)


def percents(text: str) -> list[str]:
    return re.findall(r"(\d+\.\d\d) % of", text)


def test_a_network_of_ones_own_from_ranges_to_c_onnx_numpy_and_crossbar(place):
    made = hq("quantize", "--config", "ptq.yaml", "--method", "mse", "--bits", "4/4", "--output", "q.safetensors")
    assert "hq test q.safetensors" in made.splitlines()[-1]
    own = ("--net", "mynet:Net", "--n-test", "50")
    fake, rounded, integers = percents(hq("test", "q.safetensors", "--integer", *own))
    assert percents(made) == [fake] == [rounded], "hq quantize rounds biases to what accumulators hold"
    for to in ("npz", "onnx", "c"):
        if to == "c":
            try:
                library()
            except CompilerError:
                continue
        assert f"hq test q{ENDINGS[to]}" in hq("export", "q.safetensors", "--to", to, "--net", "mynet:Net")
        assert percents(hq("test", f"q{ENDINGS[to]}", "--data", "digits", "--n-test", "50")) == [integers]
    exact = hq("crossbar", "q.npz", "--device", "ideal", "--n-test", "50")
    assert percents(exact)[0] == integers
    few = ("--layers", "3,6", "--n-test", "50", "--set", "crossbar.n_calib=10", "--folder", "kept")
    kept = hq("crossbar", "q.npz", "--device", "ideal", "--record", *few)
    _, *words = shlex.split(kept.splitlines()[-1].split("next: ")[1])
    assert "replay" in words
    assert percents(hq(*words)) == percents(kept), "the line as it stands: layers and images are those of the record"


def test_the_commands_printed_as_next_go_through_ones_own_network_and_pictures(place):
    """Each line typed as it stands: a network's class and a folder that were named once are in the lines after."""
    rng = np.random.default_rng(0)
    for split, k, i in ((s, k, i) for s in ("train", "val") for k in range(10) for i in range(2)):
        folder = place / "my photos" / split / f"class{k}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (place / "sizes.yaml").write_text(yaml.safe_dump({"size": 32}))
    own = ("--net", "mynet:Net", "--data", "imagenet", "--root", "my photos", "--config", "sizes.yaml")
    made = hq("train", *own, "--method", "float", *("--set", "protocol.epochs=1"), *("--set", "protocol.lr=0.1"))
    verbs = []
    while (following := made.splitlines()[-1].split("next: ")[1].split(";")[0]) != "hq export --help":
        _, *words = shlex.split(following)
        verbs.append(words[0])
        try:
            made = hq(*words)
        except CompilerError:
            break
    assert verbs == ["quantize", "test", "export", "test"]


def test_the_commands_printed_as_next_name_files_with_spaces_as_a_shell_takes_them(place):
    hq("train", "--config", "float.yaml", "--set", "protocol.epochs=1", "--output", "my nets/float net.safetensors")
    made = hq("test", "my nets/float net.safetensors", "--net", "mynet:Net", "--n-test", "20")
    for verb in ("quantize", "test", "export", "test", "crossbar", "crossbar"):
        _, *words = shlex.split(made.splitlines()[-1].split("next: ")[1].split(";")[0])
        assert words[0] == verb
        words += ["--output", "my nets/net 8.safetensors", "--method", "minmax"] if verb == "quantize" else []
        words = [*words[:3], "npz", *words[4:]] if verb == "export" else words
        made = hq(*words, *(() if verb == "export" else ("--set", "n_test=20", "--set", "n_calib=20")))


def test_weights_say_whose_they_are(place):
    """A file of another network than the default's is that network, in name, record and the next line."""
    small = models.build("toynet")
    record = {"model": "toynet", "options": {}, "dataset": "digits", "n_classes": 10, "in_channels": 3}
    models.save_checkpoint(place / "small.safetensors", small, record)
    made = hq("quantize", "--set", "weights=small.safetensors", "--method", "minmax", "--set", "n_calib=20", "--data",
              "digits", "--n-test", "20")  # fmt: skip
    assert "wrote toynet_minmax_w8a8.safetensors" in made
    assert models.read_checkpoint(place / "toynet_minmax_w8a8.safetensors")[1]["configuration"]["model"] == "toynet"
    refused = hq("quantize", "--set", "weights=small.safetensors", "--model", "vgg11", code=1)
    assert "'vgg11'" in refused
    assert "'toynet'" in refused
    chosen = hq("select", "--model", "toynet", "--data", "digits", "--n", "20", "--output", "few.json")
    assert "next: hq quantize --set manifest=few.json --model toynet" in chosen


def test_cuda_is_taken_where_there_is_one_and_other_devices_are_refused(monkeypatch):
    assert configuration.Configuration().device == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert configuration.Configuration().device == "cuda"
    assert configuration.Configuration(device="cuda:1").device == "cuda:1"
    with pytest.raises(ValueError, match=r"'cudda'.*cuda"):
        configuration.Configuration(device="cudda")


def test_corrections_beside_a_method(place):
    """Evened-out ranges and norms measured again change the integers, and the file is tested as it was written."""
    scale, made = (
        {},
        ("quantize", "--config", "ptq.yaml", "--method", "minmax", "--bits", "4/8", "--output", "c.safetensors"),
    )
    per_tensor = (
        "--set",
        "policy.weight={method: minmax, bits: 4, axis: null}",
        "--set",
        "policy.first_last_bits=null",
    )
    chosen = {"none": (), "equalize": ("--set", "corrections=[equalize]"),
              "norms": ("--set", "corrections=[norms]", "--set", "policy.bn=keep")}  # fmt: skip
    for name, words in chosen.items():
        printed = percents(hq(*made, *per_tensor, *words))
        assert percents(hq("test", "c.safetensors", "--net", "mynet:Net", "--n-test", "50")) == printed
        qnet = graph.load(place / "c.safetensors", net=inputs.own("mynet:Net")())
        scale[name] = torch.cat([q.grid().scale.flatten() for q in graph.act_quantizers(qnet).values()])
        assert graph.weight_layers(qnet)["0"].weight_quantizer.grid().scale.numel() == 1
    assert not torch.equal(scale["equalize"], scale["none"])
    assert "'norms'" in hq(*made, "--set", "corrections=[norm]", code=1)
    assert "bn='keep'" in hq(*made, "--set", "corrections=[norms]", code=1)


def test_a_module_that_cannot_be_traced_stays_in_float_where_it_is_named(place):
    words = (
        "quantize",
        "--config",
        "ptq.yaml",
        "--set",
        "net=mynet:Gated",
        "--method",
        "minmax",
        "--output",
        "g.safetensors",
    )
    assert "leaf_modules" in hq(*words, code=1)
    assert "in quotes" in hq(*words, "--set", "leaf_modules=[2.1]", code=1)
    made = hq(*words, "--set", "leaf_modules=['2.1']")
    assert percents(made) == percents(hq("test", "g.safetensors", "--net", "mynet:Gated", "--n-test", "50"))


def test_powers_of_two_and_types_of_layers_are_a_policy_of_the_command_line(place):
    words = ("quantize", "--config", "ptq.yaml", "--method", "minmax", "--bits", "4/8", "--output", "p.safetensors")
    hq(*words, "--set", "policy.weight={method: minmax, bits: 4, power_of_two: true}", "--set",
       "policy.overrides={linear: 6, first: {weight: 5}}")  # fmt: skip
    qnet = graph.load(place / "p.safetensors", net=inputs.own("mynet:Net")())
    layers = graph.weight_layers(qnet)
    assert {name: layer.weight_quantizer.bits for name, layer in layers.items()} == {"0": 5, "3": 4, "6": 6}
    steps = torch.cat([torch.log2(layer.weight_quantizer.grid().scale).flatten() for layer in layers.values()])
    assert torch.equal(steps, steps.round())
    refused = hq("quantize", "--config", "ptq.yaml", "--method", "mse", "--set",
                 "policy.weight={method: minmax, bits: 4, power_of_two: true}", code=1)  # fmt: skip
    assert "take minmax" in refused


def test_what_is_made_of_a_file_elsewhere_is_written_here(place):
    """The shipped checkpoints lie in the repository: nothing is to be written beside them."""
    hq("quantize", "--config", "ptq.yaml", "--method", "minmax", "--output", "w8.safetensors")
    there = place / "shipped" / "w8.safetensors"
    there.parent.mkdir()
    (place / "w8.safetensors").rename(there)
    assert "wrote w8.npz" in hq("export", there, "--to", "npz", "--net", "mynet:Net")
    assert "wrote w8_crossbar" in hq("crossbar", there, "--device", "ideal", "--n-test", "4", "--net", "mynet:Net")
    assert list(there.parent.iterdir()) == [there]


@pytest.mark.parametrize(("key", "meant"), [("iterations", "protocol"), ("epochs", "protocol"), ("bn", "policy")])
def test_a_key_of_an_inner_mapping_is_told_where_it_goes(place, key, meant):
    assert f"did you mean '{meant}.{key}'?" in hq("quantize", "--set", f"{key}=2", code=1)


def test_folders_for_boards_and_fpgas(place):
    hq("quantize", "--config", "ptq.yaml", "--method", "minmax", "--output", "w8.safetensors")
    for to in ("board", "fpga"):
        call = ("export", "w8.safetensors", "--to", to, "--net", "mynet:Net")
        assert "--set requantizer=fixed" in hq(*call), "float32 multipliers are said, and the way out"
        assert "float32" not in hq(*call, "--set", "requantizer=fixed")
    assert (place / "w8_board" / "main.c").exists()
    assert '"requantizer": "fixed"' in (place / "w8_fpga" / "manifest.json").read_text()
    assert "--to board" in hq("export", "w8.safetensors", "--to", "c", "--net", "mynet:Net")


def test_training_through_quantizers_goes_on_from_float_and_its_file_tests_alike(place):
    write(place / "qat.yaml", {**RUN, "weights": "net.safetensors", "bits": [4, 4], "output": "qat.safetensors"})
    made = hq("train", "--config", "qat.yaml", "--method", "lsq_plus", "--set", "protocol.epochs=1")
    said = hq("test", "qat.safetensors", "--net", "mynet:Net", "--n-test", "50", "--integer")
    tested = percents(said)
    assert percents(made) == tested[:1]
    assert "takes its image in float" not in said
    assert tested[1] == tested[2], "with the biases of accumulators the fake-quantized network simulates the integers"
    record = models.read_checkpoint(place / "qat.safetensors")[1]
    assert (record["method"], record["config"]["epochs"], record["form"]) == ("lsq_plus", 1, "trainable")
    assert record["config"]["precision"] in ("float32", "bfloat16"), "what was run, not what was asked for"
    assert record["start"] == models.read_checkpoint(place / "net.safetensors")[1]["sha256"]
    assert str(place) not in str(record)


def test_the_teacher_and_the_calibration_images_of_a_training_are_those_that_are_asked_for(place):
    """Another share of the loss is another loss, and the file says which."""
    words = ("train", "--config", "qat.yaml", "--method", "lsq", "--set", "protocol.epochs=1", "--set", "n_train=60")
    write(place / "qat.yaml", {**RUN, "weights": "net.safetensors", "bits": [4, 4]})
    made = [hq(*words, "--set", f"protocol.distill={share}", "--output", "kd.safetensors") for share in (0.0, 0.5, 1.0)]
    assert models.read_checkpoint(place / "kd.safetensors")[1]["config"]["distill"] == 1.0
    made.append(hq(*words, "--set", "n_calib=3", "--set", "protocol.distill=0.0", "--output", "kd.safetensors"))
    losses = [re.findall(r"loss (\S+),", text)[0] for text in made]
    assert len({*losses}) == 4, "and what the grids are fitted to is another start"


def test_the_hybrid_rule_trains_below_its_boundary_and_calibrates_from_it_up(place):
    hybrid = {"ranges": "aciq", "bn": "fold", "placement": "academic", "overrides": {"3": {"weight": 6}}}
    write(place / "h.yaml", {**RUN, "weights": "net.safetensors", "bits": [2, 4], "hybrid": hybrid, "method": "hybrid"})
    made = hq("train", "--config", "h.yaml", "--output", "h.safetensors")
    assert percents(made) == percents(hq("test", "h.safetensors", "--net", "mynet:Net", "--n-test", "50"))
    told = "takes its image in float, integers round it"
    assert told in hq("test", "h.safetensors", "--net", "mynet:Net", "--n-test", "50", "--integer")
    qnet = graph.load(place / "h.safetensors", net=inputs.own("mynet:Net")())
    assert {str(spec) for spec in of_kind(qnet.meta["specs"], "weight").values()} == {"dsq:2", "minmax:6"}


def test_a_run_takes_nothing_over_from_another_of_the_same_file_name(place, monkeypatch):
    """The second one began with other weights: its file would have held the first one's, and named its own."""
    hq("train", "--config", "float.yaml", "--set", "seed=1", "--output", "other.safetensors")
    (place / "elsewhere").mkdir()
    words = ("train", "--config", "qat.yaml", "--method", "lsq", "--set", "protocol.epochs=1")
    write(place / "qat.yaml", {**RUN, "bits": [4, 4]})
    made = [
        hq(*words, "--set", f"weights={start}.safetensors", "--output", f"{folder}same.safetensors")
        for start, folder in (("net", ""), ("other", "elsewhere/"), ("other", "elsewhere/"))
    ]
    assert ["resumed" in text for text in made] == [False, False, True]
    one, two = (models.read_checkpoint(place / f"{folder}same.safetensors") for folder in ("", "elsewhere/"))
    assert one[1]["start"] != two[1]["start"]
    assert not torch.equal(one[0]["0.weight"], two[0]["0.weight"])


def test_a_network_whose_forward_was_changed_is_trained_anew_and_another_file_name_is_none_of_its_concern(place):
    """Same parameters, same configuration: the weights of the old forward would be written as the new one's."""
    own = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n        super().__init__("
    own += "nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))\n"
    words = ("train", "--config", "float.yaml", "--set", "net=forward:Net", "--set", "protocol.epochs=1")
    resumed, other = [], "    def forward(self, x):\n        return super().forward(2 * x)"
    for forward, output in (("", "a"), ("", "b"), (other, "b")):
        (place / "forward.py").write_text(own + forward)
        importlib.invalidate_caches()
        sys.modules.pop("forward", None)
        resumed.append("resumed" in hq(*words, "--output", f"{output}.safetensors"))
    assert resumed == [False, True, False]


def test_where_nothing_can_be_written_is_said_before_anything_is_computed(place):
    for verb, config in (("train", "float.yaml"), ("quantize", "ptq.yaml")):
        words = (verb, "--config", config, "--output", "mynet.py/deep/net.safetensors", "--set", "net=absent:Net")
        assert re.search(r"nothing can be written to \S*mynet.py", hq(*words, code=1))


def test_training_a_float_network_on_keeps_how_it_sees_its_images(place):
    """Mean and standard deviation of its file, not those of the data set, and the file says what it began with."""
    seen = {"mean": [0.9] * 3, "std": [0.1] * 3}
    hq("train", "--config", "float.yaml", *(f"--set={k}={v}" for k, v in seen.items()), "--output", "seen.safetensors")
    words = ("--set", "weights=seen.safetensors", "--set", "protocol.lr=1e-7", "--set", "protocol.epochs=1")
    made = hq("train", "--config", "float.yaml", *words, "--output", "on.safetensors")
    first, on = (models.read_checkpoint(place / f"{name}.safetensors")[1] for name in ("seen", "on"))
    assert on["images"]["mean"] == first["images"]["mean"] == seen["mean"]
    assert on["start"] == first["sha256"]
    assert float(percents(made)[0]) == pytest.approx(first["acc_pct"]["test"], abs=4.0), "at 1e-7 nothing moves far"


def test_overrides_are_joined_with_the_lists_of_bits():
    net, words = models.build("resnet20"), {"model": "resnet20", "method": "minmax", "lists": "cfg-2*"}
    plain, joined = (
        methods.ptq(configuration.read(changes={**words, "policy": {"overrides": overrides}}), net)[1].overrides
        for overrides in ({}, {"linear": {"weight": 4}})
    )
    assert len(plain) == 32
    assert joined.keys() == plain.keys()
    assert joined["linear"] == {**plain["linear"], "weight": 4}
    assert {**joined, "linear": plain["linear"]} == dict(plain)


def test_pictures_are_labelled_as_the_network_was_trained_whatever_classes_a_folder_has(place):
    """Three classes in training, two of them in a folder of tests: positions among those two would be other classes."""
    for i, name in enumerate(("bird", "cat", "dog")):
        for root in ("three/train", "three/val", "two/val") if i else ("three/train", "three/val"):
            (place / root / name).mkdir(parents=True)
            for j in range(4):
                pixels = np.full((32, 32, 3), 20 * j, dtype=np.uint8)
                pixels[..., i] = 255
                Image.fromarray(pixels).save(place / root / name / f"{j}.png")
    epochs = ("--set", "protocol.epochs=12", "--set", "protocol.lr=0.05", "--set", "protocol.batch_size=4")
    own = ("--net", "mynet:Net", "--set", "size=32")
    hq("train", *own, "--root", "three", "--method", "float", "--data", "imagenet", "--set", "options.classes=3",
       *epochs, "--output", "t.safetensors")  # fmt: skip
    for root in ("three", "two"):
        assert percents(hq("test", "t.safetensors", *own, "--root", root)) == ["100.00"], root
    hq("quantize", *own, "--root", "three", "--method", "minmax", "--set", "weights=t.safetensors", "--output",
       "t8.safetensors")  # fmt: skip
    hq("export", "t8.safetensors", "--to", "npz", "--net", "mynet:Net")
    for root in ("three", "two"):
        assert percents(hq("test", "t8.npz", "--root", root)) == ["100.00"], "the integers keep the names too"
    (place / "two" / "val" / "eel").mkdir()
    refused = hq("test", "t.safetensors", *own, "--root", "two", code=1)
    assert "'eel'" in refused
    assert "bird, cat, dog" in refused


def test_a_network_by_name_gets_the_classes_of_its_pictures(place):
    for name in "ab":
        (place / "few" / name).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (32, 32), (100 * j, 0, 0)).save(place / "few" / name / f"{j}.png")
    own = ("--root", "few", "--set", "size=32")
    hq(
        "train",
        "--model",
        "toynet",
        "--method",
        "float",
        *own,
        "--set",
        "protocol.epochs=1",
        "--output",
        "f.safetensors",
    )
    assert models.load_checkpoint(place / "f.safetensors")[1]["n_classes"] == 2
    assert percents(hq("test", "f.safetensors", "--root", "few"))


def test_options_of_ones_own_network_and_sizes_of_ours_are_in_the_file(place):
    hq("train", "--config", "float.yaml", "--set", "options.width=4", "--output", "narrow.safetensors")
    hq("quantize", "--config", "ptq.yaml", "--method", "minmax", "--set", "weights=narrow.safetensors", "--output",
       "nq.safetensors")  # fmt: skip
    assert percents(hq("test", "nq.safetensors", "--net", "mynet:Net", "--n-test", "50"))
    apart = ("quantize", "--config", "ptq.yaml", "--method", "minmax", "--set", "weights=narrow.safetensors")
    for verb in ("train", "quantize"):
        misspelt = (verb, "--config", "float.yaml" if verb == "train" else "ptq.yaml", "--set", "options={widht: 6}")
        assert re.search("options: mynet:Net cannot be built with .*widht", hq(*misspelt, code=1))
    assert "not a checkpoint of this Net" in hq(*apart, "--set", "options.width=5", code=1)
    torch.save(models.build("lenet", n_classes=10).state_dict(), place / "l3.pth")
    hq("quantize", "--model", "lenet", "--method", "minmax", "--set", "weights=l3.pth", "--set", "options.n_classes=10",
       "--data", "fashion_mnist", "--set", "n_calib=20", "--n-test", "20", "--output", "l3.safetensors")  # fmt: skip
    assert graph.load(place / "l3.safetensors").record["n_classes"] == 10


def test_calibration_images_are_of_the_networks_own_data(place):
    small = models.build("toynet")
    record = {"model": "toynet", "options": {}, "dataset": "digits", "n_classes": 10, "in_channels": 3}
    models.save_checkpoint(place / "digits.safetensors", small, record)
    chosen = hq("select", "--set", "weights=digits.safetensors", "--n", "20", "--output", "own.json")
    assert selection.read(place / "own.json").dataset == "digits"
    assert "--set weights=digits.safetensors" in chosen
    hq(*shlex.split(chosen.splitlines()[-1].split("next: hq ")[1]), "--method", "minmax", "--n-test", "20")
    run = configuration.read(changes={"weights": "digits.safetensors", "manifest": "own.json"})
    with pytest.raises(ValueError, match=r"of digits, the network of cifar10: .*hq select"):
        inputs.calibration(run, {**record, "dataset": "cifar10"})


def test_another_seed_is_another_chip_and_a_layer_may_be_named_alone(place):
    hq("quantize", "--config", "ptq.yaml", "--method", "minmax", "--output", "q8.safetensors")
    words = ("crossbar", "q8.safetensors", "--net", "mynet:Net", "--n-test", "20", "--set", "crossbar.layers=6")
    errors = [
        re.findall(r"off by ([\d.]+) %", hq(*words, "--set", f"seed={seed}", "--folder", f"chip{seed}"))
        for seed in (0, 1)
    ]
    assert errors[0] != errors[1]
    assert "give one of them" in hq(*words, "--set", "crossbar.n_test=5", code=1)
    assert "layer or pattern ''" in hq(*words, "--layers", "", code=1), "an empty list is none, not all"
    assert "default 20" in " ".join(hq("crossbar", "--help").split())
    assert bench.Plan("sim", place).n_test == 20


def test_a_bench_that_clips_or_is_written_again_is_told_beside_the_accuracy(place, monkeypatch):
    hq("quantize", "--config", "ptq.yaml", "--method", "minmax", "--output", "b8.safetensors")
    found = {"acc_pct": 50.0, "exact_acc_pct": 60.0, "logit_error": 0.1, "tiles_needed": 2, "n_tiles": 1, "n_writes": 4,
             "write_s": 0.1, "n_saturated": 1234, "written_again": ["6"]}  # fmt: skip
    outcome = bench.Outcome(np.zeros((1, 10)), found, pd.DataFrame({"layer": ["6"]}))
    monkeypatch.setattr(steps.bench, "run", lambda *_: outcome)
    words = ("crossbar", "b8.safetensors", "--net", "mynet:Net", "--n-test", "20", "--engine", "rehearsal")
    said = hq(*words, "--folder", "told")
    assert "1,234 counts at the end of the bench's range" in said
    assert re.search(r"written again after their gains and offsets were fitted.*: 6$", said, re.MULTILINE)
    found["written_again"] = [f"c{i}" for i in range(432)]
    assert re.search(r"fitted.*: c0, c1, c2 and 429 more$", hq(*words, "--folder", "told"), re.MULTILINE)


@pytest.mark.parametrize("method", ["hybrid", "lsq"])
def test_a_network_whose_norms_are_folded_beforehand_is_trained_at_a_lower_rate_unless_one_is_given(method):
    """At the rate of a network with norms ResNet-20 ends at chance."""
    net = models.build("resnet20")
    kept, folded, own = (
        methods.qat(
            configuration.read(changes={"model": "resnet20", "method": method, "bits": [2, 4], **changes}), net
        ).config.lr
        for changes in ({}, {"policy": {"bn": "fold"}}, {"policy": {"bn": "fold"}, "protocol": {"lr": 0.5}})
    )
    assert (kept, folded, own) == (0.04, pytest.approx(0.001), 0.5)


def test_validation_images_that_the_float_network_has_seen_are_said_to_flatter(capsys):
    run = configuration.read(changes={"model": "lenet", "n_val": 10})
    for seen in ("train", "trainval"):
        assert len(inputs.validation(run, {"dataset": "digits", "trained_on": seen})) == 10
        assert ("flatter" in capsys.readouterr().out) == (seen == "trainval")


def test_reconstruction_takes_its_protocol_and_a_manifest(place):
    chosen = hq(
        "select", "--data", "digits", "--n", "20", "--strategy", "lowest", "--metric", "tv", "--output", "m.json"
    )
    assert "manifest=m.json" in chosen
    assert len(selection.read(place / "m.json")) == 20
    words = ("quantize", "--config", "ptq.yaml", "--method", "qdrop", "--bits", "3/3", "--output", "r.safetensors")
    hq(*words, "--set", "manifest=m.json", "--set", "protocol.iterations=3")
    record = models.read_checkpoint(place / "r.safetensors")[1]
    assert record["manifest"]["file"] == "m.json"
    assert record["n_calib"] == 20


def test_a_reconstruction_that_was_stopped_goes_on_and_the_file_keeps_its_log(place, monkeypatch):
    words = ("quantize", "--config", "ptq.yaml", "--method", "brecq", "--bits", "3/3", "--set", "protocol.iterations=3")
    hq(*words, "--output", "whole.safetensors")
    with monkeypatch.context() as stopped:
        stopped.setattr(steps, "evaluate", lambda *_: 1 / 0)
        assert "division" in hq(*words, "--output", "again.safetensors", code=1)
    other = hq(*words, "--output", "again.safetensors", "--set", "protocol.iterations=4")
    assert "(resumed)" not in other, "another run is not taken over, and has a folder of its own"
    hq(*words, "--output", "again.safetensors")
    (whole, one), (again, other) = (
        models.read_checkpoint(place / f"{name}.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert [line.split(":")[0] for line in one["log"]] == [line.split(":")[0] for line in other["log"]]
    assert all("(resumed)" in line for line in other["log"])
    assert len(one["log"]) > 3
    assert not list((place / "out").rglob("unit_*.safetensors"))


def test_choosing_images_for_a_configuration_leaves_the_network_that_it_names(place):
    """Its output is the network of a later step: the manifest lies beside it."""
    write(place / "named.yaml", {**PTQ, "output": "named.safetensors"})
    (place / "named.safetensors").write_bytes(b"hours of work")
    assert "wrote named.json" in hq("select", "--config", "named.yaml", "--n", "20")
    assert (place / "named.safetensors").read_bytes() == b"hours of work"
    assert len(selection.read(place / "named.json")) == 20
    assert "has to end in .json" in hq("select", "--config", "named.yaml", "--output", "named.txt", code=1)


def test_pictures_in_a_folder_are_chosen_by_name_and_taken_by_hash(tmp_path):
    for i in range(8):
        file = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 30 * i, np.uint8)).save(file)
    run = configuration.read(changes={"root": str(tmp_path / "pictures"), "n_calib": 3, "model": "efficientnet_lite0"})
    selection.write(inputs.selected(run), tmp_path / "m.json")
    again = configuration.read(changes={"root": run.root, "manifest": str(tmp_path / "m.json"), "mean": [0.5, 0.4, 0.3],
                                        "std": [1.0, 1.0, 1.0]})  # fmt: skip
    chosen = inputs.calibration(again, {"images": {"mean": [0.0] * 3, "std": [1.0] * 3}})
    greys = [30 * int(Path(name).stem) for name in selection.read(tmp_path / "m.json").files]
    assert sorted(chosen.images[:, 0, 0, 0].tolist()) == sorted(greys)
    assert chosen.spec.mean == (0.5, 0.4, 0.3)
    first = selection.read(tmp_path / "m.json").files[0]
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(tmp_path / "pictures" / first)
    with pytest.raises(selection.ManifestError, match="differs"):
        inputs.calibration(again, {})


def test_classes_of_unequal_size_are_chosen_from_as_quantize_draws_of_them(tmp_path, capsys):
    for name in ("a/0.png", "b/1.png", "b/2.png", "b/3.png", "b/4.png"):
        (file := tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file)
    made = {n: inputs.selected(configuration.read(changes={"root": str(tmp_path), "n_calib": n})) for n in (2, 4)}
    assert (made[2].balanced, made[4].balanced, len(made[4])) == (True, False, 4)
    assert capsys.readouterr().out == "not every class has 4 / 2 images: chosen from all alike\n"


def test_weights_come_from_torchvision_or_a_url_with_its_hash(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("HQ_DATA", str(tmp_path))
    torch.manual_seed(1)
    state = models.build("shufflenet_v2_x0_5").state_dict()
    entry = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, **how: state if how["check_hash"] else None)
    run = configuration.read(changes={"model": "shufflenet_v2_x0_5", "weights": "torchvision", "root": "pictures"})
    net, record = inputs.network(run)
    assert torch.equal(net.fc.weight, state["fc.weight"])
    spec = inputs.normalization(run, record)
    assert (spec.in_shape, spec.short_side, spec.mean) == ((3, 224, 224), 256, (0.485, 0.456, 0.406))
    file = tmp_path / "theirs.pth"
    torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    asked = []
    monkeypatch.setattr(sources, "download", lambda url, known, folder: asked.append((url, known)) or file)
    url = f"https://somewhere/x.pth#sha256={digest}"
    net, _ = inputs.network(configuration.read(changes={"model": "shufflenet_v2_x0_5", "weights": url}))
    assert torch.equal(net.fc.weight, state["fc.weight"])
    assert asked == [("https://somewhere/x.pth", f"sha256:{digest}")]


def test_seed_002s_lenet_becomes_files_for_its_fpga(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"model": "lenet", "options": {"relu1": True}, "dataset": "mnist", "n_classes": 10, "in_channels": 1}
    record["images"] = {"mean": [0.0], "std": [1.0]}
    net = models.build("lenet", relu1=True)
    models.save_checkpoint(tmp_path / "lenet.safetensors", net, record)
    assert "int32" not in hq("export", "lenet.safetensors", "--to", "fpga")
    assert {f"lenet_{kind}" for kind in ("quant.txt", "weight.bin", "bias.bin")} <= {
        file.name for file in (tmp_path / "lenet_fpga").iterdir()
    }
    assert "quantize it first" in hq("export", "lenet.safetensors", "--to", "c", code=1)
    with torch.no_grad():  # every product near its largest: 255 x 255 x 400 inputs, times a multiplier of eight bits
        net.conv3.weight.fill_(1.0)[:, 0, 0, 0] = 0.0
    models.save_checkpoint(tmp_path / "wide.safetensors", net, record)
    assert "conv3: accumulator times multiplier" in hq("export", "wide.safetensors", "--to", "fpga")


def test_a_float_chain_with_relu_becomes_seed_002s_files_in_ranges_of_its_images(place):
    plain = ("--set", "mean=[0.0,0.0,0.0]", "--set", "std=[1.0,1.0,1.0]")  # as its hardware reads pixels
    hq("export", "net.safetensors", "--to", "fpga", "--net", "mynet:Net", *plain)
    made, net = fpga.read_images(place / "net_fpga"), inputs.own("mynet:Net")()
    net.load_state_dict(models.read_checkpoint(place / "net.safetensors")[0])
    x = data.load("digits", "test", n=200).images.float() / 255
    with torch.no_grad():
        want = net.eval()(x).argmax(1).numpy()
    assert len(np.unique(want)) > 3
    assert (integer.run(made, x.contiguous()).argmax(1) == want).mean() > 0.95


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("quantize", "--set", "n_calb=3"), "n_calib"),
        (("quantize", "--method", "qdorp"), "qdrop"),
        (("quantize", "--method", "pact"), "hq train"),
        (("train", "--method", "pakt"), "pact"),
        (("train", "--method", "qdrop"), "hq quantize"),
        (("train", "--method", "pact", "--set", "protocol.epoch=3"), "epochs"),
        (("quantize", "--set", "protocol.iteration=3"), "iterations"),
        (("quantize", "--bits", "4"), "bits"),
        (("quantize", "--set", "policy.placment=deploy"), "placement"),
        (("quantize", "--set", "seed=many"), "seed"),
        (("quantize", "--set", "lists=[8, 4]"), "lists is [8, 4]: a str | dict is needed"),
        (("quantize", "--set", "lists={layer_abit: [8, 4], layer_wbit: [8, four]}"), "lists: layer_wbit"),
        (("quantize", "--model", "resnet21"), "resnet20"),
        (("quantize", "--model", "resnet32"), "hq train"),
        (("quantize", "--model", "regnetx_600m", "--set", "weights=torchvision"), "torchvision has none"),
        (("quantize", "--model", "resnet20", "--set", "weights=torchvision"), "torchvision has none"),
        (("quantize", "--model", "resnet18", "--set", "weights=torchvision:V9"), "IMAGENET1K_V1"),
        (("quantize", "--model", "resnet18", "--set", "weights=https://here/r.pth"), "#sha256="),
        (("quantize", "--net", "Net"), "module:Class"),
        (("quantize", "--net", "nowhere:Net"), "nowhere"),
        (("quantize", "--config", "absent.yaml"), "absent.yaml"),
        (("test", "absent.safetensors"), "absent.safetensors"),
        (("test", "net.pth"), ".safetensors"),
        (("select", "--data", "cifar"), "cifar10"),
        (("select", "--data", "digits", "--metric", "tv"), "strategy random"),
        (("select", "--data", "digits", "--strategy", "lowst"), "lowest"),
        (("quantize", "--set", "requantizer=fix"), "fixed"),
        (("quantize", "--set", "crossbar.engin=sim"), "engine"),
        (("quantize", "--set", "hybrid.ranges=acicq"), "aciq"),
        (("quantize", "--data", "digits", "--root", "pictures"), "root"),
        (("quantize", "--set", "options.option=A"), "leave option out"),
        (("quantize", "--output", "net.pth"), ".safetensors"),
        (("quantize", "--set", "weights=w.safetensors", "--model", "lenet", "--output", "./w.safetensors"), "weights"),
        (("train", "--method", "hybrid", "--set", "lists=cfg-1"), "leave lists out"),
        (("train", "--method", "lsq", "--set", "corrections=[norms]"), "corrections"),
        (("train", "--method", "hybrid", "--set", "hybrid={boundry: 4}"), "boundry"),
        (("train", "--method", "hybrid", "--set", "hybrid={boundary: two}"), "boundary is 'two'"),
        (("train", "--method", "hybrid", "--set", "protocol.distill=0.5"), "protocol.distill"),
        (("train", "--method", "float", "--set", "protocol.distill=0.5"), "protocol.distill"),
        (("train", "--method", "lsq", "--set", "protocol.pad=-3"), "pad"),
        *[
            (("train", "--method", "float", "--set", said), f"{re.split('[.=]', said)[0]}: hq train takes none")
            for said in ("bits=[4,4]", "lists=cfg-1", "policy.bnn=3", "corrections=[norms]", "leaf_modules=[x]")
        ],
        *[
            (("train", "--method", method, "--set", said), f"{re.split('[.=]', said)[0]}: hq train takes none")
            for said in ("manifest=x.json", "hybrid.boundry=4", "strategy=lowest", "metric=tv")
            for method in ("float", "lsq")
        ],
        (("quantize", "--set", "hybrid={boundary: 4}"), "hybrid: hq quantize takes none"),
        (("quantize", "--set", "strategy=lowest"), "hq select"),
        (("quantize", "--set", "metric=tv"), "hq select"),
        (("quantize", "--net", "mynet:Net", "--model", "lenet"), "give one of them"),
        (("crossbar", "x.npz", "--engine", "replay", "--device", "rram"), "cells of its own"),
        (("crossbar", "x.npz", "--engine", "rehearsal", "--device", "rram"), "cells of its own"),
        (("study", "bn_fold", "--profile", "smoke", "--device", "tpu"), "cuda"),
        (("train", "--method", "lsq", "--set", "lists=cfg-1", "--set", "lists.layer_abit=[8]"), "lists is 'cfg-1'"),
        (("train", "--method", "float", "--set", "weights=q.safetensors", "--model", "lenet"), "q.safetensors"),
    ],
)
def test_what_is_wrong_is_named_with_the_mend(words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in hq(*words, code=1)


def test_a_refusal_is_one_line_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hq", "quantize", "--set", "n_calb=3"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_words_of_the_line_that_are_wrong_give_exit_code_2():
    hq("quantise", code=2)
    assert "key=value" in hq("quantize", "--set", "n_calib", code=2)
    hq("export", "net.safetensors", code=2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--list", "--unit", "nosuch"), "--list and --unit"),
        (("--gather", "--list"), "--list and --gather"),
        (("--gather", "--unit", "x"), "--gather and --unit"),
        (("--gather", "--set", "modls=[lenet]"), "leave --config and --set out"),
    ],
)
def test_options_of_a_study_that_would_have_no_effect_are_refused(words, named):
    assert named in " ".join(hq("study", "bn_fold", "--profile", "smoke", *words, code=2).replace("│", " ").split())


def test_a_study_takes_its_plan_from_a_file_and_what_is_set_goes_before(place):
    write(place / "plan.yaml", {"methods": ["pact", "lsq"], "bits": [[2, 2]]})
    lines = hq("study", "qat", "--profile", "smoke", "--config", "plan.yaml", "--set", "methods=[dsq]", "--list")
    assert re.findall(r"resnet20_(\w+)_w2a2", lines) == ["dsq"]
    (place / "list.yaml").write_text("[1]")
    assert "mapping" in hq("study", "qat", "--config", "list.yaml", "--list", code=1)


def test_every_verb_shows_an_example_that_the_command_line_takes():
    for verb, known in typer.main.get_command(app).commands.items():
        shown = " ".join(hq(verb, "--help").split())
        (example,) = re.findall(rf"Example: (hq {verb} .*?) (?=Arguments:|Options:)", shown)
        words = shlex.split(example)
        known.make_context(verb, words[2:])
        assert all(yaml.safe_load(word.partition("=")[2]) for word in words if "=" in word)


CONFIGS = sorted((paths.ROOT / "notebooks" / "configs").glob("*.yaml"))


def test_each_network_of_seed_003_has_a_configuration_whose_bits_can_be_changed():
    for name, weight in {"resnet18": 0.01, "resnet50": 0.01, "resnet101": 0.01, "mobilenetv2_imagenet": 0.1,
                         "regnetx_600m": 0.01, "mnasnet2_0": 0.2}.items():  # fmt: skip
        run = configuration.read(paths.ROOT / "notebooks" / "configs" / f"seed003_{name}.yaml", {"bits": [2, 4]})
        assert (run.model, run.name) == (name, f"{name}_qdrop_w2a4_s1005")
        assert ptq.ReconstructionConfig(**run.protocol).rounding_weight == weight


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_one(path):
    run = configuration.read(path)
    assert run.method in {*METHODS, *RECIPES, configuration.FLOAT, configuration.HYBRID}
    net = inputs.built(run)[0]
    if run.method in RECIPES:
        policy = methods.ptq(run, net)[1]
    elif run.method == configuration.FLOAT:
        methods.float_training(run)
        return
    else:
        policy = methods.qat(run, net).policy
    if run.model in models.IMAGENET:
        return
    spec = data.SPECS["mnist" if run.model == "lenet" else "cifar10"]
    graph.quantize(net.eval(), policy, torch.randn(1, *spec.in_shape))


def test_the_faces_names_are_there_and_others_are_refused_by_name():
    for name in dir(hq_lib):
        assert getattr(hq_lib, name) is not None or name.startswith("__")
    assert hq_lib.quantize is graph.quantize
    with pytest.raises(AttributeError, match=r"quantise.*quantize"):
        hq_lib.quantise  # noqa: B018


def test_importing_the_library_imports_no_torch():
    code = "import sys, hq_lib as hq; assert 'torch' not in sys.modules; print(hq.BitPolicy.__name__, hq.data.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["BitPolicy", "hq_lib.data"]
