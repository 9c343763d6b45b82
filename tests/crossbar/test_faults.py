"""Stuck cells: drawn at their rate, kept in files, damage refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hq_lib.crossbar import Circuit, CrossbarError, Faults, SimEngine, load_maps, save_maps
from hq_lib.crossbar.faults import STUCK_HIGH, STUCK_LOW
from hq_lib.crossbar.profiles import PCM_NANDAKUMAR
from hq_lib.crossbar.streams import stream

SIGMAS = 5


def test_stuck_cells_are_drawn_at_their_rate_and_stay(tmp_path):
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
    save_maps(tmp_path / "maps.npz", {"a": cells.codes.numpy()})
    again = SimEngine(Circuit(PCM_NANDAKUMAR, faults=load_maps(tmp_path / "maps.npz"), seed=9))
    other = again.load(handle.w_int, 1.0, "a")
    assert torch.equal(again.layer(other).cells.codes, cells.codes)
    again = SimEngine(Circuit(faults=load_maps(tmp_path / "maps.npz")))
    with pytest.raises(CrossbarError, match="cells are"):
        again.load(np.ones((3, 2), int), 1.0, "a")


@pytest.mark.parametrize("spoil", [lambda c: c[:60], lambda c: b"", lambda c: b"not an archive", lambda c: c[:-9]])
def test_damaged_maps_are_named(tmp_path, spoil):
    save_maps(tmp_path / "maps.npz", {"a": np.zeros((4, 2, 2), np.uint8)})
    (tmp_path / "bad.npz").write_bytes(spoil((tmp_path / "maps.npz").read_bytes()))
    with pytest.raises(CrossbarError, match=r"bad\.npz: no fault maps"):
        load_maps(tmp_path / "bad.npz")
