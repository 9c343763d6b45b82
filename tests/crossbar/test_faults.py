"""Stuck cells: drawn at their rate, kept in files, damage refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hq_lib.crossbar import Circuit, CrossbarError, Faults, SimEngine
from hq_lib.crossbar.mapping import STUCK_HIGH, STUCK_LOW
from hq_lib.crossbar.native import stream
from hq_lib.crossbar.profiles import PCM_NANDAKUMAR

SIGMAS = 5


def test_stuck_cells_are_drawn_at_their_rate_and_stay():
    faults = Faults(0.02, 0.05)
    codes = faults.codes("a", (400, 50, 2), stream(0, "faults"))
    n = codes.numel()
    for code, rate in ((STUCK_LOW, 0.02), (STUCK_HIGH, 0.05)):
        assert abs(float((codes == code).double().mean()) - rate) < SIGMAS * math.sqrt(rate / n)
    engine = SimEngine(Circuit(replace(PCM_NANDAKUMAR, read=None), faults=Faults(0.1, 0.1)))
    handle = engine.load(np.random.default_rng(0).integers(-127, 128, (60, 8)), 1.0, "a")
    cells = engine.layer(handle).cells
    late = cells.conductance(1e7)
    assert bool((late[cells.codes == STUCK_HIGH] == 25.0).all())
    assert bool((late[cells.codes == STUCK_LOW] == 0.0).all())
    measured = Faults(maps={"a": cells.codes.numpy()})
    again = SimEngine(Circuit(PCM_NANDAKUMAR, faults=measured, seed=9))
    other = again.load(handle.w_int, 1.0, "a")
    assert torch.equal(again.layer(other).cells.codes, cells.codes)
    again = SimEngine(Circuit(faults=measured))
    with pytest.raises(CrossbarError, match="cells are"):
        again.load(np.ones((3, 2), int), 1.0, "a")
