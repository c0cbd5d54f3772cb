"""tools/utils/create_imagenet_classification_lmdb.sh, started as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from ilsvrc import train_images, val_images, write_devkit, write_train, write_val
from lmdb_records import labels_of

SCRIPT = Path(__file__).parents[1] / "tools" / "utils" / "create_imagenet_classification_lmdb.sh"

pytestmark = pytest.mark.caffe  # Needs no Caffe, but seconds.


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", np.full((40, 50, 3), 90, dtype=np.uint8))[1].tobytes())


def start(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | settings
    return subprocess.run([SCRIPT, *options], cwd=folder, env=environment, capture_output=True, text=True)


def order(path: Path) -> list[str]:
    with lmdb.open(os.fspath(path), readonly=True, lock=False) as environment, environment.begin() as txn:
        return [key.decode()[9:] for key, _ in txn.cursor()]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with a quote and spaces in its name, and images where the script looks by itself."""
    folder = tmp_path / "a 'user's $HOME"
    for name in ("cat", "dog"):
        for number in range(10):
            write_image(folder / "data" / "ilsvrc12" / "train" / name / f"{name}_{number}.JPEG")
    for number in range(3):
        write_image(folder / "data" / "ilsvrc12" / "val" / f"val {number}.JPEG")
    (folder / "data" / "ilsvrc12" / "val.txt").write_text("val 2.JPEG 1\nval 0.JPEG 0\nval 1.JPEG 1\n")
    return folder


def test_both_lmdbs_then_kept_then_forced(place: Path) -> None:
    done = start(place, SIZE="32")
    assert done.returncode == 0, done.stderr
    train, val = place / "data" / "ilsvrc12_train_lmdb", place / "data" / "ilsvrc12_val_lmdb"
    assert len(order(train)) == 20 and order(train) != sorted(order(train))
    assert order(val) == ["val 2.JPEG", "val 0.JPEG", "val 1.JPEG"]
    assert (train / "labels.txt").read_text() == (val / "labels.txt").read_text() == "cat\ndog\n"
    before = order(train)

    again = start(place, SIZE="32", SEED="5")
    assert again.returncode == 0 and again.stdout.count(": kept, ") == 2
    assert order(train) == before

    forced = start(place, SIZE="32", SEED="5", FORCE="1")
    assert forced.returncode == 0 and "shuffled with seed 5" in forced.stdout
    assert order(train) != before


def test_other_places_and_validation_images_in_class_folders(place: Path) -> None:
    write_image(place / "my data" / "val" / "dog" / "1.JPEG")
    (place / "my data" / "train").symlink_to(place / "data" / "ilsvrc12" / "train")
    done = start(place, DATA="my data", TRAIN_LMDB="t lmdb", VAL_LMDB="v lmdb", SIZE="32x24")
    assert done.returncode == 0, done.stderr
    assert order(place / "v lmdb") == ["dog/1.JPEG"]
    assert "32x24" in done.stdout


def test_both_lmdbs_from_the_archives_as_downloaded(place: Path) -> None:
    """The archives are taken before the folders beside them, and options go to both makings."""
    data, labels = place / "archives", (2, 0, 3)
    data.mkdir()
    write_train(data, train_images(5))
    write_val(data, val_images(len(labels)))
    write_devkit(data, labels)
    done = start(place, "--quality", "80", DATA="archives", TRAIN_LMDB="t", VAL_LMDB="v", SIZE="32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32x32 colour JPEG quality 80") == 2
    assert len(order(place / "t")) == 20
    assert list(labels_of(place / "v").values()) == list(labels)
    assert (place / "t" / "labels.txt").read_text() == (place / "v" / "labels.txt").read_text()


def problems(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines about what is missing; nothing has been made."""
    assert done.returncode == 2
    assert done.stdout == ""
    prefix = f"{SCRIPT.name}: error: "
    assert all(line.startswith(prefix) for line in done.stderr.splitlines())
    return [line.removeprefix(prefix) for line in done.stderr.splitlines()]


def test_all_that_is_missing_is_said_before_it_begins(place: Path) -> None:
    assert problems(start(place, DATA="none", VAL_LMDB="no/v")) == [
        "training images: looked for the archive none/ILSVRC2012_img_train.tar and for the folder none/train,"
        " and there is neither: put one there, or set DATA or TRAIN_IMAGES",
        "validation images: looked for the archive none/ILSVRC2012_img_val.tar and for the folder none/val,"
        " and there is neither: put one there, or set DATA or VAL_IMAGES",
        "no/v: the folder that it is made in does not exist; make that first",
    ]
    named = problems(start(place, TRAIN_IMAGES="a.tar", VAL_IMAGES="b.tar"))
    assert named == [
        "training images: there is no a.tar, which TRAIN_IMAGES names",
        "validation images: there is no b.tar, which VAL_IMAGES names",
    ]
    assert sorted(item.name for item in (place / "data").iterdir()) == ["ilsvrc12"]


def test_the_devkit_is_looked_for_before_the_training_images_are_read(place: Path) -> None:
    """Without labels of the validation images, hours of work on the training images would be for nothing."""
    data = place / "archives"
    data.mkdir()
    write_train(data, train_images(2))
    write_val(data, val_images(3))
    settings = {"DATA": "archives", "TRAIN_LMDB": "t", "VAL_LMDB": "v", "SIZE": "32"}
    assert problems(start(place, **settings)) == [
        "labels of the validation images in archives/ILSVRC2012_img_val.tar: looked for the development kit"
        " archives/ILSVRC2012_devkit_t12.tar.gz and for the list archives/val.txt, and there is neither: put"
        " one there, or set DEVKIT or VAL_LIST"
    ]
    assert not (place / "t").exists()
    (place / "data" / "ilsvrc12" / "val.txt").unlink()
    (flat,) = problems(start(place))
    assert flat.startswith(
        "labels of the validation images in ./data/ilsvrc12/val: looked for the development kit"
    )
    write_devkit(data, (2, 0, 1))
    done = start(place, **settings)
    assert done.returncode == 0, done.stderr
    assert "training images: archives/ILSVRC2012_img_train.tar\n" in done.stdout
    labels = "labels from archives/ILSVRC2012_devkit_t12.tar.gz"
    assert f"validation images: archives/ILSVRC2012_img_val.tar, {labels}\n" in done.stdout


def test_what_a_kept_lmdb_was_made_of_is_not_needed_any_more(place: Path) -> None:
    assert start(place, SIZE="32").returncode == 0
    (place / "data" / "ilsvrc12").rename(place / "elsewhere")
    done = start(place, SIZE="32")
    assert (done.returncode, done.stdout.count(": kept, ")) == (0, 2)
    assert len(problems(start(place, SIZE="32", FORCE="1"))) == 2


def test_a_validation_archive_of_class_folders_needs_no_devkit(place: Path) -> None:
    with tarfile.open(place / "val.tar", "w") as archive:
        archive.add(place / "data" / "ilsvrc12" / "train" / "dog", "./dog")
    done = start(place, SIZE="32", VAL_IMAGES="val.tar", VAL_LIST="none")
    assert done.returncode == 0, done.stderr
    assert "val.tar, labels from their class folders" in done.stdout
    assert len(order(place / "data" / "ilsvrc12_val_lmdb")) == 10


def test_a_python_without_the_packages_is_named(place: Path) -> None:
    bare = start(place, PYTHON="/bin/false")
    assert bare.returncode == 2
    assert "/bin/false lacks the Python packages of this project: run tools/utils/setup.sh" in bare.stderr
