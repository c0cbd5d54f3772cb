"""ILSVRC's archives, unopened: the LMDB of the unpacked images; what is damaged or hostile is refused."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
from caffe_jacinto.data.index import Archive, UnreadableImageError
from caffe_jacinto.data.tar_files import TarFiles
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


# ---------------------------------------------------------------------------------- as tar extracts them


def extract(archive: Path, folder: Path) -> Path:
    """What the system's tar leaves, complaints about links without targets aside.

    Without -P, GNU tar 1.34 holds links with '..' back, and may then put them in the place of a later file.
    """
    folder.mkdir()
    subprocess.run(["tar", "-xPf", archive, "-C", folder], capture_output=True, check=False)
    return folder


def member(name: str, *, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def write_members(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_links_duplicates_and_hidden_files_as_tar_extracts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = write_members(
        tmp_path / "any.tar",
        [
            (member("blobs/1.bin"), b"not an image"),
            (member("set/a/1.JPEG"), jpeg(1)),
            (member("set/a/._1.JPEG"), jpeg(2)),
            (member("set/__MACOSX/1.JPEG"), jpeg(2)),
            (member("set/b/1.JPEG"), jpeg(3)),
            (member("set/b/hard.JPEG", kind=tarfile.LNKTYPE, target="set/a/1.JPEG"), b""),
            (member("set/a/1.JPEG"), jpeg(4)),
            (member("set/c/soft.JPEG", kind=tarfile.SYMTYPE, target="../a/1.JPEG"), b""),
            (member("set/c/lost.JPEG", kind=tarfile.SYMTYPE, target="/etc/1.JPEG"), b""),
            (member("set/d", kind=tarfile.SYMTYPE, target="b"), b""),
            (member("set/a/late.JPEG", kind=tarfile.LNKTYPE, target="set/e/1.JPEG"), b""),
            (member("set/e/1.JPEG"), jpeg(5)),
        ],
    )
    unopened = create_small(tmp_path, "unopened", "--images", archive)
    said = capsys.readouterr()
    assert f"{archive}: among the images: 1 hard link, 3 symbolic links\n" in said.out
    left_out = "2 hidden files, 1 file with a name that comes again later, 1 hard link to files that it does"
    assert f"{archive}: left out: {left_out} not hold\n" in said.out
    assert "c/lost.JPEG: a link to '/etc/1.JPEG', which leads out of the archive" in said.err
    unpacked = create_small(tmp_path, "unpacked", "--images", extract(archive, tmp_path / "x") / "set")
    assert records(unopened) == records(unpacked)
    assert (unopened / "labels.txt").read_text() == "a\nb\nc\nd\ne\n"
    # By name, a list also finds what is hidden, or is in a folder that is a link.
    (tmp_path / "list").write_text("set/a/._1.JPEG 0\nset/d/hard.JPEG 1\nset/c/../a/1.JPEG 2\n")
    listed = create_small(tmp_path, "listed", "--images", archive, "--list", tmp_path / "list")
    files = create_small(tmp_path, "files", "--images", tmp_path / "x", "--list", tmp_path / "list")
    assert records(listed) == records(files)


@pytest.mark.parametrize("form", ["gnu", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_sparse_files_are_read_with_their_holes(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path / "images", {"a": {"1.JPEG": jpeg(1)}, "b": {"2.JPEG": jpeg(2)}})
    with (folder / "b" / "2.JPEG").open("r+b") as image:  # Decoders stop at the image's end.
        image.truncate(3 << 20)
        image.seek(1 << 20)
        image.write(b"more")
    kind, _, version = form.partition(" ")
    options = ["--sparse", f"--format={kind}", *([f"--sparse-version={version}"] if version else [])]
    subprocess.run(["tar", *options, "-cf", tmp_path / "sparse.tar", "-C", folder, "a", "b"], check=True)
    assert (tmp_path / "sparse.tar").stat().st_size < 1 << 20
    unopened = create_small(tmp_path, "unopened", "--images", tmp_path / "sparse.tar", "--size", "original")
    assert "among the images: 1 sparse file\n" in capsys.readouterr().out
    unpacked = create_small(tmp_path, "unpacked", "--images", folder, "--size", "original")
    assert records(unopened) == records(unpacked)
    assert max(map(len, records(unopened).values())) > 3 << 20


def test_a_class_without_images_does_not_shift_the_labels(tmp_path: Path) -> None:
    folder_b = member("b", kind=tarfile.DIRTYPE)
    for second in ((folder_b, b""), (member("b/notes.txt"), b"none"), (member("b/._1.JPEG"), jpeg(1))):
        images = [(member(f"{name}/1.JPEG"), jpeg(1)) for name in "ac"]
        archive = write_members(tmp_path / "gap.tar", [images[0], second, images[1]])
        message = mistake(["--images", archive, "--output", tmp_path / "o"])
        assert f"archive {archive}, class b holds no images: is it whole?" in message
    (tmp_path / "labels").write_text("a\nb\nc\n")
    output = create_small(tmp_path, "o", "--images", archive, "--labels", tmp_path / "labels")
    assert labels_of(output) == {"a/1.JPEG": 0, "c/1.JPEG": 2}


def test_members_that_cannot_be_read_as_files(tmp_path: Path) -> None:
    def of(*members: tarfile.TarInfo) -> str:
        content = [(info, b"" if info.type != tarfile.REGTYPE else jpeg(1)) for info in members]
        archive = write_members(tmp_path / "odd.tar", [(member("a/1.JPEG"), jpeg(0)), *content])
        return mistake(["--images", archive, "--output", tmp_path / "o"])

    link = member("b", kind=tarfile.SYMTYPE, target="a")
    assert "holds 'b' as a link and as a folder: extract it with tar" in of(link, member("b/2.JPEG"))
    lost = member("n1.tar", kind=tarfile.SYMTYPE, target="n2.tar")
    assert "odd.tar, n1.tar cannot be read: it is a broken link, or not a file" in of(lost)
    assert "continues a/2.JPEG from another volume" in of(member("a/2.JPEG", kind=b"M"))
    # A thousand headers that each extend the next one, and a map of parts without an end.
    long_names = member("x", kind=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) * 5000
    endless = member("a/2.JPEG")
    endless.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    for damaged in (long_names, endless.tobuf(tarfile.PAX_FORMAT) + bytes(10240)):
        (tmp_path / "odd.tar").write_bytes(damaged)
        message = mistake(["--images", tmp_path / "odd.tar", "--output", tmp_path / "o"])
        assert "damaged" in message or "cut off" in message


_NAMES = ("a/1", "a/2", "b/1", "b/2", "c/1", "l")
_MEMBERS = st.one_of(
    st.tuples(st.sampled_from(_NAMES[:-1]), st.just(tarfile.REGTYPE), st.just("")),
    st.tuples(st.sampled_from(_NAMES[:-1]), st.just(tarfile.LNKTYPE), st.sampled_from(_NAMES)),
    st.tuples(
        st.sampled_from(_NAMES),
        st.just(tarfile.SYMTYPE),
        st.sampled_from(
            ("1", "2", "../a/1", "../b/2", "../c/1", "../l", "../l/1", "a", "b", "/a/1", "../../away")
        ),
    ),
)


@given(st.lists(_MEMBERS, max_size=12))
def test_any_order_of_files_and_links_gives_what_tar_extracts(made: list[tuple[str, bytes, str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = [
            (member(path, kind=kind, target=target), f"{number}".encode() if kind == tarfile.REGTYPE else b"")
            for number, (path, kind, target) in enumerate(made)
        ]
        archive = Archive(write_members(folder / "any.tar", members))
        ours: dict[str, bytes | None] = {}
        for file in TarFiles(archive, "any.tar", 0, archive.size, lambda place: None):
            try:
                ours[file.path.decode()] = archive.read(file.path, file.offset, file.size)
            except UnreadableImageError:
                ours[file.path.decode()] = None
        extracted = extract(folder / "any.tar", folder / "x")
        theirs: dict[str, bytes | None] = {}
        for path in [*extracted.glob("*"), *extracted.glob("*/*")]:
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(extracted))
            if not (inside and path.is_dir()):
                theirs[str(path.relative_to(extracted))] = path.read_bytes() if path.is_file() else None
        # Folders of images are one level deep; a link inside one may be a folder again.
        ours = {name: content for name, content in ours.items() if name.count("/") < 2}
        assert ours == theirs


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
