"""Who computes: stock Caffe, OpenCV 4 or onnxruntime. Each takes a batch of images and gives scores."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.merge_bn import merge_bn
from caffe_jacinto.caffemodel.stock_net import stock_net
from caffe_jacinto.errors import RunFailed, UserError
from caffe_jacinto.inference.network import TrainedNetwork
from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

BACKENDS = ("caffe", "opencv", "onnxruntime")

Scores = Callable[["Values"], "Values"]
"""Images x channels x height x width to images x classes."""


def open_backend(name: str | None, network: TrainedNetwork, caffe: str | None) -> tuple[str, Scores]:
    """The backend ``name``, or the first there is, in words, and its function from images to scores.

    Raises:
        UserError: it is not installed, or cannot read the network.
    """
    # Caffe ends the process at weights that do not fit; this says it in a line.
    stock_net(network.text, str(network.where), network.dialect, network.weights)
    label, scores = _open(name, network, caffe)

    def guarded(images: Values) -> Values:
        try:
            return scores(images)
        except Exception as error:  # Each backend has errors of its own.
            reason = " ".join(str(error).split())[:300]
            raise RunFailed(f"{network.where}: {label} cannot compute it: {reason}") from error

    return label, guarded


def _open(name: str | None, network: TrainedNetwork, caffe: str | None) -> tuple[str, Scores]:
    if name == "onnxruntime":
        return _onnxruntime(network)
    if name == "opencv":
        return _opencv(network)
    try:
        return _caffe(network, caffe)
    except UserError as error:
        if name or caffe:
            raise
        print(f"not by Caffe: {error}", file=sys.stderr)
        return _opencv(network)


def _caffe(network: TrainedNetwork, path: str | None) -> tuple[str, Scores]:
    from caffe_jacinto.engines.find import find_engine

    folder = find_engine(path).info.pycaffe
    if folder is None:
        raise UserError("this Caffe has no pycaffe that this Python imports; use --backend opencv")
    caffe = _quiet_pycaffe(folder)
    with tempfile.TemporaryDirectory() as scratch:
        deploy, weights = Path(scratch) / "deploy.prototxt", network.weights
        if network.dialect is Dialect.BVLC:
            deploy.write_text(network.text)
        else:
            weights = Path(scratch) / "merged.caffemodel"
            merge_bn(network.text, str(network.where), network.dialect, network.weights).write(
                deploy, weights
            )
        net = caffe.Net(str(deploy), str(weights), caffe.TEST)
    source, output = net.inputs[0], net.outputs[-1]

    def scores(images: Values) -> Values:
        net.blobs[source].reshape(*images.shape)
        net.blobs[source].data[...] = images
        return _flat(net.forward()[output].copy(), images)

    return f"stock Caffe {caffe.__version__}", scores


def _quiet_pycaffe(folder: Path) -> Any:
    """The ``caffe`` module from ``folder``, logging errors only; a Caffe started later logs as ever."""
    spelled = "GLOG_minloglevel"  # read by glog once, when it is loaded
    before = os.environ.get(spelled)
    os.environ[spelled] = "2"
    sys.path.insert(0, str(folder))
    try:
        import caffe
    except ImportError as error:
        raise UserError(f"{folder}: pycaffe cannot be imported: {error}; use --backend opencv") from None
    finally:
        if before is None:
            del os.environ[spelled]
        else:
            os.environ[spelled] = before
    return caffe


def _opencv(network: TrainedNetwork) -> tuple[str, Scores]:
    import cv2
    import numpy as np

    merged = merge_bn(network.text, str(network.where), network.dialect, network.weights)
    try:
        net = cv2.dnn.readNetFromCaffe(
            np.frombuffer(merged.deploy().encode(), np.uint8), np.frombuffer(merged.weight_bytes(), np.uint8)
        )
    except (cv2.error, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{network.where}: OpenCV {cv2.__version__} cannot read it: {reason}") from error

    def scores(images: Values) -> Values:
        net.setInput(images)
        return _flat(net.forward(), images)

    return f"OpenCV {cv2.__version__}", scores


def _onnxruntime(network: TrainedNetwork) -> tuple[str, Scores]:
    from caffe_jacinto.caffemodel.onnx_export import export_onnx

    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"onnxruntime is missing: {sys.executable} -m pip install onnxruntime onnx") from None
    model = export_onnx(network.text, str(network.where), network.dialect, network.weights)
    session: Any = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name

    def scores(images: Values) -> Values:
        return _flat(session.run(None, {source: images})[-1], images)

    return f"onnxruntime {onnxruntime.__version__}", scores


def _flat(values: Any, images: Values) -> Values:
    flat: Values = values.reshape(len(images), -1)
    return flat
