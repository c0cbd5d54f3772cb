"""Data sets that a list names: ImageData's images and HDF5Data's rows, in batches like pycaffe's."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from image_records import MEAN, encoded, noise, turned_by_exif
from test_torch_data import inputs

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.engines.contract import Engine, TrainJob
from caffe_jacinto.engines.pytorch.engine import TorchEngine, describe_torch
from caffe_jacinto.engines.pytorch.feed import expected_shapes
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import TEST, TRAIN

HEIGHT, WIDTH = 27, 32
NAMES = ("a cat.jpg", "grey.png", "b.png", "turned.jpg", "small.bmp")
"""In the folder ``images``: the paths of a list may hold spaces, and the images have any size and colour."""


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the images, their list and a mean image."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    colour = noise(HEIGHT, WIDTH)
    contents = (
        encoded(colour, ".jpg"),
        encoded(noise(HEIGHT, WIDTH, 1), ".png"),
        encoded(noise(HEIGHT, WIDTH, seed=2), ".png"),
        turned_by_exif(encoded(noise(HEIGHT, WIDTH, seed=3), ".jpg")),
        encoded(noise(25, 24, seed=4), ".bmp"),
    )
    for name, content in zip(NAMES, contents, strict=True):
        (folder / name).write_bytes(content)
    lines = [f"{name} {label}\n" for label, name in enumerate(NAMES)]
    (tmp_path / "list.txt").write_text("".join(lines))
    write_mean(Mean(noise(30, 40, seed=9).transpose(2, 0, 1).astype(np.float32), 3), tmp_path / MEAN)
    return tmp_path


def images_net(settings: str, transform: str = "", batch: int = 3) -> str:
    return (
        'layer { name: "data" type: "ImageData" top: "data" top: "label"\n'
        f"  transform_param {{ {transform} }}\n"
        f'  image_data_param {{ source: "list.txt" batch_size: {batch} {settings} }} }}\n'
    )


ROOT = 'root_folder: "images/"'


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("settings", "transform"),
    [
        ("new_height: 30 new_width: 40", f'mean_file: "{MEAN}" scale: 0.5'),
        ("new_height: 30 new_width: 40", f'mean_file: "{MEAN}" crop_size: 21'),
        ("new_height: 21 new_width: 50 is_color: false", "mean_value: 128"),
        ("", "crop_size: 20 mean_value: 104 mean_value: 117 mean_value: 123"),
        ("is_color: false rand_skip: 1", "crop_size: 17"),
    ],
)
def test_a_batch_of_images_is_caffes(settings: str, transform: str, pictures: Path, pycaffe: Any) -> None:
    """To the last bit; the list starts again in the second batch."""
    text = images_net(f"{ROOT} {settings}", transform)
    Path("net.prototxt").write_text(text)
    net = pycaffe.Net("net.prototxt", pycaffe.TEST)
    with inputs(text, TEST) as ours:
        ours.start_at(0)
        for _ in range(3):
            net.forward()
            batch = ours.batch()
            assert ours.shapes["data"] == net.blobs["data"].data.shape
            np.testing.assert_array_equal(batch["data"].numpy(), net.blobs["data"].data)
            np.testing.assert_array_equal(batch["label"].numpy(), net.blobs["label"].data)


def rows_net(batch: int = 4, settings: str = "", tops: tuple[str, ...] = ("data", "label")) -> str:
    named = " ".join(f'top: "{top}"' for top in tops)
    return (
        f'layer {{ name: "data" type: "HDF5Data" {named}\n'
        f'  hdf5_data_param {{ source: "list.txt" batch_size: {batch} {settings} }} }}\n'
    )


def write_rows(path: Path, first: int, count: int) -> None:
    """``data`` (3x2x2 doubles), ``label`` (whole numbers) and ``weight`` (one a row), all made of the row."""
    numbers = np.arange(first, first + count)
    with h5py.File(path, "w") as file:
        file["data"] = (numbers[:, None] + np.arange(12) / 16).reshape(count, 3, 2, 2)
        file.create_dataset("label", data=numbers.astype(np.uint8), chunks=(2,), compression="gzip")
        file["weight"] = numbers[:, None].astype(np.float32) / 4


@pytest.fixture
def row_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a list of three files of 3, 2 and 4 rows."""
    monkeypatch.chdir(tmp_path)
    for number, (first, count) in enumerate(((0, 3), (3, 2), (5, 4))):
        write_rows(tmp_path / f"{number}.h5", first, count)
    (tmp_path / "list.txt").write_text("0.h5 1.h5\n\n2.h5\n")
    return tmp_path


@pytest.mark.caffe
@pytest.mark.parametrize("files", ["0.h5 1.h5\n2.h5\n", "2.h5\n"], ids=["several files", "one file"])
def test_a_batch_of_rows_is_caffes(files: str, row_files: Path, pycaffe: Any) -> None:
    """Batches that begin and end inside files, and a list that starts again."""
    (row_files / "list.txt").write_text(files)
    text = rows_net(5, tops=("label", "data", "weight"))
    Path("net.prototxt").write_text(text)
    net = pycaffe.Net("net.prototxt", pycaffe.TEST)
    with inputs(text, TEST) as ours:
        ours.start_at(0)
        for _ in range(5):
            net.forward()
            batch = ours.batch()
            assert list(batch) == ["label", "data", "weight"]
            for name, blob in batch.items():
                assert ours.shapes[name] == net.blobs[name].data.shape
                np.testing.assert_array_equal(blob.numpy(), net.blobs[name].data)


def test_shuffled_rows_come_once_an_epoch_file_by_file(row_files: Path) -> None:
    with inputs(rows_net(3, "shuffle: true")) as ours:
        ours.start_at(0)
        batches = [ours.batch() for _ in range(3 * 8)]
    for batch in batches:
        assert torch.equal(batch["data"][:, 0, 0, 0], batch["label"])
    labels = torch.cat([batch["label"] for batch in batches]).int().tolist()
    epochs = [labels[at : at + 9] for at in range(0, len(labels), 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    files = [[(label > 2) + (label > 4) for label in epoch] for epoch in epochs]
    assert all(sum(a != b for a, b in itertools.pairwise(order)) == 2 for order in files)
    assert len({tuple(order) for order in files}) > 1


@pytest.mark.parametrize("kind", ["images", "rows"])
def test_any_place_of_a_list_gives_the_same_batch_again(
    kind: str, pictures: Path, row_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn: the order, the first image, crops and mirroring."""
    if kind == "images":
        (pictures / "list.txt").write_text("".join(f"images/{name} {i}\n" for i, name in enumerate(NAMES)))
        text = images_net("shuffle: true rand_skip: 5", "crop_size: 20 mirror: true")
    else:
        text = rows_net(4, "shuffle: true")
    with inputs(text) as first, inputs(text, workers=1) as second:
        first.start_at(0)
        batches = [{name: blob.clone() for name, blob in first.batch().items()} for _ in range(9)]
        for begin, stride in ((1, 3), (5, 1)):
            second.start_at(begin, stride)
            for number in range(begin, 9, stride):
                for name, blob in second.batch().items():
                    assert torch.equal(blob, batches[number][name])


def test_rand_skip_begins_anywhere_below_it(pictures: Path) -> None:
    text = images_net(f"{ROOT} rand_skip: 3", "crop_size: 20", batch=7)
    begins = set()
    for seed in range(12):
        with inputs(text, seed=seed, workers=1) as ours:
            ours.start_at(0)
            labels = ours.batch()["label"].tolist()
        assert labels == [(labels[0] + place) % len(NAMES) for place in range(7)]
        begins.add(labels[0])
    assert begins == {0, 1, 2}


@pytest.mark.parametrize(
    ("lines", "settings", "transform", "says"),
    [
        ("b.png 1\n\ngone.png 2\n", ROOT, "", "list.txt:3: images/gone.png does not exist: replace the file"),
        ("b.png 1\n", "", "", "list.txt:1: b.png does not exist: set root_folder, or write the whole path"),
        ("b.png 1\n", 'root_folder: "images"', "", "root_folder 'images' has to end with a slash"),
        ("b.png\n", ROOT, "", "list.txt:1: 'b.png' is not of the form 'path label'"),
        ("b.png 1.5\n", ROOT, "", "list.txt:1: label '1.5' is not a whole number"),
        ("\n", ROOT, "", "list.txt names no images"),
        ("b.png 1\nsmall.bmp 1\n", ROOT, "", "list.txt:2: images/small.bmp: its image is 3x25x24"),
        ("bad.png 1\n", ROOT, "", "list.txt:1: images/bad.png: an image that cannot be decoded"),
        ("b.png 1\n", f"{ROOT} new_height: 9", "", "image_data_param has one of new_height and new_width"),
        ("b.png 1\n", f"{ROOT} rand_skip: 2", "", "rand_skip 2 is above the 1 images of the list"),
        ("b.png 1\n", ROOT, "crop_size: 28", "is smaller than the crop of 28"),
        ("b.png 1\n", ROOT, "force_gray: true", "force_gray changes nothing here"),
        ("b.png 1\n", f"{ROOT} new_height: 9 new_width: 9", "crop_size: 10", "is larger than new_width"),
        ("b.png 1\n", f'{ROOT} mean_file: "m"', "", "image_data_param.mean_file is not supported"),
    ],
)
def test_a_mistake_in_a_list_of_images(
    lines: str, settings: str, transform: str, says: str, pictures: Path
) -> None:
    (pictures / "images" / "bad.png").write_bytes(b"no image")
    (pictures / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=re.escape(says)), inputs(images_net(settings, transform)) as ours:
        ours.start_at(0)
        ours.batch()


@pytest.mark.parametrize(
    ("lines", "settings", "says"),
    [
        ("0.h5\n1.h5 gone.h5\n", "", "list.txt:2: gone.h5 does not exist; paths are relative to"),
        ("0.h5\nlist.txt\n", "", "list.txt:2: list.txt: cannot be read"),
        ("", "", "hdf5_data_param.source list.txt names no files"),
        (
            "0.h5 other.h5\n",
            "",
            "list.txt:1: other.h5: a row of dataset 'data' is 5, and in 0.h5 it is 3x2x2",
        ),
        ("names.h5\n", "", "list.txt:1: names.h5: has no dataset 'label', the name of a top of layer data"),
        ("text.h5\n", "", "list.txt:1: text.h5: dataset 'label' is of the type"),
        ("uneven.h5\n", "", "need as many rows each, and at least one; they are data 3x1, label 2"),
        ("0.h5\n", "} transform_param { scale: 2", "HDF5Data transforms nothing: remove it"),
    ],
)
def test_a_mistake_in_a_list_of_hdf5_files(lines: str, settings: str, says: str, row_files: Path) -> None:
    for name, datasets in {
        "other.h5": {"data": np.zeros((3, 5)), "label": np.zeros(3)},
        "names.h5": {"data": np.zeros((3, 5)), "Label": np.zeros(3)},
        "text.h5": {"data": np.zeros((3, 5)), "label": np.array([b"a", b"b", b"c"])},
        "uneven.h5": {"data": np.zeros((3, 1)), "label": np.zeros(2)},
    }.items():
        with h5py.File(row_files / name, "w") as file:
            for dataset, values in datasets.items():
                file[dataset] = values
    (row_files / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=re.escape(says)), inputs(rows_net(4, settings)):
        pass


def test_a_mistake_in_an_hdf5_layer(row_files: Path) -> None:
    with pytest.raises(UserError, match="is an HDF5 file, and a list of such files is needed"):
        inputs(rows_net().replace("list.txt", "0.h5"))
    with pytest.raises(UserError, match="batch_size is 0, and has to be at least 1"):
        inputs(rows_net(0))


def test_labels_of_rows_beyond_the_classes_are_named(row_files: Path) -> None:
    text = rows_net(4) + (
        'layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc"\n'
        "  inner_product_param { num_output: 7 } }\n"
        'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }\n'
    )
    with inputs(text) as ours:
        ours.fit(
            Net(
                parse_net(text, Dialect.BVLC, "net"),
                TRAIN,
                Dialect.BVLC,
                where="net",
                data_shapes=ours.shapes,
            )
        )
        ours.start_at(0)
        ours.batch()
        says = "list.txt:3: 2.h5, row 2: its label is 7, and the network has 7 classes, 0 to 6"
        with pytest.raises(UserError, match=re.escape(says)):
            ours.batch()


def test_the_shapes_are_known_before_a_run(pictures: Path, row_files: Path) -> None:
    shapes = expected_shapes(parse_net(rows_net(2), Dialect.BVLC, "net"), TRAIN, "net", {})
    assert shapes == {"data": (2, 3, 2, 2), "label": (2,)}
    (pictures / "list.txt").write_text("images/b.png 1\n")
    shapes = expected_shapes(parse_net(images_net(""), Dialect.BVLC, "net"), TRAIN, "net", {})
    assert shapes == {"data": (3, 3, HEIGHT, WIDTH), "label": (3,)}


def test_the_summary_reads_lists_that_are_there(row_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fully = 'name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param { num_output: 4 }'
    Path("net.prototxt").write_text(f"{rows_net(2)} layer {{ {fully} }}")
    assert build_net(["--summary", "net.prototxt"]) == 0
    shown = capsys.readouterr().out
    assert "3x2x2" in shown and "48" in shown
    (row_files / "1.h5").unlink()
    with pytest.raises(UserError, match=r"layer data \(HDF5Data\) does not say the images' size"):
        build_net(["--summary", "net.prototxt"])


NET = """
layer { name: "images" type: "ImageData" top: "data" top: "label" include { phase: TRAIN }
  transform_param { crop_size: 20 mirror: true scale: 0.01 }
  image_data_param { source: "images.txt" root_folder: "images/" batch_size: 4 shuffle: true rand_skip: 3 } }
layer { name: "images" type: "ImageData" top: "data" top: "label" include { phase: TEST }
  transform_param { crop_size: 20 scale: 0.01 }
  image_data_param { source: "images.txt" root_folder: "images/" batch_size: 5 } }
layer { name: "rows" type: "HDF5Data" top: "weight" include { phase: TRAIN }
  hdf5_data_param { source: "list.txt" batch_size: 4 shuffle: true } }
layer { name: "rows" type: "HDF5Data" top: "weight" include { phase: TEST }
  hdf5_data_param { source: "list.txt" batch_size: 5 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 5 stride: 3 weight_filler { type: "xavier" } } }
layer { name: "flat" type: "Flatten" bottom: "conv" top: "flat" }
layer { name: "all" type: "Concat" bottom: "flat" bottom: "weight" top: "all" }
layer { name: "fc" type: "InnerProduct" bottom: "all" top: "fc"
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
SOLVER = """
net: "net.prototxt" base_lr: 0.01 lr_policy: "fixed" momentum: 0.9 max_iter: 9 snapshot: 4 display: 3
test_iter: 2 test_interval: 5 snapshot_prefix: "lists" random_seed: 5 solver_mode: CPU
"""


@pytest.mark.caffe
def test_a_training_from_lists_goes_on_exactly(pictures: Path, row_files: Path, caffe_engine: Engine) -> None:
    """Both kinds of lists feed one net; resumed, it ends with the same bits. Stock Caffe trains it, too."""
    lines = "".join(f"{name} {label}\n" for label, name in enumerate(NAMES))
    (pictures / "images.txt").write_text(lines)
    (pictures / "net.prototxt").write_text(NET)
    (pictures / "solver.prototxt").write_text(SOLVER)
    program = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-solver", "solver.prototxt"]
    subprocess.run(program, cwd=pictures, check=True, capture_output=True)
    whole = read_weights(pictures / "lists_iter_9.caffemodel")
    (pictures / "lists_iter_9.caffemodel").unlink()
    subprocess.run(
        [*program, "-snapshot", "lists_iter_4.solverstate"], cwd=pictures, check=True, capture_output=True
    )
    resumed = read_weights(pictures / "lists_iter_9.caffemodel")
    for name, blobs in whole.items():
        for blob, other in zip(blobs, resumed[name], strict=True):
            np.testing.assert_array_equal(blob, other)
    job = TrainJob(
        solver=pictures / "solver.prototxt",
        weights=None,
        snapshot=None,
        gpus=(),
        final_weights=pictures / "lists_iter_9.caffemodel",
        sparse=None,
        freeze_zeros=False,
        reestimate_batches=0,
    )
    assert TorchEngine(describe_torch(Dialect.BVLC)).finished(job), "there is nothing to recalibrate"
    caffe = [caffe_engine.info.executable, "train", "-solver", "solver.prototxt"]
    subprocess.run(caffe, cwd=pictures, check=True, capture_output=True)
