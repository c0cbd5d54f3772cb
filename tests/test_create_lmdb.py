"""create_lmdb as a user runs it: real digits in, an LMDB out, and one clear line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import duration
from caffe_jacinto.create_lmdb import main
from caffe_jacinto.data import lmdb_writer
from caffe_jacinto.data.digits import write_digits
from caffe_jacinto.data.index import Folder
from caffe_jacinto.data.listing import list_from_file
from caffe_jacinto.data.lmdb_writer import new_lmdb
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

CREATE = (sys.executable, "-m", "caffe_jacinto.create_lmdb")


def write_image(path: Path, value: int = 128, *, height: int = 40, width: int = 50) -> None:
    """A photograph-sized stand-in: smooth noise, so that its JPEG is not trivial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    _, encoded = cv2.imencode(path.suffix, cv2.resize(noise, (width, height)))
    path.write_bytes(encoded.tobytes())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of three images: train/cat, train/dog."""
    folder = tmp_path / "train"
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            write_image(folder / name / f"{name} {number}.JPEG", 10 * label + number)
    return folder


def records(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(os.fspath(path), readonly=True, lock=False) as environment, environment.begin() as txn:
        return dict(txn.cursor())


def decoded(record: bytes) -> NDArray[np.uint8]:
    """The pixels of a Datum as they stand in its JPEG, grey ones with two dimensions."""
    content = np.frombuffer(messages(Dialect.BVLC).Datum.FromString(record).data, np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image.astype(np.uint8)


def names_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def labels_of(path: Path) -> dict[str, int]:
    """Label by path, from keys of the form %08d_<path>."""
    datum = messages(Dialect.BVLC).Datum
    return {key[9:].decode(): datum.FromString(value).label for key, value in records(path).items()}


def create(*arguments: object) -> int:
    return main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])


# ---------------------------------------------------------------------------------- what is stored


def test_class_folders_get_labels_in_sorted_order_and_bring_their_names(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "train_lmdb"
    assert create("--images", images, "--output", output, "--size", 32) == 0
    assert labels_of(output) == {
        f"{name}/{name} {n}.JPEG": label for label, name in enumerate(("cat", "dog")) for n in range(3)
    }
    assert (output / "labels.txt").read_text() == "cat\ndog\n"
    assert not (output / "skipped.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "train_lmdb"]


def test_records_are_datums_with_a_resized_colour_jpeg(images: Path, tmp_path: Path) -> None:
    create("--images", images, "--output", tmp_path / "o", "--size", "48x32", "--no-shuffle")
    key, value = next(iter(records(tmp_path / "o").items()))
    assert key == b"00000000_cat/cat 0.JPEG"
    datum = messages(Dialect.BVLC).Datum.FromString(value)
    assert [field.name for field, _ in datum.ListFields()] == ["data", "label", "encoded"]
    assert decoded(value).shape == (32, 48, 3)


def test_gray_stores_one_channel(images: Path, tmp_path: Path) -> None:
    create("--images", images, "--output", tmp_path / "o", "--size", 32, "--gray")
    for value in records(tmp_path / "o").values():
        assert decoded(value).ndim == 2


def test_class_folders_are_shuffled_by_a_seed_and_lists_are_not(images: Path, tmp_path: Path) -> None:
    def order(name: str, *options: object) -> list[bytes]:
        create("--images", images, "--output", tmp_path / name, "--size", 16, *options)
        return [key[9:] for key in records(tmp_path / name)]

    assert order("default") == order("same", "--shuffle", 33) != order("other", "--shuffle", 34)
    assert order("sorted", "--no-shuffle") == sorted(order("again"))
    lines = ["dog/dog 2.JPEG 1", "cat/cat 0.JPEG 0", "dog/dog 1.JPEG 1"]
    (tmp_path / "list.txt").write_text("\r\n".join(lines) + "\r\n\r\n")
    assert order("list", "--list", tmp_path / "list.txt") == [line[:-2].encode() for line in lines]


def test_a_list_that_is_not_there(images: Path, tmp_path: Path) -> None:
    arguments = ["--images", images, "--list", tmp_path / "gone.txt", "--output", tmp_path / "o"]
    assert f"{tmp_path}/gone.txt: No such file or directory; correct its path" in mistake(arguments)
    assert not (tmp_path / "o").exists()


def test_list_labels_follow_the_last_space(images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("cat/cat 0.JPEG 7\ndog/dog 1.JPEG 0")
    create("--images", images, "--list", tmp_path / "list.txt", "--output", tmp_path / "o", "--size", 16)
    assert labels_of(tmp_path / "o") == {"cat/cat 0.JPEG": 7, "dog/dog 1.JPEG": 0}
    assert not (tmp_path / "o" / "labels.txt").exists()


def test_labels_file_gives_class_folders_the_training_sets_labels(images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("ant\ncat\ncow\ndog\n")
    create("--images", images, "--labels", tmp_path / "labels.txt", "--output", tmp_path / "o", "--size", 16)
    assert set(labels_of(tmp_path / "o").values()) == {1, 3}
    assert (tmp_path / "o" / "labels.txt").read_text() == "ant\ncat\ncow\ndog\n"


def test_bad_images_are_left_out_with_the_reason(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "cat" / "cat 0.JPEG").read_bytes()
    (images / "cat" / "a_cut.JPEG").write_bytes(whole[: len(whole) // 2])
    (images / "cat" / "b_text.JPEG").write_text("not an image")
    (images / "cat" / "c_empty.JPEG").touch()
    (images / "cat" / "d_link.JPEG").symlink_to("nowhere")
    (images / "cat" / "e_loop.JPEG").symlink_to("e_loop.JPEG")
    (images / "cat" / "notes.txt").touch()
    (images / "cat" / "more").mkdir()
    (images / "cat" / ".hidden.JPEG").touch()
    create("--images", images, "--output", tmp_path / "o", "--size", 16, "--no-shuffle")
    assert len(records(tmp_path / "o")) == 6
    # Numbers are places in the listing, as convert_imageset counts them: 0 to 2 and 6, 7 are missing.
    numbers = [int(key[:8]) for key in records(tmp_path / "o")]
    assert numbers == [3, 4, 5, 8, 9, 10]
    assert (tmp_path / "o" / "skipped.txt").read_text().splitlines() == [
        "cat/a_cut.JPEG\tthe JPEG file is cut off: it has no end marker",
        "cat/b_text.JPEG\tnot an image that OpenCV can decode",
        "cat/c_empty.JPEG\tthe file is empty",
        "cat/d_link.JPEG\tNo such file or directory",
        "cat/e_loop.JPEG\tToo many levels of symbolic links",
    ]
    streams = capsys.readouterr()
    assert "11 images, 2 class folders (2 other items left out), sorted by name" in streams.out
    assert "warning: 5 images left out" in streams.err
    assert "skipped.txt; the first, cat/a_cut.JPEG: the JPEG file is cut off" in streams.err


def test_the_list_of_too_many_bad_images_is_there(images: Path, tmp_path: Path) -> None:
    """Also where nothing was stored yet; and then it does not stand in the way of another attempt."""
    for name in ("a_one", "a_two"):
        (images / "cat" / f"{name}.png").write_bytes(b"")
    message = mistake(["--images", images, "--output", tmp_path / "o", "--max-bad", 1])
    listed = tmp_path / ".o.partial" / "skipped.txt"
    assert str(listed) in message
    assert len(listed.read_text().splitlines()) == 2
    assert create("--images", images, "--output", tmp_path / "o", "--size", 32) == 0
    assert not listed.exists()
    assert len((tmp_path / "o" / "skipped.txt").read_text().splitlines()) == 2


def test_names_that_are_not_text_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xf0\x9f\x90\x88 x")
    write_image(tmp_path / "in" / name / f"{name}\n.JPEG")
    write_image(tmp_path / "in" / "b" / "1.png")
    create("--images", tmp_path / "in", "--output", tmp_path / "o", "--size", 16, "--no-shuffle")
    assert [key[9:] for key in records(tmp_path / "o")] == [b"b/1.png", os.fsencode(f"{name}/{name}\n.JPEG")]


def test_the_map_grows_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, "FIRST_MAP_BYTES", 1 << 16)
    monkeypatch.setattr(lmdb_writer, "BATCH_BYTES", 1 << 14)
    written = {b"%08d_x" % n: os.urandom(5000) for n in range(100)}
    with new_lmdb(tmp_path / "o") as writer:
        for key, value in written.items():
            writer.put(key, value)
    assert records(tmp_path / "o") == written


# ---------------------------------------------------------------------------------- users' mistakes


def mistake(arguments: Sequence[object]) -> str:
    with pytest.raises(UserError) as caught:
        create(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_unfit_image_folders(tmp_path: Path) -> None:
    def of(folder: Path) -> str:
        return mistake(["--images", folder, "--output", tmp_path / "o"])

    assert of(tmp_path / "none") == (
        f"image folder {tmp_path}/none does not exist: give the folder that holds the images"
    )
    (tmp_path / "file").touch()
    assert "it is neither a folder nor a tar archive, or it is damaged (empty file)" in of(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty holds no class folders" in of(tmp_path / "empty")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "n01440764.tar").touch()
    assert "holds archives (n01440764.tar) and no class folders: give one archive itself, or extract" in of(
        tmp_path / "tars"
    )
    write_image(tmp_path / "flat" / "1.JPEG")
    assert "holds 1 image directly and no class folders: give a list file" in of(tmp_path / "flat")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    assert "no images in the 1 class folder of" in of(tmp_path / "hollow")
    write_image(tmp_path / "hollow" / "dog" / "1.JPEG")
    assert f"class folder {tmp_path}/hollow/cat holds no images: fill it" in of(tmp_path / "hollow")
    write_image(tmp_path / "long" / ("c" * 255) / ("x" * 245 + ".JPEG"))
    assert "is too long for an LMDB key: 515 bytes with its number, 511 at most" in of(tmp_path / "long")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.JPEG 0\nb.JPEG\n", ":2: 'b.JPEG' is not of the form 'path label'"),
        ("\n12\n", ":2: '12' is not of the form 'path label'"),
        ("a.JPEG one\n", ":1: label 'one' is not a whole number from 0"),
        ("a.JPEG -1\n", ":1: label '-1' is not a whole number from 0"),
        ("a.JPEG 1.0\n", ":1: label '1.0' is not a whole number from 0"),
        ("a.JPEG 2147483647\n", ":1: label 2147483647 is beyond the 2 class names given (labels 0 to 1)"),
        ("a.JPEG 2147483648\n", ":1: label '2147483648' is above 2,147,483,647, the largest possible"),
        (f"a.JPEG {'9' * 5000}\n", " is above 2,147,483,647, the largest possible"),
        ("a.JPEG 0\nb.JPEG 2\n", ":2: label 2 is beyond the 2 class names given (labels 0 to 1)"),
        ("\n \n", " names no images: it holds lines of the form 'path label'"),
    ],
)
def test_bad_lines_of_a_list(images: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "l.txt").write_text(content)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    options = ["--list", tmp_path / "l.txt", "--labels", tmp_path / "labels.txt", "--output", tmp_path / "o"]
    said = mistake(["--images", images, *options])
    assert said.startswith(f"{tmp_path}/l.txt:") or "names no images" in said
    assert message in said


def test_the_largest_label_is_stored(images: Path, tmp_path: Path) -> None:
    path = next(path.relative_to(images) for path in images.glob("*/*.JPEG"))
    (tmp_path / "l.txt").write_text(f"{path} 2147483647\n")
    assert create("--images", images, "--list", tmp_path / "l.txt", "--output", tmp_path / "o") == 0
    assert labels_of(tmp_path / "o") == {str(path): 2**31 - 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("cat/1.JPEG 3 5", "the line seems to have two labels, and an image has one: write 'path label'"),
        (r"cat\1.JPEG 3", "the path has back slashes: write / between folders"),
        (
            "C:/images/1.JPEG 3",
            "the path begins with a drive of Windows: write paths relative to the images' folder",
        ),
    ],
)
def test_why_a_path_of_a_list_does_not_exist(images: Path, tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "l.txt").write_text(f"{line}\n")
    message = mistake(["--images", images, "--list", tmp_path / "l.txt", "--output", tmp_path / "o"])
    assert message.endswith(f"No such file or directory; {why}")
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(images, "")
    message = mistake(["--images", archive, "--list", tmp_path / "l.txt", "--output", tmp_path / "o"])
    assert f"l.txt:1: archive {archive} holds no image" in message and message.endswith(f"; {why}")


def test_bad_labels_files(images: Path, tmp_path: Path) -> None:
    def of(content: str | None) -> str:
        path = tmp_path / "labels.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        return mistake(["--images", images, "--labels", path, "--output", tmp_path / "o"])

    assert "cannot read labels file" in of(None)
    assert "is empty" in of("\n\n")
    assert "labels.txt:2: blank line between class names" in of("cat\n\ndog\n")
    assert "labels.txt:3: class name 'cat' is on line 1 already" in of("cat\ndog\ncat\n")
    assert f"class folder {images}/dog is not among the 1 class names given" in of("cat\n")


def test_no_readable_image_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.JPEG").touch()
    message = mistake(["--images", tmp_path / "in", "--output", tmp_path / "o"])
    assert message == (
        f"no image below {tmp_path}/in can be read (1 file tried); the first, cat/1.JPEG: the file is empty"
    )
    assert names_in(tmp_path) == ["in"]


def test_output_places_that_cannot_be(images: Path, tmp_path: Path) -> None:
    def of(output: Path, *options: str) -> str:
        return mistake(["--images", images, "--output", output, *options])

    assert f"its folder {tmp_path}/no does not exist" in of(tmp_path / "no" / "o")
    assert "cannot write to folder /proc" in of(Path("/proc/o"))
    (tmp_path / "file").touch()
    assert "file exists and is not an LMDB" in of(tmp_path / "file", "--force")
    assert "train exists and is not an LMDB" in of(images, "--force")
    create("--images", images, "--output", tmp_path / "o", "--size", 16)
    assert "o exists already: --force replaces it" in of(tmp_path / "o")
    (tmp_path / "o" / "mine.txt").touch()
    assert "holds 'mine.txt' beside the LMDB" in of(tmp_path / "o", "--force")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "0"],
        ["--size", "12x"],
        ["--size", "9" * 5000],
        ["--workers", "0"],
        ["--workers", "9999999"],
    ],
)
def test_bad_numbers(arguments: list[str], tmp_path: Path) -> None:
    message = mistake(["--images", tmp_path, "--output", tmp_path / "o", *arguments])
    assert message.startswith(f"argument {arguments[0]}: '{arguments[1][:40]}' is not a")


@pytest.mark.parametrize("name", ["new\nline", " cat", "cat "])
def test_class_names_that_labels_txt_cannot_hold(name: str, images: Path, tmp_path: Path) -> None:
    write_image(images / name / "1.JPEG")
    assert "rename the folder" in mistake(["--images", images, "--output", tmp_path / "o"])


# ---------------------------------------------------------------------------------- one that is there


def test_force_replaces_and_keep_keeps(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    create("--images", images, "--output", output, "--size", 16)
    before = (output / "data.mdb").stat().st_mtime_ns
    create("--images", images, "--output", output, "--size", 16, "--keep")
    assert "o: kept, 6 images of 16x16 (--force makes it again)" in capsys.readouterr().out
    assert (output / "data.mdb").stat().st_mtime_ns == before
    keep_other_size = ["--images", images, "--output", output, "--size", 24, "--keep"]
    assert "holds images of 16x16 pixels, not 24x24: --force replaces it" in mistake(keep_other_size)
    keep_other_form = ["--images", images, "--output", output, "--size", 16, "--keep", "--raw"]
    assert "was made as 16x16 colour, not as 16x16 colour raw: --force" in mistake(keep_other_form)
    write_image(images / "emu" / "1.JPEG")
    create("--images", images, "--output", output, "--size", 24, "--force")
    assert len(records(output)) == 7
    assert names_in(tmp_path) == ["o", "train"]


def test_an_output_that_is_a_link_is_followed(images: Path, tmp_path: Path) -> None:
    """Large LMDBs stand on another disk; making one again must not move it off that."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "o").symlink_to(tmp_path / "disk" / "lmdb")
    for force in ((), ("--force",)):
        create("--images", images, "--output", tmp_path / "o", "--size", 16, *force)
        assert len(records(tmp_path / "disk" / "lmdb")) == 6
        assert (tmp_path / "o").is_symlink()
        assert names_in(tmp_path / "disk") == ["lmdb"]


def test_a_failed_replacement_leaves_the_old_one(images: Path, tmp_path: Path) -> None:
    create("--images", images, "--output", tmp_path / "o", "--size", 16)
    before = records(tmp_path / "o")
    with pytest.raises(ZeroDivisionError), new_lmdb(tmp_path / "o", replace=True) as writer:
        writer.put(b"0", b"0")
        raise ZeroDivisionError
    assert records(tmp_path / "o") == before
    assert names_in(tmp_path) == ["o", "train"]


def test_two_writers_of_one_lmdb(tmp_path: Path) -> None:
    with new_lmdb(tmp_path / "o") as writer:
        with pytest.raises(UserError, match="another process is writing"), new_lmdb(tmp_path / "o"):
            pass
        writer.put(b"1", b"1")
    assert records(tmp_path / "o") == {b"1": b"1"}


# ---------------------------------------------------------------------------------- against real Caffe


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's real images."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    write_digits(folder)
    return folder


@pytest.mark.caffe
def test_record_for_record_as_convert_imageset(caffe_engine: Engine, digits: Path, tmp_path: Path) -> None:
    """On 300 real digits, listed with the paths of class folders: same keys, same Datums, same bytes."""
    convert_imageset = caffe_engine.info.executable.parent / "convert_imageset"
    lines = (digits / "train.txt").read_text().splitlines()[::13][:300]
    (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    size = ["--resize_height", "32", "--resize_width", "36"]
    paths = [f"{digits}/train/", f"{tmp_path}/list.txt", f"{tmp_path}/caffe"]
    subprocess.run(
        [str(convert_imageset), "--encoded", "--encode_type", "jpg", *size, *paths],
        check=True,
        capture_output=True,
    )
    create(
        "--images",
        digits / "train",
        "--list",
        tmp_path / "list.txt",
        "--output",
        tmp_path / "ours",
        "--size",
        "36x32",
    )
    ours, theirs = records(tmp_path / "ours"), records(tmp_path / "caffe")
    assert len(theirs) == 300
    assert list(ours) == list(theirs)
    datum = messages(Dialect.BVLC).Datum
    for key in theirs:
        our, their = datum.FromString(ours[key]), datum.FromString(theirs[key])
        assert (our.label, our.encoded) == (their.label, their.encoded)
        assert np.array_equal(decoded(ours[key]), decoded(theirs[key]))
    same = sum(ours[key] == theirs[key] for key in theirs)
    assert same == 300, f"{same} of 300 records are the same bytes"


# ---------------------------------------------------------------------------------- properties


names = st.text(st.characters(blacklist_characters="\0/\n\r", blacklist_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(names.filter(lambda n: n == n.strip()), st.integers(0, 10**9 - 1)), min_size=1))
def test_any_path_comes_through_a_list(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("list")
    (folder / "l").write_text("".join(f"{path} {label}\n" for path, label in lines), newline="")
    index = list_from_file(folder / "l", Folder(folder))
    assert [(os.fsdecode(index.path(n)), index.label(n)) for n in range(len(index))] == lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3 s"), (9.96, "10 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
