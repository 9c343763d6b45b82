"""Seed 002's files: weights, biases and quantization lines, as text and as bytes.

    {name}_weight.bin   uint8 of all layers, C order, no header
    {name}_bias.bin     int32 of all layers, little endian, no header
    {name}_quant.txt    per layer one line "multiplier,shift,zero_point"
    {name}_weight.txt   per layer "#", its weights, "$", its biases: decimals, commas, ten a line
    {name}_quant.tuple  ``torch.save((state_dict, quant_list))``, read by torch's reader of plain weights

None but the last holds a shape: the reader is given the stages. Any byte too many or too few is an error.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hq_lib.deploy.fpga.fpgai import FpgaiError, FpgaiLayer, Stage, check_quant, need, plain_name
from hq_lib.results.atomic import write_bytes

Form = Literal["bin", "txt"]
MAX_FILE = 2**31
_PER_LINE = 10
_INTEGER = re.compile(r"-?[0-9]{1,10}")
Quant = tuple[int, int, int]
GAIN = 255
"""Activation steps per unit. The seed's last Python uses 255; its NumPy program and its shipped files use 256."""


def read_net(folder: Path | str, name: str, stages: Sequence[Stage], *, form: Form = "bin") -> list[FpgaiLayer]:
    """Return the network in the files ``{name}_*`` of ``folder``.

    Args:
        folder: where the files lie.
        name:   common start of their names, "lenet".
        stages: shapes and order of the layers: ``LENET``, or your own.
        form:   "bin": ``_weight.bin`` and ``_bias.bin``; "txt": ``_weight.txt``; both with ``_quant.txt``.

    Raises:
        FpgaiError: a file that is absent, truncated, too long, or holds something else; names file, line and layer.
    """
    folder, name = Path(folder), plain_name(name, "name of the files")
    quant = parse_quant(_read_text(folder / f"{name}_quant.txt"), n_layers=len(stages), what=f"{name}_quant.txt")
    if _checked_form(form) == "txt":
        text = _read_text(folder / f"{name}_weight.txt")
        weights, biases = parse_weight_text(text, stages, what=f"{name}_weight.txt")
    else:
        weights = _read_bin(folder / f"{name}_weight.bin", "u1", [stage.shape for stage in stages])
        biases = _read_bin(folder / f"{name}_bias.bin", "<i4", [stage.shape[:1] for stage in stages])
    return [FpgaiLayer(s, w, b, *line) for s, w, b, line in zip(stages, weights, biases, quant, strict=True)]


def write_net(net: Sequence[FpgaiLayer], folder: Path | str, name: str, *, form: Form = "bin") -> list[Path]:
    """Write ``net`` as seed 002's files of this form, each whole or not at all; return their paths."""
    folder, name = Path(folder), plain_name(name, "name of the files")
    contents = {f"{name}_quant.txt": "".join(f"{x.multiplier},{x.shift},{x.zero_point}\n" for x in net).encode()}
    if _checked_form(form) == "txt":
        contents[f"{name}_weight.txt"] = "".join(
            f"#\n{_decimals(layer.weight)}$\n{_decimals(layer.bias)}" for layer in net
        ).encode()
    else:
        contents[f"{name}_weight.bin"] = b"".join(layer.weight.tobytes() for layer in net)
        contents[f"{name}_bias.bin"] = b"".join(layer.bias.astype("<i4").tobytes() for layer in net)
    for file, content in contents.items():
        write_bytes(folder / file, content)
    return [folder / file for file in contents]


def _read_bin(path: Path, dtype: str, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Return the arrays that lie one behind the other in ``path``; ``FpgaiError`` unless it has exactly their size."""
    content, sizes = read_file(path), [math.prod(shape) for shape in shapes]
    size = sum(sizes) * np.dtype(dtype).itemsize
    state = "truncated" if len(content) < size else "too long, or of another network"
    need(len(content) == size, f"{path.name}: {len(content):,} bytes, the stages need {size:,}: {state}")
    parts = np.split(np.frombuffer(content, dtype).astype(np.dtype(dtype).newbyteorder("=")), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def parse_quant(text: str, *, n_layers: int, what: str = "quant.txt") -> list[Quant]:
    """Return (multiplier, shift, zero_point) of each layer; ``FpgaiError`` names the line that is wrong."""
    lines = text.rstrip().splitlines()
    need(len(lines) == n_layers, f"{what}: {len(lines)} lines for {n_layers} layers")
    found = []
    for number, line in enumerate(lines, 1):
        values = _integers(line, f"{what}, line {number}")
        need(len(values) == 3, f"{what}, line {number}: {line!r:.60} is not 'multiplier,shift,zero_point'")
        multiplier, shift, zero_point = values
        check_quant(multiplier, shift, zero_point, f"{what}, line {number}")
        found.append((multiplier, shift, zero_point))
    return found


def parse_weight_text(
    text: str, stages: Sequence[Stage], *, what: str = "weight.txt"
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return each layer's weights (uint8) and biases (int32) from the ``#`` and ``$`` blocks of ``text``."""
    head, *blocks = text.split("#")
    need(not head.strip() and len(blocks) == len(stages), f"{what}: {len(blocks)} '#' blocks for {len(stages)} layers")
    weights, biases = [], []
    for stage, block in zip(stages, blocks, strict=True):
        parts = block.split("$")
        need(len(parts) == 2, f"{what}, layer {stage.name!r}: {len(parts) - 1} '$' lines where one belongs")
        where = f"{what}, layer {stage.name!r}"
        weights.append(_array(parts[0], stage.shape, "uint8", f"{where}, weights"))
        biases.append(_array(parts[1], stage.shape[:1], "int32", f"{where}, biases"))
    return weights, biases


def read_file(path: Path) -> bytes:
    """Return the bytes of ``path``; ``FpgaiError`` where it cannot be read or has over 2 GiB."""
    try:
        need(path.stat().st_size <= MAX_FILE, f"{path}: over {MAX_FILE:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise FpgaiError(f"{path}: cannot be read ({error.strerror})") from error


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode("ascii")
    except UnicodeDecodeError as error:
        raise FpgaiError(f"{path}: not a text file (byte {error.start} is no ASCII)") from error


def _checked_form(form: Form) -> Form:
    need(form in ("bin", "txt"), f"form {form!r}: 'bin' or 'txt'")
    return form


def _integers(text: str, what: str) -> list[int]:
    """Return the comma-separated decimals of ``text``; a comma may end a line."""
    lines = (line.strip().removesuffix(",") for line in text.splitlines())
    words = [word.strip() for line in lines if line for word in line.split(",")]
    bad = next((word for word in words if not _INTEGER.fullmatch(word)), None)
    need(bad is None, f"{what}: {bad!r:.40} is no decimal integer")
    return [int(word) for word in words]


def _array(text: str, shape: tuple[int, ...], dtype: str, what: str) -> np.ndarray:
    values, limits = np.array(_integers(text, what), np.int64), np.iinfo(dtype)
    need(values.size == math.prod(shape), f"{what}: {values.size:,} numbers for shape {shape}")
    ok = limits.min <= values.min() and values.max() <= limits.max
    need(ok, f"{what}: values {values.min()}..{values.max()} do not fit {dtype}")
    return values.astype(dtype).reshape(shape)


def _decimals(values: np.ndarray) -> str:
    flat = values.reshape(-1).tolist()
    lines = (flat[i : i + _PER_LINE] for i in range(0, len(flat), _PER_LINE))
    return "".join(",".join(map(str, line)) + "\n" for line in lines)


def read_tuple(path: Path | str, stages: Sequence[Stage], *, gain: int = GAIN) -> list[FpgaiLayer]:
    """Return the network in the file ``path``; tensors saved on a GPU are read like any.

    Args:
        path:   holds "c1.weight" int32 (values 0..255) and "c1.bias" float32 real units in layer order, and the list of
                each layer's multiplier, shift and zero point; bias = rint(bias_real gain / (m 2^-shift)).
        stages: shapes and order; layers are matched by position, and called as the stages are.
        gain:   255 (exact), or 256 as in the seed's NumPy program and shipped ``lenet_bias.bin``.

    Raises:
        FpgaiError: not such a file, truncated, or a pickle that asks for anything but tensors and numbers (torch.load
                    with weights_only=True runs none); another number of layers, other shapes, weights outside 0..255;
                    names file and layer.
    """
    from hq_lib.models.public import CheckpointError, unpickled  # with torch, which no other format needs

    content = read_file(Path(path))
    try:
        return _layers(*_contents(unpickled(content, path)), stages, gain)
    except CheckpointError as error:
        raise FpgaiError(str(error)) from error
    except FpgaiError as error:
        raise FpgaiError(f"{path}: {error}") from error


def _contents(result: Any) -> tuple[dict[str, np.ndarray], list[Quant]]:
    """Return the arrays by name and the quant triples of what was unpickled."""
    sound = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], dict) and type(result[1]) is list
    need(sound, "it holds no (state_dict, list)")
    state, numbers = result
    plain = all(isinstance(k, str) and getattr(v, "is_cpu", False) for k, v in state.items())
    need(plain, "its state dict holds more than tensors")
    need(all(type(n) is int for n in numbers) and len(numbers) % 3 == 0, "its list is not made of integer triples")
    try:
        arrays = {key: value.detach().numpy() for key, value in state.items()}
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse
        raise FpgaiError(f"its state dict holds a tensor that is no plain array ({error})") from error
    return arrays, [(m, s, z) for m, s, z in zip(*[iter(numbers)] * 3, strict=True)]


def _layers(state: dict[str, np.ndarray], quants: list[Quant], stages: Sequence[Stage], gain: int) -> list[FpgaiLayer]:
    weights = [key for key in state if key.endswith(".weight")]
    counts = (len(weights), len(state) - len(weights), len(quants))
    need(set(counts) == {len(stages)}, f"{counts} weights, biases and quant triples for {len(stages)} stages")
    layers = []
    for stage, key, quant in zip(stages, weights, quants, strict=True):
        check_quant(*quant, f"layer {stage.name!r}")
        w, b = state[key], state.get(f"{key.removesuffix('.weight')}.bias")
        is_byte = w.dtype.kind in "iu" and w.min(initial=0) >= 0 and w.max(initial=0) <= 255
        need(is_byte, f"{key!r}: weights that are not integers in 0..255")
        if b is None or b.shape != stage.shape[:1] or w.shape != stage.shape:
            found = "no bias" if b is None else f"bias {b.shape}"
            raise FpgaiError(f"{key!r} is {w.shape} with {found}; stage {stage.name!r} needs {stage.shape}")
        layers.append(FpgaiLayer(stage, w.astype(np.uint8), bias_integers(b, quant, gain, key), *quant))
    return layers


def bias_integers(bias: np.ndarray, quant: Quant, gain: float, what: str) -> np.ndarray:
    """Return rint(bias gain / (m 2^-shift)), int32 (C_out,), of real biases; ``FpgaiError`` beyond int32."""
    steps = np.rint(np.ldexp(bias.astype(np.float64) * gain / quant[0], quant[1]))
    fits = bool(np.all(np.isfinite(steps))) and np.abs(steps).max(initial=0) < 2**31
    need(fits, f"{what!r}: a bias is not finite or exceeds int32 accumulator steps")
    return steps.astype(np.int32)
