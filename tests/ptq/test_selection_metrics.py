"""Smoothness metrics against hand-computed images, scipy, and plain loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from scipy.fft import dctn

from hq_lib.ptq import selection
from hq_lib.ptq.selection import scores


def noise(n: int = 5, c: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def lumas(images: torch.Tensor) -> np.ndarray:
    x = images.double().numpy() / 255
    return x[:, 0] if x.shape[1] == 1 else np.einsum("nchw,c->nhw", x, [0.299, 0.587, 0.114])


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_agree_with_scipy(channels):
    images = noise(c=channels)
    for i, y in enumerate(lumas(images)):
        inner = (slice(1, -1), slice(1, -1))
        energy = (ndimage.sobel(y, 0)[inner] ** 2 + ndimage.sobel(y, 1)[inner] ** 2).mean()
        variation = np.abs(np.diff(y, axis=0)).mean() + np.abs(np.diff(y, axis=1)).mean()
        assert selection.score(images, "gradient_energy")[i].item() == pytest.approx(energy, rel=1e-5)
        assert selection.score(images, "laplacian_variance")[i].item() == pytest.approx(
            ndimage.laplace(y)[inner].var(), rel=1e-5
        )
        assert selection.score(images, "tv")[i].item() == pytest.approx(variation, rel=1e-5)


@pytest.mark.parametrize("size", [8, 16, 19])
def test_high_frequency_ratio_is_scipys_dct(size):
    images = noise(3, size=size)
    u = np.add.outer(np.arange(8), np.arange(8))
    for i, y in enumerate(lumas(images)):
        n = size // 8
        blocks = [dctn(y[8 * a : 8 * a + 8, 8 * b : 8 * b + 8], norm="ortho") ** 2 for a in range(n) for b in range(n)]
        high = sum(block[u >= 4].sum() for block in blocks)
        rest = sum(block.sum() - block[0, 0] for block in blocks)
        assert selection.score(images, "high_frequency")[i].item() == pytest.approx(high / rest, rel=1e-4)


def test_histogram_metrics_by_hand():
    flat = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).view(1, 1, 8, 8)
    both = torch.cat([flat, ramp])
    np.testing.assert_allclose(selection.score(both, "entropy"), [0.0, np.log(64)], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(selection.score(both, "roughness"), [1 + 4 + 1, 0.0], rtol=1e-6, atol=1e-12)
    assert scores.histogram(flat / 255)[0, 77 // 4] == 1.0


def test_every_bin_holds_as_many_grey_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for images, n_bins in ((levels, 64), (levels.repeat(1, 1, 3, 3), 256)):
        assert torch.equal(scores.histogram(images / 255), torch.full((1, n_bins), 1 / n_bins))


def test_constant_images_are_smoothest_and_noise_is_roughest():
    blurred = torch.from_numpy(ndimage.gaussian_filter(noise(1).numpy().astype(float), (0, 0, 2, 2))).to(torch.uint8)
    three = torch.cat([torch.full_like(blurred, 128), blurred, noise(1)])
    for name in ("tv", "gradient_energy", "laplacian_variance", "high_frequency"):
        flat, soft, rough = selection.score(three, name).tolist()
        assert flat < soft < rough, name
        assert flat == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", list(selection.METRICS))
def test_batches_and_pixel_types_do_not_matter(name, monkeypatch):
    images = noise(7)
    whole = selection.score(images, name)
    monkeypatch.setattr(scores, "_PIXELS", 2 * images.shape[2] * images.shape[3])
    torch.testing.assert_close(selection.score(images, name), whole)
    torch.testing.assert_close(selection.score(images.float() / 255, name), whole)
    torch.testing.assert_close(selection.score(images.to(memory_format=torch.channels_last), name), whole)


def test_large_pictures_are_scored_a_few_at_a_time(pictures_read, monkeypatch):
    images, read = pictures_read
    monkeypatch.setattr(scores, "_PIXELS", 4 * 12 * 12)
    assert torch.equal(selection.score(images.images, "tv"), selection.score(images.images[:], "tv"))
    assert read == [4, 4, 2, 10]


@pytest.mark.parametrize(("images", "message"), [
    (torch.zeros(2, 3, 16, 16).fill_(2.0), "before normalisation"), (torch.full((1, 1, 16, 16), float("nan")), "NaN"),
    (torch.zeros(3, 16, 16), "shape"), (torch.zeros(2, 4, 16, 16), "shape"), (torch.zeros(0, 3, 16, 16), "no images"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.int32), "uint8"),
])  # fmt: skip
def test_unusable_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        selection.score(images, "tv")


def test_small_images_and_unknown_metrics_are_named():
    with pytest.raises(ValueError, match="8 x 8"):
        selection.score(noise(1, size=7), "high_frequency")
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        selection.score(noise(1), "entrpy")


def test_real_images_rank_alike_under_related_metrics(digits):
    images = digits.images[:200]
    table = pd.DataFrame({name: selection.score(images, name).numpy() for name in selection.METRICS})
    assert table.corr("spearman").loc["gradient_energy", "tv"] > 0.5


# ---------------------------------------------------------------- agreement


def test_paired_difference_is_the_student_interval():
    got = selection.paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    half = 4.302653 / np.sqrt(3)  # t(0.975, 2 degrees of freedom), sd = 1
    assert (got["mean"], got["n"]) == (pytest.approx(2.0), 3)
    assert (got["low"], got["high"]) == (pytest.approx(2 - half, rel=1e-5), pytest.approx(2 + half, rel=1e-5))
    assert selection.paired_difference([2.0, 3.0], [1.0, 2.0])["low"] == 1.0
    with pytest.raises(ValueError, match="same seeds"):
        selection.paired_difference([1.0], [1.0])
