"""One decoder and one transform: all readers see the same pixels, and refuse a record for the same reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from bad_images import BAD
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.data.batches import Images, data_layer
from caffe_jacinto.data.datum import Transform, Window
from caffe_jacinto.data.lmdb_reader import check_lmdb
from caffe_jacinto.data.mean import mean_image
from caffe_jacinto.data.verify import verify_lmdb
from caffe_jacinto.inference.network import Preprocessing, lmdb_samples
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net

Datum = messages(Dialect.BVLC).Datum


def encoded(pixels: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", pixels)[1])


def datum(content: bytes) -> bytes:
    return bytes(Datum(data=content, encoded=True).SerializeToString())


def write(folder: Path, *records: bytes) -> Path:
    with (
        lmdb.open(str(folder), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number, record in enumerate(records):
            transaction.put(b"%08d_x" % number, record)
    return folder


def by_check(folder: Path) -> None:
    check_lmdb(str(folder), num_classes=None, min_images=1, min_size=1)


def by_mean(folder: Path) -> None:
    mean_image(folder, workers=1)


def by_training(folder: Path) -> None:
    data = f'data_param {{ source: "{folder}" batch_size: 2 backend: LMDB }}'
    (layer,) = parse_net(f'layer {{ name: "d" type: "Data" top: "x" {data} }}', Dialect.BVLC, "net").layer
    images = Images(data_layer(layer, "net", training=True), 2, 0)
    images.read(0, np.empty(images.shape, images.dtype), np.empty(2, np.int64), np.empty((2, 3), np.int64))


def by_classify(folder: Path) -> None:
    _, samples = lmdb_samples(folder, Preprocessing(Transform(), (3, 8, 8)))
    reasons = [sample.reason for sample in samples]
    assert not reasons[0]
    raise UserError(reasons[1])


def by_verify(folder: Path) -> None:
    (cases,) = verify_lmdb(folder, workers=1).errors.values()
    raise UserError(cases.examples[0].removeprefix("'00000001_x' "))


REASONS = {
    "not a Datum": (b"\xff\xff", "not a Datum message"),
    "too few values": (
        Datum(data=b"abc", channels=3, height=8, width=8).SerializeToString(),
        "values that do not fill the image's size: 3 for 3 x 8 x 8 (channels x height x width)",
    ),
    "negative sizes": (
        Datum(data=bytes(64), channels=1, height=-8, width=-8).SerializeToString(),
        "values that do not fill the image's size: 64 for 1 x -8 x -8 (channels x height x width)",
    ),
    "gif": (datum(BAD["gif"].content), "a GIF image, which Caffe does not read"),
    "huge": (
        datum(BAD["claims to be huge, png"].content),
        "an image of more than 100,000,000 pixels, not decoded: 20000 x 20000",
    ),
    "garbage": (datum(b"garbage"), "an image that cannot be decoded (cut off, or not an image)"),
    "no content": (datum(b""), "an image that cannot be decoded (cut off, or not an image)"),
    "16 bits": (
        datum(encoded(np.zeros((8, 8, 3), np.uint16))),
        "an image whose pixels are not 8-bit: uint16",
    ),
}


@pytest.mark.parametrize("read", [by_check, by_mean, by_training, by_classify, by_verify])
@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_record_is_refused_for_one_reason(
    kind: str, read: Callable[[Path], None], tmp_path: Path
) -> None:
    record, reason = REASONS[kind]
    folder = write(tmp_path / "lmdb", datum(encoded(np.zeros((8, 8, 3), np.uint8))), record)
    with pytest.raises(UserError) as caught:
        read(folder)
    where, again = f"LMDB {folder}, record '00000001_x': ", ": make the LMDB again"
    assert str(caught.value).removeprefix(where).removesuffix(again) == reason


@given(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.booleans(), st.integers(1, 3))
def test_a_window_is_cropped_mirrored_and_normalized(
    top: int, left: int, mirrored: bool, by_image: bool, channels: int
) -> None:
    """Pixel by pixel as Caffe's DataTransformer: (pixel - mean at the same place) * scale, then mirrored."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (channels, 9, 11), dtype=np.uint8)
    mean = random.random((channels, 9, 11), np.float32) * 200
    values = tuple(float(value) for value in mean[:, 0, 0])
    transform = Transform(
        crop=4, scale=0.25, mean_image=mean if by_image else None, mean_values=() if by_image else values
    )
    got = transform.apply(pixels, Window(top, left, mirrored))
    for channel in range(channels):
        for row in range(4):
            for column in range(4):
                x = left + (3 - column if mirrored else column)
                less = mean[channel, top + row, x] if by_image else np.float32(values[channel])
                want = (np.float32(pixels[channel, top + row, x]) - less) * np.float32(0.25)
                assert got[channel, row, column] == want


@given(st.integers(8, 20), st.integers(8, 20), st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3))
def test_a_window_lies_within_the_image(height: int, width: int, chance: tuple[float, ...]) -> None:
    transform = Transform(crop=8, mirror=True)
    top, left, mirrored = transform.window(height, width, chance, anywhere=True)
    assert 0 <= top <= height - 8 and 0 <= left <= width - 8
    assert mirrored == (chance[2] < 0.5)
    middle = ((height - 8) // 2, (width - 8) // 2)
    assert transform.window(height, width, chance) == (*middle, mirrored)
    assert transform.window(height, width) == (*middle, False)


def test_a_joined_grey_lmdb_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "in" / "a" / f"{number}.png").write_bytes(encoded(np.zeros((8, 8), np.uint8)))
    output = ["--output", str(tmp_path / "o")]
    for shard in ("1/2", "2/2"):
        create_lmdb(["--images", str(tmp_path / "in"), *output, "--gray", "--size", "8", "--shard", shard])
    create_lmdb(["--join", *output])
    create_lmdb(["--join", "--keep", *output])
    assert "o: kept, 2 images of 8x8" in capsys.readouterr().out
