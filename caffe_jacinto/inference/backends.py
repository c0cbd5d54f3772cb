"""What computes a network's scores: stock Caffe, OpenCV 4 or onnxruntime."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.fit import in_binary_form
from caffe_jacinto.caffemodel.hdf5 import is_hdf5
from caffe_jacinto.common.arguments import GpuRequest
from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.engines.discovery import INSTALL, check_gpus, find_engine
from caffe_jacinto.engines.gpus import Maker, any_visible, lack, requested_gpus, visible_gpus
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.stock_net import stock_net
from caffe_jacinto.inference.network import TrainedNetwork
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.loadable import not_loadable
from caffe_jacinto.prototxt.schema import parse_net

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

Scores = Callable[["Values"], "Values"]
"""Images x channels x height x width to images x classes, or x classes x 1 x 1."""

NO_PYCAFFE = f"no stock Caffe was found whose pycaffe this Python can import ({INSTALL} builds one)"


@dataclass(frozen=True)
class Backend:
    """A network that is ready to compute."""

    label: str
    """The backend and its version."""

    classes: int
    scores: Scores
    """Images x channels x height x width to images x classes.

    Raises:
        RunFailed: the backend fails, or the scores are not finite.
    """


def open_backend(
    name: str | None, network: TrainedNetwork, caffe: str | None, gpus: GpuRequest = ()
) -> Backend:
    """The backend ``name`` with the network loaded, or the first of `BACKENDS` that works; it has been tried
    on an image of zeros.

    Args:
        caffe: the executable of a Caffe, or its tree.
        gpus: compute on the first of them; none: on the CPU.

    Raises:
        UserError: it is not installed, cannot compute the network (or not on that GPU), or the weights do not
            fit.
    """
    _check_weights(network)
    gpu = next(iter(requested_gpus(gpus, None)), None)
    if gpu is not None and not any_visible():
        raise UserError(f"GPU {gpu} requested, but {lack()}: leave the GPUs out")
    *others, last = [name or "caffe"] if name or caffe else BACKENDS
    for other in others:
        try:
            return _opened(other, network, caffe, gpu)
        except UserError as error:
            print(f"{other} cannot be used: {error}", file=sys.stderr)
    return _opened(last, network, caffe, gpu)


def _check_weights(network: TrainedNetwork) -> None:
    """Raise UserError where weights do not fit (Caffe would end the process) or are not finite numbers."""
    import numpy as np

    net = stock_net(network.text, str(network.where), network.dialect, network.weights)
    for layer in net.layers:
        if not all(np.isfinite(blob).all() for blob in layer.blobs):
            raise UserError(
                f"{network.weights}: layer {layer.name} has weights that are not finite numbers: training "
                "diverged; use an earlier snapshot"
            )


def _opened(name: str, network: TrainedNetwork, caffe: str | None, gpu: int | None) -> Backend:
    """The backend ``name``, whose scores are checked."""
    import numpy as np

    label, compute = BACKENDS[name](network, caffe, gpu)
    if gpu is not None:
        label = f"{label}, GPU {gpu}"

    def scores(images: Values) -> Values:
        try:
            values = compute(images)
        except Exception as error:  # Each backend has its own kinds of errors.
            reason = " ".join(str(error).split())[:300]
            raise RunFailed(f"{network.where}: {label} cannot compute it: {reason}") from error
        if values.ndim < 2 or values.size != len(images) * values.shape[1]:
            shape = "x".join(map(str, values.shape[1:]))
            raise UserError(f"{network.where}: its output is {shape} for an image, not scores of classes")
        if not np.isfinite(values).all():
            raise RunFailed(f"{network.weights}: the scores are not finite numbers; use an earlier snapshot")
        return values.reshape(len(images), -1)

    return Backend(label, scores(np.zeros((1, *network.shape), np.float32)).shape[1], scores)


def _caffe(network: TrainedNetwork, path: str | None, gpu: int | None) -> tuple[str, Scores]:
    info = find_engine(path).info
    if info.pycaffe is None:
        raise UserError(NO_PYCAFFE)
    check_gpus(info, () if gpu is None else (gpu,))
    of_forks = not_loadable(tree.parse(network.text, str(network.where)), Dialect.BVLC)
    as_it_is = network.dialect is Dialect.BVLC and not of_forks
    merged = None
    if not as_it_is:
        merged = merge_bn(network.text, str(network.where), network.dialect, network.weights)
        left = not_loadable(tree.parse(merged.deploy(), str(network.where)), Dialect.BVLC)
        if left:
            raise UserError(f"{network.where}: {left[0]}; use --backend onnxruntime")
    caffe = quiet_pycaffe(info.pycaffe)
    with tempfile.TemporaryDirectory() as scratch:
        deploy, weights = Path(scratch) / "deploy.prototxt", network.weights
        if merged is None:
            deploy.write_text(network.text, encoding="utf-8")
            if is_hdf5(weights):
                weights = Path(scratch) / "binary.caffemodel"
                net = parse_net(network.text, network.dialect, str(network.where))
                weights.write_bytes(in_binary_form(network.weights, net))
        else:
            weights = Path(scratch) / "merged.caffemodel"
            merged.write(deploy, weights)
        # In a child process, and so on the CPU: CUDA does not survive a fork.
        said = last_words(lambda: caffe.Net(str(deploy), caffe.TEST).forward())
        if said:
            raise UserError(f"{network.where}: Caffe cannot read it: {said}")
        if gpu is not None:
            caffe.set_mode_gpu()
            caffe.set_device(gpu)
        net = caffe.Net(str(deploy), caffe.TEST, weights=str(weights))
    source, output = net.inputs[0], net.outputs[-1]

    def scores(images: Values) -> Values:
        net.blobs[source].reshape(*images.shape)
        net.blobs[source].data[...] = images
        values: Values = net.forward()[output].copy()
        return values

    return f"stock Caffe {caffe.__version__}", scores


def quiet_pycaffe(folder: Path) -> Any:
    """The ``caffe`` module from ``folder``, logging only errors; a Caffe started later logs as usual."""
    spelled = "GLOG_minloglevel"  # glog reads it once, when it is loaded
    before = os.environ.get(spelled)
    os.environ[spelled] = "2"
    sys.path.insert(0, str(folder))
    try:
        import caffe
    except ImportError as error:
        raise UserError(f"{folder}: pycaffe cannot be imported: {error}; use --backend opencv") from None
    finally:
        sys.path.remove(str(folder))
        if before is None:
            del os.environ[spelled]
        else:
            os.environ[spelled] = before
    return caffe


def last_words(action: Callable[[], object]) -> str:
    """Caffe's error if ``action``, tried in a child process, makes it end the process; else empty."""
    with tempfile.TemporaryFile() as said:
        with warnings.catch_warnings():
            # The child calls only Caffe, whose threads (OpenBLAS) start again after a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            os.dup2(said.fileno(), sys.__stderr__.fileno() if sys.__stderr__ else 2)
            faulthandler.disable()  # pytest enables it to report its own end
            try:
                action()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return ""  # An exception of Python's will be raised again in this process.
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    fatal = next((line for line in lines if re.match(r"F\d", line)), "")
    reason = fatal.partition("] ")[2].partition(" (known types: ")[0]  # of layers, all of them
    return reason[:300] or f"it ended with signal {os.WTERMSIG(status)}"


def _opencv(network: TrainedNetwork, _: str | None, gpu: int | None) -> tuple[str, Scores]:
    import cv2
    import numpy as np

    if gpu is not None:
        raise UserError("OpenCV's own packages compute on the CPU only: leave the GPUs out")
    merged = merge_bn(network.text, str(network.where), network.dialect, network.weights)
    try:
        net = cv2.dnn.readNetFromCaffe(
            np.frombuffer(merged.deploy().encode(), np.uint8), np.frombuffer(merged.weight_bytes(), np.uint8)
        )
    except (cv2.error, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{network.where}: OpenCV {cv2.__version__} cannot read it: {reason}") from error

    def scores(images: Values) -> Values:
        net.setInput(images)
        return np.asarray(net.forward(), np.float32)

    return f"OpenCV {cv2.__version__}", scores


_PROVIDERS: dict[Maker, str] = {"NVIDIA": "CUDAExecutionProvider", "AMD": "ROCMExecutionProvider"}
"""What onnxruntime calls the use of a GPU."""


def _onnxruntime(network: TrainedNetwork, _: str | None, gpu: int | None) -> tuple[str, Scores]:
    from caffe_jacinto.export.onnx import export_onnx

    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"onnxruntime is missing: {sys.executable} -m pip install onnxruntime onnx") from None
    model = export_onnx(network.text, str(network.where), network.dialect, network.weights)
    provider: Any = "CPUExecutionProvider"
    if gpu is not None:
        provider = (_provider(onnxruntime, gpu), {"device_id": gpu})
    session: Any = onnxruntime.InferenceSession(model, providers=[provider])
    source = session.get_inputs()[0].name

    def scores(images: Values) -> Values:
        values: Values = session.run(None, {source: images})[-1]
        return values

    return f"onnxruntime {onnxruntime.__version__}", scores


def _provider(onnxruntime: Any, gpu: int) -> str:
    """How this onnxruntime computes on ``gpu``.

    Raises:
        UserError: it cannot, or there is no such GPU.
    """
    available = onnxruntime.get_available_providers()
    for maker, provider in _PROVIDERS.items():
        if provider in available and gpu < len(visible_gpus(maker)):
            return provider
    raise UserError(
        f"onnxruntime {onnxruntime.__version__} cannot compute on GPU {gpu} here "
        f"(it has {', '.join(available)}): leave the GPUs out, or install onnxruntime-gpu"
    )


BACKENDS: dict[str, Callable[[TrainedNetwork, str | None, int | None], tuple[str, Scores]]] = {
    "caffe": _caffe,
    "opencv": _opencv,
    "onnxruntime": _onnxruntime,
}
"""By name, in the order in which they are tried."""
