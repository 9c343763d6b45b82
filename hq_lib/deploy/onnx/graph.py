"""A growing ONNX graph: nodes, initializers shared by value, fresh names."""

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hq_lib.integer.storage import narrowest
from hq_lib.results.bits import pack

ONNX_TYPE = {
    "uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "uint16": TensorProto.UINT16, "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE,
}  # fmt: skip


class Graph:
    """Collects nodes and initializers; every method returns the name of the value it makes."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._n_values = 0

    def node(
        self, kind: str, inputs: list[str], *, output: str | None = None, name: str = "", **attributes: Any
    ) -> str:
        """Append a node of type ``kind`` and return its output (a fresh name if none is given)."""
        output = self.fresh(kind) if output is None else output
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value: Any, dtype: str, *, name: str | None = None) -> str:
        """Return an initializer with ``value`` as ``dtype``; unnamed ones are shared where they are equal."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, dtype)
        if name is None and key in self._constants:
            return self._constants[key]
        name = name or self.fresh("constant")
        self._constants.setdefault(key, name)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def cast(self, value: str, dtype: str, *, output: str | None = None) -> str:
        """Return ``value`` cast to ``dtype``."""
        return self.node("Cast", [value], output=output, to=ONNX_TYPE[dtype])

    def fresh(self, stem: str) -> str:
        """Return a name no value has yet."""
        self._n_values += 1
        return f"{stem}:{self._n_values}"

    def weight(self, value: np.ndarray, name: str) -> str:
        """Return int8 ``value``: an initializer, of 4 bits (two values a byte) and a step where these hold it."""
        step, bits, signed = narrowest(value)
        if bits + (not signed) > 4:
            return self.constant(value, "int8", name=name)
        packed = pack(value.reshape(-1).astype(np.int64) // step, 4).tobytes()
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, value.shape, packed, raw=True))
        real = self.node("Mul", [self.cast(name, "float32"), self.constant(float(step), "float32")])
        return self.cast(real, "int8")
