"""Deploy networks with random weights, and what pycaffe, OpenCV and onnxruntime make of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.netspec.shapes import blob_shapes, layer_costs
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_any_net

Values = NDArray[np.float32]

SMALL_CROPS = {"jacintonet11": 64, "resnet10": 65, "bvlc_alexnet": 67}
"""JacintoNet11's five strides of 2 leave 2x2 pixels of it."""

TOLERANCE = 1e-4


def built(network: str, dialect: Dialect, folder: Path) -> str:
    """The deploy prototxt of a network for seven classes, its softmax left out: that hides differences."""
    arguments = ["--network", network, "--dialect", dialect.value, "--output", str(folder)]
    arguments += ["--num-classes", "7", "--crop-size", str(SMALL_CROPS.get(network, 64)), "--batch-size", "4"]
    arguments += ["--iter-size", "1", "--mean-file", str(folder / "mean.binaryproto")]
    assert build_net(arguments[:-2] if network != "bvlc_alexnet" else arguments) == 0
    net = parse_any_net((folder / "deploy.prototxt").read_text(), "deploy.prototxt", dialect)
    assert net.layer[-1].type == "Softmax"
    del net.layer[-1]
    return str(text_format.MessageToString(net))


def write_random(path: Path, text: str, dialect: Dialect, seed: int = 0, *, old: bool = False) -> Path:
    """Weights for the network ``text``, half of those of its convolutions zero; ``old``: four axes each."""
    net = parse_any_net(text, "deploy.prototxt", dialect)
    stored = messages(dialect).NetParameter(name=net.name)
    random = np.random.default_rng(seed)
    blobs = blob_shapes(net, "TEST")
    costs = {cost.name: cost for cost in layer_costs(tree.parse(text))}
    for described in net.layer:
        layer = stored.layer.add()
        layer.CopyFrom(described)
        shapes = blobs.get(layer.name, [])
        for index, dims in enumerate(shapes):
            shape = tuple(
                (costs[layer.name].weights or 0) // max(dim or 0 for dim in dims) if dim is None else dim
                for dim in dims
            )
            values = np.asarray(_values(layer.type, index, shape, len(shapes), random))
            blob = layer.blobs.add(data=values.reshape(-1).tolist())
            if old:
                axes = (1, shape[0], 1, 1) if len(shapes) == 5 else (1,) * (4 - len(shape)) + shape
                blob.num, blob.channels, blob.height, blob.width = axes
            else:
                blob.shape.dim.extend(shape)
    path.write_bytes(stored.SerializeToString())
    return path


def _values(kind: str, index: int, shape: tuple[int, ...], count: int, random: Any) -> Any:
    if kind == "BatchNorm":
        factor = 3 if count == 3 else 1  # stock Caffe stores statistics times their factor
        mean = random.normal(0, 0.5, shape) * factor
        variance = random.uniform(0.5, 2, shape) * factor
        gain = random.uniform(-1.5, 1.5, shape)
        return [mean, variance, np.full(shape, 3), gain, random.normal(0, 0.3, shape)][index]
    if kind == "BN":
        return random.uniform(0.5, 2, shape) if index == 3 else random.normal(0, 1, shape)
    if kind == "Scale" and index == 0:
        return random.uniform(-1.5, 1.5, shape)
    if kind == "Bias":
        return np.full(shape, -128)
    if len(shape) <= 1:
        return random.normal(0, 0.1, shape)
    values = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
    values[random.random(shape) < 0.5] = 0
    return values


def images(shape: tuple[int, ...], seed: int = 0) -> Values:
    """Pixels from 0 to 255."""
    return np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)


def difference(found: Values, wanted: Values) -> float:
    """The largest difference, relative to the largest number that is wanted."""
    assert found.shape == wanted.shape and np.isfinite(wanted).all()
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-20))


def by_caffe(caffe_root: Path, deploy: Path, weights: Path, data: Values) -> dict[str, Values]:
    """The outputs that pycaffe gives, by name."""
    sys.path.insert(0, str(caffe_root / "python"))
    import caffe

    net = caffe.Net(str(deploy), caffe.TEST, weights=str(weights))
    net.blobs["data"].reshape(*data.shape)
    net.blobs["data"].data[...] = data
    return {name: values.copy() for name, values in net.forward().items()}


def by_opencv(deploy: str, weights: bytes, data: Values) -> Values:
    """The output that OpenCV's own reader of Caffe files gives."""
    import cv2

    net = cv2.dnn.readNetFromCaffe(*(np.frombuffer(part, np.uint8) for part in (deploy.encode(), weights)))
    net.setInput(data)
    return np.asarray(net.forward())


def by_onnx(model: bytes, data: Values) -> dict[str, Values]:
    """The outputs that onnxruntime gives, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"data": data}), strict=True))
