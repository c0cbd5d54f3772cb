"""A solver's test nets, run as Caffe runs them, on the weights of the train net."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pycaffe.solver_file import SolverFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def start_caffe(pycaffe: Path, gpus: tuple[int, ...]) -> Any:
    """The ``caffe`` module from the folder ``pycaffe``, logging to stderr, on the first of ``gpus``.

    Raises:
        UserError: this Python cannot import it from there.
    """
    sys.path.insert(0, str(pycaffe))
    try:
        import caffe
    except ImportError as error:
        raise UserError(f"{pycaffe}: {sys.executable} cannot import pycaffe from there: {error}") from error

    caffe.init_log(0, True)
    caffe_log.info(f"This is Caffe {caffe.__version__} with pycaffe in {pycaffe}")
    caffe_log.using_devices(gpus[:1])
    if gpus:
        caffe.set_device(gpus[0])
        caffe.set_mode_gpu()
    else:
        caffe.set_mode_cpu()
    return caffe


@dataclass(frozen=True)
class Convolution:
    """A convolution of a net in memory."""

    name: str
    group: int
    blob: Any
    """Of the weights: outputs, inputs / group, height, width."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.blob.shape)

    @property
    def weights(self) -> NDArray[np.float32]:
        """A view, fetched from the device if they are there."""
        return self.blob.data  # type: ignore[no-any-return]

    @property
    def gradients(self) -> NDArray[np.float32]:
        """A view, as `weights`."""
        return self.blob.diff  # type: ignore[no-any-return]


def convolutions(net: Any) -> list[Convolution]:
    """The convolutions of ``net``, but for one whose output goes straight into the softmax."""
    types = [layer.type for layer in net.layers]
    scores = {
        blob for i, kind in enumerate(types) if kind.startswith("Softmax") for blob in net._bottom_ids(i)
    }
    for i, kind in enumerate(types):
        # Caffe puts a Split between a blob and its several readers.
        if kind == "Split" and scores.intersection(net._top_ids(i)):
            scores.update(net._bottom_ids(i))
    found = []
    for i, (name, layer) in enumerate(zip(net._layer_names, net.layers, strict=True)):
        if types[i] == "Convolution" and not scores.intersection(net._top_ids(i)):
            channels = net._blobs[net._bottom_ids(i)[0]].shape[1]
            found.append(Convolution(name, channels // layer.blobs[0].shape[1], layer.blobs[0]))
    return found


@dataclass(frozen=True)
class Output:
    """One number that a net puts out."""

    name: str
    loss_weight: float


def outputs(net: Any) -> list[Output]:
    """What the numbers of `output_values` are, in Caffe's order."""
    weights = net.blob_loss_weights
    return [
        Output(name, float(weights.get(name, 0)))
        for name in net.outputs
        for _ in range(net.blobs[name].count)
    ]


def output_values(net: Any) -> list[float]:
    """The numbers that the last forward pass put out."""
    return [float(value) for name in net.outputs for value in net.blobs[name].data.flat]


def loss(net: Any) -> float:
    """The weighted loss of the last forward pass."""
    return sum(
        float(weight) * float(net.blobs[name].data.sum())
        for name, weight in net.blob_loss_weights.items()
        if weight
    )


class TestNets:
    """The test nets of ``solver``, sharing the weights of ``train_net``."""

    __test__ = False  # its name is no sign for pytest

    def __init__(self, caffe: Any, solver: SolverFile, train_net: Any) -> None:
        self._train_net = train_net
        self._nets = []
        for index, (file, batches) in enumerate(solver.test_nets):
            caffe_log.info(f"Creating test net (#{index}) specified by test_net file: {file}")
            self._nets.append((caffe.Net(file, caffe.TEST), batches))

    def test(self, iteration: int, requests: StopRequests) -> None:
        """Log the outputs of every net, averaged over its batches; a request to stop ends it."""
        for index, (net, batches) in enumerate(self._nets):
            caffe_log.info(f"Iteration {iteration}, Testing net (#{index})")
            net.share_with(self._train_net)
            sums = [0.0] * len(outputs(net))
            for _ in range(batches):
                if requests.stop:
                    caffe_log.info("Test interrupted.")
                    return
                net.forward()
                sums = [total + value for total, value in zip(sums, output_values(net), strict=True)]
            for number, (output, total) in enumerate(zip(outputs(net), sums, strict=True)):
                caffe_log.net_output("Test", number, output.name, total / batches, output.loss_weight)
