"""The NumPy executor against a second one made of Python integers and fractions, over every operation and policy."""

from fractions import Fraction

import integer_oracle as oracle
import numpy as np
import pytest
import torch
from integer_nets import NETS, POLICIES, images, quantized

from hq_lib.integer import ImageError, lower, run
from hq_lib.integer import record as r
from hq_lib.integer.arithmetic import RecordError, requants
from hq_lib.integer.check import check
from hq_lib.integer.execute import quantize, requantize

ALL = [(net, policy) for net in NETS for policy in POLICIES]


@pytest.fixture(scope="module")
def qnets() -> dict:
    """Quantized networks by (net, policy), made on first use."""
    return {}


def made(qnets: dict, net: str, policy: str):
    if (net, policy) not in qnets:
        qnets[net, policy] = quantized(net, policy)
    return qnets[net, policy]


@pytest.mark.parametrize("requantizer", r.REQUANTIZERS)
@pytest.mark.parametrize(("net", "policy"), ALL)
def test_every_integer_equals_the_fraction_oracle(qnets, net, policy, requantizer):
    model = lower(made(qnets, net, policy), requantizer=requantizer)
    x, got = images(3, seed=7), {}
    run(model, x, watch=lambda op, v: got.update({op.output: v}))
    want = oracle.run(model, x[1].numpy())
    for name, values in got.items():
        assert np.array_equal(values[1].astype(np.int64), want[name].astype(np.int64)), name


def test_logits_do_not_depend_on_the_batch_size(qnets):
    model, x = lower(made(qnets, "mobile", "w4a4")), images(7)
    assert np.array_equal(run(model, x, batch_size=2), run(model, x, batch_size=7))


def test_a_sum_beyond_24_bits_is_still_exact():
    w = np.full((1, 300), 127, np.int8)
    w[0, ::2] = 126
    requant = requants((np.float32([1.0]), np.array([1.0])))[0]
    scale, one = np.float32([1.0]), np.asarray(1.0, np.float32)
    bias = np.array([1], np.int32)
    op = r.Linear("fc", ("x",), "y", w, scale, bias, scale, 8, None, None)
    x = r.TensorSpec("x", (300,), "uint16", 16, 0, 65535, one, 0)
    from hq_lib.integer.arithmetic import products

    x_int = np.full((1, 300), 65533, np.uint16)
    exact = sum(int(v) * 65533 for v in w[0])
    assert exact > 2**24
    assert int(products(op, x_int, x)[0, 0]) == exact
    assert requant.fixed[0] == 2**30


@pytest.mark.parametrize(
    ("acc", "half_even", "half_up"),
    [(1, 0, 1), (3, 2, 2), (5, 2, 3), (-1, 0, 0), (-3, -2, -1), (-5, -2, -2), (4, 2, 2)],
)
def test_ties_round_as_the_record_says(acc, half_even, half_up):
    requant = requants((np.float32([0.5]), np.array([0.5])))[0]
    out = r.TensorSpec("y", (1,), "uint8", 8, 0, 255, np.asarray(1.0, np.float32), 100)
    got = [int(requantize([(np.array([[acc]]), requant)], out, form)[0, 0]) - 100 for form in r.REQUANTIZERS]
    assert got == [half_even, half_up]


def test_saturation_reaches_both_ends_far_outside():
    requant = requants((np.float32([2.0**20]), np.array([2.0**20])))[0]
    out = r.TensorSpec("y", (2,), "uint8", 8, 3, 250, np.asarray(1.0, np.float32), 7)
    for form in r.REQUANTIZERS:
        assert requantize([(np.array([[-(2**31) + 1, 2**31 - 1]]), requant)], out, form).tolist() == [[3, 250]]


def test_fixed_multipliers_have_31_bits_and_negligible_error():
    exact = np.exp(np.random.default_rng(0).uniform(np.log(1e-9), np.log(1e5), 2000))
    requant = requants((exact.astype(np.float32), exact))[0]
    assert requant.fixed.min() >= 2**30
    for m, s, e in zip(requant.fixed, requant.shift, exact, strict=True):
        assert abs(Fraction(int(m), 2 ** int(s)) / Fraction(e) - 1) <= Fraction(1, 2**31)


def test_two_terms_share_a_shift_and_leave_room_for_their_sum():
    first, second = requants((np.float32([3.0]), np.array([3.0])), (np.float32([0.01]), np.array([0.01])))
    assert first.shift[0] == second.shift[0]
    assert 2**29 <= first.fixed[0] < 2**30
    worst = (2**31 - 1) * (int(first.fixed[0]) + int(second.fixed[0])) + 2 ** (int(first.shift[0]) - 1)
    assert worst < 2**63


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 2.0**31])
def test_impossible_multipliers_are_refused(bad):
    with pytest.raises(RecordError, match="multiplier"):
        requants((np.float32([bad]), np.array([bad])))[0]


def test_input_integers_equal_the_quantizer_s_own(qnets):
    qnet, x = made(qnets, "residual", "w8a8"), images(4, seed=3)
    own = qnet.get_submodule("x_act_quantizer")
    assert np.array_equal(quantize(lower(qnet), x), own.to_int(x).numpy())


@pytest.mark.parametrize("spoil", [lambda x: x[:, :2], lambda x: x.double(), lambda x: x[:0], lambda x: x * torch.nan])
def test_images_that_do_not_fit_are_refused(qnets, spoil):
    with pytest.raises(ImageError, match="image"):
        run(lower(made(qnets, "residual", "w8a8")), spoil(images(2)))


def test_a_caller_s_products_replace_the_layer_s_own(qnets):
    model, x, seen = lower(made(qnets, "residual", "w8a8")), images(2), []
    from hq_lib.integer.arithmetic import products

    def engine(op, x_int, spec):
        seen.append(op.name)
        return products(op, x_int, spec).astype(np.int64)

    assert np.array_equal(run(model, x, products=engine), run(model, x))
    assert seen == [op.name for op in model.layers()]


def test_a_pool_without_requantization_whose_tensor_is_too_narrow_is_refused():
    one = np.asarray(1.0, np.float32)
    x = r.TensorSpec("image", (1, 4, 4), "float32", 32, 0, 0, one, 0)
    q, y = (r.TensorSpec(n, s, "uint8", 4, 0, 15, one, 0) for n, s in (("q", (1, 4, 4)), ("y", (1, 2, 2))))
    pool = r.AvgPool("pool", ("q",), "y", (2, 2), (2, 2), (0, 0, 0, 0), None)
    ops = (r.Quantize("in", ("image",), "q"), pool)
    model = r.IntegerModel("float32", {t.name: t for t in (x, q, y)}, ops, "image", "y")
    with pytest.raises(RecordError, match=r"'pool'.*0 to 60.*'y' holds 0\.\.15"):
        check(model)
