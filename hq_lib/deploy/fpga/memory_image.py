"""Memory images for FPGA block RAM, hex (Verilog ``$readmemh``) or coe (Xilinx): a whole record, every operation of it.

    folder/manifest.json              the record (tensors, operations in order, each array as a key), and of each array:
                                      file, dtype, shape, bits, step, words, SHA-256
    folder/003_conv1_weight.hex       one word a line, in address order

An array is stored at its own width: its integers are divided by ``step``, the largest power of two that divides all of
them (weights of few bits fill int8, see ``record.Layer.weight``), and the quotients have the fewest ``bits`` that hold
them, two's complement where any is negative: 4-bit weights take 4 bits. float32 numbers are their 32 bits. A word holds
``word_bits // bits`` values, the first in the lowest bits; the rest of a word is 0. Values follow C order: the last
axis of the shape runs fastest. ``narrowed`` makes multipliers narrower first.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hq_lib.deploy.fpga.formats import read_file
from hq_lib.deploy.fpga.fpgai import FpgaiError, need, plain_name
from hq_lib.integer import record as r
from hq_lib.integer import storage
from hq_lib.integer.arithmetic import RecordError
from hq_lib.integer.check import check
from hq_lib.integer.record import IntegerModel, Op, Requant
from hq_lib.results.atomic import write_bytes, write_text
from hq_lib.results.bits import bits_of, integers_of

Encoding = Literal["hex", "coe"]
MANIFEST = "manifest.json"
FORMAT, SCHEMA = "hq_lib memory images", 2
MAX_MANIFEST = 64 << 20
MAX_WORD_BITS = 4096
_COE = ("memory_initialization_radix=16;\nmemory_initialization_vector=\n", ",\n", ";\n")
_HEX = ("", "\n", "\n")
_IMAGE_KEYS = {"file", "dtype", "shape", "bits", "signed", "step", "word_bits", "values_per_word", "n_words", "sha256"}


def write_images(
    model: IntegerModel, folder: Path | str, *, encoding: Encoding = "hex", word_bits: int | None = None
) -> Path:
    """Write an image of every array of ``model`` and the manifest last; return the manifest's path.

    Args:
        model:     a record; for logic without floats, one with the "fixed" requantizer.
        folder:    made if absent; files of the same names are replaced.
        encoding:  "hex" or "coe".
        word_bits: bits of a memory word, at least every array's width; None: one value a word, as wide as it is.

    Raises:
        FpgaiError: a word too narrow for an array, which is named. RecordError: the record is inconsistent.
    """
    need(encoding in ("hex", "coe"), f"encoding {encoding!r}: 'hex' or 'coe'")
    plain, arrays = storage.to_plain(model)
    images, files = {}, {}
    for key, array in arrays.items():
        like = _layout(array, word_bits, key)
        file = f"{_file_stem(key, model)}.{encoding}"
        values = array.view(np.uint32) if array.dtype == np.float32 else array.astype(np.int64) // like["step"]
        files[file] = content = encode(values, like["bits"], like["word_bits"], encoding)
        images[key] = {"file": file, **like, "sha256": hashlib.sha256(content).hexdigest()}
    for file, content in files.items():
        write_bytes(Path(folder) / file, content)
    body = {"format": FORMAT, "schema": SCHEMA, "encoding": encoding, **plain, "images": images}
    write_text(Path(folder) / MANIFEST, json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n")
    return Path(folder) / MANIFEST


def read_images(folder: Path | str) -> IntegerModel:
    """Return the record whose images lie in ``folder``, rebuilt from them alone: ``integer.run`` executes it.

    Raises:
        FpgaiError: a manifest or image that is absent, altered, truncated, of another size than its shape asks, a file
            name that leads out of the folder, or a record that is inconsistent; names it.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        body = _read_manifest(path)
        arrays = {}
        for key, image in body["images"].items():
            try:
                arrays[key] = _decoded(folder, image, body["encoding"])
            except (FpgaiError, RecordError, UnicodeDecodeError) as error:
                raise FpgaiError(f"array {key!r:.80}: {error}") from error
        return storage.from_plain(body, arrays)
    except (FpgaiError, RecordError) as error:
        raise FpgaiError(f"{path}: {error}") from error
    except storage.UNREADABLE as error:
        raise FpgaiError(f"{path}: not a manifest of memory images ({type(error).__name__}: {error!s:.120})") from error


def encode(values: np.ndarray, bits: int, word_bits: int, encoding: Encoding) -> bytes:
    """Return the text of an image of integer ``values`` (any shape), ``bits`` each, in words of ``word_bits``."""
    per_word, n_digits = word_bits // bits, -(-word_bits // 4)
    flat = values.reshape(-1).astype(np.int64)
    ones = bits_of(np.append(flat, np.zeros(-flat.size % per_word, np.int64)), bits).reshape(-1, per_word * bits)
    rows = np.packbits(ones, axis=1, bitorder="little")[:, ::-1]  # the highest byte of a word first
    head, between, end = _HEX if encoding == "hex" else _COE
    words = (row.tobytes().hex().zfill(n_digits)[-n_digits:] for row in rows)
    return (head + between.join(words) + end).encode("ascii")


def decode(content: bytes, n: int, bits: int, word_bits: int, encoding: Encoding, *, signed: bool) -> np.ndarray:
    """Return the int64 (n,) values of an image that ``encode`` made; ``FpgaiError`` unless it has exactly that form."""
    head, between, end = _HEX if encoding == "hex" else _COE
    per_word, n_digits = word_bits // bits, -(-word_bits // 4)
    n_words = -(-n // per_word)
    size = len(head) + n_words * n_digits + (n_words - 1) * len(between) + len(end)
    need(len(content) == size, f"{len(content):,} bytes, {n:,} values need {size:,}: truncated or of another array")
    text = content.decode("ascii")
    words = text[len(head) : len(text) - len(end)].split(between)
    form = text.startswith(head) and text.endswith(end) and len(words) == n_words
    form = form and all(len(word) == n_digits for word in words) and re.fullmatch("[0-9a-f]+", "".join(words))
    need(bool(form), f"not {n_words:,} words of {word_bits} bits in the {encoding} form")
    raw = bytes.fromhex("".join(word.zfill(n_digits + n_digits % 2) for word in words))
    rows = np.frombuffer(raw, np.uint8).reshape(n_words, -1)[:, ::-1]
    ones = np.unpackbits(rows, axis=1, bitorder="little")
    need(not ones[:, per_word * bits :].any(), "the end of a word is not 0")
    values = integers_of(ones[:, : per_word * bits].reshape(-1, bits), signed=signed)
    need(not values[n:].any(), "the end of its last word is not 0")
    return values[:n]


def _layout(array: np.ndarray, word_bits: int | None, what: str) -> dict[str, Any]:
    """Return how ``array`` is stored: its width, the step that its integers are multiples of, and its words."""
    step, bits, signed = (1, 32, False) if array.dtype == np.float32 else storage.narrowest(array)
    width = bits if word_bits is None else word_bits
    _check_words(bits, width, what)
    counts = {"values_per_word": width // bits, "n_words": -(-array.size // (width // bits))}
    shape = {"dtype": array.dtype.name, "shape": [*array.shape]}
    return {**shape, "bits": bits, "signed": signed, "step": step, "word_bits": width, **counts}


def _check_words(bits: object, word_bits: object, what: str) -> None:
    sound = type(bits) is int and type(word_bits) is int and 1 <= bits <= 32 and bits <= word_bits <= MAX_WORD_BITS
    need(sound, f"{what}: words of {word_bits!r:.40} bits do not hold values of {bits!r:.40} bits (at most 4096)")


def _file_stem(key: str, model: IntegerModel) -> str:
    """Return "003_conv1_weight" for "op3.weight", "tensor_003_scale" for "tensor.3.scale"."""
    first, _, rest = key.partition(".")
    if first == "tensor":
        number, _, rest = rest.partition(".")
        return f"tensor_{int(number):03d}_{rest}"
    number = int(first.removeprefix("op"))
    name = re.sub(r"[^A-Za-z0-9_]", "_", model.ops[number].name)[:80]
    return f"{number:03d}_{name}_{rest.replace('.', '_')}"


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    content = read_file(path)
    need(len(content) <= MAX_MANIFEST, f"larger than {MAX_MANIFEST:,} bytes")
    body = storage.read_manifest(content, FORMAT, SCHEMA)
    need(body.pop("sha256", None) == _digest(body), "it was altered after it was written (SHA-256 differs)")
    need(body["encoding"] in ("hex", "coe"), f"encoding {body['encoding']!r:.40}")
    return body


def _decoded(folder: Path, image: dict[str, Any], encoding: Encoding) -> np.ndarray:
    need(isinstance(image, dict) and image.keys() == _IMAGE_KEYS, f"an image has the keys {sorted(_IMAGE_KEYS)}")
    shape, dtype, step = storage.shape_of(image), image["dtype"], image["step"]
    need(type(step) is int and 1 <= step <= 2**31, f"step {step!r:.40}")
    bits, word_bits = image["bits"], image["word_bits"]
    _check_words(bits, word_bits, "image")
    path = folder / plain_name(image["file"], "an image's file")
    need(path.resolve().parent == folder.resolve(), f"{path.name}: a link that leads out of the folder")
    content = read_file(path)
    values = decode(content, math.prod(shape), bits, word_bits, encoding, signed=image["signed"] is True)
    same = hashlib.sha256(content).hexdigest() == image["sha256"]
    need(same, f"{path.name}: its bytes are not those that were written (SHA-256 differs)")
    if dtype == "float32":
        array = values.astype(np.uint32).view(np.float32).reshape(shape)
    else:
        ends = np.iinfo(dtype)
        fits = ends.min <= values.min() * step and values.max() * step <= ends.max
        need(fits, f"{path.name}: its values do not fit {dtype}")
        array = (values * step).astype(dtype).reshape(shape)
    said = {name: value for name, value in image.items() if name not in ("file", "sha256")}
    need(
        said == _layout(array, word_bits, "image"),
        f"{path.name}: bits, step or word counts are not those of its values",
    )
    return array


def narrowed(model: IntegerModel, bits: int) -> tuple[IntegerModel, float]:
    """Return ``model`` with multipliers of at most ``bits`` bits, for one DSP slice each, and their largest error.

        M' = round(M / 2^d), S' = S - d,   d the least with M' < 2^bits, for both multipliers of a sum

    The error is |M' 2^-S' - M 2^-S| / (M 2^-S), a fraction: at most 2^-bits where a multiplier stands alone; the
    smaller one of two that share a shift keeps fewer bits. The logits are another network's, by about that much.

    Args:
        model: a record with the "fixed" requantizer.
        bits:  8..31.

    Raises:
        FpgaiError: a "float32" record, other bits, or a multiplier that cannot shrink (its shift is too small).
    """
    need(model.requantizer == "fixed", "narrow multipliers are integers: lower with requantizer='fixed'")
    need(type(bits) is int and 8 <= bits <= 31, f"{bits!r:.40} bits of multipliers: 8 to 31")
    errors = [0.0]
    ops = tuple(_narrow_op(op, bits, errors) for op in model.ops)
    return check(replace(model, ops=ops)), max(errors)


def _narrow_op(op: Op, bits: int, errors: list[float]) -> Op:
    requants = r.requants_of(op)
    if not requants:
        return op
    narrow = _narrow(requants, bits, errors, op.name)
    if isinstance(op, r.Add):
        return replace(op, requants=narrow)
    if isinstance(op, r.Layer) and op.residual is not None:
        return replace(op, requant=narrow[0], residual=replace(op.residual, requant=narrow[1]))
    return replace(op, requant=narrow[0])  # type: ignore[call-arg]


def _narrow(requants: Sequence[Requant], bits: int, errors: list[float], name: str) -> tuple[Requant, ...]:
    wide = np.stack([requant.fixed for requant in requants]).astype(np.int64)
    drop = np.zeros(wide.shape[1], np.int64)
    while ((narrow := (wide + (1 << drop >> 1)) >> drop) >= 2**bits).any():
        drop += (narrow >= 2**bits).any(0)
    shift = requants[0].shift.astype(np.int64) - drop
    need(bool((shift >= 1).all()), f"{name!r}: its multiplier is too large for {bits} bits and a right shift")
    exact = wide.astype(np.float64)
    errors.append(float((np.abs(np.ldexp(narrow, drop) - exact) / np.maximum(exact, 1)).max()))
    return tuple(
        replace(requant, fixed=m.astype(np.int32), shift=shift.astype(np.uint8))
        for requant, m in zip(requants, narrow, strict=True)
    )
