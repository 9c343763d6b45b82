"""Manifests: a set comes back exactly, or an error says why not. The reader is fuzzed."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_lib.data import ImageSet
from hq_lib.ptq import selection
from hq_lib.ptq.selection import Manifest, manifest
from hq_lib.ptq.selection.manifest import ManifestError

HASH = "0" * 64


@pytest.fixture
def some(digits) -> ImageSet:
    return digits.subset(torch.arange(5, 45))


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(name.encode())
    (tmp_path / "secret.png").write_bytes(b"outside")
    return tmp_path / "root"


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
    assert manifest.pixel_hash(image) == manifest.pixel_hash(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert manifest.pixel_hash(image) != manifest.pixel_hash(image.view(3, 2, 8))
    assert manifest.pixel_hash(image) != manifest.pixel_hash(image.flip(0))


def test_files_come_back_in_order(folder):
    made = selection.from_files(folder, ["b/3.png", "a/1.png"], dataset="sample", seed=3)
    assert [p.name for p in selection.take_files(manifest.parse(made.to_json()), folder)] == ["3.png", "1.png"]


# ---------------------------------------------------------------- what does not match


def test_altered_pixels_are_noticed(some):
    made = selection.from_images(some, [0, 1])
    images = some.images.clone()
    images[1, 0, 0, 0] ^= 1
    with pytest.raises(ManifestError, match="image 6 differs"):
        selection.take(made, dataclasses.replace(some, images=images))


def test_other_sets_and_absent_images_are_noticed(some, digits):
    made = selection.from_images(digits, [0, 1, 6])
    with pytest.raises(ManifestError, match=r"index 0 \(and 1 more\)"):
        selection.take(made, some)
    with pytest.raises(ManifestError, match=r"digits/test"):
        selection.take(made, dataclasses.replace(digits, split="test"))
    with pytest.raises(IndexError):
        selection.from_images(some, [0, 40])


def test_altered_missing_and_escaping_files_are_noticed(folder, tmp_path):
    made = selection.from_files(folder, ["a/1.png", "b/3.png"], dataset="sample")
    (folder / "a/1.png").write_bytes(b"other")
    with pytest.raises(ManifestError, match="differs"):
        selection.take_files(made, folder)
    (folder / "a/1.png").unlink()
    with pytest.raises(ManifestError, match="short"):
        selection.take_files(made, folder)
    with pytest.raises(ManifestError, match="is none"):
        selection.from_files(folder, ["9" * 5000], dataset="sample")
    (folder / "a/1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ManifestError, match="leads out of"):
        selection.take_files(made, folder)
    with pytest.raises(ManifestError, match="use take_files"):
        selection.take(made, None)
    with pytest.raises(ManifestError, match="use take"):
        selection.take_files(Manifest("d", "train", (HASH,), indices=(1,)), folder)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\\..\\b", "", ".", "a//b", "C:x", "a\0b", 3]
)
def test_escaping_paths_are_refused(path):
    with pytest.raises(ManifestError, match="relative path"):
        Manifest("d", "train", (HASH,), files=(path,))


@pytest.mark.parametrize(("changes", "message"), [
    ({"n": 3}, "promises n=3"), ({"n": ...}, "'n'"), ({"hashes": [HASH]}, "2 images and 1 hashes"),
    ({"indices": [5, 5]}, "twice"), ({"indices": [5, -1]}, "-1 is not a position"),
    ({"indices": [5, True]}, "True is not"), ({"indices": [5, 6.0]}, "6.0 is not"),
    ({"indices": [5, [6]]}, "is not a position"), ({"indices": 5}, "hq select"), ({"indices": []}, "exactly one"),
    ({"files": ["a", "b"]}, "exactly one"), ({"version": 2}, "reads version 1"), ({"sed": 1}, "'sed'"),
    ({"hashes": ...}, "2 images and 0 hashes"),
])  # fmt: skip
def test_malformed_manifests_are_named(changes, message):
    made = Manifest("d", "train", (HASH, "1" * 64), indices=(5, 6))
    with pytest.raises(ManifestError, match=message):
        manifest.parse(edited(made, **changes))


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
def test_fuzz_a_flipped_byte_leaves_a_full_set_or_an_error(data):
    """What still parses (another index, say) is full and unrepeated; ``take`` then holds it against the hashes."""
    made = Manifest("d", "train", (HASH, "1" * 64), indices=(5, 6))
    raw = bytearray(made.to_json().encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = manifest.parse(bytes(raw))
    except ManifestError:
        return
    assert len(got) == 2
    assert len(set(got.indices)) == 2
