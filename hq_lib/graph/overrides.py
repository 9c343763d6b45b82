"""Overrides of a bit policy: patterns of layer names or types, and what they say about weights and activations.

A pattern is a name with ``*``, or one of the types "first", "last", "depthwise", "linear" (``placement.layer_types``).
"""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from hq_lib.graph.placement import LAYER_TYPES
from hq_lib.graph.spec import PolicyError, Spec, parse_spec, unknown_key
from hq_lib.results.hints import nearest_few

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
    overrides: Mapping[str, Mapping[str, Any]],
    weights: dict[str, Spec],
    acts: dict[str, Spec],
    types: Mapping[str, Mapping[str, Collection[str]]],
) -> dict[tuple[str, str], str]:
    """Change ``weights`` and ``acts`` in place as ``overrides`` say, in their order.

    Args:
        types: "weight" and "act" -> name of a tensor -> the layer types it is of.

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
            hits = _hits(pattern, key, {kind: tables[kind] for kind in asked}, types)
            if not hits:
                raise PolicyError(_no_match(pattern, key, {name for kind in asked for name in tables[kind]}, asked))
            for kind, name in hits:
                tables[kind][name] = parse_spec(like, key, base=tables[kind][name])
                origins[kind, name] = key
    return origins


def _hits(
    pattern: str, key: str, tables: Mapping[str, Iterable[str]], types: Mapping[str, Mapping[str, Collection[str]]]
) -> list[tuple[str, str]]:
    """Return (kind, name) of the tensors that a pattern means: by name, else by type."""
    named = [(kind, name) for kind, names in tables.items() for name in names if fnmatchcase(name, pattern)]
    typed = [(kind, name) for kind, names in tables.items() for name in names if pattern in types[kind].get(name, ())]
    if named and typed and named != typed:
        theirs = ", ".join(sorted({name for _, name in typed}))
        raise PolicyError(
            f"{key}: {named[0][1]!r} is the name of a layer and the type of others; write {pattern + '*'!r} for "
            f"the name, or name those of the type: {theirs}"
        )
    return named or typed


def _no_match(pattern: str, key: str, names: Iterable[str], kinds: Iterable[str]) -> str:
    if pattern in LAYER_TYPES:
        return f"{key}: the network has no layer of the type {pattern!r} whose {' or '.join(kinds)} is quantized"
    what = " or ".join({"weight": "weight", "act": "quantized activation"}[kind] for kind in kinds)
    names = sorted(names)
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{key}: matches no {what}; {pattern + '.*'!r} would match what is inside it"
    return f"{key}: matches no {what}; nearest: {nearest_few(pattern, names)}"
