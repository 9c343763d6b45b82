"""Mapping: weights come back from their cell levels exactly, and levels stay inside the window."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_lib.crossbar import Drive, Mapping
from hq_lib.crossbar.circuit import Step

MAPPINGS = st.builds(
    Mapping,
    scheme=st.sampled_from(["pair", "offset"]),
    scale=st.sampled_from(["column", "layer", "none"]),
    cell_bits=st.sampled_from([None, 1, 2, 3, 4, 8]),
    subtract=st.sampled_from(["analog", "digital"]),
)


@settings(max_examples=150, deadline=None)
@given(mapping=MAPPINGS, w_bits=st.integers(1, 9), seed=st.integers(0, 999))
def test_weights_come_back_and_levels_fit(mapping, w_bits, seed):
    half = 2 ** (w_bits - 1)
    w = torch.from_numpy(np.random.default_rng(seed).integers(-half, max(half, 2), (7, 4)))
    plan = mapping.encode(w, w_bits)
    fractions = plan.levels / plan.span[None, :, None]
    torch.testing.assert_close(plan.decode(plan.planes(fractions)), w.to(torch.float64), rtol=0, atol=1e-9)
    assert float(fractions.min()) >= 0
    assert float(fractions.max()) <= 1
    if mapping.cell_bits is not None:
        assert torch.equal(plan.levels, plan.levels.round())


def test_pair_by_hand():
    plan = Mapping(cell_bits=2, scale="none").encode(torch.tensor([[6], [-5], [0]]), 4)
    # 6 = 2 + 4*1 in the positive cells, 5 = 1 + 4*1 in the negative ones; planes are (slice 0 +, -, slice 1 +, -)
    assert plan.levels[:, 0].tolist() == [[2, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert plan.weight.tolist() == [1, 4]


def test_offset_by_hand():
    plan = Mapping("offset", cell_bits=2, scale="none", subtract="digital").encode(torch.tensor([[6], [-8]]), 4)
    assert plan.levels[:, 0].tolist() == [[2, 3], [0, 0]]  # 6 + 8 = 14 = 2 + 4*3, -8 + 8 = 0
    assert plan.offset.tolist() == [8]


@pytest.mark.parametrize("scale", ["column", "layer"])
def test_scale_fills_the_window(scale):
    w = torch.tensor([[10, 2], [-3, -5]])
    plan = Mapping(scale=scale).encode(w, 8)
    assert (plan.levels.amax((0, 2)) / plan.span).tolist() == ([1.0, 1.0] if scale == "column" else [1.0, 0.5])


def test_column_gain_of_slices_is_whole_and_fills_the_levels():
    plan = Mapping(cell_bits=2, scale="column").encode(torch.tensor([[1, 100], [0, -3]]), 8)
    assert plan.gain.tolist() == [255, 2]


@pytest.mark.parametrize(
    ("bits", "signed", "width", "want"),
    [
        (4, False, 1, [(0, 1, 1), (1, 1, 2), (2, 1, 4), (3, 1, 8)]),
        (5, False, 2, [(0, 3, 1), (2, 3, 4), (4, 1, 16)]),
        (4, True, 2, [(0, 3, 1), (2, 1, 4), (3, 1, -8)]),
    ],
)
def test_input_steps_by_hand(bits, signed, width, want):
    assert Drive("serial", width).steps(bits, signed) == [Step(*step) for step in want]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_steps_recombine_every_input(signed, width):
    x = torch.arange(-128, 128) if signed else torch.arange(256)
    drive = Drive("serial", width)
    steps = drive.steps(8, signed)
    assert torch.equal(sum(step.factor * step.digits(x) for step in steps), x.to(torch.float32))
    power = sum((step.factor * step.digits(x)) ** 2 for step in steps)
    assert torch.equal(drive.power(x, 8, signed), power)
    assert max(int(step.digits(x).max()) for step in steps) == drive.peak(8, signed)
    assert min(int(step.digits(x).min()) for step in steps) == 0
