"""Fashion-MNIST is written in ImageNet's layout as published, with images held out; damage is one line."""

from __future__ import annotations

import gzip
import os
import struct
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data import fashion


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes(), compresslevel=1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of the published form: 200 training and 30 test images."""
    folder, chance = tmp_path / "idx", np.random.default_rng(1)
    folder.mkdir()
    for name, count in (("train", 200), ("t10k", 30)):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", chance.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", (np.arange(count) * 7 % 10).astype(np.uint8))
    return folder


def write(source: Path, *arguments: str) -> Path:
    output = source.with_name("fashion")
    assert fashion.main(["--output", os.fspath(output), "--source", os.fspath(source), *arguments]) == 0
    return output


def listed(folder: Path, part: str) -> dict[str, int]:
    pairs = (line.rsplit(" ", 1) for line in (folder / f"{part}.txt").read_text().splitlines())
    return {path: int(label) for path, label in pairs}


def pixels(folder: Path, part: str) -> list[bytes]:
    files = [cv2.imread(f"{folder}/{part}/{path}", cv2.IMREAD_UNCHANGED) for path in listed(folder, part)]
    assert all(image is not None and image.shape == (28, 28) for image in files)
    return [np.asarray(image).tobytes() for image in files]


def test_every_image_is_in_one_part_with_its_pixels_and_label(source: Path) -> None:
    folder = write(source, "--held-out", "3")
    images, labels = fashion.read_part(source, "train")
    label_of = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for part, count in (("train", 170), ("val", 30)):
        contents = pixels(folder, part)
        assert [label_of.pop(content) for content in contents] == list(listed(folder, part).values())
        assert len(contents) == count
    assert not label_of
    assert Counter(listed(folder, "val").values()) == dict.fromkeys(range(10), 3)
    test_images, test_labels = fashion.read_part(source, "t10k")
    assert pixels(folder, "test") == [image.tobytes() for image in test_images]
    assert list(listed(folder, "test").values()) == test_labels.tolist()
    names = (folder / "labels.txt").read_text().splitlines()
    assert names == sorted(names), "a class's label is the rank of its folder's name"
    assert all(path.startswith(f"{names[label]}/") for path, label in listed(folder, "train").items())
    assert sorted(path.name for path in source.parent.iterdir()) == ["fashion", "idx"]


def test_nothing_held_out_is_the_published_split(source: Path) -> None:
    folder = write(source, "--held-out", "0")
    assert len(listed(folder, "train")) == 200 and not (folder / "test").exists()
    assert pixels(folder, "val") == [image.tobytes() for image in fashion.read_part(source, "t10k")[0]]


def test_a_whole_set_is_kept_and_any_other_named(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(source, "--held-out", "3")
    write(source, "--held-out", "3")
    assert "kept, it is complete" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"30 images in val/, and 40 are requested: remove it"):
        write(source, "--held-out", "4")
    with pytest.raises(UserError, match="exists with images held out: remove it"):
        write(source, "--held-out", "0")
    (folder / "test/fashion_test_00000007.png").unlink()
    with pytest.raises(UserError, match=r"\(test/fashion_test_00000007.png is missing\): remove it"):
        write(source, "--held-out", "3")


def test_files_that_cannot_be_used_are_named_and_nothing_is_left(source: Path) -> None:
    images, labels = (source / f"train-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1"))
    good_images, good_labels = images.read_bytes(), labels.read_bytes()
    raw = gzip.decompress(good_images)

    def refused(path: Path, content: bytes, message: str) -> None:
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as failure:
            write(source)
        assert "\n" not in str(failure.value) and str(path) in str(failure.value)
        path.write_bytes(kept)

    refused(images, good_images[:-100], r"cannot be read \(Compressed file ended")
    refused(images, b"P5 28 28", r"cannot be read \(Not a gzipped file")
    refused(images, good_images[:300] + bytes(40) + good_images[340:], "cannot be read")
    refused(images, good_labels, "is not an IDX file of bytes in 3 dimensions")
    refused(images, gzip.compress(raw[:-1]), "has fewer than the 156,800 bytes")
    refused(images, gzip.compress(raw + b"1"), "has more than the 156,800 bytes")
    refused(images, gzip.compress(raw[:4] + b"\xff" * 12), "cannot be Fashion-MNIST")
    refused(images, b"", "is not an IDX file")
    write_idx(source / "few", np.zeros(199, np.uint8))
    refused(labels, (source / "few").read_bytes(), "has 199 labels for 200 images")
    write_idx(source / "high", np.full(200, 10, np.uint8))
    refused(labels, (source / "high").read_bytes(), "label 10 of image 0 is above 9")
    with pytest.raises(UserError, match="class 0_tshirt has only 20 training images"):
        write(source, "--held-out", "20")
    images.unlink()
    with pytest.raises(UserError, match="no such file; install it: apt-get install dataset-fashion-mnist"):
        write(source)
    assert sorted(path.name for path in source.parent.iterdir()) == ["idx"]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=60, max_size=200), st.integers(0, 5))
def test_a_split_is_balanced_and_covers_everything_once(labels: list[int], held_out: int) -> None:
    labels = [*labels, *(label for label in range(10) for _ in range(6))]
    train, val = fashion.split(labels, held_out)
    assert sorted(train + val) == list(range(len(labels))) and train == sorted(train)
    assert Counter(labels[index] for index in val) == (dict.fromkeys(range(10), held_out) if held_out else {})
    assert fashion.split(labels, held_out) == (train, val)


@pytest.mark.caffe  # Needs no Caffe, but seconds.
def test_the_package_of_debian_is_the_published_set() -> None:
    """Facts of the paper; and that no two images are equal, which the split relies on."""
    if not fashion.SOURCE.is_dir():
        assert not os.environ.get("CI"), "tools/utils/setup.sh --tests installs dataset-fashion-mnist"
        pytest.skip("dataset-fashion-mnist is not installed")
    images, labels = fashion.read_part(fashion.SOURCE, "train")
    test_images, test_labels = fashion.read_part(fashion.SOURCE, "t10k")
    assert images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [6000] * 10 and np.bincount(test_labels).tolist() == [1000] * 10
    assert len({image.tobytes() for image in (*images, *test_images)}) == 70_000
