"""Options that are off by default: each with its ideal limit, a closed form, and the bits of before while it is off."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    Convolution,
    CrossbarError,
    Device,
    Drive,
    Faults,
    Mapping,
    SimEngine,
    Verify,
    Wires,
    count,
    device,
    state_independent,
)
from hq_lib.crossbar.cells import effective_conductance
from hq_lib.crossbar.profiles import IDEAL

RNG = np.random.default_rng(0)
W, X = RNG.integers(-127, 128, (150, 20)), RNG.integers(0, 256, (40, 150))


def loaded(circuit, w=W, **more):
    engine = SimEngine(circuit)
    return engine, engine.load(w, 1.0, "a", **more)


def test_options_that_are_off_are_not_described():
    """Rows and records older than an option keep their identity."""
    text = " ".join(SimEngine(Circuit(adc=Adc(), wires=Wires())).describe())
    for name in (
        "verify",
        "halvings",
        "accumulate",
        "managed",
        "active",
        "correlation",
        "temperature",
        "iv_",
        "celsius",
    ):
        assert name not in text
    on = Circuit(drive=Drive(managed=True), adc=Adc(halvings=2), verify=Verify(0.01), wires=Wires(active=0.5))
    described = SimEngine(on).describe()
    assert described["drive.managed"] is True
    assert (described["adc.halvings"], described["wires.active"], described["verify.tolerance"]) == (2, 0.5, 0.01)


# -- write-verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tolerance", "n"), [(0.02, 1), (0.02, 3), (0.05, 10)])
def test_write_verify_takes_the_pulses_and_leaves_the_spread_of_a_truncated_normal(tolerance, n):
    """p = erf(tol / (sigma sqrt 2)) of the pulses hit; pulses (1 - (1-p)^n) / p a cell; errors are a mixture of a
    truncated normal and, where n pulses did not do, its tails."""
    sigma, cells = 0.03, 200 * 300 * 2
    engine, handle = loaded(
        Circuit(state_independent(sigma), verify=Verify(tolerance, n)), RNG.integers(-127, 128, (200, 300))
    )
    made = engine.layer(handle).cells
    pulses, n_cells = made.n_pulses, made.target_uS.numel()
    p = math.erf(tolerance / (sigma * math.sqrt(2)))
    wanted = (1 - (1 - p) ** n) / p
    assert n_cells == cells
    deviation = math.sqrt((1 - p) / p**2 / cells)
    assert abs(pulses / cells - wanted) < 5 * max(deviation, 1e-9)
    error = (made.g0_uS - made.target_uS).flatten() / 25
    missed = float((error.abs() > tolerance).double().mean())
    assert abs(missed - (1 - p) ** n) < 5 * math.sqrt((1 - p) ** n / cells) + 1e-9
    inside = stats.truncnorm(-tolerance / sigma, tolerance / sigma, scale=sigma)
    kept = error[error.abs() <= tolerance]
    assert float(kept.std()) == pytest.approx(inside.std(), rel=0.01)


def test_stuck_cells_away_from_their_target_take_all_pulses():
    """Exact cells take one pulse; a stuck one that is not near its target is tried until the last."""
    faults, verify = Faults(0.1, 0.1), Verify(0.05, 10)
    engine, handle = loaded(Circuit(IDEAL, faults=faults, verify=verify), RNG.integers(-127, 128, (60, 30)))
    made = engine.layer(handle).cells
    held = torch.where(made.codes == 2, 25.0, 0.0)
    far = (made.codes > 0) & ((held - made.target_uS).abs() > 0.05 * 25.0)
    assert made.n_pulses == made.codes.numel() + 9 * int(far.sum())
    assert 0 < far.sum() < (made.codes > 0).sum()


def test_write_verify_of_exact_cells_and_of_one_pulse_changes_nothing():
    plain, handle = loaded(Circuit(device("rram")))
    once, other = loaded(Circuit(device("rram"), verify=Verify(0.001, 1)))
    assert torch.equal(plain.layer(handle).cells.g0_uS, once.layer(other).cells.g0_uS)
    exact, handle = loaded(Circuit(IDEAL, verify=Verify(0.001)))
    assert exact.layer(handle).cells.n_pulses == exact.layer(handle).cells.target_uS.numel()
    np.testing.assert_array_equal(exact.mvm(handle, X), X @ W)


def test_write_verify_brings_products_nearer():
    errors = []
    for verify in (None, Verify(0.01, 20)):
        engine, handle = loaded(Circuit(device("rram"), verify=verify))
        errors.append(float((engine.mvm(handle, torch.from_numpy(X)) - torch.from_numpy(X @ W)).norm()))
    assert errors[1] < 0.5 * errors[0]


# -- converters and drives ---------------------------------------------------------------------------------------------


def test_halved_inputs_take_saturation_away_and_cost_a_bit_of_resolution_each():
    x = torch.from_numpy(X)
    ideal = torch.from_numpy(X @ W)
    found = {}
    for halvings in (0, 1, 8):
        engine, handle = loaded(Circuit(IDEAL, adc=Adc(8, coverage=0.5, halvings=halvings)))
        step = float(engine.calibrate_adc(handle, x).max())
        worst = float((engine.mvm(handle, x) - ideal).abs().max())
        found[halvings] = (engine.layer(handle).n_saturated, worst)
    assert found[0][0] > found[1][0] > found[8][0] == 0
    peak = float(ideal.abs().max())
    worst_step = step * 2 ** math.ceil(math.log2(max(peak / (step * 127), 1)) + 1)
    assert found[8][1] <= 2 * worst_step / 2 + 1  # two row tiles, half a step each, and the rounding of the output
    assert found[8][1] < 0.2 * found[0][1]


def test_where_nothing_saturates_halving_changes_no_bit():
    answers = []
    for halvings in (0, 5):
        engine, handle = loaded(Circuit(device("pcm"), adc=Adc(10, "max", halvings=halvings), path="converted"))
        answers.append(engine.mvm(handle, torch.from_numpy(X)))
    assert float((answers[0] - answers[1]).abs().max()) <= 1  # one is read in C on whole numbers
    with pytest.raises(CrossbarError, match="single bits have no half"):
        Circuit(drive=Drive("serial"), adc=Adc(halvings=1))


def test_managed_inputs_use_the_converter_for_small_rows():
    """Rows of a hundredth of the range: their products are resolved as finely as full rows'."""
    small = torch.from_numpy(X // 100)
    errors = {}
    for managed in (False, True):
        circuit = Circuit(IDEAL, drive=Drive(managed=managed), adc=Adc(8, "max", offset_sigma_lsb=1.0))
        engine, handle = loaded(circuit)
        errors[managed] = float((engine.mvm(handle, small) - small @ torch.from_numpy(W)).norm())
    assert errors[True] < errors[False] / 20
    top = torch.full((3, 150), 255)
    answers = [loaded(Circuit(IDEAL, drive=Drive(managed=m), adc=Adc(8, "max"))) for m in (False, True)]
    first, second = (engine.mvm(handle, top) for engine, handle in answers)
    assert torch.equal(first, second)  # a row at the top of the range is driven as it is


def test_managed_convolutions_are_their_rows():
    w, x = RNG.integers(-127, 128, (4, 2, 3, 3)), RNG.integers(0, 30, (2, 2, 5, 5))
    engine = SimEngine(Circuit(IDEAL, drive=Drive(managed=True), adc=Adc(14, "max")))
    conv = Convolution(engine, w, 1.0, "c", padding=1)
    exact = torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w).double(), padding=1)
    assert float((torch.from_numpy(conv(x)) - exact).abs().max()) < 60


@pytest.mark.parametrize("signed", [False, True])
def test_sums_accumulated_in_analog_are_those_of_analog_inputs(signed):
    """With one conversion at the end, bit by bit and all at once are the same product."""
    x = torch.from_numpy(X - 128 * signed)
    answers = []
    for drive in (Drive(), Drive("serial", accumulate=True)):
        circuit = Circuit(device("pcm"), drive=drive, adc=Adc(8, "max"), path="converted", precision="float64")
        engine, handle = loaded(circuit, x_signed=signed)
        answers.append(engine.mvm(handle, x))
    assert torch.equal(*answers)


def test_accumulated_sums_cost_one_conversion_and_all_reads_and_keep_the_noise_of_the_bits():
    noisy = Device("n", "t", 0.0, 25.0, read=ConstantRead(0.02))
    spread, costs = {}, {}
    for name, drive in {"once": Drive("serial", accumulate=True), "each": Drive("serial"), "analog": Drive()}.items():
        engine, handle = loaded(Circuit(noisy, drive=drive, adc=Adc(16, "max"), path="converted"))
        runs = torch.stack([engine.measure(handle, torch.from_numpy(X)) for _ in range(60)])
        spread[name], costs[name] = float(runs.var(0).mean().sqrt()), count(handle, engine.circuit)
    assert spread["once"] == pytest.approx(spread["each"], rel=0.03)
    assert spread["analog"] > 1.2 * spread["once"]
    assert costs["each"].conversions_per_mvm == 8 * costs["once"].conversions_per_mvm
    assert costs["each"].cell_reads_per_mvm == costs["once"].cell_reads_per_mvm


def test_drives_that_cannot_be_are_refused():
    for wrong in ({"accumulate": True}, {"mode": "serial", "managed": True}):
        with pytest.raises(CrossbarError, match=r"Drive\.accumulate"):
            Drive(**wrong)
    with pytest.raises(CrossbarError, match=r"Drive\.step_bits = 2: mode 'analog' drives all bits at once"):
        Drive("analog", step_bits=2)
    bent = replace(IDEAL, iv_cubic=0.2)
    with pytest.raises(CrossbarError, match="step_bits=1"):
        loaded(Circuit(bent, drive=Drive("serial", 2, accumulate=True), adc=Adc(8, "max")))


# -- gated wires -------------------------------------------------------------------------------------------------------


def test_gated_cells_drop_less_and_their_map_is_the_mean_of_the_exact_ones():
    """Each input solved exactly with its own rows connected, against the one linear map at the mean activity."""
    g, share, wires = RNG.uniform(5, 60, (64, 16)), 0.3, Wires(2.0, 2.0)
    gated = effective_conductance(g, replace(wires, active=share))
    ratios = []
    for _ in range(60):
        on = (RNG.random(64) < share).astype(float)
        exact = on @ effective_conductance(g * on[:, None], wires)
        ratios.append((on @ gated).sum() / exact.sum())
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.01)
    full = effective_conductance(g, wires).sum()
    assert full < gated.sum() < g.sum()
    np.testing.assert_allclose(effective_conductance(g, replace(wires, active=1e-9)), g, rtol=1e-6)
    with pytest.raises(CrossbarError, match=r"Wires\.active = 0\.0 must be .* > 0"):
        Wires(active=0.0)


def test_gated_wires_reach_the_layer():
    found = []
    for active in (1.0, 0.2):
        engine, handle = loaded(Circuit(IDEAL, Mapping(), wires=Wires(5.0, 5.0, active=active)), np.abs(W))
        found.append(float(engine.effective_weight(handle).sum()))
    assert found[0] < found[1] < np.abs(W).sum()
