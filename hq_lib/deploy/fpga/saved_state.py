"""The pickle inside a file of ``torch.save``, read as plain data.

A machine for the two dozen opcodes that a saved state dict needs: it builds dicts, lists, tuples, texts, integers and
arrays, imports nothing, calls nothing, and refuses every other name and opcode. No pickle is ever unpickled.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from hq_lib.deploy.fpga.layers import FpgaiError, need

STORAGES = {
    "torch ByteStorage": "u1",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
    "torch FloatStorage": "<f4",
}
"""torch's storages that are read, and the dtype of each"""
_REBUILD, _ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"


def run_pickle(archive: zipfile.ZipFile, prefix: str, code: bytes) -> Any:
    """Return what the pickle ``code`` describes: plain data, tensors as read-only arrays.

    Args:
        archive: holds the storages, ``{prefix}data/{key}``.
        prefix:  "archive/", as a rule.
        code:    the bytes of ``data.pkl``.

    Raises:
        FpgaiError: the pickle asks for anything but arrays and plain data; says for what.
        ValueError, KeyError, IndexError, TypeError: it is malformed.
    """
    return _Machine(archive, prefix).run(code)


class _Machine:
    """Runs the opcodes of a saved state dict over plain data.

    What it builds is never compared, hashed or printed: nested tuples could make each of these endless.
    """

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        self.archive, self.prefix = archive, prefix
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, np.ndarray] = {}

    def run(self, code: bytes) -> Any:
        """Return what the pickle ``code`` describes."""
        for opcode, argument, _ in pickletools.genops(code):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self.stack.append(argument)
            else:
                step = getattr(self, f"on_{opcode.name.lower()}", None)
                need(step is not None, f"its pickle uses the opcode {opcode.name}, which no saved state dict needs")
                step(argument)  # type: ignore[misc]
        raise FpgaiError("its pickle has no end")

    def popped(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        start = self.marks.pop()
        values, self.stack[start:] = self.stack[start:], []
        return values

    def on_proto(self, argument: int) -> None:
        need(argument == 2, f"its pickle has protocol {argument}, torch.save writes 2")

    def on_mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def on_global(self, name: str) -> None:
        known = name in (_REBUILD, _ORDERED, *STORAGES)
        need(known, f"its pickle asks for {name!r:.80}, which is no part of a state dict: refused, nothing was run")
        self.stack.append(_Global(name))

    def on_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def on_empty_list(self, _: None) -> None:
        self.stack.append([])

    def on_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    on_long_binput = on_binput

    def on_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    on_long_binget = on_binget

    def on_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.popped()))

    def last(self, n: int) -> None:
        """Make a tuple of the last ``n`` values."""
        need(len(self.stack) >= n, "its pickle takes from an empty stack")
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def on_tuple1(self, _: None) -> None:
        self.last(1)

    def on_tuple2(self, _: None) -> None:
        self.last(2)

    def on_tuple3(self, _: None) -> None:
        self.last(3)

    def on_append(self, _: None) -> None:
        value = self.stack.pop()
        _as(list, self.stack[-1]).append(value)

    def on_appends(self, _: None) -> None:
        values = self.popped()
        _as(list, self.stack[-1]).extend(values)

    def on_setitem(self, _: None) -> None:
        self.last(2)
        self.put(*self.stack.pop())

    def on_setitems(self, _: None) -> None:
        values = self.popped()
        for key, value in zip(values[::2], values[1::2], strict=True):
            self.put(key, value)

    def put(self, key: Any, value: Any) -> None:
        """Set one entry of the dict on top of the stack; keys are texts."""
        _as(dict, self.stack[-1])[_as(str, key)] = value

    def on_build(self, _: None) -> None:
        self.stack.pop()  # a state dict's "_metadata": versions of modules, of no use here
        _as(dict, self.stack[-1])

    def on_binpersid(self, _: None) -> None:
        kind, storage, key, _place, n = _as(tuple, self.stack.pop())
        known = _as(str, kind) == "storage" and _as(_Global, storage).name in STORAGES
        need(known, "its pickle names no tensor storage")
        self.stack.append(self.storage(_as(str, key), np.dtype(STORAGES[storage.name]), _as(int, n)))

    def storage(self, key: str, dtype: np.dtype[Any], n: int) -> np.ndarray:
        """Return (n,) storage ``key``, whose member must have exactly that size."""
        if key not in self.storages:
            self.storages[key] = np.frombuffer(self.archive.read(f"{self.prefix}data/{key}"), np.uint8)
        data = self.storages[key]
        need(len(data) == n * dtype.itemsize, f"storage {key:.40} has {len(data):,} bytes for {n:,} x {dtype}")
        return data.view(dtype)

    def on_reduce(self, _: None) -> None:
        self.last(2)
        what, arguments = self.stack.pop()
        if _as(_Global, what).name == _ORDERED and _as(tuple, arguments) == ():
            self.stack.append({})
            return
        need(what.name == _REBUILD, "its pickle calls what is no tensor")
        storage, offset, shape, strides, *_rest = _as(tuple, arguments)
        self.stack.append(_tensor(_as(np.ndarray, storage), _as(int, offset), _sizes(shape), _sizes(strides)))


@dataclass(frozen=True)
class _Global:
    name: str


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")


def _as(kind: type, value: Any) -> Any:
    need(type(value) is kind, f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    need(all(type(n) is int and 0 <= n < 2**40 for n in _as(tuple, value)) and len(value) <= 8, "a tensor's sizes")
    return value


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Return a read-only view of ``storage``; only C-ordered tensors are saved by the seed, and only they are read."""
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    plain = len(strides) == len(shape) and all(n == 1 or a == b for n, a, b in zip(shape, strides, dense, strict=True))
    n = math.prod(shape)
    need(plain and 0 <= offset <= len(storage) - n, f"tensor {shape} strides {strides} does not lie in its storage")
    return storage[offset : offset + n].reshape(shape)
