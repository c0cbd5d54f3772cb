"""The forms of what is stored: as convert_imageset's where it has them, and what the others promise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from ilsvrc import jpeg
from lmdb_records import Datum, create, mistake, records

from caffe_jacinto.data.encode import ImageForm
from caffe_jacinto.engines.contract import Engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several sizes and kinds, with spaces in their paths, and list.txt beside them."""
    images = tmp_path / "in"
    (images / "a b").mkdir(parents=True)
    for number, (height, width) in enumerate(((40, 50), (90, 30), (64, 64), (300, 500), (1, 1))):
        (images / "a b" / f"{number} x.jpg").write_bytes(jpeg(number, height=height, width=width))
    grey = cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg(7), np.uint8), 1), cv2.COLOR_BGR2GRAY)
    (images / "grey.JPEG").write_bytes(cv2.imencode(".jpg", grey)[1].tobytes())
    (images / "grey.png").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
    files = sorted(path for path in images.rglob("*.*") if path.is_file())
    lines = [f"{file.relative_to(images)} {number}\n" for number, file in enumerate(files)]
    (tmp_path / "list.txt").write_text("".join(lines))
    return images


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--encoded", "--encode_type=jpg", "--resize_height=24", "--resize_width=32"], ["--size", "32x24"]),
        (["--encoded", "--encode_type=jpg", "--gray", "--resize_height=32", "--resize_width=32"], ["--gray"]),
        (["--resize_height=32", "--resize_width=32"], ["--raw"]),
        (["--resize_height=32", "--resize_width=32", "--gray"], ["--raw", "--gray"]),
        (["--encoded", "--encode_type=jpg"], ["--size", "original"]),
        ([], ["--size", "original", "--raw"]),
    ],
)
def test_record_for_record_as_convert_imageset(
    caffe_engine: Engine, folder: Path, tmp_path: Path, theirs: list[str], ours: list[str]
) -> None:
    program = caffe_engine.info.executable.parent / "convert_imageset"
    places = [f"{folder}/", f"{tmp_path}/list.txt", f"{tmp_path}/caffe"]
    subprocess.run([str(program), *theirs, *places], check=True, capture_output=True)
    size = [] if "--size" in ours else ["--size", 32]
    create("--images", folder, "--list", tmp_path / "list.txt", "--output", tmp_path / "o", *ours, *size)
    assert len(records(tmp_path / "caffe")) == 7
    assert list(records(tmp_path / "o").items()) == list(records(tmp_path / "caffe").items())


def sizes(lmdb: Path) -> set[tuple[int, int]]:
    """Width and height of each image."""
    images = (
        cv2.imdecode(np.frombuffer(Datum.FromString(value).data, np.uint8), 1)
        for value in records(lmdb).values()
    )
    return {(image.shape[1], image.shape[0]) for image in images}


def test_the_shorter_side_keeps_the_aspect(folder: Path, tmp_path: Path) -> None:
    for options in ([], ["--fast"]):
        output = tmp_path / f"o{len(options)}"
        arguments = ["--images", folder, "--list", tmp_path / "list.txt", "--shorter-side", 20]
        create(*arguments, "--output", output, *options)
        assert sizes(output) == {(25, 20), (20, 60), (20, 20), (33, 20)}


def test_quality_and_what_contradicts(folder: Path, tmp_path: Path) -> None:
    command = ["--images", folder, "--list", tmp_path / "list.txt", "--size", 64, "--output"]
    create(*command, tmp_path / "high")
    create(*command, tmp_path / "low", "--quality", 30)
    assert sum(map(len, records(tmp_path / "low").values())) < 0.8 * sum(
        map(len, records(tmp_path / "high").values())
    )
    assert "--quality is for JPEG files" in mistake([*command, tmp_path / "p", "--quality", 30, "--raw"])
    assert "'0' is not a whole number from 1 to 100" in mistake([*command, tmp_path / "p", "--quality", 0])
    assert "not allowed with" in mistake([*command, tmp_path / "p", "--shorter-side", 9])


@pytest.mark.parametrize(
    ("size", "flag"),
    [
        ((500, 375), 2),
        ((333, 500), 2),
        ((500, 332), 1),
        ((400, 300), 1),
        ((512, 512), 2),
        ((4000, 3000), 8),
        ((2500, 1300), 4),
        ((4000, 300), 1),
    ],
)
def test_fast_decodes_as_little_as_it_may(size: tuple[int, int], flag: int) -> None:
    from caffe_jacinto.data.encode import _reduced_flag

    expected = cv2.IMREAD_COLOR if flag == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{flag}")
    assert _reduced_flag(*size, ImageForm(256, 256, fast=True)) == expected
