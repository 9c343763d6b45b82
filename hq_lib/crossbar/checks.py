"""Refusals: the errors of the crossbar and the checks that raise them, each naming the value and its mend.

Descriptions: nested settings as one flat dictionary of plain values, for result rows and records.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from hq_lib.results import settings


class CrossbarError(ValueError):
    """A setting, weight, input or calibration that the crossbar cannot honour."""


class BenchError(RuntimeError):
    """The bench (or its connection) failed after every permitted attempt; recorded data is kept."""


class TraceError(CrossbarError):
    """A recorded trace is damaged, of another network, or lacks the multiplication that was asked for."""


class Bound(settings.Bound):
    """As ``results.settings.Bound``."""

    refusal = CrossbarError


class Settings(settings.Settings):
    """As ``results.settings.Settings``."""

    refusal = CrossbarError


_IDEAL = "0 bits does not mean 'ideal', leave the part out (None) for an ideal one"
BITS, SIGNED_BITS = (Bound(f">= {low} and <= 16", whole=True, mend=_IDEAL) for low in (1, 2))
FRACTION = Bound(">= 0 and < 1", mend="a fraction, not a percentage: 5 % is 0.05")
POSITIVE = Bound("> 0")
Bits = Annotated[int, BITS]
CellBits = Annotated[int, Bound(">= 1 and <= 8", whole=True, mend=_IDEAL)]
Fraction = Annotated[float, FRACTION]
Share = Annotated[float, Bound("> 0 and <= 1", mend="a share, not a percentage: 99 % is 0.99")]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, Bound(">= 0")]
Count = Annotated[int, Bound(">= 1", whole=True)]
"""Annotations of fields of `Settings`."""


Numbers = np.ndarray | Tensor
"""What engines take; see `as_tensor`."""


def as_tensor(values: Numbers) -> Tensor:
    """A tensor of the same numbers in main memory, shared where that is allowed; uint16 becomes int32, for lack of
    support. Engines compute there: what came from a GPU is copied, and answers are copied back to it."""
    if not isinstance(values, np.ndarray | Tensor):
        raise CrossbarError(f"a NumPy array or a torch tensor is needed, not {type(values).__name__}")
    if isinstance(values, np.ndarray):
        usable = values.flags.writeable and min(values.strides, default=1) >= 0
        values = torch.from_numpy(values if usable else values.copy())
    return values.cpu().to(torch.int32) if values.dtype is torch.uint16 else values.cpu()


def as_integers(values: Numbers, what: str, n_axes: int = 2) -> Tensor:
    """Tensor of the same integers with ``n_axes`` axes; float, complex or ragged arrays are refused."""
    tensor = as_tensor(values)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise CrossbarError(f"{what} must hold integers, not {tensor.dtype}; round and cast it first")
    if tensor.ndim != n_axes:
        raise CrossbarError(f"{what} must have {n_axes} axes, not shape {tuple(tensor.shape)}")
    return tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor


def check_range(values: Tensor, low: int, high: int, what: str) -> None:
    """Nothing, or an error that names the first offending range: all ``values`` must lie in [low, high]."""
    held = torch.iinfo(values.dtype)
    if values.numel() == 0 or (low <= held.min and held.max <= high):
        return
    least, most = (int(v) for v in torch.aminmax(values))
    if least < low or most > high:
        raise CrossbarError(f"{what} spans {least}..{most}, outside the declared {low}..{high}; declare more bits")


OPTION = {"option": True}
"""Metadata of a dataclass field whose default changes nothing: descriptions leave it out while it has that, so that
rows and records older than the option keep their identity."""


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """{"prefix.field": plain value, ...} of a (nested) dataclass; classes are named, arrays are hashed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {prefix: type(value).__name__}
        for field in dataclasses.fields(value):
            if field.metadata.get("option") and getattr(value, field.name) == field.default:
                continue
            found |= flatten(f"{prefix}.{field.name}", getattr(value, field.name))
        return found
    if isinstance(value, Mapping):
        return {f"{prefix}.{key}": _plain(item) for key, item in value.items()}
    return {prefix: _plain(value)}


def difference(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """In words the first setting in which two engines' descriptions differ, or "" where they do not.

    Time ("t_s"), temperature ("celsius"), which every call holds, and the conditions of a bench ("env.*") may pass.

    Args:
        stored: from JSON. ``present``: from ``describe()``.
    """
    now = json.loads(json.dumps(present))
    for key in sorted(stored.keys() | now.keys()):
        passing = key in ("t_s", "celsius") or key.startswith("env.")
        if not passing and (key not in stored or key not in now or stored[key] != now[key]):
            then, here = (f"{side[key]!r:.80}" if key in side else "not set" for side in (stored, now))
            return f"{key} was {then}, here it is {here}"
    return ""


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return "sha256:" + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return repr(value)
