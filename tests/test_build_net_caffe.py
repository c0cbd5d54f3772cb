"""What build_net writes for stock Caffe, loaded by real Caffe and by OpenCV."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from caffe_jacinto.build_net import main
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

pytestmark = pytest.mark.caffe

SIZE, CLASSES, BATCH = 32, 10, 4
STRIDES = "1,2,2,2,2"

IN_PYCAFFE = """
import json, sys
pycaffe, folder, phase = sys.argv[1:]
sys.path.insert(0, pycaffe)
import caffe
# This project's schemas and pycaffe's own live in one process.
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
messages(Dialect.BVLC), messages(Dialect.CAFFE_JACINTO)
net = caffe.Net(f"{folder}/{phase}.prototxt", caffe.TRAIN if phase == "train" else caffe.TEST)
if phase == "deploy":
    import numpy as np
    rng = np.random.default_rng(0)
    for name, blobs in net.params.items():
        if name.endswith("/bn"):
            blobs[0].data[...], blobs[1].data[...], blobs[2].data[...] = rng.normal(size=blobs[0].shape), 2, 1
    net.save(f"{folder}/net.caffemodel")
    net.blobs["data"].data[...] = np.load(f"{folder}/image.npy")
    np.save(f"{folder}/prob.npy", net.forward()["prob"])
else:
    net.forward()
print(json.dumps({
    "blobs": {name: list(blob.data.shape) for name, blob in net.blobs.items()},
    "params": {name: [list(blob.data.shape) for blob in blobs] for name, blobs in net.params.items()},
    "outputs": list(net.outputs),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a small JacintoNet11, at a path and with an LMDB whose names need care."""
    folder = tmp_path_factory.mktemp("net") / """a "quoted" \\ größe's folder"""
    for name in ("train", "val"):
        write_lmdb(folder / f"{name} lmdb")
    arguments = ["--dialect", "bvlc", "--output", str(folder), "--num-classes", str(CLASSES)]
    arguments += ["--crop-size", str(SIZE), "--strides", STRIDES, "--batch-size", str(2 * BATCH)]
    arguments += ["--train-lmdb", str(folder / "train lmdb"), "--val-lmdb", str(folder / "val lmdb")]
    assert main(arguments) == 0
    return folder


def write_lmdb(path: Path) -> None:
    """Sixty images of noise."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    environment = lmdb.open(str(path), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for index in range(60):
            pixels = rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8).tobytes()
            datum = messages(Dialect.BVLC).Datum(
                channels=3, height=SIZE, width=SIZE, data=pixels, label=index % CLASSES
            )
            transaction.put(f"{index:08d}".encode(), datum.SerializeToString())
    environment.close()


def load(engine: Engine, folder: Path, phase: str) -> Any:
    """What pycaffe says of the network, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IN_PYCAFFE, str(engine.info.pycaffe), str(folder), phase],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_caffe_loads_train_and_val_and_shapes_are_right(folder: Path, caffe_engine: Engine) -> None:
    for phase, batch in (("train", BATCH), ("val", 50)):
        net = load(caffe_engine, folder, phase)
        blobs = net["blobs"]
        assert blobs["data"] == [batch, 3, SIZE, SIZE]
        assert blobs["label"] == [batch]
        assert blobs["conv1a"] == [batch, 32, 32, 32]
        for pool, channels, size in (
            ("pool1", 32, 16),
            ("pool2", 64, 8),
            ("pool3", 128, 4),
            ("pool4", 256, 2),
        ):
            assert blobs[pool] == [batch, channels, size, size]
        assert blobs["pool5"] == [batch, 512, 1, 1]
        assert blobs[f"fc{CLASSES}"] == [batch, CLASSES]
        accuracies = ["accuracy/top1", "accuracy/top5"] if phase == "val" else []
        assert sorted(net["outputs"]) == [*accuracies, "loss"]
        assert net["params"]["conv1b"] == [[32, 8, 3, 3], [32]]
        assert net["params"]["conv1a/bn"] == [[32], [32], [1]]
        assert net["params"]["conv1a/scale"] == [[32], [32]]
        assert "data/bias" not in net["params"]


def test_opencv_reads_the_deploy_network_and_agrees_with_caffe(folder: Path, caffe_engine: Engine) -> None:
    import cv2

    image = np.random.default_rng(1).integers(0, 256, (1, 3, SIZE, SIZE)).astype(np.float32)
    np.save(folder / "image.npy", image)
    net = load(caffe_engine, folder, "deploy")
    assert net["blobs"]["data"] == [1, 3, SIZE, SIZE]
    assert net["outputs"] == ["prob"]
    by_caffe = np.load(folder / "prob.npy")
    reader = cv2.dnn.readNetFromCaffe(str(folder / "deploy.prototxt"), str(folder / "net.caffemodel"))
    reader.setInput(image)
    by_opencv = reader.forward()
    assert by_caffe.shape == by_opencv.shape == (1, CLASSES)
    assert by_caffe.std() > 1e-3
    np.testing.assert_allclose(by_opencv, by_caffe, rtol=1e-3, atol=1e-5)


def test_caffe_train_takes_the_solver(folder: Path, caffe_engine: Engine, tmp_path: Path) -> None:
    solver = tmp_path / "solver.prototxt"
    text = (folder / "solver.prototxt").read_text()
    solver.write_text(
        text.replace("max_iter: 320000", "max_iter: 2").replace("test_iter: 1000", "test_iter: 1")
    )
    done = subprocess.run(
        [str(caffe_engine.info.executable), "train", "-solver", str(solver)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Use CPU." in done.stderr
    assert (folder / "imagenet_jacintonet11_iter_2.caffemodel").is_file()
