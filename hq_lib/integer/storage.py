"""``to_bytes`` and ``load``: a record as one ``.npz`` of plain arrays with its JSON manifest inside, for NumPy alone.

The file is a zip: ``manifest.json`` (schema, tensors, operations, and each array's dtype, shape and SHA-256) and one
``<key>.npy`` per array. A weight whose integers, divided by their largest common power of two
(``step``), fit fewer ``bits`` than its dtype is stored in so many, two's complement, the first value in the lowest bits
of the first byte. The same record gives the same bytes. ``load`` trusts nothing: no pickles, sizes checked before
anything is read, hashes and the whole record checked after.
"""

import dataclasses
import hashlib
import io
import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, get_args, get_origin, get_type_hints

import numpy as np

from hq_lib.integer import record
from hq_lib.integer.arithmetic import RecordError
from hq_lib.integer.check import MAX_ELEMENTS, check
from hq_lib.integer.record import IntegerModel, TensorSpec
from hq_lib.results.bits import pack, unpack

MANIFEST = "manifest.json"
FORMAT = "hq_lib integer model"
MAX_MANIFEST = 64 << 20
DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "float32")
_OPS = {kind.__name__: kind for kind in record.OPS}
_EPOCH = (1980, 1, 1, 0, 0, 0)
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError,
    NotImplementedError, RuntimeError, RecursionError, OverflowError, MemoryError,
)  # fmt: skip


def to_bytes(model: IntegerModel) -> bytes:
    """Return ``model`` as the content of a ``.npz`` file. Raises RecordError: it is inconsistent (see ``check``)."""
    plain, arrays = to_plain(model)
    entries: dict[str, Any] = {"format": FORMAT, "schema": record.SCHEMA, **plain}
    entries["arrays"], stored = {}, {}
    for key, value in arrays.items():
        step, bits, signed = narrowest(value) if key.endswith(".weight") else (1, 64, True)
        packed = {"bits": bits + (not signed), "step": step} if bits + (not signed) < 8 * value.itemsize else {}
        stored[key] = pack(value.reshape(-1).astype(np.int64) // step, packed["bits"]) if packed else value
        digest = hashlib.sha256(stored[key].tobytes()).hexdigest()
        entries["arrays"][key] = {"dtype": value.dtype.name, "shape": [*value.shape], **packed, "sha256": digest}
    buffer = io.BytesIO()
    members: dict[str, str | bytes] = {MANIFEST: json.dumps(entries, indent=1, allow_nan=False)}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (members | {f"{key}.npy": _npy(value) for key, value in stored.items()}).items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def narrowest(array: np.ndarray) -> tuple[int, int, bool]:
    """Return (step, bits, signed): the integers are multiples of ``step``, and their quotients fit ``bits``.

    Two's complement where any is negative; ``step`` is the largest common power of two (weights of few bits fill int8).
    """
    step = record.power_of_two(array)
    low, high = int(array.min()) // step, int(array.max()) // step
    if low < 0:
        return step, max(high.bit_length(), (~low).bit_length()) + 1, True
    return step, max(1, high.bit_length()), False


def to_plain(model: IntegerModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return ``model`` as plain JSON data in which each array is a key, and the arrays by key."""
    check(model)
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {name: getattr(model, name) for name in ("requantizer", "input", "output", "meta")}
    plain["tensors"] = [_plain(spec, f"tensor.{i}", arrays) for i, spec in enumerate(model.tensors.values())]
    plain["ops"] = [{"op": type(op).__name__, **_plain(op, f"op{i}", arrays)} for i, op in enumerate(model.ops)]
    return plain, arrays


def from_plain(entries: dict[str, Any], arrays: dict[str, np.ndarray]) -> IntegerModel:
    """Return the record that ``to_plain`` described, checked.

    Raises:
        RecordError: says what is wrong. KeyError, TypeError, ValueError: ``entries`` are of another form.
    """
    specs = [_built(TensorSpec, entry, arrays) for entry in entries["tensors"]]
    if len({spec.name for spec in specs}) != len(specs):
        raise RecordError("two tensors have one name")
    ops = tuple(_built(_OPS[_built(str, entry.pop("op"), arrays)], entry, arrays) for entry in entries["ops"])
    texts = {name: _built(str, entries[name], arrays) for name in ("requantizer", "input", "output")}
    if not isinstance(entries["meta"], dict):
        raise RecordError("meta is no mapping")
    tensors = {spec.name: spec for spec in specs}
    return check(IntegerModel(tensors=tensors, ops=ops, meta=entries["meta"], **texts))  # type: ignore[arg-type]


def load(file: Path | str | IO[bytes]) -> IntegerModel:
    """Return the record in ``file`` (by path, or opened), checked.

    Raises:
        RecordError: no such file, not such a file, truncated, altered, another schema, or an inconsistent record.
    """
    name = file if isinstance(file, Path | str) else "integer model"
    try:
        with zipfile.ZipFile(file) as archive:
            return _decode(archive)
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from error
    except UNREADABLE as error:
        raise RecordError(f"{name}: not a readable integer model ({type(error).__name__}: {error})") from error


def _npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, value, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _plain(value: Any, key: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return ``value`` as JSON data; arrays go to ``arrays`` under ``key`` and their fields' names."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), f"{key}.{f.name}", arrays) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        arrays[key] = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"))).reshape(value.shape)
        return key
    if isinstance(value, tuple):
        return [_plain(v, f"{key}.{i}", arrays) for i, v in enumerate(value)]
    return float(value) if isinstance(value, np.floating) else value


def _decode(archive: zipfile.ZipFile) -> IntegerModel:
    infos = {info.filename: info for info in archive.infolist()}
    if MANIFEST not in infos:
        raise RecordError(f"it holds no {MANIFEST}")
    if infos[MANIFEST].file_size > MAX_MANIFEST:
        raise RecordError(f"its manifest is larger than {MAX_MANIFEST:,} bytes")
    entries = read_manifest(archive.read(MANIFEST), FORMAT, record.SCHEMA)
    return from_plain(entries, {key: _read(archive, infos, key, like) for key, like in entries["arrays"].items()})


def read_manifest(content: bytes, form: str, schema: int) -> dict[str, Any]:
    """Return the JSON object ``content``, which must say that it is of this form and schema; or RecordError."""

    def refuse(text: str) -> None:
        raise RecordError(f"its manifest holds {text}")

    entries = json.loads(content, parse_constant=refuse)
    found = (entries.get("format"), entries.get("schema")) if isinstance(entries, dict) else (type(entries), None)
    if found != (form, schema):
        raise RecordError(f"it is {found[0]!r:.60} schema {found[1]!r:.20}; this reader knows {form!r} schema {schema}")
    return entries


def shape_of(like: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape that a manifest says of an array; RecordError unless it and the dtype may be."""
    try:
        shape = _built(tuple[int, ...], like["shape"], {})
    except RecordError as error:
        raise RecordError(f"shape {like['shape']!r:.80}: {error}") from error
    if like["dtype"] not in DTYPES or len(shape) > 8 or min(shape, default=1) < 1 or math.prod(shape) > MAX_ELEMENTS:
        raise RecordError(f"dtype {like['dtype']!r:.40} of shape {shape!r:.80} is not allowed")
    return shape


def _read(archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], key: str, like: dict[str, Any]) -> np.ndarray:
    """Return array ``key``; its member must have the size, dtype, shape and hash that the manifest says."""
    shape = shape_of(like)
    dtype, n = np.dtype(like["dtype"]).newbyteorder("<"), math.prod(shape)
    bits, step = (_built(int, like[name], {}) for name in ("bits", "step")) if "bits" in like else (0, 1)
    if bits and (dtype.kind != "i" or not 1 <= bits < 8 * dtype.itemsize or not 1 <= step <= 2**15):
        raise RecordError(f"array {key!r}: {bits} bits in steps of {step} are no {like['dtype']}")
    size = -(-n * bits // 8) if bits else n * dtype.itemsize
    info = infos.get(f"{key}.npy")
    if info is None or not size < info.file_size <= size + 4096:
        raise RecordError(f"array {key!r}: its member is absent or not of {size:,} bytes and a header")
    data = archive.read(info)[-size:]
    if hashlib.sha256(data).hexdigest() != like["sha256"]:
        raise RecordError(f"array {key!r}: its bytes are not those that were saved (SHA-256 differs)")
    if not bits:
        return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    values = step * unpack(np.frombuffer(data, np.uint8), bits, n, signed=True)
    if not np.iinfo(dtype).min <= values.min() <= values.max() <= np.iinfo(dtype).max:
        raise RecordError(f"array {key!r}: its values do not fit {like['dtype']}")
    return values.reshape(shape).astype(dtype.newbyteorder("="))


_JSON = {str: (str, "text"), int: (int, "an integer"), np.float32: ((int, float), "a number")}
"""Type of a field -> what JSON says it by, and its name"""


def _built(kind: Any, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return a ``kind`` (the type of a field, or one of the record's dataclasses) from JSON data, and nothing else."""
    if kind is np.ndarray:
        return arrays[_built(str, value, arrays)]
    if kind in _JSON:
        spelled, wanted = _JSON[kind]
        if isinstance(value, bool) or not isinstance(value, spelled) or (kind is int and abs(value) > 2**40):
            raise RecordError(f"{wanted} was expected, not {value!r:.60}")
        return kind(value)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        n = None if kinds[-1] is ... else len(kinds)
        if not isinstance(value, list) or n not in (None, len(value)):
            raise RecordError(f"a list of {n or 'some'} entries was expected, not {value!r:.60}")
        return tuple(_built(kinds[0], entry, arrays) for entry in value)  # of one type all
    if type(None) in get_args(kind):
        return None if value is None else _built(get_args(kind)[0], value, arrays)
    known = get_type_hints(kind)
    if set(value) != set(known):
        raise RecordError(f"{kind.__name__} has fields {sorted(known)}, the file says {sorted(value)!r:.200}")
    return kind(**{name: _built(known[name], entry, arrays) for name, entry in value.items()})
