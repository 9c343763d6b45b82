import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hq_lib import models
from hq_lib.models.checkpoints import CheckpointError, load_state
from hq_lib.results import paths
from hq_lib.training import evaluate

RECORD = {"model": "lenet", "options": {"relu1": True}, "dataset": "digits", "n_classes": 10, "in_channels": 1}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = models.build("lenet", relu1=True)
    models.save_checkpoint(tmp_path / "lenet.safetensors", net, RECORD)
    return net.eval(), tmp_path / "lenet.safetensors"


def test_round_trip(saved):
    net, path = saved
    again, record = models.load_checkpoint(path)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(net(x), again(x))
    assert record.items() >= RECORD.items()
    assert not again.training


def test_half_precision_storage_is_what_was_evaluated(tmp_path):
    torch.manual_seed(0)
    net = models.build("toynet").eval()
    path, record = tmp_path / "x.safetensors", {**RECORD, "model": "toynet", "options": {}, "in_channels": 3}
    rounded = models.rounded_to(net, torch.float16)
    models.save_checkpoint(path, rounded, record)
    again, _ = models.load_checkpoint(path)
    x = torch.randn(2, 3, 32, 32)
    assert again.fc.weight.dtype == torch.float32
    assert torch.equal(again(x), rounded.float()(x))
    assert not torch.equal(rounded(x), net(x))
    assert path.stat().st_size < 2.2 * models.count_parameters(net)
    net.fc.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"fc\.weight has values beyond torch\.float16"):
        models.rounded_to(net, torch.float16)


def test_incomplete_record_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="lacks dataset, n_classes"):
        models.save_checkpoint(
            tmp_path / "x.safetensors", models.build("lenet"), {"model": "lenet", "options": {}, "in_channels": 1}
        )


def rewritten(path, **changes):
    """The same tensors under a changed record."""
    state, record = models.read_checkpoint(path)
    models.write_checkpoint(path, state, {**record, **changes})


def test_another_models_state_lists_the_keys(saved):
    _, path = saved
    rewritten(path, model="toynet", options={})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this ToyNet; Missing .*blocks.*Unexpected .*conv1"):
        models.load_checkpoint(path)
    net = models.build("lenet", n_classes=3)
    with pytest.raises(CheckpointError, match=r"mismatch for fc2\.weight.*\[10, 84\].*\[3, 84\]"):
        load_state(net, models.build("lenet").state_dict(), source="x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "resnet2O"}, "resnet2O.*resnet20"),
        ({"options": {"a": 1}}, "a"),
        ({"n_classes": 0}, "n_classes=0: a whole number of at least 1"),  # was a warning of torch's
        ({"in_channels": -1}, "in_channels=-1: a whole number of at least 1"),
        ({"n_classes": 10**7}, r"more weights than the file holds, with a 'weight' of \(10000000, 84\)"),
        ({"n_classes": 10**18}, "cannot be built"),
        ({"model": "vgg_small", "options": {"width": 1e9}}, "more weights than the file holds|cannot be built"),
    ],
)
def test_a_record_that_builds_nothing_is_named(saved, change, said):
    rewritten(saved[1], **change)
    with pytest.raises(CheckpointError, match=said):
        models.load_checkpoint(saved[1])


def test_a_quantized_file_and_a_bare_one_say_what_opens_them(saved, tmp_path):
    rewritten(saved[1], policy={}, form="frozen")
    with pytest.raises(CheckpointError, match=r"lenet\.safetensors.*graph\.load"):
        models.load_checkpoint(saved[1])
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"bare\.safetensors.*load_state_dict"):
        models.load_checkpoint(tmp_path / "bare.safetensors")


def test_damaged_files_are_named(saved):
    """Cut anywhere, or with any byte changed, a file is refused or (a byte of no meaning) gives what it gave."""
    net, path = saved
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in [0, 4, 100, len(whole) // 2, len(whole) - 1, *rng.integers(0, len(whole), 20)]:
        path.write_bytes(whole[: int(cut)])
        with pytest.raises(CheckpointError, match=r"lenet\.safetensors is missing, damaged"):
            models.load_checkpoint(path)
    end = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, end, 7), *rng.integers(end, len(whole), 50)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            again, _ = models.load_checkpoint(str(path))
        except CheckpointError:
            continue
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "evil.th").write_bytes(pickle.dumps({"state_dict": Boom()}, protocol=2))
    torch.save({"state_dict": Boom()}, tmp_path / "evil.pt")
    for name in ("evil.th", "evil.pt"):
        with pytest.raises(CheckpointError, match=name):
            models.load_public(tmp_path / name, models.build("lenet"))
    assert not (tmp_path / "executed").exists()


def test_public_keys_are_mapped(tmp_path):
    torch.manual_seed(1)
    theirs, ours = models.build("lenet"), models.build("lenet")
    state = {f"module.{key.replace('fc', 'dense')}": value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.th")
    models.load_public(tmp_path / "x.th", ours, renamed=lambda key: key.replace("dense", "fc"))
    assert torch.equal(ours.fc2.weight, theirs.fc2.weight)
    with pytest.raises(CheckpointError, match=r"Missing .*fc1.*Unexpected .*dense1"):
        models.load_public(tmp_path / "x.th", ours)


def test_the_public_resnet20_gives_exactly_its_accuracy(shared_data, cifar10_test):
    net = models.resnet20_akamaster(shared_data / "checkpoints" / "resnet20_akamaster_9173.th")
    score = evaluate(net, cifar10_test.normalized_by(*models.IMAGENET_MEAN_STD))
    assert score.n == 10_000
    assert round(score.acc_pct * 100) == 9173


@pytest.mark.parametrize(("n", "within"), [(2000, 2.5), pytest.param(10_000, 0.05, marks=pytest.mark.slow)])
def test_shipped_checkpoints_give_what_their_records_say(cifar10_test, n, within):
    """Within four standard errors of 2,000 images; of all images, within what another machine's rounding may turn."""
    records = [models.read_checkpoint(path)[1] for path in paths.checkpoints_dir().glob("*_float_s0.safetensors")]
    ours = [r for r in records if r["dataset"] == "cifar10"]
    assert ours, "no float checkpoint on CIFAR-10 is shipped"
    for record in ours:
        path = paths.checkpoints_dir() / f"{record['model']}_float_s{record['seed']}.safetensors"
        assert path.stat().st_size <= 5_000_000
        got = evaluate(models.load_checkpoint(path)[0], cifar10_test.balanced(n, 0)).acc_pct
        assert abs(got - record["acc_pct"]["test"]) < within


def test_a_state_below_another_key_names_the_keys_found(tmp_path):
    torch.save({"net": models.build("lenet").state_dict(), "epoch": 3}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"run\.pt.*'net', 'epoch'"):
        models.load_public(str(tmp_path / "run.pt"), models.build("lenet"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    theirs, ours = models.build("lenet"), models.build("lenet")
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    models.load_public(tmp_path / "x.pt", ours)
    assert torch.equal(ours.fc2.weight, theirs.fc2.weight)
    load_state(models.build("lenet"), state, source="x")
