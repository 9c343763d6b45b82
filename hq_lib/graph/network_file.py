"""The network file: a quantized network in one safetensors file that every later step takes.

    graph.save(qnet, "net.safetensors", record={"model": "resnet20", "method": "qdrop"})     # frozen
    qnet = graph.load("net.safetensors")                   # of a network of one's own: load(path, net=MyNet())

Two forms. *frozen*: each weight as integers packed to the bits of its grid, each grid as scale, zero point and ends;
what integers, exports, crossbars and tests take. *trainable*: real weights and all parameters of all quantizers, to go
on training. The float network is not in the file: it is built anew, by name or by the caller, quantized by the policy
in the record, and its graph compared with the saved one operation by operation before the tensors go in.
"""

import copy
import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hq_lib.graph.layers import QUANTIZER_SUFFIX, QuantizedWeight
from hq_lib.graph.network_tensors import describe, frozen, refuse_other_floats, restore, tensors_of
from hq_lib.graph.policy import BitPolicy
from hq_lib.graph.rewrite import QuantizedNet, fresh_quantizers, unfitted
from hq_lib.graph.spec import QuantizeError
from hq_lib.graph.state import put, quantizers
from hq_lib.graph.tracing import NodeWatcher, unwrap
from hq_lib.models import CheckpointError, build_recorded, read_checkpoint, write_checkpoint
from hq_lib.results import provenance
from hq_lib.results.hints import check_known

Form = Literal["frozen", "trainable"]
OWN = "own"
_TRACED = ("traced_training", "leaf_modules", "on_refusal")
_OURS = ("form", "policy", "inputs", "graph", "quantizers", "channels_last", *_TRACED)
"""Keys of the record that ``save`` writes itself."""


def save(
    qnet: nn.Module, path: str | os.PathLike, *, form: Form = "frozen", record: Mapping[str, Any] | None = None
) -> Path:
    """Write ``qnet`` to ``path`` and return it; loading gives equal outputs, to the last bit, or nothing is written.

    Args:
        qnet:   from ``graph.quantize``, fitted by whatever method; not changed. Wrappers (``DataParallel``,
                ``torch.compile``) are looked through.
        path:   ends in ``.safetensors``.
        form:   see the module docstring.
        record: what else the file shall say, as plain data. ``model`` (with ``options``, ``n_classes``,
                ``in_channels`` where they are not the defaults of ``models.build``) makes ``load`` build the network;
                without it the network counts as one's own. ``images``: a ``DataSpec`` (mean and std). ``manifest``:
                path of the calibration manifest, kept as name and SHA-256. ``acc_pct``, ``method``, ``dataset`` ... as
                they are. Default: what ``qnet`` was loaded with. Commit and versions are added where absent.

    Raises:
        QuantizeError:   names what cannot be saved: no quantized network, a layer whose quantizer is not fitted,
                         switched off (frozen) or of an unknown kind, real numbers other than float32, or a network that
                         ``record["model"]`` does not build.
        CheckpointError: the path's ending, or a record that is no plain data.
    """
    qnet = unwrap(qnet)
    if not isinstance(qnet, QuantizedNet):
        raise QuantizeError("save takes what graph.quantize returned; models.save_checkpoint takes float networks")
    check_known(form, get_args(Form), "form", error=QuantizeError)
    qnet = copy.deepcopy(qnet).cpu().eval()
    refuse_other_floats(qnet)
    stored = frozen(qnet) if form == "frozen" else qnet
    full = _facts(qnet.record if record is None else record) | _structure(stored, form)
    tensors = tensors_of(stored, full)
    _check_equal(qnet, _again(qnet, tensors, full))
    write_checkpoint(path, tensors, full)
    return Path(path)


def load(path: str | os.PathLike, net: nn.Module | None = None) -> QuantizedNet:
    """Return the network of a file that ``save`` wrote, on the CPU, in eval mode; its ``record`` says where it is from.

    A frozen one has ``FrozenWeight`` and ``FixedGrid`` quantizers, and its ``weight`` is the quantized one: it is
    tested, lowered, exported and measured, but not trained.

    Args:
        path: of the file.
        net:  the float network, for one of one's own: untrained, made as it was when it was quantized; not changed.

    Raises:
        CheckpointError: the file is missing, damaged, or of a float network; it needs ``net``, or ``net`` is not the
                         network that was saved: names the operation or the tensor that differs.
    """
    tensors, record = read_checkpoint(path)
    name = Path(path).name
    if absent := [key for key in _OURS if key not in record]:
        raise CheckpointError(f"{name} holds no quantized network (no {absent[0]} in its record): "
                              "models.load_checkpoint reads float ones")  # fmt: skip
    if net is None and record.get("model", OWN) == OWN:
        raise CheckpointError(f"{name} holds a network of its maker's own ({record.get('class')}): load(path, net=...) "
                              "with that float network, untrained")  # fmt: skip
    try:
        qnet = _skeleton(record, tensors, net)
        restore(qnet, tensors, record)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{name} does not fit the network it is loaded into ({said})") from error
    qnet.meta["record"] = record
    return qnet.eval()


def _facts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's part of the record, with the commit and versions of now where it has none."""
    facts = {key: value for key, value in given.items() if key not in (*_OURS, "sha256")}
    if dataclasses.is_dataclass(facts.get("images")):
        facts["images"] = dataclasses.asdict(facts["images"])  # type: ignore[arg-type]
    if isinstance(manifest := facts.get("manifest"), str | os.PathLike):
        content = Path(manifest).read_bytes()
        facts["manifest"] = {"file": Path(manifest).name, "sha256": hashlib.sha256(content).hexdigest()}
    return {"model": OWN, **provenance.stamp(), **facts}


def _structure(qnet: QuantizedNet, form: Form) -> dict[str, Any]:
    """What the file says of the network's build: enough to build it again, and to know it again."""
    images = [node for node in qnet.graph.nodes if node.op == "placeholder"]
    return {
        "form": form,
        "class": qnet.meta["network"],
        "policy": qnet.policy.to_dict(),
        "inputs": [[*node.meta["shape"][1:]] for node in images],
        "graph": _operations(qnet),
        "quantizers": describe(qnet),
        **{key: qnet.meta[key] for key in _TRACED},
        "channels_last": any(
            p.dim() == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
            for p in qnet.parameters()
        ),
    }


def _again(qnet: QuantizedNet, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> QuantizedNet:
    """The network that loading will give: built by name, or for one's own on the graph of ``qnet`` itself."""
    if record["model"] == OWN:
        again = copy.deepcopy(qnet)
        for name, quantizer in fresh_quantizers(qnet).items():
            put(again, name, quantizer)
    else:
        try:
            again = _skeleton(record, tensors, None)
        except (CheckpointError, ValueError) as error:
            raise QuantizeError(f"record['model'] = {record['model']!r} does not build this network ({error}); leave "
                                "it out to save it as one of your own") from error  # fmt: skip
    restore(again, tensors, record)
    return again.eval()


@torch.no_grad()
def _check_equal(qnet: QuantizedNet, again: QuantizedNet) -> None:
    """Raise ``QuantizeError`` that names the first operation whose values differ; unfitted networks compute nothing."""
    if not all(bool(q.initialised) for q in quantizers(qnet).values()):
        return
    images = [node for node in qnet.graph.nodes if node.op == "placeholder"]
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, *node.meta["shape"][1:], generator=generator) for node in images]
    values: dict[str, Any] = {}
    NodeWatcher(again, lambda node, value: values.update({node.name: value})).run(*x)

    def look(node: fx.Node, value: Any) -> None:
        other = values.get(node.name, value)  # of a float tensor only the one may have a node
        if isinstance(value, Tensor) and not torch.equal(value.nan_to_num(), other.nan_to_num()):
            raise QuantizeError(f"{node.name!r} would compute other values from the file: nothing was written")

    NodeWatcher(qnet, look).run(*x)


def _operations(qnet: QuantizedNet) -> list[str]:
    """The float network as text, one operation a line: what has to be the same in the network that is loaded into."""
    lines = []
    for node in qnet.graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", type(node.target))
        if node.op == "call_module":
            module = qnet.get_submodule(str(node.target))
            if str(node.target).endswith(QUANTIZER_SUFFIX):
                continue
            own = f"{type(module).__name__}({module.extra_repr()})" if isinstance(module, QuantizedWeight) else module
            target = f"{target} {own}"
        lines.append(f"{node.name} = {node.op} {target} {node.args} {node.kwargs}".replace(QUANTIZER_SUFFIX, ""))
    return lines


def _comparable(line: str) -> str:
    """An operation without what may differ: a correction may have given a bias, an older file has views as such."""
    return re.sub(r", bias=(True|False)", "", line).replace(" call_method view ", " call_method reshape ")


@torch.random.fork_rng(devices=[])  # what building draws is not the caller's concern
def _skeleton(record: Mapping[str, Any], tensors: Mapping[str, Tensor], net: nn.Module | None) -> QuantizedNet:
    """The network of a record, quantized and unfitted: ``net``, or the one of the name in the record."""
    net = build_recorded(record, tensors) if net is None else copy.deepcopy(unwrap(net))
    example = tuple(torch.zeros(1, *shape) for shape in record["inputs"])
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()  # so that no fold is exact by the luck of a shift that is still 0
    traced = {key: record[key] for key in ("leaf_modules", "on_refusal")}
    net, policy = net.cpu().train(record["traced_training"]), BitPolicy.from_dict(record["policy"])
    qnet = unfitted(net, policy, example, **traced)
    ours, theirs = ([_comparable(line) for line in lines] for lines in (_operations(qnet), record["graph"]))
    if ours != theirs:
        here, saved = next((a, b) for a, b in zip_longest(ours, theirs, fillvalue="nothing more") if a != b)
        raise CheckpointError(
            f"the network that was saved computes {saved!r} where this one computes {here!r}: give the float network "
            f"as it was when it was quantized (saved under {record.get('versions')})"
        )
    return qnet
