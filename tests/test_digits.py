"""The demo's images are real, in ImageNet's layout, and apart from each other."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data import digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits"
    assert digits.main(["--output", os.fspath(path)]) == 0
    return path


def listed(folder: Path, part: str) -> dict[str, int]:
    pairs = (line.rsplit(" ", 1) for line in (folder / f"{part}.txt").read_text().splitlines())
    return {path: int(label) for path, label in pairs}


@pytest.mark.caffe  # Needs no Caffe, but seconds.
def test_layout_and_counts(folder: Path) -> None:
    train, val = listed(folder, "train"), listed(folder, "val")
    assert Counter(train.values()) == dict.fromkeys(range(10), 400)
    assert Counter(val.values()) == dict.fromkeys(range(10), 100)
    assert sorted(train) == sorted(f"{p.parent.name}/{p.name}" for p in (folder / "train").glob("*/*.JPEG"))
    assert sorted(val) == sorted(p.name for p in (folder / "val").iterdir())
    names = (folder / "labels.txt").read_text().splitlines()
    assert names == sorted(names) and all(path.startswith(names[label]) for path, label in train.items())
    labels = [val[path] for path in sorted(val)]
    assert labels != sorted(labels)
    assert [item.name for item in folder.parent.iterdir()] == ["digits"]


@pytest.mark.caffe
def test_pixels_are_mlxtends_and_no_image_is_in_both_parts(folder: Path) -> None:
    images, labels = digits.load_digits()
    decoded = {
        part: [
            np.asarray(cv2.imread(f"{folder}/{part}/{p}", cv2.IMREAD_UNCHANGED)) for p in listed(folder, part)
        ]
        for part in ("train", "val")
    }
    for part in decoded.values():
        assert all(image.shape == (28, 28) for image in part)
    assert not {i.tobytes() for i in decoded["train"]} & {i.tobytes() for i in decoded["val"]}
    for path, image in zip(listed(folder, "train"), decoded["train"], strict=True):
        index = int(path.rsplit("_", 1)[1].removesuffix(".JPEG"))
        assert path.startswith(f"digit_{labels[index]}/")
        assert np.abs(image.astype(int) - images[index]).max() <= 4, "JPEG at its best quality"


@pytest.mark.caffe
def test_a_whole_set_is_kept_and_a_broken_one_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main(["--output", os.fspath(folder)]) == 0
    assert "kept, it is complete" in capsys.readouterr().out
    image = folder / "val" / "digits_val_00000007.JPEG"
    content = image.read_bytes()
    image.write_bytes(b"")
    with pytest.raises(UserError, match=r"\(val/digits_val_00000007.JPEG is missing\): remove it"):
        digits.main(["--output", os.fspath(folder)])
    image.write_bytes(content)


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/digits cannot be made: its folder .*/no does not exist"):
        digits.main(["--output", os.fspath(tmp_path / "no" / "digits")])
    with pytest.raises(UserError, match=r"is not the whole set of digits \(train.txt is missing\)"):
        digits.main(["--output", os.fspath(tmp_path)])


@settings(max_examples=20)
@given(st.integers(1, 400), st.randoms(use_true_random=False))
def test_no_content_is_on_both_sides_of_the_split(kinds: int, chooser: random.Random) -> None:
    """Whatever repeats, and however often: the held-out images are balanced, and none is trained on."""
    contents = [chooser.randrange(kinds) for _ in range(2000)]
    images = [b"%d" % content for content in contents] + [b"only %d" % n for n in range(300)]
    labels = [content % 2 for content in contents] + [n % 2 for n in range(300)]
    split = digits.split_digits(images, labels)
    assert Counter(labels[index] for index in split.held_out) == {0: 100, 1: 100}
    assert not {images[i] for i in split.train} & {images[i] for i in split.held_out}
    used = [images[index] for index in [*split.train, *split.held_out]]
    assert sorted(used) == sorted(set(images))
