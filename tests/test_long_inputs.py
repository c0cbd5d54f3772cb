"""Every parser with inputs a thousand times deeper and longer than usual: little time, no traceback."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caffe_jacinto.caffemodel.storage import read_weights, stored_state
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.data.archives import list_class_archive
from caffe_jacinto.data.index import Folder
from caffe_jacinto.data.listing import list_from_file, read_labels
from caffe_jacinto.data.mean import read_mean
from caffe_jacinto.engines.snapshots import is_marked_complete
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.netspec.graph import Node, counted_convolutions
from caffe_jacinto.netspec.shapes import gigamacs
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.load import BUILT_IN_FOLDER, load_recipe
from caffe_jacinto.report import main as report
from caffe_jacinto.runs import folder as run_folder

SECONDS = 10
"""Of the processor. What takes time that grows with the square of the length takes minutes here."""

GLOG = b"I1126 00:00:00.000000 1 solver.cpp:239] "
NET = GLOG + b"Initializing net from parameters: \n"


@contextmanager
def little_time() -> Iterator[None]:
    begun = time.process_time()
    yield
    assert time.process_time() - begun < SECONDS


def refused(read: Callable[[], object]) -> str:
    """The one line, of no great length, that an input is refused with."""
    with little_time(), pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600, message
    return message


# --------------------------------------------------------------------------------------------------- logs


def read_log(content: bytes) -> StageLog:
    """The log, read in each of the ways that the commands read it."""
    for options in ({"history": True}, {"live": True}, {}):
        log = StageLog(**options)
        with little_time():
            for start in range(0, len(content), 1 << 20):
                log.feed(content[start : start + (1 << 20)])
            log.close()
            log.figures()
    return log


def test_a_thousand_headers_on_a_line() -> None:
    loss = GLOG + b"Iteration 7, loss = 1.5"
    log = read_log((loss + b" ") * 1_000 + b"\n" + (loss + b" ") * 20_000 + loss + b"\n")
    assert (log.iteration, log.loss) == (7, 1.5)
    tests = GLOG + b"Iteration 7, Testing net (#0)"
    assert read_log(tests * 20_000 + b"\n").iteration == 7


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_may_end_in_each_way(end: bytes) -> None:
    lines = [GLOG + b"Iteration %d, loss = %g" % (10 * number, number / 8) for number in range(5_000)]
    log = read_log(end.join(lines) + end)
    assert (log.iteration, log.loss) == (49_990, 4_999 / 8)
    pieces = StageLog(live=True)
    for byte in end.join(lines[:30]) + end:
        pieces.feed(bytes([byte]))
    assert (pieces.iteration, pieces.displays) == (290, 30)


@pytest.mark.parametrize(
    "message",
    [
        b"Iteration 1, loss = " + b"1" * 900_000 + b"x",
        b"Iteration " + b"1" * 5_000 + b", loss = 1",
        b"Iteration 1 (" * 60_000,
        b"    Test net output #" + b"1" * 5_000 + b": a = 1",
        b"    Test net output #0: a" + b" = 1" * 200_000 + b"x",
        b"    Test net output #0: a = " + b"1" * 900_000 + b"x",
        b"Solver performance on device 0: " + b" = 1 img/sec (" * 60_000,
        b"This is " + b"caffe" * 180_000,
        b"Snapshotting to binary proto file a_iter_" + b"1" * 5_000 + b".caffemodel",
        b"Output data size: " + b"4000000000, " * 80_000,
        b"Optimization Done in " + b"1" * 5_000 + b"d",
    ],
    ids=lambda message: message[:25].decode(),
)
def test_messages_of_any_length(message: bytes) -> None:
    assert read_log(GLOG + message + b"\n" + GLOG + b"Iteration 20, loss = 2\n").iteration == 20


@pytest.mark.parametrize("kind", [b"net", b"solver"])
def test_printed_texts_of_any_depth(kind: bytes) -> None:
    first = GLOG + b"Initializing " + kind + b" from parameters: \n"
    for text in (b"layer {\n" * 20_000, b"layer {\n" * 20_000 + b"}\n" * 20_000):
        assert read_log(first + text + GLOG + b"Iteration 20, loss = 2\n").iteration == 20


def test_the_commands_read_such_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "many.log"
    log.write_bytes((GLOG + b"Iteration 7, loss = 1.5 ") * 5_000 + b"\n")
    assert report([str(log), "--format", "json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["stages"][0]["iterations"] == 7


def test_logs_in_folders_of_any_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    depth = 1_100  # more than Python's calls in calls
    deep = Path(*["d"] * depth)
    folders = [tmp_path / folder for folder in (deep, *deep.parents)]
    for folder in reversed(folders):  # mkdir(parents=True) recurses
        folder.mkdir(exist_ok=True)
    log = tmp_path / deep / "a.log"
    log.write_bytes(GLOG + b"Iteration 7, loss = 1.5\n")
    try:
        with little_time():
            assert report([str(tmp_path), "--format", "json"]) == 0
    finally:  # pytest would recurse, too
        log.unlink()
        for folder in folders[:-1]:
            folder.rmdir()
    assert '"iterations": 7' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ prototxts


def convolution(number: int, settings: str = "num_output: 8 kernel_size: 3 pad: 1") -> str:
    return (
        f'layer {{ name: "l{number}" type: "Convolution" bottom: "{f"l{number - 1}" if number else "data"}" '
        f'top: "l{number}" convolution_param {{ {settings} }} }}\n'
    )


INPUT = 'input: "data" input_shape { dim: 1 dim: 8 dim: 8 dim: 8 }\n'


def test_networks_of_five_thousand_layers() -> None:
    text = INPUT + "".join(map(convolution, range(5_000)))
    with little_time():
        assert gigamacs(tree.parse(text)) == 5_000 * 8 * 8 * 9 * 64 / 1e9
    with little_time():
        assert len(parse_net(text, Dialect.BVLC, "x").layer) == 5_001  # the input has become a layer
    nodes = [Node(f"l{at}", "Convolution", (f"b{at}",), (f"b{at + 1}",)) for at in range(50_000)]
    with little_time():
        assert len(counted_convolutions(nodes)) == 50_000


@pytest.mark.parametrize("opening", ["layer { ", "layer <", "transform_param: { ", "a: [ ", "a: [{ "])
def test_prototxts_of_any_depth(opening: str) -> None:
    for text in (opening * 100_000, 'name: "' + "x" * 1_000_000 + '" ' + opening * 3):
        assert "x" in refused(lambda text=text: tree.parse(text, "x"))
        for dialect in Dialect:
            refused(lambda text=text, dialect=dialect: parse_net(text, dialect, "x"))
            refused(lambda text=text, dialect=dialect: parse_solver(text, dialect, "x"))


def test_numbers_that_no_network_has() -> None:
    huge = "9" * 400
    for settings in (
        f"num_output: {huge} kernel_size: 3",
        f"num_output: 3 kernel_size: {huge}",
        "num_output: 9000000000000000000 kernel_size: 2",
        "num_output: 2000000000 kernel_size: 3 stride: 0",
    ):
        text = INPUT + "".join(convolution(number, settings) for number in range(3))
        assert not gigamacs(tree.parse(text))
    upwards = convolution(0).replace("Convolution", "Deconvolution").replace("l0", "data")
    text = INPUT + upwards.replace("pad: 1", "stride: 2000000000") * 300
    assert gigamacs(tree.parse(text)) is None
    assert tree.parse(f"a: {huge}").number("a") == float("inf")


# ---------------------------------------------------------------------------------------------- binary files


@pytest.mark.parametrize("read", [read_weights, stored_state, read_mean])
def test_messages_in_messages(read: Callable[[Path], object], tmp_path: Path) -> None:
    """Fields of every number that a reader looks into, one in another, and very many of them."""
    path = tmp_path / "file"
    for number in (1, 2, 3, 7, 100):
        tag = number << 3 | 2
        field = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
        nested = b""
        for _ in range(3_000):
            nested = field + _varint(len(nested)) + nested
        for content in (nested, (field + b"\0") * 100_000, field + b"\xff" * 100_000):
            path.write_bytes(content)
            refused(lambda: read(path))


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


# ----------------------------------------------------------------------------------------- lists and archives


def test_lists_and_names_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    for content in (b"a" * 1_000_000, b"a " * 500_000, b"a " + b"1" * 500_000, b"a" * 5_000 + b" 1"):
        path.write_bytes(content)
        refused(lambda: list_from_file(path, Folder(tmp_path)))
    path.write_bytes(b"folder/image.jpg 7\n" * 300_000)
    with little_time():
        assert len(list_from_file(path, Folder(tmp_path))) == 300_000
    path.write_text("".join(f"class {number}\n" for number in range(300_000)))
    with little_time():
        assert len(read_labels(path)) == 300_000


def tar(path: Path, *members: tuple[bytes, str, bytes]) -> Path:
    """A tar archive of members: type, name, content."""
    with path.open("wb") as file:
        for kind, name, content in members:
            header = tarfile.TarInfo(name)
            header.type, header.size = kind, len(content)
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.write(content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    return path


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_of_headers_in_an_archive(kind: bytes, tmp_path: Path) -> None:
    content = b"name\0" if kind == tarfile.GNUTYPE_LONGNAME else b"15 path=a/b.jpg\n"[:15] + b"\n"
    path = tar(tmp_path / "a.tar", *[(kind, "header", content)] * 3_000, (tarfile.REGTYPE, "a/b.jpg", b"x"))
    assert str(path) in refused(lambda: list_class_archive(path))


def test_archives_of_many_and_long_names(tmp_path: Path) -> None:
    many = tar(tmp_path / "a.tar", *[(tarfile.REGTYPE, f"a/{number}.jpg", b"x") for number in range(20_000)])
    with little_time():
        assert len(list_class_archive(many)) == 20_000
    long = io.BytesIO()
    with tarfile.open(fileobj=long, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a/" * 100_000 + "b.jpg", "a" * 100_000 + ".jpg"):
            archive.addfile(tarfile.TarInfo(name))
    (tmp_path / "long.tar").write_bytes(long.getvalue())
    refused(lambda: list_class_archive(tmp_path / "long.tar"))


def test_recipes_of_any_depth_and_length(tmp_path: Path) -> None:
    recipe, deep = (BUILT_IN_FOLDER / "demo_digits.toml").read_text(), ".".join("a" * 5_000)
    path = tmp_path / "mine.toml"
    for more in (
        f"x = {'[' * 50_000}",
        f"x = {'{a=' * 50_000}",
        f"[{deep}]\nx = 1",
        f"{deep} = 1",
        "x = [\n" + "1,\n" * 5_000 + "]",
        'x = """\n' + "line\n" * 5_000 + '"""',
    ):
        path.write_text(f"{recipe}\n{more}\n")
        assert str(path) in refused(lambda: load_recipe(str(path)))
    with little_time(), pytest.raises(UserError):
        load_recipe(str(path), [f"{deep}=1"])


# ---------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"recipe":'])
def test_records_of_any_depth(opening: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "run/run.json"
    record.parent.mkdir()
    record.write_text(opening * 100_000)
    refused(lambda: run_folder.load(record.parent))
    with pytest.raises(ValueError, match="nested"):
        parse_json(opening * 100_000)
    stage = record.parent / "initial"
    stage.mkdir()
    (stage / "run.log").write_bytes(GLOG + b"Iteration 7, loss = 1.5\n")
    assert report([str(record.parent)]) == 0
    (stage / "a_iter_7.handover.json").write_text(opening * 100_000)
    assert not is_marked_complete(stage / "a_iter_7.caffemodel")
