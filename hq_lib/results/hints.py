"""What an error says beside "unknown": the nearest name that exists."""

import difflib
from collections.abc import Iterable


def nearest_few(name: object, known: Iterable[object]) -> str:
    """The three nearest of the names that exist, quoted, or where none is near the first eight of them."""
    names = [str(k) for k in known]
    return ", ".join(map(repr, difflib.get_close_matches(str(name), names, n=3) or names[:8]))


def check_known(name: object, known: Iterable[object], what: str, *, error: type[Exception] = ValueError) -> None:
    """Raise ``error``, which lists what is known and offers the nearest, unless ``name``, a ``what``, is among it."""
    names = [*known]
    if name not in names:
        raise error(f"unknown {what} {name!r}: choose one of {', '.join(map(str, names))}{nearest(name, names)}")


def check(who: str, kind: str, names: Iterable[object], known: Iterable[object], **how: type[ValueError]) -> None:
    """`check_known` of each name of a ``kind`` that ``who`` takes."""
    known = list(known)
    for name in names:
        check_known(name, known, f"{kind} of {who}", **how)


def nearest(name: object, known: Iterable[object]) -> str:
    """``"; did you mean 'pact'?"``, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
