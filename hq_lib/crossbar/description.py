"""Descriptions: nested settings as one flat dictionary of plain values, for result rows and records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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


def difference(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """In words the first setting in which two engines' descriptions differ, or "" where they do not.

    Time ("t_s"), temperature ("celsius") and the conditions of a bench ("env.*") may pass.

    Args:
        stored: from JSON. ``present``: from ``describe()``.
    """
    now = json.loads(json.dumps(present))
    for key in sorted(stored.keys() | now.keys()):
        passing = key in ("t_s", "celsius") or key.startswith("env.")
        if not passing and (key not in stored or key not in now or stored[key] != now[key]):
            return f"{key} was {stored.get(key)!r:.80}, here it is {now.get(key)!r:.80}"
    return ""


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return "sha256:" + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return repr(value)
