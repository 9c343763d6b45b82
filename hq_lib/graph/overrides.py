"""Overrides of a bit policy: patterns of layer names or types, and what they say about weights and activations.

A pattern is a name with ``*``, or one of the types "first", "last", "depthwise", "linear" (``placement.layer_types``).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from hq_lib.graph.placement import LAYER_TYPES
from hq_lib.graph.spec import PolicyError, Spec, parse_spec, unknown_key
from hq_lib.results.hints import nearest_few

KINDS = ("weight", "act")


def statements(overrides: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield (pattern, "weight", "act" or "both", key for errors, spec): ``{"fc": 8}`` says 8 bits of both.

    Raises:
        PolicyError: names the entry that is no spec, or the key that is neither "weight" nor "act".
    """
    if not isinstance(overrides, Mapping):
        raise PolicyError(f"policy.overrides: a mapping of patterns is needed, got {type(overrides).__name__}")
    for pattern, entry in overrides.items():
        key = f"policy.overrides[{pattern!r}]"
        whole = not isinstance(entry, Mapping) or "bits" in entry or "method" in entry
        for said, like in {"both": entry}.items() if whole else entry.items():
            unknown_key(said, (*KINDS, "both"), key)
            key_of_one = key if said == "both" else f"{key}.{said}"
            parse_spec(like, key_of_one, base=Spec())
            yield str(pattern), said, key_of_one, like


def apply_overrides(overrides: Any, specs: dict[str, Spec], types: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Change ``specs`` in place as ``overrides`` say, in their order.

    Args:
        specs: tensor, "weight <layer>" or "act <activation>" -> its spec.
        types: the same -> the layer types it is of.

    Returns:
        for each changed tensor the key of the override that spoke last.

    Raises:
        PolicyError: names the pattern that matches no layer, with the nearest names.
    """
    origins: dict[str, str] = {}
    for pattern, said, key, like in statements(overrides):
        kinds = KINDS if said == "both" else (said,)
        names = {tensor: tensor.split(" ", 1)[1] for tensor in specs if tensor.startswith(kinds)}
        named = [tensor for tensor, name in names.items() if fnmatchcase(name, pattern)]
        typed = [tensor for tensor in names if pattern in types[tensor]]
        if named and typed and named != typed:
            theirs = ", ".join(sorted({names[tensor] for tensor in typed}))
            raise PolicyError(
                f"{key}: {names[named[0]]!r} is the name of a layer and the type of others; write {pattern + '*'!r} "
                f"for the name, or name those of the type: {theirs}"
            )
        if not named and not typed:
            raise PolicyError(_no_match(pattern, key, {*names.values()}, kinds))
        for tensor in named or typed:
            specs[tensor] = parse_spec(like, key, base=specs[tensor])
            origins[tensor] = key
    return origins


def _no_match(pattern: str, key: str, names: Iterable[str], kinds: Iterable[str]) -> str:
    if pattern in LAYER_TYPES:
        return f"{key}: the network has no layer of the type {pattern!r} whose {' or '.join(kinds)} is quantized"
    what = " or ".join({"weight": "weight", "act": "quantized activation"}[kind] for kind in kinds)
    names = sorted(names)
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{key}: matches no {what}; {pattern + '.*'!r} would match what is inside it"
    return f"{key}: matches no {what}; nearest: {nearest_few(pattern, names)}"
