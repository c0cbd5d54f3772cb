"""What the engine on PyTorch is fed: Caffe's transform, any order of the records, and bad ones told of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_records import MEAN, SETTINGS, datum_of, encoded, noise, turned_by_exif, write_lmdb

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.batches import Images, Order
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.data.sources import source_of
from caffe_jacinto.engines.pytorch import feed, gpu_decode
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.gpu_decode import decode_on_cpu
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import TEST, TRAIN

HEIGHT, WIDTH = 27, 32


def data_net(transform: str, batch: int = 3, more: str = "") -> str:
    return (
        f'layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ {transform} }}\n'
        f'  data_param {{ source: "lmdb" batch_size: {batch} backend: LMDB }} }}\n{more}'
    )


def inputs(text: str, phase: int = TRAIN, **options: Any) -> Inputs:
    """Those of a net in the working folder."""
    settings = {"device": torch.device("cpu"), "seed": 1, "workers": 2, **options}
    return Inputs(parse_net(text, Dialect.BVLC, "net"), phase, "net", **settings)


@pytest.mark.caffe
@pytest.mark.parametrize(("stored", "crop", "settings", "channels"), SETTINGS)
def test_a_test_batch_is_caffes(
    stored: str,
    crop: int,
    settings: str,
    channels: int,
    pycaffe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, in every setting of the transform; the LMDB starts again in the second batch."""
    monkeypatch.chdir(tmp_path)
    pictures = [noise(HEIGHT, WIDTH, 1 if stored == "grey" else 3, seed) for seed in range(5)]
    forms = {
        "raw": lambda image: image,
        "turned": lambda image: turned_by_exif(encoded(image, ".jpg")),
        "grey": lambda image: encoded(image, ".png"),
    }
    form = forms.get(stored, lambda image: encoded(image, stored))
    write_lmdb(tmp_path / "lmdb", [datum_of(form(image), label) for label, image in enumerate(pictures)])
    write_mean(Mean(noise(HEIGHT, WIDTH).transpose(2, 0, 1).astype(np.float32), 3), tmp_path / MEAN)
    text = data_net(f"{f'crop_size: {crop}' if crop else ''} {settings}")
    (tmp_path / "net.prototxt").write_text(text)
    net = pycaffe.Net("net.prototxt", pycaffe.TEST)
    with inputs(text, TEST) as ours:
        ours.start_at(0)
        for _ in range(3):
            net.forward()
            batch = ours.batch()
            assert ours.shapes["data"] == net.blobs["data"].data.shape
            assert ours.shapes["data"][1] == channels
            np.testing.assert_array_equal(batch["data"].numpy(), net.blobs["data"].data)
            np.testing.assert_array_equal(batch["label"].numpy(), net.blobs["label"].data)


def test_training_crops_anywhere_and_mirrors_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is a window of its record less the same window of the mean, and all windows come."""
    monkeypatch.chdir(tmp_path)
    crop = HEIGHT - 2
    picture, mean = noise(HEIGHT, WIDTH), noise(HEIGHT, WIDTH, seed=9).astype(np.float32)
    write_lmdb(tmp_path / "lmdb", [datum_of(picture)])
    write_mean(Mean(mean.transpose(2, 0, 1).copy(), 1), tmp_path / MEAN)
    whole = (picture - mean).transpose(2, 0, 1) * np.float32(0.5)
    windows = {}
    for top in range(HEIGHT - crop + 1):
        for left in range(WIDTH - crop + 1):
            cut = whole[:, top : top + crop, left : left + crop]
            windows[cut.tobytes()] = (top, left, False)
            windows[cut[:, :, ::-1].tobytes()] = (top, left, True)
    with inputs(data_net(f'crop_size: {crop} mirror: true scale: 0.5 mean_file: "{MEAN}"', 600)) as ours:
        ours.start_at(0)
        seen = [windows[image.contiguous().numpy().tobytes()] for image in ours.batch()["data"]]
    assert set(seen) == set(windows.values())
    assert 0.4 < sum(mirrored for _, _, mirrored in seen) / len(seen) < 0.6


def test_any_place_gives_the_same_batch_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training sees depends on the seed and the place alone: not on where it began, nor on workers."""
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(HEIGHT, WIDTH, seed=seed), seed) for seed in range(7)])
    text = data_net("crop_size: 20 mirror: true", 4)
    with inputs(text, shuffle=True) as first, inputs(text, shuffle=True, workers=1) as second:
        first.start_at(0)
        batches = [{name: blob.clone() for name, blob in first.batch().items()} for _ in range(9)]
        for begin, stride in ((0, 3), (1, 3), (2, 3), (5, 1)):
            second.start_at(begin, stride)
            for number in range(begin, 9, stride):
                for name, blob in second.batch().items():
                    assert torch.equal(blob, batches[number][name])
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    epochs = [labels[at : at + 7] for at in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_has_each_record_once(records: int, seed: int, epoch: int) -> None:
    order = Order(records, seed, shuffle=True)
    places = range(epoch * records, (epoch + 1) * records)
    assert sorted(order.record(place) for place in places) == list(range(records))
    assert [Order(records, seed, shuffle=False).record(place) for place in places] == list(range(records))


def test_bad_records_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = datum_of(noise(HEIGHT, WIDTH), 1)
    floats = type(good)(channels=3, height=HEIGHT, width=WIDTH, float_data=[0.5] * (3 * HEIGHT * WIDTH))
    for number, (bad, says) in enumerate(
        {
            "cut off": (datum_of(encoded(noise(HEIGHT, WIDTH), ".png")[:40]), "cannot be decoded"),
            "small": (datum_of(noise(10, 40)), "smaller than the crop"),
            "grey": (
                datum_of(noise(HEIGHT, WIDTH, 1)[:, :, None]),
                "is 1x27x32 (channels x height x width), and the first one 3x27x32",
            ),
            "floats": (floats, "and the first one 8-bit"),
        }.values()
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        write_lmdb(folder / "lmdb", [good, bad, good])
        with inputs(data_net("crop_size: 20")) as ours, pytest.raises(UserError, match="00000001") as error:
            ours.start_at(0)
            ours.batch()
        assert says in str(error.value)


def test_an_lmdb_that_is_cut_off_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(HEIGHT, WIDTH), 0)] * 300)
    with inputs(data_net("")) as ours:
        ours.start_at(0)
        ours.batch()
        os.truncate(tmp_path / "lmdb" / "data.mdb", 8192)
        # Whether a worker has opened it by then, and meets a page that is gone, is chance.
        with pytest.raises(UserError, match=r"lmdb.* (it was|is) cut off.*: copy or make it again"):
            for _ in range(100):
                ours.batch()


def test_a_program_ends_although_a_worker_was_killed(tmp_path: Path) -> None:
    """Also where an error still holds the iterator, as one from another thread does."""
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(HEIGHT, WIDTH), 0)] * 9)
    program = """
import os, signal, threading
from test_torch_data import data_net, inputs
kept = []
def read(feed):
    try:
        for _ in range(100):
            feed.raw()
    except Exception as error:
        kept.append(error)
with inputs(data_net("")) as ours:
    ours.start_at(0)
    feed = ours._feeds[0]
    os.kill(feed._iterator._workers[0].pid, signal.SIGKILL)
    thread = threading.Thread(target=read, args=(feed,))
    thread.start()
    thread.join()
print(kept[0])
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "a process that reads it was killed; is there enough memory?" in ran.stdout


def test_a_label_beyond_the_classes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(8, 8), label) for label in (0, 4, 5)])
    text = data_net(
        "",
        more='layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param {\n'
        '  num_output: 5 weight_filler { type: "xavier" } } }\n'
        'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }\n',
    )
    with inputs(text) as ours:
        definition = parse_net(text, Dialect.BVLC, "net")
        ours.fit(Net(definition, TRAIN, Dialect.BVLC, where="net", data_shapes=ours.shapes))
        ours.start_at(0)
        with pytest.raises(UserError, match=r"00000002.* its label is 5, .* 5 classes, 0 to 4"):
            ours.batch()


def test_files_that_the_gpu_refuses_are_decoded_as_everywhere_else() -> None:
    pictures = [noise(HEIGHT, WIDTH, 3, seed) for seed in range(3)]
    files = [encoded(picture, ".jpg") for picture in pictures]
    joined = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    ends = np.cumsum([len(file) for file in files]).tolist()
    images = decode_on_cpu(joined, ends)
    for image, file in zip(images, files, strict=True):
        pixels = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(image.numpy(), pixels[:, :, ::-1].transpose(2, 0, 1))
    with pytest.raises(UserError, match=r"one of the JPEG files: .*; -decode cpu says which"):
        decode_on_cpu(joined[: ends[-1] - len(files[-1]) + 20], [*ends[:-1], ends[-2] + 20])


@pytest.mark.parametrize(("ranks", "workers"), [("1", 2), ("4", 1)])
def test_the_ranks_of_a_machine_share_its_memory(
    ranks: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two workers six batches are held: two, and two for each; a rank of four has room for four."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    write_lmdb(tmp_path / "lmdb", [datum_of(encoded(noise(HEIGHT, WIDTH), ".png"), 0)])
    size = 3 * HEIGHT * WIDTH * 3
    room = size * (6 if ranks == "1" else 16)
    usage = shutil.disk_usage(tmp_path)._replace(total=room, free=room)
    monkeypatch.setattr(feed.shutil, "disk_usage", lambda _: usage)
    with inputs(data_net("")) as ours:
        ours.start_at(0)
        ours.batch()
        said = " ".join(ours.notes)
    if workers == 2:
        assert not said
    else:
        assert re.match(
            rf"{workers} processes read the data, not 2: /dev/shm has \d+ MiB for each rank", said
        )


def images_of(folder: Path, ending: str) -> Images:
    """The source of a data layer in ``folder``, whose LMDB has images of this kind."""
    write_lmdb(folder / "lmdb", [datum_of(encoded(noise(HEIGHT, WIDTH), ending), 0) for _ in range(5)])
    (layer,) = parse_net(data_net(""), Dialect.BVLC, "net").layer
    source = source_of(layer, "net", training=True, seed=1, shuffle=False)
    assert isinstance(source, Images)
    return source


def test_images_are_decoded_where_that_feeds_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU that decodes: what is measured is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_decode, "can_decode", lambda _: None)
    images, measured = images_of(tmp_path, ".jpg"), {"cpu": 14_300.0, "gpu": 18_400.0, "both": 25_000.0}

    def speed(way: str) -> float:
        if way not in measured:
            raise UserError("the GPU decodes none of them")
        return measured[way]

    found = gpu_decode.faster_decode(images, torch.device("cuda"), 15, speed)
    assert found == (
        "both",
        "Images are decoded by both in turn; measured: by 15 processes 14,300 images/s, "
        "on the GPU 18,400 images/s, by both in turn 25,000 images/s",
    )
    del measured["gpu"], measured["both"]
    where, note = gpu_decode.faster_decode(images, torch.device("cuda"), 15, speed)
    assert (where, note.count("images/s")) == ("cpu", 1)


def test_images_that_no_gpu_decodes_are_not_tried_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = images_of(tmp_path, ".png")

    def speed(way: str) -> float:
        raise AssertionError(f"{way} was measured")

    for device in ("cpu", "cuda"):
        assert gpu_decode.faster_decode(images, torch.device(device), 3, speed)[0] == "cpu"
        monkeypatch.setattr(gpu_decode, "can_decode", lambda _: None)


def test_the_speed_of_a_feed_is_measured_by_feeding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = images_of(tmp_path, ".jpg")
    fast = feed._speed(images, torch.device("cpu"), 1, "cpu")
    read = images.read

    def slow(*arguments: Any) -> None:
        time.sleep(0.02)
        read(*arguments)

    monkeypatch.setattr(images, "read", slow)
    assert feed._speed(images, torch.device("cpu"), 1, "cpu") < min(fast, images.batch_size / 0.02)
