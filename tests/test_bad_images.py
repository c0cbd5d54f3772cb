"""Odd and bad images: what can be read is read as Caffe reads it, what cannot is left out with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from bad_images import BAD, ODD, encoded, photograph, thumbnail_jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from ilsvrc import tar_of
from lmdb_records import create, labels_of, records

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.encode import ImageForm, image_record, image_size
from caffe_jacinto.data.index import UnreadableImageError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

Datum = messages(Dialect.BVLC).Datum
AS_THEY_ARE = ImageForm(0, 0)
PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One class of all odd and bad images."""
    images = tmp_path / "train" / "cat"
    images.mkdir(parents=True)
    for name, image in {**ODD, **BAD}.items():
        (images / f"{name}.JPEG").write_bytes(image.content)
    return images.parent


def make(folder: Path, output: Path, *options: object) -> dict[str, str]:
    """Reason by file name of what was left out."""
    create("--images", folder, "--output", output, "--max-bad", len(BAD), *options)
    lines = (output / "skipped.txt").read_text().splitlines()
    return {Path(path).stem: reason for path, reason in (line.split("\t") for line in lines)}


def stored(lmdb: Path) -> set[str]:
    return {Path(name).stem for name in labels_of(lmdb)}


@pytest.mark.parametrize("options", [[], ["--gray"], ["--raw"], ["--fast"], ["--shorter-side", 16]])
def test_the_readable_are_stored_and_the_others_listed(
    folder: Path, tmp_path: Path, options: list[object]
) -> None:
    size = [] if "--shorter-side" in options else ["--size", 16]
    skipped = make(folder, tmp_path / "lmdb", *options, *size)
    assert stored(tmp_path / "lmdb") == set(ODD)
    assert set(skipped) == set(BAD)
    for name, reason in skipped.items():
        assert BAD[name].reason in reason, f"{name}: {reason}"


def test_the_same_from_an_unopened_archive(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "train.tar"
    files = {f"cat/{path.name}": path.read_bytes() for path in (folder / "cat").iterdir()}
    archive.write_bytes(
        tar_of({"cat.tar": tar_of(files), "dog.tar": tar_of({"dog.JPEG": ODD["png"].content})})
    )
    (folder / "dog").mkdir()
    (folder / "dog" / "dog.JPEG").write_bytes(ODD["png"].content)
    opened = make(folder, tmp_path / "a", "--size", 16)
    assert make(archive, tmp_path / "b", "--size", 16) == opened
    assert records(tmp_path / "a") == records(tmp_path / "b")


def test_one_bad_image_more_than_allowed_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max-bad"):
        create("--images", folder, "--output", tmp_path / "lmdb", "--max-bad", len(BAD) - 1)
    assert not (tmp_path / "lmdb").exists()


def test_huge_headers_cost_no_memory(folder: Path, tmp_path: Path) -> None:
    """Decoded, each of the three images would take 1.2 GB."""
    command = [sys.executable, "-m", "caffe_jacinto.create_lmdb", "--images", str(folder), "--size", "16"]
    options = ["--output", str(tmp_path / "lmdb"), "--max-bad", str(len(BAD)), "--workers", "2"]
    # By a process between: Linux counts the memory of the one who starts a process into its peak.
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    measured = subprocess.run(
        [sys.executable, "-c", measure, *command, *options], capture_output=True, text=True
    )
    assert measured.returncode == 0, measured.stderr
    peak = int(measured.stdout)
    assert peak < 400_000, f"{peak / 1000:.0f} MB"


@pytest.mark.parametrize("name", ODD)
def test_odd_images_have_the_size_and_colours_that_opencv_shows(name: str) -> None:
    """With its orientation applied, 8 bits, three channels: what Caffe's ReadImageToCVMat asks for."""
    odd = ODD[name]
    datum = Datum.FromString(image_record(b"a.JPEG", odd.content, 3, ImageForm(0, 0, raw=True)))
    assert (datum.channels, datum.height, datum.width, datum.label) == (3, odd.height, odd.width, 3)
    pixels = np.frombuffer(datum.data, np.uint8).reshape(3, odd.height, odd.width).transpose(1, 2, 0)
    shown = cv2.imdecode(np.frombuffer(odd.content, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(pixels, shown)


def test_an_orientation_turns_the_image() -> None:
    """Against the untouched image turned by NumPy, so that the decoder is not its own witness."""
    plain = cv2.imdecode(np.frombuffer(encoded(photograph()), np.uint8), cv2.IMREAD_COLOR)
    for name, turned in (
        ("turned", np.rot90(plain, -1)),
        ("turned, big-endian", np.rot90(plain)),
        ("upside down", plain[::-1, ::-1]),
        ("mirrored", plain[:, ::-1]),
    ):
        datum = Datum.FromString(image_record(b"a.JPEG", ODD[name].content, 0, ImageForm(0, 0, raw=True)))
        pixels = np.frombuffer(datum.data, np.uint8).reshape(3, *turned.shape[:2]).transpose(1, 2, 0)
        assert np.array_equal(pixels, turned), name


@pytest.mark.caffe
@pytest.mark.parametrize("gray", [False, True])
def test_odd_images_are_read_as_caffe_reads_them(
    caffe_engine: Engine, folder: Path, tmp_path: Path, gray: bool
) -> None:
    """Same keys, and the same bytes of every record, as convert_imageset stores."""
    (tmp_path / "list.txt").write_text("".join(f"cat/{name}.JPEG {n}\n" for n, name in enumerate(ODD)))
    convert_imageset = caffe_engine.info.executable.parent / "convert_imageset"
    size = ["--resize_height=24", "--resize_width=32", *(["--gray"] if gray else [])]
    places = [f"{folder}/", str(tmp_path / "list.txt"), str(tmp_path / "caffe")]
    command = [str(convert_imageset), "--encoded", "--encode_type=jpg", *size, *places]
    subprocess.run(command, check=True, capture_output=True)
    options = ["--size", "32x24", *(["--gray"] if gray else [])]
    create("--images", folder, "--list", tmp_path / "list.txt", "--output", tmp_path / "ours", *options)
    ours, theirs = records(tmp_path / "ours"), records(tmp_path / "caffe")
    assert list(ours) == list(theirs)
    assert len(theirs) == len(ODD)
    assert [key for key in theirs if ours[key] != theirs[key]] == []


# ---------------------------------------------------------------------------------- properties

WHOLE = [
    encoded(photograph()),
    encoded(photograph(), ".jpg", *PROGRESSIVE),
    thumbnail_jpeg(),
    encoded(photograph(), ".png"),
]


@given(st.sampled_from(WHOLE[:3]), st.data())
def test_a_jpeg_that_is_cut_off_anywhere_is_left_out(content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(UnreadableImageError):
        image_record(b"a.JPEG", content[:at], 0, AS_THEY_ARE)


@settings(max_examples=300)
@given(st.sampled_from(WHOLE), st.data())
def test_damaged_bytes_give_an_image_or_a_reason(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    places = st.integers(0, len(content) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[place] = value
    try:
        record = image_record(b"a.JPEG", bytes(damaged), 5, ImageForm(8, 8))
    except UnreadableImageError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert Datum.FromString(record).label == 5


@settings(max_examples=300)
@given(
    st.sampled_from([b"", b"\xff\xd8", b"GIF89a", b"BM", b"RIFF", b"II*\0", b"P6 ", b"\0\0\1\0"]), st.binary()
)
def test_any_header_has_a_size_or_none(start: bytes, rest: bytes) -> None:
    size = image_size(start + rest)
    assert size is None or len(size) == 2
