"""The mean image of an LMDB: as compute_image_mean makes it, whole or not at all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from numpy.typing import NDArray

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

BVLC = messages(Dialect.BVLC)
RNG = np.random.default_rng(0)


def write_records(folder: Path, records: Iterable[bytes]) -> Path:
    folder.mkdir()
    with (
        lmdb.open(str(folder), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for index, record in enumerate(records):
            transaction.put(b"%08d_x" % index, record)
    return folder


def raw(pixels: NDArray[np.uint8]) -> bytes:
    channels, height, width = pixels.shape
    datum = BVLC.Datum(channels=channels, height=height, width=width, data=pixels.tobytes())
    return bytes(datum.SerializeToString())


def floats(values: NDArray[np.float32]) -> bytes:
    channels, height, width = values.shape
    datum = BVLC.Datum(channels=channels, height=height, width=width, float_data=values.ravel())
    return bytes(datum.SerializeToString())


def encoded(image: NDArray[np.uint8], extension: str) -> bytes:
    return bytes(
        BVLC.Datum(data=cv2.imencode(extension, image)[1].tobytes(), encoded=True).SerializeToString()
    )


def read_mean(path: Path) -> NDArray[np.float32]:
    blob = BVLC.BlobProto.FromString(path.read_bytes())
    return np.array(blob.data, np.float32).reshape(blob.num, blob.channels, blob.height, blob.width)


def images(count: int, *shape: int) -> list[NDArray[np.uint8]]:
    return [RNG.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def make(folder: Path, output: Path, *arguments: str) -> None:
    assert main(["--mean", str(folder), str(output), *arguments]) == 0


def mistake(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_is_the_mean_of_each_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = images(37, 3, 5, 7)
    folder = write_records(tmp_path / "lmdb", map(raw, pixels))
    make(folder, tmp_path / "out")
    mean = read_mean(tmp_path / "out")
    assert mean.shape == (1, 3, 5, 7)
    np.testing.assert_allclose(mean[0], np.mean(pixels, axis=0), rtol=1e-6)
    assert "mean of 37 images, 7x5, 3 channels with means" in capsys.readouterr().out


def test_encoded_images_are_blue_green_red(tmp_path: Path) -> None:
    pixels = images(5, 6, 4, 3)
    folder = write_records(tmp_path / "lmdb", (encoded(image, ".png") for image in pixels))
    make(folder, tmp_path / "out", "--workers", "2")
    np.testing.assert_allclose(
        read_mean(tmp_path / "out")[0], np.mean(pixels, axis=0).transpose(2, 0, 1), rtol=1e-6
    )


KINDS = {
    "colour JPEG": lambda: [encoded(image, ".jpg") for image in images(50, 16, 20, 3)],
    "gray JPEG": lambda: [encoded(image, ".jpg") for image in images(50, 16, 20)],
    "PNG with alpha": lambda: [encoded(image, ".png") for image in images(20, 9, 9, 4)],
    "raw": lambda: [raw(pixels) for pixels in images(300, 3, 8, 8)],
    # Sums far beyond 2^24, where each addition of 32-bit numbers rounds.
    "floats": lambda: [floats(RNG.normal(1e6, 1e6, (3, 8, 8)).astype(np.float32)) for _ in range(300)],
    "one": lambda: [raw(images(1, 1, 1, 1)[0])],
}


@pytest.mark.caffe
@pytest.mark.parametrize("kind", KINDS)
def test_byte_for_byte_as_compute_image_mean(kind: str, caffe_engine: Engine, tmp_path: Path) -> None:
    folder = write_records(tmp_path / "lmdb", KINDS[kind]())
    make(folder, tmp_path / "ours", "--workers", "3")
    program = caffe_engine.info.executable.parent / "compute_image_mean"
    subprocess.run([program, folder, tmp_path / "theirs"], check=True, capture_output=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_bad_records_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    good = raw(images(1, 3, 4, 6)[0])
    bad = {
        "not a Datum": b"\xff\xff",
        "cannot be decoded": bytes(BVLC.Datum(data=b"no image", encoded=True).SerializeToString()),
        "4x6 pixels in 3 channels, and the first one 6x4": raw(images(1, 3, 6, 4)[0]),
        "in 1 channel, and": raw(images(1, 1, 4, 6)[0]),
        "values that do not fill the image's size: 3 for 3 x 4 x 6": bytes(
            BVLC.Datum(channels=3, height=4, width=6, data=b"abc").SerializeToString()
        ),
        "size: 0 for 0 x 0 x 0": b"",
    }
    for number, (says, record) in enumerate(bad.items()):
        folder = write_records(tmp_path / f"lmdb{number}", [good, record, good])
        told = mistake("--mean", folder, tmp_path / "out")
        assert says in told
        assert "'00000001_x'" in told
        assert not (tmp_path / "out").exists()


def test_lmdbs_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in mistake("--mean", tmp_path / "none", tmp_path / "out")
    assert "is empty" in mistake("--mean", write_records(tmp_path / "empty", []), tmp_path / "out")
    cut = write_records(tmp_path / "cut", [raw(pixels) for pixels in images(50, 3, 32, 32)])
    data = (cut / "data.mdb").read_bytes()
    (cut / "data.mdb").write_bytes(data[: len(data) // 2])
    assert "cut off" in mistake("--mean", cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_stays_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_records(tmp_path / "lmdb", [raw(images(1, 3, 4, 4)[0])])
    output = tmp_path / "out"
    output.write_bytes(b"mine")
    assert "--force replaces it" in mistake("--mean", folder, output)
    make(folder, output, "--keep")
    assert "kept" in capsys.readouterr().out
    assert output.read_bytes() == b"mine"
    make(folder, output, "--force")
    assert read_mean(output).shape == (1, 3, 4, 4)
    assert "is not a file" in mistake("--mean", folder, tmp_path)
    assert "does not exist" in mistake("--mean", folder, tmp_path / "none" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lmdb", "out"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mean", "a"], "--mean"),
        (["--mean", "a", "b", "--images", "c"], "--images is for making an LMDB"),
        (["--mean", "a", "b", "--no-shuffle"], "--no-shuffle is for making an LMDB"),
        (["--images", "a"], "required: --output"),
        ([], "required: --images, --output"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: list[str], says: str) -> None:
    assert says in mistake(*arguments)
