"""The integer network as one record: named tensors and an ordered list of operations, NumPy arrays only, no torch.

Every executor (NumPy, C, ONNX, crossbar) follows this text, and all give the same integers. Symbols: ``s`` scale (real
units per step), ``z`` zero point, ``q`` integers of a tensor, real value ``s (q - z)``, ``rint`` round half to even,
``f32`` rounding to float32, ``clamp(v) = min(max(v, qmin), qmax)`` with the ends of the *output* tensor: they hold the
ReLU, ReLU6 and clips. Tensors of up to 16 bits are unsigned (a signed grid is moved by a constant into ``z``). In each
sum below ``q - z`` is the integer that multiplies; padded places contribute 0 (padding holds ``z``).

Accumulators. A layer sums ``acc = sum w (q - z) + bias``, int32; a proof, made when the record is made and again when
it is loaded, bounds ``sum |w| max|q - z| + |bias| <= 2^31 - 1`` per output channel, so that every partial sum of
centred products fits. (Sums of uncentred products may wrap modulo 2^32; the total is right all the same.)

Requantization, per channel c, to output q_y. ``IntegerModel.requantizer`` says which of the two, for the whole model:

    "float32"        q_y = clamp(rint(f32(f32(acc) * m_c)) + z_y)                                 m_c = ``multiplier``
    with residual r: q_y = clamp(rint(f32(f32(f32(acc) * m_c) + f32(f32(r - z_r) * n_c))) + z_y)
    "fixed"          q_y = clamp(((acc * M_c + 2^(S_c - 1)) >> S_c) + z_y)            M_c = ``fixed``, S_c = ``shift``
    with residual r: q_y = clamp(((acc * M_c + (r - z_r) * N_c + 2^(S_c - 1)) >> S_c) + z_y)      both have shift S_c

"float32" rounds after every operation (C: ``-ffp-contract=off``; only ``Add`` fuses, where it says so) and equals
onnxruntime's fused kernels bit for bit. Clamp in float, to [qmin - z_y, qmax - z_y], before converting to an integer:
the product may exceed int32. "fixed" is in int64; ``>>`` is the arithmetic shift (floor): half up. Multipliers >= 0.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

SCHEMA = 1
"""Version of this record; a reader refuses any other."""
Requantizer = Literal["float32", "fixed"]
REQUANTIZERS: tuple[Requantizer, ...] = ("float32", "fixed")
ACC_MAX = 2**31 - 1
"""Largest magnitude that the proof allows in an accumulator."""


@dataclass(frozen=True, eq=False)
class TensorSpec:
    """One tensor of the network, without its batch dimension."""

    name: str
    """unique; the fx node that makes it ("layer1_0_conv1"), "image" for the float input"""
    shape: tuple[int, ...]
    """(C, H, W) or (C,) as a rule; reshapes may make others"""
    dtype: str
    """"uint8", "uint16"; "int32": accumulators or integer logits; "float32": the image only"""
    bits: int
    """width of the grid that the tensor was trained on: 1..16; 32 for int32 and float32"""
    qmin: int
    """least integer that occurs, after fused clips (>= 0 for unsigned)"""
    qmax: int
    """largest integer that occurs; qmax - qmin < 2^bits"""
    scale: np.ndarray
    """float32, real units per step: () per tensor; (C,) allowed for int32, whose real value is scale_c q"""
    zero_point: int
    """integer of real 0; 0 for int32"""


@dataclass(frozen=True, eq=False)
class Requant:
    """Both forms of one rescaling, per output channel (n = C) or for the whole tensor (n = 1)."""

    multiplier: np.ndarray
    """float32 (n,), >= 0: f32(f32(s_x s_w) / s_y) for layers, f32(s_x / f32(n_window s_y)) for average pools"""
    fixed: np.ndarray
    """int32 (n,), >= 0: the same number times 2^shift; 31 significant bits (30 where a residual or second input shares
    the shift), fewer for multipliers below 2^-32"""
    shift: np.ndarray
    """uint8 (n,), 1..62"""


@dataclass(frozen=True, eq=False)
class Residual:
    """The second operand of a fused convolution and addition."""

    tensor: str
    """uint8 or uint16 tensor, or int32 accumulators of another layer (z_r = 0); the shape of the layer's output"""
    requant: Requant
    """n_c and N_c, (C,) each; ``shift`` equals the layer's own"""


@dataclass(frozen=True, eq=False)
class Op:
    """What every operation has. Operations are executed in list order."""

    name: str
    """dotted name of the layer ("layer1.0.conv1") or operation; unique"""
    inputs: tuple[str, ...]
    """tensors read, in the order of the operation; a layer's residual comes second"""
    output: str
    """the one tensor written"""


@dataclass(frozen=True, eq=False)
class Quantize(Op):
    """Image to integers: q = clamp(rint(f32(x / s)) + z), a float32 division. NaN is refused."""


@dataclass(frozen=True, eq=False)
class Layer(Op):
    """What convolution and linear layers share; ``requant`` None writes the accumulators (logits, or a residual)."""

    weight: np.ndarray
    """int8, or int16 where the method's grid needs it; zero point 0. A grid of fewer bits fills int8: its integers are
    stored times ``weight_step``, a power of two, so that the bias, which is rounded to accumulator steps, is finer"""
    weight_scale: np.ndarray
    """float32 (C_out,): real units per step of ``weight``, batch norm included"""
    bias: np.ndarray
    """int32 (C_out,), steps of ``acc_scale``"""
    acc_scale: np.ndarray
    """float32 (C_out,): real units per accumulator step, f32(s_x weight_scale)"""
    weight_bits: int
    """bits of the weight's trained grid, 1..16, of its widest channel where they differ (storage may be wider: DoReFa's
    zero-less grid has bits + 1)"""
    requant: Requant | None
    """(C_out,), or None"""
    residual: Residual | None
    """second operand of a fused conv-add (academic placement), or None; needs ``requant``"""

    @property
    def weight_step(self) -> int:
        """The largest power of two that divides every weight: ``weight // weight_step`` fits the trained bits."""
        return power_of_two(self.weight)


def power_of_two(integers: np.ndarray) -> int:
    """Return the largest power of two that divides all of them; 1 where all are 0."""
    common = int(np.bitwise_or.reduce(integers, axis=None))
    return common & -common if common else 1


@dataclass(frozen=True, eq=False)
class Conv(Layer):
    """2-d cross-correlation (C_in, H, W) -> (C_out, H', W'), grouped and depthwise included.

    H' = (H + top + bottom - dilation_h (k_h - 1) - 1) // stride_h + 1, likewise W'. Output channel o reads the input
    channels of its group o // (C_out / groups). A batch norm that no layer precedes is a 1x1 depthwise convolution.
    """

    stride: tuple[int, int]
    """(rows, columns) >= 1"""
    padding: tuple[int, int, int, int]
    """(top, left, bottom, right) >= 0, filled with z"""
    dilation: tuple[int, int]
    """(rows, columns) >= 1"""
    groups: int
    """``weight`` is (C_out, C_in / groups, k_h, k_w)"""

    @property
    def kernel(self) -> tuple[int, ...]:
        """(rows, columns)"""
        return self.weight.shape[2:]


@dataclass(frozen=True, eq=False)
class Linear(Layer):
    """(C_in,) -> (C_out,), or (T, C_in) -> (T, C_out): channels are the last axis; ``weight`` is (C_out, C_in)."""


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Sum of two unsigned tensors a, b of equal shape, one rounding.

        "float32"   q_y = clamp(rint(fma(q_a, m_a, fma(q_b, m_b, offset))))     fma: one rounding to float32 (C: fmaf)
        "fixed"     q_y = clamp((((q_a - z_a) M_a + (q_b - z_b) M_b + 2^(S - 1)) >> S) + z_y)                  (int64)

    The float32 form is onnxruntime's QLinearAdd on x86-64 with FMA. In float64, product and sum are exact here (proved
    on loading), so fma(q, m, t) = f32(f64(q) f64(m) + f64(t)).
    """

    requants: tuple[Requant, Requant]
    """of a and b, (1,) each, with one shift: m_a = f32(s_a / s_y), m_b = f32(s_b / s_y)"""
    offset: np.float32
    """f32(z_y - fma(m_a, z_a, f32(m_b z_b)))"""


@dataclass(frozen=True, eq=False)
class Pool(Op):
    """What both pools share."""

    kernel: tuple[int, int]
    """(rows, columns)"""
    stride: tuple[int, int]
    """(rows, columns)"""
    padding: tuple[int, int, int, int]
    """(top, left, bottom, right); a ceil-mode pool has its extra rows here"""


@dataclass(frozen=True, eq=False)
class MaxPool(Pool):
    """Largest integer of each window; padded places never win. Output on the grid of the input."""

    dilation: tuple[int, int]
    """(rows, columns)"""


@dataclass(frozen=True, eq=False)
class AvgPool(Pool):
    """acc = sum of (q - z) over each window, then requantized with n = 1; padding counts as real 0.

    ``requant`` None is the exact pool without a quantizer: it writes acc + z_y, z_y = n_window z, scale s_x / n_window.
    """

    requant: Requant | None
    """(1,), or None"""

    @property
    def dilation(self) -> tuple[int, int]:
        """(1, 1): its windows have no gaps."""
        return (1, 1)


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """Inputs joined along ``axis``; all have one scale and zero point."""

    axis: int
    """axis without the batch: 0 is the channel"""


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    """The same integers in row-major order under the output's shape: flatten, view, squeeze."""


@dataclass(frozen=True, eq=False)
class Transpose(Op):
    """Output axis i is input axis ``axes[i]`` (axes without the batch)."""

    axes: tuple[int, ...]
    """a permutation of range(rank)"""


@dataclass(frozen=True, eq=False)
class Slice(Op):
    """Per axis (without the batch) the places start, start + step, ... < stop: chunk, split, x[:, :, ::2, ::2]."""

    start: tuple[int, ...]
    """>= 0"""
    stop: tuple[int, ...]
    """<= the axis"""
    step: tuple[int, ...]
    """>= 1"""


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """Real zeros (integer z) around the tensor; on the channel axis it is the shortcut of ResNet option A."""

    before: tuple[int, ...]
    """per axis (without the batch), >= 0"""
    after: tuple[int, ...]
    """likewise"""


@dataclass(frozen=True, eq=False)
class Clip(Op):
    """q_y = clamp(q): a ReLU or clip of integers that exist already, int32 residuals included; the grid stays."""


@dataclass(frozen=True, eq=False)
class Table(Op):
    """q_y = values[q]: any function of one element, and the move of a tensor to another grid."""

    values: np.ndarray
    """dtype of the output, (qmax + 1,) of the input: the integer for each of its integers 0 .. qmax"""


@dataclass(frozen=True, eq=False)
class Mul(Op):
    """acc = (q_a - z_a) (q_b - z_b), int32, requantized with n = 1, m = f32(f32(s_a s_b) / s_y).

    Axes of length 1 of the second input are repeated: a gate (C, 1, 1) multiplies every place of its channel.
    """

    requant: Requant
    """(1,)"""


def requants_of(op: Op) -> tuple[Requant, ...]:
    """Return what rescales the terms of ``op``'s sum, in their order: none, one, or two that share a shift."""
    if isinstance(op, Add):
        return op.requants
    residual = op.residual if isinstance(op, Layer) else None
    found = (getattr(op, "requant", None), residual and residual.requant)
    return tuple(requant for requant in found if requant is not None)


OPS: tuple[type[Op], ...] = (
    Quantize, Conv, Linear, Add, MaxPool, AvgPool, Concat, Reshape, Transpose, Slice, Pad, Clip, Table, Mul,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A network in integers: one float image in, integer logits out."""

    requantizer: Requantizer
    """which arithmetic this record's operations are executed in"""
    tensors: dict[str, TensorSpec]
    """by name, in the order they are written; the first is the image"""
    ops: tuple[Op, ...]
    """in execution order"""
    input: str
    """name of the float32 image tensor, normalised as in training"""
    output: str
    """name of the logits: real value f32(f32(q - z) * scale_c), int32 as a rule (z = 0)"""
    meta: dict[str, Any] = field(default_factory=dict)
    """plain JSON data: "image" {"mean": [...], "std": [...]} in [0, 1] units if known, provenance, the policy's line"""

    def op(self, name: str) -> Op:
        """Return the operation called ``name``; KeyError if there is none."""
        return {op.name: op for op in self.ops}[name]

    def layers(self) -> list[Layer]:
        """Return the convolution and linear operations, in execution order."""
        return [op for op in self.ops if isinstance(op, Layer)]

    def size_KiB(self) -> float:
        """Return the size of all weights as their bits ask, biases at 32 bits, multipliers at 32, and tables: KiB."""
        tables = sum(8 * op.values.nbytes for op in self.ops if isinstance(op, Table))
        return (tables + sum(op.weight.size * op.weight_bits + 64 * op.bias.size for op in self.layers())) / 8 / 1024
