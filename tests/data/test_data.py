import errno
import gzip
import hashlib
import os
import struct
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from hq_lib import data
from hq_lib.data import fetch, folder, sources
from hq_lib.data.batches import augment
from hq_lib.data.sets import SPLIT_SEED, balanced_positions
from hq_lib.results import paths

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([1, 0], np.uint8)
ARRAYS = {"train_images": IMAGES, "train_labels": LABELS}


def toy(*functions, sums=None):
    known = sums or {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in ARRAYS.items()}
    return fetch.DataSet("toy", known, tuple((f"source {i}", f) for i, f in enumerate(functions)))


def good(scratch):
    return dict(ARRAYS)


def bad(scratch):
    raise ConnectionError("no route")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HQ_DATA", str(tmp_path))
    return paths.cache_dir()


# --- fetching -----------------------------------------------------------------------------------------------------


def test_second_source_is_tried_and_the_cache_serves_afterwards(cache):
    np.testing.assert_array_equal(fetch.obtain(toy(bad, good))["train_images"], IMAGES)
    np.testing.assert_array_equal(fetch.obtain(toy(bad))["train_labels"], LABELS)


def test_no_source_lists_what_was_tried_and_the_mend(cache):
    with pytest.raises(data.DataUnavailableError) as caught:
        fetch.obtain(toy(bad, bad))
    text = str(caught.value)
    assert text.count("no route") == 2
    assert "cache" in text
    assert "HQ_DATA" in text


def test_wrong_hash_is_refused_and_leaves_no_cache(cache):
    wrong = toy(lambda _: {**ARRAYS, "train_images": IMAGES + 1})
    with pytest.raises(data.DataUnavailableError, match="wrong SHA-256 of train_images"):
        fetch.obtain(wrong)
    assert not (cache / "toy").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "sums", "missing"])
def test_damaged_cache_is_noticed_and_fetched_again(cache, damage, capsys):
    fetch.obtain(toy(good))
    file = cache / "toy" / "train_images.npy"
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "truncate":
        file.write_bytes(raw[:-7])
    elif damage == "sums":
        (cache / "toy" / fetch.SUMS).write_text("[1, 2]")
    else:
        file.unlink()
    np.testing.assert_array_equal(fetch.obtain(toy(bad, good))["train_images"], IMAGES)
    assert "corrupt" in capsys.readouterr().out


def test_files_are_hashed_once_a_process_and_again_when_they_change(cache, monkeypatch):
    """But for files so young that the clock of their changes may not have ticked."""
    hashed, hash_of = [], fetch.sha256_of
    fetch.obtain(toy(good))
    monkeypatch.setattr(fetch, "sha256_of", lambda array: hashed.append(len(array)) or hash_of(array))
    for age, n in ((0, 4), (1000, 6)):
        for file in (cache / "toy").iterdir():
            os.utime(file, (time.time() - age,) * 2)
        for _ in range(2):
            np.testing.assert_array_equal(fetch.obtain(toy(bad))["train_images"], IMAGES)
        assert len(hashed) == n
    np.save(cache / "toy" / "train_images.npy", IMAGES + 1)
    with pytest.raises(data.DataUnavailableError, match=r"corrupt \(wrong SHA-256 of train_images"):
        fetch.obtain(toy(bad))


def test_a_pickle_in_the_cache_is_not_executed(cache, tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    fetch.obtain(toy(good))
    np.save(cache / "toy" / "train_images.npy", np.array([Boom()], dtype=object), allow_pickle=True)
    fetch.obtain(toy(good))
    assert not (tmp_path / "executed").exists()


def test_interrupted_source_leaves_a_clean_restart(cache):
    def interrupted(scratch):
        (scratch / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.obtain(toy(interrupted))
    assert not (cache / "toy").exists()
    assert len(fetch.obtain(toy(good))) == 2
    assert sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock")) == ["toy"]


def test_full_disk_names_the_folder_and_keeps_nothing(cache, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"cannot write the data cache .*No space left.*HQ_DATA"):
        fetch.obtain(toy(good))
    assert not [p for p in cache.iterdir() if p.is_dir() and "download" not in p.name]


def test_unwritable_folder_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HQ_DATA", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set HQ_DATA"):
        fetch.obtain(toy(good))


def test_corrupt_archives_are_named(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde")[:-6])
    with pytest.raises(ValueError, match=r"x\.gz: truncated"):
        sources.read_idx(tmp_path / "x.gz")
    (tmp_path / "y").write_bytes(b"\0\0\x08\x01\0\0\0\x09abcde")
    with pytest.raises(ValueError, match=r"shape \(9,\), file holds 5"):
        sources.read_idx(tmp_path / "y")


def test_idx_fuzz_gives_errors_never_garbage(tmp_path):
    whole = b"\0\0\x08\x03\0\0\0\x02\0\0\0\x03\0\0\0\x04" + bytes(range(24))
    (tmp_path / "f").write_bytes(whole)
    assert sources.read_idx(tmp_path / "f").shape == (2, 3, 4)
    rng = np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for _ in range(rng.integers(0, 4)):
            if raw:
                raw[rng.integers(len(raw))] = rng.integers(256)
        (tmp_path / "f").write_bytes(raw)
        try:
            assert sources.read_idx(tmp_path / "f").size <= 24
        except ValueError as error:
            assert "f:" in str(error)  # noqa: PT017


def test_cifar10_binary_records_are_decoded():
    record = bytes([7]) + bytes(range(256)) * 12
    arrays = sources._cifar10_records(record, "test")
    assert arrays["test_labels"].tolist() == [7]
    assert arrays["test_images"].shape == (1, 32, 32, 3)
    assert arrays["test_images"][0, 1, 2].tolist() == [34, 34, 34]  # pixel 34 of each colour plane


# --- sets, splits, batches ----------------------------------------------------------------------------------------


def test_unknown_names_give_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        data.load("cifar-10", "train")
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        data.load("digits", "validation")


def test_splits_are_disjoint_balanced_and_fixed():
    train, val, whole = (data.load("digits", s) for s in ("train", "val", "trainval"))
    assert set(train.indices.tolist()).isdisjoint(val.indices.tolist())
    assert len(train) + len(val) == len(whole)
    assert val.labels.bincount().tolist() == [15] * 10
    assert torch.equal(val.indices, data.load("digits", "val").indices)


def test_cifar10_validation_split_never_changes(cifar10_train):
    val = data.load("cifar10", "val")
    assert val.labels.bincount().tolist() == [500] * 10
    assert len(cifar10_train) == 45_000
    digest = hashlib.sha256(val.indices.numpy().tobytes()).hexdigest()
    assert digest == "92f9e9755dcef2bce6a6f8ea6efae48dc5cbb4d77c13d220b933e5780bc6ab2f", (
        "the validation split changed: every result would change with it"
    )


def test_cifar10_loads_fast_and_small(cifar10_test):
    tracemalloc.start()
    train = data.load("cifar10", "trainval")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train.images.shape == (50_000, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert peak < 400e6


def test_cifar10_constants_are_those_of_the_training_images(cifar10_train):
    pixels = cifar10_train.images[::9].double() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)).float(), torch.tensor(cifar10_train.spec.mean), atol=3e-3, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)).float(), torch.tensor(cifar10_train.spec.std), atol=3e-3, rtol=0)


def test_balanced_refuses_a_short_class():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="class 1 has 1 images, 2 wanted"):
        balanced_positions(labels, 4, 2, 0)
    assert balanced_positions(labels, 2, 2, SPLIT_SEED).tolist() in ([0, 2], [1, 2])


def test_normalize_is_the_formula(digits):
    x = data.normalize(digits.images[:3], digits.spec)
    want = (digits.images[:3].double() / 255 - digits.spec.mean[0]) / digits.spec.std[0]
    torch.testing.assert_close(x.double(), want, atol=1e-6, rtol=1e-6)


def test_augment_equals_a_loop_over_images():
    images = torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    got = augment(images, torch.Generator().manual_seed(5), pad=2)
    g = torch.Generator().manual_seed(5)
    top = torch.randint(0, 5, (6, 1), generator=g)
    left = torch.randint(0, 5, (6, 1), generator=g)
    mirrored = torch.randint(0, 2, (6, 1), generator=g)
    assert 0 < mirrored.sum() < 6
    for i in range(6):
        padded = torch.zeros(3, 12, 14, dtype=torch.uint8)
        padded[:, 2:-2, 2:-2] = images[i]
        crop = padded[:, top[i, 0] : top[i, 0] + 8, left[i, 0] : left[i, 0] + 10]
        assert torch.equal(got[i], crop.flip(2) if mirrored[i, 0] else crop)


def test_training_batches_are_a_permutation(digits):
    walk = list(data.batches(digits, 100, generator=torch.Generator().manual_seed(0)))
    assert len(walk) == len(digits) // 100
    again = list(data.batches(digits, 100, generator=torch.Generator().manual_seed(0)))
    other = list(data.batches(digits, 100, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(walk[0][1], again[0][1])
    assert not torch.equal(walk[0][1], other[0][1])


def test_evaluation_batches_keep_every_image_in_order(digits):
    labels = torch.cat([y for _, y in data.batches(digits, 100)])
    assert torch.equal(labels, digits.labels)


def test_augmentation_without_a_generator_is_refused(digits):
    with pytest.raises(ValueError, match="needs a generator"):
        next(data.batches(digits, 10, pad=4))


def test_fallback_says_so(monkeypatch, capsys):
    def gone(*_args, **_kwargs):
        raise data.DataUnavailableError("offline")

    monkeypatch.setattr(fetch, "obtain", gone)
    got = data.load_or_embedded("cifar10", "test")
    assert got.spec.name == "digits"
    assert "8x8" in got.spec.note
    assert "digits" in capsys.readouterr().out


# --- image folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def class_folders(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("RGB", (60, 40), (50 * i, 100, 0)).save(tmp_path / label / f"{i}.png")
    return tmp_path


def test_folder_halves_are_disjoint_and_labelled(class_folders):
    train = data.load("imagenet", "train", root=class_folders)
    test = data.load("imagenet", "test", root=class_folders)
    assert train.images.shape == (4, 3, 224, 224)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert train.spec.n_classes == 2
    assert sorted(train.images[:, 0, 0, 0].tolist()) == [0, 0, 100, 100]
    assert sorted(test.images[:, 0, 0, 0].tolist()) == [50, 50, 150, 150]


def test_folder_errors_name_the_folder_and_file(class_folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folder.list_folder(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="needs root"):
        data.load("imagenet", "train")
    with pytest.raises(ValueError, match="99 were asked for"):
        data.load("imagenet", "train", root=class_folders, n=99)
    (class_folders / "a" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
        next(data.batches(data.load("imagenet", "train", root=class_folders), 4))


def test_pictures_are_read_when_they_are_asked_for_and_then_only_those(class_folders, monkeypatch):
    whole = data.load("imagenet", "trainval", root=class_folders)
    pixels, read = whole.images[:], []
    real = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda path, **size: read.append(path.name) or real(path, **size))
    some = whole.subset([6, 1])
    assert not read
    assert torch.equal(some.images[:], pixels[[6, 1]])
    assert sorted(read) == ["1.png", "2.png"]
    x = torch.cat([x for x, _ in data.batches(whole, 3)])
    assert torch.equal(x, data.normalize(pixels, whole.spec))
    assert [len(part) for part in whole.images.split(3)] == [3, 3, 2]


INDICES = (
    3, -1, np.int64(3), torch.tensor(3), slice(1, 5), slice(5, 1), [6, 1], [], torch.tensor([6, 1]), np.array([6, 1]),
    torch.arange(8) % 3 == 0, np.arange(8) % 3 == 0, [True] * 3 + [False] * 5, torch.zeros(8, dtype=torch.bool), ...,
    (2, 0), (np.int64(2), 0), ([1, 6], 0), (slice(None), 0, 3), (..., 3), (torch.arange(8) > 5, slice(1, 3)),
)  # fmt: skip
ODD = (None, True, "cat", [0.9, 1.9], torch.zeros(7, dtype=torch.bool), [[0, 1]], {"first": 0})


@pytest.mark.parametrize("at", INDICES, ids=str)
def test_pictures_are_indexed_as_the_tensor_they_stand_for(class_folders, at):
    spec = replace(data.SPECS["imagenet"], in_shape=(3, 4, 4), short_side=4)
    pictures = data.load("imagenet", "trainval", root=class_folders, spec=spec).images
    assert torch.equal(pictures[at], pictures[:][at])


@pytest.mark.parametrize("at", ODD, ids=str)
def test_images_go_by_whole_numbers_or_a_mask_and_by_nothing_else(class_folders, at):
    folder_of_8 = data.load("imagenet", "trainval", root=class_folders)
    for index in (folder_of_8.images.__getitem__, folder_of_8.subset, own_images(8).subset):
        with pytest.raises(IndexError, match="go by whole numbers, or a mask of 8"):
            index(at)


def test_a_mask_chooses_the_images_where_it_is_true():
    ours = own_images()
    assert ours.subset(ours.labels == 2).indices.tolist() == [2, 5, 8, 11]
    assert ours.subset([True] * 2 + [False] * 10).indices.tolist() == [0, 1]


def test_calibration_pictures_may_lie_in_sel_without_classes(class_folders, tmp_path):
    root = tmp_path / "root"
    for part in ("sel", "val"):
        (root / part).mkdir(parents=True)
    Image.new("RGB", (60, 40), (9, 9, 9)).save(root / "sel" / "one.png")
    for label in ("a", "b"):
        (class_folders / label).rename(root / "val" / label)
    train, test = (data.load("imagenet", split, root=root) for split in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == ([folder.UNLABELLED], [0] * 4 + [1] * 4)
    assert train.spec.n_classes == test.spec.n_classes == 2


def test_the_size_a_network_takes_is_the_size_that_is_read(class_folders):
    spec = replace(data.SPECS["imagenet"], in_shape=(3, 24, 24), short_side=30)
    images = data.load("imagenet", "test", root=class_folders, spec=spec)
    assert images.images[:].shape == (4, 3, 24, 24)
    assert images.spec.short_side == 30


def own_images(n: int = 12, **changes: object) -> data.ImageSet:
    pixels = torch.arange(n * 3 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).view(n, 3, 4, 4)
    return data.ImageSet(pixels, torch.arange(n) % 3, replace(data.SPECS["digits"], n_classes=3, **changes))


def test_a_set_of_ones_own_without_positions_is_cut_like_any_other():
    ours = own_images()
    assert ours.subset([4, 2]).labels.tolist() == [1, 2]
    assert ours.subset([4, 2]).indices.tolist() == [4, 2]
    assert sorted(ours.balanced(6, 0).labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_draw_is_balanced_where_every_class_can_have_an_image():
    ours = own_images()
    assert ours.drawn(99, 0) is ours
    assert sorted(ours.drawn(6, 0).labels.tolist()) == [0, 0, 1, 1, 2, 2]
    few = ours.subset([0, 3, 1]).drawn(2, 0)  # two images of three classes, one of which has none here
    assert len(set(few.indices.tolist())) == 2
    assert ours.drawn(2, 1).indices.tolist() == ours.drawn(2, 1).indices.tolist()
    uneven = ours.subset([0, 3, 6, 9, 1, 2]).drawn(5, 0)  # a class has one image of the two that are its share
    assert len(set(uneven.indices.tolist())) == 5


def test_no_draw_comes_class_by_class_and_mixed_sets_keep_their_order():
    mixed = own_images()
    ours = mixed.subset([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])
    assert bool((ours.subset(range(11, -1, -1)).drawn(12, 0).labels.diff() > 0).any()), "nor backwards"
    for n in (12, 9):  # all, and balanced
        first = ours.drawn(n, 0)
        assert sorted(first.labels.tolist()) == sorted(list(range(3)) * (n // 3))
        assert bool((first.labels.diff() < 0).any())
        assert first.indices.tolist() == ours.drawn(n, 0).indices.tolist() != ours.drawn(n, 1).indices.tolist()
        assert torch.equal(first.images, mixed.images[first.indices])
        assert mixed.drawn(n, 0).indices.diff().min() > 0


def test_images_that_are_no_bytes_or_too_few_are_refused():
    ours = own_images()
    with pytest.raises(ValueError, match=r"float32.*torch\.uint8"):
        replace(ours, images=ours.images / 255)
    with pytest.raises(ValueError, match="'images': 11, 'labels': 12"):
        replace(ours, images=ours.images[1:])


@pytest.mark.parametrize("allowed", [True, False])
def test_images_are_mirrored_only_where_the_data_allow_it(allowed):
    ours = own_images(flip=allowed)
    walk = data.batches(ours, 12, generator=torch.Generator().manual_seed(0), flip=True)
    seen = torch.cat([x for x, _ in walk])
    originals = data.normalize(ours.images, ours.spec)
    known = [any(torch.equal(image, one) for one in originals) for image in seen]
    assert all(known) is not allowed


def picture_folder(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def test_hidden_folders_are_no_classes(tmp_path):
    root = picture_folder(tmp_path, "cat/1.png", "cat/.2.png", "dog/1.png", ".thumbnails/1.png")
    files, labels, classes, _ = folder.list_folder(str(root), "trainval")
    assert ([f.parent.name for f in files], labels, classes) == (["cat", "dog"], [0, 1], ("cat", "dog"))


def test_a_class_has_one_label_in_every_split(tmp_path):
    root = picture_folder(tmp_path, "train/a/1.png", "train/b/1.png", "val/b/1.png", "val/c/1.png")
    lists = {split: folder.list_folder(root, split) for split in ("train", "test")}
    found = {
        s: [(f.parent.name, i) for f, i in zip(files, labels, strict=True)] for s, (files, labels, *_) in lists.items()
    }
    assert found == {"train": [("a", 0), ("b", 1)], "test": [("b", 1), ("c", 2)]}
    assert {classes for _, _, classes, _ in lists.values()} == {("a", "b", "c")}


def test_pictures_of_nested_folders_and_every_ending_are_those_of_image_folder(tmp_path, capsys):
    names = ["b.png", "a.JPG", "z.webp", "more/1.bmp", "more/deep/0.tif", "another/9.pgm", "t.tiff", "p.ppm", "j.jpeg"]
    root = picture_folder(tmp_path / "photos", *(f"cat/{name}" for name in names), "dog/1.png")
    found = data.load("imagenet", "trainval", root=root)
    ours = zip(map(str, found.images.files), found.labels.tolist(), strict=True)
    assert {*ImageFolder(root).samples} == {*ours}
    assert found.images.names[:6] == [f"cat/{n}" for n in ("a.JPG", "b.png", "j.jpeg", "p.ppm", "t.tiff", "z.webp")]
    assert found.images[:].shape[0] == 10
    assert capsys.readouterr().out == ""


def test_what_is_passed_over_is_said(tmp_path, capsys):
    root = picture_folder(tmp_path, *(f"train/cat/{i}.png" for i in range(3)), "train/loose.png", "val/dog/1.png")
    (root / "train/cat/film.gif").write_bytes(b"")
    (root / "train/dog").mkdir()
    (root / "train/cat/around").symlink_to(root / "train")
    assert len(data.load("imagenet", "train", root=root)) == 3
    said = capsys.readouterr().out
    assert "3 files are passed over ('around', 'film.gif', 'loose.png'); 1 of 2 classes have no picture ('dog')" in said
    data.load("imagenet", "test", root=root)
    assert "'test': 1 of 2 classes have no picture ('cat')" in capsys.readouterr().out


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])  # quarter turns to the left
def test_a_picture_is_read_upright(tmp_path, orientation, turn):
    stored = np.zeros((64, 64, 3), np.uint8)
    stored[:32, :32] = 255
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    read = folder.read_image(tmp_path / "photo.png", size=64, short_side=64)
    assert np.array_equal(read, np.rot90(stored, turn))


def test_a_broken_field_of_exif_does_not_stop_a_folder(tmp_path):
    header = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    turned = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    broken = struct.pack("<HHI4sI", 0x11A, 2, 2, b"a\0\0\0", 0)  # a resolution of letters
    stored = np.zeros((64, 64, 3), np.uint8)
    stored[:32, :32] = 255
    Image.fromarray(stored).save(tmp_path / "photo.jpg", exif=header + turned + broken, quality=95)
    read = folder.read_image(tmp_path / "photo.jpg", size=64, short_side=64)
    assert np.abs(read.astype(int) - np.rot90(stored, 3)).mean() < 8


def test_a_picture_of_16_bits_is_refused_for_pillow_cuts_it_off_at_255(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png .* 8 bits a channel"):
        folder.read_image(tmp_path / "deep.png", size=32, short_side=32)


def test_a_picture_that_is_a_line_is_refused_before_it_fills_the_memory(tmp_path):
    Image.fromarray(np.zeros((1, 60_000, 3), np.uint8)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line\.png.*60000 x 1 pixels"):
        folder.read_image(tmp_path / "line.png", size=224, short_side=256)
