"""How one tensor is quantized: a method, a number of bits, and the method's own options.

Written short, a spec is ``"lsq:4"`` (method and bits), ``4`` (bits) or ``"float"``; written long, a mapping
``{method: lsq, bits: 4, axis: null}`` whose other keys go to the method's constructor.

Overrides of a policy say specs by pattern: a name with ``*``, or one of the types "first", "last", "depthwise",
"linear" (``placement.layer_types``).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from hq_lib import quantizers
from hq_lib.quantizers import FLOAT_BITS
from hq_lib.quantizers.affine import MAX_BITS, is_width
from hq_lib.results.hints import check_known, nearest_few

HYBRID = "hybrid"
METHODS = {*quantizers.METHODS, HYBRID}
KINDS = ("weight", "act")
LAYER_TYPES = ("first", "last", "depthwise", "linear")


class PolicyError(ValueError):
    """A bit policy that cannot be carried out; the message names the key at fault."""


class QuantizeError(ValueError):
    """A network that cannot be quantized, or is quantized already; the message names the layer and the way out."""


@dataclass(frozen=True)
class Spec:
    """Method, bits and options of one tensor."""

    method: str = "minmax"
    """a name that ``quantizers.weight_quantizer`` / ``act_quantizer`` know, or "hybrid" (see ``BitPolicy.hybrid``)"""

    bits: int = FLOAT_BITS
    """1..16, or 32 = the tensor stays in float and gets no quantizer"""

    options: Mapping[str, Any] = field(default_factory=dict)
    """keyword arguments of the quantizer, e.g. ``{"axis": None}`` for one scale per weight tensor; 0, the default, is
    one per output channel, whatever the layer"""

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays in float."""
        return self.bits == FLOAT_BITS

    def __str__(self) -> str:
        if self.is_float:
            return "float"
        options = "".join(f",{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method}:{self.bits}{options}"

    def to_plain(self) -> "str | dict[str, Any]":
        """Return the spec as plain data: ``"lsq:4"`` (``"lsq:32"`` in float), or a dict where it has options."""
        if not self.options:
            return f"{self.method}:{self.bits}"
        return {"method": self.method, "bits": self.bits, **self.options}


def parse_spec(like: Any, key: str, *, base: Spec | None = None) -> Spec:
    """Return ``like`` (a Spec, "method:bits", "method", bits, or a mapping) as a Spec; ``base`` fills what it omits.

    Raises:
        PolicyError: begins with ``key``; malformed text, bits outside 1..16 and 32, or a method without bits.
    """
    if isinstance(like, Spec):
        check_width(like.bits, key)
        return like
    entries: dict[str, Any]
    if isinstance(like, Mapping):
        entries = dict(like)
    elif isinstance(like, int) and not isinstance(like, bool):
        entries = {"bits": like}
    elif isinstance(like, str) and (found := re.fullmatch(r"([^\W\d]\w*)(?::(\d+))?", like.strip())):
        entries = {"method": found[1]} | ({"bits": int(found[2])} if found[2] else {})
        entries = {"bits": FLOAT_BITS} if entries == {"method": "float"} else entries
    else:
        raise PolicyError(f"{key}: {like!r} is no spec; write 4, 'lsq:4', 'float', or {{method: lsq, bits: 4}}")
    method = entries.pop("method", base.method if base else "minmax")
    if (found := re.fullmatch(r"([a-z_]+?)(\d+)", str(method))) and found[1] in METHODS:
        raise PolicyError(f"{key}: {method!r} is no method; write '{found[1]}:{found[2]}' (method:bits)")
    if "bits" not in entries and base is None:
        raise PolicyError(f"{key}: no bits given for method {method!r}; write '{method}:4'")
    bits = check_width(entries.pop("bits", base.bits if base else FLOAT_BITS), key)
    inherited = base.options if base and base.method == method else {}
    return Spec(method, bits, {**inherited, **entries})


def check_width(bits: Any, key: str) -> int:
    """Return ``bits`` if it is 1..16 or 32 (float); else raise ``PolicyError`` that begins with ``key``."""
    if not (is_width(bits) or (isinstance(bits, int) and bits == FLOAT_BITS)):
        raise PolicyError(f"{key}: bits must be 1..{MAX_BITS}, or {FLOAT_BITS} for float; got {bits!r}")
    return bits


def make_quantizer(spec: Spec, kind: str, key: str, *, signed: bool = True) -> quantizers.Quantizer | None:
    """Return a new quantizer for ``spec``, or None for a float tensor.

    Args:
        spec:     method, bits and options.
        kind:     "weight" or "act".
        key:      what the error names.
        signed:   whether the activation can be negative (weights always can).

    Raises:
        PolicyError: the method is unknown, cannot do these bits, or does not take these options.
    """
    build = getattr(quantizers, f"{kind}_quantizer")
    sign = {"signed": signed} if kind == "act" else {}
    try:
        return build(spec.method, spec.bits, **{**sign, **spec.options})
    except (ValueError, TypeError) as error:
        raise PolicyError(f"{key}: {error}") from error


def of_kind(specs: Mapping[str, Spec], kind: str) -> dict[str, Spec]:
    """Return those of ``specs``, "weight <layer>" or "act <activation>", that are of this kind, by name alone."""
    return {tensor.split(" ", 1)[1]: spec for tensor, spec in specs.items() if tensor.startswith(f"{kind} ")}


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
            check_known(said, (*KINDS, "both"), f"key of {key}", error=PolicyError)
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
