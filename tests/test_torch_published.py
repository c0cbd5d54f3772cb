"""Published networks trained on PyTorch and by real Caffe, from the same weights: the same losses.

Every file of the published networks is as its publisher wrote it, but for what the test needs: data, small
batches and crops, no mirroring, no dropout. Deploy networks get data and losses.
"""

from __future__ import annotations

import re
import subprocess
from math import prod, sqrt
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from google.protobuf import text_format

from caffe_jacinto.caffemodel.net_file import NewLayer, write_net
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net

pytestmark = pytest.mark.caffe

ITERATIONS, PASSES, TOLERANCE = 5, 2, 1e-4

IMAGES = {
    # channels, pixels of a side, images of a batch
    "bvlc_googlenet_deploy": (3, 223, 1),
    "bvlc_googlenet_train_val": (3, 223, 1),
    "cifar10_full_train_test": (3, 32, 4),
    "lenet_train_test": (1, 28, 4),
    "mobilenet_v1_deploy": (3, 64, 2),
    "mobilenet_v2_deploy": (3, 64, 2),
    "mtcnn1_det1": (3, 12, 4),
    "resnet18_holmes_deploy": (3, 195, 1),
    "resnet18_holmes_train": (3, 195, 1),
    "resnet50_kaiming_deploy": (3, 195, 1),
    "squeezenet_1.1_deploy": (3, 64, 2),
    "squeezenet_1.1_train_val": (3, 64, 2),
    "v1_lenet": (1, 28, 4),
    "v1_lenet_train_test": (1, 28, 4),
    "vgg16_crowson_deploy": (3, 32, 2),
}
"""The sizes are the least, or near it, that leave something to every layer: the average poolings of GoogLeNet
and ResNet have kernels of 7x7."""

GAINS = {"mobilenet_v1_deploy": 1.0, "mobilenet_v2_deploy": 0.8}
"""What their Scale layers begin with; others with 0.5, where many branches are added up."""

WEIGHTS = {
    "mtcnn1_det1": "mtcnn1_det1.caffemodel",
    "v1_lenet": "v1_lenet_iter_10000.caffemodel",
    "v1_lenet_train_test": "v1_lenet_iter_10000.caffemodel",
}
SOLVERS = {
    "bvlc_googlenet_train_val": "bvlc_googlenet",
    "cifar10_full_train_test": "cifar10_full",
    "lenet_train_test": "lenet",
    "squeezenet_1.1_train_val": "squeezenet_1.1",
}
SOLVER = """net: ""
base_lr: 0.1
lr_policy: "fixed"
momentum: 0.9
weight_decay: 0.0005
max_iter: 0
display: 0
snapshot_prefix: ""
solver_mode: CPU
"""

PIXELS = 64
"""How large they are, as a rule, less their mean."""

CLASSES = 2
"""Labels of the images: no network has fewer outputs."""

V1_LAYERS = {"Data": "DATA", "SoftmaxWithLoss": "SOFTMAX_LOSS"}


def write_images(folder: Path, channels: int, side: int, count: int) -> None:
    """An LMDB of images of noise, as large as the crop: none is cut at random."""
    random = np.random.default_rng(0)
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as records:
        for index in range(count):
            pixels = random.integers(0, 256, (channels, side, side), dtype=np.uint8)
            datum = messages(Dialect.BVLC).Datum(
                channels=channels, height=side, width=side, data=pixels.tobytes(), label=index % CLASSES
            )
            records.put(b"%08d" % index, datum.SerializeToString())


def small(text: str, name: str) -> Any:
    """The network with the test's data, in the form (V0, V1, today's) in which it is published."""
    _, side, batch = IMAGES[name]
    net = messages(Dialect.BVLC).NetParameter()
    text_format.Merge(text, net)
    layers = net.layers or net.layer
    if net.input or any(layer.type == "Input" for layer in net.layer):
        _complete(net, layers)
    for layer in layers:
        if layer.HasField("dropout_param"):
            layer.dropout_param.dropout_ratio = 0
        if not layer.HasField("data_param"):
            continue
        layer.data_param.source, layer.data_param.batch_size = "lmdb", batch
        layer.data_param.backend = layer.data_param.LMDB
        layer.transform_param.mirror = False
        if layer.transform_param.HasField("crop_size"):
            layer.transform_param.crop_size = side
        if layer.transform_param.HasField("mean_file"):
            layer.transform_param.mean_file = "mean.binaryproto"
    return net


def _complete(net: Any, layers: Any) -> None:
    """Give a deploy network data, and a loss in the place of each softmax and behind each other output."""

    def made(kind: str, tops: list[str], bottoms: tuple[str, ...] = ()) -> Any:
        layer = type(layers[0])(name="-".join(tops), top=tops, bottom=bottoms)
        layer.type = getattr(layer, V1_LAYERS[kind]) if net.layers else kind
        return layer

    (data,) = net.input or [layer.top[0] for layer in layers if layer.type == "Input"]
    for field in ("input", "input_dim", "input_shape"):
        net.ClearField(field)
    first = made("Data", [data, "label"])
    first.transform_param.scale = 1 / PIXELS
    first.data_param.SetInParent()
    softmax = type(layers[0]).SOFTMAX if net.layers else "Softmax"
    kept = [layer for layer in layers if layer.type not in ("Input", softmax)]
    read = {name for layer in kept for name in layer.bottom if name not in layer.top}
    ends = dict.fromkeys(name for layer in kept for name in layer.top if name not in read)
    losses = [made("SoftmaxWithLoss", [f"loss of {end}"], (end, "label")) for end in ends]
    del layers[:]
    layers.extend([first, *kept, *losses])


def write_weights(path: Path, net: Any, channels: int, side: int, gain: float) -> None:
    """Weights by which signals neither vanish nor grow: He et al. 2015, with statistics of 0 and 1.

    Those that read pixels, which nothing has scaled, are so much smaller; those that give scores are small.
    """
    random = np.random.default_rng(1)
    data = next(layer for layer in net.layer if layer.type == "Data")
    scores = {layer.bottom[0] for layer in net.layer if layer.type == "SoftmaxWithLoss"}
    shapes = blob_shapes(net, "TRAIN", [(1, channels, side, side)])
    layers = []
    for layer in net.layer:
        blobs = []
        for index, dims in enumerate(shapes.get(layer.name, ())):
            shape = tuple(int(dim or 1) for dim in dims)
            if len(shape) > 1:
                blob = random.standard_normal(shape) * sqrt(2 / prod(shape[1:]))
                if layer.bottom[0] == data.top[0] and data.transform_param.scale == 1:
                    blob /= PIXELS
                if layer.top[0] in scores:
                    blob /= 10
            elif layer.type == "BatchNorm":
                blob = np.full(shape, float(index > 0))
            elif layer.type == "Scale" and index == 0:
                blob = np.full(shape, gain)
            else:
                blob = np.zeros(shape)
            blobs.append(blob.astype(np.float32))
        if blobs:
            header = type(layer)(name=layer.name, type=layer.type)
            layers.append(NewLayer(header, blobs))
    write_net(path, net.name, layers, Dialect.BVLC)


def solver_of(published: Path, name: str) -> str:
    """The publisher's solver, or a plain one, cut to a few iterations."""
    solver = messages(Dialect.BVLC).SolverParameter()
    theirs = SOLVERS.get(name)
    text = SOLVER if theirs is None else (published / f"{theirs}_solver.prototxt").read_text()
    text_format.Merge(text, solver)
    for field in ("test_iter", "test_interval", "snapshot", "test_initialization"):
        solver.ClearField(field)
    solver.net, solver.max_iter, solver.display = "net.prototxt", ITERATIONS, 1
    solver.snapshot_prefix, solver.snapshot_after_train = "unused", False
    solver.solver_mode = solver.CPU
    # Weights that are drawn, and a batch of one or two images: at full speed they fly, whoever computes.
    solver.base_lr /= 1000
    solver.iter_size = min(solver.iter_size, PASSES)
    return text_format.MessageToString(solver)


def values_in(log: str) -> dict[str, list[float]]:
    """Of each iteration, by their names: the loss, and the outputs of the network."""
    found = {"loss of the solver": re.findall(r"Iteration \d+ \(.*\), loss = (\S+)", log)}
    for name, value in re.findall(r"Train net output #\d+: (.+?) = (\S+)", log):
        found.setdefault(name, []).append(value)
    return {name: [float(value) for value in values] for name, values in found.items()}


def test_every_published_network_is_tried(published: Path) -> None:
    files = {path.stem for path in (published / "networks").glob("*.prototxt")}
    assert {name for name in files if not name.endswith("_solver")} == IMAGES.keys()


@pytest.mark.parametrize("name", IMAGES)
def test_five_iterations_of_published_networks_agree_with_caffe(
    name: str,
    published: Path,
    caffe_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = published / "networks"
    channels, side, batch = IMAGES[name]
    net = text_format.MessageToString(small((folder / f"{name}.prototxt").read_text(), name))
    Path("net.prototxt").write_text(net)
    Path("solver.prototxt").write_text(solver_of(folder, name))
    # So few that the first and the last iteration have the same: it is the learning that moves the loss.
    write_images(Path("lmdb"), channels, side, batch * PASSES)
    write_mean(Mean(np.full((channels, side, side), 127.0, np.float32), 1), Path("mean.binaryproto"))
    weights = Path("start.caffemodel")
    if name in WEIGHTS:
        weights = folder / WEIGHTS[name]
    else:
        write_weights(weights, parse_net(net, Dialect.BVLC, name), channels, side, GAINS.get(name, 0.5))
    arguments = ["train", "-solver", "solver.prototxt", "-weights", str(weights)]
    program = str(caffe_engine.info.executable)
    caffe = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert caffe.returncode == 0, caffe.stderr[-3000:]
    capfd.readouterr()
    assert caffe_torch([*arguments, "-workers", "1"]) == 0
    theirs, ours = values_in(caffe.stderr), values_in(capfd.readouterr().err)
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 1
    for output, expected in theirs.items():
        assert len(expected) == ITERATIONS
        np.testing.assert_allclose(ours[output], expected, rtol=TOLERANCE, atol=0, err_msg=output)
    first, *_, last = theirs["loss of the solver"]
    assert abs(last - first) > 10 * TOLERANCE * first, theirs
