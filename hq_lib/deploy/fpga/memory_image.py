"""Memory images for FPGA block RAM, hex (Verilog ``$readmemh``) or coe (Xilinx), with a manifest that explains them.

    folder/manifest.json          layers, their numbers, and of each image: file, dtype, shape, order, words, SHA-256
    folder/00_conv1_weight.hex    one word a line, in address order

A value is two's complement in its dtype's width. A word holds ``word_bits / value bits`` values, the first in the
lowest bits; the last word is filled with 0. Values follow C order: the last axis of the shape runs fastest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hq_lib.deploy.fpga.formats import read_file
from hq_lib.deploy.fpga.layers import MAX_ELEMENTS, FpgaiError, need, plain_name
from hq_lib.deploy.fpga.memory import DTYPES, ROLES, LayerMemory
from hq_lib.results.atomic import write_bytes, write_text

Encoding = Literal["hex", "coe"]
MANIFEST = "manifest.json"
FORMAT, SCHEMA = "hq_lib memory images", 1
MAX_MANIFEST = 64 << 20
MAX_LAYERS = 10_000
_ORDER = "C: last axis fastest"
_COE = ("memory_initialization_radix=16;\nmemory_initialization_vector=\n", ",\n", ";\n")
_HEX = ("", "\n", "\n")
_IMAGE_KEYS = {"file", "dtype", "shape", "order", "word_bits", "values_per_word", "n_words", "sha256"}


def write_images(
    layers: Sequence[LayerMemory], folder: Path | str, *, encoding: Encoding = "hex", word_bits: int | None = None
) -> Path:
    """Write an image per array and the manifest last; return the manifest's path.

    Args:
        layers:    from ``memories_of``.
        folder:    made if absent; files of the same names are replaced.
        encoding:  "hex" or "coe".
        word_bits: bits of a memory word, a multiple of every array's width; None: each array's own width.

    Raises:
        FpgaiError: a width that does not divide the word, or an array of another dtype; names the layer.
    """
    need(encoding in ("hex", "coe"), f"encoding {encoding!r}: 'hex' or 'coe'")
    entries, files = [], {}
    for i, layer in enumerate(layers):
        images = {}
        for role, array in layer.arrays.items():
            need(role in ROLES and array.dtype.name in DTYPES, f"layer {layer.name!r}: {role!r} of {array.dtype}")
            file = f"{i:03d}_{re.sub(r'[^A-Za-z0-9_]', '_', layer.name)[:80]}_{role}.{encoding}"
            width = _word_bits(array.dtype, word_bits, f"layer {layer.name!r}, {role}")
            files[file] = content = encode(array, encoding=encoding, word_bits=width)
            images[role] = {"file": file, **_describe(array, width), "sha256": hashlib.sha256(content).hexdigest()}
        entries.append({"name": layer.name, "parameters": layer.parameters, "images": images})
    for file, content in files.items():
        write_bytes(Path(folder) / file, content)
    body = {"format": FORMAT, "schema": SCHEMA, "encoding": encoding, "layers": entries}
    write_text(Path(folder) / MANIFEST, json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n")
    return Path(folder) / MANIFEST


def read_images(folder: Path | str) -> tuple[LayerMemory, ...]:
    """Return the layers whose images lie in ``folder``, every file verified against the manifest.

    Raises:
        FpgaiError: a manifest or image that is absent, altered, truncated, of another size than its shape asks, or a
            file name that leads out of the folder; names it.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        body = _read_manifest(path)
        layers = _typed(body["layers"], list, "layers")
        need(len(layers) <= MAX_LAYERS, f"over {MAX_LAYERS} layers")
        return tuple(_read_layer(folder, entry, body["encoding"]) for entry in layers)
    except FpgaiError as error:
        raise FpgaiError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise FpgaiError(f"{path}: not a manifest of memory images ({type(error).__name__}: {error!s:.120})") from error


def encode(array: np.ndarray, *, encoding: Encoding, word_bits: int) -> bytes:
    """Return the text of an image of ``array`` (integers, any shape) in words of ``word_bits``."""
    data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).reshape(-1).view(np.uint8)
    n_bytes = word_bits // 8
    padded = np.zeros(-(-data.size // n_bytes) * n_bytes, np.uint8)
    padded[: data.size] = data
    digits = padded.reshape(-1, n_bytes)[:, ::-1].tobytes().hex()  # highest byte of a word first
    words = (digits[i : i + 2 * n_bytes] for i in range(0, len(digits), 2 * n_bytes))
    head, between, end = _HEX if encoding == "hex" else _COE
    return (head + between.join(words) + end).encode("ascii")


def decode(content: bytes, dtype: str, shape: tuple[int, ...], *, encoding: Encoding, word_bits: int) -> np.ndarray:
    """Return the array of an image that ``encode`` made; ``FpgaiError`` unless ``content`` has exactly that form."""
    kind, n = np.dtype(dtype).newbyteorder("<"), math.prod(shape)
    n_bytes = word_bits // 8
    n_words = -(-n * kind.itemsize // n_bytes)
    head, between, end = _HEX if encoding == "hex" else _COE
    size = len(head) + n_words * 2 * n_bytes + (n_words - 1) * len(between) + len(end)
    need(len(content) == size, f"{len(content):,} bytes, shape {shape} needs {size:,}: truncated or of another array")
    text = content.decode("ascii")
    words = text[len(head) : len(text) - len(end)].split(between)
    form = text.startswith(head) and text.endswith(end) and {len(word) for word in words} == {2 * n_bytes}
    need(form and len(words) == n_words, f"not {n_words:,} words of {word_bits} bits in the {encoding} form")
    data = np.frombuffer(bytes.fromhex("".join(words)), np.uint8).reshape(n_words, n_bytes)[:, ::-1].reshape(-1)
    need(not data[n * kind.itemsize :].any(), "the end of its last word is not 0")
    return data[: n * kind.itemsize].copy().view(kind).astype(dtype).reshape(shape)


def _word_bits(dtype: np.dtype[Any], word_bits: int | None, what: str) -> int:
    own = 8 * dtype.itemsize
    width = own if word_bits is None else word_bits
    fits = type(width) is int and 0 < width <= 4096 and width % own == 0
    need(fits, f"{what}: words of {width!r:.40} bits do not hold whole values of {own} bits (at most 4096)")
    return width


def _describe(array: np.ndarray, word_bits: int) -> dict[str, Any]:
    per_word = word_bits // (8 * array.dtype.itemsize)
    counts = {"values_per_word": per_word, "n_words": -(-array.size // per_word)}
    return {"dtype": array.dtype.name, "shape": [*array.shape], "order": _ORDER, "word_bits": word_bits, **counts}


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    content = read_file(path)
    need(len(content) <= MAX_MANIFEST, f"larger than {MAX_MANIFEST:,} bytes")
    body = _typed(json.loads(content, parse_constant=_refuse), dict, "its content")
    known = (body.get("format"), body.get("schema")) == (FORMAT, SCHEMA)
    need(known, f"it is {body.get('format')!r:.60}, schema {body.get('schema')!r:.20}; not {FORMAT!r}, schema {SCHEMA}")
    need(body.pop("sha256", None) == _digest(body), "it was altered after it was written (SHA-256 differs)")
    need(body["encoding"] in ("hex", "coe"), f"encoding {body['encoding']!r:.40}")
    return body


def _refuse(text: str) -> Any:
    raise FpgaiError(f"it holds {text}")


def _read_layer(folder: Path, entry: dict[str, Any], encoding: Encoding) -> LayerMemory:
    name = _typed(entry["name"], str, "a layer's name")
    images = _typed(entry["images"], dict, f"images of {name!r:.80}")
    need(set(images) <= set(ROLES), f"layer {name!r:.80}: unknown images {sorted(set(images) - set(ROLES))!r:.80}")
    arrays = {}
    for role, image in images.items():
        try:
            arrays[role] = _read_image(folder, image, encoding)
        except (FpgaiError, UnicodeDecodeError) as error:
            raise FpgaiError(f"layer {name!r:.80}, {role}: {error}") from error
    return LayerMemory(name, _typed(entry["parameters"], dict, f"parameters of {name!r:.80}"), arrays)


def _read_image(folder: Path, image: dict[str, Any], encoding: Encoding) -> np.ndarray:
    need(set(_typed(image, dict, "an image")) == _IMAGE_KEYS, f"an image has the keys {sorted(_IMAGE_KEYS)}")
    dtype, shape = image["dtype"], tuple(_typed(image["shape"], list, "shape"))
    need(dtype in DTYPES, f"dtype {dtype!r:.40}: one of {', '.join(DTYPES)}")
    sized = 0 < len(shape) <= 8 and all(type(n) is int and 1 <= n <= MAX_ELEMENTS for n in shape)
    need(sized and math.prod(shape) <= MAX_ELEMENTS, f"shape {shape!r:.80}")
    word_bits = _word_bits(np.dtype(dtype), image["word_bits"], "image")
    path = _inside(folder, image["file"])
    content = read_file(path)
    array = decode(content, dtype, shape, encoding=encoding, word_bits=word_bits)
    same = hashlib.sha256(content).hexdigest() == image["sha256"]
    need(same, f"{path.name}: its bytes are not those that were written (SHA-256 differs)")
    said = {key: value for key, value in image.items() if key not in ("file", "sha256")}
    need(said == _describe(array, word_bits), f"{path.name}: order or word counts are not those of its shape")
    return array


def _inside(folder: Path, file: object) -> Path:
    path = folder / plain_name(file, "an image's file")
    need(path.resolve().parent == folder.resolve(), f"{path.name}: a link that leads out of the folder")
    return path


def _typed(value: Any, kind: type, what: str) -> Any:
    need(type(value) is kind, f"{what}: a {kind.__name__} belongs here, not {type(value).__name__}")
    return value
