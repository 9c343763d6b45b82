"""What an error says beside "unknown": the nearest name that exists."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """``"; did you mean 'pact'?"``, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
