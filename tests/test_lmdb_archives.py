"""ILSVRC's archives, unopened: the LMDB of the unpacked images; what is damaged or hostile is refused."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import cv2
import pytest
from ilsvrc import (
    SYNSETS,
    jpeg,
    tar_of,
    train_images,
    val_images,
    write_devkit,
    write_folders,
    write_train,
    write_val,
)
from lmdb_records import create, labels_of, mistake, names_in, records
from small_stage import SmallStage

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.devkit import read_devkit
from caffe_jacinto.data.digits import load_digits
from caffe_jacinto.engines.contract import Engine

VAL_LABELS = (3, 0, 2, 1, 1, 0)


def create_small(folder: Path, name: str, *arguments: object) -> Path:
    output = folder / name
    assert create("--output", output, "--size", 32, *arguments) == 0
    return output


def test_the_training_archive_gives_the_lmdb_of_the_unpacked_images(tmp_path: Path) -> None:
    images = train_images(10)
    archive, folder = write_train(tmp_path, images), write_folders(tmp_path / "train", images)
    unopened = create_small(tmp_path, "unopened", "--images", archive)
    unpacked = create_small(tmp_path, "unpacked", "--images", folder)
    assert len(records(unopened)) == 40
    assert list(records(unopened).items()) == list(records(unpacked).items())
    assert [key[9:] for key in records(unopened)] != sorted(key[9:] for key in records(unopened))
    assert (unopened / "labels.txt").read_text().split() == list(SYNSETS)
    assert {path: SYNSETS[label] for path, label in labels_of(unopened).items()} == {
        f"{synset}/{name}": synset for synset, files in images.items() for name in files
    }


def test_the_validation_archive_gets_its_labels_from_the_development_kit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = val_images(len(VAL_LABELS))
    archive, kit = write_val(tmp_path, images), write_devkit(tmp_path, VAL_LABELS)
    output = create_small(tmp_path, "val", "--images", archive, "--devkit", kit)
    assert list(labels_of(output).items()) == list(zip(images, VAL_LABELS, strict=True))
    assert (output / "labels.txt").read_text().split() == list(SYNSETS)
    assert f"labels of {kit.name}, sorted by name" in capsys.readouterr().out
    # The same images in a flat folder, and with the list that Caffe's users have.
    (tmp_path / "flat").mkdir()
    for name, content in images.items():
        (tmp_path / "flat" / name).write_bytes(content)
    flat = create_small(tmp_path, "flat_lmdb", "--images", tmp_path / "flat", "--devkit", kit)
    pairs = zip(images, VAL_LABELS, strict=True)
    (tmp_path / "val.txt").write_text("".join(f"{name} {label}\n" for name, label in pairs))
    listed = create_small(tmp_path, "listed", "--images", archive, "--list", tmp_path / "val.txt")
    assert records(output) == records(flat) == records(listed)


def test_a_list_picks_images_of_an_archive(tmp_path: Path) -> None:
    archive = write_train(tmp_path, train_images(10))
    (tmp_path / "l").write_text(f"{SYNSETS[1]}/{SYNSETS[1]}_3.JPEG 7\n./{SYNSETS[0]}/{SYNSETS[0]}_9.JPEG 0\n")
    output = create_small(tmp_path, "o", "--images", archive, "--list", tmp_path / "l")
    assert list(labels_of(output).values()) == [7, 0]
    unpacked = write_folders(tmp_path / "train", train_images(10))
    files = create_small(tmp_path, "files", "--images", unpacked, "--list", tmp_path / "l")
    assert records(output) == records(files)
    (tmp_path / "l").write_text("no/such.JPEG 1\n")
    message = mistake(["--images", archive, "--list", tmp_path / "l", "--output", tmp_path / "p"])
    assert f"{tmp_path}/l:1: archive {archive} holds no image 'no/such.JPEG'" in message


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("top", ["", "./", "data/train/"])
def test_an_archive_of_class_folders(tmp_path: Path, top: str, tar_format: int) -> None:
    """Made by anyone's tar, with names of all lengths; other files and links in it are left out."""
    long = "x" * (60 if tar_format == tarfile.USTAR_FORMAT else 150)
    files = {
        f"{top}dog/2.JPEG": jpeg(2),
        f"{top}cat/{long}.JPEG": jpeg(1),
        f"{top}cat/caf\udce9.png": jpeg(3),
        f"{top}cat/notes.txt": b"hello",
    }
    archive = tmp_path / "any.tar"
    with tarfile.open(archive, "w", format=tar_format) as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "dog"),
            (tarfile.SYMTYPE, "dog/l.JPEG"),
            (tarfile.LNKTYPE, "h.JPEG"),
        ):
            member = tarfile.TarInfo(f"{top}{name}")
            member.type, member.linkname = kind, "../../etc/passwd"
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    output = create_small(tmp_path, "o", "--images", archive, "--no-shuffle")
    assert [key[9:] for key in records(output)] == [
        os.fsencode("cat/caf\udce9.png"),
        f"cat/{long}.JPEG".encode(),
        b"dog/2.JPEG",
    ]


@pytest.mark.parametrize("name", ["/etc/cat/1.JPEG", "../cat/1.JPEG", "cat/../../1.JPEG"])
@pytest.mark.parametrize("inner", [False, True])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str, inner: bool) -> None:
    content = tar_of({"cat/0.JPEG": jpeg(0), name: jpeg(1)})
    archive = tmp_path / "bad.tar"
    archive.write_bytes(tar_of({"cat.tar": content}) if inner else content)
    message = mistake(["--images", archive, "--output", tmp_path / "o"])
    assert f"holds the name {name!r}, which leads out of it: refused" in message
    assert names_in(tmp_path) == ["bad.tar"]


def test_an_archive_that_was_cut_off_anywhere_is_named_before_any_work(tmp_path: Path) -> None:
    """As downloads of days break off. Whole is what has its end mark, the outer one's and the inner ones'."""
    whole = write_train(tmp_path, train_images(3)).read_bytes()
    cut = tmp_path / "cut.tar"
    end = len(whole.rstrip(b"\0"))
    for size in [*range(1, end, 4099), end]:
        cut.write_bytes(whole[:size])
        message = mistake(["--images", cut, "--output", tmp_path / "o"])
        assert str(cut) in message and ("cut off" in message or "damaged" in message)


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    def of(content: bytes) -> str:
        (tmp_path / "a.tar").write_bytes(content)
        return mistake(["--images", tmp_path / "a.tar", "--output", tmp_path / "o"])

    import gzip

    flat = tar_of({"1.JPEG": jpeg(1)})
    assert "it is compressed (gzip), and cannot be read from the middle: gunzip it" in of(gzip.compress(flat))
    assert "it is a zip archive: unpack it" in of(b"PK\3\4" + bytes(600))
    assert "holds 1 image directly and no classes: give the development kit (--devkit)" in of(flat)
    assert "holds no images" in of(tar_of({"cat/readme.txt": b"x"}))
    assert "class n2 holds no images" in of(
        tar_of({"n1.tar": tar_of({"1.JPEG": jpeg(1)}), "n2.tar": tar_of({})})
    )
    assert "has no clear classes" in of(tar_of({"a/1.JPEG": jpeg(1), "b/c/1.JPEG": jpeg(1)}))
    damaged = bytearray(tar_of({"cat/1.JPEG": jpeg(1), "cat/2.JPEG": jpeg(2)}))
    damaged[512 + -(-len(jpeg(1)) // 512) * 512 + 10] ^= 1
    assert "cut off or damaged at byte" in of(bytes(damaged))


def test_development_kits_that_do_not_fit(tmp_path: Path) -> None:
    archive, kit = write_val(tmp_path, val_images(6)), write_devkit(tmp_path, VAL_LABELS[:5])
    options = ["--images", archive, "--output", tmp_path / "o"]
    assert "holds 6 images, and the development kit" in mistake([*options, "--devkit", kit])
    assert "cannot be read: No such file" in mistake([*options, "--devkit", tmp_path / "none.tar.gz"])
    assert "holds no validation_ground_truth.txt" in mistake([*options, "--devkit", archive])
    kit.write_bytes(kit.read_bytes()[:-300])
    assert "development kit" in mistake([*options, "--devkit", kit])
    kit = write_devkit(tmp_path, VAL_LABELS)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    message = mistake([*options, "--devkit", kit, "--labels", tmp_path / "labels.txt"])
    assert "name different classes" in message
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        for name in ("meta.mat", "validation_ground_truth.txt"):
            member = tarfile.TarInfo(name)
            member.size = 200
            tar.addfile(member, io.BytesIO(b"1\n" * 100))
    assert "meta.mat cannot be read" in mistake([*options, "--devkit", tmp_path / "bad.tar.gz"])


def test_a_development_kit_damaged_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    kit = write_devkit(tmp_path, VAL_LABELS)
    sound, refused = kit.read_bytes(), 0
    for at in range(0, len(sound), 11):
        kit.write_bytes(sound[:at] + bytes(255 - byte for byte in sound[at : at + 4]) + sound[at + 4 :])
        try:
            read_devkit(kit)
        except UserError:
            refused += 1
    assert refused > 50


@pytest.mark.caffe
def test_real_caffe_trains_on_what_the_archives_gave(caffe_engine: Engine, tmp_path: Path) -> None:
    """Four digits as four synsets, 100 JPEG files of each; guessing would be right for a quarter."""
    pixels, labels = load_digits()
    chosen = [(synset, pixels[labels == label][:100]) for label, synset in enumerate(SYNSETS)]
    images = {
        synset: {
            f"{synset}_{n}.JPEG": cv2.imencode(".jpg", image)[1].tobytes() for n, image in enumerate(digits)
        }
        for synset, digits in chosen
    }
    output = tmp_path / "lmdb"
    assert create("--images", write_train(tmp_path, images), "--size", 28, "--output", output) == 0
    stage = SmallStage(tmp_path / "stage", output)
    stage.solver(max_iter=40, test_interval=40, test_iter=10, snapshot=40)
    log = stage.run(caffe_engine.train_commands(stage.job(40)))
    *_, accuracy = re.findall(r"Test net output #\d+: accuracy = ([0-9.]+)", log)
    assert float(accuracy) > 0.6, log
