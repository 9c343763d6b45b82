"""Weights that others published.

Nothing is ever unpickled from a stranger: ``.th``/``.pt`` files are read with ``weights_only=True``, which refuses
anything but tensors and plain containers.
"""

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hq_lib.data import sources
from hq_lib.models.small import ResNet
from hq_lib.results import paths

WRAPPERS = r"^((module|_orig_mod)\.)+"  # the prefixes that DataParallel and torch.compile leave
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def load_state(net: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Loads a state of exactly this network's keys and shapes, else ``CheckpointError`` listing the differences.

    Prefixes of wrappers (``module.``, ``_orig_mod.``) are taken off.
    """
    own = net.state_dict()
    if not state.keys() & own.keys():  # a network may have a module of that name
        state = {re.sub(WRAPPERS, "", key): value for key, value in state.items()}
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}  # not in older files
    try:
        net.load_state_dict({**counters, **state})
    except RuntimeError as error:
        listed = " ".join(f"{line.strip():.240}" for line in str(error).splitlines()[1:])
        raise CheckpointError(f"{source} is not a checkpoint of this {type(net).__name__}; {listed:.2000}") from error


def load_public(path: str | os.PathLike, net: nn.Module, *, renamed: Callable[[str], str] = str) -> nn.Module:
    """``net`` with the weights of a public ``.th`` or ``.pt`` file.

    Args:
        path:    holds a state dict, alone or under the key ``state_dict``.
        net:     the network that the file belongs to; changed in place.
        renamed: from a key of the file to the network's; prefixes of wrappers go anyway.

    Raises:
        CheckpointError: unreadable, wants to run code, or a checkpoint of another network (keys listed).
    """
    path = Path(path)
    try:
        content = unpickled(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        held = (
            f"keys {', '.join(map(repr, [*state][:8]))}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        )
        raise CheckpointError(f"{path} holds no state dict of names and tensors, at the top or under 'state_dict', but "
                              f"{held}: save the one entry that is one to a file of its own")  # fmt: skip
    load_state(net, {renamed(key): value for key, value in state.items()}, source=Path(path).name)
    return net


def unpickled(content: bytes, name: object) -> Any:
    """What ``torch.save`` wrote: tensors, all on the CPU, numbers and plain containers of them. Nothing in it is run.

    Raises:
        CheckpointError: it asks for anything else, or is damaged, in whatever way; called by ``name``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of other pickle protocols, which are refused or harmless
            return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:  # its own text recommends to load the file all the same
        raise CheckpointError(f"{name} asks for more than tensors and numbers: refused, nothing was run") from error
    except Exception as error:  # damaged bytes come out of torch's reader as a dozen types
        said = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{name} is not a readable file of tensors ({type(error).__name__}: {said:.160})"
        ) from error


def fetched(url: str) -> Path:
    """The file of a URL that ends in ``#sha256=...``, fetched once into the data cache, its hash checked."""
    address, _, digest = url.partition("#sha256=")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CheckpointError(f"weights: {url} lacks the file's hash: write {address}#sha256=<64 hexadecimal digits>")
    folder = paths.cache_dir() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    return sources.download(address, f"sha256:{digest}", folder)


def resnet20_akamaster(path: str | os.PathLike) -> nn.Module:
    """The public ResNet-20 with option-A shortcuts (akamaster/pytorch_resnet_cifar10), eval mode.

    It was trained with ImageNet's mean and standard deviation: on ``test.normalized_by(*IMAGENET_MEAN_STD)`` it gives
    91.73 %.
    """
    return load_public(path, ResNet(20, option="A")).eval()
