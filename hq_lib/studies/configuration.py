"""One YAML file describes a run: network, images, bits, method, calibration, protocol, what is written where.

Its keys are the fields of ``Configuration``; the command line's verbs all read the same ones. Paths are those of the
current folder.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from hq_lib import models
from hq_lib.crossbar import bench
from hq_lib.graph import BitPolicy
from hq_lib.graph.folding import OnRefusal
from hq_lib.graph.network_file import OWN
from hq_lib.integer.record import REQUANTIZERS
from hq_lib.ptq import ReconstructionConfig, selection
from hq_lib.ptq.ranges import Method
from hq_lib.results.hints import check, check_known
from hq_lib.results.settings import plain
from hq_lib.training import TrainConfig

FLOAT, HYBRID = "float", "hybrid"
PICTURES = "imagenet"
"""The data set that is a folder of pictures"""
TORCHVISION = "torchvision"
"""``weights`` that torchvision publishes, the newest; ``torchvision:IMAGENET1K_V1`` names others"""
EQUALIZE, NORMS = "equalize", "norms"
CORRECTIONS = (EQUALIZE, NORMS)
"""Ranges of neighbouring layers evened out before (``ptq.equalize``; batch norms are folded first), statistics of kept
batch norms measured again behind (``ptq.reestimate_norms``; with ``policy.bn: keep``)."""
LIST_KEYS = ("layer_abit", "layer_wbit")
INNER: dict[str, tuple[Any, ...]] = {"protocol": (ReconstructionConfig, TrainConfig), "policy": (BitPolicy,)}
"""Keys that are mappings -> what their own keys are fields of."""
SIZES = ("n_classes", "in_channels")


@dataclass(frozen=True)
class Configuration:
    """What a run is. ``ValueError`` names a key whose value is of the wrong kind."""

    model: str = ""
    """network by name, as in ``models.names``; "" = the one that ``weights`` are of, else resnet20"""
    net: str = ""
    """a network of one's own in its place, "module:Class", imported from the current folder"""
    options: dict = field(default_factory=dict)
    """of the network: ``option``, ``width``, ``n_classes`` ..., or the arguments of one's own class"""
    weights: str = ""
    """file of float weights: .safetensors of ``hq train``, or a state dict (.pt, .pth, .th), or its URL with
    ``#sha256=...`` behind it; ``torchvision``, or ``torchvision:IMAGENET1K_V1``; "" = the shipped ones"""
    data: str = ""
    """data set, as in ``data.SPECS``; "" = what the network was trained on"""
    root: str = ""
    """folder of pictures (``train/`` or ``sel/`` and ``val/``, or class folders alone), with ``data: imagenet``"""
    mean: list = field(default_factory=list)
    """subtracted from pixels / 255, per channel, where it is not the data set's"""
    std: list = field(default_factory=list)
    """what they are divided by then"""
    size: int = 0
    """side in pixels that pictures of ``root`` are cropped to; 0 = as the network was trained, or 224"""
    method: str = "qdrop"
    """``train``: float, hybrid, or a key of ``recipes.METHODS``; ``quantize``: a key of ``recipes.RECIPES``"""
    bits: list = field(default_factory=lambda: [8, 8])
    """[weights, activations] between first and last layer"""
    lists: str | dict = ""
    """seed 001's bits layer by layer in place of ``bits``: cfg-1, cfg-1*, cfg-2, cfg-2*, cfg-3; or the two lists
    themselves, ``layer_abit`` (bits of each layer's input) and ``layer_wbit`` (of its weights)"""
    policy: dict = field(default_factory=dict)
    """fields of ``BitPolicy`` in place of the method's own, ``overrides`` by layer among them"""
    corrections: list = field(default_factory=list)
    """``quantize``: what is done besides the method, of ``CORRECTIONS``"""
    leaf_modules: list = field(default_factory=list)
    """names of modules that stay one call, in float, as those that cannot be traced"""
    on_refusal: str = "raise"
    """keep: with ``policy.bn: fold`` batch norms that cannot be folded exactly stay"""
    hybrid: dict = field(default_factory=dict)
    """``hybrid``: arguments of ``BitPolicy.hybrid``, and ``ranges``, the method of what is not trained"""
    manifest: str = ""
    """calibration images, a file of ``hq select``; "" = ``n_calib`` of the training images, balanced over classes"""
    n_calib: int = 0
    """calibration images; 0 = 1,024, and 512 where they begin a training through quantizers"""
    n_train: int = 0
    """training images that are trained on or chosen from; 0 = as the recipe says, which is all in profile full"""
    n_val: int = 0
    """validation images; 0 = all"""
    n_test: int = 0
    """test images; 0 = all, of ``hq crossbar`` 20"""
    metric: str = ""
    """``select``: score of an image, a key of ``selection.METRICS``"""
    strategy: str = "random"
    """``select``: lowest, highest, trimmed (all three by ``metric``) or random"""
    protocol: dict = field(default_factory=dict)
    """fields of ``TrainConfig`` (train) or ``ReconstructionConfig`` (quantize) in place of the recipe's"""
    profile: str = "full"
    """which cut of a training recipe: smoke, quick or full"""
    seed: int = 0
    """of images, batches, dropping, and the cells of a simulated crossbar"""
    device: str = ""
    """cpu or cuda, of several cuda:1; "" = cuda where there is one"""
    requantizer: str = "float32"
    """of the integers: float32 or fixed"""
    crossbar: dict = field(default_factory=dict)
    """fields of ``crossbar.bench.Plan``: engine, device, layers, n_test, n_calib, folder, host, port ..."""
    output: str = ""
    """the file that is written; "" = a name made of network, method and bits"""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, each.type) or isinstance(value, bool):  # type: ignore[arg-type]
                kind = getattr(each.type, "__name__", each.type)
                raise ValueError(f"{each.name} is {value!r:.80}: a {kind} is needed")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{each.name} is {value}: 0 or more is needed")
        object.__setattr__(self, "model", self.model or _held("" if self.net else self.weights))
        object.__setattr__(self, "device", self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if len(self.bits) != 2 or not all(type(bits) is int for bits in self.bits):
            raise ValueError(f"bits is {self.bits}: [weights, activations] are needed, as [4, 4]")
        check_known(self.device.partition(":")[0], ("cpu", "cuda"), "device")
        if not self.net:
            models.builder(self.model)
        check("corrections", "step", self.corrections, CORRECTIONS)
        check_known(self.requantizer, REQUANTIZERS, "requantizer")
        check_known(self.strategy, get_args(selection.Strategy), "strategy")
        check("crossbar", "key", self.crossbar, [f.name for f in fields(bench.Plan)])
        check_known(self.hybrid.get("ranges", "mse"), get_args(Method), "range method of hybrid")
        if self.metric:
            check_known(self.metric, selection.METRICS, "metric")
        if self.root and self.data not in ("", PICTURES):
            raise ValueError(f"root is {self.root!r} and data {self.data!r}: a folder of pictures is data {PICTURES!r}")
        if odd := [name for name in self.leaf_modules if not isinstance(name, str)]:
            raise ValueError(
                f"leaf_modules has {odd[0]!r}: names are needed, in quotes where YAML reads a number: ['2.1']"
            )
        check_known(self.on_refusal, get_args(OnRefusal), "on_refusal")
        if self.lists and self.method == HYBRID:
            raise ValueError("lists: hybrid takes bits and overrides; leave lists out")
        if bool(self.mean) != bool(self.std):
            raise ValueError("mean and std go together: give both, or neither")
        if isinstance(self.lists, dict):
            check("lists", "key", self.lists, LIST_KEYS)
            if absent := [key for key in LIST_KEYS if self.lists and key not in self.lists]:
                raise ValueError(f"lists: {absent[0]} is missing; both {' and '.join(LIST_KEYS)} are needed")
            for key, bits in self.lists.items():
                if not isinstance(bits, list) or not bits or not all(type(b) is int for b in bits):
                    raise ValueError(f"lists: {key} is {bits!r:.80}: whole numbers of bits are needed, as [8, 4, 8]")
        elif self.lists and self.net:
            raise ValueError(f"lists: none is called {self.lists!r} for {self.net}; write layer_abit and layer_wbit")

    @property
    def name(self) -> str:
        """Network, method, bits and a seed other than 0, e.g. ``resnet20_qdrop_w4a4_s1``."""
        lists = self.lists if isinstance(self.lists, str) else "lists"
        width = lists.replace("*", "star") if self.lists else "w{}a{}".format(*self.bits)
        seed = [f"s{self.seed}"] if self.seed else []
        return "_".join([self.net.rpartition(":")[2].lower() or self.model, self.method, width, *seed])

    @property
    def tracing(self) -> dict[str, Any]:
        """Arguments of ``graph.quantize`` beside network, policy and example."""
        return {"leaf_modules": tuple(self.leaf_modules), "on_refusal": self.on_refusal}

    def target(self, ending: str = ".safetensors") -> Path:
        """The file to write."""
        return Path(self.output or f"{self.name}{ending}")

    def refuse(self, verb: str, *keys: str) -> None:
        """``ValueError`` for the first of ``keys`` that says something: ``verb`` has no use for it with this method."""
        silent = Configuration()
        if said := [key for key in keys if getattr(self, key) != getattr(silent, key)]:
            raise ValueError(f"{said[0]}: {verb} takes none with method {self.method!r}; leave it out")

    def network_file(self) -> Path:
        """The network file to write; ``ValueError``, before anything is computed, where none can be of that name."""
        target = self._writable("network file", self.target())
        if self.weights and target.resolve() == Path(self.weights).resolve():
            raise ValueError(f"output and weights are both {target}: the float network would be lost; give another")
        return target

    def manifest_file(self) -> Path:
        """The manifest to write; beside the network file where a later step's ``output`` names that."""
        target = self.target(".json")
        target = target.with_suffix(".json") if target.suffix == ".safetensors" else target
        return self._writable("manifest", target, ".json")

    @staticmethod
    def _writable(what: str, target: Path, ending: str = ".safetensors") -> Path:
        if target.suffix != ending:
            raise ValueError(f"output is {target}: the name of a {what} has to end in {ending}")
        if target.is_dir():
            raise ValueError(f"output is {target}: a folder of that name is there")
        there = next(folder for folder in target.resolve().parents if folder.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise ValueError(f"output is {target}: nothing can be written to {there} ({error.strerror})") from error
        return target


KEYS = tuple(each.name for each in fields(Configuration))
"""What a file may say."""


def mapping(path: Path | str) -> dict[str, Any]:
    """The keys of a YAML file; ``ValueError`` names a file that is no YAML, or no mapping."""
    try:
        entries = plain(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a date that is none
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"{path}: a mapping of keys is needed, got a {type(entries).__name__}")
    return dict(entries)


def read(path: Path | str | None = None, changes: Mapping[str, Any] | None = None) -> Configuration:
    """The configuration in a YAML file (default: an empty one) with ``changes``; "policy.bn" reaches into a mapping.

    Raises:
        ValueError: no mapping, a key that is unknown (with the nearest known one), or a value of the wrong kind.
        OSError: no such file.
    """
    entries = {} if path is None else mapping(path)
    for key, value in (changes or {}).items():
        outer, dot, inner = key.partition(".")
        held = entries.get(outer) or {}
        if dot and not isinstance(held, Mapping):
            raise ValueError(f"{outer} is {held!r}: no {inner} can be set in it; set all of {outer}")
        entries[outer] = {**held, inner: value} if dot else value
    where = str(path or "the configuration")
    inner = {f.name: outer for outer, kinds in INNER.items() for kind in kinds for f in fields(kind)}
    if inside := [key for key in entries if key in inner and key not in KEYS]:
        raise ValueError(f"{where} has no key {inside[0]!r}; did you mean '{inner[inside[0]]}.{inside[0]}'?")
    check(where, "key", entries, KEYS)
    if entries.get("net") and entries.get("model"):
        raise ValueError(f"model is {entries['model']!r}, and net {entries['net']!r} in its place: give one of them")
    return Configuration(**entries)


def _held(weights: str) -> str:
    """The network of ours that a file of weights names; resnet20 where it names none."""
    named = weights.endswith(".safetensors") and Path(weights).is_file()
    found = models.read_checkpoint(weights)[1].get("model", OWN) if named else OWN
    return "resnet20" if found == OWN else found
