"""``lower``: a quantized graph becomes one record of integer operations.

The graph is walked once. Between a layer and the quantizer behind it, values are pending (``terms``): batch norms,
ReLUs, clips and additions are absorbed, and the quantizer's grid turns the lot into one operation with one rounding.
A signed grid is moved to unsigned integers; real values stay. A function of one element between two grids becomes a
table of all its integers, made by the graph's own operation and quantizer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from hq_lib.data import SPECS, DataSpec
from hq_lib.graph import QUANTIZER_SUFFIX, kinds, op_name
from hq_lib.graph.operations import is_difference, operands
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.integer import moves, nodes, terms
from hq_lib.integer import record as r
from hq_lib.integer.check import check
from hq_lib.integer.emit import Writer
from hq_lib.integer.execute import levels
from hq_lib.integer.nodes import LowerError
from hq_lib.integer.products import Product, norm_product, product, with_norm
from hq_lib.integer.record import IntegerModel, TensorSpec
from hq_lib.integer.terms import Average, Function, Pending, Plain, Sum
from hq_lib.results import provenance

Value = TensorSpec | Pending | tuple[TensorSpec, ...] | None


def lower(
    qnet: fx.GraphModule, *, requantizer: r.Requantizer = "float32", images: DataSpec | None = None
) -> IntegerModel:
    """Return ``qnet`` as integers: the same weights and grids, one rounding where the graph has a quantizer.

    Args:
        qnet:        from ``graph.quantize``, calibrated or trained; it is not changed. Any batch-norm mode.
        requantizer: "float32" (onnxruntime's arithmetic) or "fixed" (integers only); see ``record``.
        images:      the data set it was trained on; its mean and std go into the record, so that executors can take
                     raw pixels (see ``pixel_table``). An image without a quantizer ("academic" policies leave it
                     in float) is rounded to the 8-bit grid that spans their pixels: a rounding the graph does not have.

    Raises:
        LowerError:  names the tensor without a quantizer, the layer in float, or the operation without an integer form.
        RecordError: names the layer whose accumulator could overflow int32, and its bound.
    """
    if requantizer not in r.REQUANTIZERS:
        raise LowerError(f"requantizer {requantizer!r}: choose one of {', '.join(r.REQUANTIZERS)}")
    if not isinstance(qnet, fx.GraphModule):
        raise LowerError(
            f"{type(qnet).__name__} is no quantized graph: make one with graph.quantize(net, policy, example)"
        )
    if low := next((name for name, p in qnet.named_parameters() if p.dtype == torch.bfloat16), None):
        raise LowerError(f"{low!r} is torch.bfloat16, and integers are made of float32: call qnet.float() first")
    with eval_mode(qnet):
        walk = _Walk(qnet, requantizer, tensor_names(qnet), images)
        image, output = walk.run()
    policy = qnet.meta.get("policy")
    meta: dict[str, Any] = {"policy": policy.describe() if policy else "", "git_sha": provenance.git_sha()}
    if images is not None:
        meta["image"] = {"name": images.name, "mean": [*images.mean], "std": [*images.std]}
        if images.short_side or images.in_shape != SPECS.get(images.name, images).in_shape:
            meta["image"] |= {"in_shape": [*images.in_shape], "short_side": images.short_side}
        if images.classes:
            meta["image"]["classes"] = [*images.classes]
    return check(IntegerModel(requantizer, walk.writer.tensors, tuple(walk.writer.ops), image, output, meta))


def tensor_names(qnet: fx.GraphModule) -> dict[str, str]:
    """Return activation-quantizer node -> the name of the record's tensor on its grid (the policy's name of it)."""
    names = {f"{site.node}{QUANTIZER_SUFFIX}": site.name for site in qnet.meta.get("sites", ())}
    nodes = (node.name for node in qnet.graph.nodes if str(node.target).endswith(QUANTIZER_SUFFIX))
    return {name: names.get(name, name.removesuffix(QUANTIZER_SUFFIX)) for name in nodes}


class _Walk:
    """One pass over the graph; ``values`` holds what each node has become."""

    def __init__(
        self, gm: fx.GraphModule, requantizer: r.Requantizer, names: dict[str, str], images: DataSpec | None
    ) -> None:
        self.gm, self.names, self.kinds, self.images = gm, names, kinds(gm), images
        self.writer = Writer(requantizer)
        self.values: dict[fx.Node, Value] = {}
        self.handlers: dict[str, Callable[[fx.Node], Value]] = {
            "input": self.image, "layer": self.layer, "norm": self.norm, "relu": self.clip, "clip": self.clip,
            "add": self.add, "mul": self.mul, "concat": self.concat, "avgpool": self.average, "pass": self.move,
            "act": self.function, "other": self.function, "quantizer": self.quantizer,
            "shape": lambda node: None, "param": lambda node: None,
        }  # fmt: skip

    def run(self) -> tuple[str, str]:
        """Walk the graph; returns the names of the input and the output tensor."""
        quantizers: Any = {
            n.name: self.gm.get_submodule(str(n.target)) for n, kind in self.kinds.items() if kind == "quantizer"
        }
        self.writer.reserved |= {self.names[name] for name, quantizer in quantizers.items() if quantizer.enabled}
        output = ""
        for node, kind in self.kinds.items():
            if kind == "output":
                output = self.output(node)
            else:
                self.values[node] = self.handlers[kind](node)
        images = [node for node, kind in self.kinds.items() if kind == "input"]
        if len(images) != 1:
            raise LowerError(f"the network has {len(images)} inputs; one image is what executors take")
        return next(iter(self.writer.tensors)), output  # the image is written first

    def known(self, node: fx.Node, reader: fx.Node) -> TensorSpec:
        """Return the tensor on a grid that ``node`` is; a pool without a quantizer becomes its exact sums."""
        value = self.values[node]
        if isinstance(value, TensorSpec):
            return value
        term = value.term if isinstance(value, Pending) and not value.clipped else None
        if isinstance(term, Average) and term.pool.plain:
            self.values[node] = found = term.write_exact(self.writer, node.name)
            return found
        if isinstance(term, Plain) and term.kind is r.Quantize and self.images is not None:
            self.values[node] = found = term.write(self.writer, pixel_grid(term.inputs[0].shape, self.images))
            return found
        while self.kinds[node] == "quantizer" or op_name(node, self.gm) == "identity":  # one that is switched off
            node = node.all_input_nodes[0]
        site = next((site.name for site in self.gm.meta.get("sites", ()) if site.node == node.name), None)
        bits = f"give it 16 bits or fewer in the policy (overrides={{{site!r}: {{'act': 8}}}})"
        if self.kinds[node] == "input":
            bits = "give it 16 bits or fewer in policy.input_bits (or lower it with images=spec)"
        elif site is None:
            bits = "no policy gives it one here; with placement='deploy' every tensor that feeds an addition has one"
        raise LowerError(
            f"tensor {node.name!r} has no quantizer (or it is switched off), and {reader.name!r} reads it: {bits}"
        )

    def image(self, node: fx.Node) -> Value:
        spec = TensorSpec("image", nodes.shape_of(node), "float32", 32, 0, 0, np.asarray(1.0, np.float32), 0)
        return Pending(Plain(r.Quantize, "", [self.writer.add(spec)]))

    def layer(self, node: fx.Node) -> Value:
        x, layer = self.known(node.all_input_nodes[0], node), self.gm.get_submodule(str(node.target))
        term = product(str(node.target), layer, x)
        if isinstance(layer, torch.nn.ConvTranspose2d):
            term = moves.transposed(self.writer, layer, node, x, term)
        return Pending(term)

    def norm(self, node: fx.Node) -> Value:
        module, value = self.gm.get_submodule(str(node.target)), self.values[node.all_input_nodes[0]]
        if isinstance(value, Pending) and not value.clipped and isinstance(value.term, Product):
            if len(shape := nodes.shape_of(node)) == 2:
                raise LowerError(
                    f"batch norm {str(node.target)!r} reads {shape}, tokens by channels, and norms the tokens: to norm "
                    f"channels, make {value.term.name!r} a 1x1 convolution and it an nn.BatchNorm2d"
                )
            return Pending(with_norm(value.term, module))
        return Pending(norm_product(str(node.target), module, self.known(node.all_input_nodes[0], node)))

    def clip(self, node: fx.Node) -> Value:
        low, high = nodes.clip_bounds(node, self.gm)
        value = self.values[node.all_input_nodes[0]]
        if isinstance(value, Pending):
            return value.clip(low, high)
        x = self.known(node.all_input_nodes[0], node)
        qmin, qmax = clipped_range(x, low, high)
        if (qmin, qmax) == (x.qmin, x.qmax):
            return x
        name = self.names.get(f"{node.name}{QUANTIZER_SUFFIX}", node.name)  # its quantizer finds it on its grid
        self.writer.reserved.discard(name)
        return self.writer.write(r.Clip, node.name, [x], replace(x, name=name, qmin=qmin, qmax=qmax))

    def add(self, node: fx.Node) -> Value:
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if alpha not in (1, -1):
            raise LowerError(f"{node.name!r}: an addition with alpha={alpha}; multiply outside of it, or use 1 or -1")
        added, shape = [], nodes.shape_of(node)
        for arg in operands(node):
            assert isinstance(arg, fx.Node)  # ``kinds`` calls it an add because two tensors meet
            value = self.values[arg]
            if nodes.shape_of(arg) != shape:
                value = moves.repeated(self.writer, node.name, self.known(arg, node), shape)
            is_layer = isinstance(value, Pending) and isinstance(value.term, Product)
            added.append(value if is_layer or isinstance(value, TensorSpec) else self.known(arg, node))
        if is_difference(node, self.gm):
            added[1] = terms.negated(self.writer, added[1], node.name)
        return Pending(Sum(node.name, (added[0], added[1])))

    def mul(self, node: fx.Node) -> Value:
        a, b = (self.known(arg, node) for arg in operands(node) if isinstance(arg, fx.Node))
        shape = nodes.shape_of(node)
        a, b = (a, b) if a.shape == shape else (b, a)
        if a.shape != shape or len(b.shape) != len(shape):
            raise LowerError(f"{node.name!r} multiplies {a.shape} by {b.shape}; one of them must have all {shape}")
        return Pending(Plain(r.Mul, node.name, [a, b]))

    def function(self, node: fx.Node) -> Value:
        """A function of one element, as its value at every integer of its input."""
        source = nodes.source_of(node, self.gm, self.kinds)
        value = self.values[source]
        if op_name(node, self.gm) in nodes.RESIZES:
            return Pending(moves.bilinear(self.writer, node, self.gm, self.known(source, node)))
        if isinstance(value, Pending) and isinstance(value.term, Function):
            x, real = value.term.x, np.clip(value.term.real, value.low, value.high)
        else:
            x = self.known(source, node)
            real = levels(x)
        return Pending(Function(node.name, x, nodes.computed(node, self.gm, source, real)))

    def concat(self, node: fx.Node) -> Value:
        tensors: Any = node.args[0] if node.args else node.kwargs["tensors"]  # all_input_nodes has each but once
        pieces: Any = self.values[tensors] if isinstance(tensors, fx.Node) else [self.known(n, node) for n in tensors]
        return moves.concat(self.writer, self.gm, node, [*pieces])

    def average(self, node: fx.Node) -> Value:
        x = self.known(node.all_input_nodes[0], node)
        return Pending(Average(node.name, x, nodes.pool(node, self.gm, x.shape)))

    def quantizer(self, node: fx.Node) -> Value:
        module = self.gm.get_submodule(str(node.target))
        value = self.values[node.all_input_nodes[0]]
        if not module.enabled:
            return value
        spec = on_grid(self.names[node.name], module, nodes.shape_of(node))
        self.writer.reserved.discard(spec.name)
        if isinstance(value, Pending):
            qmin, qmax = clipped_range(spec, value.low, value.high)
            spec = replace(spec, qmin=qmin, qmax=qmax)
            if isinstance(value.term, Function):
                return self._table(value.term, module, spec)
            return value.term.write(self.writer, spec)
        x = self.known(node.all_input_nodes[0], node)
        if (x.scale, x.zero_point, x.dtype) == (spec.scale, spec.zero_point, spec.dtype) and x.qmax <= spec.qmax:
            return x
        return self._table(Function(node.name, x, levels(x)), module, spec)

    def _table(self, term: Function, quantizer: Any, spec: TensorSpec) -> TensorSpec:
        """Write what ``quantizer`` makes of ``term`` at every integer of its input."""
        device = device_of(self.gm)
        x_int = quantizer.to_int(torch.from_numpy(term.real).to(device)).cpu().numpy()
        return self.writer.table(term.name, term.x, x_int - int(quantizer.grid().qmin), spec)

    def move(self, node: fx.Node) -> Value:
        """Handle what keeps the grid: max-pools, reshapes, transposes, slices, padding."""
        name, source = op_name(node, self.gm), node.all_input_nodes[0]
        if name == "identity":
            return self.values[source]
        if name == "getitem" and isinstance(self.values[source], tuple):
            return self.values[source][node.args[1]]  # type: ignore[index]
        value = self.values[source]
        if name in moves.RESHAPES and isinstance(value, Pending) and isinstance(value.term, Product):
            acc = terms.logits(self.writer, value, f"{node.name}.map")  # nothing quantizes a 1x1 map of logits
            return moves.reshape(self.writer, self.gm, node, acc)
        x = self.known(source, node)
        return moves.move(self.writer, self.gm, node, x)

    def output(self, node: fx.Node) -> str:
        """Write the network's output and return its name."""
        if not isinstance(node.args[0], fx.Node):
            raise LowerError("the network has more than one output; one tensor of logits is what executors give")
        value = self.values[node.args[0]]
        if isinstance(value, Pending):
            value = terms.logits(self.writer, value, "logits")
        assert isinstance(value, TensorSpec)
        return value.name


def on_grid(name: str, quantizer: Any, shape: tuple[int, ...]) -> TensorSpec:
    """Return the tensor that ``quantizer`` makes: its grid, moved to begin at integer 0.

    Raises:
        LowerError: a grid per channel, without a level at real 0, or of more than 16 bits.
    """
    grid = quantizer.grid()
    if grid.scale.numel() != 1:
        raise LowerError(f"tensor {name!r}: its grid has a scale per channel; executors know one per tensor")
    if grid.step != 1:
        raise LowerError(f"tensor {name!r}: a signed 1-bit grid has no level at 0, so no integer form: use 2 bits")
    z = int(grid.zero_point) - grid.qmin
    top = grid.qmax - grid.qmin
    scale = np.asarray(grid.scale.cpu().numpy(), np.float32).reshape(())
    return TensorSpec(name, shape, "uint8" if top < 2**8 else "uint16", quantizer.bits, 0, top, scale, z)


def pixel_grid(shape: tuple[int, ...], images: DataSpec) -> TensorSpec:
    """Return the 8-bit grid that spans the normalised pixels 0 .. 255 of every channel of ``images``."""
    ends = [(end - mean) / std for mean, std in zip(images.mean, images.std, strict=True) for end in (0.0, 1.0)]
    scale = np.float32((max(ends) - min(ends)) / 255)
    zero = min(255, max(0, round(-min(ends) / float(scale))))
    return TensorSpec("input", shape, "uint8", 8, 0, 255, np.asarray(scale), zero)


def clipped_range(spec: TensorSpec, low: float, high: float) -> tuple[int, int]:
    """Return (qmin, qmax) of ``spec`` after its real values were clipped to [low, high]: clip and round commute."""
    scale, z = np.float32(spec.scale), spec.zero_point
    bounds = [np.clip(np.rint(np.float32(bound) / scale), spec.qmin - z, spec.qmax - z) for bound in (low, high)]
    return int(bounds[0]) + z, int(bounds[1]) + z
