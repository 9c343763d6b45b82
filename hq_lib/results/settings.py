"""Settings that are held to their annotations: bounds, choices and classes stand at the field, nowhere else.

@dataclass(frozen=True)
class Drive(Settings):
    volts: Annotated[float, Bound("> 0 and < 1")] = 0.2
    pulses: Literal["all", "bits"] = "all"
"""

import math
import operator
import re
from dataclasses import dataclass
from functools import cache, partial
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hq_lib.results.hints import check_known

_SIGNS = {">=": operator.ge, ">": operator.gt, "<": operator.lt, "<=": operator.le}
_hints = cache(partial(get_type_hints, include_extras=True))


class _Plain(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2 and everywhere else."""


_Plain.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"])


def plain(text: str) -> Any:
    """The plain data that a YAML text stands for."""
    return yaml.load(text, Loader=_Plain)


@dataclass(frozen=True)
class Bound:
    """What a number must be; in the annotation of a field of `Settings` it holds for that field."""

    ends: str
    """As the refusal says it: ">= 0 and < 1"."""
    whole: bool = False
    """Whether fractions are refused."""
    mend: str = ""
    """What the refusal says beside the ends."""
    refusal: ClassVar[type[ValueError]] = ValueError
    """What a refusal is."""

    def check(self, value: Any, what: str) -> Any:
        """``value`` itself, finite and within the ends; otherwise an error that says ``what``, ends and mend."""
        number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        ends = [end.split() for end in self.ends.split(" and ")]
        if number and math.isfinite(value) and all(_SIGNS[sign](value, float(end)) for sign, end in ends):
            return value
        kind = "whole" if self.whole else "finite"
        raise self.refusal(f"{what} = {value!r} must be a {kind} number {self.ends}{self.mend and '; ' + self.mend}")


_NUMBERS = {int: Integral, float: Real}


class Settings:
    """Base of frozen dataclasses whose annotations hold: bounds, choices (``Literal``), classes, and None if named."""

    refusal: ClassVar[type[ValueError]] = ValueError
    """What a refusal is."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            if get_origin(hint) is ClassVar:
                continue
            value, what = getattr(self, name), f"{type(self).__name__}.{name}"
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if value is None and NoneType in kinds:
                continue
            for bound in getattr(kinds[0], "__metadata__", ()):
                bound.check(value, what)
            if kinds[0] in (int, float) and (isinstance(value, bool) or not isinstance(value, _NUMBERS[kinds[0]])):
                raise self.refusal(f"{what} = {value!r:.60} must be a {'whole ' * (kinds[0] is int)}number")
            if get_origin(kinds[0]) is Literal:
                check_known(value, get_args(kinds[0]), what, error=self.refusal)
            elif isinstance(kinds[0], type) and kinds[0].__module__ != "builtins" and not isinstance(value, kinds[0]):
                how = getattr(kinds[0], "MADE_BY", f"{kinds[0].__name__}(...) makes one")
                raise self.refusal(f"{what} = {value!r:.60} must be of type {kinds[0].__name__}: {how}")
