"""Descriptions: nested settings as one flat dictionary of plain values, for result rows and records."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """{"prefix.field": plain value, ...} of a (nested) dataclass; classes are named, arrays are hashed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {prefix: type(value).__name__}
        for field in dataclasses.fields(value):
            found |= flatten(f"{prefix}.{field.name}", getattr(value, field.name))
        return found
    if isinstance(value, Mapping):
        return {f"{prefix}.{key}": _plain(item) for key, item in value.items()}
    return {prefix: _plain(value)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return "sha256:" + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return repr(value)
