"""Seed 002's ``{name}_quant.tuple``: ``torch.save((state_dict, quant_list))`` read and written without torch.

Such a file is a zip of raw storages and a pickle that arranges them. The pickle is never unpickled: see
``saved_state``.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hq_lib.deploy.fpga.formats import Quant, read_file
from hq_lib.deploy.fpga.layers import FpgaiError, FpgaiLayer, FpgaiNet, Stage, check_quant, need
from hq_lib.deploy.fpga.saved_state import STORAGES, run_pickle
from hq_lib.results.atomic import write_bytes

GAIN = 255
"""Activation steps per unit. The seed's last Python uses 255; its NumPy program and its shipped files use 256."""
MAX_PICKLE = 8 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNREADABLE = (
    zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error,
    NotImplementedError, RuntimeError, OverflowError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TupleFile:
    """What a ``.tuple`` holds, as it stands there."""

    state: dict[str, np.ndarray]
    """"c1.weight" int32 (values 0..255) and "c1.bias" float32 real units, in layer order"""
    quant: tuple[Quant, ...]
    """(multiplier, shift, zero_point) of each layer"""


def read_tuple(path: Path | str) -> TupleFile:
    """Return the arrays and numbers in the file ``path``; tensors saved on a GPU are read like any.

    Raises:
        FpgaiError: not such a file, truncated, or a pickle that asks for anything but arrays and numbers; names it.
    """
    content = read_file(Path(path))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _decode(archive, len(content))
    except FpgaiError as error:
        raise FpgaiError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise FpgaiError(f"{path}: not a readable .tuple ({type(error).__name__}: {error!s:.120})") from error


def write_tuple(contents: TupleFile, path: Path | str) -> Path:
    """Write ``contents`` to ``path`` (torch.load reads it, weights_only=True too) and return the path."""
    path = Path(path)
    need(path.suffix == ".tuple", f"{path}: these files are named *.tuple")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        members = {"data.pkl": _pickle(contents), "byteorder": b"little", "version": b"3\n"}
        members |= {f"data/{i}": _storage(value)[1] for i, value in enumerate(contents.state.values())}
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), data)
    write_bytes(path, buffer.getvalue())
    return path


def net_of(contents: TupleFile, stages: tuple[Stage, ...], *, gain: int = GAIN) -> FpgaiNet:
    """Return the network in ``contents``: bias = rint(bias_real gain / (m 2^-shift)).

    Args:
        contents: from ``read_tuple``.
        stages:   shapes and order; layers are matched by position, and called as the stages are.
        gain:     255 (exact), or 256 as in the seed's NumPy program and shipped ``lenet_bias.bin``.

    Raises:
        FpgaiError: another number of layers, other shapes, weights outside 0..255; names the layer.
    """
    weights = [key for key in contents.state if key.endswith(".weight")]
    counts = (len(weights), len(contents.state) - len(weights), len(contents.quant))
    need(set(counts) == {len(stages)}, f"{counts} weights, biases and quant triples for {len(stages)} stages")
    layers = []
    for stage, key, quant in zip(stages, weights, contents.quant, strict=True):
        check_quant(*quant, f"layer {stage.name!r}")
        w, b = contents.state[key], contents.state.get(f"{key.removesuffix('.weight')}.bias")
        is_byte = w.dtype.kind in "iu" and w.min(initial=0) >= 0 and w.max(initial=0) <= 255
        need(is_byte, f"{key!r}: weights that are not integers in 0..255")
        if b is None or b.shape != stage.shape[:1] or w.shape != stage.shape:
            found = "no bias" if b is None else f"bias {b.shape}"
            raise FpgaiError(f"{key!r} is {w.shape} with {found}; stage {stage.name!r} needs {stage.shape}")
        layers.append(FpgaiLayer(stage.name, w.astype(np.uint8), bias_integers(b, quant, gain, key), *quant))
    return FpgaiNet(stages, tuple(layers))


def tuple_of(net: FpgaiNet, *, gain: int = GAIN) -> TupleFile:
    """Return ``net`` as a ``.tuple`` holds it: int32 weights, real biases bias (m 2^-shift) / gain in float32."""
    state: dict[str, np.ndarray] = {}
    for layer in net.layers:
        state[f"{layer.name}.weight"] = layer.weight.astype(np.int32)
        state[f"{layer.name}.bias"] = (layer.bias * layer.scale / gain).astype(np.float32)
    return TupleFile(state, tuple((x.multiplier, x.shift, x.zero_point) for x in net.layers))


def bias_integers(bias: np.ndarray, quant: Quant, gain: float, what: str) -> np.ndarray:
    """Return rint(bias gain / (m 2^-shift)), int32 (C_out,), of real biases; ``FpgaiError`` beyond int32."""
    steps = np.rint(np.ldexp(bias.astype(np.float64) * gain / quant[0], quant[1]))
    fits = bool(np.all(np.isfinite(steps))) and np.abs(steps).max(initial=0) < 2**31
    need(fits, f"{what!r}: a bias is not finite or exceeds int32 accumulator steps")
    return steps.astype(np.int32)


def _decode(archive: zipfile.ZipFile, size: int) -> TupleFile:
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.endswith("data.pkl")]
    need(len(pickles) == 1 and infos[pickles[0]].file_size <= MAX_PICKLE, "it holds no data.pkl, or a huge one")
    stored = all(i.compress_type == zipfile.ZIP_STORED and i.file_size <= size for i in infos.values())
    need(stored, "its members are compressed, or larger than the file")
    prefix = pickles[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    need(order not in infos or archive.read(order) == b"little", "it was saved on a big-endian machine")
    result = run_pickle(archive, prefix, archive.read(pickles[0]))
    kinds = [type(part) for part in result] if isinstance(result, tuple) else []
    need(kinds == [dict, list], "it holds no (state_dict, list)")
    state, numbers = result
    need(all(isinstance(v, np.ndarray) for v in state.values()), "its state dict holds more than tensors")
    need(all(type(n) is int for n in numbers) and len(numbers) % 3 == 0, "its list is not made of integer triples")
    return TupleFile(state, tuple(tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3)))


def _storage(value: np.ndarray) -> tuple[str, bytes]:
    """Return torch's storage name and the bytes of ``value``."""
    for name, dtype in STORAGES.items():
        if value.dtype == np.dtype(dtype):
            return name, np.ascontiguousarray(value).astype(dtype).tobytes()
    raise FpgaiError(f"a .tuple holds uint8, int32, int64 or float32, not {value.dtype}")


def _pickle(contents: TupleFile) -> bytes:
    items = b"".join(_text(k) + _tensor_code(v, str(i)) for i, (k, v) in enumerate(contents.state.items()))
    numbers = b"".join(_int(n) for triple in contents.quant for n in triple)
    return b"\x80\x02" + _EMPTY_ORDERED + b"(" + items + b"u](" + numbers + b"e\x86."


_EMPTY_ORDERED = b"ccollections\nOrderedDict\n)R"


def _tensor_code(value: np.ndarray, key: str) -> bytes:
    module, name = _storage(value)[0].split(" ")
    storage = f"c{module}\n{name}\n".encode()
    place = b"(" + _text("storage") + storage + _text(key) + _text("cpu") + _int(value.size) + b"tQ"
    strides = [math.prod(value.shape[i + 1 :]) for i in range(value.ndim)]
    sizes = b"".join(b"(" + b"".join(map(_int, part)) + b"t" for part in (value.shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + _int(0) + sizes + b"\x89" + _EMPTY_ORDERED + b"tR"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)
