"""``Writer``: the tensors and operations of a record in the making."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hq_lib.integer import record as r
from hq_lib.integer.check import output_shape
from hq_lib.integer.record import TensorSpec

INT32 = (-(2**31), 2**31 - 1)


@dataclass
class Writer:
    """Tensors and operations written so far; names are made unique."""

    requantizer: r.Requantizer
    """the model's"""
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    """by name"""
    ops: list[r.Op] = field(default_factory=list)
    """in execution order"""
    reserved: set[str] = field(default_factory=set)
    """names of tensors to come, which no other takes"""
    sums: dict[Any, TensorSpec] = field(default_factory=dict)
    """accumulators written already, by the ``Product`` that they are of"""

    def add(self, spec: TensorSpec) -> TensorSpec:
        """Register a tensor; returns it under a name not used before."""
        spec = replace(spec, name=self._free(spec.name))
        self.tensors[spec.name] = spec
        return spec

    def _free(self, name: str) -> str:
        return _unused(name, self.tensors.keys() | self.reserved)

    def write(
        self, kind: type[r.Op], name: str, inputs: list[TensorSpec], out: TensorSpec | None = None, **fields: Any
    ) -> TensorSpec:
        """Append an operation that reads ``inputs``; returns what it writes, registered.

        Args:
            out:    name and grid of what it writes (default: its own name, the grid of the first input). The shape is
                    the operation's; a ``Reshape`` alone takes it from here.
            fields: the others of ``kind``.
        """
        out = replace(inputs[0], name=name) if out is None else out
        name = _unused(name, {op.name for op in self.ops})
        op = kind(name, tuple(spec.name for spec in inputs), self._free(out.name), **fields)
        shape = output_shape(op, [spec.shape for spec in inputs])
        self.ops.append(op)
        return self.add(out if shape is None else replace(out, shape=shape))

    def table(self, name: str, x: TensorSpec, values: np.ndarray, out: TensorSpec) -> TensorSpec:
        """Write ``out``, whose integer for integer q of ``x`` is values[q] clipped to its range; q = 0 .. x.qmax."""
        return self.write(r.Table, name, [x], out, values=np.clip(values, out.qmin, out.qmax).astype(out.dtype))


def _unused(name: str, taken: Collection[str]) -> str:
    n, base = 0, name
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    return name
