"""Networks by name or file, with their images: what nearly every study measures on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn

from hq_lib import data, graph, models, ptq
from hq_lib.data import ImageSet, folder
from hq_lib.results import paths
from hq_lib.training import evaluate

FIRST = frozenset({"8f3b316e", "8244b673", "4d496ff8", "8cbdbed1", "69574edb"})
"""Float checkpoints (first digits of their SHA-256) whose rows were written before rows named the network."""

PUBLIC, SHIPPED = "public", "shipped"
"""What rows of post-training methods call their float network: the public ResNet-20, or a committed one"""

TRAINED = (
    "resnet20_pact_w8a8_s0", "resnet20_pact_w4a4_s0", "resnet20_lsq_w4a4_s0", "resnet20_dsq_w4a4_s0",
    "resnet20_pact_w2a2_s0", "resnet20_lsq_w2a2_s0", "resnet20_dsq_w2a2_s0",
)  # fmt: skip
"""Quantized networks of notebook 03 (``data/checkpoints``) that are taken on as they were trained."""

N_IMAGENET = 16_384
"""Largest number of an image folder's training images kept in memory."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A network in evaluation mode, and images to train, choose and judge on."""

    net: nn.Module
    """The network."""
    record: dict[str, Any]
    """Its run record."""
    train: ImageSet
    """Images to train and calibrate on."""
    val: ImageSet
    """Images to choose on."""
    test: ImageSet
    """Images of final accuracies."""

    @property
    def model(self) -> str:
        """Name of the network."""
        return self.record["model"]

    @property
    def dataset(self) -> str:
        """The data set, which is the embedded digits where the network's own cannot be had."""
        return self.test.spec.name

    @property
    def eval_batch(self) -> int:
        """Images per forward pass of post-training studies: few enough for a core's cache."""
        return 25 if self.dataset == "imagenet" else 64

    def run_folder(self, root: Path, name: str) -> Path:
        """Where a training is kept that starts from this network; none resumes what began from another file."""
        digits = self.record.get("sha256", "")[:8]
        return root / (name if digits in ("", *FIRST) else f"{name}_{digits}")

    def calibration(self, n: int, seed: int) -> Tensor:
        """``n`` training images (all where there are fewer), balanced over classes, normalised: (n, C, H, W)."""
        few = self.train.balanced(min(n, len(self.train)), seed)
        return data.normalize(few.images, few.spec)

    def accuracy(self, net: nn.Module) -> dict[str, Any]:
        """Columns of a row: data set, test accuracy in percent as ``value``, and on how many images."""
        score = evaluate(net, self.test, batch_size=self.eval_batch)
        return {"dataset": self.dataset, "value": score.acc_pct, "n_test": score.n}


def shipped(name: str) -> Path | None:
    """The committed float checkpoint of a network, or None. Profile full writes it there."""
    path = paths.checkpoints_dir() / f"{name}_float_s0.safetensors"
    return path if path.exists() else None


def network_file(name: str) -> Path | None:
    """The file of a network: its path, the stem of a committed file, or a shipped float network's name; else None."""
    places = [Path(name)] if name.endswith(".safetensors") else [paths.checkpoints_dir() / f"{name}.safetensors"]
    return next((place for place in places if place.is_file()), shipped(name))


def known_networks() -> list[str]:
    """What ``open_bench`` knows by name, present or not: every network of ours, and the stems of committed files."""
    return [*models.names(), *sorted(path.stem for path in paths.checkpoints_dir().glob("*.safetensors"))]


def open_bench(
    name: str,
    *,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    root: str = "",
    device: str = "cpu",
) -> Bench | None:
    """A network with its images (None: all); None, after a line that says why, where they cannot be had.

    ``name`` is that of a shipped float network, or of a network file as ``network_file`` finds it, quantized ones too.
    Without the network's data set the embedded digits take its place if they fit: the program runs, but accuracies mean
    nothing, and rows name the data set. An ImageNet network without a file is ``open_imagenet``'s, with ``root``.
    """
    path = network_file(name)
    if path is None and name in models.IMAGENET:
        return open_imagenet(name, root=root, n_val=n_val or 0, n_test=n_test, device=device)
    if path is None:
        print(f"{name}: no float checkpoint in {paths.checkpoints_dir()}, not run (notebook 01 in profile full ships)")
        return None
    record = models.read_checkpoint(path)[1]
    net = graph.load(path) if "policy" in record else models.load_checkpoint(path)[0]
    test = data.load_or_embedded(record["dataset"], "test", n=n_test)
    if test.spec.in_shape != data.SPECS[record["dataset"]].in_shape:
        print(f"{name}: {record['dataset']} is not available and the embedded digits do not fit it, not run")
        return None
    n_val = None if n_val and 0 < test.spec.n_val < n_val else n_val  # of the digits there are few
    train, val = (data.load(test.spec.name, split, n=n) for split, n in (("train", n_train), ("val", n_val)))
    sets = (train, val, test)
    if seen := record.get("images"):
        sets = (images.normalized_by(tuple(seen["mean"]), tuple(seen["std"])) for images in sets)
    return Bench(net.to(device).eval(), record, *sets)


def record_of(name: str) -> dict[str, Any]:
    """The run record of a network as ``network_file`` finds it; {} where there is no file."""
    path = network_file(name)
    return {} if path is None else _record(path, path.stat().st_mtime_ns)


@cache
def _record(path: Path, mtime_ns: int) -> dict[str, Any]:
    return models.read_checkpoint(path)[1]


def net_switch(name: str) -> dict[str, str]:
    """The switches of a row that say what it stands on: the stem of a file of one's own and its first digits.

    Of a shipped float network its digits; {} for those that the first rows stand on.
    """
    sha = record_of(name).get("sha256", "")[:8]
    if name in models.names():
        return {} if sha in ("", *FIRST) else {"net": sha}
    return {"network": Path(name).name.removesuffix(".safetensors"), **({"file": sha} if sha else {})}


@cache
def pictures_switch(root: str) -> dict[str, str]:
    """The switches of a row that say what folder of pictures was given: its name, and digits of its files' names.

    {} for none given; ``FileNotFoundError`` where there is no such folder.
    """
    if not root:
        return {}
    top = Path(root).expanduser()
    names = {
        path.relative_to(top).as_posix() for split in ("train", "test") for path in folder.list_folder(top, split)[0]
    }
    return {"images": top.resolve().name, "pictures": hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:8]}


def quantized_as(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that a quantized network's run record tells: model, method, bits and placement."""
    policy = graph.BitPolicy.from_dict(record["policy"])
    return {
        "model": record["model"], "method": record.get("method", policy.weight.method), "w_bits": policy.weight.bits,
        "a_bits": policy.act.bits, "placement": policy.placement,
    }  # fmt: skip


def after_training(net: nn.Module, x: Tensor, *, bits: int = 8, per_layer: bool = False) -> fx.GraphModule:
    """``net`` quantized to ``bits`` with ranges of least squared error on images ``x``, batch norms folded.

    ``per_layer`` gives the weights one scale per layer instead of one per output channel.
    """
    weight = {"method": "minmax", "bits": bits, "axis": None if per_layer else 0}
    qnet = graph.quantize(net.eval(), graph.BitPolicy(weight, f"minmax:{bits}", bn="fold"), x[:1])
    ptq.fit_weights(qnet, "mse")
    ptq.fit_acts(qnet, x, "mse")
    return qnet


def public_weights(file: str) -> Path | None:
    """A file of published weights in ``data/checkpoints`` or the optional ``../shared/data/checkpoints``, or None."""
    folders = [paths.checkpoints_dir(), (paths.shared_data() or paths.ROOT / "absent") / "checkpoints"]
    return next((path for each in folders if (path := each / file).exists()), None)


def open_imagenet(
    name: str, *, root: str = "", n_val: int = 0, n_test: int | None = None, device: str = "cpu"
) -> Bench | None:
    """An ImageNet network with its images; None, after a line that says why, where they cannot be had.

    Args:
        name:   one of ``models.IMAGENET``. EfficientNet-Lites' weights are packages, and say what images they
                take; of any other network ``public_weights("<name>.pth")``, a state dict as torchvision publishes it.
        root:   image folder, ``train/`` and ``val/`` or class folders alone; "" = the sample in ``../shared/data``.
        n_val:  validation images, cut evenly from the training images (at most ``N_IMAGENET``, kept in memory).
        n_test: test images; None = all.
        device: "cpu" or "cuda".
    """
    images = Path(root).expanduser() if root else (paths.shared_data() or paths.ROOT / "absent") / "imagenet_sample"
    taken = models.TAKEN.get(name)
    weights = public_weights(f"{name}.pth") if taken is None else None
    if not images.is_dir():
        print(f"{name}: no image folder {images.name} (give root, a folder of class folders), not run")
        return None
    if taken is None and weights is None:
        print(f"{name}: no {name}.pth in {paths.checkpoints_dir()}, not run")
        return None
    try:
        net = models.build(name)
    except ImportError as error:
        print(f"{name}: {error}, not run")
        return None
    if weights is not None:
        models.load_public(weights, net)
    n_train = min(N_IMAGENET, len(folder.list_folder(images, "train")[0]))
    spec = dataclasses.replace(data.SPECS["imagenet"], **(taken or {}))
    train, test = (
        data.load("imagenet", split, root=images, n=n, spec=spec) for split, n in (("train", n_train), ("test", n_test))
    )
    if n_val >= n_train:
        print(f"{name}: {n_val} of {n_train} training images held out leave none to calibrate with, not run")
        return None
    held_out = torch.zeros(n_train, dtype=torch.bool)
    held_out[torch.linspace(0, n_train - 1, n_val).round().long()] = True
    train, val = (train.subset(mask.nonzero().flatten()) for mask in (~held_out, held_out))
    return Bench(net.eval().to(device), {"model": name, "dataset": "imagenet"}, train, val, test)


def newest(rows: pd.DataFrame, what: str, *, earlier: bool = True, networks: Sequence[str] = ()) -> pd.DataFrame:
    """Of each network, a float one by name or a file by its stem, the rows that stand on what is committed now.

    Where it has none yet, those of an earlier one, and a line says so: ``what`` names the rows; none, where there were
    several earlier ones, or without ``earlier``. Those of a public network stand on its weights, whatever is committed,
    those of a training in float on nothing. What is at a path in ``networks`` goes before what is committed.
    """
    given = {Path(name).stem: name for name in networks if Path(name).is_file()}
    names, digits = [], []
    trains = (rows["method"] == "float") & (rows["epochs"] > 0)
    for text, model, is_training in zip(rows["switches"], rows["model"], trains, strict=True):
        settings = json.loads(text)
        net = settings.get("net", "")
        stands_on_none = net == PUBLIC or (is_training and "checkpoint" not in settings)
        names.append("" if stands_on_none else settings.get("network", model))
        digits.append(settings.get("file", settings.get("checkpoint", "") if net == SHIPPED else net))
    named, standing = (pd.Series(each, index=rows.index, dtype="str") for each in (names, digits))
    keep = pd.Series(True, index=rows.index)
    for name in sorted({*names} - {""}):
        now, mine = net_switch(str(given.get(name, name))), named == name
        current = mine & (standing == now.get("file", now.get("net", "")))
        if current.any() or not earlier:
            keep &= ~mine | current
        elif len({*standing[mine]}) > 1:
            keep &= ~mine
            print(f"{what}: rows of several networks called {name} are left out: give the path of one among networks")
        else:
            print(f"{what}: no rows of {name} as it is committed, those of an earlier {name} are shown")
    return rows.loc[keep]
