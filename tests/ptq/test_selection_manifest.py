"""Manifests: a set comes back exactly, or an error says why not. The reader is fuzzed."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hq_lib import data
from hq_lib.data import ImageSet
from hq_lib.ptq import selection
from hq_lib.ptq.selection import Manifest, sets
from hq_lib.ptq.selection.sets import ManifestError

HASH = "0" * 64


@pytest.fixture
def some(digits) -> ImageSet:
    return digits.subset(torch.arange(5, 45))


@pytest.fixture
def pictures(tmp_path) -> ImageSet:
    """Four pictures of two classes below a folder, and one beside it."""
    for i, name in enumerate(("root/train/a/1.png", "root/train/a/2.png", "root/train/b/3.png", "secret.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)).save(tmp_path / name)
    return data.load("imagenet", "train", root=tmp_path / "root")


def edited(made: Manifest, **changes) -> str:
    record = json.loads(made.to_json())
    record.update(changes)
    return json.dumps({k: v for k, v in record.items() if v is not ...})


# ---------------------------------------------------------------- round trips


def test_a_set_comes_back_exactly(some, tmp_path):
    chosen = selection.select(selection.score(some.images, "tv"), 10, labels=some.labels)
    made = selection.from_images(some, chosen, metric="tv", strategy="lowest", seed=7, balanced=True)
    selection.write(made, tmp_path / "sets" / "tv.json")
    again = selection.read(tmp_path / "sets" / "tv.json")
    assert again == made
    taken = selection.take(again, some)
    assert torch.equal(taken.images, some.images[chosen])
    assert torch.equal(taken.labels, some.labels[chosen])
    assert [p.name for p in (tmp_path / "sets").iterdir()] == ["tv.json"]  # no partial file is left


def test_indices_are_raw_so_that_another_subset_serves_too(some, digits):
    made = selection.from_images(some, [0, 3])
    assert made.indices == (5, 8)
    assert torch.equal(selection.take(made, digits).images, some.images[[0, 3]])


def test_memory_layout_does_not_change_a_hash():
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    assert sets.pixel_hash(image) == sets.pixel_hash(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert sets.pixel_hash(image) != sets.pixel_hash(image.view(3, 2, 8))
    assert sets.pixel_hash(image) != sets.pixel_hash(image.flip(0))


def test_files_come_back_in_order(pictures, tmp_path):
    selection.write(selection.from_images(pictures, [2, 0], seed=3), tmp_path / "m.json")
    made = selection.read(tmp_path / "m.json")
    assert (made.dataset, made.files) == ("root", ("train/b/3.png", "train/a/1.png"))
    taken = selection.take(made, pictures)
    assert [file.name for file in taken.images.files] == ["3.png", "1.png"]
    assert taken.labels.tolist() == [1, 0]


def test_a_set_that_was_chosen_class_by_class_is_taken_mixed_by_its_seed(digits):
    by_class = digits.labels[:200].argsort(stable=True)
    made = selection.from_images(digits, by_class, seed=1)
    taken = selection.take(made, digits)
    assert sorted(taken.indices.tolist()) == sorted(made.indices)
    assert len(taken.labels[:50].unique()) == 10
    assert taken.indices.tolist() != selection.take(dataclasses.replace(made, seed=2), digits).indices.tolist()


def test_a_folder_of_links_is_chosen_from_and_taken(pictures, tmp_path):
    for file in pictures.images.files:
        link = tmp_path / "links" / file.relative_to(pictures.images.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    links = data.load("imagenet", "train", root=tmp_path / "links")
    made = selection.from_images(links, [2, 0])
    assert made.hashes == selection.from_images(pictures, [2, 0]).hashes
    assert torch.equal(selection.take(made, links).images[:], pictures.images[[2, 0]])


# ---------------------------------------------------------------- what does not match


def test_altered_pixels_are_noticed(some):
    made = selection.from_images(some, [0, 1])
    images = some.images.clone()
    images[1, 0, 0, 0] ^= 1
    with pytest.raises(ManifestError, match="image 6 differs"):
        selection.take(made, dataclasses.replace(some, images=images))


def test_other_sets_and_absent_images_are_noticed(some, digits):
    made = selection.from_images(digits, [0, 1, 6])
    with pytest.raises(ManifestError, match=r"image 0 \(and 1 more\)"):
        selection.take(made, some)
    with pytest.raises(ManifestError, match=r"digits/test"):
        selection.take(made, dataclasses.replace(digits, split="test"))
    with pytest.raises(IndexError):
        selection.from_images(some, [0, 40])


def test_altered_missing_and_escaping_files_are_noticed(pictures, some, tmp_path):
    made = selection.from_images(pictures, [0, 2])
    file = pictures.images.files[0]
    file.write_bytes(b"other")
    with pytest.raises(ManifestError, match="differs"):
        selection.take(made, pictures)
    file.unlink()
    with pytest.raises(ManifestError, match="short"):
        selection.take(made, data.load("imagenet", "train", root=pictures.images.root))
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ManifestError, match="differs"):
        selection.take(made, pictures)
    with pytest.raises(ManifestError, match="named by indices"):
        selection.take(made, some)
    with pytest.raises(ManifestError, match="named by files"):
        selection.take(selection.from_images(some, [0]), pictures)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "train/../../secret.png", "a\\..\\b", "", ".", 3])
def test_a_file_outside_the_folder_is_not_among_its_pictures(pictures, path):
    with pytest.raises(ManifestError, match="is not in"):
        selection.take(Manifest("d", "train", (HASH,), files=(path,)), pictures)


@pytest.mark.parametrize(("changes", "message"), [
    ({"n": 3}, "promises n=3"), ({"n": ...}, "'n'"), ({"hashes": [HASH]}, "2 images and 1 hashes"),
    ({"indices": [5, 5]}, "twice"), ({"indices": [5, -1]}, "-1 is not a position"),
    ({"indices": [5, True]}, "True is not"), ({"indices": [5, 6.0]}, "6.0 is not"),
    ({"indices": [5, [6]]}, "is not a position"), ({"indices": 5}, "hq select"), ({"indices": []}, "exactly one"),
    ({"files": ["a", "b"]}, "exactly one"), ({"version": 2}, "reads version 1"), ({"sed": 1}, "'sed'"),
    ({"hashes": ...}, "2 images and 0 hashes"),
])  # fmt: skip
def test_malformed_manifests_are_named(changes, message, tmp_path):
    made = Manifest("d", "train", (HASH, "1" * 64), indices=(5, 6))
    (tmp_path / "m.json").write_text(edited(made, **changes))
    with pytest.raises(ManifestError, match=message):
        selection.read(tmp_path / "m.json")


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe\x00", b"[]", b"3", b"{", b"[" * 100_000, b'{"n": 1}'])
def test_what_is_no_manifest_is_refused(raw, tmp_path):
    (tmp_path / "m.json").write_bytes(raw)
    with pytest.raises(ManifestError, match=r"m\.json"):
        selection.read(tmp_path / "m.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"gone\.json"):
        selection.read(tmp_path / "gone.json")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fuzz_a_flipped_byte_leaves_a_full_set_or_an_error(drawn):
    """What still parses (another index, say) is full and unrepeated; ``take`` then holds it against the hashes."""
    made = Manifest("d", "train", (HASH, "1" * 64), indices=(5, 6))
    raw = bytearray(made.to_json().encode())
    raw[drawn.draw(st.integers(0, len(raw) - 1))] = drawn.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as place:
        (file := Path(place) / "m.json").write_bytes(raw)
        try:
            got = selection.read(file)
        except ManifestError:
            return
    assert len(got) == 2
    assert len(set(got.indices)) == 2
