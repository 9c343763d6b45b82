"""One look per method, in every figure: colour, marker and line style.

Within a group of methods that are compared with each other the colours also differ in lightness (CIELAB L*, at least
6 apart) and the markers differ, so that a figure printed in grey still tells them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hq_lib.results.hints import nearest

# Groups of what is drawn together, dark to light; what came later at the end, so that no other look changes.
GROUPS: dict[str, dict[str, str]] = {
    "trained": {
        "dsq": "#002596", "pact": "#940019", "dorefa_hw": "#005f8e", "lsq": "#007f31", "mpact": "#e33aa4",
        "dorefa": "#00a5bd", "lsq_plus": "#a0b507", "ste": "#ffb239",
    },
    "post_training": {
        "qdrop": "#003179", "brecq": "#980024", "adaround": "#006d36", "aciq": "#0a7abb", "percentile": "#d857ce",
        "mse": "#f78527", "minmax": "#d3bc17",
    },
    "selection": {
        "herding": "#06299e", "k_center": "#a7001e", "highest": "#007b3d", "random": "#028ccd", "trimmed": "#f28123",
        "lowest": "#c9bf19",
    },
    "executor": {"c": "#003989", "numpy": "#c5112a", "onnx": "#00a152", "fpgai": "#ebaa18"},
    "correction": {"column": "#003989", "bn": "#c5112a", "global": "#00a152", "none": "#ebaa18"},
    "allocation": {"optimal": "#003989", "uniform": "#c5112a", "ends_8": "#00a152", "at_random": "#ebaa18"},
    "model": {
        "resnet20": "#003e77", "toynet": "#ae002b", "mobilenetv2": "#007c3e", "mobilenetv2_seed": "#0089b5",
        "vgg_small": "#b876f0", "vgg11": "#fa8b2e", "lenet": "#d8c32a", "lenet_relu1": "#45003d",
    },
    "stage": {"before": "#9a9a9a", "after": "#003e77"},
    "reference": {"float": "#000000"},
}  # fmt: skip
METHOD_COLORS = {name: color for group in GROUPS.values() for name, color in group.items()}
# The palette of what has no place of its own: the group that spans lightness best.
SPARE = tuple(GROUPS["trained"])
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    color: str
    """Hexadecimal RGB."""
    marker: str
    """matplotlib marker, distinct within the group."""
    linestyle: Any
    """matplotlib line style, distinct within the group."""


def looks(names: Sequence[str]) -> dict[str, Look]:
    """The look of each name; names without one of their own (your own model) get those that are left over, in order."""
    known = {name: look(name) for name in names if name in METHOD_COLORS}
    spare = iter([s for s in map(look, SPARE) if s.color not in {k.color for k in known.values()}])
    try:
        return {name: known.get(name) or next(spare) for name in names}
    except StopIteration:
        raise ValueError(f"{len(names)} lines are too many to tell apart: draw at most {len(SPARE)} unnamed") from None


def look(name: str, k: int = 0) -> Look:
    """The look of a method, model, executor ...; ``ValueError`` names the nearest known one.

    ``k`` of 1 and above: of further lines of the same method, in its colour with other marks. Methods that only
    occur as published numbers have no look of their own: draw them with ``look("float")``.
    """
    for group in GROUPS.values():
        if name in group:
            place = (list(group).index(name) + k) % len(_MARKERS)
            return Look(group[name], _MARKERS[place], _LINES[place])
    hint = nearest(name, METHOD_COLORS) or f"; known are {', '.join(METHOD_COLORS)}"
    raise ValueError(f"no colour for {name!r}: give it a place in figures.methods.GROUPS{hint}")
