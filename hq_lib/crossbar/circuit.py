"""Circuit: every setting of a simulated crossbar in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

from hq_lib.crossbar.adc import Adc
from hq_lib.crossbar.checks import CrossbarError, check_choice, check_kind
from hq_lib.crossbar.devices import Device
from hq_lib.crossbar.drive import Drive
from hq_lib.crossbar.faults import Faults
from hq_lib.crossbar.mapping import Mapping
from hq_lib.crossbar.profiles import PCM_JOSHI
from hq_lib.crossbar.remapping import CHOICES as REMAPS
from hq_lib.crossbar.wires import Wires

PATHS = ("auto", "collapsed", "converted")
PRECISIONS = ("float32", "float64")


@dataclass(frozen=True)
class Circuit:
    """A crossbar: what its cells, converters and wires are, and how it is computed."""

    device: Device = PCM_JOSHI
    """Kind of memory cell; `profiles` has the published ones."""
    mapping: Mapping = field(default_factory=Mapping)
    """How weights are put on cells."""
    drive: Drive = field(default_factory=Drive)
    """How inputs are put on rows."""
    adc: Adc | None = None
    """Converters; None: currents are read ideally."""
    wires: Wires | None = None
    """Wire resistances; None: none."""
    faults: Faults = field(default_factory=Faults)
    """Stuck cells."""
    remap: str = "none"
    """What is done about known stuck cells: "none", "partner", "rows" or "both"."""
    seed: int = 0
    """Seed of every draw; draws depend on seed, layer name and purpose only."""
    path: str = "auto"
    """"auto": one matmul where converters are absent or lose nothing; "converted": never; "collapsed": nothing else."""
    precision: str = "float32"
    """Of currents. "float64" keeps matrices on a grid on which sums are exact (inputs up to 12 bits): answers are
    bit-identical for any batch size and thread count. So they are with "float32" behind converters, where cells are
    read on 32,767 steps of their column's largest (a change of at most 2e-5 of it; whole numbers stay as they are),
    in C. Without converters, or with a curved characteristic, INL or noise that depends on the cell, the last bit of a
    float32 sum may depend on batch size and threads, and rarely moves a rounding."""

    def __post_init__(self) -> None:
        for name, kind in (("device", Device), ("mapping", Mapping), ("drive", Drive), ("faults", Faults)):
            check_kind(getattr(self, name), kind, f"Circuit.{name}")
        for name, kind in (("adc", Adc), ("wires", Wires)):
            if getattr(self, name) is not None:
                check_kind(getattr(self, name), kind, f"Circuit.{name}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise CrossbarError(f"Circuit.seed = {self.seed!r} must be a whole number")
        check_choice(self.remap, REMAPS, "remap")
        check_choice(self.path, PATHS, "path")
        check_choice(self.precision, PRECISIONS, "precision")

    def signed(self, x_signed: bool) -> bool:
        """Whether converters see currents of both signs."""
        return self.mapping.subtract == "analog" or (x_signed and self.drive.mode == "analog")
