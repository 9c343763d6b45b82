"""One YAML file describes a run: network, images, bits, method, calibration, protocol, what is written where.

Its keys are the fields of ``Configuration``; the command line's verbs all read the same ones. Paths are those of the
current folder.
"""

import copy
import dataclasses
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import Tensor, nn

from hq_lib import data, graph, models
from hq_lib.crossbar import bench
from hq_lib.data import DataSpec, ImageSet, folder
from hq_lib.graph import BitPolicy, PolicyError
from hq_lib.graph.folding import OnRefusal
from hq_lib.graph.network_file import OWN
from hq_lib.integer.record import REQUANTIZERS
from hq_lib.models.public import load_state
from hq_lib.ptq import ReconstructionConfig, selection
from hq_lib.ptq.ranges import Method
from hq_lib.results import paths
from hq_lib.results.hints import check, check_known
from hq_lib.results.settings import plain
from hq_lib.studies.bench import shipped
from hq_lib.studies.ptq.recipes import RECIPES, Recipe
from hq_lib.training import QatRecipe, TrainConfig, qat_recipe, recipe
from hq_lib.training.recipes import FOLDED, METHODS, Lists, find_lists, list_recipe
from hq_lib.training.recipes import RECIPES as FLOAT_RECIPES

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
BUILD = ("model", "options", *SIZES)
"""What a record says of how a network is built."""
AFTERWARDS = ("output", "device", "n_test", "requantizer", "crossbar")
"""Keys that no weight depends on: a killed run goes on with others."""


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
    n_calib: int = 1024
    """calibration images"""
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

    def target(self, ending: str = ".safetensors") -> Path:
        """The file to write."""
        return Path(self.output or f"{self.name}{ending}")

    def refuse(self, verb: str, *keys: str) -> None:
        """``ValueError`` for the first of ``keys`` that says something: ``verb`` has no use for it with this method."""
        silent = Configuration()
        if said := [key for key in keys if getattr(self, key) != getattr(silent, key)]:
            raise ValueError(f"{said[0]}: {verb} takes none with method {self.method!r}; leave it out")

    # -- the network ---------------------------------------------------------------------------------------------------

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

    def built(self, **defaults: Any) -> tuple[nn.Module, dict[str, Any]]:
        """(float network as its constructor leaves it, weights drawn from ``seed``; what its record says of that).

        ``defaults``: options of a network of ours, n_classes and in_channels among them, where ``options`` say none.
        """
        torch.manual_seed(self.seed)
        if self.net:
            return self._own(self.options), {"model": OWN, "options": self.options}
        given = defaults | self.options
        sizes = {key: given.pop(key) for key in SIZES if key in given}
        return models.build(self.model, **sizes, **given), {"model": self.model, "options": given, **sizes}

    def network(self) -> tuple[nn.Module, dict[str, Any]]:
        """The float network with its weights, in eval mode, and its run record.

        Raises ``ValueError`` for a network of ours that no weights are known of, and where ``weights`` are of another
        network than ``model`` and ``options`` say, or of a quantized one.
        """
        taken, file = (None, None) if self.net else (models.TAKEN.get(self.model), shipped(self.model))
        theirs, _, which = self.weights.partition(":")
        if theirs == TORCHVISION:
            file = None
        elif self.weights:
            file = models.fetched(self.weights) if "://" in self.weights else Path(self.weights)
        if file is not None and file.suffix == ".safetensors":
            net, record = self.opened(file)
            if "policy" in record:
                raise ValueError(f"weights {file} are of a quantized network: a float one is needed here")
            if not self.net and record["model"] != self.model:
                raise ValueError(
                    f"model is {self.model!r}, and weights {file} are of {record['model']!r}: leave model out"
                )
            held = {**(record.get("options") or {}), **{key: record[key] for key in SIZES if key in record}}
            apart = [key for key, value in self.options.items() if held.get(key) != value]
            if apart and (held or not self.net):
                raise ValueError(
                    f"options: the network of {file} was built with {held or 'none'}: leave {apart[0]} out"
                )
            return net, record
        net, record = self.built()
        if theirs == TORCHVISION:
            state, taken = models.published(self.model, which or "DEFAULT")
            load_state(net, state, source=self.weights)
        elif file is not None:
            net = models.load_public(file, net)
        elif taken is None and not self.net:
            raise ValueError(f"weights: none are shipped for {self.model!r}; train them (hq train --model "
                             f"{self.model} --method float), or name a file")  # fmt: skip
        return net.eval(), {**record, **({} if self.net else {"images": taken})}

    def opened(self, file: Path) -> tuple[nn.Module, dict[str, Any]]:
        """(network in eval mode, record) of a float or quantized network file."""
        state, record = models.read_checkpoint(file)
        made = self._own(self.options or record.get("options") or {}) if self.net else None
        if made is None and record.get("model", OWN) == OWN:
            raise ValueError(f"{file.name} holds a network of its maker's own: say which, --net module:Class")
        if "policy" in record:
            return graph.load(file, net=made), record
        if made is None:
            return models.load_checkpoint(file)
        load_state(made, state, source=file.name)
        return made.eval(), record

    def _own(self, options: Mapping[str, Any]) -> nn.Module:
        try:
            return own(self.net)(**options)
        except TypeError as error:
            raise ValueError(f"options: {self.net} cannot be built with {dict(options) or 'none'}: {error}") from error

    # -- the images ----------------------------------------------------------------------------------------------------

    def images(self, split: str, record: Mapping[str, Any], n: int = 0) -> ImageSet:
        """The first ``n`` (0: all) images of a split, as the network of the record takes them."""
        name = self._dataset(record)
        if not name:
            raise ValueError(f"data: the network's file does not say; choose one of {', '.join(data.SPECS)}")
        own = {key: value for key, value in record.items() if value}
        spec = self.normalization({"dataset": name, **own})
        if name == PICTURES:
            spec = dataclasses.replace(spec, name=name, n_val=0, note="")
        found = data.load(name, split, root=self.root or None, n=n or None, spec=spec)
        return found.normalized_by(spec.mean, spec.std)

    def validation(self, record: Mapping[str, Any]) -> ImageSet | None:
        """``n_val`` (0: all) validation images; None for a folder of pictures, which holds none out of train."""
        if self._dataset(record) == PICTURES:
            return None
        if record.get("trained_on") == "trainval" and self._dataset(record) == record.get("dataset"):
            print("the float network was trained on the validation images too: their accuracies flatter", flush=True)
        return self.images("val", record, self.n_val)

    def _dataset(self, record: Mapping[str, Any]) -> str:
        return self.data or (PICTURES if self.root else record.get("dataset", ""))

    def normalization(self, record: Mapping[str, Any]) -> DataSpec:
        """The data set of a network's record, with size, mean and standard deviation that it was trained with."""
        name = record.get("dataset") or self._dataset({})
        check_known(name, data.SPECS, "data set")
        told: Any = record.get("images") or {}
        if not isinstance(told, Mapping):
            raise ValueError(f"images: the network's file says {told!r:.60}, not mean, std and in_shape")
        found = {key: told[key] for key in ("mean", "std", "in_shape", "short_side", "classes") if told.get(key)}
        found |= {key: value for key in ("mean", "std") if (value := getattr(self, key))}
        if self.size:
            found |= {"in_shape": (3, self.size, self.size), "short_side": 0}
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        return dataclasses.replace(data.SPECS[name], **plain)

    def calibration(self, record: Mapping[str, Any]) -> ImageSet:
        """The images of the manifest, each hash verified, or ``n_calib`` training images, balanced if that can be."""
        if not self.manifest:
            if self.metric or self.strategy != "random":
                raise ValueError("strategy and metric are of hq select: leave them out, or give the manifest it writes")
            return self.images("train", record, self.n_train).drawn(self.n_calib, self.seed)
        listed = selection.read(Path(self.manifest))
        if listed.files and not self.root:
            raise ValueError(f"root: {self.manifest} names files; give the folder that they lie in")
        name = PICTURES if listed.files else listed.dataset
        if not self.data and name != record.get("dataset", name):
            raise ValueError(
                f"manifest {self.manifest} is of {name}, the network of {record['dataset']}: choose images of its own "
                f"data (hq select --set weights=...), or say data={name}"
            )
        spec = self.normalization({**record, "dataset": name} if listed.files else {"dataset": name, **record})
        images = data.load(name, listed.split, root=self.root or None, spec=spec)
        return selection.take(listed, images).normalized_by(spec.mean, spec.std)

    def selected(self) -> selection.Manifest:
        """``n_calib`` training images by ``strategy`` and ``metric``, as a manifest."""
        if self.metric and self.strategy == "random":
            raise ValueError(f"metric is {self.metric!r}, and strategy random: choose lowest, highest or trimmed")
        if self.weights.endswith(".safetensors"):
            record = models.read_checkpoint(self.weights)[1]
        else:
            dataset = FLOAT_RECIPES[self.model].dataset if self.model in FLOAT_RECIPES and not self.net else ""
            record = {"dataset": dataset, "images": None if self.net else models.TAKEN.get(self.model)}
        images = self.images("train", record, self.n_train)
        scores = selection.score(images.images, self.metric) if self.metric else None
        how: Any = {"strategy": self.strategy, "seed": self.seed}
        balanced = images.balances(self.n_calib)
        if not balanced and self.n_calib >= images.spec.n_classes:
            print(f"not every class has {self.n_calib} / {images.spec.n_classes} images: chosen from all alike")
        labels = images.labels if balanced else None
        chosen = selection.select(scores, self.n_calib, labels=labels, n_images=len(images), **how)
        return selection.from_images(images, chosen, metric=self.metric, balanced=balanced, **how)

    # -- what is done --------------------------------------------------------------------------------------------------

    def float_training(self) -> tuple[str, TrainConfig, int | None]:
        """(data set, configuration, training images or None for all) of float training."""
        if not self.net and self.model in FLOAT_RECIPES:
            name, config, n = recipe(self.model, self.profile, seed=self.seed)
            name = self.data or name
        elif {"epochs", "lr"} <= set(self.protocol) and self.data:
            name, n = self.data, None
            config = TrainConfig(epochs=1, lr=0.1, seed=self.seed)
        else:
            raise ValueError(
                f"{self.net or self.model} has no training recipe: give data, protocol.epochs, protocol.lr"
            )
        return name, self._with_protocol(config), self.n_train or n

    def _with_protocol(self, config: TrainConfig) -> TrainConfig:
        check("protocol", "key", self.protocol, [f.name for f in fields(TrainConfig)])
        return dataclasses.replace(config, **self.protocol)

    def qat(self, net: nn.Module) -> QatRecipe:
        """Policy and training of quantization-aware training from ``net``."""
        w_bits, a_bits = self.bits
        if self.method == HYBRID:
            made = qat_recipe("dsq", min(w_bits, 8), min(a_bits, 8), self.profile, seed=self.seed)
            made = dataclasses.replace(made, policy=self._hybrid_policy())
        elif self.lists:
            made = list_recipe(net, self._lists(), self.method, self.profile, seed=self.seed)
        else:
            who = "hq train, unlike hq quantize," if self.method in RECIPES else "hq train"
            check(who, "method", [self.method], [FLOAT, HYBRID, *METHODS])
            made = qat_recipe(self.method, w_bits, a_bits, self.profile, seed=self.seed)
        policy = self._with_policy(made.policy)
        config = dataclasses.replace(made.config, lr=made.config.lr * (FOLDED if policy.bn == "fold" else 1))
        return QatRecipe(policy, self._with_protocol(config), self.n_train or made.n_train)

    def _lists(self) -> Lists:
        if isinstance(self.lists, str):
            return find_lists(self.model, self.lists)
        layer_abit, layer_wbit = (tuple(self.lists[key]) for key in LIST_KEYS)
        return layer_abit, layer_wbit

    def _hybrid_policy(self) -> BitPolicy:
        settings = {key: value for key, value in self.hybrid.items() if key != "ranges"}
        given = {"w_bits": self.bits[0], "a_bits": self.bits[1], "ptq": ("minmax", "lsq_plus"), **settings}
        if type(bits := given.get("boundary", 4)) is not int:
            raise PolicyError(f"hybrid: boundary is {bits!r:.80}: a whole number of bits is needed, as 4")
        try:
            return BitPolicy.hybrid(**given)
        except TypeError as error:
            raise PolicyError(f"hybrid: {error}") from error

    @property
    def tracing(self) -> dict[str, Any]:
        """Arguments of ``graph.quantize`` beside network, policy and example."""
        return {"leaf_modules": tuple(self.leaf_modules), "on_refusal": self.on_refusal}

    def ptq(self, net: nn.Module) -> tuple[Recipe, BitPolicy]:
        """Method and policy of post-training quantization of ``net``; its settings are ``protocol``."""
        who = "hq quantize, unlike hq train," if self.method in (FLOAT, HYBRID, *METHODS) else "hq quantize"
        check(who, "method", [self.method], RECIPES)
        check("protocol", "key", self.protocol, [f.name for f in fields(ReconstructionConfig)])
        if self.protocol and RECIPES[self.method].passes is None:
            raise ValueError(f"protocol: method {self.method!r} reconstructs nothing; leave protocol out")
        if self.lists:
            policy = BitPolicy.from_lists(net, *self._lists(), weight="minmax", act="lsq_plus", bn="fold")
        else:
            policy = BitPolicy(f"minmax:{self.bits[0]}", f"lsq_plus:{self.bits[1]}", bn="fold")
        return RECIPES[self.method], self._with_policy(policy)

    def _with_policy(self, made: BitPolicy) -> BitPolicy:
        """``made`` with the fields of ``policy`` in place of its own; overrides of both, those of ``policy`` first."""
        asked = BitPolicy.from_dict({**made.to_dict(), **self.policy})
        joined = {pattern: {**made.overrides.get(pattern, {}), **said} for pattern, said in asked.overrides.items()}
        rest = {pattern: said for pattern, said in made.overrides.items() if pattern not in joined}
        return dataclasses.replace(asked, overrides={**rest, **joined})

    def record(self, source: Mapping[str, Any], images: ImageSet, **more: Any) -> dict[str, Any]:
        """What a network file says of this run, besides what ``graph.save`` adds; ``start``: the digits of the file of
        the network that it began with."""
        facts = {key: source[key] for key in BUILD if key in source}
        facts |= {"model": OWN, "options": self.options or source.get("options") or {}} if self.net else {}
        facts |= {"start": source["sha256"]} if "sha256" in source else {}
        asked = {key: value for key, value in dataclasses.asdict(self).items() if key != "output"}
        return {
            **facts, "dataset": images.spec.name, "images": dataclasses.asdict(images.spec), "method": self.method,
            "seed": self.seed, "configuration": asked, **more,
        }  # fmt: skip

    def folder(self, net: nn.Module, source: Mapping[str, Any], train: ImageSet) -> Path:
        """Where the run is kept: none resumes what began elsewhere, from other weights or images, or otherwise.

        What ``net`` computes is told by two digits of its logits on noise, which another machine's are too.
        """
        told = self.record(source, train)
        told["configuration"] = {k: v for k, v in told["configuration"].items() if k not in AFTERWARDS}
        pictures = train.images.names if isinstance(train.images, folder.Pictures) else []
        computed = [re.sub(" at 0x[0-9a-f]+", "", repr(net)), *_digits(net, train.spec.in_shape)]
        text = json.dumps([str(Path.cwd()), told, pictures, computed], sort_keys=True)
        tensors = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
        digits = models.digest(text, {**tensors, "labels": train.labels, "indices": train.indices})
        return paths.runs_dir(self.profile) / "hq" / f"{self.name}_{digits[:8]}"


def _digits(net: nn.Module, in_shape: tuple[int, ...]) -> list[str]:
    """Two digits of some logits on noise; none of a network that cannot take it, which is refused in words later."""
    noise = torch.randn(2, *in_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits = copy.deepcopy(net).cpu().eval()(noise)
    except Exception:  # a network of the user's own may raise anything
        return []
    return [f"{value:.2g}" for value in logits.flatten()[:20].tolist()] if isinstance(logits, Tensor) else []


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


def own(name: str) -> Any:
    """The class (or function) of "module:Class", imported from the current folder."""
    module, colon, made = name.partition(":")
    if not (module and colon and made):
        raise ValueError(f"net is {name!r}: write module:Class, as mynet:MyNet for class MyNet of mynet.py")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), made)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"net {name!r} cannot be imported from {Path.cwd()}: {error}") from error
