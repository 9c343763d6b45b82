"""Convolutions on engines equal integer conv2d bit for bit, for any geometry, zero point and path."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hq_lib.crossbar import (
    Adc,
    Circuit,
    ConstantRead,
    Convolution,
    CrossbarError,
    Device,
    Drive,
    Engine,
    IdealEngine,
    Mapping,
    SimEngine,
)
from hq_lib.crossbar.profiles import IDEAL, PCM_JOSHI

ENGINES = [
    lambda: IdealEngine(),
    lambda: SimEngine(Circuit(IDEAL)),
    lambda: SimEngine(Circuit(IDEAL, precision="float64", path="converted")),
    lambda: SimEngine(Circuit(IDEAL, Mapping(tile_rows=10), path="converted")),
    lambda: SimEngine(
        Circuit(
            IDEAL,
            Mapping("offset", cell_bits=2, subtract="digital", tile_rows=10),
            Drive("serial"),
            Adc(12, "exact"),
            path="converted",
        )
    ),
]
NAMES = ["ideal", "collapsed", "float64", "tiles", "serial"]
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2, 0), "stride": (1, 3)},
    {"padding": (1, 0, 2, 1)},
    {"dilation": 2, "padding": 1},
    {"dilation": (1, 3), "stride": (2, 1)},
    {"groups": 2, "padding": 1},
    {"groups": 4},
]


def reference(w, x, z, *, stride=1, padding=0, dilation=1, groups=1):
    top, left, bottom, right = (padding,) * 4 if isinstance(padding, int) else (padding * 2)[:4]
    centred = functional.pad(x.double() - z, (left, right, top, bottom))
    return functional.conv2d(centred, w.double(), stride=stride, dilation=dilation, groups=groups)


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("z", "signed"), [(0, False), (7, False), (-3, True)])
def test_equals_integer_convolution(make, geometry, z, signed):
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-8, 8, (8, 4 // geometry.get("groups", 1), 3, 2), generator=generator)
    x = torch.randint(-8 if signed else 0, 8 if signed else 16, (3, 4, 9, 8), generator=generator)
    y = Convolution(make(), w, 1.0, "c", x_zero_point=z, w_bits=4, x_bits=4, x_signed=signed, **geometry)(x)
    assert y.dtype is torch.float64
    assert torch.equal(y, reference(w, x, z, **geometry))


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
def test_linear_layers_and_numpy(make):
    random = np.random.default_rng(0)
    w, x = random.integers(-128, 128, (5, 30)), random.integers(0, 256, (4, 30)).astype(np.uint8)
    y = Convolution(make(), w, np.ones(5), "fc", x_zero_point=100)(x)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, (x.astype(int) - 100) @ w.T)


def test_depthwise():
    generator = torch.Generator().manual_seed(1)
    w, x = (
        torch.randint(-127, 128, (12, 1, 3, 3), generator=generator),
        torch.randint(0, 256, (2, 12, 7, 7), generator=generator),
    )
    for make in ENGINES[:2]:
        conv = Convolution(make(), w, 1.0, "dw", padding=1, groups=12, x_zero_point=5)
        assert torch.equal(conv(x), reference(w, x, 5, padding=1, groups=12))


@pytest.mark.parametrize("path", ["auto", "converted"])
def test_patches_answer_as_their_rows(path):
    """Unfolded or not: the same cells, the same noise in the same order."""
    device = Device("n", "t", 0.0, 25.0, PCM_JOSHI.error, read=ConstantRead(0.01))
    generator = torch.Generator().manual_seed(0)
    w, x = (
        torch.randint(-127, 128, (6, 5, 3, 3), generator=generator),
        torch.randint(0, 256, (2, 5, 8, 8), generator=generator),
    )
    for x_in in (x, x.contiguous(memory_format=torch.channels_last)):
        engine = SimEngine(Circuit(device, Mapping(tile_rows=20), path=path, precision="float64"))
        conv = Convolution(engine, w, 1.0, "c", padding=1, stride=2, x_zero_point=9)
        y = conv(x_in)
        engine.reset_noise()
        rows = engine.mvm(conv.groups[0], conv.rows(x_in)[0])
        want = rows - 9 * w.flatten(1).sum(1)
        assert torch.equal(y, want.view(2, 4, 4, 6).permute(0, 3, 1, 2))


def test_batch_size_changes_nothing_in_float64_and_hardly_in_float32():
    generator = torch.Generator().manual_seed(0)
    w, x = (
        torch.randint(-127, 128, (8, 16, 3, 3), generator=generator),
        torch.randint(0, 256, (40, 16, 12, 12), generator=generator),
    )
    device = Device("n", "t", 0.0, 25.0, PCM_JOSHI.error, read=ConstantRead(0.01))
    for precision, most in (("float64", 0), ("float32", 1)):
        answers = []
        for size in (40, 7):
            conv = Convolution(SimEngine(Circuit(device, precision=precision)), w, 1.0, "c", padding=1)
            answers.append(torch.cat([conv(part) for part in x.split(size)]))
        assert float((answers[0] - answers[1]).abs().max()) <= most


class RowsOnly(IdealEngine):
    """An engine that needs its rows written out, a few at a time, as a bench does."""

    def _rows_at_once(self, handle):
        return 13

    def _measure(self, handle, x):
        rows = x.rows()
        assert len(rows) <= 64
        return rows.double() @ handle.w_int.double()


def test_engines_that_want_rows_get_bounded_chunks():
    w, x = torch.randint(-8, 8, (3, 2, 3, 3)), torch.randint(0, 16, (5, 2, 8, 8))
    engine: Engine = RowsOnly()
    assert torch.equal(Convolution(engine, w, 1.0, "c", padding=1)(x), reference(w, x, 0, padding=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "groups"),
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"padding": (1, 2, 3)}, "one, two"),
        ({"padding": 1, "x_zero_point": 300}, "zero point of c"),
        ({"dilation": 0}, "dilation"),
        ({"w_bits": 2}, "outside"),
    ],
)
def test_bad_geometry_is_refused(change, message):
    with pytest.raises(CrossbarError, match=message):
        Convolution(IdealEngine(), torch.full((4, 2, 3, 3), 5), 1.0, "c", **change)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), r"\(B, 2, H, W\)"),
        (torch.zeros(1, 2, 8, 8), "integers"),
        (torch.zeros(1, 2, 2, 8, dtype=torch.int64), "larger than the padded image"),
        (torch.full((1, 2, 8, 8), 256), "outside the declared"),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_bad_images_are_refused(x, message, groups):
    w = torch.ones(4, 2 // groups, 3, 3, dtype=torch.int64)
    conv = Convolution(SimEngine(Circuit(IDEAL)), w, 1.0, "c", groups=groups)
    with pytest.raises(CrossbarError, match=message):
        conv(x)
