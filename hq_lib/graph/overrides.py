"""Overrides of a bit policy: patterns of layer names, and what they say about weights and activations."""

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from hq_lib.graph.spec import PolicyError, Spec, parse_spec, unknown_key

KINDS = ("weight", "act")


def check_overrides(overrides: Any) -> dict[str, dict[str, Any]]:
    """Return ``overrides`` with every entry as a mapping over "weight" and "act"; ``{"fc": 8}`` means 8 bits for both.

    Raises:
        PolicyError: names the entry that is no spec, or the key that is neither "weight" nor "act".
    """
    if not isinstance(overrides, Mapping):
        raise PolicyError(f"policy.overrides: a mapping of patterns is needed, got {type(overrides).__name__}")
    return {str(pattern): _check_entry(pattern, entry) for pattern, entry in overrides.items()}


def _check_entry(pattern: str, entry: Any) -> dict[str, Any]:
    key = f"policy.overrides[{pattern!r}]"
    if not isinstance(entry, Mapping) or "bits" in entry or "method" in entry:
        parse_spec(entry, key, base=Spec())
        return {"both": entry}
    for name, like in entry.items():
        unknown_key(name, (*KINDS, "both"), key)
        parse_spec(like, f"{key}.{name}", base=Spec())
    return dict(entry)


def apply_overrides(
    overrides: Mapping[str, Mapping[str, Any]], weights: dict[str, Spec], acts: dict[str, Spec]
) -> dict[tuple[str, str], str]:
    """Change ``weights`` and ``acts`` in place as ``overrides`` say, in their order.

    Returns:
        for each changed tensor (kind, name), the key of the override that spoke last.

    Raises:
        PolicyError: names the pattern that matches no layer, with the nearest names.
    """
    origins: dict[tuple[str, str], str] = {}
    tables = {"weight": weights, "act": acts}
    for pattern, entry in overrides.items():
        for said, like in entry.items():
            key = f"policy.overrides[{pattern!r}]" + ("" if said == "both" else f".{said}")
            asked = KINDS if said == "both" else (said,)
            hits = [(kind, name) for kind in asked for name in tables[kind] if fnmatchcase(name, pattern)]
            if not hits:
                raise PolicyError(_no_match(pattern, key, {name for kind in asked for name in tables[kind]}, asked))
            for kind, name in hits:
                tables[kind][name] = parse_spec(like, key, base=tables[kind][name])
                origins[kind, name] = key
    return origins


def _no_match(pattern: str, key: str, names: Iterable[str], kinds: Iterable[str]) -> str:
    what = " or ".join({"weight": "weight", "act": "quantized activation"}[kind] for kind in kinds)
    names = sorted(names)
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{key}: matches no {what}; {pattern + '.*'!r} would match what is inside it"
    near = difflib.get_close_matches(pattern, names, n=3) or names[:8]
    return f"{key}: matches no {what}; nearest: {', '.join(map(repr, near))}"
