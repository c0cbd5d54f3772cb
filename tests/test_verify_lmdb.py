"""`create_lmdb --verify`: what it says of databases that anyone made, and of each thing that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from bad_images import BAD as BAD_IMAGES
from bad_images import ODD as ODD_IMAGES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main
from caffe_jacinto.data.verify import Findings, verify_lmdb
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

Records = list[tuple[bytes, bytes]]
Datum = messages(Dialect.BVLC).Datum


def write(folder: Path, records: Records) -> Path:
    environment = lmdb.open(str(folder), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for key, value in records:
            transaction.put(key, value)
    environment.close()
    return folder


def jpeg(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A small image, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1])


def encoded(number: int, label: int, content: bytes | None = None) -> tuple[bytes, bytes]:
    image = jpeg(number) if content is None else content
    return b"%08d" % number, Datum(data=image, label=label, encoded=True).SerializeToString()


def mixed(count: int = 60, classes: int = 3) -> Records:
    """Good records in a random order of classes."""
    labels = np.random.default_rng(0).permutation(np.arange(count) % classes)
    return [encoded(number, int(label)) for number, label in enumerate(labels)]


def verify(folder: Path, **options: int) -> Findings:
    return verify_lmdb(folder, workers=2, **options)  # type: ignore[arg-type]


def test_a_good_database_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "lmdb", mixed())
    assert main(["--verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"{folder}: 60 records" in said
    assert "60 JPEG, 8x8, 3 channels" in said
    assert "3 classes, 0 to 2; 20 images each" in said
    assert "order       shuffled" in said
    assert said.endswith(f"{folder} is whole\n")


def warnings(found: Findings) -> dict[str, list[str]]:
    """The wording of each warning, with its examples."""
    return {found.wording(problem): cases.examples for problem, cases in found.warnings.items()}


BAD = {
    "not a Datum": (b"\xff\xff", "not a Datum message"),
    "no image": (Datum(data=b"", label=0, encoded=True).SerializeToString(), "cannot be decoded"),
    "garbage": (Datum(data=b"garbage", label=0, encoded=True).SerializeToString(), "cannot be decoded"),
    "cut off": (encoded(99, 0, jpeg(99, (64, 64))[:-50])[1], "cannot be decoded"),
    "negative": (encoded(99, -3)[1], "a label below 0"),
    "huge": (
        Datum(
            data=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0",
            encoded=True,
        ).SerializeToString(),
        "more than 100,000,000 pixels",
    ),
    "raw too short": (
        Datum(data=b"abc", channels=3, height=8, width=8).SerializeToString(),
        "do not fill the image's size: 3 for 3 x 8 x 8",
    ),
    "float too short": (
        Datum(float_data=[1.0], channels=1, height=2, width=1).SerializeToString(),
        "do not fill the image's size: 1 for 1 x 2 x 1",
    ),
    "empty": (b"", "do not fill the image's size: 0 for 0 x 0 x 0"),
    "gray": (
        Datum(data=bytes(64), channels=1, height=8, width=8).SerializeToString(),
        "images of different numbers of channels",
    ),
    "sixteen bits": (
        Datum(
            data=bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint16))[1]), encoded=True
        ).SerializeToString(),
        "not 8-bit: uint16",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_caffe_fails_at_is_an_error(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, says = BAD[kind]
    folder = write(tmp_path / "lmdb", [*mixed(), (b"00000099_odd", record)])
    assert main(["--verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert says in said
    assert f"{folder} is not fit for training: 1 kind of error" in said
    found = verify(folder)
    assert len(found.errors) == 1
    assert kind == "gray" or "00000099_odd" in next(iter(found.errors.values())).examples[0]


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_every_bad_image_is_found(name: str, tmp_path: Path) -> None:
    """Put into a record as they are, by a program that does not look at them."""
    folder = write(tmp_path / "lmdb", [*mixed(), encoded(99, 0, BAD_IMAGES[name].content)])
    (cases,) = verify(folder).errors.values()
    assert cases.count == 1
    assert "00000099" in cases.examples[0]


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_are_told_by_what_caffe_sees(name: str, tmp_path: Path) -> None:
    """Size and channels as stored, unturned; what no batch can take beside colour images is an error."""
    content = ODD_IMAGES[name].content
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    found = verify(write(tmp_path / "lmdb", [encoded(0, 0, content)]))
    ((form, count),) = found.forms.items()
    assert count == 1
    assert (form.height, form.width) == pixels.shape[:2]
    assert bool(found.errors) == (pixels.dtype != np.uint8)


def test_memory_grows_by_little_a_record(tmp_path: Path) -> None:
    """Of six thousand more: some 60 bytes each, whatever their images; the file's own pages aside."""
    content, peaks = jpeg(1), []
    for count in (1_000, 7_000):
        folder = write(tmp_path / str(count), [encoded(i, i % 10, content) for i in range(count)])
        tracemalloc.start()
        verify(folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 6_000 * 100


def test_what_is_probably_a_mistake_is_a_warning(tmp_path: Path) -> None:
    records = [encoded(i, i // 20) for i in range(60)]
    assert "sorted by class" in "".join(warnings(verify(write(tmp_path / "sorted", records))))
    records = [encoded(i, (i // 10) % 3) for i in range(60)]
    found = verify(write(tmp_path / "grouped", records))
    assert found.order == "grouped"
    assert "in groups of one class" in "".join(warnings(found))

    records = [*mixed(), encoded(100, 1, jpeg(7)), encoded(101, 9), encoded(102, 1, jpeg(5, (9, 7)))]
    found = verify(write(tmp_path / "odd", records))
    assert not found.errors
    told = warnings(found)
    assert told["labels without an image"] == ["6 of them: 3, 4, 5, 6, 7, 8"]
    assert told["images of different sizes: training needs a crop, and cannot use a mean image"] == [
        "2 sizes, from 7x9 to 8x8"
    ]
    same = [line for what, lines in told.items() if "more than once" in what for line in lines]
    assert len(same) == found.duplicates == 1
    assert "'00000007' and '00000100'" in same[0]


def test_labels_beyond_the_class_names_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "lmdb", mixed())
    (folder / "labels.txt").write_text("cat\ndog\n")
    found = verify(folder)
    ((problem, cases),) = found.errors.items()
    assert (found.wording(problem), cases.count) == ("a label beyond the 2 class names", 20)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: None, "is empty"),
        (lambda folder: os.truncate(folder / "data.mdb", 8192), "cut off"),
        (lambda folder: (folder / "data.mdb").write_bytes(b"x" * 10000), "cannot be read as an LMDB"),
        (lambda folder: (folder / "data.mdb").unlink(), "data.mdb"),
    ],
)
def test_no_database_is_one_line(break_it: object, says: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "lmdb", [] if says == "is empty" else mixed())
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=says):
        verify(folder)
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "missing")


small_labels = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(small_labels, st.lists(st.integers(0, 20), min_size=40, max_size=40))
def test_counts_are_those_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, labels: list[int], images: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("counts") / "lmdb"
    write(folder, [encoded(i, label, jpeg(images[i])) for i, label in enumerate(labels)])
    found = verify(folder)
    assert found.labels == Counter(labels)
    assert found.records == len(labels)
    assert found.duplicates == len(labels) - len(set(images[: len(labels)]))
    assert found.changes == sum(a != b for a, b in pairwise(labels))
    n = len(labels)
    pairs = sum(labels[i] != labels[j] for i in range(n) for j in range(n) if i != j)
    assert found.expected_changes == pytest.approx(pairs / n if n > 1 else 0)


def test_the_page_shows_images_and_escapes_names(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    raw = Datum(data=bytes(range(192)), channels=3, height=8, width=8, label=1).SerializeToString()
    records = [*mixed(30, 2), (b"00000050_<b>", raw), (b"00000051", b"\xff")]
    folder = write(tmp_path / "lmdb", records)
    (folder / "labels.txt").write_text(f"{name}\ndog\n")
    page = tmp_path / "page.html"
    assert main(["--verify", str(folder), "--sample", "32", "--output", str(page)]) == 1
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 30
    assert text.count("data:image/png;base64,") == 1
    assert name not in text
    assert "0 &lt;script&gt;" in text
    assert "00000050_&lt;b&gt;" in text
    assert "not a Datum message" in text
    assert main(["--verify", str(folder), "--sample", "5", "--output", str(page)]) == 1
    assert page.read_text().count("<figure>") == 5


def test_the_page_replaces_only_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before the records are read."""
    lmdb_folder = write(tmp_path / "lmdb", mixed())
    page, other = tmp_path / "page.html", tmp_path / "thesis.txt"
    other.write_text("years of work")
    for _ in range(2):
        assert main(["--verify", str(lmdb_folder), "--output", str(page)]) == 0
    capsys.readouterr()
    for output, says in (
        (other, "exists and is not a page of images"),
        (tmp_path / "none" / "page.html", "does not exist; make that first"),
        (tmp_path, "is a folder: name the page"),
    ):
        with pytest.raises(UserError, match=says):
            main(["--verify", str(lmdb_folder), "--output", str(output)])
    assert other.read_text() == "years of work"
    assert capsys.readouterr().out == ""


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "lmdb", [encoded(i, i // 20) for i in range(60)])
    assert main(["--verify", str(folder), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fit"] is True
    assert said["labels"] == {"0": 20, "1": 20, "2": 20}
    assert said["images"] == [{"kind": "JPEG", "channels": 3, "height": 8, "width": 8, "images": 60}]
    assert said["order"] == "by class"
    assert [warning["count"] for warning in said["warnings"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--verify", "x", "--images", "y"], "--images is for making an LMDB, and --verify reads one"),
        (["--verify", "x", "--sample", "3"], "name it with --output"),
        (["--verify", "x", "--sample", "0", "--output", "p"], "not a whole number from 1"),
        (["--images", "x", "--output", "y", "--format", "json"], "--format is for --verify"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(arguments)


@pytest.mark.caffe
@pytest.mark.parametrize("options", [[], ["--encoded", "--encode_type=jpg"], ["--encoded", "--gray"]])
def test_what_convert_imageset_makes_is_whole(
    options: list[str], caffe_engine: Engine, tmp_path: Path
) -> None:
    lines = []
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (20, 16)))
        lines.append(f"{number}.jpg {number % 4}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    program = caffe_engine.info.executable.with_name("convert_imageset")
    arguments = ["--resize_height=16", "--resize_width=16", "--shuffle", *options]
    places = [f"{tmp_path}/", str(tmp_path / "list.txt"), str(tmp_path / "lmdb")]
    subprocess.run([program, *arguments, *places], check=True, capture_output=True)
    command = [sys.executable, "-m", "caffe_jacinto.create_lmdb", "--verify", str(tmp_path / "lmdb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is whole" in done.stdout
    assert "4 classes, 0 to 3; 10 images each" in done.stdout
